"""Whatever bytes a data file holds: its rows are read, or refused with an error of hkft's, and soon."""

from __future__ import annotations

import gzip
import io
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from hkft.data.files import KINDS
from hkft.data.splits import load
from hkft.errors import HkftError

ENDINGS = [*KINDS, *(f"{kind}.gz" for kind in KINDS)]
NAMES = st.sampled_from(["text", "label", "text ", "", "\x00", "é", "\ud800"]) | st.text(max_size=3)
CELLS = st.sampled_from(["", "a", "b", "1", "1.5", "nan", "NA", "-1", "1e999", " ", "\x1b[31m", "word " * 50])
MARKS = st.sampled_from(
    ["text,label\n", "text\tlabel\n", ",", ";", "\t", '"', '""', "\n", "\r\n", "\r", "\x00", "\ufeff", "\u2028"]
)

values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | CELLS | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(NAMES, inner, max_size=2),
    max_leaves=4,
)
objects = st.lists(st.fixed_dictionaries({}, optional={"text": values, "label": values, "\ud800": values}), max_size=6)

quick = settings(
    max_examples=120,
    deadline=5000,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@pytest.fixture
def read(recipe, write, tell):
    """Split the rows of a file, as training does; what is wrong with them is an error that says so."""

    def go(ending: str, content: bytes, task: str = "classification") -> None:
        path = write(f"rows{ending}", content)
        try:
            found = load(recipe(train=path, task=task), tell)
        except HkftError as error:
            told = [problem.message for problem in error.problems]
        else:
            told = [f"{len(found.train)} rows", f"{len(found.validation)} rows"]
        assert told and all(told) and "0 rows" not in told

    return go


@quick
@given(ending=st.sampled_from(ENDINGS), content=st.binary(max_size=200))
@example(ending=".json", content=b"[" * 100_000)
@example(ending=".jsonl", content=b'{"a":' * 100_000)
@example(ending=".csv.gz", content=b"\x1f\x8b")
def test_any_bytes(read, ending, content):
    read(ending, content)


@quick
@given(
    ending=st.sampled_from([".csv", ".tsv"]),
    pieces=st.lists(MARKS | CELLS, max_size=25),
    task=st.sampled_from(["classification", "regression"]),
)
def test_any_table_of_text(read, ending, pieces, task):
    read(ending, "".join(pieces).encode("utf-8", "surrogatepass"), task)


@quick
@example(ending=".json", found=[{"\x00": None, "": None}], task="classification")
@given(
    ending=st.sampled_from([".json", ".jsonl"]),
    found=objects | st.lists(values, max_size=3) | st.dictionaries(NAMES, st.lists(values, max_size=4), max_size=3),
    task=st.sampled_from(["classification", "regression"]),
)
def test_any_json(read, ending, found, task):
    text = json.dumps(found) if ending == ".json" or isinstance(found, dict) else "\n".join(map(json.dumps, found))
    read(ending, text.encode(), task)


@quick
@given(data=st.data(), ending=st.sampled_from(ENDINGS))
def test_a_valid_file_with_something_else_in_it(read, data, ending):
    content = bytearray(valid(ending))
    for _ in range(data.draw(st.integers(0, 3))):
        place = data.draw(st.integers(0, len(content)))
        content[place : place + data.draw(st.integers(0, 4))] = data.draw(st.binary(max_size=4))
    read(ending, bytes(content[: data.draw(st.just(len(content)) | st.integers(0, len(content)))]))


@quick
@given(
    columns=st.dictionaries(
        st.sampled_from(["text", "label", "other"]),
        st.sampled_from(
            [
                pa.int8(),
                pa.uint64(),
                pa.float16(),
                pa.float64(),
                pa.bool_(),
                pa.string(),
                pa.large_string(),
                pa.binary(),
                pa.null(),
                pa.date32(),
                pa.time64("ns"),
                pa.timestamp("us", "UTC"),
                pa.duration("s"),
                pa.decimal128(5, 2),
                pa.list_(pa.int8()),
                pa.struct([("a", pa.string())]),
                pa.map_(pa.string(), pa.int8()),
                pa.dictionary(pa.int8(), pa.string()),
            ]
        ),
        max_size=3,
    ),
    count=st.integers(0, 12),
    task=st.sampled_from(["classification", "regression"]),
)
def test_any_type_of_parquet(read, columns, count, task):
    table = pa.table({name: cells(kind, count) for name, kind in columns.items()})
    file = io.BytesIO()
    try:
        pq.write_table(table, file)
    except pa.ArrowException:  # a type that no parquet file has
        return
    read(".parquet", file.getvalue(), task)


def cells(kind: pa.DataType, count: int) -> pa.Array:
    """Cells of a type: of numbers 0, 1, 0, ..., of all else nothing or bytes of zeros."""
    numbers = pa.array([n % 2 for n in range(count)], pa.int8())
    try:
        return numbers.cast(kind)
    except pa.ArrowException:
        return pa.nulls(count, kind)


def valid(ending: str) -> bytes:
    records = [{"text": f"a film {n}", "label": "ab"[n % 2]} for n in range(12)]
    sign = "\t" if ending.startswith(".tsv") else ","
    if ending.startswith(".parquet"):
        file = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(records), file)
        content = file.getvalue()
    elif ending.startswith((".csv", ".tsv")):
        content = "\n".join(sign.join(row) for row in (records[0], *(record.values() for record in records))).encode()
    else:
        content = (
            json.dumps(records)
            if ending.startswith(".json.") or ending == ".json"
            else "\n".join(map(json.dumps, records))
        ).encode()
    return gzip.compress(content, mtime=0) if ending.endswith(".gz") else content
