"""Sites, methods and consistency as data: what is legal, what is said about the rest, and what each name stands for."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Callable
from dataclasses import FrozenInstanceError, replace
from typing import Any

import pytest

from hkft.dropout.method import RESCALES, Consistency, Method, Site
from hkft.dropout.named import METHODS, find
from hkft.errors import MethodError

POSITIONS = "attention_logits, attention_weights, hidden, input, output, lora_input, lora_rank, lora_output"

LAYERS = "  allowed: auto, all, latter-half, or a list such as [0, 1, 2]"
ILLEGAL: dict[str, tuple[Callable[[], Any], str]] = {
    "position": (
        lambda: Site("attention_logit"),  # type: ignore[arg-type]
        f"position: there is no position 'attention_logit'\n  allowed: {POSITIONS}\n"
        "  hint: did you mean 'attention_logits'?",
    ),
    "position far off": (
        lambda: Site("zzz"),  # type: ignore[arg-type]
        f"position: there is no position 'zzz'\n  allowed: {POSITIONS}",
    ),
    "pattern": (
        lambda: Site("hidden", "colum"),  # type: ignore[arg-type]
        "pattern: there is no pattern 'colum'\n  allowed: element, column, span\n  hint: did you mean 'column'?",
    ),
    "schedule": (
        lambda: Site("hidden", schedule="linear"),  # type: ignore[arg-type]
        "schedule: there is no schedule 'linear'\n  allowed: constant, linear_up, linear_down\n"
        "  hint: did you mean 'linear_up'?",
    ),
    "rate of 1": (
        lambda: Site("hidden", rate=1),
        "rate: a dropout rate is a probability\n  found: 1\n  allowed: 0 <= rate < 1",
    ),
    "negative rate": (
        lambda: Site("hidden", rate=-0.1),
        "rate: a dropout rate is a probability\n  found: -0.1\n  allowed: 0 <= rate < 1",
    ),
    "rate not a number": (
        lambda: Site("hidden", rate=float("nan")),
        "rate: a dropout rate is a probability\n  found: nan\n  allowed: 0 <= rate < 1",
    ),
    "rate in words": (
        lambda: Site("hidden", rate="0.1"),  # type: ignore[arg-type]
        "rate: a dropout rate is a probability\n  found: '0.1'\n  allowed: 0 <= rate < 1",
    ),
    "rate true": (
        lambda: Site("hidden", rate=False),
        "rate: a dropout rate is a probability\n  found: False\n  allowed: 0 <= rate < 1",
    ),
    "rate of a method": (
        lambda: METHODS["dropkey"].with_rate(1.5),
        "rate: a dropout rate is a probability\n  found: 1.5\n  allowed: 0 <= rate < 1",
    ),
    "features in a span": (
        lambda: Site("lora_rank", "span"),
        "pattern: the features of lora_rank have no order, so a run of them means nothing\n  found: span\n"
        "  allowed: element, column",
    ),
    "start": (
        lambda: Site("hidden", "span", start="attention"),  # type: ignore[arg-type]
        "start: there is no start 'attention'\n  allowed: uniform, attended",
    ),
    "an attended start of elements": (
        lambda: Site("hidden", start="attended"),
        "start: only a span of hidden tokens begins at an attended one\n  found: attended, for hidden/element\n"
        "  allowed: uniform",
    ),
    "an attended start of keys": (
        lambda: Site("attention_logits", "span", start="attended"),
        "start: only a span of hidden tokens begins at an attended one\n  found: attended, for attention_logits/span\n"
        "  allowed: uniform",
    ),
    "logits rescaled": (
        lambda: Site("attention_logits", rescale="inverse_keep"),
        "rescale: attention_logits cannot be rescaled this way\n  found: inverse_keep\n  allowed: none",
    ),
    "hidden normalised": (
        lambda: Site("hidden", rescale="normalised"),
        "rescale: hidden cannot be rescaled this way\n  found: normalised\n  allowed: none, inverse_keep",
    ),
    "lora_rank normalised": (
        lambda: Site("lora_rank", rescale="normalised"),
        "rescale: lora_rank cannot be rescaled this way\n  found: normalised\n  allowed: inverse_keep, none",
    ),
    "unknown rescale": (
        lambda: Site("attention_weights", rescale="softmax"),  # type: ignore[arg-type]
        "rescale: attention_weights cannot be rescaled this way\n  found: softmax\n"
        "  allowed: normalised, normalised_with_gradient, inverse_keep, none",
    ),
    "layers in words": (
        lambda: Site("hidden", layers="later-half"),
        "layers: there is no layers 'later-half'\n  allowed: auto, all, latter-half\n"
        "  hint: did you mean 'latter-half'?",
    ),
    "negative layer": (
        lambda: Site("hidden", layers=[0, -1]),
        "layers: layers are different whole numbers from 0\n  found: [0, -1]\n" + LAYERS,
    ),
    "half a layer": (
        lambda: Site("hidden", layers=[1.5]),  # type: ignore[list-item]
        "layers: layers are different whole numbers from 0\n  found: [1.5]\n" + LAYERS,
    ),
    "layer true": (
        lambda: Site("hidden", layers=[True]),
        "layers: layers are different whole numbers from 0\n  found: [True]\n" + LAYERS,
    ),
    "no layer": (
        lambda: Site("hidden", layers=[]),
        "layers: layers are different whole numbers from 0\n  found: []\n" + LAYERS,
    ),
    "a layer twice": (
        lambda: Site("hidden", layers=[1, 2, 1]),
        "layers: layers are different whole numbers from 0\n  found: [1, 2, 1]\n" + LAYERS,
    ),
    "kind": (
        lambda: Consistency("KL"),  # type: ignore[arg-type]
        "kind: there is no kind 'KL'\n  allowed: kl, js, js_symmetric",
    ),
    "gradient": (
        lambda: Consistency(gradient="two"),  # type: ignore[arg-type]
        "gradient: there is no gradient 'two'\n  allowed: one, both",
    ),
    "negative weight": (lambda: Consistency(weight=-1), "weight: weight is a number from 0\n  found: -1"),
    "infinite weight": (lambda: Consistency(weight=float("inf")), "weight: weight is a number from 0\n  found: inf"),
    "weight not a number": (
        lambda: Consistency(weight=float("nan")),
        "weight: weight is a number from 0\n  found: nan",
    ),
    "weight of a method": (
        lambda: METHODS["hiddenkey"].with_weight(-2),
        "weight: weight is a number from 0\n  found: -2",
    ),
    "two attention sites": (
        lambda: Method([Site("attention_logits"), Site("hidden"), Site("attention_weights")]),
        "sites: one attention site at a time: DropKey and DropAttention of one mask are the same forward "
        "(paper Eq. 13)\n  found: attention_logits, attention_weights",
    ),
    "one attention site twice": (
        lambda: Method([Site("attention_logits", layers=[0]), Site("attention_logits", layers=[1])]),
        "sites: one attention site at a time: DropKey and DropAttention of one mask are the same forward "
        "(paper Eq. 13)\n  found: attention_logits, attention_logits",
    ),
    "name": (
        lambda: find("hiddenkey--"),
        "method: there is no method 'hiddenkey--'\n"
        f"  allowed: {', '.join(METHODS)}\n"
        "  hint: did you mean 'hiddenkey-'?",
    ),
}


@pytest.mark.parametrize("case", ILLEGAL)
def test_the_illegal_is_refused_in_these_words(case: str) -> None:
    make, text = ILLEGAL[case]
    with pytest.raises(MethodError) as caught:
        make()
    assert str(caught.value) == text
    assert caught.value.exit_code == 2
    assert isinstance(caught.value, ValueError)  # for library users who know nothing of hkft's tree


@pytest.mark.parametrize(
    "make",
    [
        lambda: Site("hidden", layers=3),
        lambda: Site("hidden", layers=None),
        lambda: Consistency(weight="1"),
        lambda: find(["dropkey"]),
        lambda: Site(["hidden"]),
    ],
    ids=["layers a number", "layers null", "weight in words", "method a list", "position a list"],
)
def test_a_value_of_the_wrong_type_is_the_users_fault_too(make: Callable[[], Any]) -> None:
    with pytest.raises(MethodError):
        make()


def test_every_other_combination_is_legal() -> None:
    rows = itertools.product(RESCALES, ("element", "column", "span"), ("auto", "all", "latter-half", [0, 2]))
    for position, pattern, layers in rows:
        for rescale in (None, *RESCALES[position]):
            if not position.startswith("lora_") or pattern != "span":
                Site(position, pattern, 0.99, layers, rescale, "linear_up")  # type: ignore[arg-type]


def test_defaults() -> None:
    site = Site("hidden")
    assert site == Site("hidden", "element", None, "auto", "none", "constant", "uniform")
    assert {position: Site(position).rescale for position in RESCALES} == {
        "attention_logits": "none",
        "attention_weights": "normalised",
        "hidden": "none",
        "input": "none",
        "output": "none",
        "lora_input": "inverse_keep",
        "lora_rank": "inverse_keep",
        "lora_output": "inverse_keep",
    }
    assert (Consistency().kind, Consistency().weight, Consistency().gradient) == ("kl", 1.0, "one")
    assert Method() == Method((), None, "custom")


def test_data_is_frozen_and_hashable() -> None:
    for record, field in (
        (Site("hidden", layers=[1]), "rate"),
        (Consistency(), "weight"),
        (METHODS["hiddenkey"], "name"),
    ):
        with pytest.raises(FrozenInstanceError):
            setattr(record, field, 0.5)
        hash(record)


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [
        ("constant", [0.4, 0.4, 0.4, 0.4]),
        ("linear_up", [0.1, 0.2, 0.3, 0.4]),
        ("linear_down", [0.4, 0.3, 0.2, 0.1]),
    ],
)
def test_rate_of_a_layer(schedule: str, rates: list[float]) -> None:
    site = Site("hidden", rate=0.4, schedule=schedule)  # type: ignore[arg-type]
    assert [site.rate_at(index, 4) for index in range(4)] == pytest.approx(rates)
    assert site.rate_at(0, 1) == 0.4


def test_a_site_without_a_rate_drops_a_tenth() -> None:
    assert Site("hidden").rate_at(0, 3) == 0.1
    assert Site("hidden", rate=0).rate_at(0, 3) == 0


def test_named_methods() -> None:
    key, cut = ("attention_logits", "column", "none"), ("hidden", "element", "inverse_keep")
    content = {name: [(s.position, s.pattern, s.rescale) for s in method.sites] for name, method in METHODS.items()}
    assert content == {
        "none": [],
        "lora-dropout": [("lora_input", "element", "inverse_keep")],
        "dropkey": [key],
        "dropattention": [("attention_weights", "column", "normalised")],
        "hiddencut": [cut],
        "hiddenkey-": [key, cut],
        "hiddenkey": [key, cut],
        "hiddencut-span": [("hidden", "span", "none")],
        "r-drop": [("lora_input", "element", "inverse_keep")],
        "lora-matrix-dropout": [("lora_input", "column", "inverse_keep"), ("lora_output", "column", "inverse_keep")],
        "droplora": [("lora_rank", "column", "inverse_keep")],
    }
    assert {name: method.consistency for name, method in METHODS.items() if method.consistency} == {
        "hiddenkey": Consistency("kl", 1.0, "one"),
        "hiddencut-span": Consistency("js_symmetric", 1.0, "both"),
        "r-drop": Consistency("kl", 1.0, "both"),
    }
    assert all(method.name == name and find(name) is method for name, method in METHODS.items())
    assert all(s.rate is None and s.schedule == "constant" for m in METHODS.values() for s in m.sites)
    assert {s.start for s in METHODS["hiddencut-span"].sites} == {"attended"}
    layers = {(s.position.startswith("lora_"), s.layers) for m in METHODS.values() for s in m.sites}
    assert layers == {(True, "all"), (False, "auto")}  # LoRA's own dropouts act wherever there is LoRA
    assert all(method.summary for method in METHODS.values())
    assert len({method.summary for method in METHODS.values()}) == len(METHODS)


def test_passes_and_active() -> None:
    assert {name for name, method in METHODS.items() if method.active} == METHODS.keys() - {"none"}
    assert {name for name, m in METHODS.items() if m.passes == 2} == {"hiddenkey", "hiddencut-span", "r-drop"}
    hiddenkey = METHODS["hiddenkey"]
    assert hiddenkey.with_rate(0).passes == 1  # the term is exactly 0
    assert hiddenkey.with_weight(0).passes == 1
    assert Method(consistency=Consistency()).passes == 2  # R-Drop on dropout of the model's own
    assert Method().passes == 1
    assert Method([Site("hidden", rate=0), Site("input", rate=0.1)], Consistency()).passes == 2


def test_with_rate_fills_only_what_is_open() -> None:
    method = Method([Site("hidden", rate=0.3), Site("input")]).with_rate(0.2)
    assert [site.rate for site in method.sites] == [0.3, 0.2]
    assert method.name == "custom"
    assert METHODS["hiddenkey"].with_rate(0.2).name == "hiddenkey"
    assert METHODS["hiddenkey"].sites[0].rate is None


def test_with_weight_leaves_a_method_without_consistency_alone() -> None:
    assert METHODS["dropkey"].with_weight(3) == METHODS["dropkey"]
    assert METHODS["hiddenkey"].with_weight(3).consistency == Consistency("kl", 3)


@pytest.mark.parametrize(
    "method",
    [
        *METHODS.values(),
        Method(
            [Site("hidden", "span", 0.2, [3, 1], start="attended"), Site("input", "column", schedule="linear_up")],
            Consistency("js", 2, "both"),
        ),
    ],
    ids=lambda m: m.name,
)
def test_as_dict_round_trip(method: Method) -> None:
    import json

    record = json.loads(json.dumps(method.as_dict()))
    sites = [Site(**site) for site in record.pop("sites")]
    consistency = record.pop("consistency")
    assert Method(sites, consistency and Consistency(**consistency), **record) == method


def test_as_dict_content() -> None:
    assert Method([Site("hidden", layers=[1, 2])], Consistency("js")).as_dict() == {
        "sites": [
            {
                "position": "hidden",
                "pattern": "element",
                "rate": None,
                "layers": [1, 2],
                "rescale": "none",
                "schedule": "constant",
                "start": "uniform",
                "protect": "first_key",
            }
        ],
        "consistency": {"kind": "js", "weight": 1.0, "gradient": "one"},
        "name": "custom",
    }


def test_importing_the_methods_imports_neither_torch_nor_transformers() -> None:
    heavy = "{'torch', 'transformers', 'peft', 'numpy'}"
    code = f"import sys, hkft, hkft.dropout.named; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize("pattern", ["element", "column", "span"])
@pytest.mark.parametrize("name", ["dropkey", "dropattention", "hiddencut"])
def test_a_method_of_one_site_has_every_pattern(name, pattern):
    own, found = METHODS[name], find(f"{name}/{pattern}")
    (site,) = found.sites
    assert site == replace(own.sites[0], pattern=pattern)
    assert found.name == (name if own.sites[0].pattern == pattern else f"{name}/{pattern}")
    assert found.consistency == own.consistency


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("hiddenkey/span", "there is no method of one site 'hiddenkey'"),
        ("dropkey/spam", "there is no pattern 'spam'"),
        ("lora-dropout/span", "the features of lora_input have no order"),
        ("dropkey/", "there is no pattern ''"),
        ("/span", "there is no method of one site ''"),
    ],
)
def test_a_pattern_that_is_none_or_of_several_sites(name, said):
    with pytest.raises(MethodError, match=said):
        find(name)
