"""Beyond the paper: dropout inside LoRA's own update, against the matrices it stands for; NEFTune and R-Drop beside it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from hkft import Consistency, Method, Site, attach, consistency_loss
from hkft.errors import MethodError

IN, R, OUT = 32, 4, 64  # llama's up_proj


@pytest.fixture
def adapted(zoo: Any) -> Any:
    """A llama with LoRA on up_proj, its B no longer zero, float64."""
    torch.manual_seed(0)
    model = get_peft_model(zoo.build("llama"), LoraConfig(r=R, lora_alpha=8, target_modules=["up_proj"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    return model.double().train()


def up_proj(model: Any) -> Any:
    return model.base_model.model.model.layers[0].mlp.up_proj


def update(layer: Any, x: Tensor) -> Tensor:
    """What LoRA adds to the layer's output."""
    return layer(x) - layer.base_layer(x)


def matrices(layer: Any) -> tuple[Tensor, Tensor]:
    return layer.lora_A["default"].weight, layer.lora_B["default"].weight * layer.scaling["default"]


@pytest.mark.parametrize("rescale", ["none", "inverse_keep"])
@pytest.mark.parametrize("position", ["lora_input", "lora_rank", "lora_output"])
def test_a_column_is_a_mask_on_the_matrices_themselves(adapted: Any, position: Any, rescale: Any) -> None:
    """One identity batch gives the update matrix itself: B A, with whole columns or rows of one of them gone."""
    layer, rate = up_proj(adapted), 0.4
    a, b = matrices(layer)
    factor = 1 / (1 - rate) if rescale == "inverse_keep" else 1.0
    seen = []
    with attach(adapted, Method([Site(position, "column", rate, "all", rescale)])):
        for _ in range(20):
            got = update(layer, torch.eye(IN, dtype=torch.float64)[None])[0].T
            if position == "lora_input":
                keep = got.abs().sum(0) > 0
                expected = b @ (a * keep)
            elif position == "lora_output":
                keep = got.abs().sum(1) > 0
                expected = (b * keep[:, None]) @ a
            else:  # the coordinates of B D A in the basis of B and A are the diagonal of D
                keep = (torch.linalg.pinv(b) @ got @ torch.linalg.pinv(a)).diagonal() > 0.5
                expected = b @ (keep[:, None] * a)
            torch.testing.assert_close(got, expected * factor)
            seen.append(keep)
    size = {"lora_input": IN, "lora_rank": R, "lora_output": OUT}[position]
    kept = torch.stack(seen)
    assert kept.shape == (20, size)
    bound = 5 * (rate * (1 - rate) / kept.numel()) ** 0.5
    assert abs(1 - kept.double().mean().item() - rate) < bound
    torch.testing.assert_close(update(layer, torch.eye(IN, dtype=torch.float64)), (b @ a).T)  # detached


@pytest.mark.parametrize("position", ["lora_input", "lora_rank", "lora_output"])
def test_an_element_is_drawn_for_every_token(adapted: Any, position: Any) -> None:
    layer, x = up_proj(adapted), torch.ones(2, 8, IN, dtype=torch.float64)
    with attach(adapted, Method([Site(position, "element", 0.5, "all", "none")])) as attachment:
        rows = update(layer, x).flatten(0, 1)
        (report,) = attachment.report()
    assert len({tuple(row.tolist()) for row in rows.round(decimals=9)}) > 8  # equal tokens, other masks
    assert report["measured"] == pytest.approx(0.5, abs=0.2)
    with attach(adapted, Method([Site(position, "column", 0.5, "all")])):
        assert len({tuple(row.tolist()) for row in update(layer, x).flatten(0, 1).round(decimals=9)}) == 1


def hooks(model: nn.Module) -> dict[str, int]:
    return {name: len(m._forward_hooks) + len(m._forward_pre_hooks) for name, m in model.named_modules()}


