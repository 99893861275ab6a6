"""Every number of an adapter's updates against the product B*A written out."""

from __future__ import annotations

import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel

from hkft.model import build
from hkft.model.adapter import Update, effective_rank, singular_values, updates
from hkft.recipe import load


def bert() -> BertForSequenceClassification:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    return BertForSequenceClassification(BertConfig(vocab_size=40, max_position_embeddings=32, **sizes))


def filled(model: nn.Module) -> nn.Module:
    """With random B, as if it had been trained."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name and "magnitude" not in name:
                parameter.normal_()
    return model


def lora(model: nn.Module, **settings) -> nn.Module:
    return filled(get_peft_model(model, LoraConfig(**{"r": 4, "lora_alpha": 12} | settings)))  # type: ignore[arg-type]


def written_out(delta: torch.Tensor) -> tuple[float, float]:
    """(effective rank, Frobenius norm) of PEFT's own s*B*A."""
    sigma = torch.linalg.svdvals(delta.detach().double())
    shares = sigma / sigma.sum()
    return math.exp(-sum(float(p) * math.log(float(p)) for p in shares if p > 1e-12)), float(torch.linalg.norm(sigma))


def check(model: nn.Module, found: list[Update], adapter: str = "default") -> None:
    base = model.get_base_model()
    for update in found:
        layer = base.get_submodule(update.module)
        effective, norm = written_out(layer.get_delta_weight(adapter))
        assert update.effective_rank == pytest.approx(effective, rel=1e-4)
        assert update.update_norm == pytest.approx(norm, rel=1e-4)
        assert update.weight_norm == pytest.approx(float(layer.get_base_layer().weight.float().norm()), rel=1e-5)


def only(model: nn.Module) -> Update:
    (found,) = updates(model)
    return found


def test_the_singular_values_are_those_of_the_product():
    for shape_b, shape_a in [((20, 3), (3, 30)), ((5, 8), (8, 30)), ((900, 700), (700, 900))]:  # the last in float32
        b, a = torch.randn(1, *shape_b), torch.randn(1, *shape_a)
        expected = torch.linalg.svdvals(b[0].double() @ a[0].double())[: shape_b[1]]
        found = singular_values(b, a)[0]
        assert found.shape == (shape_b[1],)
        torch.testing.assert_close(found.double()[: len(expected)], expected, rtol=1e-4, atol=expected[0].item() * 1e-5)
        assert found[len(expected) :].sum() == 0


def test_the_effective_rank_by_hand():
    assert effective_rank(torch.tensor([2.0, 2.0, 2.0])) == pytest.approx(3)
    assert effective_rank(torch.tensor([5.0, 0.0, 0.0])) == pytest.approx(1)
    assert effective_rank(torch.tensor([3.0, 1.0])) == pytest.approx(4 / 3**0.75)  # exp(-3/4 ln 3/4 - 1/4 ln 1/4)
    assert effective_rank(torch.zeros(3)) == 0


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, {"use_dora": True}, {"r": 40}])
def test_linear_layers(settings):
    model = lora(bert(), target_modules=["query", "dense"], task_type="SEQ_CLS", **settings)
    found = updates(model)
    places = ("attention.self.query", "attention.output.dense", "intermediate.dense", "output.dense")
    layers = [f"bert.encoder.layer.{n}.{place}" for n in range(2) for place in places]
    assert [update.module for update in found] == [*layers, "bert.pooler.dense"]
    assert {update.rank for update in found} == {settings.get("r", 4)}
    check(model, found)


def test_nothing_of_the_model_or_of_chance_changes():
    model = lora(bert(), target_modules=["query"], task_type="SEQ_CLS")
    before, random = {name: tensor.clone() for name, tensor in model.state_dict().items()}, torch.get_rng_state()
    found = updates(model)
    with torch.inference_mode():
        assert updates(model) == found
    assert torch.equal(torch.get_rng_state(), random)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_b_of_zero_and_a_b_of_rank_one():
    model = get_peft_model(bert(), LoraConfig(r=4, target_modules=["0.attention.self.query"]))  # type: ignore[arg-type]
    assert (only(model).effective_rank, only(model).update_norm) == (0.0, 0.0)
    b = model.get_base_model().get_submodule("bert.encoder.layer.0.attention.self.query").lora_B["default"].weight
    with torch.no_grad():
        b.copy_(torch.randn(32, 1) * torch.randn(4))
    assert only(model).effective_rank == pytest.approx(1, abs=1e-4)
    check(model, updates(model))


def test_gpt2s_transposed_weights_and_embeddings():
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=16, n_embd=24, n_layer=1, n_head=2))
    model = lora(gpt2, target_modules=["c_attn", "wpe"], fan_in_fan_out=True)
    found = updates(model)
    assert [update.module for update in found] == ["transformer.wpe", "transformer.h.0.attn.c_attn"]
    check(model, found)


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.plain, self.pairs = nn.Conv1d(6, 8, 3), nn.Conv1d(6, 8, 3, groups=2)


