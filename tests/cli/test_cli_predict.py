"""`hkft predict`: lines in, lines out, for every task."""

from __future__ import annotations

import csv
import json
import os
import sys
import threading
from contextlib import ExitStack
from pathlib import Path

import pytest

from hkft.cli.main import app


def lines(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines()]


def write(path: str, *records: dict) -> str:
    Path(path).write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def test_a_class_and_its_probabilities_with_the_record_it_came_with(hkft, run):
    given = [{"text": "a good film", "note": [1, {"a": None}]}, {"text": "a dull film", "id": "x"}] * 40
    ran = hkft("predict", run, "--input", write("in.jsonl", *given))
    assert ran.code == 0, ran.err
    found = lines(ran.out)
    assert len(found) == 80  # more than a batch
    for record, said in zip(given, found, strict=True):
        assert {key: said[key] for key in record} == record
        assert said["prediction"] == max(said["probabilities"], key=said["probabilities"].get)
        assert set(said["probabilities"]) == {"negative", "positive"}
        assert sum(said["probabilities"].values()) == pytest.approx(1)


def test_its_classes_are_those_that_eval_decides_on(hkft, run, reviews):
    kept = lines(Path("run/predictions/validation.jsonl").read_text())
    with reviews.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    given = [{"text": rows[row["id"]]["text"]} for row in kept]
    found = lines(hkft("predict", run, "-i", write("in.jsonl", *given)).out)
    assert [row["prediction"] for row in found] == [row["prediction"] for row in kept]


def test_a_line_without_text_keeps_its_place(hkft, run):
    ran = hkft("predict", run, "-i", write("in.jsonl", {"text": ""}, {"text": "a good film"}, {"text": None}))
    assert [row["prediction"] is None for row in lines(ran.out)] == [True, False, True]
    assert "without text: not predicted" in ran.err
    alone = hkft("predict", run, "-i", write("in.jsonl", {"text": " "}))
    assert lines(alone.out) == [{"text": " ", "prediction": None}]


def test_a_file_may_be_answered_in_place_and_is_named_once_it_is_whole(hkft, run):
    records = [{"text": "good"}, {"text": "bad"}]
    path = write("in.jsonl", *records)
    assert hkft("predict", run, "-i", path, "-o", path).code == 0
    answered = lines(Path(path).read_text())
    assert [{"text": record["text"]} for record in answered] == records
    assert all(record["prediction"] for record in answered)
    Path(path).write_text('{"text": "good"}\n{')
    assert hkft("predict", run, "-i", path, "-o", "out.jsonl").code == 3
    assert not Path("out.jsonl").exists()
    assert len(lines(Path("out.jsonl.partial").read_text())) == 1


def test_nothing_to_answer_is_said(hkft, run):
    Path("none.jsonl").write_text("")
    ran = hkft("predict", run, "-i", "none.jsonl")
    assert (ran.code, ran.out, "none.jsonl has no line" in ran.err) == (0, "", True)


def test_a_file_and_one_json_document(hkft, run):
    ran = hkft("predict", run, "-i", write("in.jsonl", {"text": "good"}), "-o", "out/found.jsonl", "--json")
    assert ran.code == 0
    assert ran.document == {"source": "run", "checkpoint": "best", "rows": 1, "output": "out/found.jsonl"}
    assert lines(Path("out/found.jsonl").read_text())[0]["text"] == "good"


@pytest.mark.parametrize(
    ("content", "code", "says"),
    [
        ('{"text": "good"}\nnonsense\n', 3, ["not a line of JSON", "in.jsonl:2", "nonsense"]),
        ("[1]\n", 3, ["a line is one object", "in.jsonl:1"]),
        ('{"text": "good"}\n{"sentence": "bad"}\n', 3, ["record 2 has no 'text'", "sentence", "data.text names it"]),
    ],
)
def test_what_cannot_be_read_is_told_with_its_line(hkft, run, content, code, says):
    Path("in.jsonl").write_text(content)
    ran = hkft("predict", run, "-i", "in.jsonl")
    assert ran.code == code
    assert all(part in ran.err for part in says), ran.err


