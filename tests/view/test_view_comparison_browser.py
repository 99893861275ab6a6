"""The report of a comparison as a browser shows it: what comes first, that nothing runs, that no page scrolls sideways."""

from __future__ import annotations

import html
import re
from pathlib import Path

import pytest

from hkft.comparison.compare import Comparison, Failure, Row, Score, measures
from hkft.comparison.foreign import Foreign
from hkft.comparison.statistics import against, describe
from hkft.view.comparison_report import write_comparison_report

EVIL = "</td><script>document.title = 'ran'</script><img src=x onerror=\"document.title = 'ran'\">"
LONG = "unbroken" * 30
SEEDS = (1, 2, 3)
HEADINGS = [
    "Side by side",
    "Validation loss",
    "Validation accuracy",
    "Gap of the loss",
    "Response to lora.r",
    "Response to dropout.rate",
    "What it costs",
    "Settings tried",
    "Curves of other tools",
    "Warnings",
    "How to read it",
    "The runs",
]
# Shows the report, unchanged, in a frame of a width, with every <details> open; and writes down what it measures:
# the room inside, the room needed, tables that scroll in their own boxes, and texts of drawings that leave them sideways.
MEASURE = """<!doctype html><title>measuring</title>
<iframe width="{width}" height="800" style="border: 0" srcdoc="{source}"></iframe>
<script>
document.querySelector("iframe").onload = (event) => {{
  const page = event.target.contentDocument;
  page.querySelectorAll("details").forEach((details) => (details.open = true));
  const boxes = [...page.querySelectorAll(".scroll")];
  const scrolled = boxes.filter((box) => box.scrollWidth > box.clientWidth).length;
  const outside = [...page.querySelectorAll("svg text")].filter((text) => {{
    const [box, frame] = [text.getBoundingClientRect(), text.ownerSVGElement.getBoundingClientRect()];
    return box.width && (box.left < frame.left - 1 || box.right > frame.right + 1);
  }}).length;
  const found = [page.documentElement.clientWidth, page.documentElement.scrollWidth, scrolled, outside];
  document.title = "measured " + found.join(" ");
}};
</script>
"""


def look(step: int, rise: float) -> dict:
    probe = {"loss": 0.6 - step / 50, "accuracy": 0.7}
    return {"step": step, "train_probe": probe, "validation": {"loss": 0.6 + rise * step, "accuracy": 0.7 + rise}}


@pytest.fixture
def report(tmp_path) -> Path:
    """A report with every section, and with texts that are hostile or too long: three methods, two ranks, two rates."""
    known = measures("accuracy", tested=True)
    rows, curves = [], []
    for method in ("none", EVIL, LONG):
        for rank in (4, 16):
            for rate in (0.1, 0.2) if method != "none" else (None,):
                base = {seed: 0.8 + rank / 1000 + seed / 500 for seed in SEEDS}
                values = {seed: value + (rate or 0) * seed / 10 for seed, value in base.items()}
                label, plain = f"{method} p={rate} lora.r={rank}", f"none p=None lora.r={rank}"
                change = against({label: values}, base, lower_is_better=False)[label] if rate else None
                score = Score(values, describe(list(values.values())), change)
                rows.append(
                    Row(
                        label=label,
                        method=method,
                        settings={"dropout.rate": rate, "lora.r": rank},
                        seeds=SEEDS,
                        runs=tuple(str(tmp_path / f"run-{len(rows)}-{seed}") for seed in SEEDS),
                        scores={measure.key: score for measure in known},
                        verdicts={"healthy": 2, "overfitting": 1},
                        seconds=describe([1.0, 2.0]),
                        time_ratio=1.0 + len(method) / 100,
                        samples_per_s=10.0,
                        tokens_per_s=100.0,
                        peak_memory_bytes=2**30,
                        passes=1,
                        facet={"lora.r": rank},
                        tried=2 if rate else 1,
                        chosen=rate != 0.2,
                        baseline=plain,
                        equal_time=describe([0.8, 0.9]),
                        front=rate != 0.2,
                        paper=0.8448,
                    )
                )
                for seed in SEEDS:
                    points = [look(step, seed / 100) for step in (0, 10, 20)]
                    curves.append({"label": label, "seed": seed, "run": rows[-1].runs[seed - 1], "points": points})
    other = Foreign(LONG, EVIL, 0.4, 0.5, 0.1, "healthy", (EVIL, LONG), (look(0, 0.0), look(30, 0.01)))
    comparison = Comparison(
        recipe="small",
        task="classification",
        metric="accuracy",
        main="test",
        baseline=rows[0].label,
        measures=known,
        rows=tuple(rows),
        notes=(EVIL, LONG),
        warnings=(LONG,),
        failed={EVIL: Failure(EVIL, 6)},
        curves=tuple(curves),
        paper="table1/rte",
        foreign=(other,),
    )
    write_comparison_report(tmp_path / "report.html", comparison)
    return tmp_path / "report.html"


def test_the_sections_follow_and_nothing_runs(dumped, report):
    shown = dumped(report)
    headings = re.findall(r"<h2[^>]*>(.*?)</h2>", shown)
    assert [html.unescape(heading) for heading in headings] == HEADINGS
    assert "<title>small: " in shown
    assert not re.search(r"<(script|img|iframe|object|link|base|form)\b", shown)
    links = {link for _, link in re.findall(r"<[^>]*\s(src|href)=\"([^\"]*)\"", shown) if not link.startswith("#")}
    assert links == {f"run-{row}-{seed}/report.html" for row in range(10) for seed in SEEDS}


@pytest.mark.parametrize("width", [390, 1280])
def test_no_page_scrolls_sideways_and_no_drawing_loses_words(dumped, report, tmp_path, width):
    wrapper = tmp_path / "wrapper.html"
    source = html.escape(report.read_text(encoding="utf-8"))
    wrapper.write_text(MEASURE.format(width=width, source=source), encoding="utf-8")
    measured = re.search(r"<title>measured (\d+) (\d+) (\d+) (\d+)</title>", dumped(wrapper))
    assert measured, "the page was not measured"
    inside, needed, scrolled, outside = map(int, measured.groups())
    assert needed == inside <= width
    assert scrolled >= 1  # wide tables do, in their own boxes
    assert outside == 0
