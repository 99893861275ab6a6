from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path

import datasets
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hkft.data import delimited, files, sources
from hkft.data.sources import read
from hkft.errors import DataError


@pytest.fixture(autouse=True, params=["small", "large"])
def size(request, monkeypatch, tmp_path_factory) -> str:
    """Every file is read twice: into memory at once, and as a large one is, in pieces and through the cache."""
    if request.param == "large":
        monkeypatch.setenv("HKFT_CACHE", str(tmp_path_factory.mktemp("cache")))
        monkeypatch.setattr(sources, "LARGE", -1)
        monkeypatch.setattr(files, "BLOCK", 3)
        for module in (files, delimited):
            monkeypatch.setattr(module, "BATCH", 1)
    return request.param


def cells(reference: str, tell) -> dict[str, list]:
    return read(reference, tell).to_dict()


def test_a_quoted_csv_keeps_its_newlines_commas_and_words(write, tell):
    path = write("a.csv", '\ufefftext,label\r\n"two\nlines, ""quoted""",NA\r\nnull,1\r\n\r\nnan,\r\n')
    assert cells(path, tell) == {"text": ['two\nlines, "quoted"', "null", "nan"], "label": ["NA", "1", ""]}


def test_a_lone_quote_in_an_unquoted_tsv_joins_no_rows(write, tell):
    rows = ['"he said\t1', 'it works" \t0', 'a 5" nail\t1', '"whole" and "more"\t0', "plain\t1"]
    path = write("a.tsv", "sentence\tlabel\n" + "\n".join(rows))
    assert cells(path, tell) == {
        "sentence": ['"he said', 'it works" ', 'a 5" nail', '"whole" and "more"', "plain"],
        "label": ["1", "0", "1", "0", "1"],
    }


@pytest.mark.parametrize("texts", [['say "hi"', "plain"], ["a\ttab", 'and\na "line"'], ["no", "quotes"]])
@pytest.mark.parametrize("kind", ["csv", "tsv", "csv.gz", "tsv.gz"])
def test_what_pandas_writes_comes_back(tmp_path, tell, texts, kind):
    path = tmp_path / f"a.{kind}"
    pd.DataFrame({"text": texts, "label": ["0", "1"]}).to_csv(path, sep="," if "csv" in kind else "\t", index=False)
    assert cells(str(path), tell) == {"text": texts, "label": ["0", "1"]}


def test_a_field_longer_than_csvs_own_limit_is_read_and_the_limit_is_left_alone(write, tell):
    before = csv.field_size_limit(1000)
    try:
        long = "x" * 1001
        assert cells(write("a.csv", f"text\n{long}\n"), tell) == {"text": [long]}
        assert csv.field_size_limit() == 1000
    finally:
        csv.field_size_limit(before)


ROWS = [{"text": "a\u2028b", "label": 1}, {"text": "c", "label": 0, "more": [1]}]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS) + "\n\n"),
        ("a.ndjson", "\n".join(map(json.dumps, ROWS))),
        ("lines.json", "\n".join(map(json.dumps, ROWS))),
        ("list.json", json.dumps(ROWS, indent=1)),
        ("wrapped.json", json.dumps({"version": 1, "data": ROWS})),
        ("columns.json", json.dumps({"text": ["a\u2028b", "c"], "label": [1, 0], "more": [None, [1]]})),
        ("a.jsonl.gz", gzip.compress("\n".join(map(json.dumps, ROWS)).encode(), mtime=0)),
    ],
)
def test_every_shape_of_json(write, tell, name, content):
    expected = {"text": ["a\u2028b", "c"], "label": [1, 0], "more": [None, [1]]}
    assert cells(write(name, content), tell) == expected


def test_a_json_column_of_several_kinds_becomes_text(write, tell):
    path = write("a.jsonl", '{"label": 1}\n{"label": "1"}\n{"label": null}\n{"label": true}')
    assert cells(path, tell) == {"label": ["1", "1", None, "true"]}


