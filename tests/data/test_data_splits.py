from __future__ import annotations

import hashlib
import json
from collections import Counter

import datasets
import pytest

from hkft.data import sources, splits
from hkft.data.splits import fingerprint, groups_of, load, rows
from hkft.errors import DataError, SetupError, UsageError


@pytest.fixture(autouse=True, params=["at once", "in batches"])
def size(request, monkeypatch, tmp_path_factory) -> None:
    """Rows are drawn and counted the same however few are looked at at a time, and wherever they lie."""
    if request.param == "in batches":
        monkeypatch.setenv("HKFT_CACHE", str(tmp_path_factory.mktemp("cache")))
        monkeypatch.setattr(sources, "BATCH", 3)
        for module in (sources, splits):
            monkeypatch.setattr(module, "LARGE", -1)


def csv(pairs) -> str:
    return "text,label\n" + "".join(f"{text},{label}\n" for text, label in pairs)


def many(count: int, labels: str = "ab") -> str:
    return csv((f"text {n}", labels[n % len(labels)]) for n in range(count))


def test_rows_are_canonical_and_keep_their_number_in_the_source(write, recipe, tell):
    train = write("t.csv", "s,b,y,kind\nA,b,no,x\nC,d,yes,z\nE,f,no,x\nG,h,yes,x\n")
    validation = write("v.csv", "s,b,y,kind\nI,j,yes,x\n")
    got = load(recipe(train=train, validation=validation, text=["s", "b"], label="y", filter={"kind": "x"}), tell)
    assert got.labels == ("no", "yes")
    assert got.train.to_dict() == {
        "id": [0, 2, 3],
        "text": ["A", "E", "G"],
        "text_pair": ["b", "f", "h"],
        "label": [0, 0, 1],
    }
    assert got.validation.to_dict() == {"id": [0], "text": ["I"], "text_pair": ["j"], "label": [1]}
    assert got.test is None
    assert got.duplicates == 0


@pytest.mark.parametrize(
    ("column", "value", "kept"),
    [
        ("k", "x", 2),
        ("k", ["x", "y"], 3),
        ("k", None, 1),
        ("n", 1, 2),
        ("n", 1.0, 2),
        ("n", "1", 2),
        ("b", True, 1),
        ("b", "true", 1),
    ],
)
def test_a_filter_compares_as_a_reader_would(write, recipe, tell, column, value, kept):
    table = [("x", 1, True), ("x", "1", False), ("y", 2, False), (None, 3, False)]
    lines = [json.dumps({"text": "t", "label": "l", "k": k, "n": n, "b": b}) for k, n, b in table]
    path = write("t.jsonl", "\n".join(lines))
    assert len(rows(path, recipe(filter={column: value}), ["l"], tell)) == kept


def test_a_filter_that_keeps_nothing_shows_what_there_is(write, recipe, tell):
    path = write("t.csv", many(4))
    with pytest.raises(DataError) as caught:
        load(recipe(train=path, filter={"label": "aa"}), tell)
    assert str(caught.value) == (
        f"{path}: no row is left after the filter label: aa\n  found: a, b\n  hint: did you mean 'a'?"
    )


@pytest.mark.parametrize(
    ("labels", "names", "indices"),
    [
        (["pos", "neg", " pos"], ("neg", "pos"), [1, 0, 1]),
        (["10", "9", "10"], ("9", "10"), [1, 0, 1]),
        (["1.0", "0", "1"], ("0", "1"), [1, 0, 1]),
        (["-1", "1", "-1"], ("-1", "1"), [0, 1, 0]),
        (["NA", "nan", "NA"], ("NA", "nan"), [0, 1, 0]),
        (["0.5", "1", "0.50"], ("0.5", "1"), [0, 1, 0]),
    ],
)
def test_labels_become_indices(write, recipe, tell, labels, names, indices):
    path = write("t.csv", csv(zip("abc", labels, strict=True)))
    got = load(recipe(train=path, validation=path), tell)
    assert got.labels == names
    assert got.train["label"][:] == indices


