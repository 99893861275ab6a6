"""What the optimizer descends: task loss + weight x consistency between two views of the batch.

The term is a mean over rows (examples; completion tokens in generation), so its weight means the same whatever the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from hkft.data.completions import IGNORED
from hkft.dropout.attach import attached
from hkft.dropout.consistency import LOSSES, squared
from hkft.dropout.method import Consistency, Method
from hkft.dropout.modes import evaluating
from hkft.dropout.named import find
from hkft.dropout.prefix import is_open
from hkft.errors import MethodError
from hkft.model.vocabulary import SummedInBlocks, Vocabulary, found_inside


class Objective(NamedTuple):
    """loss = task + weight x consistency, scalars; `consistency` None: one pass, no such term.

    `outputs` of the main pass: the model's, or {"states": ...} of `Vocabulary.run`, where no logits were built.
    """

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
    memory together; with "both" the task loss is the mean of both passes, as in R-Drop. What runs before the first mask is
    drawn is the same in both, and computed once (see `dropout.prefix`).
    """
    if consistency is None or not consistency.weight:
        task, outputs = forward()
        return Objective(task, task, None, outputs)
    clean, both = consistency.kind == "js", consistency.gradient == "both"
    first, second = _passes(model, both, clean)
    with first:
        other_task, other = forward()
    with second:
        task, outputs = forward()
    if both and not clean:
        task = 0.5 * (task + other_task)
    others = logits_of(other) if both else logits_of(other).detach()
    term = distance(consistency.kind, logits_of(outputs), others, labels, shifts(model))
    return Objective(task + consistency.weight * term, task, term, outputs)


def token_objective(
    model: nn.Module,
    vocabulary: Vocabulary,
    batch: Mapping[str, Any],
    consistency: Consistency | None,
    smoothing: float = 0.0,
) -> Objective:
    """As `objective`, for a decoder: means over the tokens that are labels, the head applied to blocks of them.

    batch: with `labels` [B,L], its own input one place later. smoothing: of the labels, epsilon of the cross-entropy. In
    float32, and neither pass's logits are ever there in full.
    """
    inputs, labels = {key: value for key, value in batch.items() if key != "labels"}, batch["labels"]
    if consistency is not None and not consistency.weight:
        consistency = None
    both = consistency is not None and consistency.gradient == "both"
    clean = consistency is not None and consistency.kind == "js"
    passes, second = [], nullcontext()
    if consistency is not None:
        first, second = _passes(model, both, clean)
        with first:
            other = vocabulary.run(model, inputs, labels).states
        passes.append(other if both else other.detach())
    with second:
        states, targets, _ = vocabulary.run(model, inputs, labels)
    parts = states.new_zeros(2, dtype=torch.float32)

    def term(block: Tensor, *rest: Any) -> Tensor:
        nonlocal parts
        others, place = rest[:-1], rest[-1]
        views = [vocabulary.logits(each).float() for each in (block, *others)]
        learned = views if both and not clean else views[:1]
        losses = [cross_entropy(view, targets[place], reduction="sum", label_smoothing=smoothing) for view in learned]
        task = torch.stack(losses).mean()
        if consistency is None:
            parts = parts + torch.stack([task.detach(), task.new_zeros(())])
            return task
        apart = LOSSES[consistency.kind](views[0], views[1]) * len(block)
        parts = parts + torch.stack([task.detach(), apart.detach()])
        return task + consistency.weight * apart

    total = SummedInBlocks.apply(term, list(vocabulary.blocks(len(targets))), states, *passes)
    assert isinstance(total, Tensor)
    task, apart = parts / len(targets) if len(targets) else parts + torch.nan  # nothing to learn is no loss of 0
    loss = total / len(targets) if len(targets) else total + torch.nan
    return Objective(loss, task, apart if consistency else None, {"states": states})


def _passes(model: nn.Module, gradient: bool, clean: bool) -> tuple[AbstractContextManager, AbstractContextManager]:
    """The contexts of the other pass and of the main one; gradient, clean: whether the other carries any, and drops not."""
    attachment = attached(model)
    if clean or attachment is None or not attachment.droppers or not is_open(model):
        return _apart(model, gradient, clean), nullcontext()
    return attachment.prefix.first(gradient), attachment.prefix.second()


@contextmanager
def _apart(model: nn.Module, gradient: bool, clean: bool) -> Iterator[None]:
    with torch.set_grad_enabled(gradient and torch.is_grad_enabled()), evaluating(model) if clean else nullcontext():
        yield


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
    inner = found_inside(model)
    if inner is None:
        return True
    return not inner.config.is_encoder_decoder and inner.loss_type not in ("ForTokenClassification", "ForMaskedLM")


def learns_tokens(model: nn.Module) -> bool:
    """Whether a model is a decoder with transformers' own loss on its next token, and nothing else, which hkft may compute."""
    inner = found_inside(model)
    if (
        inner is None
        or inner.config.is_encoder_decoder
        or inner.loss_type not in (None, "ForCausalLM", "ForConditionalGeneration")
    ):
        return False
    if inner.get_output_embeddings() is None:
        return False
    adapter = getattr(model, "active_peft_config", None)
    soft_prompt = adapter is not None and adapter.is_prompt_learning
    return not soft_prompt and not getattr(inner.config.get_text_config(), "output_router_logits", False)


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

    consistency = chosen.consistency if attachment.method.active else None
    labels = batch.get("labels")
    if labels is not None and labels.ndim == 2 and learns_tokens(model):
        return token_objective(model, Vocabulary(model), batch, consistency).loss
    return objective(model, forward, consistency, labels).loss


def logits_of(outputs: Any) -> Tensor:
    return outputs["logits"] if isinstance(outputs, Mapping) else outputs[1]
