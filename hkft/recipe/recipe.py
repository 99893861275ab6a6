"""A recipe: the YAML of a run, the `--set` on top of it, the defaults below it, and where each value came from.

text -> Tree (text.py) -> with every --set -> with the defaults of `lora` and `train` -> checked -> Recipe
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import PrivateAttr, ValidationError

from hkft.dropout.method import Method
from hkft.errors import Problem, RecipeError, secrets
from hkft.recipe import catalogue, fields
from hkft.recipe.problems import home, located, place
from hkft.recipe.schema import COLUMNS, SECTIONS, TASKS, Schema
from hkft.recipe.text import KeyPath, Place, Tree, dotted, dump, parse, show, written

_FULL_RECORD = (("dropout", "sites"), ("dropout", "consistency"))


@dataclass(frozen=True)
class _Origin:
    """Where a recipe came from. No part of its values: two recipes of different origin may be equal."""

    path: Path = field(compare=False)
    text: str = field(compare=False)
    overrides: tuple[str, ...] = field(compare=False)
    places: dict[KeyPath, Place] = field(compare=False)


class Recipe(Schema):
    """A checked recipe. `load` makes it; its sections are those of `Schema`."""

    _origin: _Origin = PrivateAttr()

    @property
    def name(self) -> str:
        """The file's name without its ending; of a run's resolved.yaml, the run's."""
        path = self._origin.path
        return path.resolve().parent.name if path.name == "resolved.yaml" else path.stem

    @property
    def path(self) -> Path:
        return self._origin.path

    @property
    def source(self) -> str:
        """The text of the file, exactly as given."""
        return self._origin.text

    @property
    def overrides(self) -> tuple[str, ...]:
        """Every `--set`, in order."""
        return self._origin.overrides

    @property
    def provenance(self) -> dict[str, str]:
        """For every value, by its dotted key: "default", "<file>:<line>" or "--set"."""
        return {dotted(path): self._came_from(path) for path in _leaves(self.values(), ())}

    def listed(self) -> list[tuple[str, str, str]]:
        """Every value: its dotted key, the value as YAML writes it, and where it came from."""
        dumped = self.values()
        return [(dotted(path), written(_at(dumped, path)), self._came_from(path)) for path in _leaves(dumped, ())]

    @property
    def method(self) -> Method:
        return self.dropout.as_method()

    def values(self) -> dict[str, Any]:
        """Every value of a run: all but what a comparison makes of the recipe."""
        return self.model_dump(exclude={"compare"})

    def resolved(self) -> str:
        """Every value of a run after defaults and `--set`, as YAML that `load` reads back to an equal recipe."""
        return dump(self.values())

    def fingerprint(self) -> str:
        """12 hex digits of the SHA-256 of every value: equal for equal recipes, whatever their files look like."""
        text = json.dumps(_canonical(self.values()), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def replace(self, *overrides: str) -> Recipe:
        """This recipe with more `--set` on top: `recipe.replace("dropout.rate=0.2")`. Raises as `load` does."""
        return _build(self.path, self.source, (*self.overrides, *overrides))

    def _came_from(self, path: KeyPath) -> str:
        if path not in self._origin.places:
            return "default"
        where = self._origin.places[path]
        return f"{where.source}:{where.line}" if where.line else "--set"


def load(source: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of a path or of a shipped recipe's name, with each `section.key=value` of `overrides` on top.

    Raises RecipeError with every problem at once (of the syntax alone, where that is wrong): the place as
    `file:line:column` or `--set section.key`, what was found, what is allowed, a hint. Raises SetupError where peft or
    transformers, whose fields `lora` and `train` are, is not installed.
    """
    path = catalogue.locate(source)
    return _build(path, catalogue.read(path), tuple(overrides))


def _build(path: Path, text: str, overrides: tuple[str, ...]) -> Recipe:
    _refuse_secrets(path, text, overrides)
    tree = parse(text, str(path))
    if not isinstance(tree.value, dict):
        if tree.problems:
            raise RecipeError(problems=tree.problems)
        found = "nothing" if tree.value is None else show(tree.value)
        raise RecipeError(
            "a recipe is a mapping of sections",
            where=f"{path}:1:1",
            found=found,
            allowed=", ".join(Schema.model_fields),
            hint="`hkft recipes` lists recipes to start from",
        )
    for override in overrides:
        tree = _with_override(tree, override)
    tree = _with_sections(tree)
    recipe, problems = _checked(tree)
    told = {problem.where for problem in tree.problems}  # a value that could not be read is not also of a wrong type
    problems = [*tree.problems, *(problem for problem in problems if problem.where not in told)]
    if problems or recipe is None:
        raise RecipeError(problems=sorted(map(_said_once, problems), key=_file_order))
    recipe._origin = _Origin(path, text, overrides, {**tree.values, **tree.keys})
    return recipe


def _refuse_secrets(path: Path, text: str, overrides: tuple[str, ...]) -> None:
    """Raise RecipeError where a token or a password stands in a recipe, which is copied into every run and its report."""
    pattern = secrets()
    places = [
        f"{path}:{text[:at].count(chr(10)) + 1}:{at - text.rfind(chr(10), 0, at)}"
        for at in (match.start() for match in pattern.finditer(text))
    ]
    places += [f"--set {override.partition('=')[0]}" for override in overrides if pattern.search(override)]
    if places:
        message = "this looks like a token or a password, and a recipe is copied into runs and reports"
        hint = "keep it in the environment: HF_TOKEN, WANDB_API_KEY, ..."
        raise RecipeError(problems=[Problem(message, where=place, hint=hint) for place in places])


def _with_override(tree: Tree, override: str) -> Tree:
    """`tree` with one `section.key=value`. What is wrong with it becomes a problem of the tree."""
    key, equals, text = override.partition("=")
    key = key.strip()
    parts = key.split(".")
    source = f"--set {key}" if equals and key else "--set"
    try:
        if not equals or not all(parts):
            raise RecipeError("not an assignment", where=source, found=repr(override), allowed="section.key=value")
        new = parse(text, source, lines=False)
        path = _path_in(tree.value, parts, source)
    except RecipeError as error:
        return replace(tree, problems=(*tree.problems, *error.problems))
    if path == ("dropout", "method"):
        for other in _FULL_RECORD:  # a name replaces the full record that the file holds, and the other way round
            tree = _without(tree, other)
    elif path[:2] == _FULL_RECORD[0]:
        tree = _without(tree, ("dropout", "method"))
    kept = _without(tree, path)
    around = {path[:length]: Place(source) for length in range(1, len(path) + 1)}
    return Tree(
        _put(tree.value, path, new.value),
        keys={**around, **kept.keys, **{path + below: where for below, where in new.keys.items()}},
        values={**kept.values, **{path + below: where for below, where in new.values.items()}},
        problems=(*kept.problems, *new.problems),
    )


def _path_in(value: Any, parts: list[str], source: str) -> KeyPath:
    """The parts of a dotted key, numbers where they go through a list. Raises RecipeError where nothing can be put."""
    path: KeyPath = ()
    for part in parts:
        if isinstance(value, list):
            if not part.isdecimal() or int(part) >= len(value):
                allowed = f"a number below {len(value)}"
                raise RecipeError(f"{dotted(path)} is a list", where=source, found=part, allowed=allowed)
            value, path = value[int(part)], (*path, int(part))
        elif value is None or isinstance(value, dict):
            value, path = (value or {}).get(part), (*path, part)
        else:
            raise RecipeError(f"{dotted(path)} is a value, not a section", where=source, found=show(value))
    return path


def _put(node: Any, path: KeyPath, value: Any) -> Any:
    if not path:
        return value
    head, rest = path[0], path[1:]
    if isinstance(node, list):
        return [_put(item, rest, value) if index == head else item for index, item in enumerate(node)]
    node = node or {}
    return {**node, head: _put(node.get(head), rest, value)}


def _without(tree: Tree, path: KeyPath) -> Tree:
    """`tree` without the value at `path` (in mappings) and without the places below it."""
    *around, last = path
    parent = tree.value
    for part in around:
        parent = parent[part] if isinstance(parent, dict) and part in parent else None
    value = tree.value
    if isinstance(parent, dict) and last in parent:
        value = _put(value, tuple(around), {key: item for key, item in parent.items() if key != last})
    keys = {other: where for other, where in tree.keys.items() if other[: len(path)] != path}
    values = {other: where for other, where in tree.values.items() if other[: len(path)] != path}
    return Tree(value, keys, values, tree.problems)


def _with_sections(tree: Tree) -> Tree:
    """`tree` with every section there: one that is empty or missing holds its defaults, and asks for its own keys."""
    value = {
        key: {} if key in {*SECTIONS, *fields.CLASSES} and item is None else item for key, item in tree.value.items()
    }
    return replace(tree, value={**{name: {} for name in (*SECTIONS, *fields.CLASSES)}, **value})


def _checked(tree: Tree) -> tuple[Recipe | None, list[Problem]]:
    values, problems = _with_fields(tree)
    problems += _columns(tree)
    try:
        return Recipe.model_validate(values), problems
    except ValidationError as error:
        return None, [*problems, *(located(entry, tree) for entry in error.errors(include_url=False))]


def _with_fields(tree: Tree) -> tuple[dict[str, Any], list[Problem]]:
    """The values with `lora` and `train` on top of hkft's defaults, each checked against the installed class."""
    values, problems = dict(tree.value), []
    for section in fields.CLASSES:
        if not isinstance(values[section], dict):
            continue
        fitted = fields.defaults(section)
        for key, value in values[section].items():
            fitted[key], problem = fields.check(section, key, value)
            if problem is None:
                continue
            unknown = key not in fields.installed(section)
            where = str(place(tree, (section, key), of_key=unknown or key in fields.DECIDED[section]))
            problems.append(replace(problem, where=where, hint=(unknown and home(key)) or problem.hint))
        values[section] = fitted
    return values, problems


def _columns(tree: Tree) -> list[Problem]:
    """The columns that the task needs and the recipe does not name, and those that the task does not use."""
    task, data = tree.value.get("task", TASKS[0]), tree.value["data"]
    if task not in TASKS or not isinstance(data, dict):
        return []
    given = {key for key in COLUMNS if data.get(key) is not None}
    if task != "generation":
        needed = ("text", "label")
    elif "messages" in given:
        needed = ("messages",)
    else:
        needed = ("prompt", "completion")
    instead = ", or data.messages in place of both" if needed == ("prompt", "completion") else ""
    section = str(place(tree, ("data",), of_key=True))
    missing = [
        Problem(f"data.{key} is required", section, hint=f"task {task} needs {_listed(needed)}{instead}")
        for key in needed
        if key not in given
    ]
    unused = [
        Problem(
            f"data.{key} and data.messages exclude each other"
            if key in ("prompt", "completion") and task == "generation"
            else f"data.{key} is not used by task {task}",
            str(place(tree, ("data", key), of_key=True)),
            allowed=_listed(needed),
            hint="remove it" if set(needed) <= given else "remove it, or set the `task` that uses it",
        )
        for key in COLUMNS
        if key in given and key not in needed
    ]
    if data.get("padding_free") is True and task != "generation":
        where = str(place(tree, ("data", "padding_free"), of_key=True))
        unused.append(
            Problem(f"data.padding_free is not used by task {task}", where, hint="only decoders that generate")
        )
    return missing + unused


def _listed(columns: Sequence[str]) -> str:
    return " and ".join(f"data.{column}" for column in columns)


def _leaves(value: Any, path: KeyPath) -> Iterator[KeyPath]:
    """The paths of the values that hold no other named values; a list of plain values is one."""
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from _leaves(item, (*path, key))
    elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
        for index, item in enumerate(value):
            yield from _leaves(item, (*path, index))
    else:
        yield path


def _at(value: Any, path: KeyPath) -> Any:
    for part in path:
        value = value[part]
    return value


def _canonical(value: Any) -> Any:
    """Values with 10.0 written as 10: equal numbers have one fingerprint."""
    if isinstance(value, dict):
        return {key: _canonical(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_canonical(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _said_once(problem: Problem) -> Problem:
    """`--set dropout.rate: dropout.rate: ...` without the second name."""
    name = (problem.where or "").removeprefix("--set ")
    return replace(problem, message=problem.message.removeprefix(f"{name}: "))


def _file_order(problem: Problem) -> tuple[bool, int, int]:
    """As they stand in the file, then those of `--set`."""
    place = re.search(r":(\d+):(\d+)$", problem.where or "")
    return (False, int(place[1]), int(place[2])) if place else (True, 0, 0)
