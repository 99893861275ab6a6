"""Canonical rows -> examples a model takes, and examples -> a padded batch."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
import torch
from transformers import DataCollatorWithFlattening, DataCollatorWithPadding, PreTrainedTokenizerBase

from hkft.data.completions import IGNORED, MUCH, examples_of
from hkft.data.encoding import encoded, key_of
from hkft.data.quiet import quiet
from hkft.data.sources import cells_of, column_of
from hkft.errors import SetupError, UsageError
from hkft.events import Listener, Notice

NOT_FOR_THE_MODEL = ("id", "length", "prompt_length", "prompt", "completion")

_KINDS = {
    "input_ids": datasets.List(datasets.Value("int32")),
    "attention_mask": datasets.List(datasets.Value("int8")),
    "token_type_ids": datasets.List(datasets.Value("int32")),
}


def tokenise(
    rows: datasets.Dataset,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    tell: Listener,
    name: str = "rows",
    content: str | None = None,
) -> datasets.Dataset:
    """The rows as examples in their order: no padding, at most `max_length` tokens.

    Columns: `input_ids`, `attention_mask` and, where the tokenizer has them, `token_type_ids`; `labels` where the rows
    have a `label`; `id`; `length` in tokens; for generation see `completions`. Rows that are cut are counted aloud under
    `name`. content: the rows' fingerprint, see `splits`; with it the examples are memory-mapped from the cache, where the
    same are made once, and without it they are in memory. A tokenizer without a padding token is given its
    end-of-sequence token. Raises SetupError where it has neither, UsageError where `max_length` leaves no room for text.
    """
    quiet()
    ensure_padding(tokenizer, tell)
    longest = _longest(tokenizer, max_length, "text_pair" in rows.column_names, tell)
    used = copy.deepcopy(tokenizer)  # a truncation stays in the tokenizer that made it, and would be saved with it
    if "prompt" in rows.column_names:
        return examples_of(rows, used, longest, tell, name, content)
    key = None if content is None else key_of(content, tokenizer, longest)
    slow = not tokenizer.is_fast
    examples = encoded(rows, _Encode(used, longest), _features(rows, tokenizer), tell, name, key=key, slow=slow)
    cut = np.count_nonzero(column_of(examples, "cut"))
    if cut:
        share = f"{cut:,} of {len(rows):,} {name} ({cut / len(rows):.1%})"
        level = "warning" if cut > MUCH * len(rows) else "info"
        tell(Notice(f"{share} are longer than {longest} tokens and were cut: data.max_length", level=level))
    return examples.remove_columns("cut")


def texts_of(examples: datasets.Dataset, tokenizer: PreTrainedTokenizerBase) -> list[str] | None:
    """What the model reads of each example, as text; None where the examples have their prompts."""
    if "prompt" in examples.column_names:
        return None
    return tokenizer.batch_decode(cells_of(examples, "input_ids"), skip_special_tokens=True)


def ensure_padding(tokenizer: PreTrainedTokenizerBase, tell: Listener) -> None:
    """Give a tokenizer without a padding token its end-of-sequence token, aloud. Raises SetupError: it has neither."""
    if tokenizer.pad_token is not None:
        return
    if tokenizer.eos_token is None:
        raise SetupError(
            "the tokenizer has neither a padding nor an end-of-sequence token: no batch can be built",
            where=tokenizer.name_or_path or None,
            hint="set `pad_token` in its tokenizer_config.json",
        )
    tokenizer.pad_token = tokenizer.eos_token
    tell(Notice(f"the tokenizer has no padding token: its end-of-sequence token {tokenizer.eos_token!r} pads"))


def collator(
    tokenizer: PreTrainedTokenizerBase, side: str | None = None, padding_free: bool = False
) -> Callable[[list[dict[str, Any]]], Any]:
    """Examples -> one batch of tensors, without the columns that are not the model's.

    [B,L], padded on `side` ("right", "left"; None: the tokenizer's own), labels of tokens by IGNORED. Where there is CUDA, whose
    fast kernels ask for it, L is a multiple of 8. With padding_free, for decoders, [1,T]: all examples end to end, with
    `position_ids` that begin anew at each.
    """
    if padding_free:
        return _Flattening()
    return _Collator(tokenizer, pad_to_multiple_of=8 if torch.cuda.is_available() else None, side=side)


def _inputs(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key not in NOT_FOR_THE_MODEL} for row in rows]


@dataclass
class _Collator(DataCollatorWithPadding):
    side: str | None = None

    def __call__(self, features: list[dict[str, Any]]) -> Any:
        inputs = _inputs(features)
        labels = [row.pop("labels") for row in inputs if isinstance(row.get("labels"), list)]
        batch = self.tokenizer.pad(
            inputs,
            padding_side=self.side,
            pad_to_multiple_of=self.pad_to_multiple_of,
            return_tensors="pt",
            verbose=False,
        )
        if labels:
            padded = torch.full_like(batch["input_ids"], IGNORED)
            padded[batch["attention_mask"].bool()] = torch.tensor([label for row in labels for label in row])
            batch["labels"] = padded
        return batch


class _Flattening(DataCollatorWithFlattening):
    def __call__(
        self, features: list[dict[str, Any]], return_tensors: str | None = None, separator_id: Any = None
    ) -> Any:
        return super().__call__(_inputs(features), return_tensors, separator_id)


def _longest(tokenizer: PreTrainedTokenizerBase, max_length: int, paired: bool, tell: Listener) -> int:
    special = tokenizer.num_special_tokens_to_add(pair=paired)
    least = special + (2 if paired else 1)
    if max_length < least:
        raise UsageError(
            "no token of text would be left",
            where="data.max_length",
            found=str(max_length),
            allowed=f"from {least}: the tokenizer adds {special} tokens of its own",
        )
    if max_length > tokenizer.model_max_length:
        tell(Notice(f"data.max_length {max_length} is more than the model takes: {tokenizer.model_max_length} is used"))
    return min(max_length, tokenizer.model_max_length)


@dataclass(frozen=True)
class _Encode:
    """A batch of rows -> columns of examples, with `cut`: which of them were. Only those are tokenised twice."""

    tokenizer: PreTrainedTokenizerBase
    longest: int

    def __call__(self, batch: Mapping[str, list[Any]]) -> dict[str, Any]:
        texts, pairs = batch["text"], batch.get("text_pair")
        columns = dict(self.tokenizer(texts, pairs, truncation=False, verbose=False))
        over = [row for row, ids in enumerate(columns["input_ids"]) if len(ids) > self.longest]
        if over:
            again = self.tokenizer(
                [texts[row] for row in over],
                None if pairs is None else [pairs[row] for row in over],
                truncation=True,
                max_length=self.longest,
            )
            for name, column in columns.items():
                for row, cells in zip(over, again[name], strict=True):
                    column[row] = cells
        found = {name: columns[name] for name in columns if name in _KINDS}
        if "label" in batch:
            found["labels"] = batch["label"]
        cut = np.zeros(len(texts), bool)
        cut[over] = True
        return found | {"id": batch["id"], "length": [len(ids) for ids in found["input_ids"]], "cut": cut}


def _features(rows: datasets.Dataset, tokenizer: PreTrainedTokenizerBase) -> datasets.Features:
    features: dict[str, Any] = {name: kind for name, kind in _KINDS.items() if name in tokenizer.model_input_names}
    if "label" in rows.column_names:
        features["labels"] = rows.features["label"]
    counts = dict.fromkeys(("id", "length"), datasets.Value("int64"))
    return datasets.Features({**features, **counts, "cut": datasets.Value("bool")})
