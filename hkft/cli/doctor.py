"""hkft doctor"""

from __future__ import annotations

from hkft.cli.shared import Debug, Json, quiet, reported, show_json


@reported
def doctor(json: Json = False, debug: Debug = False) -> None:
    """Versions, devices, and what works here."""
    from hkft.view.tables import table
    from hkft.view.terminal import view

    with view(json=json) as tell:
        quiet(tell)
        from hkft.training.environment import examine

        found = examine()
    if json:
        return show_json(found)
    for title, rows in found.items():
        table([title, ""], [[name, "not installed" if value is None else value] for name, value in rows.items()])
    return None
