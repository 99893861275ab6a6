"""The paper's experiments as recipes: what their heads say, their sections do; and how a name becomes a file."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import pytest

from hkft.comparison import paper
from hkft.dropout.named import find
from hkft.errors import RecipeError, UsageError
from hkft.recipe import Recipe, catalogue, load
from hkft.recipe.catalogue import choose, copy, describe, shipped

PAPER = [name for name in shipped() if name.startswith("paper/")]
SMALL = [name for name in PAPER if name.startswith("paper/small-")]
TABLE1 = ["rte", "mrpc", "stsb", "sst2", "cola", "qnli"]
PATTERNS = [
    f"{method}/{of}" for method in ("hiddencut", "dropkey", "dropattention") for of in ("element", "column", "span")
]
ALL = [find(name).name for name in ("none", *PATTERNS, "hiddenkey-", "hiddenkey")]  # hiddencut/element is hiddencut
RATES = [0.01, 0.02, 0.05, 0.1, 0.15, 0.2]


def varied(recipe: Recipe, values: dict[str, Any]) -> Recipe:
    """The recipe with a variant's values, as `--set` has them."""
    own = {"dropout.method", "dropout.sites"} & set(values)
    plain = () if own else ("dropout.method=none",)
    return recipe.replace(*plain, *(f"{key}={json.dumps(value)}" for key, value in values.items()))


def runs(recipe: Recipe) -> int:
    """Of the whole comparison: a rate and a weight make no difference to plain LoRA."""
    asked, count = recipe.compare, 0
    for method in asked.methods:
        acting = {key for key in asked.grid if method != "none" or not key.startswith("dropout.")}
        count += prod(len(asked.grid[key]) for key in acting)
    assert isinstance(asked.seeds, int)
    return (count + len(asked.variants)) * asked.seeds


def apart(recipe: Recipe) -> dict[str, Any]:
    """A run's values but for those by which a comparison's run is to differ from that of one training."""
    values = recipe.values()
    values["data"] = {key: value for key, value in values["data"].items() if key not in ("validation", "test")}
    values["diagnostics"] = {key: value for key, value in values["diagnostics"].items() if key != "metric"}
    return values


def test_the_experiments_are_these():
    assert [name.removeprefix("paper/") for name in PAPER] == [
        "ablation",
        "branches",
        "controls",
        "figure4-rates",
        "figure5-ranks",
        "layers",
        "llama2-mrpc",
        "llama2-rte",
        "minilm-stsb",
        "protect",
        "small-ablation",
        "small-branches",
        "small-figure4-rates",
        "small-figure5-ranks",
        "small-layers",
        "small-protect",
        "small-table1",
        *sorted(f"table1-{task}" for task in TABLE1),
        "table2-e2e",
    ]
    assert list(shipped())[-len(PAPER) :] == PAPER


