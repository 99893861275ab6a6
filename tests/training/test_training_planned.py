"""A plan that is kept: given again while everything is the same, and made anew when anything is not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hkft.errors import DataError
from hkft.events import Notice, Sample, Stage
from hkft.folder import cache_directory, default_folder
from hkft.recipe import Recipe, load
from hkft.training import planned

TOLD = [Notice("2 rows were cut", "warning"), Sample((("a prompt ->", False), (" an answer", True)))]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HKFT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def recipe(tmp_path: Path, tiny_bert: Path, reviews: Path) -> Recipe:
    """A recipe with a model and rows of its own, to be changed."""
    shutil.copytree(tiny_bert, tmp_path / "model")
    shutil.copy(reviews, tmp_path / "rows.csv")
    path = tmp_path / "tiny.yaml"
    path.write_text(
        f"model: {{name: {tmp_path / 'model'}, device: cpu}}\n"
        f"data: {{train: {tmp_path / 'rows.csv'}, validation: 0.25, text: text, label: label}}\n",
        encoding="utf-8",
    )
    return load(path)


class Making:
    """Makes a plan that says how often one was made, and tells TOLD."""

    def __init__(self, meanwhile: Callable[[], Any] = lambda: None) -> None:
        self.times = 0
        self.meanwhile = meanwhile

    def __call__(self, tell: Callable[[Any], None]) -> dict[str, Any]:
        self.times += 1
        for event in (Stage("reading"), *TOLD):
            tell(event)
        self.meanwhile()
        return {"made": self.times, "mean": 27.450000000000003, "labels": ["no", "yes"], "prompts": None}


def asked(recipe: Recipe, make: Making) -> tuple[dict[str, Any], list[Any]]:
    heard: list[Any] = []
    return planned.plan(recipe, heard.append, make), heard


def test_a_kept_plan_is_the_one_that_was_made_with_what_was_told(recipe):
    make = Making()
    first, told = asked(recipe, make)
    again, retold = asked(load(recipe.path), make)
    assert (again, make.times) == (first | {"recipe": "tiny", "output": str(default_folder(recipe))}, 1)
    assert told == [Stage("reading"), *TOLD]
    assert retold == [Stage("as at an earlier check, since which nothing has changed that a plan hangs on"), *TOLD]


def edited(path: Path) -> None:
    """Another letter in the place of one: neither the size nor the number of rows changes."""
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace("great", "groat").replace('"hidden_act": "gelu"', '"hidden_act": "relu"'))
    assert path.read_text(encoding="utf-8") != text


@pytest.mark.parametrize(
    "change",
    [
        lambda recipe, patch: edited(Path(recipe.data.train)),
        lambda recipe, patch: edited(Path(recipe.model.name) / "config.json"),
        lambda recipe, patch: (Path(recipe.model.name) / "vocab.txt").write_text("a word more"),
        lambda recipe, patch: patch.setattr(planned, "_packages", lambda: ["torch-99.0.dist-info"]),
        lambda recipe, patch: patch.setattr(planned, "FORMAT", planned.FORMAT + 1),
        lambda recipe, patch: patch.setenv("CUDA_VISIBLE_DEVICES", "7"),
        lambda recipe, patch: patch.setattr(planned.sys, "version", "another Python"),
        lambda recipe, patch: recipe.path.write_text(recipe.source + "seed: 5\n"),
    ],
    ids=["rows", "configuration", "file of the model", "packages", "format", "environment", "python", "recipe"],
)
def test_whatever_changes_the_plan_is_made_anew(recipe, monkeypatch, change):
    make = Making()
    asked(recipe, make)
    change(recipe, monkeypatch)
    assert asked(load(recipe.path), make)[0]["made"] == 2


def test_a_value_and_a_file_that_a_value_names_are_parts_of_the_key(recipe, tmp_path):
    make = Making()
    asked(recipe, make)
    other = recipe.replace("dropout.rate=0")
    assert asked(other, make)[0]["made"] == 2
    settings = tmp_path / "accelerator.json"
    named = recipe.replace(f"train.accelerator_config={settings}")
    assert asked(named, make)[0]["made"] == 3
    settings.write_text("{}")
    assert asked(named, make)[0]["made"] == 4
    assert asked(recipe, make)[0]["made"] == 1


@pytest.mark.parametrize(
    "override", ["train.learning_rate=0.004", "dropout.rate=0.3", "dropout.weight=2", "lora.lora_alpha=32"]
)
def test_what_no_plan_hangs_on_is_no_part_of_the_key(recipe, override):
    make = Making()
    asked(recipe, make)
    other = recipe.replace(override)
    recipe.path.write_text(recipe.source + "# a remark\n")
    assert asked(other, make)[0] == {**asked(load(recipe.path), make)[0], "output": str(default_folder(other))}
    assert make.times == 1


@pytest.mark.parametrize("override", ["dropout.weight=0", "lora.r=2", "seed=5", "train.num_train_epochs=4"])
def test_what_a_plan_hangs_on_is(recipe, override):
    make = Making()
    asked(recipe, make)
    assert asked(recipe.replace(override), make)[0]["made"] == 2


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\x00", b"{}", b"0\n{}"], ids=["empty", "bytes", "json", "digest"])
def test_a_damaged_entry_is_made_again(recipe, cache, content):
    make = Making()
    asked(recipe, make)
    (entry,) = (cache / "plans").iterdir()
    whole = entry.read_bytes()
    for damaged in (content, whole[:-5], whole.replace(b"27.45", b"72.45")):
        entry.write_bytes(damaged)
        before = make.times
        asked(recipe, make)
        assert make.times == before + 1
        assert json.loads(entry.read_text().partition("\n")[2])["plan"]["made"] == make.times


def test_where_nothing_can_be_written_a_plan_is_made_every_time(recipe, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the cache's place")
    monkeypatch.setenv("HKFT_CACHE", str(tmp_path / "file"))
    make = Making()
    assert [asked(recipe, make)[0]["made"] for _ in range(2)] == [1, 2]
    assert (tmp_path / "file").read_text() == "in the cache's place"


def test_rows_that_change_while_they_are_read_leave_no_plan(recipe, cache):
    asked(recipe, Making(lambda: edited(Path(recipe.data.train))))
    assert not cache.exists()


def test_an_error_is_not_kept(recipe, cache):
    def fails(tell: Any) -> dict[str, Any]:
        raise DataError("no such column")

    for _ in range(2):
        with pytest.raises(DataError):
            planned.plan(recipe, lambda event: None, fails)
    assert not cache.exists()


@pytest.mark.parametrize("override", ["data.validation=hub:glue/sst2#validation", "model.name=roberta-base"])
def test_what_is_on_the_hub_may_change_there(recipe, cache, override):
    make, named = Making(), recipe.replace(override)
    assert [asked(named, make)[0]["made"] for _ in range(2)] == [1, 2]
    assert not cache.exists()


def test_a_package_in_a_checkout_has_no_version_to_go_by(tmp_path, monkeypatch):
    assert planned._packages()
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").touch()
    monkeypatch.setattr(planned, "find_spec", lambda name: type("Spec", (), {"origin": tmp_path / name / "x.py"}))
    assert planned._packages() is None


def test_the_oldest_plans_go(recipe, cache, monkeypatch):
    monkeypatch.setattr(planned, "MOST", 2)
    for seed in (1, 2, 3, 4):
        asked(recipe.replace(f"seed={seed}"), Making())
    assert len(list((cache / "plans").iterdir())) == 2


def test_the_cache_is_where_the_environment_says(monkeypatch, tmp_path):
    monkeypatch.setenv("HKFT_CACHE", str(tmp_path / "named"))
    assert cache_directory() == tmp_path / "named"
    monkeypatch.delenv("HKFT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_directory() == tmp_path / "hkft"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_directory() == tmp_path / ".cache" / "hkft"
