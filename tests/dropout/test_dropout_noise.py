"""Gradient noise against what can be worked out by hand: the share at dropped logits, and the variance itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hkft import Method, Site, attach, gradient_noise


class Classifier(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.head = model, nn.Linear(32, 3)

    def forward(self, labels: Tensor, **inputs: Tensor) -> dict[str, Tensor]:
        logits = self.head(self.model(**inputs)[0].mean(1))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


@pytest.fixture
def classifier(zoo: Any) -> Classifier:
    torch.manual_seed(2)
    return Classifier(zoo.build("bert")).double().train()


@pytest.fixture
def batch(zoo: Any) -> dict[str, Tensor]:
    return {**zoo.inputs("bert"), "labels": torch.tensor([0, 2])}


def test_dropkey_gives_dropped_logits_nothing_and_dropattention_does(classifier: Any, batch: Any) -> None:
    key, attention = gradient_noise(classifier, batch, rate=0.3, draws=8)
    assert key.loss == pytest.approx(attention.loss, rel=1e-6)  # paper Eq. 13: the forward values are the same
    assert key.dropped_share == 0
    assert attention.dropped_share is not None
    assert 0.05 < attention.dropped_share < 0.9
    assert attention.norm != pytest.approx(key.norm, rel=1e-4)  # the gradient is another


def test_the_variance_is_that_of_the_gradients(classifier: Any, batch: Any) -> None:
    """Against torch.var over a loop written out."""
    (found,) = gradient_noise(classifier, batch, ["hiddencut"], rate=0.2, draws=6, seed=10)
    gradients = []
    with attach(classifier, "hiddencut", rate=0.2):
        for draw in range(6):
            torch.manual_seed(10 + draw)
            classifier.zero_grad()
            classifier(**batch)["loss"].backward()
            gradients.append(torch.cat([p.grad.flatten() for p in classifier.parameters() if p.grad is not None]))
    stacked = torch.stack(gradients)
    assert found.variance == pytest.approx(stacked.var(0).sum().item(), rel=1e-6)
    assert found.norm == pytest.approx(stacked.mean(0).norm().item(), rel=1e-6)
    assert found.noise == pytest.approx(found.variance / found.norm**2)
    assert found.dropped_share is None


def test_at_rate_0_there_is_no_noise(classifier: Any, batch: Any) -> None:
    (found,) = gradient_noise(classifier, batch, ["none"], draws=3)
    assert found.noise == pytest.approx(0, abs=1e-12)


def test_nothing_is_left(classifier: Any, batch: Any) -> None:
    classifier.zero_grad()
    random = torch.get_rng_state()
    gradient_noise(classifier.eval(), batch, [Method([Site("attention_weights", "span")])], draws=2)
    assert not classifier.training
    assert all(parameter.grad is None for parameter in classifier.parameters())
    assert torch.equal(torch.get_rng_state(), random)
    assert not hasattr(classifier.model, "_hkft_attachment")


def test_one_draw_has_no_variance(classifier: Any, batch: Any) -> None:
    with pytest.raises(ValueError, match="at least 2 draws"):
        gradient_noise(classifier, batch, draws=1)