def test_parquet_keeps_class_labels_and_reads_pandas_categories(tmp_path, tell):
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    path = tmp_path / "a.parquet"
    datasets.Dataset.from_dict({"text": ["a", "b"], "label": [1, 0]}, features=features).to_parquet(path)
    assert read(str(path), tell).features["label"].names == ["no", "yes"]
    pd.DataFrame({"label": pd.Categorical(["x", "y"])}).to_parquet(path)
    assert cells(str(path), tell) == {"label": ["x", "y"]}


def test_reading_writes_nothing_beside_the_file(write, tell, tmp_path):
    read(write("a.csv", "text,label\na,1\n"), tell)
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.csv"]
    assert [event.text for event in tell] == [f"reading {tmp_path / 'a.csv'}"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "", "{path}: the file is empty"),
        ("a.csv", "\n \n", "{path}: the file is empty"),
        ("a.jsonl", b"\xef\xbb\xbf", "{path}: the file has no rows"),
        ("a.csv", "text,label\n", "{path}: the file has a header and no rows\n  found: columns text, label"),
        (
            "a.csv",
            'text,label\n"a\nb",1\nc, d,0\n',
            "{path}:4: 3 fields in a file of 2 columns\n  found: c, d,0\n  allowed: one field each for text, label\n"
            "  hint: text that holds a ',' stands in double quotes: \"...\"",
        ),
        ("a.tsv", 'text\tlabel\n"a\tb\n', None),
        ("b.tsv", "text\tlabel\nno label\n", "{path}:2: 1 fields in a file of 2 columns"),
        (
            "a.csv",
            'text,label\nfine,1\n"never closed,1\nmore,0\n',
            "{path}:3: the quotes of this record do not match\n  found: unexpected end of data\n"
            '  hint: a quote inside a quoted field is written twice: ""',
        ),
        ("a.csv", "text,text\na,b\n", "{path}:1: two columns have one name\n  found: text"),
        ("a.csv", b"text\nabc\ncaf\xe9\n", "{path}:3: this is not UTF-8 text\n  found: byte 0xe9"),
        ("a.csv", "text\nabc\n".encode("utf-16"), "{path}: this is not UTF-8 text\n  found: UTF-16"),
        ("a.csv", b"text\n\0\1\2", "{path}:2: this is binary, not text\n  found: a zero byte"),
        ("a.csv.gz", gzip.compress(b"text\nabc\n", mtime=0)[:-9], "{path}: the gzip file is damaged or cut short"),
        ("a.jsonl", '{"a": 1}\n{"a": }\n', "{path}:2:7: this is not JSON\n  found: Expecting value"),
        ("a.json", '[{"a": 1},\n {]', "{path}:2:3: this is not JSON"),
        ("a.json", "3", "{path}: this JSON holds no rows\n  allowed: a list of objects, or one object a line"),
        ("a.json", "[]", "{path}: the file has no rows"),
        ("a.jsonl", '{"a": 1}\n[1]\n', "{path}: row 1 is no object\n  found: [1]"),
        ("a.jsonl", '{"a": "\\ud800"}', "{path}: column 'a' holds text that is not Unicode (half a surrogate pair)"),
        ("a.parquet", "PAR1 but not really", "{path}: this is not a parquet file that can be read\n  found: "),
        (
            "a.xlsx",
            "x",
            "{path}: the file's ending names no format hkft reads\n"
            "  allowed: csv, tsv, json, jsonl, ndjson, parquet (.gz too)",
        ),
    ],
)
def test_a_broken_file_is_one_located_message(write, tell, name, content, message):
    path = write(name, content)
    if message is None:  # a lone quote in a row as wide as the header is text
        assert cells(path, tell) == {"text": ['"a'], "label": ["b"]}
        return
    with pytest.raises(DataError) as caught:
        read(path, tell)
    assert str(caught.value).startswith(message.format(path=path))


