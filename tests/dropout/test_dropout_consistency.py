"""The consistency losses against SciPy and by hand: values, the zero, who gets the gradient, precision."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from scipy.special import rel_entr, softmax
from torch import Tensor

from hkft.dropout.consistency import LOSSES, js, js_symmetric, kl, squared

Loss = Callable[[Tensor, Tensor], Tensor]
EVERY = pytest.mark.parametrize("loss", [kl, js, js_symmetric, squared], ids=lambda f: f.__name__)


def logits(rows: int = 5, classes: int = 7) -> tuple[Tensor, Tensor]:
    return 3 * torch.randn(rows, classes), 3 * torch.randn(rows, classes)


def reference(name: str, p: Tensor, q: Tensor) -> float:
    """Mean over rows, in float64."""
    if name == "squared":
        return float(((p.double() - q.double()) ** 2).mean())
    P, Q = softmax(p.double().numpy(), -1), softmax(q.double().numpy(), -1)
    M = (P + Q) / 2
    terms = {
        "kl": 0.5 * (rel_entr(P, Q) + rel_entr(Q, P)),
        "js": rel_entr(P, Q),
        "js_symmetric": 0.5 * (rel_entr(M, P) + rel_entr(M, Q)),
    }
    return float(terms[name].sum(-1).mean())


@EVERY
@pytest.mark.parametrize("shape", [(1, 2), (5, 7), (3, 500)])
def test_value_equals_scipys(loss: Loss, shape: tuple[int, int]) -> None:
    p, q = logits(*shape)
    assert float(loss(p, q)) == pytest.approx(reference(loss.__name__, p, q), rel=1e-5)


def test_by_hand() -> None:
    p, q = torch.tensor([[0.75, 0.25]]).log(), torch.tensor([[0.5, 0.5]]).log()
    ln = math.log
    forth, back = 0.75 * ln(1.5) + 0.25 * ln(0.5), 0.5 * ln(0.5 / 0.75) + 0.5 * ln(2.0)
    assert float(js(p, q)) == pytest.approx(forth, rel=1e-5)  # KL(P || P_clean), P the first argument
    assert float(kl(p, q)) == pytest.approx((forth + back) / 2, rel=1e-5)
    mixed = 0.625 * ln(0.625 / 0.75) + 0.375 * ln(0.375 / 0.25), 0.625 * ln(0.625 / 0.5) + 0.375 * ln(0.375 / 0.5)
    assert float(js_symmetric(p, q)) == pytest.approx(sum(mixed) / 2, rel=1e-5)
    assert float(squared(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 5.0]]))) == pytest.approx((4 + 9) / 2)


@EVERY
def test_zero_for_equal_inputs_and_above_it_otherwise(loss: Loss) -> None:
    p, q = logits()
    assert abs(float(loss(p, p.clone()))) < 1e-6
    assert float(loss(p, q)) > 0.01


def test_the_paper_kl_of_equal_inputs_is_exactly_zero() -> None:
    p, _ = logits()
    assert float(kl(p, p.clone())) == 0.0


@pytest.mark.parametrize("loss", [kl, js, js_symmetric], ids=lambda f: f.__name__)
def test_a_constant_added_to_a_row_of_logits_changes_nothing(loss: Loss) -> None:
    p, q = logits()
    assert float(loss(p + 11.0, q - 4.0)) == pytest.approx(float(loss(p, q)), rel=1e-4)


@pytest.mark.parametrize("loss", [kl, js_symmetric, squared], ids=lambda f: f.__name__)
def test_symmetric(loss: Loss) -> None:
    p, q = logits()
    assert float(loss(p, q)) == pytest.approx(float(loss(q, p)), rel=1e-5)


def test_js_of_the_paper_is_not_symmetric() -> None:
    p, q = logits()
    assert float(js(p, q)) != pytest.approx(float(js(q, p)), rel=1e-2)


@EVERY
def test_mean_over_rows_not_sum(loss: Loss) -> None:
    p, q = logits()
    assert float(loss(p.repeat(4, 1), q.repeat(4, 1))) == pytest.approx(float(loss(p, q)), rel=1e-5)


@EVERY
@pytest.mark.parametrize("detached", [0, 1])
def test_gradient_reaches_one_side_when_the_other_is_detached(loss: Loss, detached: int) -> None:
    pair = [x.requires_grad_() for x in logits()]
    given = list(pair)
    given[detached] = pair[detached].detach()
    loss(*given).backward()
    assert pair[detached].grad is None
    assert pair[1 - detached].grad is not None
    assert pair[1 - detached].grad.abs().max() > 1e-4


@EVERY
def test_gradient_is_that_of_the_formula(loss: Loss) -> None:
    """Central differences of the SciPy reference, in float64."""
    p, q = (x.requires_grad_() for x in logits(2, 3))
    loss(p, q).backward()
    for mine, place in ((p, 0), (q, 1)):
        assert mine.grad is not None
        for row in range(2):
            for klass in range(3):
                ends = []
                for step in (1e-5, -1e-5):
                    pair = [p.detach().double(), q.detach().double()]
                    pair[place][row, klass] += step
                    ends.append(reference(loss.__name__, *pair))
                assert float(mine.grad[row, klass]) == pytest.approx((ends[0] - ends[1]) / 2e-5, abs=1e-4)


@EVERY
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_inputs_are_computed_in_float32(loss: Loss, dtype: torch.dtype) -> None:
    p, q = (x.to(dtype) for x in logits())
    value = loss(p, q)
    assert value.dtype == torch.float32
    assert float(value) == pytest.approx(reference(loss.__name__, p.float(), q.float()), rel=1e-5)


@EVERY
def test_finite_for_logits_far_apart(loss: Loss) -> None:
    p = torch.tensor([[200.0, -200.0], [0.0, 0.0]], requires_grad=True)
    q = torch.tensor([[-200.0, 200.0], [0.0, 1.0]], requires_grad=True)
    value = loss(p, q)
    value.backward()
    assert torch.isfinite(value)
    assert p.grad is not None
    assert torch.isfinite(p.grad).all()


def test_shapes_are_checked_here() -> None:
    """The import hook of the root conftest is at work: without it, broken shapes would pass through every test."""
    with pytest.raises(Exception, match="Type-check error"):
        kl(torch.randn(3, 4), torch.randn(3, 5))


def test_the_table_holds_the_three_kinds() -> None:
    assert {"kl": kl, "js": js, "js_symmetric": js_symmetric} == LOSSES
