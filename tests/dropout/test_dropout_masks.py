"""Keep-masks, with four kinds of evidence each: a reference, determinism, a property, and a binomial bound (law 7)."""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any, Literal

import pytest
import torch
from scipy.stats import binom
from torch import Tensor

import hkft.dropout
from hkft import Method, Site, attach
from hkft.dropout import masks, method
from hkft.dropout.masks import PATTERNS, column, element, span, uniform

FULL, UNITS = (3, 4, 5, 20), (3, 4, 20)  # attention: [B,H,Q,K] and [B,H,K]
CPU = torch.device("cpu")


def scripted(*values: Tensor) -> Callable[[Sequence[int]], Tensor]:
    """A draw that hands out the given numbers, and checks that they were asked for in that shape."""
    left = list(values)

    def draw(shape: Sequence[int]) -> Tensor:
        value = left.pop(0)
        assert tuple(shape) == tuple(value.shape)
        return value

    return draw


def span_by_hand(n: int, length: int, start: int) -> list[bool]:
    return [not start <= place < start + length for place in range(n)]


def runs_of_dropped(row: Sequence[bool]) -> list[int]:
    """Lengths of the runs of False."""
    return [len(list(run)) for keep, run in itertools.groupby(row) if not keep]


# --- reference --------------------------------------------------------------------------------------------------------


def test_element_keeps_what_is_drawn_at_or_above_the_rate() -> None:
    drawn = torch.tensor([[[0.0, 0.29], [0.3, 0.99]]])
    assert element((1, 2, 2), (1, 2), 0.3, scripted(drawn)).tolist() == [[[False, False], [True, True]]]


def test_column_keeps_what_is_drawn_at_or_above_the_rate() -> None:
    drawn = torch.tensor([[0.1, 0.5, 0.7]])
    assert column((1, 3, 8), (1, 3), 0.5, scripted(drawn)).tolist() == [[False, True, True]]


@pytest.mark.parametrize(
    ("rate", "round_up", "where", "length", "start"),
    [
        (0.3, 0.0, 0.0, 3, 0),
        (0.3, 0.999, 0.999, 3, 7),  # a whole length is never rounded up; the last start there is
        (0.25, 0.49, 0.5, 2, 4),  # 2.5 + 0.49 -> 2
        (0.25, 0.5, 0.5, 3, 4),  # 2.5 + 0.5 -> 3
        (0.05, 0.49, 0.5, 0, 5),  # nothing this time
        (0.99, 0.95, 0.999, 10, 0),  # everything: only one place to start
    ],
)
def test_span_is_the_run_one_would_write_by_hand(
    rate: float, round_up: float, where: float, length: int, start: int
) -> None:
    keep = span((1, 10, 4), (1, 10), rate, scripted(torch.tensor([[round_up]]), torch.tensor([[where]])))
    assert keep.tolist() == [span_by_hand(10, length, start)]


# --- determinism ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_seed_gives_the_same_mask_and_the_next_draw_another(pattern: str) -> None:
    def two(generator: torch.Generator) -> list[Tensor]:
        return [PATTERNS[pattern](FULL, UNITS, 0.4, uniform(CPU, generator)) for _ in range(2)]

    first, again = two(torch.Generator().manual_seed(5)), two(torch.Generator().manual_seed(5))
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[0], first[1])


@pytest.mark.parametrize("pattern", PATTERNS)
def test_without_a_generator_the_draw_is_torchs_default_one(pattern: str) -> None:
    torch.manual_seed(3)
    first = PATTERNS[pattern](FULL, UNITS, 0.4, uniform(CPU))
    torch.manual_seed(3)
    assert torch.equal(first, PATTERNS[pattern](FULL, UNITS, 0.4, uniform(CPU)))


def test_a_generator_of_its_own_leaves_torchs_default_one_alone() -> None:
    before = torch.get_rng_state()
    span(FULL, UNITS, 0.4, uniform(CPU, torch.Generator().manual_seed(5)))
    assert torch.equal(before, torch.get_rng_state())


# --- property ---------------------------------------------------------------------------------------------------------


def test_shapes() -> None:
    assert element(FULL, UNITS, 0.5, uniform(CPU)).shape == FULL
    assert column(FULL, UNITS, 0.5, uniform(CPU)).shape == UNITS
    assert span(FULL, UNITS, 0.5, uniform(CPU)).shape == UNITS


@pytest.mark.parametrize("pattern", PATTERNS)
def test_rate_zero_keeps_everything(pattern: str) -> None:
    assert PATTERNS[pattern](FULL, UNITS, 0.0, uniform(CPU)).all()