def test_a_file_without_rows_in_parquet(tmp_path, tell):
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"the file has no rows\n  found: columns text$"):
        read(str(tmp_path / "a.parquet"), tell)


def test_a_missing_file_names_its_neighbour(write, tell, tmp_path):
    write("train.tsv", "a\nb\n")
    with pytest.raises(DataError) as caught:
        read(str(tmp_path / "trian.tsv"), tell)
    assert str(caught.value) == f"{tmp_path}/trian.tsv: there is no such file\n  hint: did you mean 'train.tsv'?"
    with pytest.raises(DataError, match=r"hint: there is no folder '.*/nowhere'"):
        read(str(tmp_path / "nowhere" / "a.csv"), tell)


def test_a_folder_lists_its_data_files(write, tell, tmp_path):
    write("b.csv", "x")
    write("notes.md", "x")
    with pytest.raises(DataError) as caught:
        read(str(tmp_path), tell)
    assert str(caught.value) == f"{tmp_path}: this is a folder, not a file\n  found: b.csv"


def test_the_home_folder_is_known(write, tell, tmp_path, monkeypatch):
    write("a.csv", "text\na\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert cells(str(Path("~") / "a.csv"), tell) == {"text": ["a"]}


# --- large files ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rows",
    [
        [{"a": 1}, {"a": 2.5}, {"a": None}],
        [{"a": 1}, {"b": "x"}, {"a": 2, "c": [1]}],
        [{"a": None}, {"a": None}],
        [{"a": None}, {"a": [{"role": "b", "z": 1}]}, {"a": [{"content": "x", "role": "c"}]}],
        [{"a": {"y": 1}}, {"a": {"x": "s", "y": 2.5}}],
        [{"a": {"y": 1}}, {"a": {"y": "s"}}],
        [{"a": [1]}, {"a": []}, {"a": [None, 2.5]}],
        [{"a": 2**60 + 1}, {"a": 2.5}],
        [{"a": 2**64}, {"a": 1}],
        [{"a": True}, {"a": 1}],
        [{"a": 1}, {"a": "1"}, {"b": "1"}],
        [{"a": "x"}, {"a": [1]}],
        [{"a": {}}, {"a": {"b": None}}],
    ],
)
def test_columns_of_json_lines_have_the_kind_that_all_their_rows_have(write, tell, rows):
    path = write("a.jsonl", "\n".join(map(json.dumps, rows)))
    whole = files._json_of_rows(rows, path)
    got = read(path, tell)
    assert got.to_dict() == whole.to_pydict()
    assert got.column_names == whole.column_names
    assert [str(feature) for feature in got.features.values()] == [
        str(feature) for feature in datasets.Features.from_arrow_schema(whole.schema).values()
    ]


def test_a_large_file_is_read_once_and_mapped(write, tell, size, monkeypatch):
    path = write("a.csv", "text,label\n" + "".join(f"row {n},{n % 2}\n" for n in range(50)))
    first = read(path, tell)
    assert bool(first.cache_files) is (size == "large")
    if size == "large":
        monkeypatch.setattr(sources, "read_file", None)
    again = read(write("b.csv", Path(path).read_bytes()), tell)  # by its content, whatever it is called
    assert again.to_dict() == first.to_dict()
    if size == "large":
        with pytest.raises(TypeError):
            read(write("a.csv", Path(path).read_text() + "one more,1\n"), tell)


def test_a_large_file_is_read_where_the_cache_cannot_be_written(write, tell, size, monkeypatch, tmp_path):
    monkeypatch.setenv("HKFT_CACHE", write("no folder", ""))
    path = write("a.csv", "text,label\none,1\ntwo,0\n")
    assert cells(path, tell) == {"text": ["one", "two"], "label": ["1", "0"]}
    assert len(tell.notices) == (size == "large")
