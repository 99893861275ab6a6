"""The memory forecast, against what torch's own allocator counts in the same step of the same model with its numbers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from hkft.dropout.attach import attach
from hkft.dropout.named import METHODS
from hkft.events import silent
from hkft.folder import RunFolder
from hkft.model import build
from hkft.recipe import Recipe, load
from hkft.training import forecast
from hkft.training.prepare import Material, arguments, prepare


def allocated(recipe: Recipe, material: Material) -> int:
    """Bytes that a training step on the longest rows holds at its peak, as the profiler saw them come and go."""
    settings = arguments(recipe, RunFolder(Path("nowhere")))
    model = build.with_lora(build.base(recipe, material.labels, build.padding_id(material.tokenizer)), recipe)
    if settings.gradient_checkpointing:
        forecast.checkpoint(model, settings)
    attachment = attach(model, recipe.method, padding_free=recipe.data.padding_free)
    model.train()
    collate = forecast.tokenise.collator(material.tokenizer, build.padding_side(model), recipe.data.padding_free)
    batch = dict(collate(forecast._longest(material.examples["train"], settings.per_device_train_batch_size)))
    forecast._step(recipe, model, dict(batch), settings)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        forecast._step(recipe, model, dict(batch), settings)
    attachment.detach()
    events = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def predicted(recipe: Recipe, material: Material) -> dict[str, int | None]:
    settings = arguments(recipe, RunFolder(Path("nowhere")))
    return forecast.memory(recipe, material, forecast.sized(recipe, material), settings)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize(
    "change",
    [
        *(f"dropout.method={name}" for name in METHODS),
        "train.gradient_checkpointing=true",
        "lora.target_modules=all-linear",
        "train.per_device_train_batch_size=4",
    ],
)
def test_a_training_step_holds_what_was_forecast(recipe_file, change):
    recipe = load(recipe_file, ["data.train_rows=60", change])
    material = prepare(recipe, silent)
    assert predicted(recipe, material)["training"] == pytest.approx(allocated(recipe, material), rel=0.1)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # in fake tensors
@pytest.mark.parametrize(
    "change",
    ["dropout.method=none", "dropout.method=hiddenkey", "dropout.method=r-drop", "data.padding_free=true"],
)
def test_so_does_a_decoder_s_without_logits(generation_file, change):
    recipe = load(generation_file, [change])
    material = prepare(recipe, silent)
    assert predicted(recipe, material)["training"] == pytest.approx(allocated(recipe, material), rel=0.1)


def test_weights_adapter_and_optimizer_are_counted_exactly(recipe_file):
    recipe = load(recipe_file)
    material = prepare(recipe, silent)
    model = build.with_lora(build.base(recipe, material.labels), recipe)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    moments = [part for state in optimizer.state.values() for key, part in state.items() if key != "step"]
    found = predicted(recipe, material)
    assert found["weights"] == sum(p.nbytes for p in build.base(recipe, material.labels).parameters())
    assert found["adapter"] == sum(p.nbytes for p in trained)
    assert found["optimizer"] == sum(part.nbytes for part in moments)
    parts = ("libraries", "weights", "adapter", "optimizer")
    assert found["peak"] == sum(found[part] for part in parts) + max(found["training"], found["looking"])


@pytest.mark.parametrize(
    ("name", "size"),
    [("sgd", 0), ("adafactor", 4 * (8 + 1024 + 3)), ("adamw_8bit", 2 * 8192 + 8 * 3), ("lion_32bit", 4 * 8195)],
)
def test_every_optimizer_keeps_its_own(name, size):
    model = torch.nn.Linear(8, 1024)
    model.bias = torch.nn.Parameter(torch.zeros(3))
    assert forecast.optimizer_bytes(model, name) == size


@pytest.mark.filterwarnings("ignore::UserWarning:bitsandbytes")  # on kernels and dtypes: its own business
@pytest.mark.parametrize("kind", ["4bit", "8bit"])
def test_quantised_weights_are_counted_with_their_scales(recipe_file, kind):
    pytest.importorskip("bitsandbytes")
    recipe = load(recipe_file, [f"model.quantization={kind}"])
    material = prepare(recipe, silent)
    base = build.base(recipe, material.labels)
    size = 0
    for parameter in base.parameters():
        size += parameter.nbytes
        if (state := getattr(parameter, "quant_state", None)) is not None:
            parts = (state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code)
            size += sum(part.nbytes for part in parts)
        if (scales := getattr(parameter, "SCB", None)) is not None:
            size += scales.nbytes
    assert forecast.sized(recipe, material).weights == size


@pytest.mark.filterwarnings("ignore::UserWarning:bitsandbytes")
@pytest.mark.parametrize("kind", ["4bit", "8bit"])
def test_a_step_over_quantised_weights_holds_about_what_was_forecast(recipe_file, kind):
    pytest.importorskip("bitsandbytes")
    recipe = load(recipe_file, [f"model.quantization={kind}"])
    material = prepare(recipe, silent)
    assert predicted(recipe, material)["training"] == pytest.approx(allocated(recipe, material), rel=0.15)


def test_a_model_that_cannot_be_traced_has_no_peak(recipe_file, monkeypatch):
    recipe = load(recipe_file)

    def depends_on_numbers(*_: object) -> None:
        raise NotImplementedError

    monkeypatch.setattr(forecast, "_step", depends_on_numbers)
    found = predicted(recipe, prepare(recipe, silent))
    assert (found["peak"], found["training"], found["looking"]) == (None, None, None)
    assert found["weights"]
