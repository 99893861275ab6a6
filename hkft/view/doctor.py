"""What `hkft doctor` found, on the terminal: a line for each package, and for each thing that was tried."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hkft.view.tables import table


def show_machine(found: Mapping[str, Any]) -> None:
    """Versions beside what is needed; what works, and of what does not, why, and what to do."""
    needs = found["requirements"]
    versions = [
        [name, value or "not installed", needs.get(name, {}).get("needed", ""), _old(needs.get(name))]
        for name, value in found["versions"].items()
    ]
    table(["versions", "installed", "needed", ""], versions)
    for title in ("devices", "what a recipe may ask for"):
        if title in found:
            table([title, ""], [[name, value] for name, value in found[title].items()])
    rows = [
        [check["name"], "works" if check["works"] else "does not", check["told"], check["next"] or ""]
        for check in found["checks"]
    ]
    table(["what was tried", "", "", "next"], rows)


def _old(need: Mapping[str, Any] | None) -> str:
    if need is None or need["works"]:
        return ""
    return "too old" if need["installed"] else "missing"