@pytest.mark.parametrize("name", PAPER)
def test_an_experiment_is_what_its_head_says(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = load(name)
    assert load(f"{name}.yaml") == recipe
    assert f"paper/{recipe.name}" == name
    head = [line for line in recipe.source.splitlines() if line.startswith("#")]
    assert head[0] == f"# {name}: {describe(recipe.path)}"
    assert describe(recipe.path)
    assert head[-1] == f"# hkft compare --recipe {name}"
    assert all(len(line) <= 127 for line in head)
    text = " ".join(head)
    assert [int(count) for count in re.findall(r"(\d+) runs[ ,]", text.replace("3 runs, ", ""))] == [runs(recipe)]
    assert name in (*SMALL, "paper/minilm-stsb") or "not run by us" in text.lower()
    for twin in re.findall(r"paper/small-[a-z0-9-]+", text):
        assert twin in PAPER


@pytest.mark.parametrize("name", PAPER)
def test_every_row_of_an_experiment_is_a_run_of_its_own(name):
    recipe = load(name)
    asked = recipe.compare
    rows = [*(recipe.replace(f"dropout.method={method}") for method in asked.methods),
            *(varied(recipe, values) for values in asked.variants.values())]  # fmt: skip
    acting = [(row.method.sites, row.method.consistency, row.lora, row.train, row.diagnostics) for row in rows]
    assert not [row for place, row in enumerate(acting) if row in acting[:place]]
    for key, values in asked.grid.items():
        assert len({recipe.replace(f"{key}={value}").fingerprint() for value in values}) == len(values)
    labels = [*asked.methods, *asked.variants]
    assert len(set(labels)) == len(labels)
    assert asked.baseline is None or asked.baseline in labels
    assert recipe.data.test is not None


@pytest.mark.parametrize("name", [name for name in PAPER if load(name).compare.paper])
def test_the_paper_s_cell_exists_and_has_a_number_for_every_method(name):
    asked = load(name).compare
    assert asked.paper
    lacking = [method for method in asked.methods if paper.value(asked.paper, method) is None]
    assert lacking == (["lora-dropout"] if name == "paper/controls" else [])
    assert not [variant for variant in asked.variants if paper.value(asked.paper, variant) is not None]


def test_experiments_without_a_number_are_the_small_ones_and_the_rank_sweep():
    assert [name for name in PAPER if load(name).compare.paper is None] == [
        "paper/figure5-ranks",
        "paper/minilm-stsb",
        *SMALL,
    ]


@pytest.mark.parametrize("task", TABLE1)
def test_table_1_has_the_settings_of_the_task_s_recipe_and_tests_on_glue_s_validation_set(task):
    recipe, single = load(f"paper/table1-{task}"), load(f"{task}-hiddenkey")
    assert apart(recipe) == apart(single)
    fraction = 0.02 if task in ("sst2", "qnli") else 0.1
    assert (recipe.data.validation, recipe.data.test) == (fraction, single.data.validation)
    asked = recipe.compare
    assert asked.methods == (ALL if task not in ("cola", "qnli") else ["none", "hiddenkey"])
    assert (asked.seeds, asked.paper) == (5, f"table1/{task}")
    assert asked.grid == {"dropout.rate": [*RATES, 0.25, 0.3] if task == "rte" else RATES}
    assert recipe.diagnostics.metric == paper.cell(f"table1/{task}").metric


def test_the_other_tables_have_the_settings_of_their_recipes():
    assert apart(load("paper/llama2-rte")) == apart(load("rte-llama2-7b-hiddenkey"))
    for name in ("table2-e2e", "layers"):
        assert load(f"paper/{name}").values() == load("e2e-gpt2-medium-hiddenkey").values()
    mrpc, train = load("paper/llama2-mrpc"), load("paper/llama2-mrpc").train
    batch = train["per_device_train_batch_size"] * train["gradient_accumulation_steps"]
    assert (train["learning_rate"], train["num_train_epochs"], batch, mrpc.data.max_length) == (5e-4, 8, 32, 512)


@pytest.mark.parametrize("name", ["ablation", "branches", "controls", "figure4-rates", "figure5-ranks"])
def test_what_is_asked_of_rte_is_asked_of_table_1_s_runs(name):
    assert load(f"paper/{name}").values() == load("paper/table1-rte").values()


@pytest.mark.parametrize("name", ["ablation", "branches", "figure4-rates", "figure5-ranks"])
def test_a_small_twin_asks_what_the_experiment_asks(name):
    small, full = (load(f"paper/{prefix}{name}").compare for prefix in ("small-", ""))
    assert (small.methods, small.variants, small.baseline) == (full.methods, full.variants, full.baseline)
    assert list(small.grid) == list(full.grid)
    assert all(set(small.grid[key]) <= set(full.grid[key]) for key in full.grid)


def test_the_small_table_1_has_its_methods_and_the_controls():
    small, table, controls = (load(f"paper/{name}").compare for name in ("small-table1", "table1-rte", "controls"))
    assert {find(method).name for method in small.methods} <= {find(method).name for method in table.methods} | {
        "lora-dropout"
    }
    held = {key for values in small.variants.values() for key in values}
    assert held == {"train.weight_decay", "lora.r", "diagnostics.patience"}
    assert held <= {key for values in controls.variants.values() for key in values}


def test_the_small_experiments_share_their_runs_which_need_no_network():
    first, *others = (load(name) for name in SMALL)
    assert all(other.values() == first.values() for other in others)
    assert first.fingerprint()[:6] == load("paper/small-table1").fingerprint()[:6]
    assert first.model.name.startswith("package:")
    assert first.data.train.startswith("package:")
    assert (first.data.test, first.data.validation) == (0.2, 0.1)


def test_only_the_protective_rule_differs():
    recipe = load("paper/protect")
    for label, values in recipe.compare.variants.items():
        name, _, rule = label.partition(" ")
        like = find(name).with_rate(0.1).sites
        made = varied(recipe, values).method.sites
        expected = {"by row": "row", "unprotected": "none"}[rule]
        assert made == tuple(
            replace(site, protect=expected) if site.position == "attention_logits" else site for site in like
        )


def test_layers_move_and_nothing_else():
    recipe = load("paper/layers")
    named = {"hiddenkey": find("hiddenkey"), "hiddenkey-": find("hiddenkey-")}
    for label, values in recipe.compare.variants.items():
        made, like = varied(recipe, values).method, named[label.partition(" ")[0]].with_rate(0.1)
        assert [(s.position, s.pattern, s.rescale, s.rate) for s in made.sites] == [
            (s.position, s.pattern, s.rescale, s.rate) for s in like.sites
        ]
        assert (made.consistency is None) == (like.consistency is None)
        assert {site.layers for site in made.sites} == {tuple(range(12)) if "first half" in label else "all"}


@pytest.mark.parametrize(
    ("asked", "hint"),
    [
        ("table1-rte", "there is a shipped recipe `paper/table1-rte`"),
        ("recipes/paper/table1-rte.yaml", "there is a shipped recipe `paper/table1-rte`"),
        ("paper/tabel1-rte", "did you mean 'paper/table1-rte'?"),
        ("ablatoin.yaml", "did you mean 'paper/ablation'?"),
        ("elsewhere/quickstart.yaml", "there is a shipped recipe `quickstart`"),
        ("paper/quikstart", "did you mean 'quickstart'?"),
        ("nothing like it", None),
    ],
)
def test_a_name_that_is_none_is_told_the_nearest(asked, hint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeError) as refused:
        load(asked)
    with pytest.raises(UsageError) as unknown:
        choose(asked)
    assert [error.value.problems[0].hint for error in (refused, unknown)] == [hint, hint]


def test_the_recipes_are_found_where_a_wheel_has_them(tmp_path, monkeypatch):
    package = tmp_path / "site-packages" / "hkft"
    shutil.copytree(Path(catalogue.__file__).parents[2] / "recipes", package / "recipes")
    here = shipped()
    monkeypatch.setattr(catalogue, "_PACKAGE", package)
    assert list(shipped()) == list(here)
    assert load("paper/small-table1").path == package / "recipes" / "paper" / "small-table1.yaml"


def test_one_copy_lies_in_the_folder_and_all_in_theirs(tmp_path):
    [one] = copy(choose("paper/ablation").values(), tmp_path / "one")
    assert one == tmp_path / "one" / "ablation.yaml"
    copies = copy(choose(None).values(), tmp_path / "all")
    assert copies == [tmp_path / "all" / f"{name}.yaml" for name in shipped()]
    with pytest.raises(UsageError, match="there already"):
        copy(choose("paper/ablation").values(), tmp_path / "one")


@pytest.mark.parametrize(
    ("line", "title"),
    [
        ("# mine: what it is: all", "what it is: all"),
        ("# folder/mine: what it is", "what it is"),
        ("# yours: what it is", "yours: what it is"),
        ("# what it is", "what it is"),
        ("model: {name: m}", ""),
    ],
)
def test_a_title_is_the_first_line_without_the_name(line, title, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(f"{line}\nseed: 1\n", encoding="utf-8")
    assert describe(path) == title
