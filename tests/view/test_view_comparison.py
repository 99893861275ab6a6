"""A comparison on the screen and as a page: what is said, what must be said with it, nothing from outside."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from hkft.comparison.compare import Comparison, Failure, Row, Score, measures
from hkft.comparison.foreign import Foreign
from hkft.comparison.statistics import against, describe
from hkft.view.compare import show_comparison
from hkft.view.comparison_report import mean, spread, write_comparison_report

MEASURES = measures("accuracy", tested=False)
EVIL = "</pre><script>alert(1)</script>"
LEGEND_OF = '<li><span class="{}"></span>{}</li>'
FOREIGN = Foreign(
    label="peft",
    source="trainer_state.json",
    best_loss=0.4,
    final_loss=0.5,
    final_gap=0.1,
    verdict="healthy",
    notes=("its loss is logged with dropout",),
    points=tuple(
        {"step": step, "train_probe": {"loss": 0.4}, "validation": {"loss": 0.5 + step / 100}} for step in (0, 20)
    ),
)


def points(rise: float, looks: int = 2) -> list[dict]:
    return [
        {
            "step": step,
            "epoch": step / 10,
            "train_probe": {"loss": 0.6 - step / 50, "accuracy": 0.7},
            "validation": {"loss": 0.6 + rise * step, "accuracy": 0.7 + step / 100},
        }
        for step in (10 * n for n in range(looks))
    ]


def row_of(label: str, numbers: Mapping[int, float], plain: Mapping[int, float], folder: Path, **changes: Any) -> Row:
    """A row whose measures all have the same numbers; the baseline's where these are those of the baseline itself."""
    differences = {} if numbers is plain else against({label: numbers}, plain, lower_is_better=False)
    score = Score(numbers, describe(list(numbers.values())), differences.get(label))
    of = Row(
        label=label,
        method=label,
        settings={},
        seeds=tuple(numbers),
        runs=tuple(str(folder / f"grid/{label.replace('/', '-')}-{seed}") for seed in numbers),
        scores={measure.key: score for measure in MEASURES},
        verdicts={"healthy": len(numbers)},
        seconds=describe([1.0, 2.0]),
        time_ratio=1.0,
        samples_per_s=10.0,
        tokens_per_s=100.0,
        peak_memory_bytes=2**30,
        passes=1,
        facet={},
        tried=1,
        chosen=True,
        baseline="none",
        equal_time=describe([0.8, 0.9]),
    )
    return replace(of, **changes)


def curves_of(row: Row, looks: int = 2) -> list[dict]:
    runs = zip(row.seeds, row.runs, strict=True)
    return [{"label": row.label, "seed": seed, "run": run, "points": points(seed / 100, looks)} for seed, run in runs]


@pytest.fixture
def comparison(tmp_path) -> Comparison:
    plain = {1: 0.8, 2: 0.82}
    rows = (
        row_of("none", plain, plain, tmp_path),
        row_of("hiddenkey", {1: 0.83, 2: 0.84}, plain, tmp_path),
    )
    return Comparison(
        recipe="small",
        task="classification",
        metric="accuracy",
        main="best",
        baseline="none",
        measures=MEASURES,
        rows=rows,
        notes=("selected and reported on the same validation rows: optimistic",),
        warnings=("hiddenkey and none are no fair pair: other device",),
        failed={"dropkey, seed 1": Failure("the loss is nan\n  hint: lower it", 6)},
        curves=tuple(curve for row in rows for curve in curves_of(row)),
    )


@pytest.fixture
def tuned(comparison, tmp_path) -> Comparison:
    """Three rates of one method at two ranks each."""
    rows = []
    for rank in (4, 16):
        plain = {seed: 0.8 + rank / 1000 + seed / 500 for seed in (1, 2, 3)}
        at = {"facet": {"lora.r": rank}, "baseline": f"none lora.r={rank}"}
        label = f"none lora.r={rank}"
        rows.append(row_of(label, plain, plain, tmp_path, method="none", settings={"lora.r": rank}, **at))
        for rate in (0.1, 0.2, 0.3):
            numbers = {seed: value + rate / 10 + seed / 1000 for seed, value in plain.items()}
            label, settings = f"hiddenkey p={rate} lora.r={rank}", {"dropout.rate": rate, "lora.r": rank}
            of = {"method": "hiddenkey", "settings": settings, "tried": 3, "chosen": rate == 0.2, **at}
            rows.append(row_of(label, numbers, plain, tmp_path, **of))
    return replace(comparison, rows=tuple(rows), baseline="none lora.r=4", curves=())


