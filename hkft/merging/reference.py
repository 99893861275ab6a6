"""What a merged model is held against: what base and adapter say of some rows before anything is written.

An adapter that was trained on quantised weights has two bases to go onto: the full-precision one, and the one it has learned
on, quantised weights as numbers. How far each of the two is from what was trained is measured on the same rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from peft import PeftModel
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn
from transformers import PreTrainedModel

from hkft.errors import DivergedError
from hkft.evaluation.predict import Predictions
from hkft.events import Listener
from hkft.merging import loading, verification
from hkft.merging.streaming import Held

Base = Literal["full", "dequantised"]
Part = tuple[loading.Origin, float]  # an adapter and its weight
TOLD = ("max_logit_difference", "mean_kl", "agreement", "metrics")


@dataclass(frozen=True)
class Reference:
    """It holds no model. bases: of a quantised run, by `Base`: how far each is from what was trained."""

    probe: verification.Probe
    before: Predictions
    effect: float
    device: torch.device
    bases: dict[Base, dict[str, Any]] | None = None


def look(parts: Sequence[Part], base: Base, held: Held | None, trained: PeftModel | None, tell: Listener) -> Reference:
    """Show the adapted model some rows. held, trained: of a quantised run, see `quantised`."""
    adapted = loading.load(parts[0][0], tell)
    model, probe = adapted.model, verification.probe(adapted, tell)
    device = next(model.parameters()).device
    with model.disable_adapter():
        plain = probe.run(model)
    seen: dict[Base, Predictions] = {"full": _said(parts, model, None, probe, tell)}
    if held is not None:
        seen["dequantised"] = _said(parts, model, held, probe, tell)
    bases: dict[Base, dict[str, Any]] | None = None
    if trained is not None:
        said = probe.run(trained)
        bases = {
            name: {key: verification.compare(said, found, "float32", probe.on, 0.0)[key] for key in TOLD}
            for name, found in seen.items()
        }
    before = seen[base]
    return Reference(probe, before, verification.largest(before.logits - plain.logits), device, bases)


def quantised(origin: loading.Origin, tell: Listener) -> tuple[PeftModel, Held]:
    """The model as it was trained, and what gives a base tensor as its quantised layers compute with it."""
    model = loading.load(origin, tell, quantised=True).model
    inner = model.get_base_model()

    def held(name: str, tensor: Tensor) -> Tensor:
        layer = _layer(inner, name)
        if type(getattr(layer, "weight", None)).__name__ not in ("Params4bit", "Int8Params") or name.endswith(".bias"):
            return tensor
        return dequantize_module_weight(layer).to("cpu", torch.float32)

    return model, held


def in_memory(parts: Sequence[Part], held: Held | None, tell: Listener) -> PreTrainedModel:
    """PEFT's own merge of the whole model, in float32; of several adapters the mean of what each gives, by their weights.

    Raises DivergedError where an adapter holds NaN or inf.
    """
    (first, share), *others = parts
    model = _merged(loading.load(first, tell).model, first, held)
    if not others:
        return model
    total = {name: tensor * share for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
    for origin, weight in others:
        state = _merged(loading.load(origin, tell).model, origin, held).state_dict()
        for name in total:
            total[name] += weight * state[name]
    model.load_state_dict(total, strict=False)  # whole numbers are the base's
    return model


def _said(
    parts: Sequence[Part], model: PeftModel, held: Held | None, probe: verification.Probe, tell: Listener
) -> Predictions:
    """Of one adapter the model with the adapter beside its weights; of several there is none such: their mean."""
    if len(parts) > 1:
        return probe.run(in_memory(parts, held, tell).eval())
    if held is not None:
        _hold(model, held)
    return probe.run(model)


def _merged(model: PeftModel, origin: loading.Origin, held: Held | None) -> PreTrainedModel:
    if held is not None:
        _hold(model, held)
    try:
        return model.merge_and_unload(safe_merge=True)  # type: ignore[operator]
    except ValueError as error:
        if "NaN" not in str(error):
            raise
        raise DivergedError(
            "the adapter holds NaN or inf: there is nothing to merge",
            where=str(origin.adapter),
            found=str(error),
            hint="another checkpoint of the run may be sound: --checkpoint",
        ) from error


def _hold(model: PeftModel, held: Held) -> None:
    """Put into a full-precision base what `held` gives for each of its tensors."""
    inner = model.get_base_model()
    with torch.no_grad():
        for name, parameter in inner.named_parameters():
            own = name.replace(".base_layer.", ".")
            if own.endswith(".weight"):
                parameter.copy_(held(own, parameter))


def _layer(model: nn.Module, name: str) -> Any:
    """The layer that has this tensor, without PEFT around it; None where there is none."""
    try:
        module = model.get_submodule(name.rpartition(".")[0])
    except AttributeError:
        return None
    return getattr(module, "base_layer", module)
