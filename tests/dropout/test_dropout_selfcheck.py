"""The self-check: it passes where a method works, fails where one of its promises is broken, and leaves no trace."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import BertConfig, BertModel, Wav2Vec2Config, Wav2Vec2ForCTC

from hkft import METHODS, Method, Site, attach, self_check
from hkft.dropout import interface
from hkft.errors import DivergedError, MethodError

CASES = [(name, method) for name in ("bert", "llama") for method in METHODS if method != "none"]
CASES.remove(("llama", "hiddencut-span"))  # refused on a decoder


def state(model: nn.Module) -> dict[str, Any]:
    return {
        "modes": {name: module.training for name, module in model.named_modules()},
        "weights": {name: parameter.clone() for name, parameter in model.named_parameters()},
        "gradients": {name: parameter.grad is None for name, parameter in model.named_parameters()},
        "random": torch.get_rng_state(),
        "attention": model.config._attn_implementation,
    }


def same(one: Any, two: Any) -> bool:
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(same(one[key], two[key]) for key in one)
    return torch.equal(one, two) if isinstance(one, torch.Tensor) else one == two


@pytest.mark.parametrize(("name", "method"), CASES)
def test_every_method_passes_and_nothing_is_left(zoo: Any, name: str, method: str) -> None:
    model, batch = zoo.build(name), zoo.inputs(name)
    model = get_peft_model(model, LoraConfig(target_modules=["query" if name == "bert" else "q_proj"]))
    with attach(model, method, rate=0.01) as attachment:
        before = state(model)
        found = self_check(model, batch)
        assert same(state(model), before)
        reports = attachment.report()
    assert found["rows"] == 2
    assert found["cost"].keys() == set(range(len(attachment.method.sites)))
    for site in reports:
        assert (site["calls"], site["measured"], site["protected"]) == (0, None, None)
        assert site["cost"] > 0


def test_counts_and_generators_go_on_where_they_were(zoo: Any) -> None:
    model, batch, outputs = zoo.build("bert"), zoo.inputs("bert"), []
    for checked in (False, True):
        with attach(model, "hiddenkey-", rate=0.3, seed=5) as attachment:
            zoo.run(model, batch)
            if checked:
                self_check(model, batch)
            outputs.append(zoo.run(model, batch))
            assert [site["calls"] for site in attachment.report()] == [4, 4]
    assert torch.equal(*outputs)


def test_without_a_method_it_is_refused_and_at_rate_0_there_is_nothing_to_prove(zoo: Any) -> None:
    model, batch = zoo.build("bert"), zoo.inputs("bert")
    with pytest.raises(MethodError, match="no method attached"):
        self_check(model, batch)
    with attach(model, "hiddenkey-", rate=0):
        assert self_check(model, batch)["cost"] == {}


def test_native_dropout_does_not_make_the_baseline_differ(zoo: Any) -> None:
    model = zoo.build("bert")
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.3
    with attach(model, "hiddenkey-", rate=0.1):
        self_check(model, zoo.inputs("bert"))


def test_a_site_that_changes_nothing_is_found(zoo: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = zoo.build("bert")
    monkeypatch.setattr(interface, "_drop", lambda dropper, q, k, v, *_: (dropper.count(q > 0), v * 0)[1])
    with (
        attach(model, "dropkey"),
        pytest.raises(MethodError, match="two training passes under different masks of attention_logits gave the same"),
    ):
        self_check(model, zoo.inputs("bert"))


def test_an_idle_site_is_found_beside_one_that_acts_and_under_native_dropout(
    zoo: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def keeps_all(dropper: Any, q: Any, k: Any, v: Any, mask: Any, causal: bool, scale: float, *_: Any) -> Any:
        dropper.count(q > 0)
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)

    model = zoo.build("bert")
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.3
    monkeypatch.setattr(interface, "_drop", keeps_all)
    with attach(model, "hiddenkey-"), pytest.raises(MethodError, match="masks of attention_logits gave") as caught:
        self_check(model, zoo.inputs("bert"))
    assert "masks of hidden" not in str(caught.value)
    assert all(module.p == 0.3 for module in model.modules() if isinstance(module, nn.Dropout))


def test_a_path_that_is_not_the_models_own_attention_is_found(zoo: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """An encoder taken for a decoder: nothing drops, and yet no token sees what comes after it."""
    model, batch = zoo.build("bert"), zoo.inputs("bert")
    real = interface._drop
    monkeypatch.setattr(interface, "_drop", lambda d, q, k, v, mask, causal, *rest: real(d, q, k, v, None, True, *rest))
    with attach(model, "dropkey"), pytest.raises(MethodError, match="with masks that drop nothing the model differs"):
        self_check(model, batch)


class Wrapped(nn.Module):
    """Somebody's own module around a transformers model."""

    def __init__(self, inner: nn.Module, give: Any) -> None:
        super().__init__()
        self.inner, self.give, self.norm = inner, give, nn.BatchNorm1d(32)
        self.register_buffer("ones", torch.ones(1).expand(32))  # cannot be written to in place

    def forward(self, **batch: torch.Tensor) -> Any:
        hidden = self.inner(**batch)[0]
        return self.give(hidden + self.norm(hidden[:, 0])[:, None])


