"""Canonical rows of generation: `prompt` and `completion`, and for chats `messages`.

A chat's prompt is all that stands before the assistant's last turn, its completion what that turn says. `prompt` and
`messages` of a chat are JSON; both name the turns as {"role", "content"}, also where the source says {"from", "value"}.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import datasets

from hkft.data.sources import cells_of
from hkft.errors import DataError
from hkft.recipe.template import Template, template

Turn = dict[str, Any]

ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant", "chatgpt": "assistant"}
TURN = '{"role": "user", "content": "..."}'


class PromptSection(Protocol):
    """What this module reads of a recipe's `data`."""

    @property
    def prompt(self) -> str | None: ...
    @property
    def completion(self) -> str | None: ...
    @property
    def messages(self) -> str | None: ...


def columns_of(
    source: datasets.Dataset, data: PromptSection, labelled: bool, reference: str, ids: Sequence[int]
) -> dict[str, list[Any]]:
    """The canonical columns of `source`, None where a row has nothing there. Raises DataError, with the row's id."""
    if data.messages is not None:
        where, cells = f"{reference}: {data.messages}", cells_of(source, data.messages)
        return _of_chats([conversation(cell, where, row) for row, cell in zip(ids, cells, strict=True)], labelled)
    assert data.prompt is not None, "the recipe room lets no such recipe through"
    columns = {"prompt": _filled(source, template(data.prompt), reference, ids)}
    if labelled:
        assert data.completion is not None
        columns["completion"] = _filled(source, template(data.completion), reference, ids)
    return columns


def conversation(cell: Any, where: str, row: int) -> list[Turn]:
    """The turns of a chat, from a list of them or from its JSON; none where the cell is empty. Raises DataError."""
    turns = cell
    if isinstance(cell, str):
        try:
            turns = json.loads(cell) if cell.strip() else None
        except (ValueError, RecursionError):
            turns = cell
    if isinstance(turns, Mapping) and "messages" in turns:
        turns = turns["messages"]
    turns = [] if turns is None else turns
    if not isinstance(turns, list) or not all(isinstance(turn, Mapping) for turn in turns):
        message = f"row {row} (the first is 0) is no chat, which is a list of turns"
        raise DataError(message, where=where, found=repr(cell)[:80], allowed=f"[{TURN}, ...]")
    return [_turn(turn, where, row) for turn in turns]


def _turn(turn: Mapping[str, Any], where: str, row: int) -> Turn:
    named = {{"from": "role", "value": "content"}.get(key, key): item for key, item in turn.items() if item is not None}
    role, content = named.get("role"), _said(named.get("content", ""))
    if not isinstance(role, str) or content is None:
        lacking = "what is said as text" if isinstance(role, str) else "who speaks"
        message = f"row {row} (the first is 0) has a turn that does not tell {lacking}"
        raise DataError(message, where=where, found=repr(dict(turn))[:80], allowed=TURN)
    return {**named, "role": ROLES.get(role.lower(), role.lower()), "content": content}


def _said(content: Any) -> str | None:
    """What a turn says: a text, a number, or the texts of a list of parts; None: something else, or no Unicode."""
    if isinstance(content, list):
        parts = [part.get("text") if isinstance(part, Mapping) else part for part in content]
        texts = [part for part in parts if isinstance(part, str)]
        content = "".join(texts) if len(texts) == len(parts) else None
    if isinstance(content, bool) or not isinstance(content, str | int | float):
        return None
    try:
        return str(content).encode().decode()
    except UnicodeEncodeError:  # JSON can hold half a surrogate pair
        return None


def _of_chats(chats: Sequence[list[Turn]], labelled: bool) -> dict[str, list[Any]]:
    if not labelled:
        prompts = [_dumped(_unanswered(chat)) for chat in chats]
        return {"prompt": prompts, "messages": prompts}
    answered = [_answered(chat) for chat in chats]
    return {
        "completion": [chat[-1]["content"] if chat else None for chat in answered],
        "prompt": [_dumped(chat[:-1]) for chat in answered],
        "messages": [_dumped(chat) for chat in answered],
    }


def _dumped(chat: Sequence[Turn]) -> str | None:
    return json.dumps(chat) if chat else None


def _answered(chat: list[Turn]) -> list[Turn]:
    """The chat up to the last turn in which the assistant says something; nothing where it never does."""
    return _up_to(chat, lambda turn: turn["role"] == "assistant" and turn["content"].strip() != "")


def _unanswered(chat: list[Turn]) -> list[Turn]:
    """The chat without the assistant's turns at its end: what an answer is to be written for."""
    return _up_to(chat, lambda turn: turn["role"] != "assistant")


def _up_to(chat: list[Turn], wanted: Callable[[Turn], bool]) -> list[Turn]:
    return chat[: max((place for place, turn in enumerate(chat, 1) if wanted(turn)), default=0)]


def _filled(source: datasets.Dataset, form: Template, reference: str, ids: Sequence[int]) -> list[str | None]:
    """The template filled with the cells of every row."""
    cells = {column: _cells(source, column, reference, ids) for column in form.columns}
    return [form.fill(dict(zip(cells, row, strict=True))) for row in zip(*cells.values(), strict=True)]


def _cells(source: datasets.Dataset, column: str, reference: str, ids: Sequence[int]) -> list[Any]:
    """The column's cells, with the names of classes for their numbers. Raises DataError for one that is no text."""
    cells, feature = cells_of(source, column), source.features[column]
    if isinstance(feature, datasets.ClassLabel):
        return [None if cell is None or cell < 0 else feature.names[cell] for cell in cells]
    for row, cell in zip(ids, cells, strict=True):
        if not _is_text(cell):
            message, where = f"row {row} (the first is 0) holds no text", f"{reference}: {column}"
            hint = "a column of chats goes with data.messages" if isinstance(cell, list) else None
            raise DataError(
                message, where=where, found=repr(cell)[:80], allowed="text, a number, a list of texts", hint=hint
            )
    return cells


def _is_text(cell: Any) -> bool:
    if isinstance(cell, list):
        return all(isinstance(item, str) for item in cell)
    return not isinstance(cell, dict | bytes)
