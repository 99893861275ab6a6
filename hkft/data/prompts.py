"""Canonical rows of generation: `prompt` and `completion`, and for chats `messages`.

A chat's prompt is all that stands before the assistant's last turn, its completion what that turn says. `prompt` and
`messages` of a chat are JSON; both name the turns as {"role", "content"}, also where the source says {"from", "value"}.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import datasets

from hkft.data.sources import cells_of
from hkft.errors import DataError
from hkft.recipe.template import Template, template

Turn = dict[str, Any]

ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant", "chatgpt": "assistant"}


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
        cells = cells_of(source, data.messages)
        chats = [
            conversation(cell, f"{reference}: {data.messages}, row {row}") for row, cell in zip(ids, cells, strict=True)
        ]
        return _of_chats(chats, labelled)
    assert data.prompt is not None, "the recipe room lets no such recipe through"
    columns = {"prompt": _filled(source, template(data.prompt), reference)}
    if labelled:
        assert data.completion is not None
        columns["completion"] = _filled(source, template(data.completion), reference)
    return columns


def conversation(cell: Any, where: str) -> list[Turn]:
    """The turns of a chat, from a list of them or from its JSON. Raises DataError for anything else."""
    try:
        turns = json.loads(cell) if isinstance(cell, str) and cell.strip() else cell or []
    except ValueError:
        turns = cell
    if isinstance(turns, Mapping) and "messages" in turns:
        turns = turns["messages"]
    if not isinstance(turns, list) or not all(isinstance(turn, Mapping) for turn in turns):
        raise DataError(
            "a chat is a list of turns", where=where, found=repr(cell)[:80], allowed='[{"role": ..., "content": ...}]'
        )
    return [_turn(turn, where) for turn in turns]


def _turn(turn: Mapping[str, Any], where: str) -> Turn:
    named = {{"from": "role", "value": "content"}.get(key, key): item for key, item in turn.items() if item is not None}
    role = named.get("role")
    if not isinstance(role, str):
        raise DataError("a turn of a chat says who speaks", where=where, found=repr(dict(turn))[:80], allowed="role")
    return {**named, "role": ROLES.get(role, role), "content": named.get("content", "")}


def _of_chats(chats: Sequence[list[Turn]], labelled: bool) -> dict[str, list[Any]]:
    if not labelled:
        prompts = [json.dumps(chat) if chat else None for chat in chats]
        return {"prompt": prompts, "messages": prompts}
    ends = [_last_answer(chat) for chat in chats]
    pairs = list(zip(chats, ends, strict=True))
    return {
        "completion": [None if end is None else str(chat[end]["content"]) for chat, end in pairs],
        "prompt": [json.dumps(chat[:end]) if end else None for chat, end in pairs],
        "messages": [json.dumps(chat[: end + 1]) if end else None for chat, end in pairs],
    }


def _last_answer(chat: Sequence[Turn]) -> int | None:
    """Where the assistant speaks last, and says something."""
    return next(
        (n for n in reversed(range(len(chat))) if chat[n]["role"] == "assistant" and str(chat[n]["content"]).strip()),
        None,
    )


def _filled(source: datasets.Dataset, form: Template, reference: str) -> list[str | None]:
    """The template filled with the cells of every row."""
    cells = {column: cells_of(source, column) for column in form.columns}
    for column, found in cells.items():
        if nested := [cell for cell in found if not _is_text(cell)]:
            raise DataError(f"column {column!r} holds no text", where=reference, found=repr(nested[0])[:80])
    return [form.fill(dict(zip(cells, row, strict=True))) for row in zip(*cells.values(), strict=True)]


def _is_text(cell: Any) -> bool:
    if isinstance(cell, list):
        return all(isinstance(item, str) for item in cell)
    return not isinstance(cell, dict | bytes)
