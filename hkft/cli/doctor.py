"""hkft doctor"""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import typer

from hkft.cli.shared import Debug, Json, quiet, reported, show_json
from hkft.errors import Problem, SetupError


@reported
def doctor(json: Json = False, debug: Debug = False) -> None:
    """Versions, devices, and what works here, by trying it. Exits with 4 where something that hkft needs does not."""
    from hkft.training import machine
    from hkft.view.doctor import show_machine
    from hkft.view.errors import show_error
    from hkft.view.terminal import view

    with view(json=json) as tell:
        found: dict[str, Any] = {}
        with suppress(Exception):  # what cannot be loaded is told by what is tried
            quiet(tell)
            from hkft.training.environment import examine

            found = examine()
        found = machine.examine(tell) | found
    show_json(found) if json else show_machine(found)
    broken = [check for check in found["checks"] if check["required"] and not check["works"]]
    if broken:
        told = SetupError(problems=[Problem(each["told"], each["name"], hint=each["next"]) for each in broken])
        show_error(told)
        raise typer.Exit(told.exit_code)
