"""A decoder looked at in eval mode: the loss of every completion per token, and, where it was asked for, the text it writes.

Nothing of a batch's logits is kept: a loss, a count and the hits of each row are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn.functional import cross_entropy

from hkft.data.sources import cells_of, column_of
from hkft.diagnostics.uncertainty import Losses
from hkft.evaluation.predict import Collate, longest_first, looking, on_device
from hkft.events import Listener, silent
from hkft.model.vocabulary import Vocabulary
from hkft.processes import WHOLE, Share


@dataclass(frozen=True)
class Written:
    """Generated text: that of each prompt that was asked, its scores, and sacrebleu's signature of their BLEU."""

    texts: Mapping[str, str]
    scores: Mapping[str, float]
    signature: str | None


@dataclass(frozen=True)
class Completions:
    """What a decoder says of some rows, in the rows' order. Losses are sums over a row's learned tokens, in nats."""

    ids: list[Any]
    prompts: list[str]
    references: list[str]
    losses: NDArray[np.floating]  # [N]
    tokens: NDArray[np.integer]  # [N], learned
    hits: NDArray[np.integer]  # [N], of them the likeliest by the model
    written: Written | None = None

    @property
    def by_row(self) -> Losses:
        """The loss of each row, over its learned tokens."""
        return Losses(self.losses, self.tokens)

    @property
    def groups(self) -> NDArray[np.integer]:
        """[N], the number of each row's prompt: its completions are alike."""
        places = {prompt: place for place, prompt in enumerate(sorted(set(self.prompts)))}
        return np.fromiter((places[prompt] for prompt in self.prompts), np.int64, len(self.prompts))

    @property
    def right(self) -> None:
        """A completion is not right or wrong."""
        return None

    def metrics(self) -> dict[str, float]:
        """loss: nats a token, every token weighing the same; perplexity: its exponential; token_accuracy; text scores."""
        loss = float(self.losses.sum() / self.tokens.sum())
        return {
            "loss": loss,
            "perplexity": math.exp(min(loss, 700.0)),
            "token_accuracy": float(self.hits.sum() / self.tokens.sum()),
            **(self.written.scores if self.written else {}),
        }

    def records(self, names: Sequence[str] | None = None, texts: Sequence[str] | None = None) -> list[dict[str, Any]]:
        """One record a row, as `predictions/*.jsonl` holds them; `loss` is the row's own, per token."""
        written = self.written.texts if self.written else {}
        return [
            {
                "id": self.ids[row],
                "prompt": self.prompts[row],
                "label": self.references[row].strip(),
                "prediction": written.get(self.prompts[row]),
                "loss": float(self.losses[row] / self.tokens[row]),
                "tokens": int(self.tokens[row]),
            }
            for row in range(len(self.ids))
        ]

    def with_text(self, written: Written) -> Completions:
        return replace(self, written=written)


def look(
    model: nn.Module,
    examples: Any,
    collate: Collate,
    *,
    batch_size: int,
    precision: torch.dtype | None = None,
    tell: Listener = silent,
    text: str = "evaluating",
    share: Share = WHOLE,
) -> Completions:
    """Run a decoder in eval mode over tokenised `examples` (see `hkft.data.completions`). As `predict` does otherwise."""
    sums = torch.zeros(3, len(examples), dtype=torch.float64)
    with looking(model, precision):
        vocabulary = Vocabulary(model)
        for rows in share.mine(longest_first(column_of(examples, "length"), batch_size, tell, text)):
            batch = on_device(model, collate([examples[row] for row in rows]))
            sums[:, rows] = _sums(model, vocabulary, batch).cpu().double()
    losses, tokens, hits = np.sum(share.all([sums.numpy()]), axis=0)  # of the rows of others each has zeros
    return Completions(
        cells_of(examples, "id"),
        cells_of(examples, "prompt"),
        cells_of(examples, "completion"),
        losses,
        tokens.astype(np.int64),
        hits.astype(np.int64),
    )


def _sums(model: nn.Module, vocabulary: Vocabulary, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """[3,B]: of each row the sum of its losses, its learned tokens, and those that the model finds likeliest."""
    labels = batch.pop("labels")
    states, targets, rows = vocabulary.run(model, batch, labels)
    sums = torch.zeros(3, len(labels), dtype=torch.float32 if labels.device.type == "mps" else torch.float64).to(
        rows.device
    )
    for block in vocabulary.blocks(len(targets)):
        logits, target = vocabulary.logits(states[block]).float(), targets[block]
        found = [
            cross_entropy(logits, target, reduction="none"),
            torch.ones_like(target),
            logits.argmax(-1) == target,
        ]
        for total, numbers in zip(sums, found, strict=True):
            total.index_add_(0, rows[block], numbers.to(total.dtype))
    return sums
