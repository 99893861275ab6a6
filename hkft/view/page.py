"""The HTML pages: one file each that needs nothing else, from the templates in `templates/`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hkft.folder import write_text


def write_page(path: Path, template: str, **values: Any) -> None:
    """Render `template` to `path`, whole or not at all. All text is escaped: what it holds is shown, never run."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    jinja = Environment(
        loader=PackageLoader("hkft.view", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    write_text(path, jinja.get_template(template).render(**values))