@pytest.mark.parametrize(
    "give",
    [
        lambda x: x.square().mean(),
        lambda x: {"loss": x.square().mean()},
        lambda x: x,
        lambda x: (x,),
        lambda x: {"loss": x.square().mean(), "logits": x.masked_fill(torch.arange(32) == 0, float("-inf"))},
    ],
    ids=["a scalar", "a loss alone", "a tensor", "a tuple", "logits that are minus infinity"],
)
def test_whatever_a_wrapper_gives(zoo: Any, give: Any) -> None:
    model = Wrapped(zoo.build("bert"), give).train()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with attach(model, "hiddenkey-", rate=0.1):
        assert self_check(model, zoo.inputs("bert"))["rows"] == 2
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())  # of the batch norm


def test_padding_queries_are_nobodys_output(zoo: Any) -> None:
    for side in ("left", "right"):
        model = zoo.build("llama")
        with attach(model, "hiddenkey-", rate=0.1):
            self_check(model, zoo.inputs("llama", padding=side, real=4))


@pytest.mark.filterwarnings("ignore:.*")
def test_a_loss_that_is_no_number_is_not_blamed_on_hkft(zoo: Any) -> None:
    model, batch = zoo.build("llama"), zoo.inputs("llama")
    batch["labels"] = torch.full_like(batch["input_ids"], -100)
    with attach(model, "hiddenkey-"), pytest.raises(DivergedError) as caught:
        self_check(model, batch)
    assert str(caught.value) == (
        "self-check: the loss is nan before training, with or without the method\n"
        "  hint: look at the batch (are all labels -100?) and at the precision"
    )


@pytest.mark.parametrize("layerdrop", [0.0, 0.5])
def test_a_model_that_draws_from_numpy_and_leaves_layers_out(layerdrop: float) -> None:
    """wav2vec 2.0 masks its own inputs in train mode, with numbers of numpy's; the rate of its layers is the configuration's."""
    config = Wav2Vec2Config(
        hidden_size=32, num_hidden_layers=6, num_attention_heads=4, intermediate_size=64, vocab_size=20,
        layerdrop=layerdrop,
        conv_dim=(16, 16), conv_stride=(5, 2), conv_kernel=(10, 3), num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=2, mask_time_prob=0.3, mask_time_length=2,
    )  # fmt: skip
    model = Wav2Vec2ForCTC(config).train()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(5)  # so that a layer left out shows
    batch = {"input_values": torch.randn(2, 1000)}
    np.random.seed(3)
    before = (np.random.get_state()[1].tolist(), random.getstate())
    with attach(model, "dropkey", rate=0.1):
        self_check(model, batch)
    assert model.config.layerdrop == layerdrop
    assert (np.random.get_state()[1].tolist(), random.getstate()) == before


def test_a_span_of_few_tokens_may_well_fall_on_the_same() -> None:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    for seed in range(4):
        torch.manual_seed(seed)
        with attach(BertModel(config).train(), "hiddencut-span") as attachment:
            self_check(attachment.family.model, {"input_ids": torch.randint(3, 64, (1, 5))})


def test_a_check_leaves_the_proof_to_the_first_step(zoo: Any) -> None:
    """What is changed after the check is found in training, as it is without one."""
    model, batch = zoo.build("bert"), zoo.inputs("bert")
    with attach(model, "hiddencut", rate=0.3):
        self_check(model, batch)
        wrapped = get_peft_model(model, LoraConfig(target_modules=["output.dense"])).train()
        with pytest.raises(MethodError, match="was wrapped after attaching"):
            wrapped(**batch)


def test_dropout_in_eval_mode_is_found(zoo: Any) -> None:
    model, batch = zoo.build("bert"), zoo.inputs("bert")
    model.encoder.layer[0].output.register_forward_hook(lambda module, args, out: out * torch.rand(()))
    with attach(model, "dropkey"), pytest.raises(MethodError, match="two passes in eval mode differ"):
        self_check(model, batch)


def test_a_rate_of_0_that_is_not_the_model_itself_is_found(zoo: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = zoo.build("bert")
    own = interface._attend_sdpa

    def shrunk(module: Any, *args: Any, **kwargs: Any) -> Any:
        out, weights = own(module, *args, **kwargs)
        return (out * 0.9 if module.training else out), weights

    monkeypatch.setattr(interface, "_attend_sdpa", shrunk)
    with attach(model, "dropkey"), pytest.raises(MethodError, match="at rate 0 the model differs from itself"):
        self_check(model, zoo.inputs("bert"))


def test_what_it_costs_is_told(zoo: Any) -> None:
    """A site made slow on purpose is the one that is told to be slow."""
    model, batch = zoo.build("bert"), zoo.inputs("bert")
    with attach(model, Method([Site("attention_logits", "column"), Site("hidden")])) as attachment:
        slow = next(d for d in attachment.droppers if d.site.position == "hidden")
        draw = slow.draw

        def slowly(*args: Any) -> Any:
            import time

            time.sleep(0.1)
            return draw(*args)

        slow.draw = slowly  # type: ignore[method-assign]
        self_check(model, batch)
        key, hidden = attachment.report()
    assert hidden["cost"] > 2
    assert hidden["cost"] > key["cost"]