@pytest.mark.parametrize("name", ["lora-matrix-dropout", "droplora", "r-drop", "lora-dropout"])
def test_named_methods_fire_in_every_adapted_layer_and_leave_nothing(zoo: Any, adapted: Any, name: str) -> None:
    batch = zoo.inputs("llama")
    before_hooks = hooks(adapted)
    adapted.eval()
    before = zoo.run(adapted, batch)
    adapted.train()
    with attach(adapted, name, rate=0.3) as attachment:
        assert not torch.equal(zoo.run(adapted, batch), zoo.run(adapted, batch))
        assert [(site["layers"], site["calls"], site["modules"]) for site in attachment.report()] == [
            ([0, 1], 4, 2)
        ] * len(attachment.method.sites)
        adapted.eval()
        assert torch.equal(zoo.run(adapted, batch), before)
    assert hooks(adapted) == before_hooks


def test_an_adapter_that_is_not_active_need_not_fire(zoo: Any, adapted: Any) -> None:
    adapted.add_adapter("other", LoraConfig(r=2, target_modules=["up_proj"]))
    adapted.double()
    for name in ("lora-dropout", "droplora"):
        with attach(adapted, name) as attachment:
            zoo.run(adapted, zoo.inputs("llama"))
            assert attachment.report()[0]["modules"] == 2


@pytest.mark.parametrize("position", ["lora_input", "lora_rank", "lora_output"])
def test_a_seed_reaches_lora_too_and_modules_draw_apart(adapted: Any, zoo: Any, position: Any) -> None:
    method, outputs = Method([Site(position, "column", 0.5, "all")]), []
    for _ in range(2):
        with attach(adapted, method, seed=3) as attachment:
            outputs.append(zoo.run(adapted, zoo.inputs("llama")))
            assert len({dropper.seed for dropper in attachment.droppers}) == 2
    assert torch.equal(*outputs)


def test_dora_is_refused_where_its_norm_would_not_see_the_mask(zoo: Any) -> None:
    model = get_peft_model(zoo.build("llama"), LoraConfig(r=R, target_modules=["up_proj"], use_dora=True))
    with pytest.raises(MethodError, match="a variant of LoRA, such as DoRA"):
        attach(model, "droplora")
    with attach(model, "lora-dropout") as attachment:  # PEFT's own place, with DoRA's own rule for it
        zoo.run(model, zoo.inputs("llama"))
        assert attachment.report()[0]["calls"] == 2


# --- R-Drop without a site of ours: the model's own dropout -----------------------------------------------------------


def test_r_drop_on_the_models_own_dropout(zoo: Any) -> None:
    """Consistency alone: both passes differ by the model's dropout only, and both carry gradient."""
    model, batch = zoo.build("bert"), zoo.inputs("bert")
    head = nn.Linear(32, 3)

    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.head = model, head

        def forward(self, labels: Tensor, **inputs: Tensor) -> dict[str, Tensor]:
            logits = self.head(self.model(**inputs)[0][:, 0])
            return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}

    classifier, labels = Classifier().train(), torch.tensor([0, 2])
    r_drop = Method(consistency=Consistency("kl", gradient="both"))
    with attach(classifier, r_drop):
        silent = consistency_loss(classifier, {**batch, "labels": labels})
        assert silent.item() == pytest.approx(
            classifier(labels, **batch)["loss"].item()
        )  # nothing drops: the term is 0
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.3
        torch.manual_seed(5)
        got = consistency_loss(classifier, {**batch, "labels": labels})
        torch.manual_seed(5)
        one, two = classifier(labels, **batch), classifier(labels, **batch)
    log_p, log_q = (torch.log_softmax(each["logits"], -1) for each in (one, two))
    kl = 0.5 * ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum(-1).mean()
    assert kl > 1e-4
    assert got.item() == pytest.approx((0.5 * (one["loss"] + two["loss"]) + kl).item(), rel=1e-5)
