"""Batches of rows -> examples, by a function of the tokenizer: in memory, or once for all runs in the cache."""

from __future__ import annotations

import copy
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import tokenizers
import transformers
from transformers import PreTrainedTokenizerBase

from hkft.data import cache
from hkft.events import Listener, Stage

BATCH = 1000
# Rows of each process that tokenises. A chat takes about 1 ms, starting processes 2 s: 10,000 chats took 11.8 s in one and
# 6.7 s in two, 2,000 chats 2.6 s and 4.4 s (two busy cores). Fast tokenizers have threads of their own, and need none.
MANY = 10_000

Encode = Callable[[Mapping[str, list[Any]]], dict[str, Any]]


def encoded(
    rows: datasets.Dataset,
    encode: Encode,
    features: datasets.Features,
    tell: Listener,
    name: str,
    *,
    key: str | None = None,
    slow: bool = False,
) -> datasets.Dataset:
    """What `encode` makes of batches of the rows, with the columns of `features` alone.

    In memory; with a `key` (see `cache.key`) in the cache, where nothing is done if that has it already. slow: encode works
    in Python, row by row, so that with many rows several processes pay.
    """

    def make(file: Path | None) -> datasets.Dataset:
        several = _processes(len(rows)) if slow and file is not None else 1
        settings: dict[str, Any] = {
            "batched": True,
            "batch_size": BATCH,
            "remove_columns": rows.column_names,
            "features": features,
            "load_from_cache_file": False,
            "new_fingerprint": "tokenised",  # else datasets pickles the tokenizer to make one up
            **({"keep_in_memory": True} if file is None else {"cache_file_name": str(file)}),
        }
        if several == 1:
            return rows.map(_heard(encode, len(rows), tell, name), **settings)
        tell(Stage(f"tokenising {name} in {several} processes"))
        with _single_threads():
            return rows.map(encode, num_proc=several, **settings)

    return make(None) if key is None else cache.kept(key, make, tell)


def key_of(content: str, tokenizer: PreTrainedTokenizerBase, longest: int) -> str:
    """The key of rows (by their fingerprint, see `splits`) that this tokenizer makes examples of `longest` tokens of."""
    return cache.key(
        kind="examples",
        rows=content,
        tokenizer=identity(tokenizer),
        longest=longest,
        transformers=transformers.__version__,
        tokenizers=tokenizers.__version__,
    )


def identity(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """All of a tokenizer that the tokens of a text depend on, by content: the same wherever it lies."""
    names = ("chat_template", "model_max_length", "padding_side", "truncation_side", "model_input_names")
    told = {name: getattr(tokenizer, name, None) for name in (*names, "split_special_tokens")}
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    added = {str(place): repr(token) for place, token in tokenizer.added_tokens_decoder.items()}
    kind = type(tokenizer).__name__
    return {"class": kind, **told, "special": special, "added": added, "vocabulary": _vocabulary(tokenizer)}


def _vocabulary(tokenizer: PreTrainedTokenizerBase) -> Any:
    """Of a fast tokenizer all that its core does to a text, but for what a call before left in it; else its files."""
    if tokenizer.is_fast:
        core: Any = copy.deepcopy(tokenizer.backend_tokenizer)
        core.no_truncation()
        core.no_padding()
        return core.to_str()
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return {
            str(path.relative_to(folder)): path.read_bytes().hex()
            for path in sorted(Path(folder).rglob("*"))
            if path.is_file()
        }


def _heard(encode: Encode, total: int, tell: Listener, name: str) -> Encode:
    """encode, telling how far it is."""
    done = 0

    def counted(batch: Mapping[str, list[Any]]) -> dict[str, Any]:
        nonlocal done
        found = encode(batch)
        done += len(batch["id"])
        tell(Stage(f"tokenising {name}", done, total))
        return found

    return counted


def _processes(rows: int) -> int:
    """How many pay; one where a process is not forked, for a program without a guard would begin anew in each."""
    if not sys.platform.startswith("linux"):
        return 1
    cores = len(os.sched_getaffinity(0))
    return max(1, min(cores, rows // MANY))


@contextmanager
def _single_threads() -> Iterator[None]:
    """Tokenizers without threads of their own, which do not survive a fork.

    And the process's own `os.environ` afterwards: `datasets` leaves a copy in its place, which whoever holds the first
    no longer hears of.
    """
    name, environ = "TOKENIZERS_PARALLELISM", os.environ
    before = environ.get(name)
    environ[name] = "false"
    try:
        yield
    finally:
        os.environ = environ  # noqa: B003
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
