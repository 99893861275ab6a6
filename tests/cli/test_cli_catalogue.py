"""`hkft methods`, `recipes` and `check`: what they print can be used."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from hkft.dropout.named import METHODS
from hkft.recipe import load
from hkft.recipe.catalogue import shipped

BEFORE = "model: {name: m}\ndata: {train: a.csv, text: t, label: l}\n"


def pasted(section: str) -> Path:
    path = Path("pasted.yaml")
    path.write_text(BEFORE + section, encoding="utf-8")
    return path


def acts(path: Path) -> dict:
    """A recipe's method without its name."""
    return {key: value for key, value in load(path).method.as_dict().items() if key != "name"}


def test_methods_lists_every_method(hkft):
    ran = hkft("methods")
    assert (ran.code, ran.err) == (0, "")
    head, *rows = ran.out.splitlines()
    assert head.split() == ["method", "drops", "loss", "in", "words"]
    assert [row.split()[0] for row in rows] == list(METHODS)


@pytest.mark.parametrize("name", METHODS)
def test_a_method_s_sections_work_in_a_recipe(hkft, name):
    ran = hkft("methods", name)
    assert (ran.code, ran.err) == (0, "")
    headline, short, between, full = ran.out.rstrip("\n").split("\n\n", 3)
    assert headline.startswith(f"{name}: ")
    assert between == "or, in full:"
    assert load(pasted(short)).method.name == name
    by_name, in_full = acts(pasted(short)), acts(pasted(full))
    assert in_full == by_name
    assert len(in_full["sites"]) == len(METHODS[name].sites)
    assert {site["rate"] for site in in_full["sites"]} <= {0.1}


def test_methods_as_json_is_every_record(hkft):
    assert list(hkft("methods", "--json").document) == list(METHODS)
    [(name, record)] = hkft("methods", "dropkey", "--json").document.items()
    assert name == record["name"] == "dropkey"
    assert [(site["position"], site["pattern"]) for site in record["sites"]] == [("attention_logits", "column")]


def test_recipes_lists_what_is_shipped(hkft):
    ran = hkft("recipes")
    assert ran.code == 0
    assert [row.split()[0] for row in ran.out.splitlines()[1:]] == list(shipped())
    listed = hkft("recipes", "--json").document
    assert list(listed) == list(shipped())
    assert all(Path(entry["path"]).is_file() and entry["title"] for entry in listed.values())


@pytest.mark.parametrize("name", ["quickstart", "sst2-hiddenkey.yaml", "paper/small-table1"])
def test_a_recipe_is_printed_as_it_is(hkft, name):
    printed = hkft("recipes", name).out
    assert printed == shipped()[name.removesuffix(".yaml")].read_text(encoding="utf-8")
    assert yaml.safe_load(printed)["model"]["name"]


def test_a_recipe_is_copied_to_be_edited_and_never_overwritten(hkft):
    ran = hkft("recipes", "quickstart", "--copy", "mine/recipes")
    copy = Path("mine/recipes/quickstart.yaml")
    assert (ran.code, ran.out, ran.err) == (0, f"{copy}\n", "")
    assert load(copy) == load("quickstart")
    copy.write_text("edited", encoding="utf-8")
    again = hkft("recipes", "quickstart", "--copy", "mine/recipes")
    assert (again.code, again.out) == (2, "")
    assert again.err == f"error: a file of this name is there already\n  where    {copy}\n"
    everything = hkft("recipes", "--copy", "mine/recipes")  # all or none
    assert everything.code == 2
    assert list(Path("mine/recipes").iterdir()) == [copy]
    assert copy.read_text(encoding="utf-8") == "edited"


def test_all_recipes_are_copied_and_still_one_document(hkft):
    ran = hkft("recipes", "--copy", "mine", "--json")
    assert ran.code == 0
    copies = {path.relative_to("mine").with_suffix("").as_posix() for path in Path("mine").rglob("*.yaml")}
    assert copies == set(ran.document)
    assert {"quickstart", "paper/small-table1"} <= copies
    assert len(ran.err.splitlines()) == len(ran.document)