def test_class_labels_keep_the_order_of_the_dataset(tmp_path, write, recipe, tell):
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "maybe", "a"])}
    )
    path = str(tmp_path / "t.parquet")
    datasets.Dataset.from_dict({"text": ["a", "b", "c"], "label": [2, 0, -1]}, features=features).to_parquet(path)
    got = load(recipe(train=path, validation=write("v.csv", csv([("x", "maybe")]))), tell)
    assert got.labels == ("no", "maybe", "a")
    assert got.train["label"][:] == [2, 0]
    assert got.validation["label"][:] == [1]
    assert f"{path}: 1 of 3 rows left out (1 without a label)" in tell.notices
    numbered = rows(path, recipe(), ["0", "1", "2"], tell)
    assert numbered["label"][:] == [2, 0]
    assert f"{path}: label: its labels are read by their numbers: 0 for no, 1 for maybe, 2 for a" in tell.notices
    assert len(rows(path, recipe(filter={"label": "no"}), ["no"], tell)) == 1


def test_rows_without_text_or_label_are_left_out_aloud(write, recipe, tell):
    path = write("t.csv", "text,label\na,1\n  ,0\nb,0\nc,\n,\n")
    got = load(recipe(train=path, validation=path), tell)
    assert got.train["id"][:] == [0, 2]
    assert f"{path}: 3 of 5 rows left out (2 without text, 1 without a label)" in tell.notices


@pytest.mark.parametrize(("word", "told"), [("nan", True), ("NA", True), ("none", True), ("nano", False)])
def test_a_word_for_no_value_is_a_class_and_that_is_told(write, recipe, tell, word, told):
    path = write("t.csv", csv([("x", "yes"), ("y", word), ("z", "no"), ("w", word), ("v", "yes")]))
    got = load(recipe(train=path, validation=path), tell)
    assert word in got.labels
    notice = f"{path}: label: {word!r} is a class of 2 rows; leave the cell empty where there is no label"
    assert (notice in tell.notices) == told


def test_a_declared_class_may_be_called_none(tmp_path, recipe, tell):
    feature = datasets.ClassLabel(names=["none", "joy"])
    table = datasets.Dataset.from_dict({"text": list("abcd"), "label": [0, 1, 0, 1]})
    path = str(tmp_path / "t.parquet")
    table.cast_column("label", feature).to_parquet(path)
    assert load(recipe(train=path, validation=path), tell).labels == ("none", "joy")
    assert not any("'none' is a class" in notice for notice in tell.notices)


def test_an_unseen_label_is_named_with_its_row(write, recipe, tell):
    validation = write("v.csv", csv([("x", "a"), ("y", "bb")]))
    with pytest.raises(DataError) as caught:
        load(recipe(train=write("t.csv", many(4, ["a", "b1"])), validation=validation), tell)
    assert str(caught.value) == (
        f"{validation}: label: row 1 (the first is 0) has a label that training does not know\n"
        "  found: 'bb'\n  allowed: a, b1"
    )


def test_a_runs_own_labels_map_another_file(write, recipe, tell):
    path = write("v.csv", csv([("x", "b")]))
    assert rows(path, recipe(), ("c", "b", "a"), tell).to_dict() == {"id": [0], "text": ["x"], "label": [1]}
    got = load(recipe(validation=path, train="not read"), tell, ("validation",), labels=("a", "b"))
    assert got.train is None
    assert got.labels == ("a", "b")


