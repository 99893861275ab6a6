"""The cache: by content, whole or not at all, safe under several runs, and never in the way."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from hkft.data import cache, encoding, sources, splits
from hkft.data.tokenise import tokenise
from hkft.errors import DataError
from hkft.events import Stage
from hkft.folder import cache_directory
from hkft.recipe.schema import Data

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "good", "film", "bad", "one"]


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HKFT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def tokenizer(words: list[str] = WORDS, **more) -> PreTrainedTokenizerFast:
    core = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "model_max_length": 64, **more}
    return PreTrainedTokenizerFast(tokenizer_object=core, **names)


def rows(*texts: str) -> datasets.Dataset:
    columns = {"id": range(len(texts)), "text": texts, "label": [n % 2 for n in range(len(texts))]}
    return datasets.Dataset.from_dict(columns)


ROWS = ("a good film", "bad", "a " * 30)


def kept(given, words, tell, longest=16, name="train"):
    return tokenise(given, words, longest, tell, name, splits.fingerprint(given))


def entries(place: Path) -> list[Path]:
    return sorted(place.iterdir()) if place.exists() else []


def tokenised(tell) -> int:
    """Rows that were tokenised, by the stages told."""
    return sum(isinstance(event, Stage) and event.text.startswith("tokenising") for event in tell)


# --- a second start ---------------------------------------------------------------------------------------------------


def test_the_same_content_is_tokenised_once_and_said_again(tell, place):
    given, words = rows(*ROWS), tokenizer()
    plain = tokenise(given, words, 16, lambda event: None, "train")
    first = kept(given, words, tell)
    assert (tokenised(tell), len(tell.notices)) == (1, 1)
    said = tell.notices
    tell.clear()
    second = kept(rows(*ROWS), tokenizer(), tell)
    assert (tokenised(tell), tell.notices) == (0, said)
    assert first.to_dict() == second.to_dict() == plain.to_dict()
    assert first.features == second.features == plain.features
    assert second.cache_files and not plain.cache_files  # memory-mapped
    assert len(entries(place)) == 1


def test_without_a_fingerprint_nothing_is_written(tell, place):
    tokenise(rows(*ROWS), tokenizer(), 16, tell)
    assert not place.exists()


def test_the_name_of_a_set_is_no_part_of_its_content(tell, place):
    kept(rows(*ROWS), tokenizer(), tell)
    kept(rows(*ROWS), tokenizer(), tell, name="test")
    assert len(entries(place)) == 1
    assert tell.notices[1].startswith("1 of 3 test (33.3%) are longer")


def test_each_ingredient_is_another_key(monkeypatch):
    given = splits.fingerprint(rows(*ROWS))
    lower = tokenizer()
    lower.backend_tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    added = tokenizer()
    added.add_tokens(["new"])
    keys = [
        encoding.key_of(given, tokenizer(), 16),
        encoding.key_of(splits.fingerprint(rows("a", *ROWS[1:])), tokenizer(), 16),
        encoding.key_of(splits.fingerprint(rows(*ROWS).remove_columns("label")), tokenizer(), 16),
        encoding.key_of(given, tokenizer(), 15),
        encoding.key_of(given, tokenizer([*WORDS, "two"]), 16),
        encoding.key_of(given, tokenizer([*WORDS[:-2], *WORDS[:-3:-1]]), 16),
        encoding.key_of(given, lower, 16),
        encoding.key_of(given, added, 16),
        encoding.key_of(given, tokenizer(pad_token="a"), 16),
        encoding.key_of(given, tokenizer(eos_token="[SEP]"), 16),
        encoding.key_of(given, tokenizer(model_max_length=8), 16),
        encoding.key_of(given, tokenizer(padding_side="left"), 16),
        encoding.key_of(given, tokenizer(truncation_side="left"), 16),
        encoding.key_of(given, tokenizer(model_input_names=["input_ids"]), 16),
        encoding.key_of(given, tokenizer(chat_template="{{ messages }}"), 16),
    ]
    for module, name in (("transformers", "__version__"), ("tokenizers", "__version__")):
        with monkeypatch.context() as patch:
            patch.setattr(getattr(encoding, module), name, "0")
            keys.append(encoding.key_of(given, tokenizer(), 16))
    with monkeypatch.context() as patch:
        patch.setattr(cache, "FORMAT", 0)
        keys.append(encoding.key_of(given, tokenizer(), 16))
    assert [key for key, count in Counter(keys).items() if count > 1] == []


def test_a_key_is_the_same_wherever_the_tokenizer_lies_and_whatever_it_did(tmp_path):
    one = tokenizer()
    one.save_pretrained(tmp_path / "one")
    one.save_pretrained(tmp_path / "two")
    apart = [PreTrainedTokenizerFast.from_pretrained(tmp_path / name) for name in ("one", "two")]
    before = [encoding.key_of("", words, 16) for words in apart]
    apart[0](["a good film"], truncation=True, max_length=4, padding="max_length")
    assert len({*before, encoding.key_of("", apart[0], 16)}) == 1


def test_a_tokenizer_in_python_is_known_by_its_files(tmp_path):
    from transformers import ByT5Tokenizer

    one, other = ByT5Tokenizer(), ByT5Tokenizer(extra_ids=7)
    assert not one.is_fast
    assert encoding.key_of("", one, 16) == encoding.key_of("", ByT5Tokenizer(), 16) != encoding.key_of("", other, 16)


# --- entries that are not as they were written ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "damage",
    [
        lambda entry: (entry / "rows.arrow").write_bytes((entry / "rows.arrow").read_bytes()[:-100]),
        lambda entry: (entry / "rows.arrow").write_bytes((entry / "rows.arrow").read_bytes().replace(b"\5", b"\6", 1)),
        lambda entry: (entry / "rows.arrow").write_bytes(b""),
        lambda entry: (entry / "rows.arrow").unlink(),
        lambda entry: (entry / "entry.json").unlink(),
        lambda entry: (entry / "entry.json").write_text('{"files": {}}'),
        lambda entry: (entry / "entry.json").write_text('{"fil'),
        lambda entry: (entry / "entry.json").write_text("[]"),
    ],
)
def test_a_damaged_entry_is_made_anew(tell, place, damage):
    given, words = rows(*ROWS), tokenizer()
    expected = kept(given, words, tell).to_dict()
    damage(entries(place)[0])
    tell.clear()
    assert kept(given, words, tell).to_dict() == expected
    assert tokenised(tell) == 1
    tell.clear()
    assert kept(given, words, tell).to_dict() == expected
    assert tokenised(tell) == 0
    assert len(entries(place)) == 1


@pytest.mark.parametrize("make", ["no folder", "full"])
def test_a_cache_that_cannot_be_written_only_costs_the_cache(tell, place, monkeypatch, make):
    if make == "no folder":
        place.write_text("a file in its place")
        reason = "File exists"
    else:
        monkeypatch.setattr(cache, "_described", lambda path: (_ for _ in ()).throw(OSError(28, "No space left")))
        reason = "No space left"
    got = kept(rows(*ROWS), tokenizer(), tell)
    assert got["id"][:] == [0, 1, 2]
    assert tell.notices[0] == f"the cache {place} cannot be written ({reason}): the rows are held in memory"
    assert place.is_file() or entries(place) == []


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_cache_is_read(tell, place):
    kept(rows(*ROWS), tokenizer(), tell)
    place.chmod(0o500)
    try:
        kept(rows(*ROWS), tokenizer(), tell)
        assert not any("cannot be written" in notice for notice in tell.notices)
        kept(rows("a"), tokenizer(), tell)
        assert any("cannot be written (Permission denied)" in notice for notice in tell.notices)
    finally:
        place.chmod(0o700)


def test_an_error_of_the_data_leaves_nothing(tell, place):
    def refuse(file):
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        cache.kept("name", refuse, tell)
    assert entries(place) == []


# --- several processes ------------------------------------------------------------------------------------------------

PROGRAM = """
import sys, time
from pathlib import Path
import datasets
from hkft.data import cache