def test_check_plans_and_writes_nothing(hkft, tiny):
    rows = Path("reviews.csv").read_text(encoding="utf-8").splitlines()
    Path("validation.csv").write_text("\n".join([*rows[:6], *rows[1:4], "a new one,b,positive,3"]) + "\n")
    before = sorted(Path().rglob("*"))
    args = ("check", "--recipe", tiny, "--set", "data.validation=validation.csv")
    ran = hkft(*args)
    assert ran.code == 0
    title, *lines = ran.out.splitlines()
    assert title == "tiny"
    table = dict(re.split("  +", line, maxsplit=1) for line in lines[1:])
    assert table["method"] == "hiddenkey, 2 forward passes a step"
    assert table["rows"] == "160 to train on, 9 to validate, 9 probed"
    assert table["labels"] == "negative, positive"
    assert table["in both sets"] == "8 validation rows"
    assert table["steps"] == "20 (10 an epoch)"
    assert re.match(r"5, roughly \d+% of the time", table["evaluations"])
    assert table["parameters"].startswith("1,090 of 22,500 trained")
    assert Path(table["run folder"]).match("runs/tiny-hiddenkey-s1-??????")
    plan = hkft(*args, "--json").document
    assert plan["rows"] == {"train": 160, "validation": 9, "train_probe": 9}
    assert (plan["steps"], plan["steps_per_epoch"], plan["duplicates"]) == (20, 10, 8)
    assert plan["output"] == table["run folder"]
    assert sorted(Path().rglob("*")) == before


def test_check_s_plan_is_what_training_does(hkft, tiny):
    plan = hkft("check", "--recipe", tiny, "--json").document
    done = hkft("train", "--recipe", tiny, "--json").document
    assert done["run"] == plan["output"]
    assert done["steps"] == plan["steps"]
    assert done["trainable_parameters"] == plan["parameters"]["trainable"]
    looks = [line for line in (Path(done["run"]) / "metrics.jsonl").open(encoding="utf-8") if '"event": "eval"' in line]
    assert len(looks) == plan["evaluations"]


def test_check_says_how_long_a_run_takes_only_after_a_probe(hkft, tiny, monkeypatch):
    monkeypatch.setattr("hkft.training.rehearsal.ENOUGH", 0.0)
    before = sorted(Path().rglob("*"))
    document = hkft("check", "--recipe", tiny, "--probe", "--json").document
    assert set(document["probe"]) == {"seconds", "steps_made", "peak_memory_bytes"}
    assert set(document["probe"]["seconds"]) == {"training", "looking", "total"}
    assert set(document["memory_bytes"]) == {
        "peak", "libraries", "weights", "adapter", "optimizer", "training", "looking"
    }  # fmt: skip
    assert hkft("check", "--recipe", tiny, "--json").document["probe"] is None
    lines = hkft("check", "--recipe", tiny, "--probe").out.splitlines()
    assert any(re.match(r"time +about \d+:\d\d, of it \d+:\d\d for evaluations", line) for line in lines)
    assert any(
        line.startswith("time") and "--probe" in line for line in hkft("check", "--recipe", tiny).out.splitlines()
    )
    assert sorted(Path().rglob("*")) == before


def test_check_shows_a_decoder_s_example_and_refuses_an_encoder(hkft, generation_file, tiny_bert):
    ran = hkft("check", "--recipe", generation_file)
    assert ran.code == 0
    assert "->[[ " in ran.err
    document = hkft("check", "--recipe", generation_file, "--json").document
    pieces = document["example"]
    rows, prompts = document["rows"], document["prompts"]
    assert [rows[name] / count for name, count in prompts.items()] == [3.0, 3.0, 3.0]  # texts of each prompt
    assert [piece["learned"] for piece in pieces] == [False, True]
    assert pieces[1]["text"].endswith("</s>")
    refused = hkft("check", "--recipe", generation_file, "--set", f"model.name={tiny_bert}")
    assert refused.code == 4
    assert "bert is no causal language model" in refused.err
