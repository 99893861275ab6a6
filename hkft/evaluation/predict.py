"""One way to look at a model in eval mode, used at every evaluation in training, by `hkft eval` and by the merge's check.

Dropout off, no gradients, a loss of its own for every example: so numbers of two looks are comparable, whatever rows they
are taken on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from hkft.data.sources import column_of
from hkft.diagnostics.uncertainty import Losses
from hkft.dropout.modes import evaluating
from hkft.evaluation.metrics import LOSSES, score
from hkft.events import Listener, Stage, silent
from hkft.model.first_token import first_token
from hkft.processes import WHOLE, Share

Collate = Callable[[list[dict[str, Any]]], Mapping[str, torch.Tensor]]


@dataclass(frozen=True)
class Predictions:
    """What a model said of some rows, in the rows' order. `labels` and `losses` are None for unlabelled rows."""

    task: str
    ids: list[Any]
    logits: NDArray[np.floating]  # [N, classes] or [N, 1]
    labels: NDArray | None  # [N]
    losses: NDArray[np.floating] | None  # [N], nats or squared units

    @property
    def by_row(self) -> Losses:
        """The loss of each row."""
        assert self.losses is not None, "rows without labels have no loss"
        return Losses(self.losses, np.ones(len(self.losses), dtype=np.int64))

    @property
    def groups(self) -> None:
        """Rows stand for themselves."""
        return None

    @property
    def right(self) -> NDArray[np.bool_] | None:
        """Which rows were decided rightly, [N]; None where nothing is decided."""
        return None if self.task != "classification" or self.labels is None else self.logits.argmax(1) == self.labels

    def metrics(self) -> dict[str, float]:
        """Mean loss and the task's metrics."""
        assert self.labels is not None and self.losses is not None, "metrics need labels"
        return {"loss": float(self.losses.mean()), **score(self.task, self.logits, self.labels)}

    def records(self, names: Sequence[str] | None = None, texts: Sequence[str] | None = None) -> list[dict[str, Any]]:
        """One record a row, as `predictions/*.jsonl` holds them. names: of the classes; texts: what the rows say."""
        classes = self.task == "classification"
        decided = self.logits.argmax(1) if classes else self.logits[:, 0]

        def shown(value: Any) -> Any:
            if not classes:
                return float(value)
            return names[int(value)] if names else int(value)

        return [
            {
                "id": self.ids[row],
                **({"text": texts[row]} if texts is not None else {}),
                "label": None if self.labels is None else shown(self.labels[row]),
                "prediction": shown(decided[row]),
                "loss": None if self.losses is None else float(self.losses[row]),
                "logits": [float(x) for x in self.logits[row]],
            }
            for row in range(len(self.ids))
        ]


@contextmanager
def looking(model: nn.Module, precision: torch.dtype | None = None) -> Iterator[None]:
    """Eval mode without gradients, under autocast to `precision` where there is one; modes are then as they were."""
    autocast = torch.autocast(next(model.parameters()).device.type, precision) if precision else nullcontext()
    with evaluating(model), torch.no_grad() if _in_parts(model) else torch.inference_mode(), autocast:
        yield


def _in_parts(model: nn.Module) -> bool:
    """Whether FSDP or DeepSpeed keep a part of each weight: what they gather in inference mode, they train in later."""
    marks = ("device_mesh", "_is_flat_param", "ds_id")
    return any(hasattr(parameter, mark) for parameter in model.parameters() for mark in marks)


def longest_first(
    lengths: Sequence[int] | np.ndarray, batch_size: int, tell: Listener, text: str
) -> Iterator[list[int]]:
    """Row numbers of each batch, of like length; tells how far it is once a batch is done with."""
    order = np.argsort(-np.asarray(lengths), kind="stable").tolist()
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]
        tell(Stage(text, min(start + batch_size, len(order)), len(order)))


def on_device(model: nn.Module, batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The batch where the model is."""
    device = next(model.parameters()).device
    return {name: value.to(device) for name, value in batch.items()}


def predict(
    model: nn.Module,
    examples: Any,
    collate: Collate,
    *,
    task: str,
    batch_size: int,
    precision: torch.dtype | None = None,
    tell: Listener = silent,
    text: str = "evaluating",
    share: Share = WHOLE,
) -> Predictions:
    """Run `model` in eval mode over tokenised `examples` (columns id, length, input_ids, ..., labels if there are any).

    Longest batches first, so that nothing is padded far and running out of memory shows at once. precision: autocast to
    this dtype, as training did. share: of the batches, which several processes look at together. The model's modes are put
    back as they were.
    """
    seen = []
    with looking(model, precision):
        for rows in share.mine(longest_first(column_of(examples, "length"), batch_size, tell, text)):
            batch = on_device(model, collate([examples[row] for row in rows]))
            batch.pop("labels", None)
            with first_token(model, batch):
                seen.append((rows, model(**batch).logits.float().cpu().numpy()))
    order, pieces = zip(*share.all(seen), strict=True)
    logits = np.concatenate(pieces)[np.argsort(np.concatenate(order))]
    labels = column_of(examples, "labels") if "labels" in examples.column_names else None
    losses = None if labels is None else LOSSES[task](logits, labels)
    return Predictions(task, column_of(examples, "id").tolist(), logits, labels, losses)