@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups")
def test_convolutions():
    model = lora(Convolutions(), target_modules=["plain", "pairs"])
    plain, pairs = updates(model)
    layer = model.get_base_model().plain
    assert (plain.effective_rank, plain.update_norm) == pytest.approx(
        written_out(layer.get_delta_weight("default").flatten(1)), rel=1e-4
    )
    layer = model.get_base_model().pairs
    a, b = (side["default"].weight.flatten(1) for side in (layer.lora_A, layer.lora_B))
    halves = torch.cat([b[:4] @ a[:2], b[4:] @ a[2:]])  # each half of the outputs reads two of the four directions
    assert (pairs.effective_rank, pairs.update_norm) == pytest.approx(written_out(3 * halves), rel=1e-4)


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(3, 10, 8)), nn.Parameter(torch.randn(3, 8, 10))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.up @ self.down


def test_a_stack_of_experts_counts_as_one_block_diagonal_weight():
    model = lora(
        nn.ModuleDict({"experts": Experts()}), target_modules=[], target_parameters=["experts.up", "experts.down"]
    )
    found = {update.module: update for update in updates(model)}
    assert found.keys() == {"experts.up", "experts.down"}
    for layer in (module for module in model.modules() if hasattr(module, "parameter_name")):
        update = found[f"experts.{layer.parameter_name}"]
        expected = written_out(torch.block_diag(*layer.get_delta_weight("default")))
        assert (update.effective_rank, update.update_norm) == pytest.approx(expected, rel=1e-4)
        assert update.rank == 12
        assert update.weight_norm == pytest.approx(float(layer.get_param().norm()), rel=1e-5)


def test_the_first_active_adapter_is_told():
    model = lora(bert(), target_modules=["0.attention.self.query"])
    model.add_adapter("other", LoraConfig(r=2, lora_alpha=1, target_modules=["0.attention.self.query", "pooler.dense"]))
    filled(model)
    assert [update.rank for update in updates(model)] == [4]
    model.set_adapter("other")
    found = updates(model)
    assert [(update.module, update.rank) for update in found] == [
        ("bert.encoder.layer.0.attention.self.query", 2),
        ("bert.pooler.dense", 2),
    ]
    check(model, found, "other")


def test_modules_trained_whole_have_no_update():
    settings = {"target_modules": ["query", "pooler.dense"], "modules_to_save": ["pooler", "classifier"]}
    names = [update.module for update in updates(lora(bert(), **settings))]
    assert names == [f"bert.encoder.layer.{n}.attention.self.query" for n in range(2)]
    assert updates(bert()) == []


def test_weights_that_are_not_here():
    model = lora(bert(), target_modules=["0.attention.self.query"])
    layer = model.get_base_model().get_submodule("bert.encoder.layer.0.attention.self.query")
    told = only(model)
    layer.base_layer.to("meta")
    assert only(model) == Update(told.module, 4, told.effective_rank, told.update_norm, None)
    layer.lora_B.to("meta")
    assert updates(model) == []


def test_half_precision():
    model = lora(bert().to(torch.bfloat16), target_modules=["query"])
    for module in model.modules():
        if hasattr(module, "lora_A"):
            module.to(torch.bfloat16)
    base, found = model.get_base_model(), updates(model)
    for update in found:
        layer = base.get_submodule(update.module)
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        assert a.dtype == torch.bfloat16
        expected = written_out(3 * b.double() @ a.double())
        assert (update.effective_rank, update.update_norm) == pytest.approx(expected, rel=1e-4)
        assert update.weight_norm == pytest.approx(float(layer.base_layer.weight.double().norm()), rel=1e-5)


@pytest.mark.parametrize("kind", ["4bit", "8bit"])
@pytest.mark.filterwarnings("ignore::UserWarning:bitsandbytes")  # on kernels and dtypes: its own business
def test_quantised_weights_count_as_what_they_stand_for(recipe_file, kind):
    """What the layer itself makes of the identity: on a CPU bitsandbytes reads rows of 32 other than it wrote them."""
    pytest.importorskip("bitsandbytes")
    recipe = load(recipe_file).replace(f"model.quantization={kind}")
    model = filled(build.with_lora(build.base(recipe, ("negative", "positive")), recipe))

    def kept() -> list[tuple[int, torch.Tensor]]:
        return [(id(p), p.detach().clone()) for p in model.parameters()]

    before, found = kept(), updates(model)
    assert all(one[0] == other[0] and torch.equal(one[1], other[1]) for one, other in zip(before, kept(), strict=True))
    assert len(found) == 4
    for update in found:
        layer = model.get_base_model().get_submodule(update.module)
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        expected = written_out(layer.scaling["default"] * b @ a)
        assert (update.effective_rank, update.update_norm) == pytest.approx(expected, rel=1e-4)
        with torch.no_grad():
            weight = layer.base_layer(torch.eye(32)) - layer.base_layer(torch.zeros(1, 32))
        assert update.weight_norm == pytest.approx(weight.norm().item(), rel=1e-3)
    assert updates(model) == found  # 8-bit scales have moved, at the first forward pass, from the weight to the layer


def test_a_4_bit_weight_in_a_kernels_own_order_is_not_read(recipe_file):
    pytest.importorskip("bitsandbytes")
    recipe = load(recipe_file).replace("model.quantization=4bit")
    model = build.with_lora(build.base(recipe, ("negative", "positive")), recipe)
    name = updates(model)[0].module
    model.get_base_model().get_submodule(name).base_layer.weight.quant_state.packing_format_for_cpu = True
    assert [update.weight_norm is None for update in updates(model)] == [True, False, False, False]
