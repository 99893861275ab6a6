"""What the optimizer descends: task loss + weight x consistency between two views of the batch.

The term is a mean over rows (examples; completion tokens in generation), so its weight means the same whatever the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hkft.dropout.attach import attached
from hkft.dropout.consistency import LOSSES, squared
from hkft.dropout.method import Consistency, Method
from hkft.dropout.named import find
from hkft.errors import MethodError

IGNORED = -100  # a label that is not learned, as everywhere in torch and transformers


class Objective(NamedTuple):
    """loss = task + weight x consistency, scalars; `consistency` None: one pass, no such term. `outputs` of the main pass."""

    loss: Tensor
    task: Tensor
    consistency: Tensor | None
    outputs: Any


def objective(
    model: nn.Module,
    forward: Callable[[], tuple[Tensor, Any]],
    consistency: Consistency | None,
    labels: Tensor | None,
) -> Objective:
    """One training objective. `forward()` runs the model on the batch once, and returns (task loss, outputs).

    With gradient "one" the other view comes first, without gradients, so that the two passes' activations never stand in
    memory together; with "both" the task loss is the mean of both passes, as in R-Drop.
    """
    if consistency is None or not consistency.weight:
        task, outputs = forward()
        return Objective(task, task, None, outputs)
    clean, both = consistency.kind == "js", consistency.gradient == "both"
    with torch.set_grad_enabled(both), evaluating(model) if clean else nullcontext():
        other_task, other = forward()
    task, outputs = forward()
    if both and not clean:
        task = 0.5 * (task + other_task)
    term = distance(consistency.kind, logits_of(outputs), logits_of(other), labels, shifts(model))
    return Objective(task + consistency.weight * term, task, term, outputs)


def distance(kind: str, logits: Tensor, other: Tensor, labels: Tensor | None, shift: bool = True) -> Tensor:
    """How far two views are apart. logits [B, C]: an example a row; [B, L, V]: a row for each token that is a label.

    shift: position t of the logits predicts label t + 1; else label t. One output, a regression, takes the squared
    difference whatever the kind.
    """
    if logits.ndim == 3:
        assert labels is not None, "generation needs labels to know the completion"
        logits, other = logits[:, -labels.shape[1] :], other[:, -labels.shape[1] :]  # a soft prompt stands in front
        if shift:
            labels, logits, other = labels[:, 1:], logits[:, :-1], other[:, :-1]
        logits, other = logits[labels != IGNORED], other[labels != IGNORED]
    if logits.shape[-1] == 1:
        return squared(logits, other)
    return LOSSES[kind](logits, other)


def shifts(model: nn.Module) -> bool:
    """Whether the labels of a model are its own input one place later: in a decoder, not in an encoder-decoder or a tagger."""
    inner = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)
    if inner is None:
        return True
    return not inner.config.is_encoder_decoder and inner.loss_type not in ("ForTokenClassification", "ForMaskedLM")


def consistency_loss(model: nn.Module, batch: Mapping[str, Any], method: str | Method | None = None) -> Tensor:
    """Task loss + weight x consistency of one batch, for a training loop of your own. Differentiable scalar.

    model: in train mode, with the method attached by `hkft.attach`. batch: what the model takes, labels included.
    method: None takes the attached one. Without a consistency loss in it, or with every rate 0, this is the task loss
    of one pass. Raises MethodError where nothing is attached.
    """
    attachment = attached(model)
    if attachment is None:
        raise MethodError("the model has no method attached", hint="hkft.attach(model, method) before the loop")
    chosen = attachment.method if method is None else find(method) if isinstance(method, str) else method

    def forward() -> tuple[Tensor, Any]:
        outputs = model(**batch)
        return outputs["loss"], outputs

    active = attachment.method.active
    return objective(model, forward, chosen.consistency if active else None, batch.get("labels")).loss


def logits_of(outputs: Any) -> Tensor:
    return outputs["logits"] if isinstance(outputs, Mapping) else outputs[1]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode for a while, then every module in the mode that was its own."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
