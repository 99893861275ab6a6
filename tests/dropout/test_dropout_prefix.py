"""What two passes have in common is computed once, and nothing else changes: values, gradients, random stream, modules."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import BertConfig, BertForSequenceClassification
from transformers.pytorch_utils import Conv1D

import hkft
from hkft.dropout import prefix as prefix_module
from hkft.training.objective import objective


def counted(model, name: str) -> list[int]:
    """How often modules of that name have run; their own forward is what is counted, which a shared one is spared."""
    calls = [0]
    for path, module in model.named_modules():
        if path.endswith(name):
            own = module.forward

            def forward(*args, own=own, **kwargs):
                calls[0] += 1
                return own(*args, **kwargs)

            module.forward = forward
    return calls


def with_lora(model):
    conv = any(isinstance(module, Conv1D) for module in model.modules())
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", fan_in_fan_out=conv))
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return wrapped


def two_views(model, batch, method: hkft.Method):
    """The objective's loss on the squared states or logits, and the gradient of every trained parameter."""

    def forward():
        outputs = model(**batch)
        states = outputs[0]
        return states.float().square().mean(), {"logits": states.mean(1) if states.ndim == 3 else states}

    model.zero_grad()
    loss = objective(model, forward, method.consistency, None).loss
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("gradient", ["one", "both"])
def test_every_family_trains_as_if_nothing_was_shared(zoo, family, gradient, monkeypatch):
    model, batch = (
        with_lora(zoo.build(family)),
        zoo.inputs(family, padding=None if family == "vit" else "right", real=7),
    )
    method = hkft.Method(
        [hkft.Site("attention_logits", "column", layers=(1,)), hkft.Site("hidden", "element", layers=(1,))],
        hkft.Consistency("kl", gradient=gradient),
    )
    if family == "albert":  # its layers are one module, which runs twice
        method = hkft.Method([hkft.Site("hidden", "element")], hkft.Consistency("kl", gradient=gradient))
    with hkft.attach(model, method, rate=0.3) as attachment:
        two_views(model, batch, attachment.method)
        torch.manual_seed(5)
        shared, gradients = two_views(model, batch, attachment.method)
        state = torch.get_rng_state()
        assert attachment.prefix.modules, "something comes before layer 1"
        monkeypatch.setattr("hkft.training.objective.is_open", lambda model: False)
        torch.manual_seed(5)
        alone, expected = two_views(model, batch, attachment.method)
    assert torch.equal(state, torch.get_rng_state())
    torch.testing.assert_close(shared, alone, rtol=1e-6, atol=1e-7)
    assert gradients.keys() == expected.keys()
    for name, gradient_ in gradients.items():
        torch.testing.assert_close(gradient_, expected[name], rtol=1e-4, atol=1e-6, msg=name)


def test_the_layers_below_the_first_drop_run_once(zoo):
    model, batch = with_lora(zoo.build("llama", layers=4)), zoo.inputs("llama")
    method = hkft.METHODS["hiddenkey"]  # in a decoder, the latter half
    counts = {layer: counted(model, f"layers.{layer}.self_attn.k_proj") for layer in range(4)}
    with hkft.attach(model, method, rate=0.3) as attachment:
        two_views(model, batch, method)
        assert [count[0] for count in counts.values()] == [2, 2, 2, 2]
        two_views(model, batch, method)
    assert [count[0] for count in counts.values()] == [3, 3, 3, 4], "of the third layer the projections are shared too"
    assert {"layers.0", "layers.1"} <= {name[-8:] for name in names(model, attachment.prefix)}


def names(model, prefix) -> list[str]:
    called = {module: name for name, module in model.named_modules()}
    return [called[module] for module in prefix.modules or []]


def test_an_attention_that_tells_where_to_cut_tells_it_in_both_passes(zoo):
    model, batch = with_lora(zoo.build("bert")), zoo.inputs("bert")
    method = hkft.METHODS["hiddencut-span"].with_rate(0.3)
    method = hkft.Method(method.sites, hkft.Consistency("kl"))
    with hkft.attach(model, method) as attachment:
        for _ in range(3):
            two_views(model, batch, method)
        assert any(name.endswith("layer.0.attention.self.query") for name in names(model, attachment.prefix))
        assert not any(name.endswith("layer.0.attention.self") for name in names(model, attachment.prefix))


def test_nothing_is_left_on_the_modules(zoo):
    model, batch = with_lora(zoo.build("bert")), zoo.inputs("bert")
    method = hkft.METHODS["hiddenkey"]
    with hkft.attach(model, method, rate=0.3) as attachment:
        for _ in range(3):
            two_views(model, batch, method)

        def fails():
            model(**batch)
            raise RuntimeError("stop")

        with pytest.raises(RuntimeError, match="stop"):
            objective(model, fails, method.consistency, None)
        assert not attachment.prefix._kept
        assert torch.is_grad_enabled()
        assert not any("forward" in module.__dict__ for module in model.modules())
        assert all(dropper.begins is None for dropper in attachment.droppers)


