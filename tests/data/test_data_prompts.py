"""A source's columns -> prompts, completions and chats; what is none of these is told with its row."""

from __future__ import annotations

import json

import datasets
import pytest

from hkft.data.splits import rows
from hkft.errors import DataError

USER, BOT = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
SYSTEM = {"role": "system", "content": "s"}


@pytest.fixture
def read(write, recipe, tell):
    """read(cells of a column m, or columns) -> canonical rows of a file of them"""

    def canonical(cells=None, labelled=True, **data):
        columns = {"m": cells} if cells is not None else data.pop("columns")
        lines = [json.dumps(dict(zip(columns, row, strict=True))) for row in zip(*columns.values(), strict=True)]
        keys = {"messages": "m" if cells is not None else None, "prompt": None, "completion": None} | data
        return rows(write("t.jsonl", "\n".join(lines)), recipe("generation", **keys), None, tell, labelled)

    return canonical


def chat(row):
    return json.loads(row["prompt"]), row["completion"], json.loads(row["messages"])


# --- prompts and completions ------------------------------------------------------------------------------------------


def test_prompts_and_completions_are_filled_in(read, tell):
    columns = {"i": ["x", "y", None, "z"], "n": [1, None, None, 2], "r": ["a", "b", "c", " "]}
    got = read(columns=columns, prompt="{i}: {n} ->", completion=" {r}")
    assert got.to_dict() == {"id": [0, 1], "prompt": ["x: 1 ->", "y:  ->"], "completion": [" a", " b"]}
    (notice,) = tell.notices
    assert notice.endswith("2 of 4 rows left out (1 without a prompt, 1 without a completion)")


def test_a_column_and_no_completions_for_prediction(read):
    got = read(columns={"i": ["x", "y"]}, prompt="i", labelled=False)
    assert got.to_dict() == {"id": [0, 1], "prompt": ["x", "y"]}


def test_a_list_of_texts_is_one_text(read):
    got = read(columns={"i": [["x", "y"], ["z"]], "r": ["a", "b"]}, prompt="i", completion="r")
    assert got["prompt"][:] == ["x | y", "z"]


def test_a_class_is_written_by_its_name(tmp_path, recipe, tell):
    features = datasets.Features({"i": datasets.Value("string"), "r": datasets.ClassLabel(names=["no", "yes"])})
    path = str(tmp_path / "t.parquet")
    datasets.Dataset.from_dict({"i": ["x", "y", "z"], "r": [1, 0, -1]}, features=features).to_parquet(path)
    got = rows(path, recipe("generation", prompt="i", completion="r", messages=None), None, tell)
    assert got.to_dict() == {"id": [0, 1], "prompt": ["x", "y"], "completion": ["yes", "no"]}


@pytest.mark.parametrize(
    ("cell", "hint"),
    [({"x": 1}, ""), ([1], "a column of chats goes"), ([["a"]], "a column of chats"), ([USER], "a col")],
)
def test_a_cell_that_is_no_text_is_named_with_its_row(read, cell, hint):
    with pytest.raises(DataError) as caught:
        read(columns={"i": ["x", "y"], "r": [None, cell]}, prompt="{i}", completion="r")
    (problem,) = caught.value.problems
    assert problem.where.endswith("t.jsonl: r")
    assert problem.message == "row 1 (the first is 0) holds no text"
    assert (problem.found, problem.allowed) == (repr(cell), "text, a number, a list of texts")
    assert (problem.hint or "").startswith(hint) and bool(problem.hint) == bool(hint)


def test_a_row_keeps_its_number_past_a_filter(read):
    with pytest.raises(DataError, match=r"row 2 \(the first is 0\) holds no text"):
        read(
            columns={"i": ["x", "y", "z"], "r": [None, None, [1]]}, prompt="i", completion="r", filter={"i": ["y", "z"]}
        )


def test_a_missing_column_is_named_with_the_key_that_asks_for_it(read):
    with pytest.raises(DataError) as caught:
        read(columns={"meaning": ["x"], "r": ["a"]}, prompt="{meanin}: {zzz}", completion="qqq")
    told = [(problem.message, problem.hint) for problem in caught.value.problems]
    assert told == [
        ("there is no column 'meanin'", "did you mean 'meaning'?"),
        ("there is no column 'qqq'", "data.completion names it"),
        ("there is no column 'zzz'", "data.prompt names it"),
    ]


def test_a_template_without_its_braces_is_told_where_they_belong(read):
    with pytest.raises(DataError) as caught:
        read(columns={"meaning": ["x"], "r": ["a"]}, prompt="meaning ->", completion="r")
    assert caught.value.problems[0].hint == "a template names its columns in braces: '{meaning} ->'"


