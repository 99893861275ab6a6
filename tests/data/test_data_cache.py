"""The cache of examples: by content, whole or not at all, safe under several runs, and never in the way."""

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
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from hkft.data import cache, encoding, splits
from hkft.data.tokenise import tokenise
from hkft.events import Stage
from hkft.folder import cache_directory

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
    given, words = rows(*ROWS * 700), tokenizer()
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