def test_a_dropout_of_the_model_s_own_ends_what_is_shared():
    config = BertConfig(vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    model = with_lora(BertForSequenceClassification(config)).train()
    batch = {"input_ids": torch.randint(4, 50, (6, 9))}
    with hkft.attach(model, hkft.METHODS["hiddenkey"], rate=0.3) as attachment:
        two_views(model, batch, attachment.method)
        found = names(model, attachment.prefix)
    assert found
    assert all(".embeddings." in name for name in found), "all that comes after the embeddings' own dropout differs"


def test_a_lora_dropout_is_seen_before_it_has_any_effect(zoo):
    """B begins at 0, so that in the first step what comes before it does not reach the output."""
    model, batch = zoo.build("llama"), zoo.inputs("llama")
    model = get_peft_model(model, LoraConfig(r=2, lora_dropout=0.5, target_modules=["q_proj"]))
    method = hkft.Method([hkft.Site("hidden", "element", layers=(1,))], hkft.Consistency("kl"))
    with hkft.attach(model, method, rate=0.3) as attachment:
        two_views(model, batch, method)
        found = names(model, attachment.prefix)
    assert any(name.endswith("layers.0.self_attn.k_proj") for name in found)
    assert not any(name.endswith(("layers.0", "self_attn", "q_proj", "lora_dropout")) for name in found)


def test_other_rates_are_proven_anew(zoo):
    model, batch = with_lora(zoo.build("llama")), zoo.inputs("llama")
    method = hkft.Method([hkft.Site("hidden", "element", layers="all")], hkft.Consistency("kl"))
    with hkft.attach(model, method, rate=0.3) as attachment:
        with attachment.rates(lambda dropper: 0.3 if dropper.layer == 1 else 0.0):
            two_views(model, batch, method)
            below = names(model, attachment.prefix)
        assert any(name.endswith("layers.0") for name in below)
        assert attachment.prefix.modules is None
        two_views(model, batch, method)
        assert not any(name.endswith("layers.0") for name in names(model, attachment.prefix))


def test_what_is_changed_in_place_is_computed_again(zoo):
    model, batch = zoo.build("bert"), zoo.inputs("bert")
    method = hkft.Method([hkft.Site("hidden", "element", layers=(1,))], hkft.Consistency("kl"))
    with hkft.attach(model, method, rate=0.3):
        two_views(model, batch, method)
        clean, _ = _seeded(model, batch, method)
        handle = model.encoder.layer[0].register_forward_hook(
            lambda m, a, out: out.add_(1.0) if torch.is_tensor(out) else None
        )
        changed = [_seeded(model, batch, method)[0] for _ in range(2)]
        handle.remove()
    assert changed[0] == changed[1], "added once in each pass, and not twice in the second"
    assert changed[0] != clean


def _seeded(model, batch, method):
    torch.manual_seed(3)
    return two_views(model, batch, method)


@pytest.mark.parametrize("why", ["checkpointing", "compiled", "sharded"])
def test_hkft_does_not_reach_into_what_is_closed(zoo, why):
    model = zoo.build("llama")
    assert prefix_module.is_open(model)
    if why == "checkpointing":
        model.model.gradient_checkpointing = True
    elif why == "compiled":
        model.model.layers[0]._compiled_call_impl = model.model.layers[0]._call_impl
    else:
        model = type("FullyShardedDataParallel", (nn.Sequential,), {})(model)
    assert not prefix_module.is_open(model)


def test_peft_s_own_dropout_begins_no_graph_that_nobody_needs(zoo):
    model, batch = with_lora(zoo.build("llama")), zoo.inputs("llama")
    method = hkft.Method(
        [hkft.Site("lora_input", "element", layers=(1,), rescale="inverse_keep")], hkft.Consistency("kl")
    )
    seen = []
    model.base_model.model.model.norm.register_forward_hook(lambda m, a, out: seen.append(out.requires_grad))
    with hkft.attach(model, method, rate=0.3):
        for _ in range(2):
            two_views(model, batch, method)
    assert seen == [False, True, False, True]


def test_half_precision_loses_no_gradient(zoo):
    model, batch = with_lora(zoo.build("llama")), zoo.inputs("llama")
    method = hkft.METHODS["hiddenkey"]
    with hkft.attach(model, method, rate=0.3), torch.autocast("cpu", torch.bfloat16):
        for _ in range(2):
            _, gradients = two_views(model, batch, method)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert gradients.keys() == trained
    assert all(gradient.abs().sum() > 0 for gradient in gradients.values())