def make(file):
    print("making", flush=True)
    data = datasets.Dataset.from_dict({"n": range(1000)})
    found = data.map(lambda row: {"n": row["n"] + 1}, cache_file_name=str(file), load_from_cache_file=False)
    time.sleep(float(sys.argv[1]))
    return found

datasets.disable_progress_bars()
print(sum(cache.kept("a" * 64, make, print)["n"]), flush=True)
"""


def start(seconds: float) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", PROGRAM, str(seconds)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_two_processes_at_once_have_the_same_rows(place):
    both = [start(1.0), start(1.0)]
    assert [one.communicate()[0].splitlines()[-1] for one in both] == ["500500"] * 2
    assert [entry.name for entry in entries(place)] == ["a" * 64]


def test_a_killed_process_leaves_nothing_that_is_read(place, tell):
    killed = start(60)
    assert killed.stdout is not None and killed.stdout.readline() == "making\n"
    deadline = time.monotonic() + 60
    while not any((entry / "rows.arrow").exists() for entry in entries(place)) and time.monotonic() < deadline:
        time.sleep(0.05)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    (left,) = entries(place)
    assert left.name.endswith(cache.PARTIAL)
    assert start(0).communicate()[0] == "making\n500500\n"
    assert start(0).communicate()[0] == "500500\n"
    old = time.time() - 2 * cache.ABANDONED
    for path in (*left.iterdir(), left):
        os.utime(path, (old, old))
    cache.prune()
    assert [entry.name for entry in entries(place)] == ["a" * 64]


def test_many_rows_are_encoded_by_several_processes(tell, place, monkeypatch):
    monkeypatch.setattr(encoding, "_processes", lambda rows: 2)
    given, words, environ = rows(*ROWS * 700), tokenizer(), os.environ
    features = datasets.Features({"n": datasets.Value("int64")})

    def measured(batch):
        return {"n": [len(text) for text in batch["text"]]}

    got = encoding.encoded(given, measured, features, tell, "train", key="b" * 64, slow=True)
    assert got["n"][:] == [len(text) for text in given["text"]]
    assert got.column_names == ["n"]
    assert [path.name for path in sorted(entries(place)[0].glob("*.arrow"))] == [
        "rows_00000_of_00002.arrow",
        "rows_00001_of_00002.arrow",
    ]
    assert words.is_fast and encoding._processes(10) == 2
    assert os.environ is environ  # and not the copy that `datasets` puts in its place


# --- its size ---------------------------------------------------------------------------------------------------------


def test_what_was_not_used_for_longest_goes_first(tell, place):
    given = [rows("a", str(n)) for n in range(3)]
    for one in given:
        kept(one, tokenizer(), tell)
    for age, one in enumerate(given):
        entry = place / encoding.key_of(splits.fingerprint(one), tokenizer(), 16)
        os.utime(entry / "entry.json", (1000 - age, 1000 - age))
    used = kept(given[2], tokenizer(), tell)  # the oldest, used again
    size = sum(path.stat().st_size for entry in entries(place) for path in entry.iterdir())
    cache.prune(most=size - 1)
    left = {entry.name for entry in entries(place)}
    assert left == {encoding.key_of(splits.fingerprint(one), tokenizer(), 16) for one in (given[0], given[2])}
    cache.prune(most=0)
    assert entries(place) == []
    assert used["id"][:] == [0, 1]  # whoever has it open reads on
    cache.prune(place / "kept", most=0)


def test_the_place_is_the_users_own(monkeypatch, tmp_path):
    assert cache_directory() == tmp_path / "cache"
    monkeypatch.delenv("HKFT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_directory() == tmp_path / "hkft"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert cache_directory() == tmp_path / ".cache" / "hkft"


def test_an_entry_says_what_it_is(tell, place):
    kept(rows(*ROWS), tokenizer(), tell)
    (entry,) = entries(place)
    assert json.loads((entry / "entry.json").read_text())["files"]["rows.arrow"][0] > 0


# --- rows as they are drawn, and other facts --------------------------------------------------------------------------


@pytest.fixture
def large(monkeypatch, write) -> str:
    """A file that counts as large, with two rows to leave out, a repeat, and a class of one row."""
    for module in (sources, splits):
        monkeypatch.setattr(module, "LARGE", -1)
    lines = [f"text {n},{'ab'[n % 2]}\n" for n in range(40)]
    return write("rows.csv", "text,label\n" + "".join(lines) + "text 1,none\n,a\nthe end,\n")


def test_what_is_drawn_of_large_data_is_drawn_once_and_said_again(large, recipe, tell, place, monkeypatch):
    first = splits.load(recipe(train=large), tell)
    said = tell.notices
    assert len(said) == 3
    tell.clear()
    with monkeypatch.context() as patch:
        patch.setattr(splits, "canonical", None)
        second = splits.load(recipe(train=large), tell)
    assert tell.notices == said
    assert len(entries(place)) == 2  # the file, and what was drawn of it
    for name in ("labels", "fingerprints", "duplicates"):
        assert getattr(first, name) == getattr(second, name)
    assert first.train is not None and second.train is not None and second.validation is not None
    assert second.train.to_dict() == first.train.to_dict() and second.train.features == first.train.features
    assert first.test is second.test is None
    monkeypatch.setattr(splits, "LARGE", 2**30)
    small = splits.load(recipe(train=large), tell)
    assert small.train is not None and small.validation is not None
    assert small.train.to_dict() == second.train.to_dict()
    assert small.validation.to_dict() == second.validation.to_dict()
    assert (small.fingerprints, small.labels) == (second.fingerprints, second.labels)


def test_regression_has_no_labels_in_the_cache_either(monkeypatch, write, recipe, tell):
    for module in (sources, splits):
        monkeypatch.setattr(module, "LARGE", -1)
    path = write("scores.csv", "text,label\n" + "".join(f"text {n},{n / 7}\n" for n in range(30)))
    first, second = (splits.load(recipe("regression", train=path), tell) for _ in range(2))
    assert first.labels is second.labels is None
    assert first.train is not None and second.train is not None
    assert first.train["label"][:] == second.train["label"][:]


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 2},
        {"validation": 0.3},
        {"test": 0.1},
        {"filter": {"label": ["a", "b"]}},
        {"train_rows": 20},
        {"validation_rows": 3},
        {"text": ["text", "label"]},
    ],
)
def test_what_is_drawn_depends_on_the_recipe(large, recipe, tell, place, change):
    splits.load(recipe(train=large), tell)
    splits.load(recipe(train=large, **change), tell)
    assert len(entries(place)) == 3


def test_what_is_drawn_depends_on_the_rows_the_splits_and_the_labels(large, recipe, tell, place):
    splits.load(recipe(train=large), tell)
    splits.load(recipe(train=large), tell, ("train",))
    splits.load(recipe(train=large), tell, ("train",), ("none", "b", "a"))
    Path(large).write_text(Path(large).read_text() + "one more,a\n")
    splits.load(recipe(train=large), tell)
    assert len(entries(place)) == 6  # two files, four times drawn


def test_every_key_of_data_that_rows_depend_on_is_in_the_key_of_what_is_drawn():
    assert set(Data.model_fields) - set(splits.READ) == {"max_length", "padding_free"}


def test_large_data_is_drawn_where_the_cache_cannot_be_written(large, recipe, tell, place):
    place.write_text("a file in its place")
    got = splits.load(recipe(train=large), tell)
    assert got.train is not None and got.validation is not None
    assert len(got.train) + len(got.validation) == 41
    assert tell.notices[0].startswith(f"the cache {place} cannot be written")


def test_an_error_of_large_data_is_told_every_time_and_leaves_nothing_drawn(large, recipe, tell, place):
    for _ in range(2):
        with pytest.raises(DataError, match="no column"):
            splits.load(recipe(train=large, text="no"), tell)
    assert len(entries(place)) == 1  # the file


@pytest.mark.parametrize("name", ["train.arrow", "facts.json"])
def test_damaged_rows_are_drawn_anew(large, recipe, tell, place, name):
    first = splits.load(recipe(train=large), tell)
    (entry,) = (entry for entry in entries(place) if (entry / name).exists())
    (entry / name).write_bytes((entry / name).read_bytes()[:-4])
    tell.clear()
    again = splits.load(recipe(train=large), tell)
    assert again.fingerprints == first.fingerprints
    assert len(tell.notices) == 3
    assert again.train is not None and first.train is not None
    assert again.train.to_dict() == first.train.to_dict()


def test_facts_are_found_once(tell, place):
    made = []

    def make():
        made.append(1)
        return {"found": 0.1 + 0.2, "pairs": []}

    assert cache.kept_facts("name", make, tell) == cache.kept_facts("name", make, tell) == make()
    assert len(made) == 2
    cache.prune(most=0)
    place.rmdir()
    place.write_text("a file in its place")
    assert cache.kept_facts("name", make, tell) == make()


@pytest.mark.parametrize("numbers", [[3, 5, 11], [7], [11, 0, 5, 5], list(range(12))])
def test_picked_rows_are_taken_from_whatever_pieces_they_lie_in(monkeypatch, numbers):
    parts = [rows(*(f"{n} {m}" for m in range(count))) for n, count in enumerate((1, 4, 2, 5))]
    whole = datasets.concatenate_datasets(parts)
    chosen = sources.picked(whole, np.array(numbers))
    for size in (1, 2, 100):
        monkeypatch.setattr(sources, "BATCH", size)
        tables = list(sources.batches_of(chosen, "text", "id"))
        assert [text for table in tables for text in table["text"].to_pylist()] == whole.select(numbers)["text"][:]
        assert tables[0].column_names == ["text", "id"]
        assert sources.column_of(chosen, "id").tolist() == whole.select(numbers)["id"][:]
