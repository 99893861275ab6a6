"""LoRA's fused products are PEFT's own, within rounding, and give way wherever PEFT would do something else."""

from __future__ import annotations

import copy
import pickle
from contextlib import contextmanager

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import Linear
from torch import nn

from hkft.model import fused
from hkft.model.fused import FusedLinear, fuse


def wrapped(dtype=torch.float64, bias=True, **fields):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(12, 10, bias=bias), nn.Tanh(), nn.Linear(10, 6, bias=bias)).to(dtype)
    model = get_peft_model(model, LoraConfig(r=3, lora_alpha=5, target_modules=["0", "2"], **fields))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    return model.to(dtype)


def layers(model):
    return [module for module in model.modules() if isinstance(module, Linear)]


@contextmanager
def counted():
    """How often the fused function was called."""
    calls, own = [], fused._Fused.apply
    fused._Fused.apply = lambda *given: (calls.append(1), own(*given))[1]
    try:
        yield calls
    finally:
        fused._Fused.apply = own


def gradients(model, x, seed=3):
    torch.manual_seed(seed)
    model.zero_grad()
    x = x.detach().requires_grad_()
    out = model(x)
    out.float().square().sum().backward()
    return [out.detach(), x.grad, *(p.grad for p in model.parameters() if p.requires_grad)]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(7, 12), (2, 5, 12), (2, 3, 2, 12)])
def test_values_and_gradients_are_peft_s(shape, bias):
    model, x = wrapped(bias=bias), torch.randn(shape, dtype=torch.float64)
    expected = gradients(model, x)
    fuse(model)
    assert [type(layer) for layer in layers(model)] == [FusedLinear] * 2
    with counted() as calls:
        found = gradients(model, x)
    assert len(calls) == 2
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_gradients_are_those_of_finite_differences():
    x, weight, bias = (
        torch.randn(s, dtype=torch.float64, requires_grad=r)
        for s, r in [((4, 5), True), ((3, 5), False), ((3,), False)]
    )
    a, b = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in [(2, 5), (3, 2)])
    assert torch.autograd.gradcheck(lambda x, a, b: fused._Fused.apply(x, weight, bias, a, b, 1.7), (x, a, b))


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_under_autocast_values_are_peft_s_to_its_precision(weights):
    model, x = wrapped(torch.float32), torch.randn(6, 12)
    for layer in layers(model):
        layer.base_layer.to(weights)
    with torch.autocast("cpu", torch.bfloat16):
        expected = gradients(model, x)
        fuse(model)
        with counted() as calls:
            found = gradients(model, x)
    assert len(calls) == 2
    assert [each.dtype for each in found] == [each.dtype for each in expected]
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours - theirs).norm() < 0.02 * theirs.norm()


def add_adapter(model):
    model.add_adapter("other", LoraConfig(r=2, target_modules=["0", "2"]))
    model.base_model.set_adapter(["default", "other"])


@pytest.mark.parametrize(
    ("fields", "change"),
    [
        ({"lora_dropout": 0.5}, None),
        ({"use_dora": True}, None),
        ({"lora_bias": True}, None),
        ({}, add_adapter),
        ({}, lambda model: model.merge_adapter()),
        ({}, lambda model: layers(model)[0].lora_A["default"].register_forward_pre_hook(lambda m, a: (a[0] * 2,))),
        ({}, lambda model: layers(model)[0].lora_B["default"].register_forward_hook(lambda m, a, out: out * 2)),
        ({}, lambda model: layers(model)[0].base_layer.register_forward_hook(lambda m, a, out: out * 2)),
        ({}, lambda model: layers(model)[0].base_layer.weight.requires_grad_()),
    ],
)  # fmt: skip
def test_where_peft_does_something_else_it_is_left_to_it(fields, change):
    model, x = wrapped(**fields), torch.randn(7, 12, dtype=torch.float64)
    if change:
        change(model)
    model.train()
    expected = gradients(model, x)
    fuse(model)
    found = gradients(model, x)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_a_disabled_adapter_is_disabled():
    model, x = wrapped(), torch.randn(7, 12, dtype=torch.float64)
    fuse(model)
    with model.disable_adapter():
        bare = model(x)
    plain = nn.Sequential(layers(model)[0].base_layer, nn.Tanh(), layers(model)[1].base_layer)
    assert torch.equal(bare, plain(x))
    assert not torch.equal(bare, model(x))


def test_a_dropout_at_rest_is_in_nobodys_way():
    model, x = wrapped(lora_dropout=0.5).eval(), torch.randn(7, 12, dtype=torch.float64)
    fuse(model)
    with counted() as calls, torch.inference_mode():
        model(x)
    assert len(calls) == 2


def test_copies_and_pickles_compute_alike():
    model, x = wrapped(), torch.randn(7, 12, dtype=torch.float64)
    fuse(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), model(x))


def test_other_layers_stay_as_they_are():
    model = nn.Sequential(nn.Embedding(4, 12), nn.Linear(12, 6))
    model = get_peft_model(model, LoraConfig(r=3, target_modules=["0", "1"]))
    fuse(model)
    assert [type(layer).__name__ for layer in model.base_model.model] == ["Embedding", "FusedLinear"]
    assert type(model.merge_and_unload()[1]) is nn.Linear
