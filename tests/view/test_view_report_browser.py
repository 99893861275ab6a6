"""The report as a browser shows it: what comes first, that nothing runs, that a phone need not scroll sideways."""

from __future__ import annotations

import html
import re
from pathlib import Path

import pytest

from hkft.events import Evaluated, Notice, TrainStep, as_record
from hkft.view.report import write_report

PHONE = 390
EVIL = "</td><script>document.title = 'ran'</script><img src=x onerror=\"document.title = 'ran'\">"
LONG = "unbroken" * 30
HEADINGS = [
    "overfitting, high confidence",
    "Loss",
    "Accuracy",
    "Gap",
    "Training objective",
    "Decomposition of the loss",
    "Calibration",
    "Memorisation",
    "Near-duplicates",
    "What the dropout did",
    "Adapter",
    "Evaluations",
    "Configuration",
    "Environment",
    "How to reproduce",
    "Notices",
]
# Shows the report, unchanged, at the width of a phone, with every <details> open; and writes down what it measures.
MEASURE = """<!doctype html><title>measuring</title>
<iframe width="{width}" height="800" style="border: 0" srcdoc="{source}"></iframe>
<script>
document.querySelector("iframe").onload = (event) => {{
  const page = event.target.contentDocument;
  page.querySelectorAll("details").forEach((details) => (details.open = true));
  const boxes = [...page.querySelectorAll(".scroll")];
  const scrolled = boxes.filter((box) => box.scrollWidth > box.clientWidth).length;
  const top = page.querySelector("#verdict").getBoundingClientRect().top;
  const found = [page.documentElement.clientWidth, page.documentElement.scrollWidth, scrolled, Math.round(top)];
  document.title = "measured " + found.join(" ");
}};
</script>
"""


@pytest.fixture
def report(run, summary, sites, tmp_path) -> Path:
    """A report with every section, and with texts that are hostile or too long."""
    bins = [{"low": 0.9, "high": 1.0, "confidence": 0.95, "accuracy": 0.8, "count": 412}]
    side = {"nll": 0.7, "brier": 0.3, "calibration_error": 0.08, "temperature": 1.6, "calibration_error_after": 0.02}
    row = {"id": LONG[:60], "label": EVIL, "prediction": EVIL, "first": 2.3, "lowest": 0.01, "last": 0.01, "since": 63}
    norms = {"rank": 8, "effective_rank": 3.5, "update_norm": 1.0, "weight_norm": 20.0}
    parts = {"regularisation": {"total": 0.05, "dropout": 0.05, "consistency": 0.0}, "net_gain": 0.2, "regret": 0.01}
    pair = {"validation_id": "v-1", "train_id": "t-1", "similarity": 0.97, "validation_text": EVIL, "train_text": LONG}
    write_report(
        tmp_path / "report.html",
        summary=summary,
        curve=[as_record(event) for event in run if isinstance(event, Evaluated)],
        train_records=[as_record(event) for event in run if isinstance(event, TrainStep)],
        recipe_yaml=f"model:\n  name: {LONG}\n",
        environment={"python": "3.11", LONG[:80]: LONG},
        sites=sites,
        notices=[Notice(EVIL, "warning"), Notice(LONG, "info")],
        diagnosis={
            "verdict": {**summary["verdict"], "next": [{"why": EVIL, "command": f"hkft train --recipe {LONG}"}]},
            "gap_intervals": [{"step": 63 * n, "low": 0.1 * n, "high": 0.2 * n} for n in range(1, 7)],
            "decomposition": [{"step": step, "gap": 0.2, **parts, "regret_interval": [0, 0.02]} for step in (63, 378)],
            "calibration": {"train_probe": {**side, "bins": bins}, "validation": {**side, "bins": bins}},
            "memorisation": {
                "auc": {"value": 0.61, "low": 0.58, "high": 0.64},
                "memorised": [{**row, "text": EVIL}],
                "forgotten": [{**row, "text": LONG}],
                "suspicious": [],
            },
            "near_duplicates": {"compared": 500, "pairs": [pair]},
            "adapter": [{"module": f"base_model.model.encoder.layer.{n}.attention.query", **norms} for n in range(3)],
            "overhead": {"seconds": 12.3, "share": 0.07},
            "provenance": [["model.name", LONG, "recipe line 2"], [LONG, EVIL, "default"]],
            "reproduce": [f"pip install {LONG}", "hkft train --recipe resolved.yaml"],
        },
    )
    return tmp_path / "report.html"


def test_the_verdict_is_first_the_sections_follow_and_nothing_runs(dumped, report):
    shown = dumped(report)
    headings = re.findall(r"<h2[^>]*>(.*?)</h2>", shown)
    assert [html.unescape(re.sub(r"<[^>]*>", "", heading)) for heading in headings] == HEADINGS
    assert "<title>quickstart, hiddenkey, seed 1</title>" in shown
    assert not re.search(r"<(script|img|iframe|object|link|base|form)\b", shown)
    assert shown.count("&lt;script&gt;") >= 5
    assert {
        link for _, link in re.findall(r"<[^>]*\s(src|href)=\"([^\"]*)\"", shown) if not link.startswith("#")
    } == set()


def test_a_phone_need_not_scroll_sideways(dumped, report, tmp_path):
    wrapper = tmp_path / "wrapper.html"
    source = html.escape(report.read_text(encoding="utf-8"))
    wrapper.write_text(MEASURE.format(width=PHONE, source=source), encoding="utf-8")
    measured = re.search(r"<title>measured (\d+) (\d+) (\d+) (\d+)</title>", dumped(wrapper))
    assert measured, "the page was not measured"
    inside, needed, scrolled, top = map(int, measured.groups())
    assert needed == inside <= PHONE
    assert scrolled >= 3  # wide tables do, in their own boxes
    assert top < 200  # the verdict is in sight at once