# --- chats ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "cell",
    [
        [USER, BOT],
        json.dumps([USER, BOT]),
        {"messages": [USER, BOT]},
        json.dumps({"messages": [USER, BOT], "id": 1}),
        [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}],
        [{"role": "User", "content": "q"}, {"role": "model", "content": "a"}],
        [{**USER, "name": None}, {**BOT, "tool_calls": None}],
        [{"role": "user", "content": [{"type": "text", "text": "q"}]}, BOT],
    ],
)
def test_chats_as_they_are_written(read, cell):
    assert chat(read([cell])[0]) == ([USER], "a", [USER, BOT])


@pytest.mark.parametrize(
    ("turns", "prompt", "completion"),
    [
        ([SYSTEM, USER, BOT], [SYSTEM, USER], "a"),
        ([USER, BOT, USER, {**BOT, "content": "é"}], [USER, BOT, USER], "é"),
        ([USER, BOT, USER], [USER], "a"),
        ([USER, BOT, USER, {**BOT, "content": " "}], [USER], "a"),
        ([BOT, USER, BOT], [BOT, USER], "a"),
        ([USER, {**BOT, "content": 12}], [USER], "12"),
        ([USER, {"role": "assistant", "content": None}, BOT], [USER, {**BOT, "content": ""}], "a"),
    ],
)
def test_the_prompt_is_all_before_the_last_thing_the_assistant_says(read, turns, prompt, completion):
    assert chat(read([turns])[0]) == (prompt, completion, [*prompt, {**BOT, "content": completion}])


def test_what_an_assistant_calls_is_kept(read):
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "f", "arguments": "{}"}]}
    prompt, completion, _ = chat(read([[USER, call, {"role": "tool", "content": "1"}, BOT]])[0])
    assert (prompt[1], prompt[2]["role"], completion) == ({**call, "content": ""}, "tool", "a")


def test_chats_without_an_answer_or_a_question_are_left_out(read, tell):
    got = read([[USER, BOT], None, [], [USER], [BOT], [BOT, USER], [USER, {**BOT, "content": ""}]])
    assert got["id"][:] == [0]
    (notice,) = tell.notices
    assert notice.endswith("6 of 7 rows left out (2 without a prompt, 4 without a completion)")


def test_empty_text_is_no_chat_at_all(read):
    got = read([json.dumps([USER, BOT]), "", " \n", "null", json.dumps({"messages": None}), "[]"])
    assert got["id"][:] == [0]


def test_chats_to_be_answered_end_with_what_is_asked(read):
    cells = [[SYSTEM, USER], [USER, BOT], [USER, BOT, USER], [BOT], [], [USER, BOT, {**BOT, "content": ""}]]
    got = read(cells, labelled=False)
    assert sorted(got.column_names) == ["id", "messages", "prompt"]
    assert [(row, json.loads(prompt)) for row, prompt in zip(got["id"], got["prompt"], strict=True)] == [
        (0, [SYSTEM, USER]),
        (1, [USER]),
        (2, [USER, BOT, USER]),
        (5, [USER]),
    ]
    assert got["messages"][:] == got["prompt"][:]


@pytest.mark.parametrize(
    "cell",
    ["no JSON", "[{'role': 'user'}]", "{", "[" * 100_000, "12", '"q"', '{"turns": []}', "[1]", "[[]]", 12, 0, False],
)
def test_what_is_no_chat_is_named_with_its_row(read, cell):
    with pytest.raises(DataError) as caught:
        read([cell, cell])
    (problem,) = caught.value.problems
    assert problem.where.endswith("t.jsonl: m")
    assert problem.message == "row 0 (the first is 0) is no chat, which is a list of turns"
    assert problem.found == repr(cell)[:80]
    assert problem.allowed == '[{"role": "user", "content": "..."}, ...]'


@pytest.mark.parametrize(
    ("turn", "lacking"),
    [
        ({"content": "q"}, "who speaks"),
        ({"role": 1, "content": "q"}, "who speaks"),
        ({"role": "user", "content": {"text": "q"}}, "what is said as text"),
        ({"role": "user", "content": True}, "what is said as text"),
        ({"role": "user", "content": [{"type": "image", "url": "u"}]}, "what is said as text"),
        ({"role": "user", "content": "\ud800"}, "what is said as text"),
    ],
)
def test_a_turn_that_lacks_something_is_named_with_its_row(read, turn, lacking):
    with pytest.raises(DataError) as caught:
        read([json.dumps([USER, BOT]), json.dumps([turn, BOT])])
    (problem,) = caught.value.problems
    assert problem.where.endswith("t.jsonl: m")
    assert problem.message == f"row 1 (the first is 0) has a turn that does not tell {lacking}"
    assert problem.found == repr(turn)
