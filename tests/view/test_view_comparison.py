"""A comparison on the screen and as a page: what is said, what must be said with it, nothing from outside."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
from rich.console import Console

from hkft.comparison.compare import Comparison, Failure, Measure, Row, Score
from hkft.comparison.statistics import against, describe
from hkft.view.compare import show_comparison
from hkft.view.comparison_report import mean, write_comparison_report

MEASURES = ("best", "final", "best_loss", "final_loss", "best_gap", "final_gap")
EVIL = "</pre><script>alert(1)</script>"


def points(rise: float) -> list[dict]:
    return [
        {
            "step": step,
            "epoch": step / 10,
            "train_probe": {"loss": 0.6 - step / 50, "accuracy": 0.7},
            "validation": {"loss": 0.6 + rise * step, "accuracy": 0.7 + step / 100},
        }
        for step in (0, 10)
    ]


@pytest.fixture
def comparison(tmp_path) -> Comparison:
    numbers = {"none": {1: 0.8, 2: 0.82}, "hiddenkey": {1: 0.83, 2: 0.84}}
    differences = against({"hiddenkey": numbers["hiddenkey"]}, numbers["none"], lower_is_better=False)
    rows = [
        Row(
            label=label,
            method=label,
            settings={},
            seeds=(1, 2),
            runs=tuple(str(tmp_path / f"grid/{label}-{seed}") for seed in seeds),
            scores={key: Score(seeds, describe(list(seeds.values())), differences.get(label)) for key in MEASURES},
            verdicts={"healthy": 2},
            seconds=describe([1.0, 2.0]),
            time_ratio=1.0,
            samples_per_s=10.0,
            peak_memory_bytes=2**30,
        )
        for label, seeds in numbers.items()
    ]
    curves = [
        {"label": label, "seed": seed, "run": str(tmp_path / f"grid/{label}-{seed}"), "points": points(seed / 100)}
        for label in numbers
        for seed in (1, 2)
    ]
    return Comparison(
        recipe="small",
        task="classification",
        metric="accuracy",
        baseline="none",
        measures=tuple(Measure(key, key.replace("_", " "), ("best", "validation", "loss"), False) for key in MEASURES),
        rows=tuple(rows),
        notes=("selected and reported on the same validation rows: optimistic",),
        warnings=("hiddenkey and none are no fair pair: other device",),
        failed={"dropkey, seed 1": Failure("the loss is nan\n  hint: lower it", 6)},
        curves=tuple(curves),
    )


def test_the_screen_says_what_must_be_said_with_the_table(comparison, tmp_path):
    text = io.StringIO()
    show_comparison(comparison, tmp_path, Console(file=text))
    assert (
        text.getvalue()
        == f"""\
method     seeds             best     final loss      final gap    time
none           2  0.8100 ± 0.0141  0.810 ± 0.014  0.810 ± 0.014  1.00 x
hiddenkey      2  0.8350 ± 0.0071  0.835 ± 0.007  0.835 ± 0.007  1.00 x

best, hiddenkey against none: cannot tell (n = 2 seeds; about 3 would be needed); +0.0250 (-0.0385 to +0.0885), p = 0.13
final loss, hiddenkey against none: cannot tell (n = 2 seeds; about 3 would be needed); +0.0250 (-0.0385 to +0.0885), p = 0.13
final gap, hiddenkey against none: cannot tell (n = 2 seeds; about 3 would be needed); +0.0250 (-0.0385 to +0.0885), p = 0.13

warning: dropkey, seed 1 failed: the loss is nan
warning: hiddenkey and none are no fair pair: other device

note: selected and reported on the same validation rows: optimistic

report: {tmp_path}/report.html
tables: {tmp_path}/comparison.{{md,tex,csv,json}}
"""
    )


def test_the_page_holds_the_comparison_and_the_way_to_every_run(comparison, tmp_path):
    path = tmp_path / "grid" / "report.html"
    write_comparison_report(path, comparison)
    page = path.read_text(encoding="utf-8")
    for expected in (
        "<title>small: none, hiddenkey</title>",
        "best, hiddenkey against none: cannot tell (n = 2 seeds",
        "dropkey, seed 1 failed: the loss is nan",
        "selected and reported on the same validation rows: optimistic",
        "0.8350 ± 0.0071",
        "<desc>none ends at 0.750; hiddenkey ends at 0.750</desc>",  # the mean of 0.6 + 0.1 and 0.6 + 0.2
        '<a href="hiddenkey-2/report.html">',
    ):
        assert expected in page, expected
    assert page.count("<svg") == 3
    assert page.count('class="line series-1 seed"') == 3 * 2  # three charts, two seeds
    assert page.count('class="line series-1"') == 3
    assert "http:" not in page
    assert "https:" not in page
    assert "<script" not in page


def test_text_of_others_is_inert(comparison, tmp_path):
    write_comparison_report(tmp_path / "report.html", replace(comparison, recipe=EVIL, notes=(EVIL,), warnings=(EVIL,)))
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<script" not in page
    assert page.count("&lt;script&gt;") >= 4


def test_the_mean_is_taken_where_every_seed_was_seen():
    assert mean([[(0, 1.0), (5, 3.0), (9, 9.0)], [(0, 2.0), (5, 5.0)]]) == [(0, 1.5), (5, 4.0)]
    assert mean([]) == []