@pytest.mark.parametrize(
    ("task", "content", "message"),
    [
        (
            "classification",
            csv([("a", "1"), ("b", "1")]),
            "{path}: label: every row has the same label: there is nothing to learn\n  found: '1'",
        ),
        (
            "classification",
            csv((f"t{n}", n / 4) for n in range(20)),
            "{path}: label: the labels are a scale, not classes\n  found: 20 values, from 0 to 4.75\n"
            "  hint: this looks like `task: regression`",
        ),
        (
            "regression",
            csv([("a", "1"), ("b", "good")]),
            "{path}: label: row 1 (the first is 0) has a label that is no finite number\n  found: 'good'\n"
            "  hint: labels that are names go with `task: classification`",
        ),
        (
            "regression",
            csv([("a", "1"), ("", "x"), ("b", "nan")]).replace(",x", ",2"),
            "{path}: label: row 2 (the first is 0) has a label that is no finite number\n  found: 'nan'",
        ),
        ("regression", csv([("a", "inf")]), "{path}: label: row 0 (the first is 0) has a label that is no finite"),
        (
            "classification",
            csv([("a", "-1"), ("b", "-1")]),
            "{path}: label: no row has a label\n"
            "  hint: some test sets hide theirs: they can be predicted on, not trained or evaluated on",
        ),
        ("regression", csv([("a", "-1.0"), ("b", "-1")]), "{path}: label: no row has a label"),
        ("classification", csv([("", "1"), (" ", "0")]), "{path}: no row is whole\n  found: 2 without text of 2"),
        (
            "classification",
            "txt,lable\na,1\n",
            "{path}: there is no column 'label'\n  found: txt, lable\n  hint: did you mean 'lable'?\n"
            "{path}: there is no column 'text'\n  found: txt, lable\n  hint: did you mean 'txt'?",
        ),
        (
            "classification",
            "what;ever\na;1\n",
            "{path}: there is no column 'label'\n  found: what, ever\n  hint: data.label names it; the first line is read as the header\n",
        ),
        (
            "classification",
            "so it goes,1\nand on,0\n",
            "{path}: there is no column 'label'\n  found: so it goes, 1\n  hint: data.label names it; the first line is read as the header",
        ),
    ],
)
def test_data_that_cannot_be_learned_from(write, recipe, tell, task, content, message):
    path = write("t.csv", content)
    with pytest.raises(DataError) as caught:
        load(recipe(task=task, train=path, validation=path), tell)
    assert str(caught.value).startswith(message.format(path=path))


@pytest.mark.parametrize("column", ["text", "label"])
@pytest.mark.parametrize("nested", [[], ["a"], {"x": 1}])
def test_a_nested_column_is_neither_text_nor_label(write, recipe, tell, column, nested):
    other = {"text": "t", "label": "a"}
    path = write("t.jsonl", "\n".join(json.dumps({**other, column: nested}) for _ in range(2)))
    with pytest.raises(DataError, match="holds no text" if column == "text" else "a label is one value"):
        load(recipe(train=path), tell)


def test_regression_labels_are_floats(write, recipe, tell):
    path = write("t.csv", csv([("a", "3.8"), ("b", "5"), ("c", "")]))
    got = load(recipe(task="regression", train=path, validation=path), tell)
    assert got.labels is None
    assert got.train["label"][:] == [3.8, 5.0]
    assert got.train.features["label"] == datasets.Value("float64")


def test_prediction_needs_no_labels(write, recipe, tell):
    hidden = write("h.csv", csv([("a", "-1"), ("", "-1"), ("b", "-1")]))
    expected = {"id": [0, 2], "text": ["a", "b"]}
    assert rows(hidden, recipe(), ("0", "1"), tell, labelled=False).to_dict() == expected
    bare = write("b.csv", "text\na\n")
    assert rows(bare, recipe(), ("0", "1"), tell, labelled=False).to_dict() == {"id": [0], "text": ["a"]}
    with pytest.raises(DataError, match="there is no column 'label'"):
        rows(bare, recipe(), ("0", "1"), tell)


def test_duplicates_are_counted_past_case_and_white_space(write, recipe, tell):
    train = write("t.csv", csv([("A  film ", 1), ("b", 0)]))
    validation = write("v.csv", csv([("a film", 1), ("a FILM", 0), ("c", 1), ("bb", 0)]))
    assert load(recipe(train=train, validation=validation), tell).duplicates == 2
    assert tell.notices == ["2 of 4 validation rows (50.0%) are in train too: the validation scores flatter"]


def test_a_pair_is_a_duplicate_only_as_a_pair(write, recipe, tell):
    train = write("t.csv", "a,b,label\nx,y,1\nz,w,0\n")
    validation = write("v.csv", "a,b,label\nx,w,1\nX,y,0\n")
    assert load(recipe(train=train, validation=validation, text=["a", "b"]), tell).duplicates == 1