def written(comparison: Comparison, path: Path) -> str:
    """The page, whose tags have been checked to be closed."""
    write_comparison_report(path, comparison)
    page = path.read_text(encoding="utf-8")
    Tags().feed(page)
    return page


class Tags(HTMLParser):
    """Every tag is closed by its own."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_screen_says_what_must_be_said_with_the_table(comparison, tmp_path):
    text = io.StringIO()
    show_comparison(comparison, tmp_path, Console(file=text))
    assert (
        text.getvalue()
        == f"""\
method     seeds    best accuracy  difference      final gap    time
none           2  0.8100 ± 0.0141           -  0.810 ± 0.014  1.00 x
hiddenkey      2  0.8350 ± 0.0071     +0.0250  0.835 ± 0.007  1.00 x

best accuracy, hiddenkey against none: cannot tell (n = 2 seeds; about 3 would be needed); +0.0250 (-0.0385 to +0.0885), p = 0.13, won 2 of 2 seeds
final loss against none: cannot tell for hiddenkey
final loss gap against none: cannot tell for hiddenkey

warning: dropkey, seed 1 failed: the loss is nan
warning: hiddenkey and none are no fair pair: other device

note: selected and reported on the same validation rows: optimistic

report: {tmp_path}/report.html
tables: {tmp_path}/comparison.{{md,tex,csv,json}}
"""
    )


def test_the_page_holds_the_comparison_and_the_way_to_every_run(comparison, tmp_path):
    page = written(comparison, tmp_path / "grid" / "report.html")
    for expected in (
        "<title>small: none, hiddenkey</title>",
        "best accuracy, hiddenkey against none: cannot tell (n = 2 seeds",
        "dropkey, seed 1 failed: the loss is nan",
        '2 warnings: see the <a href="#warnings">',
        "selected and reported on the same validation rows: optimistic",
        "<b>0.8350 ± 0.0071</b> <small>best</small>",
        "+0.0250 <small>-0.039 to +0.089</small>",
        "<desc>none ends at 0.750; hiddenkey ends at 0.750</desc>",  # the mean of 0.6 + 0.1 and 0.6 + 0.2
        '<a href="hiddenkey-2/report.html" title="hiddenkey-2">2</a>',
    ):
        assert expected in page, expected
    assert page.count('class="wide"') == 4  # loss, metric, gap, cost
    assert page.count('class="line series-1"') == page.count('class="band series-1"') == 3
    assert page.count('class="whisker"') == 1
    assert "http:" not in page
    assert "https:" not in page
    assert "<script" not in page


def test_what_is_not_there_has_no_section(comparison, tmp_path):
    page = written(replace(comparison, warnings=(), failed={}, curves=()), tmp_path / "report.html")
    headings = re.findall(r"<h2[^>]*>(.*?)</h2>", page)
    assert headings == ["Side by side", "What it costs", "How to read it", "The runs"]
    assert "warning" not in page.split("</style>")[1]


def test_a_curve_of_another_tool_is_dashed_in_the_losses_alone(comparison, tmp_path):
    page = written(replace(comparison, foreign=(FOREIGN,)), tmp_path / "report.html")
    assert page.count('class="line foreign series-2"') == 1
    assert LEGEND_OF.format("foreign series-2", "peft (trainer_state.json)") in page
    assert "peft (trainer_state.json) ends at 0.700" in page
    assert "its loss is logged with dropout" in page


def test_what_the_paper_has_is_beside_ours(comparison, tmp_path):
    ours = replace(comparison, paper="table1/rte", rows=tuple(replace(row, paper=0.8448) for row in comparison.rows))
    page = written(ours, tmp_path / "report.html")
    assert page.count("<td>0.8448</td>") == 2
    assert "Paper: Wang et al., arXiv 2403.00812: median of 5 seeds" in page
    assert "0.8448" not in written(comparison, tmp_path / "other.html")


def test_rates_have_a_chart_at_each_rank_and_ranks_have_the_chosen_rates(tuned, tmp_path):
    page = written(tuned, tmp_path / "report.html")
    rates = page.split('<h2 id="dropout-rate">')[1].split("</section>")[0]
    ranks = page.split('<h2 id="lora-r">')[1].split("</section>")[0]
    assert re.findall(r"<figcaption>(.*?)</figcaption>", rates) == ["lora.r=4", "lora.r=16"]
    assert rates.count("<circle") == 2 * 3 + 2  # the chosen ones are ringed
    assert rates.count(", chosen by validation</title>") == rates.count('class="ring') == 2
    assert rates.count('class="line level"') == 2
    assert "none (baseline): 0.8080" in rates  # 0.8 + 0.004 + the mean of 2, 4, 6 thousandths
    assert ">rate 0.1</text>" in rates
    assert ranks.count("<circle") == 2 + 2
    assert "ring" not in ranks
    assert "level" not in ranks  # the baseline is a line
    assert "hiddenkey, lora.r=16: 0.8420 (" in ranks
    assert re.findall(r'<tr class="best"><td class="text">(.*?)</td>', page) == [
        "hiddenkey p=0.2 lora.r=4",
        "hiddenkey p=0.2 lora.r=16",
    ]
    assert page.count("/report.html") == 8 * 3  # those that were not chosen too


def test_rows_with_sites_of_their_own_have_a_colour_each(comparison, tmp_path):
    plain = {1: 0.8, 2: 0.82}
    rows = [row_of(label, plain, plain, tmp_path, method=method) for label, method in (
        ("none", "none"), ("by row", "custom"), ("unprotected", "custom"), ("dropkey", "dropkey"), ("span", "custom"))]  # fmt: skip
    page = written(replace(comparison, rows=tuple(rows)), tmp_path / "report.html")
    styles = {"none": 0, "by row": 1, "dropkey": 2, "unprotected": 3, "span": 4}
    assert all(LEGEND_OF.format(f"series-{number}", label) in page for label, number in styles.items())


def test_many_methods_share_colours_by_other_strokes_and_small_charts(comparison, tmp_path):
    plain = {1: 0.8, 2: 0.82}
    rows = [row_of("none", plain, plain, tmp_path)]
    for n in range(1, 10):
        for rate in (0.1, 0.2):
            of = {"method": f"m{n}", "settings": {"dropout.rate": rate}, "tried": 2, "chosen": rate == 0.1}
            rows.append(row_of(f"m{n} p={rate}", {1: 0.8 + n / 100, 2: 0.8 + rate}, plain, tmp_path, **of))
    page = written(replace(comparison, rows=tuple(rows)), tmp_path / "report.html")
    assert LEGEND_OF.format("series-0", "none") in page
    assert LEGEND_OF.format("series-7", "m7") in page
    assert LEGEND_OF.format("series-1 turn-1", "m9") in page
    assert re.findall(r"<figcaption>(.*?)</figcaption>", page) == ["m1, m2, m3, m4", "m5, m6, m7, m8", "m9"]
    assert "<title>small: 10 rows</title>" in page
    assert re.search(
        r"best accuracy, 9 comparisons with the baseline: \d better, 0 worse, \d cannot be told from it", page
    )


def test_the_front_is_joined_and_named(comparison, tmp_path):
    none, hiddenkey = comparison.rows
    slow = replace(hiddenkey, label="slow", time_ratio=3.0)
    rows = (replace(none, front=True), replace(hiddenkey, time_ratio=2.0, front=True), slow)
    page = written(replace(comparison, rows=rows), tmp_path / "report.html")
    cost = page.split('<h2 id="pareto">')[1].split("</section>")[0]
    assert "hiddenkey: 0.8350 in 2.00 x the time, on the front; slow: 0.8350 in 3.00 x the time</desc>" in cost
    assert cost.count('class="line front"') == 1
    assert cost.count('class="ring') == 2
    assert re.findall(r'class="label name" text-anchor="\w+">(.*?)<', cost) == ["hiddenkey", "slow", "none"]
    alone = written(replace(comparison, rows=(none,), curves=()), tmp_path / "alone.html")
    assert "What it costs" not in alone


def test_names_of_points_lie_on_nothing(comparison, tmp_path):
    rows = [
        replace(comparison.rows[1], label=f"method-{n}", time_ratio=1 + n / 1000, scores=comparison.rows[n % 2].scores)
        for n in range(12)
    ]
    page = written(replace(comparison, rows=tuple(rows), baseline="method-0"), tmp_path / "report.html")
    names = re.findall(r'<text x="([\d.]+)" y="([\d.]+)" class="label name" text-anchor="(\w+)">', page)
    boxes = [(float(x) - 56 * (anchor == "end"), float(y)) for x, y, anchor in names]
    assert len(boxes) == 12
    assert all(
        abs(x - u) > 56 or abs(y - v) >= 12 for n, (x, y) in enumerate(boxes) for u, v in boxes[:n]
    )  # eight letters


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_odd_numbers_leave_a_page(comparison, tmp_path, value):
    plain = {1: 0.8}
    odd = row_of("hiddenkey", {1: value}, plain, tmp_path, time_ratio=None, samples_per_s=None, peak_memory_bytes=None)
    rows = (row_of("none", plain, plain, tmp_path), odd, row_of("dropkey", {7: 0.8}, plain, tmp_path))
    curves = [curve for row in rows for curve in curves_of(row, 3)]
    curves[1]["points"][1]["validation"] = {"loss": value, "accuracy": None}
    curves[2]["points"] = []
    page = written(replace(comparison, rows=rows, curves=tuple(curves), notes=()), tmp_path / "report.html")
    drawn = page.split("</style>")[1]
    assert not re.search(r'\b(c?[xy][12]?|d)="[^"]*(nan|inf)', drawn)
    assert "; the band" not in drawn  # of one seed


@pytest.mark.parametrize("label", ["a<b>&\"c'", "unbroken" * 40], ids=["hostile", "long"])
def test_labels_may_be_hostile_or_long(tuned, tmp_path, label):
    rows = [replace(row, label=f"{label} {n}", method=label, front=True) for n, row in enumerate(tuned.rows)]
    page = written(
        replace(tuned, rows=tuple(rows), baseline=f"{label} 0", foreign=(FOREIGN,)), tmp_path / "report.html"
    )
    assert "<b>&" not in page
    assert (label in page) == label.isalpha()


def test_text_of_others_is_inert(comparison, tmp_path):
    evil = replace(FOREIGN, label=EVIL, source=EVIL, notes=(EVIL,))
    rows = (
        comparison.rows[0],
        replace(comparison.rows[1], label=EVIL, verdicts={EVIL: 2}, runs=(EVIL, "javascript:x")),
    )
    page = written(
        replace(comparison, recipe=EVIL, rows=rows, notes=(EVIL,), warnings=(EVIL,), foreign=(evil,)),
        tmp_path / "report.html",
    )
    assert "<script" not in page
    assert page.count("&lt;script&gt;") >= 10
    assert 'href="javascript' not in page


def test_a_link_leads_to_a_folder_of_any_name(comparison, tmp_path):
    run = tmp_path / "50% #1?" / "a:b"
    rows = (replace(comparison.rows[0], seeds=(1,), runs=(str(run),)),)
    page = written(replace(comparison, rows=rows), tmp_path / "50% #1?" / "report.html")
    assert 'href="a%3Ab/report.html"' in page


def test_a_page_of_twelve_methods_ten_seeds_and_sixty_looks_is_small(comparison, tmp_path):
    plain = {seed: 0.8 + seed / 1000 for seed in range(1, 11)}
    rows = [row_of("none", plain, plain, tmp_path)]
    for n in range(1, 12):
        for rate in (0.05, 0.1, 0.2, 0.3):
            numbers = {seed: value + rate / 10 + n * seed / 1000 for seed, value in plain.items()}
            of = {"method": f"hiddenkey/{n}", "settings": {"dropout.rate": rate}, "tried": 4, "chosen": rate == 0.1}
            rows.append(row_of(f"hiddenkey/{n} p={rate}", numbers, plain, tmp_path, **of))
    curves = [curve for row in rows for curve in curves_of(row, 60)]
    long = replace(FOREIGN, points=tuple({**FOREIGN.points[0], "step": step} for step in range(10_000)))
    page = written(
        replace(comparison, rows=tuple(rows), curves=tuple(curves), foreign=(long,)), tmp_path / "report.html"
    )
    assert 100_000 < len(page.encode()) < 300_000


def test_the_mean_is_taken_where_every_seed_was_seen():
    seeds = [[(0, 1.0), (5, 3.0), (9, 9.0)], [(0, 2.0), (5, 5.0)]]
    assert mean(seeds) == [(0, 1.5), (5, 4.0)]
    assert spread(seeds) == [(0, 1.0, 2.0), (5, 3.0, 5.0)]
    assert mean([]) == spread([]) == []
    ((_, low, high),) = spread([[(0, 1.0)], [(0, math.nan)]])
    assert math.isnan(low)
    assert math.isnan(high)