@pytest.mark.parametrize("rate", [0.05, 0.1, 0.33, 0.5, 0.77, 0.99])
def test_a_span_is_one_run_of_floor_or_ceiling_length(rate: float) -> None:
    n = 17
    lengths = set()
    for row in span((64, 4, 3, n), (64, 4, n), rate, uniform(CPU)).flatten(0, 1).tolist():
        runs = runs_of_dropped(row)
        assert len(runs) <= 1, row
        lengths.add(sum(runs))
    assert lengths <= {int(n * rate), int(n * rate) + 1}
    assert max(lengths) <= n


@pytest.mark.parametrize("pattern", ["column", "span"])
def test_heads_and_samples_draw_apart(pattern: str) -> None:
    rows = PATTERNS[pattern]((8, 8, 2, 60), (8, 8, 60), 0.5, uniform(CPU)).flatten(0, 1).tolist()
    assert len({tuple(row) for row in rows}) > 25  # of 64 rows; a span of 30 in 60 has 31 places


@pytest.mark.parametrize(
    ("n", "rate"), [(10, Fraction(1, 4)), (7, Fraction(1, 2)), (12, Fraction(1, 10)), (3, Fraction(9, 10))]
)
def test_the_expected_share_of_a_span_is_exactly_the_rate(n: int, rate: Fraction) -> None:
    """Over a grid of draws that is even in the fraction, the mean length is rate x N to the last digit."""
    grid = 20  # a multiple of the denominator of N x rate
    numbers = (torch.arange(grid, dtype=torch.float64) + 0.5) / grid
    keep = span(
        (grid, n, 2),
        (grid, n),
        float(rate),
        scripted(numbers[:, None], torch.full((grid, 1), 0.5, dtype=torch.float64)),
    )
    assert Fraction(int((~keep).sum()), grid) == n * rate


def test_every_start_of_a_span_is_as_likely() -> None:
    n, draws = 8, 1200
    starts = torch.zeros(n + 1)
    for row in span((draws, n, 2), (draws, n), 0.5, uniform(CPU)).tolist():
        starts[row.index(False)] += 1
    assert (starts > 0).tolist() == [True] * 5 + [False] * 4  # 4 of 8 dropped: starts 0 to 4
    low, high = binom.interval(1 - 1e-6, draws, 1 / 5)
    assert all(low <= count <= high for count in starts[:5].tolist())


# --- binomial bound ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [0.01, 0.1, 0.5, 0.9])
@pytest.mark.parametrize(("pattern", "trials"), [("element", 40 * 25 * 20), ("column", 40 * 25)])
def test_the_dropped_share_lies_in_its_binomial_bound(pattern: str, trials: int, rate: float) -> None:
    keep = PATTERNS[pattern]((40, 25, 20), (40, 25), rate, uniform(CPU))
    low, high = binom.interval(1 - 1e-6, trials, rate)
    assert keep.numel() == trials
    assert low <= int((~keep).sum()) <= high


@pytest.mark.parametrize("rate", [0.01, 0.1, 0.37, 0.9])
def test_the_length_of_a_span_is_rounded_up_within_its_binomial_bound(rate: float) -> None:
    rows, n = 2000, 33
    lengths = (~span((rows, n, 2), (rows, n), rate, uniform(CPU))).sum(-1)
    floor = int(n * rate)
    low, high = binom.interval(1 - 1e-6, rows, n * rate - floor)
    assert low <= int((lengths > floor).sum()) <= high


def test_the_pattern_that_the_package_shows_how_to_add(monkeypatch: pytest.MonkeyPatch, zoo: Any) -> None:
    """The function stands in hkft.dropout's docstring; with its two names it works at every position."""
    code = textwrap.dedent("    def pair" + (hkft.dropout.__doc__ or "").partition("def pair")[2].partition("\n\n")[0])
    names: dict[str, Any] = {}
    exec(code, names)
    monkeypatch.setitem(masks.PATTERNS, "pair", names["pair"])
    monkeypatch.setattr(method, "Pattern", Literal["element", "pair"])
    keep = names["pair"]((2, 9, 4), (2, 9), 0.5, uniform(torch.device("cpu")))
    assert keep.shape == (2, 9)
    assert torch.equal(keep[:, 0:8:2], keep[:, 1:8:2])
    model = zoo.build("llama")
    sites = [Site("attention_logits", "pair", 0.3), Site("hidden", "pair", 0.3), Site("output", "pair", 0.3)]  # type: ignore[arg-type]
    with attach(model, Method(sites)) as attachment:
        for _ in range(20):
            assert torch.isfinite(zoo.run(model, zoo.inputs("llama", rows=6))).all()
        for site in attachment.report():
            assert site["measured"] == pytest.approx(0.3, abs=0.06)