def test_a_fraction_is_stratified_and_keeps_repeats_together(write, recipe, tell):
    texts = [(f"t {n // 2}", "abb"[n // 2 % 3]) for n in range(600)]  # every text twice, a third is "a"
    got = load(recipe(train=write("t.csv", csv(texts)), validation=0.1), tell)
    assert got.duplicates == 0
    assert not set(got.train["text"]) & set(got.validation["text"])
    assert Counter(got.validation["label"]) == {0: 20, 1: 40}
    assert sorted(got.train["id"][:] + got.validation["id"][:]) == list(range(600))
    assert got.train["id"][:] == sorted(got.train["id"][:])


def test_the_seed_decides_and_one_count_does_not_move_the_other(write, recipe, tell):
    path = write("t.csv", many(200))

    def ids(**more):
        got = load(recipe(train=path, **more), tell)
        return got.train["id"][:], got.validation["id"][:]

    train, validation = ids(train_rows=50, validation_rows=10)
    assert (len(train), len(validation)) == (50, 10)
    assert ids(train_rows=50, validation_rows=10) == (train, validation)
    assert ids(train_rows=50, validation_rows=20)[0] == train
    assert ids(train_rows=60, validation_rows=10)[1] == validation
    assert set(train) < set(ids(train_rows=60)[0])
    assert ids(train_rows=50, validation_rows=10, seed=2)[0] != train
    assert ids(train_rows=50, validation_rows=10, seed=2)[1] != validation


def test_validation_alone_is_the_same_part_of_train(write, recipe, tell):
    wanted = recipe(train=write("t.csv", many(50)))
    alone = load(wanted, tell, ("validation",))
    assert alone.train is None
    assert alone.validation.to_dict() == load(wanted, tell).validation.to_dict()
    assert list(alone.fingerprints) == ["validation"]


def test_more_rows_than_there_are(write, recipe, tell):
    got = load(recipe(train=write("t.csv", many(10)), train_rows=100), tell)
    assert len(got.train) == 8
    assert tell.notices == ["data.train_rows asks for 100 rows; there are 8, all are used"]


def test_the_fingerprint_is_of_the_content(write, recipe, tell):
    def of(name: str, content: str) -> str:
        return fingerprint(rows(write(name, content), recipe(), ("x", "y"), tell))

    first = of("a.csv", csv([("é", "x"), ("b", "y")]))
    assert first == "9e35ab95ed6c54df08774ff450d5cc68b1b6cb076c94044b90b70019f3d741ea"
    assert of("b.jsonl", '{"label": "x", "text": "é"}\n{"label": "y", "text": "b"}') == first
    assert of("c.csv", csv([("é", "y"), ("b", "x")])) != first
    path = write("d.csv", csv([("é", "x"), ("b", "y")]))
    assert load(recipe(train=path, validation=path), tell).fingerprints == {"train": first, "validation": first}


def test_a_test_set(write, recipe, tell):
    path = write("t.csv", many(10))
    got = load(recipe(train=path, test=path), tell, ("test",))
    assert (got.train, got.validation, len(got.test)) == (None, None, 10)
    with pytest.raises(UsageError) as caught:
        load(recipe(train=path), tell, ("test",))
    assert str(caught.value) == "data.test: the recipe names no test set\n  hint: --set data.test=FILE"


def test_a_test_set_drawn_from_train_is_the_same_for_every_seed(write, recipe, tell):
    path = write("t.csv", many(200))
    drawn = [
        load(recipe(train=path, validation=0.2, test=0.25, seed=seed), tell, ("train", "validation", "test"))
        for seed in (1, 2)
    ]
    ids = [{name: set(getattr(each, name)["id"]) for name in ("train", "validation", "test")} for each in drawn]
    assert ids[0]["test"] == ids[1]["test"]
    assert ids[0]["validation"] != ids[1]["validation"]
    for each in ids:
        assert len(set.union(*each.values())) == sum(map(len, each.values())) == 200
        assert len(each["test"]) == 50
    alone = load(recipe(train=path, validation=0.2, test=0.25, seed=2), tell, ("test",))
    assert set(alone.test["id"]) == ids[0]["test"]
    assert alone.train is None
    trained = load(recipe(train=path, validation=0.2, test=0.25, seed=2), tell)
    assert set(trained.train["id"]) == ids[1]["train"]


def test_a_test_fraction_outside_its_range(write, recipe, tell):
    with pytest.raises(UsageError, match="the test set is a fraction of train"):
        load(recipe(train=write("t.csv", many(10)), test=1.5), tell, ("test",))


@pytest.mark.parametrize("fraction", [0, 1, 1.5, -0.1, True, float("nan")])
def test_a_fraction_outside_its_range(write, recipe, tell, fraction):
    with pytest.raises(UsageError, match="the validation set is a fraction of train\n  found: "):
        load(recipe(train=write("t.csv", many(10)), validation=fraction), tell)


def test_too_few_texts_to_split(write, recipe, tell):
    path = write("t.csv", csv([("a", "x"), ("A", "y")]))
    with pytest.raises(DataError, match=r"too few different texts .*\n  found: 2 rows, 1 different"):
        load(recipe(train=path), tell)


def lines(count: int, completions: int = 3) -> str:
    cells = [(f"P {n}" if m % 2 else f"p  {n}", f"c {n} {m}") for n in range(count) for m in range(completions)]
    return "\n".join(json.dumps({"p": prompt, "c": text}) for prompt, text in cells)


def numbers(split) -> Counter:
    """How many rows each prompt has, letter case and white space aside."""
    return Counter(int(prompt.split()[1]) for prompt in split["prompt"])


def test_the_completions_of_a_prompt_stay_on_one_side(write, recipe, tell):
    wanted = recipe("generation", train=write("t.jsonl", lines(40)), prompt="{p} ->", completion="c", messages=None)
    got = load(wanted, tell)
    assert set(numbers(got.train).values()) == set(numbers(got.validation).values()) == {3}
    assert len(numbers(got.validation)) == 8
    assert not set(numbers(got.train)) & set(numbers(got.validation))
    assert (got.labels, got.duplicates, tell.notices) == (None, 0, [])


def test_the_completions_of_a_prompt_are_drawn_together(write, recipe, tell):
    path, keys = write("t.jsonl", lines(40)), {"prompt": "{p} ->", "completion": "c", "messages": None}
    got = load(recipe("generation", train=path, train_rows=31, validation_rows=5, **keys), tell)
    assert (len(got.train), len(got.validation)) == (30, 3)
    assert set(numbers(got.train).values()) == set(numbers(got.validation).values()) == {3}
    more = load(recipe("generation", train=path, train_rows=60, validation_rows=5, **keys), tell)
    assert set(numbers(got.train)) < set(numbers(more.train))


def test_chats_are_split_by_what_is_asked(write, recipe, tell):
    chats = [[("user", f"q {n}"), ("assistant", f"a {m}")] for n in range(20) for m in range(2)]
    cells = [{"m": [{"role": role, "content": text} for role, text in chat]} for chat in chats]
    path = write("t.jsonl", "\n".join(map(json.dumps, cells)))
    got = load(recipe("generation", train=path, messages="m", prompt=None, completion=None), tell)
    assert got.duplicates == 0
    assert set(Counter(got.train["prompt"]).values()) == set(Counter(got.validation["prompt"]).values()) == {2}


def test_a_prompt_in_both_sets_is_told(write, recipe, tell):
    train, validation = write("t.jsonl", lines(4)), write("v.jsonl", lines(2, 2) + '\n{"p": "new", "c": "x"}')
    keys = {"prompt": "{p} ->", "completion": "c", "messages": None}
    assert load(recipe("generation", train=train, validation=validation, **keys), tell).duplicates == 4
    share = "4 of 5 validation rows (80.0%)"
    assert tell.notices == [f"{share} have a prompt that is in train too: the validation scores flatter"]


def test_one_prompt_cannot_be_split(write, recipe, tell):
    keys = {"prompt": "{p} ->", "completion": "c", "messages": None}
    with pytest.raises(DataError, match="too few different prompts to draw a validation set from") as caught:
        load(recipe("generation", train=write("t.jsonl", lines(1, 9)), **keys), tell)
    assert caught.value.problems[0].found == "9 rows, 1 different"


@pytest.mark.parametrize(
    ("name", "more"), [("validation", ", --set data.validation=0.1 a part of train"), ("test", "")]
)
def test_a_source_that_cannot_be_had_is_told_with_its_key(write, recipe, tell, name, more):
    settings = {"train": write("t.csv", many(8)), "validation": 0.25, name: "package:no_such_package/rows.csv"}
    with pytest.raises(SetupError) as caught:
        load(recipe(**settings), tell, ("train", name))
    assert str(caught.value) == (
        f"data.{name}: package:no_such_package/rows.csv: the Python package 'no_such_package' is not installed\n"
        f"  hint: pip install no-such-package, or --set data.{name}=FILE names a local one{more}"
    )


@pytest.mark.parametrize("sign", [";", "\t", "|"])
def test_a_csv_of_another_country(write, recipe, tell, sign):
    lines = [f"text{sign}label", f"good, bright{sign}a", f'"so{sign}so, really"{sign}b', f"dull, cold{sign}a"]
    got = load(recipe(train=write("t.csv", "\n".join(lines)), validation=0.5), tell, ("train", "validation"))
    texts = {*got.train["text"][:], *got.validation["text"][:]}
    assert texts == {"good, bright", f"so{sign}so, really", "dull, cold"}


@pytest.mark.parametrize("task", ["classification", "regression"])
def test_one_label_left_by_the_limit_is_refused(write, recipe, tell, task):
    path = write("t.csv", csv([("t1", "1"), ("t2", "0")]))
    with pytest.raises(DataError) as caught:
        load(recipe(task=task, train=path, validation=path, train_rows=1), tell)
    assert "every training row has the same label: there is nothing to learn" in str(caught.value)
    assert "hint: data.train_rows leaves too few" in str(caught.value)


def test_a_regression_on_one_number_is_refused(write, recipe, tell):
    path = write("t.csv", csv((f"t{n}", "3") for n in range(9)))
    with pytest.raises(DataError, match="every training row has the same label") as caught:
        load(recipe(task="regression", train=path, validation=0.3), tell)
    assert caught.value.problems[0].found == "3.0 in 6 rows"


def test_a_class_that_validation_lacks_is_told(write, recipe, tell):
    load(recipe(train=write("t.csv", many(8, "abc")), validation=write("v.csv", csv([("x", "a"), ("y", "c")]))), tell)
    assert "no validation row is of class b" in tell.notices


def test_a_label_of_its_own_for_every_row_is_probably_the_wrong_column(write, recipe, tell):
    with pytest.raises(DataError) as caught:
        load(recipe(train=write("t.csv", csv((f"t{n}", f"id{n}") for n in range(9))), validation=0.3), tell)
    (problem,) = caught.value.problems
    assert problem.found == "9 rows, 9 different, 9 classes"
    assert problem.hint == "is 'label' the column of the labels?"


def test_a_fingerprint_is_the_sha256_of_lines_of_json():
    columns = {"text": ['a "b"', "\u00e9\u2028\U0001f600", "100 %s"], "id": [0, 7, 2**40], "label": [0.1, 1.0, 1e-30]}
    rows = datasets.Dataset.from_dict(columns)
    lines = "".join(json.dumps(dict(sorted(row.items()))) + "\n" for row in rows)
    assert fingerprint(rows) == hashlib.sha256(lines.encode()).hexdigest()


def test_groups_are_numbered_in_the_order_of_their_first_rows():
    texts = ["B  b", "a", "b B", "A ", "c", "b\nb", "stra\u00dfe", "STRASSE", "a b"]
    rows = datasets.Dataset.from_dict({"text": texts})
    assert groups_of(rows).tolist() == [0, 1, 0, 1, 2, 0, 3, 3, 4]
    pairs = datasets.Dataset.from_dict({"text": ["a b", "a", "a b"], "text_pair": ["c", "b c", "C"]})
    assert groups_of(pairs).tolist() == [0, 1, 0]
