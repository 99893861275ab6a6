"""Every fault of a recipe has a place, and says what was found, what is allowed and what to do."""

from __future__ import annotations

from pathlib import Path

import pytest

from hkft.dropout.named import METHODS
from hkft.errors import RecipeError
from hkft.recipe import load

BASE = """\
model:
  name: m
data:
  train: a.csv
  text: t
  label: l
"""
SECTIONS = "model, task, data, lora, dropout, train, generation, diagnostics, compare, seed"


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Write a recipe as `r.yaml` in an empty working folder."""
    monkeypatch.chdir(tmp_path)

    def write(text: str | bytes) -> Path:
        Path("r.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
        return Path("r.yaml")

    return write


def refusal(path: Path, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        load(path, overrides)
    return str(caught.value)


# What is appended to BASE -> the whole message.
WHOLE = {
    "dropout: {rte: 0.1}\n": (
        "r.yaml:7:11: there is no key 'rte' in dropout\n"
        "  allowed: method, rate, weight, gradient, sites, consistency\n"
        "  hint: did you mean 'rate'?"
    ),
    "learning_rate: 1e-4\n": (
        "r.yaml:7:1: there is no key 'learning_rate' at the top level\n"
        f"  allowed: {SECTIONS}\n"
        "  hint: `learning_rate` belongs to the section `train`"
    ),
    "dropout:\n  rate: 1.5\n": (
        "r.yaml:8:9: dropout.rate: a dropout rate is a probability\n  found: 1.5\n  allowed: 0 <= rate < 1"
    ),
    "dropout: {method: hidenkey}\n": (
        "r.yaml:7:19: dropout.method: there is no method 'hidenkey'\n"
        "  found: 'hidenkey'\n"
        f"  allowed: {', '.join(METHODS)}\n"
        "  hint: did you mean 'hiddenkey'?"
    ),
    "seed: 1\nseed: 2\n": ("r.yaml:8:1: seed is given twice\n  hint: the first is at r.yaml:7:1; keep one of them"),
    "train:\n  learning_rat: 1\n": (
        "r.yaml:8:3: there is no key 'learning_rat' in train: transformers.TrainingArguments has no such field\n"
        "  hint: did you mean 'learning_rate'?"
    ),
    "train: {learning_rate: '1e-4'}\n": (
        "r.yaml:7:24: train.learning_rate: not a value of this field\n"
        "  found: '1e-4'\n"
        "  allowed: a number\n"
        "  hint: remove the quotes"
    ),
    "train: {output_dir: x}\n": (
        "r.yaml:7:9: train.output_dir is not set in a recipe\n  hint: use `hkft train --output`"
    ),
    "lora: {task_type: SEQ_CLS}\n": (
        "r.yaml:7:8: lora.task_type is not set in a recipe\n  hint: hkft sets it from `task`"
    ),
    "lora:\n  bias: al\n": (
        "r.yaml:8:9: lora.bias: not one of its values\n"
        "  found: 'al'\n"
        "  allowed: none, all, lora_only\n"
        "  hint: did you mean 'all'?"
    ),
    "dropout:\n  sites:\n  - position: hidden\n    rescale: normalised\n": (
        "r.yaml:10:14: dropout.sites.0.rescale: hidden cannot be rescaled this way\n"
        "  found: normalised\n"
        "  allowed: none, inverse_keep"
    ),
    "task: generatio\n": (
        "r.yaml:7:7: task: not one of its values\n"
        "  found: 'generatio'\n"
        "  allowed: classification, regression, generation\n"
        "  hint: did you mean 'generation'?"
    ),
    "seed: .nan\n": "r.yaml:7:7: not a value that can be read as float\n  found: '.nan'",
}


@pytest.mark.parametrize(("added", "message"), WHOLE.items())
def test_the_whole_message(recipe, added, message):
    assert refusal(recipe(BASE + added)) == message


# What is appended to BASE -> where, and a part of what is said there.
LOCATED = [
    ("dropout: {weight: -1}\n", "r.yaml:7:19", "allowed: 0 or more"),
    ("dropout: {weight: .inf}\n", "r.yaml:7:19", "not a finite number"),
    ("dropout: {gradient: two}\n", "r.yaml:7:21", "allowed: one, both"),
    ("dropout: {rate: true}\n", "r.yaml:7:17", "found: True"),
    ("dropout: {method: hiddenkey, sites: []}\n", "r.yaml:7:19", "exclude each other"),
    ("dropout: {method: custom}\n", "r.yaml:7:19", "needs its sites"),
    ("dropout: {method: dropkey, consistency: {kind: kl}}\n", "r.yaml:7:41", "`hkft methods dropkey`"),
    ("dropout: {sites: [{position: hiden}]}\n", "r.yaml:7:30", "did you mean 'hidden'?"),
    ("dropout: {sites: [{pattern: span}]}\n", "r.yaml:7:19", "dropout.sites.0.position is required"),
    ("dropout: {sites: [{position: hidden, layer: all}]}\n", "r.yaml:7:38", "did you mean 'layers'?"),
    ("dropout: {sites: [{position: hidden, layers: 3}]}\n", "r.yaml:7:46", "latter-half"),
    ("dropout: {sites: [{position: hidden, layers: [-1]}]}\n", "r.yaml:7:46", "whole numbers from 0"),
    ("dropout: {sites: [{position: hidden, rate: 1}]}\n", "r.yaml:7:44", "0 <= rate < 1"),
    ("dropout: {sites: [{position: lora_input, pattern: span}]}\n", "r.yaml:7:51", "have no order"),
    (
        "dropout:\n  sites: [{position: attention_logits}, {position: attention_weights}]\n",
        "r.yaml:8:10",
        "one attention",
    ),
    ("dropout: {sites: [], consistency: {kind: l2}}\n", "r.yaml:7:42", "allowed: kl, js, js_symmetric"),
    ("dropout: 3\n", "r.yaml:7:10", "not a section"),
    ("lora: []\n", "r.yaml:7:7", "not a section"),
    ("seed: true\n", "r.yaml:7:7", "not a whole number"),
    ("seed: -1\n", "r.yaml:7:7", "0 or more"),
    ("seed: 4294967296\n", "r.yaml:7:7", "below 4,294,967,296"),
    ("seed: '1'\n", "r.yaml:7:7", "remove the quotes"),
    ("diagnostics: {evals_per_epoch: 1.5}\n", "r.yaml:7:32", "not a whole number"),
    ("diagnostics: {probe_size: 1}\n", "r.yaml:7:27", "2 or more"),
    ("diagnostics: {patience: 0}\n", "r.yaml:7:25", "1 or more"),
    ("modell: {}\n", "r.yaml:7:1", "did you mean 'model'?"),
    ("<<: {seed: 1}\n", "r.yaml:7:1", "there is no key '<<'"),
    ("? [a]\n: 1\n", "r.yaml:7:3", "a key is a single word or text"),
    ("seed: !!python/object/apply:os.system [x]\n", "r.yaml:7:7", "found: !!python/object/apply:os.system"),
    ("seed: !own 1\n", "r.yaml:7:7", "found: !own"),
    ("seed: !!int x\n", "r.yaml:7:7", "not a value that can be read as int"),
    (f"seed: {'1' * 5000}\n", "r.yaml:7:7", "not a value that can be read as int"),
    ("train: {seed: 3}\n", "r.yaml:7:9", "use `seed`"),
    ("train: {eval_steps: 3}\n", "r.yaml:7:9", "diagnostics.evals_per_epoch"),
    ("train: {warmup_ratio: 0.1}\n", "r.yaml:7:9", "warmup_steps"),
    ("train: {lr: 0.1}\n", "r.yaml:7:9", "did you mean `learning_rate`?"),
    ("train: {max_length: 3}\n", "r.yaml:7:9", "`max_length` belongs to the section `data`"),
    ("train: {num_train_epochs: null}\n", "r.yaml:7:27", "allowed: a number"),
    ("train: {max_steps: 1.5}\n", "r.yaml:7:20", "allowed: a whole number"),
    ("train: {bf16: maybe}\n", "r.yaml:7:15", "allowed: true or false"),
    ("train: {bf16: 1}\n", "r.yaml:7:15", "allowed: true or false"),
    ("train: {per_device_train_batch_size: 0}\n", "r.yaml:7:38", "1 or more"),
    ("train: {train_sampling_strategy: group_by_lenth}\n", "r.yaml:7:34", "did you mean 'group_by_length'?"),
    ("lora: {rank: 1}\n", "r.yaml:7:8", "did you mean `r`?"),
    ("lora: {r: 0}\n", "r.yaml:7:11", "1 or more"),
    ("lora: {r: eight}\n", "r.yaml:7:11", "allowed: a whole number"),
    ("lora: {lora_dropout: 1.5}\n", "r.yaml:7:22", "0 <= rate < 1"),
    ("lora: {base_model_name_or_path: x}\n", "r.yaml:7:8", "use `model.name`"),
    ("task: generation\n", "r.yaml:3:1", "data.prompt and data.completion, or data.messages"),
    ("task: generation\n", "r.yaml:5:3", "data.text is not used by task generation"),
]


@pytest.mark.parametrize(("added", "where", "part"), LOCATED)
def test_the_place_and_what_is_said(recipe, added, where, part):
    with pytest.raises(RecipeError) as caught:
        load(recipe(BASE + added))
    assert any(problem.where == where and part in str(problem) for problem in caught.value.problems), str(caught.value)


# A value of `model` or `data` -> what is said of it.
VALUES = [
    ("model.name=1", "put it in quotes"),
    ("model.name=", "found: null"),
    ("model.quantization=16bit", "allowed: none, 8bit, 4bit"),
    ("model.native_dropout=1", "allowed: 0 <= rate < 1, or keep"),
    ("model.device=gpu", "allowed: auto, cpu, cuda, cuda:1, mps"),
    ("data.train=''", "empty"),
    ("data.text=[a, b, c]", "one column, or two"),
    ("data.validation=1", "a fraction of the training rows"),
    ("data.validation=", "validation is always on"),
    ("data.filter=[a]", "{column: value}"),
    ("data.filter={a: {b: 1}}", "column 'a' is compared with values"),
    ("data.max_length=4", "8 or more"),
    ("data.train_rows=0", "1 or more"),
    ("data.sites=1", "`sites` belongs to the section `dropout`"),
    ("dropot.rate=1", "did you mean 'dropout'?"),
    ("data.train.x=1", "data.train is a value, not a section"),
    ("data.label=[a", "a bracket is not closed"),
    ("data.prompt={a}", "put the text in quotes, in a shell inside others"),
    ("data.prompt={a} ->", "put the whole text in quotes"),
]


@pytest.mark.parametrize(("override", "part"), VALUES)
def test_overrides_are_checked_alike(recipe, override, part):
    message = refusal(recipe(BASE), override)
    assert message.startswith(f"--set {override.partition('=')[0]}: ")
    assert part in message


def test_an_override_is_named_once(recipe):
    assert refusal(recipe(BASE), "dropout.rate=2") == (
        "--set dropout.rate: a dropout rate is a probability\n  found: 2\n  allowed: 0 <= rate < 1"
    )


@pytest.mark.parametrize("override", ["seed", "=1", "a..b=1", ""])
def test_an_override_is_an_assignment(recipe, override):
    assert refusal(recipe(BASE), override).endswith(
        f": not an assignment\n  found: {override!r}\n  allowed: section.key=value"
    )


def test_an_override_beyond_a_list(recipe):
    path = recipe(BASE + "dropout: {sites: [{position: hidden}]}\n")
    assert refusal(path, "dropout.sites.1.rate=0.1") == (
        "--set dropout.sites.1.rate: dropout.sites is a list\n  found: 1\n  allowed: a number below 1"
    )


# A whole file that cannot be read -> the whole message.
UNREADABLE = {
    "model:\n\tname: a\n": (
        "r.yaml:2:1: a tab stands here, and YAML takes spaces only\n  hint: replace the tab by spaces"
    ),
    b"model:\n  name: \xff\n": "r.yaml:2:9: not UTF-8 text\n  found: byte 0xff\n  hint: save the file as UTF-8",
    "model:\n  name: x\n name: y\n": (
        "r.yaml:3:2: this line is indented neither like the one above nor as a part of it\n"
        "  hint: indent the keys of one section equally"
    ),
    "a: 'x\n": "r.yaml:1:4: a quote opens here and is not closed\n  hint: close it with the same sign",
    "a: \x00": "r.yaml:1:4: a control character cannot stand in YAML\n  found: character U+0000",
    "a: *b": "r.yaml:1:4: not valid YAML: found undefined alias 'b'",
    "a: 1\n---\nb: 2\n": (
        "r.yaml:2:1: a second document starts here\n  hint: a recipe is one document: remove the `---`"
    ),
    "a: &a [*a]\n": "r.yaml:1:4: nested too deeply for a recipe\n  allowed: 40 levels",
    "[" * 5000: "r.yaml: nested too deeply for a recipe\n  allowed: 40 levels",
    "a" * 1_000_001: "r.yaml: too large for a recipe\n  found: more than 1 MB\n  allowed: 1 MB",
}


@pytest.mark.parametrize(("text", "message"), UNREADABLE.items(), ids=range(len(UNREADABLE)))
def test_a_file_that_is_no_yaml(recipe, text, message):
    assert refusal(recipe(text)) == message


@pytest.mark.parametrize(("text", "found"), [("", "nothing"), ("# c\n", "nothing"), ("- a\n", "[a]"), ("hi", "'hi'")])
def test_a_file_without_sections(recipe, text, found):
    assert refusal(recipe(text)) == (
        f"r.yaml:1:1: a recipe is a mapping of sections\n  found: {found}\n  allowed: {SECTIONS}\n"
        "  hint: `hkft recipes` lists recipes to start from"
    )


def test_an_alias_bomb_is_not_expanded(recipe):
    rows = "".join(
        f"{new}: &{new} [{', '.join([f'*{old}'] * 10)}]\n" for old, new in ["ab", "bc", "cd", "de", "ef", "fg"]
    )
    message = refusal(recipe("a: &a [1, 1]\n" + rows))
    assert message.endswith("too many values for a recipe, with its aliases expanded\n  allowed: 10,000")


def test_everything_wrong_is_said_at_once_in_the_file_s_order(recipe):
    path = recipe(
        "model: {nme: m}\ndata: {train: a.csv, text: t, label: l}\nlora: {rr: 8}\ndropout: {rate: 2}\n"
        "seed: 1\nseed: 2\n"
    )
    with pytest.raises(RecipeError) as caught:
        load(path, ["train.lr=1", "oops"])
    assert [(problem.where, problem.message) for problem in caught.value.problems] == [
        ("r.yaml:1:1", "model.name is required"),
        ("r.yaml:1:9", "there is no key 'nme' in model"),
        ("r.yaml:3:8", "there is no key 'rr' in lora: peft.LoraConfig has no such field"),
        ("r.yaml:4:17", "dropout.rate: a dropout rate is a probability"),
        ("r.yaml:6:1", "seed is given twice"),
        ("--set", "not an assignment"),
        ("--set train.lr", "there is no key 'lr' in train: transformers.TrainingArguments has no such field"),
    ]


def test_required_keys_are_asked_for_where_their_section_stands(recipe):
    with pytest.raises(RecipeError) as caught:
        load(recipe("seed: 1\ndata:\n  train: a\n"))
    assert {(problem.where, problem.message) for problem in caught.value.problems} == {
        ("r.yaml:1:1", "model.name is required"),
        ("r.yaml:2:1", "data.text is required"),
        ("r.yaml:2:1", "data.label is required"),
    }


def test_a_recipe_that_is_not_there():
    with pytest.raises(RecipeError) as caught:
        load("quickstrat")
    (problem,) = caught.value.problems
    assert problem.message == "there is no recipe 'quickstrat'"
    assert problem.hint == "did you mean 'quickstart'?"


def test_a_folder_is_no_recipe(tmp_path):
    assert refusal(tmp_path) == f"{tmp_path}: this is a folder, not a recipe\n  hint: name the .yaml file in it"