def test_what_stands_before_a_broken_line_is_answered(hkft, run):
    Path("in.jsonl").write_text('{"text": "good"}\nnonsense\n{"text": "bad"}\n')
    ran = hkft("predict", run, "-i", "in.jsonl")
    assert ran.code == 3
    assert [row["text"] for row in lines(ran.out)] == ["good"]


def test_usage(hkft, run):
    missing = hkft("predict", run, "-i", "nowhere.jsonl")
    assert (missing.code, "there is no such file" in missing.err) == (3, True)
    both = hkft("predict", run, "-i", write("in.jsonl", {"text": "a"}), "--json")
    assert (both.code, "--output FILE" in both.err) == (2, True)


def test_numbers_of_a_regression(hkft, tiny):
    settings = ("--set", "task=regression", "--set", "data.label=stars", "--set", "train.num_train_epochs=1")
    assert hkft("train", "--recipe", tiny, *settings, "--output", "stars").code == 0
    (said,) = lines(hkft("predict", "stars", "-i", write("in.jsonl", {"text": "good"})).out)
    assert isinstance(said["prediction"], float)
    assert "probabilities" not in said


@pytest.fixture
def writer(hkft, generation_file) -> str:
    ran = hkft("train", "--recipe", generation_file, "--output", "writer")
    assert ran.code == 0, ran.err
    return "writer"


def test_text_of_a_decoder_as_eval_writes_it(hkft, writer):
    assert hkft("eval", writer, "--json").code == 0
    given = [{"meaning": f"name: {name}, food: fish, area: east"} for name in ("Bani", "Loro", "Kumi")]
    ran = hkft("predict", writer, "-i", write("in.jsonl", *given), "--set", "generation.batch_size=2")
    found = lines(ran.out)
    assert [row["meaning"] for row in found] == [row["meaning"] for row in given]
    assert all(isinstance(row["prediction"], str) for row in found)
    again = lines(hkft("predict", writer, "-i", "in.jsonl", "--set", "generation.batch_size=3").out)
    assert again == found


def test_chats_in_turns(hkft, generation_file):
    text = generation_file.read_text().replace('prompt: "{meaning} ->"', "messages: messages")
    generation_file.write_text(text.replace('  completion: " {reference}"\n', ""))
    ran = hkft("train", "--recipe", generation_file, "--output", "chats")
    assert ran.code == 0, ran.err
    chat = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "name: Bani, food: fish, area: east"},
    ]
    found = lines(hkft("predict", "chats", "-i", write("in.jsonl", {"messages": chat, "id": 7})).out)
    assert found[0]["messages"] == chat
    assert found[0]["id"] == 7
    assert isinstance(found[0]["prediction"], str)


def test_lines_come_while_more_are_still_to_be_read(run, monkeypatch):
    """A pipe that stays open: the first batch is answered before the second is sent."""
    words = [json.dumps({"text": word}) + "\n" for word in ("good", "bad", "grey")]
    first = []

    def other_end():
        ask.writelines(words[:2])
        ask.flush()
        first.extend(json.loads(heard.readline()) for _ in range(2))
        ask.write(words[2])
        ask.close()

    with ExitStack() as stack:
        pipes = [(os.fdopen(reader), os.fdopen(writer, "w")) for reader, writer in (os.pipe(), os.pipe())]
        (asked, ask), (heard, said) = [[stack.enter_context(end) for end in pipe] for pipe in pipes]
        monkeypatch.setattr(sys, "stdin", asked)
        monkeypatch.setattr(sys, "stdout", said)
        thread = threading.Thread(target=other_end)
        thread.start()
        command = ["predict", str(run), "--input", "-", "--set", "train.per_device_eval_batch_size=2"]
        try:
            assert not app(command, standalone_mode=False)
        finally:
            said.close()
            thread.join()
        rest = lines(heard.read())
    assert [row["text"] for row in first + rest] == ["good", "bad", "grey"]
    assert len(first) == 2
