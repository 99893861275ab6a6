"""YAML text -> plain values, with the place of every key and value.

PyYAML parses; what differs from `yaml.safe_load`:

- scalars follow the core schema of YAML 1.2: `1e-4` is a number, `010` is ten, `0o17` is fifteen; `on`, `1:30` and
  `2024-01-01` are text;
- a key is text, and may stand once in its mapping;
- every key and value keeps its line and column;
- size, depth and number of nodes are limited, with aliases expanded.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml
from yaml.reader import ReaderError

from hkft.errors import Problem, RecipeError

KeyPath = tuple[str | int, ...]

MAX_BYTES = 1_000_000
MAX_NODES = 10_000
MAX_DEPTH = 40

_TAG = "tag:yaml.org,2002:"
_FLOAT = r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
CORE_SCHEMA: dict[str, tuple[re.Pattern[str], list[str]]] = {  # tag: what it matches, and the first characters of that
    "null": (re.compile(r"^(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""]),
    "bool": (re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")),
    "int": (re.compile(r"^(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)$"), list("-+0123456789")),
    "float": (re.compile(rf"^(?:{_FLOAT})$"), list("-+.0123456789")),
}

# What PyYAML says -> what is wrong, what to do.
_SYNTAX = {
    "found character '\\t'": ("a tab stands here, and YAML takes spaces only", "replace the tab by spaces"),
    "mapping values are not allowed": (
        "a value cannot start at this ':'",
        "put a text that holds ': ' in quotes; else look at the indentation of this line",
    ),
    "could not find expected ':'": ("this line has no ':'", "write `key: value`"),
    "but found '<scalar>'": (
        "text goes on after a bracket or a quote is closed",
        "put the whole text in quotes, in a shell inside others",
    ),
    "expected <block end>": (
        "this line is indented neither like the one above nor as a part of it",
        "indent the keys of one section equally",
    ),
    "expected ',' or": ("a bracket is not closed, or a comma is missing", "close every [ with ] and every { with }"),
    "expected a single document": ("a second document starts here", "a recipe is one document: remove the `---`"),
}


@dataclass(frozen=True)
class Place:
    """Where a key or value stands: a file's line and column, both from 1, or a `--set`, which has neither."""

    source: str
    line: int = 0
    column: int = 0

    def __str__(self) -> str:
        return f"{self.source}:{self.line}:{self.column}" if self.line else self.source


@dataclass(frozen=True)
class Tree:
    """Values read from text; the places of keys and values; what was wrong but did not stop the reading."""

    value: Any
    keys: Mapping[KeyPath, Place] = field(default_factory=dict)
    values: Mapping[KeyPath, Place] = field(default_factory=dict)
    problems: tuple[Problem, ...] = ()


def parse(text: str, source: str, *, lines: bool = True) -> Tree:
    """Read one YAML document. `source` names it in messages; without `lines` it is all there is to say of a place.

    Raises RecipeError where the text cannot be read as YAML at all, or is too large.
    """
    if len(text) > MAX_BYTES:
        raise RecipeError("too large for a recipe", where=source, found=f"{len(text):,} characters", allowed="1 MB")
    loader = None
    try:
        loader = _Loader(text)
        root = loader.get_single_node()
    except ReaderError as error:
        raise _unreadable(error, text, source, lines) from None
    except yaml.MarkedYAMLError as error:
        raise _malformed(error, source, lines) from None
    except RecursionError:
        raise _too_deep(Place(source)) from None
    finally:
        if loader is not None:
            loader.dispose()
    reader = _Reader(source, lines)
    value = None if root is None else reader.read(root, ())
    return Tree(value, reader.keys, reader.values, tuple(reader.problems))


