"""A base model with its head and LoRA, from a recipe; on quantised weights too, where bitsandbytes runs."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoConfig, Gemma3Config, Gemma3ForConditionalGeneration

from hkft.dropout.attach import attach
from hkft.errors import RecipeError, SetupError
from hkft.model import build
from hkft.recipe import load
from hkft.training.objective import learns_tokens

LABELS = ("negative", "positive")


@pytest.fixture
def recipe(recipe_file):
    return load(recipe_file)


def rates(model: nn.Module) -> set[float]:
    return {module.p for module in model.modules() if isinstance(module, nn.Dropout)}


def test_the_head_and_lora_start_alike_for_one_seed(recipe):
    def fresh(*settings: str) -> dict[str, torch.Tensor]:
        chosen = recipe.replace(*settings)
        model = build.with_lora(build.base(chosen, LABELS), chosen)
        return {name: tensor for name, tensor in model.named_parameters() if tensor.requires_grad}

    first, again, other = fresh(), fresh("dropout.method=none"), fresh("seed=2")
    assert {name.rpartition("encoder.")[2] for name in first} == {
        *(f"layer.{n}.attention.self.{m}.lora_{ab}.default.weight" for n in "01" for m in ("query", "value") for ab in "AB"),
        *(f"base_model.model.classifier.modules_to_save.default.{kind}" for kind in ("weight", "bias")),
    }  # fmt: skip
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_the_head_knows_its_task(recipe):
    config = build.base(recipe, LABELS).config
    assert config.id2label == {0: "negative", 1: "positive"}
    assert config.problem_type == "single_label_classification"
    config = build.base(recipe.replace("task=regression"), None).config
    assert (config.num_labels, config.problem_type) == (1, "regression")


def test_the_models_own_dropout_is_off_unless_it_is_kept(recipe):
    assert rates(build.base(recipe, LABELS)) == {0.0}
    assert rates(build.base(recipe.replace("model.native_dropout=keep"), LABELS)) == {0.1}
    assert rates(build.base(recipe.replace("model.native_dropout=0.3"), LABELS)) == {0.3}


def test_a_model_that_is_not_there(recipe, tmp_path):
    with pytest.raises(SetupError) as caught:
        build.base(recipe.replace(f"model.name={tmp_path / 'nothing'}"), LABELS)
    (problem,) = caught.value.problems
    assert (problem.where, problem.message) == ("model.name", f"the model '{tmp_path / 'nothing'}' could not be loaded")


def test_a_module_that_is_not_there_is_told_with_the_nearest(recipe):
    chosen = recipe.replace("lora.target_modules=[querry]")
    with pytest.raises(RecipeError) as caught:
        build.with_lora(build.base(chosen, LABELS), chosen)
    (problem,) = caught.value.problems
    assert (problem.where, problem.found) == ("lora.target_modules", "['querry']")
    assert problem.allowed == "classifier, dense, key, query, value"
    assert problem.hint == "did you mean 'query'?"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_a_device_that_is_not_there(recipe):
    with pytest.raises(SetupError, match="model.device: there is no cuda device here"):
        build.base(recipe.replace("model.device=cuda"), LABELS)


@pytest.mark.parametrize("kind", ["4bit", "8bit"])
@pytest.mark.filterwarnings("ignore::UserWarning:bitsandbytes")  # on kernels and dtypes: its own business
def test_a_quantised_base_learns_after_it_was_looked_at(recipe, kind):
    """bitsandbytes' 4-bit weights, once seen in eval mode on a CPU with AVX512-BF16, give no gradient."""
    pytest.importorskip("bitsandbytes")
    chosen = recipe.replace(f"model.quantization={kind}")
    model = build.with_lora(build.base(chosen, LABELS), chosen)
    quantised = {type(module).__name__ for module in model.modules()} & {"Linear4bit", "Linear8bitLt"}
    assert quantised == {"Linear4bit" if kind == "4bit" else "Linear8bitLt"}
    assert type(model.base_model.model.classifier.modules_to_save["default"]) is nn.Linear
    batch = {"input_ids": torch.tensor([[2, 5, 7, 3]]), "labels": torch.tensor([1])}

    def gradients() -> list[torch.Tensor]:
        model.train()
        model.zero_grad()
        model(**batch).loss.backward()
        return [p.grad.clone() for name, p in model.named_parameters() if p.requires_grad and "lora_B" in name]

    before = gradients()
    model.eval()
    with torch.no_grad():
        model(**batch)
    after = gradients()
    assert all(tensor.abs().sum() > 0 for tensor in before)
    for one, other in zip(before, after, strict=True):
        torch.testing.assert_close(one, other)


def test_rows_are_no_longer_than_the_model_has_positions(generation_file, tiny_llama, tmp_path):
    """A published tokenizer often names no length, or another model's."""
    recipe = load(generation_file)
    assert build.tokenizer(recipe).model_max_length == AutoConfig.from_pretrained(tiny_llama).max_position_embeddings


def test_no_rank_beyond_the_largest_matrix(recipe):
    model = build.base(recipe, LABELS)
    with pytest.raises(RecipeError, match=r"(?s)lora.r: no matrix of the model has such a rank.*allowed: up to 32"):
        build.with_lora(model, recipe.replace("lora.r=33"))
    build.with_lora(model, recipe.replace("lora.r=32"))


def test_a_decoder_that_sees_is_a_decoder_all_the_same(generation_file, tmp_path):
    """Gemma 3 from 4B on: its vision tower looks both ways, and text does not go through it."""
    text = {"vocab_size": 261, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 16}
    vision = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    config = Gemma3Config(
        text_config=text | {"num_key_value_heads": 1, "intermediate_size": 64},
        vision_config=vision | {"intermediate_size": 40},
        mm_tokens_per_image=1,
    )
    Gemma3ForConditionalGeneration(config).save_pretrained(tmp_path / "gemma3")
    model = build.base(load(generation_file, [f"model.name={tmp_path / 'gemma3'}"]), None, 0)
    assert isinstance(model, Gemma3ForConditionalGeneration)
    assert build.padding_side(model) == "right"
    assert learns_tokens(model)
    attach(model, "hiddenkey-", padding_free=True).detach()
