"""What `hkft check` found of one recipe is not found out again while all that it depends on is the same.

A plan needs torch, transformers and peft, whose imports take seconds. So it is kept, by a key of the content of everything it
was made from: the recipe's values (but for numbers that no plan hangs on, such as the learning rate), every local file that the
recipe names, hkft's own source, the installed packages, the process's environment and the devices. Anything else anywhere is
another key. Only plans are kept, no errors; and none of what this machine alone cannot answer for: the hub's models and data sets, and packages that are edited in place.

An entry is plans/<key>.json in the cache directory: a line with the sha256 of the rest, and JSON. A cache that is damaged
or cannot be written costs the time that it would have saved.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hkft.data.references import HUB, PACKAGE, package_path
from hkft.errors import HkftError
from hkft.events import Event, Listener, Notice, Sample, Stage
from hkft.folder import cache_directory, default_folder, jsonable, write_text
from hkft.recipe import Recipe

FORMAT = 2  # of an entry and of what its key is made of
MOST = 200  # entries; the oldest go
LARGE = 2**25  # bytes: a larger file of a model is its weights, which a plan does not read
WORKED_WITH = ("torch", "transformers", "peft", "datasets", "accelerate", "tokenizers", "numpy")
DEVICES = ("nvidia*", "kfd", "dxg", "accel*")  # below /dev
FREE = (  # numbers that are not in a plan; of a dropout rate and a weight only whether they are 0
    ("train", ("learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm")),
    ("train", ("warmup_steps", "logging_steps")),
    ("lora", ("lora_alpha",)),
    ("dropout", ("rate", "weight")),
    ("diagnostics", ("patience",)),
)
SHELL = ("_", "PWD", "OLDPWD", "SHLVL", "PS1", "COLUMNS", "LINES")  # of the environment, what says nothing


def plan(recipe: Recipe, tell: Listener, make: Callable[[Listener], dict[str, Any]]) -> dict[str, Any]:
    """The kept plan of the recipe, told with the notices it was made with; else what `make` makes, which is then kept.

    Raises what `make` raises.
    """
    environment = dict(os.environ)  # libraries add to it as they are imported
    key = _key(recipe, environment)
    kept = _read(key) if key else None
    if kept is not None:
        tell(Stage("as at an earlier check, since which nothing has changed that a plan hangs on"))
        for event in kept["told"]:
            sample = tuple((text, learned) for text, learned in event.get("sample", ()))
            tell(Sample(sample) if sample else Notice(**event["notice"]))
        return kept["plan"] | {"recipe": recipe.name, "output": str(default_folder(recipe))}
    told: list[dict[str, Any]] = []

    def heard(event: Event) -> None:
        if isinstance(event, Notice):
            told.append({"notice": {"text": event.text, "level": event.level}})
        elif isinstance(event, Sample):
            told.append({"sample": event.pieces})
        tell(event)

    made = make(heard)
    if key and key == _key(recipe, environment):  # else a file was written meanwhile, and is that of no key
        _write(key, jsonable({"plan": made, "told": told}))
    return made


def _place(key: str) -> Path:
    return cache_directory() / "plans" / f"{key}.json"


def _read(key: str) -> dict[str, Any] | None:
    try:
        digest, _, body = _place(key).read_text(encoding="utf-8").partition("\n")
    except (OSError, ValueError):
        return None
    return json.loads(body) if digest == hashlib.sha256(body.encode()).hexdigest() else None


def _write(key: str, entry: dict[str, Any]) -> None:
    body = json.dumps(entry)
    with suppress(OSError):
        place = _place(key)
        write_text(place, f"{hashlib.sha256(body.encode()).hexdigest()}\n{body}")
        for old in sorted(place.parent.glob("*.json"), key=lambda path: path.stat().st_mtime)[:-MOST]:
            old.unlink(missing_ok=True)


def _key(recipe: Recipe, environment: Mapping[str, str]) -> str | None:
    """sha256, in hexadecimal, of all that the recipe's plan depends on; None where that cannot be told."""
    files, packages = _files(recipe), _packages()
    if files is None or packages is None:
        return None
    own = Path(__file__).parents[1]
    parts = {
        "format": FORMAT,
        "recipe": _values(recipe),
        "files": files,
        "hkft": [[str(path), _content(path)] for path in sorted(own.rglob("*.py"))],
        "packages": packages,
        "python": [sys.version, sys.platform, os.cpu_count()],
        "environment": sorted([name, value] for name, value in environment.items() if name not in SHELL),
        "devices": sorted(str(path) for kind in DEVICES for path in Path("/dev").glob(kind)),
    }
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _values(recipe: Recipe) -> dict[str, Any]:
    """A recipe's values, a number of `FREE` by no more than its kind and its sign."""
    values = recipe.values()
    for section, names in FREE:
        for name in names:
            number = values[section].get(name)
            if isinstance(number, int | float) and not isinstance(number, bool):
                values[section][name] = [type(number).__name__, number > 0, number < 0]
    return jsonable(values)


def _files(recipe: Recipe) -> list[Any] | None:
    """What the recipe names on this machine, with its content; None where it names what is on the hub, or a fault."""
    try:
        model = package_path(recipe.model.name) if recipe.model.name.startswith(PACKAGE) else Path(recipe.model.name)
        found: list[Any] = [[str(model), [_described(model, path) for path in sorted(model.rglob("*"))]]]
        if not (model / "config.json").is_file() or (model / "adapter_config.json").exists():  # one leads elsewhere
            return None
        for text in _texts(recipe.values()):
            if text.startswith(HUB):
                return None
            path = package_path(text) if text.startswith(PACKAGE) else Path(text).expanduser()
            found.append([text, _content(path) if _is_file(path) else None])
    except (HkftError, OSError, RuntimeError):
        return None
    return found


def _texts(value: Any) -> Iterator[str]:
    """Every text in a recipe, any of which may name a file: of rows, of DeepSpeed, of FSDP."""
    if isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _texts(item)
    elif isinstance(value, str):
        yield value


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a text that is too long for a name
        return False


def _described(folder: Path, path: Path) -> list[Any]:
    facts = path.stat()
    small = facts.st_size <= LARGE and path.is_file()
    return [str(path.relative_to(folder)), facts.st_size, _content(path) if small else facts.st_mtime_ns]


def _content(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _packages() -> list[str] | None:
    """Names and versions of what is installed; None where a package that makes the plan has none beside it."""
    for name in WORKED_WITH:
        spec = find_spec(name)  # of a top-level name: finds it, imports nothing
        if spec is None or not spec.origin or not any(Path(spec.origin).parents[1].glob(f"{name}-*.*-info")):
            return None
    return sorted(path.name for folder in set(sys.path) for path in Path(folder).glob("*.*-info"))
