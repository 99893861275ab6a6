"""What to do about a verdict: every command is one that hkft takes, and changes what it says it changes."""

from __future__ import annotations

import shlex
from dataclasses import replace

import pytest

from hkft.diagnostics.advice import MOST, next_steps
from hkft.diagnostics.verdict import Verdict
from hkft.recipe import Recipe, load

NAMES = ("healthy", "underfitting", "overfitting", "loss-overfitting", "memorising", "unclear")
SETTINGS = (
    (),
    ("dropout.method=none",),
    ("dropout.rate=0.4", "diagnostics.patience=2"),
    ("lora.r=1", "train.max_steps=10", "diagnostics.metric=accuracy", "train.label_smoothing_factor=0.1"),
)


def told(name: str) -> Verdict:
    turn = 126 if "fitting" in name or name == "memorising" else None
    return Verdict(name, turn, "high", "So it is.")  # type: ignore[arg-type]


def changed(recipe: Recipe, command: str) -> dict[str, object]:
    """What a command's --set change in the recipe."""
    words = shlex.split(command)
    settings = [words[n + 1] for n, word in enumerate(words) if word == "--set"]
    assert words[:2] == ["hkft", "train"]
    assert words[2:4] == ["--recipe", "my run/resolved.yaml"]
    before, after = ({key: value for key, value, _ in each.listed()} for each in (recipe, recipe.replace(*settings)))
    return {key: after[key] for key in after if before.get(key) != after[key]}


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_every_command_can_be_typed_and_changes_something(recipe_file, name, settings):
    recipe = load(recipe_file, settings)
    steps = next_steps(told(name), recipe, "my run")
    assert 1 <= len(steps) <= MOST
    assert len({step["command"] for step in steps}) == len(steps)
    for step in steps:
        assert step["why"]
        command = step["command"]
        assert command is not None
        assert "'my run" in command
        if command.startswith("hkft train"):
            assert changed(recipe, command)


@pytest.mark.parametrize("name", NAMES)
def test_a_curve_of_another_tool_gets_reasons_and_no_commands(name):
    steps = next_steps(told(name))
    assert 1 <= len(steps) <= MOST
    assert all(step["why"] and step["command"] is None for step in steps)


@pytest.mark.parametrize(
    ("name", "settings", "expected"),
    [
        ("overfitting", ["dropout.method=none"], {"dropout.method": "hiddenkey"}),
        ("overfitting", ["dropout.rate=0.15"], {"dropout.rate": "0.3"}),
        ("overfitting", ["dropout.rate=0.3"], {"dropout.rate": "0.4"}),
        ("overfitting", [], {"diagnostics.patience": "3"}),
        ("overfitting", ["diagnostics.patience=3"], {"lora.r": "2", "lora.lora_alpha": "4"}),
        ("loss-overfitting", [], {"diagnostics.metric": "accuracy"}),
        ("memorising", [], {"train.num_train_epochs": "1"}),
        ("underfitting", [], {"train.learning_rate": "0.03"}),
        ("underfitting", [], {"dropout.rate": "0.05"}),
        ("unclear", [], {"diagnostics.evals_per_epoch": "8"}),
    ],
)
def test_what_is_changed(recipe_file, name, settings, expected):
    recipe = load(recipe_file, settings)
    commands = [step["command"] for step in next_steps(told(name), recipe, "my run")]
    assert (
        expected.items()
        <= {
            key: value
            for command in commands
            if command and command.startswith("hkft train")
            for key, value in changed(recipe, command).items()
        }.items()
    )


@pytest.mark.parametrize(
    ("name", "cause", "settings", "expected"),
    [
        ("underfitting", "rate", [], {"train.learning_rate": "0.001"}),
        ("underfitting", "still", ["train.learning_rate=1e-8"], {"train.learning_rate": "1.0e-07"}),
        ("unclear", "rate", [], {"train.learning_rate": "0.001"}),
        ("unclear", "rows", [], {"data.validation": "0.5"}),
        ("unclear", "nothing", ["dropout.method=none"], {"dropout.method": "hiddenkey"}),
        ("healthy", "gap", [], {"dropout.rate": "0.2"}),
    ],
)
def test_what_stands_behind_it_is_acted_on(recipe_file, name, cause, settings, expected):
    recipe = load(recipe_file, settings)
    commands = [step["command"] for step in next_steps(replace(told(name), cause=cause), recipe, "my run")]
    found = [changed(recipe, command) for command in commands if command and command.startswith("hkft train")]
    assert any(expected.items() <= each.items() for each in found), found


def test_what_was_best_before_training_is_not_merged(recipe_file):
    steps = next_steps(Verdict("overfitting", 0, "high", "So it is."), load(recipe_file), "r")
    assert not any("merge" in (step["command"] or "") for step in steps)


def test_test_rows_are_asked_where_there_are_any(recipe_file, reviews):
    steps = next_steps(told("healthy"), load(recipe_file, [f"data.test={reviews}"]), "r")
    assert "hkft eval r --split test" in [step["command"] for step in steps]


def test_where_nothing_moved_only_a_much_higher_rate_is_worth_a_run(recipe_file):
    found = replace(told("underfitting"), cause="still")
    assert next_steps(found, load(recipe_file, ["train.learning_rate=1e-8"]), "r") == [
        {
            "why": "the adapter hardly moved: a learning rate ten times as high",
            "command": "hkft train --recipe r/resolved.yaml --set train.learning_rate=1e-07 "
            "--output r-learning_rate-1e-07",
        }
    ]
    assert [step["command"] for step in next_steps(found)] == [None]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_what_a_command_writes_lies_beside_the_run_and_is_named_by_what_it_does(recipe_file, name, settings):
    outputs = []
    for step in next_steps(told(name), load(recipe_file, settings), "runs/my run"):
        words = shlex.split(step["command"] or "")
        if words[1] == "merge":
            assert words[2:] == ["runs/my run", "--output", "runs/my run-merged"]
        elif words[1] == "compare":
            assert words[-2:] == ["--output", "runs/my run-seeds"]
        elif words[1] == "train":
            key, _, value = words[words.index("--set") + 1].partition("=")
            assert words[-2:] == ["--output", f"runs/my run-{key.partition('.')[2]}-{value}"]
        outputs.append(words[-1])
    assert len(set(outputs)) == len(outputs)


@pytest.mark.parametrize("run", [".", "../run", "../run/."])
def test_a_run_without_a_name_of_its_own_has_that_of_its_folder(recipe_file, tmp_path, monkeypatch, run):
    place = tmp_path / "run"
    place.mkdir()
    monkeypatch.chdir(place)
    command = next_steps(told("healthy"), load(recipe_file), run)[0]["command"] or ""
    assert (place / shlex.split(command)[-1]).resolve() == tmp_path / "run-merged"