def dump(values: Mapping[str, Any]) -> str:
    """YAML that `parse` reads back to the same values: a text that YAML 1.1 or 1.2 takes for more is quoted."""
    return yaml.dump(dict(values), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def written(value: Any) -> str:
    """A value as YAML writes it, on one line."""
    return yaml.safe_dump(value, default_flow_style=True, width=math.inf).removesuffix("\n...\n").strip()


def dotted(path: KeyPath) -> str:
    return ".".join(map(str, path))


def show(value: Any) -> str:
    """A value as a message quotes it: on one line, as YAML writes it, cut at 80 characters."""
    if isinstance(value, str):
        line = repr(value)
    else:
        line = yaml.dump(value, Dumper=_Dumper, default_flow_style=True, sort_keys=False, width=math.inf)
        line = line.removesuffix("\n").removesuffix("\n...")
    return line if len(line) <= 80 else line[:77] + "..."


def is_number(text: str) -> bool:
    """Whether the text would be a number, were it not quoted."""
    return any(CORE_SCHEMA[tag][0].match(text) for tag in ("int", "float"))


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = {}  # noqa: RUF012 - PyYAML's own name and shape


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


for _tag, (_pattern, _first) in CORE_SCHEMA.items():
    _Loader.add_implicit_resolver(_TAG + _tag, _pattern, _first)
    _Dumper.add_implicit_resolver(_TAG + _tag, _pattern, _first)


class _Reader:
    """Walks PyYAML's nodes once, expanding aliases, and collects values, places and problems."""

    def __init__(self, source: str, lines: bool) -> None:
        self.source = source
        self.lines = lines
        self.keys: dict[KeyPath, Place] = {}
        self.values: dict[KeyPath, Place] = {}
        self.problems: list[Problem] = []
        self.seen = 0

    def read(self, node: yaml.Node, path: KeyPath) -> Any:
        self.seen += 1
        place = self.values[path] = _place(self.source, node.start_mark, self.lines)
        if len(path) > MAX_DEPTH:
            raise _too_deep(place)
        if self.seen > MAX_NODES:
            raise RecipeError(
                "too many values for a recipe, with its aliases expanded", where=str(place), allowed=f"{MAX_NODES:,}"
            )
        if isinstance(node, yaml.MappingNode) and node.tag == _TAG + "map":
            return self._mapping(node, path)
        if isinstance(node, yaml.SequenceNode) and node.tag == _TAG + "seq":
            return [self.read(child, (*path, index)) for index, child in enumerate(node.value)]
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node, place)
        return self._refused_tag(node, place)

    def _mapping(self, node: yaml.MappingNode, path: KeyPath) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for key_node, value_node in node.value:
            place = _place(self.source, key_node.start_mark, self.lines)
            if not isinstance(key_node, yaml.ScalarNode):
                self.problems.append(Problem("a key is a single word or text", str(place)))
                continue
            key = key_node.value
            if key in values:
                first = self.keys[(*path, key)]
                hint = f"the first is at {first}; keep one of them"
                self.problems.append(Problem(f"{dotted((*path, key))} is given twice", str(place), hint=hint))
                continue
            self.keys[(*path, key)] = place
            values[key] = self.read(value_node, (*path, key))
        return values

    def _scalar(self, node: yaml.ScalarNode, place: Place) -> Any:
        kind = node.tag.removeprefix(_TAG)
        if kind == "str":
            return node.value
        if kind not in CORE_SCHEMA:
            return self._refused_tag(node, place)
        try:
            return _convert(kind, node.value)
        except ValueError:
            self.problems.append(Problem(f"not a value that can be read as {kind}", str(place), show(node.value)))
            return None

    def _refused_tag(self, node: yaml.Node, place: Place) -> None:
        tag = node.tag.replace(_TAG, "!!")
        self.problems.append(Problem("a recipe holds plain values, no tags", str(place), tag, hint="remove the tag"))


def _convert(kind: str, text: str) -> Any:
    if not CORE_SCHEMA[kind][0].match(text) and not (kind == "float" and CORE_SCHEMA["int"][0].match(text)):
        raise ValueError(text)
    if kind == "null":
        return None
    if kind == "bool":
        return text.lower() == "true"
    if kind == "int":
        return int(text, 0) if text[:2] in ("0o", "0x") else int(text)
    number = float(text.replace(".", "") if text.lower().endswith((".inf", ".nan")) else text)
    if math.isnan(number):
        raise ValueError(text)  # no setting means anything by it, and it is not even equal to itself
    return number


def _place(source: str, mark: Any, lines: bool) -> Place:
    return Place(source, mark.line + 1, mark.column + 1) if lines and mark else Place(source)


def _malformed(error: yaml.MarkedYAMLError, source: str, lines: bool) -> RecipeError:
    said = error.problem or error.context or "it cannot be read"
    if error.problem == "found unexpected end of stream" and error.context_mark:
        opened = str(_place(source, error.context_mark, lines))
        return RecipeError("a quote opens here and is not closed", where=opened, hint="close it with the same sign")
    where = str(_place(source, error.problem_mark or error.context_mark, lines))
    for start, (message, hint) in _SYNTAX.items():
        if start in f"{error.problem} {error.context}":
            return RecipeError(message, where=where, hint=hint)
    return RecipeError(f"not valid YAML: {said}", where=where)


def _unreadable(error: ReaderError, text: str, source: str, lines: bool) -> RecipeError:
    before = text[: error.position]
    line, column = before.count("\n") + 1, len(before) - before.rfind("\n")
    place = Place(source, line, column) if lines else Place(source)
    found = f"character U+{ord(text[error.position]):04X}"
    return RecipeError("a control character cannot stand in YAML", where=str(place), found=found)


def _too_deep(place: Place) -> RecipeError:
    return RecipeError("nested too deeply for a recipe", where=str(place), allowed=f"{MAX_DEPTH} levels")
