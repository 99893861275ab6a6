"""The self-check: it passes where a method works, fails where one of its three promises is broken, and leaves no trace."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from hkft import METHODS, Method, Site, attach, self_check
from hkft.dropout import interface
from hkft.errors import MethodError


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


@pytest.mark.parametrize("method", [name for name in METHODS if name != "none"])
@pytest.mark.parametrize("name", ["bert", "llama"])
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
        pytest.raises(MethodError, match="two training passes under different masks gave the same"),
    ):
        self_check(model, zoo.inputs("bert"))


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
