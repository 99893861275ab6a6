"""Sixty-odd kinds of bad input and more: each ends in one calm message that says where, what and what now, and none runs code.

What is odd and fine all the same (BOM, CRLF, ...) stands in the same table, with exit code 0.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

CHECK = "check --recipe tiny.yaml"
TRAIN = "train --recipe tiny.yaml --output out"
EVAL = "eval run"
LAUGHS = "".join(
    f"{name}: &{name} [{', '.join([f'*{inner}'] * 9)}]\n" for inner, name in zip("abcdefg", "bcdefgh", strict=True)
)


@dataclass(frozen=True)
class Case:
    """A command in a folder with tiny.yaml, its rows, its model in bert/ and a finished run in run/.

    said: all of stderr from "error: " on; ... stands for what is another's, or long. files: written before; edit: what is
    replaced in tiny.yaml; make: what is done to the folder.
    """

    code: int
    args: str
    said: str = ""
    files: Mapping[str, str | bytes] = field(default_factory=dict)
    edit: tuple[str, str] = ("", "")
    make: Callable[[], Any] = lambda: None


def recipe(content: str | bytes, said: str) -> Case:
    return Case(2, "check --recipe bad.yaml", said, {"bad.yaml": content})


def edited(old: str, new: str, said: str = "", code: int = 2, args: str = CHECK) -> Case:
    return Case(code, args, said, edit=(old, new))


def rows(name: str, content: str | bytes, said: str = "", *settings: str) -> Case:
    args = " ".join([CHECK, f"--set=data.train={name}", *(f"--set={setting}" for setting in settings)])
    return Case(3 if said else 0, args, said, {name: content})


def model(make: Callable[[], Any], said: str, args: str = TRAIN) -> Case:
    return Case(4 if said else 0, f"{args} --set=model.name=bert", said, make=make)


def folder(args: str, make: Callable[[], Any], code: int, said: str = "") -> Case:
    return Case(code, args, said, make=make)


def not_loaded(found: str, name: str = "bert") -> str:
    return (
        f"error: the model {name!r} could not be loaded\n  where    model.name\n  found    {found}\n"
        "  allowed  a hub id, a local folder, or package:<python package>/<path inside it>\n"
        "  hint     offline, only models in the local hub cache or in a folder can be used; no code of a model's own is run\n"
    )


def no_safetensors(found: str) -> str:
    return (
        "error: the file is damaged or incomplete\n  where    bert/model.safetensors\n"
        f"  found    {found}\n  hint     fetch or copy it once more\n"
    )


# --- what files hold --------------------------------------------------------------------------------------------------

TEXTS = [f"a {word} film number {n}" for n in range(20) for word in ("good", "bad")]
LABELS = ["positive", "negative"] * 20
CSV = "text,label\n" + "".join(f"{text},{label}\n" for text, label in zip(TEXTS, LABELS, strict=True))
OBJECTS = [{"text": text, "label": label} for text, label in zip(TEXTS, LABELS, strict=True)]
LINES = "".join(json.dumps(each) + "\n" for each in OBJECTS)


def parquet(*columns: Any, names: tuple[str, ...] = ("text", "label")) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.table([pa.array(column) for column in columns], names=[*names]), file)
    return file.getvalue()


def no_text() -> pa.Array:
    """Bytes that are no UTF-8, in a column that says it is text."""
    cells = pa.array([f"{n}\xff".encode("latin-1") for n in range(40)])
    return pa.Array.from_buffers(pa.string(), len(cells), cells.buffers())


PARQUET = parquet(TEXTS, LABELS)


# --- what is done to a folder -----------------------------------------------------------------------------------------


def remove(*names: str) -> None:
    for path in map(Path, names):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def write(name: str, content: str | bytes) -> None:
    Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())


def torn(name: str) -> None:
    write(name, Path(name).read_bytes()[: Path(name).stat().st_size // 2])


def changed(name: str, **values: Any) -> None:
    write(name, json.dumps(json.loads(Path(name).read_bytes()) | values))


class Opened:
    """Leaves the file `owned` behind where it is unpickled."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("owned",)


def pickled(name: str, instead: str | None = None) -> None:
    if instead:
        remove(instead)
    write(name, pickle.dumps(Opened()))


def indexed(file: str) -> None:
    """The model's index says that `file` holds all its tensors."""
    from safetensors import safe_open

    with safe_open("bert/model.safetensors", "pt") as stored:
        names = list(stored.keys())
    Path("bert/model.safetensors").rename("elsewhere.safetensors")
    write("bert/model.safetensors.index.json", json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, file)}))


def far_words() -> None:
    """A tokenizer whose last words have numbers beyond the model's embeddings."""
    content = json.loads(Path("bert/tokenizer.json").read_text())
    words = content["model"]["vocab"]
    content["model"]["vocab"] = {word: number + 100 * (number > 9) for word, number in words.items()}
    write("bert/tokenizer.json", json.dumps(content))


def added_padding() -> None:
    """A padding token that was added, and the model left as it was."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained("bert")
    tokenizer.add_special_tokens({"pad_token": "<added>"})
    tokenizer.save_pretrained("bert")


def of_another_size() -> None:
    from transformers import BertConfig, BertModel

    config = BertConfig.from_pretrained("bert")
    config.hidden_size = 48
    BertModel(config).save_pretrained("bert")


def own_code() -> None:
    changed("bert/config.json", model_type="own", auto_map={"AutoConfig": "code.Config"})
    write("bert/code.py", "import os\nos.mkdir('owned')\n")


RECIPES = {
    "a wrong type": edited(
        "num_train_epochs: 2",
        "num_train_epochs: [2]",
        "error: train.num_train_epochs: not a value of this field\n"
        "  where    tiny.yaml:6:50\n"
        "  found    [2]\n"
        "  allowed  a number\n",
    ),
    "a text for a number": edited(
        "max_length: 32",
        "max_length: '32'",
        "error: data.max_length: not a whole number\n"
        "  where    tiny.yaml:3:84\n"
        "  found    '32'\n"
        "  allowed  a whole number\n"
        "  hint     remove the quotes\n",
    ),
    "out of range": edited(
        "max_length: 32",
        "max_length: 4",
        "error: data.max_length: too small\n  where    tiny.yaml:3:84\n  found    4\n  allowed  8 or more\n",
    ),
    "a rate of 1": edited(
        "rate: 0.1",
        "rate: 1.0",
        "error: dropout.rate: a dropout rate is a probability\n"
        "  where    tiny.yaml:5:36\n"
        "  found    1.0\n"
        "  allowed  0 <= rate < 1\n",
    ),
    "looks without end": edited(
        "evals_per_epoch: 2",
        "evals_per_epoch: 99999999999",
        "error: diagnostics.evals_per_epoch: too large\n"
        "  where    tiny.yaml:7:32\n"
        "  found    99999999999\n"
        "  allowed  below 10,000\n",
    ),
    "an unknown key": edited(
        "max_length:",
        "max_lenght:",
        "error: there is no key 'max_lenght' in data\n"
        "  where    tiny.yaml:3:72\n"
        "  allowed  train, validation, test, filter, text, label, prompt, completion, messages, max_length, padding_free, train_rows, validation_rows\n"
        "  hint     did you mean 'max_length'?\n",
    ),
    "an unknown section": edited(
        "data:",
        "dataset:",
        "error: 4 problems\n"
        "1. data.text is required\n"
        "  where    tiny.yaml:2:1\n"
        "  hint     task classification needs data.text and data.label\n"
        "2. data.label is required\n"
        "  where    tiny.yaml:2:1\n"
        "  hint     task classification needs data.text and data.label\n"
        "3. data.train is required\n"
        "  where    tiny.yaml:2:1\n"
        "  hint     hub:<dataset>[/<config>]#<split> | csv, tsv, json, jsonl, parquet | package:<package>/<path>\n"
        "4. there is no key 'dataset' at the top level\n"
        "  where    tiny.yaml:3:1\n"
        "  allowed  model, task, data, lora, dropout, train, generation, diagnostics, compare, seed\n"
        "  hint     did you mean 'data'?\n",
    ),
    "a duplicate key": edited(
        "r: 4,",
        "r: 4, r: 8,",
        "error: lora.r is given twice\n"
        "  where    tiny.yaml:4:14\n"
        "  hint     the first is at tiny.yaml:4:8; keep one of them\n",
    ),
    "a key that is a list": edited(
        "# tiny", "[a, b]: 1 #", "error: a key is a single word or text\n  where    tiny.yaml:1:1\n"
    ),
    "a tab": recipe(
        "model:\n\tname: a\n",
        "error: a tab stands here, and YAML takes spaces only\n"
        "  where    bad.yaml:2:1\n"
        "  hint     replace the tab by spaces\n",
    ),
    "a quote that is not closed": recipe(
        "seed: 'x\n",
        "error: a quote opens here and is not closed\n"
        "  where    bad.yaml:1:7\n"
        "  hint     close it with the same sign\n",
    ),
    "a zero byte": recipe(
        "seed: \0\n",
        "error: a control character cannot stand in YAML\n  where    bad.yaml:1:7\n  found    character U+0000\n",
    ),
    "latin-1": recipe(
        "# réglages\n".encode("latin-1"),
        "error: not UTF-8 text\n  where    bad.yaml:1:4\n  found    byte 0xe9\n  hint     save the file as UTF-8\n",
    ),
    "UTF-16": recipe(
        "seed: 1\n".encode("utf-16"),
        "error: not UTF-8 text\n  where    bad.yaml:1:1\n  found    byte 0xff\n  hint     save the file as UTF-8\n",
    ),
    "a recipe with a BOM": edited("# tiny", "\ufeff# tiny", code=0, args="train --recipe tiny.yaml --dry-run"),
    "a recipe with CRLF": edited("\n", "\r\n", code=0, args="train --recipe tiny.yaml --dry-run"),
    "an alias": edited(
        "text: text, label: label", "text: &a text, label: *a", code=0, args="train --recipe tiny.yaml --dry-run"
    ),
    "an alias of nothing": edited(
        "rate: 0.1", "rate: *a", "error: not valid YAML: found undefined alias 'a'\n  where    tiny.yaml:5:36\n"
    ),
    "an alias of itself": recipe(
        "seed: &a [*a]\n", "error: nested too deeply for a recipe\n  where    bad.yaml:1:7\n  allowed  40 levels\n"
    ),
    "billion laughs": recipe(
        "a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + LAUGHS,
        "error: too many values for a recipe, with its aliases expanded\n  where    bad.yaml:1:14\n  allowed  10,000\n",
    ),
    "a Python object": edited(
        "rate: 0.1",
        "rate: !!python/object/apply:os.mkdir [owned]",
        "error: a recipe holds plain values, no tags\n"
        "  where    tiny.yaml:5:36\n"
        "  found    !!python/object/apply:os.mkdir\n"
        "  hint     remove the tag\n",
    ),
    "a Python name": edited(
        "rate: 0.1",
        "rate: !!python/name:os.mkdir ''",
        "error: a recipe holds plain values, no tags\n"
        "  where    tiny.yaml:5:36\n"
        "  found    !!python/name:os.mkdir\n"
        "  hint     remove the tag\n",
    ),
    "nothing but a Python object": recipe(
        "!!python/object/new:os.mkdir [owned]\n",
        "error: a recipe holds plain values, no tags\n"
        "  where    bad.yaml:1:1\n"
        "  found    !!python/object/new:os.mkdir\n"
        "  hint     remove the tag\n",
    ),
    "a tag of one's own": edited(
        "rate: 0.1",
        "rate: !secret x",
        "error: a recipe holds plain values, no tags\n"
        "  where    tiny.yaml:5:36\n"
        "  found    !secret\n"
        "  hint     remove the tag\n",
    ),
    "10 MB": recipe(
        b"#" * 10_000_000,
        "error: too large for a recipe\n  where    bad.yaml\n  found    more than 1 MB\n  allowed  1 MB\n",
    ),
    "deep brackets": recipe(
        "[" * 5000, "error: nested too deeply for a recipe\n  where    bad.yaml\n  allowed  40 levels\n"
    ),
    "an empty recipe": recipe(
        "",
        "error: a recipe is a mapping of sections\n"
        "  where    bad.yaml:1:1\n"
        "  found    nothing\n"
        "  allowed  model, task, data, lora, dropout, train, generation, diagnostics, compare, seed\n"
        "  hint     `hkft recipes` lists recipes to start from\n",
    ),
    "a list": recipe(
        "- a\n- b\n",
        "error: a recipe is a mapping of sections\n"
        "  where    bad.yaml:1:1\n"
        "  found    [a, b]\n"
        "  allowed  model, task, data, lora, dropout, train, generation, diagnostics, compare, seed\n"
        "  hint     `hkft recipes` lists recipes to start from\n",
    ),
    "one word": recipe(
        "hello\n",
        "error: a recipe is a mapping of sections\n"
        "  where    bad.yaml:1:1\n"
        "  found    'hello'\n"
        "  allowed  model, task, data, lora, dropout, train, generation, diagnostics, compare, seed\n"
        "  hint     `hkft recipes` lists recipes to start from\n",
    ),
    "two documents": recipe(
        "seed: 1\n---\nseed: 2\n",
        "error: a second document starts here\n"
        "  where    bad.yaml:2:1\n"
        "  hint     a recipe is one document: remove the `---`\n",
    ),
    "a folder for a recipe": folder(
        "check --recipe .",
        lambda: None,
        2,
        "error: this is a folder, not a recipe\n  where    .\n  hint     name the .yaml file in it\n",
    ),
    "no recipe": folder(
        "check --recipe no.yaml",
        lambda: None,
        2,
        "error: there is no recipe 'no.yaml'\n  allowed  the path of a .yaml file, or one of quickstart, ...\n",
    ),
    "NaN": edited(
        "rate: 0.1",
        "rate: .nan",
        "error: not a value that can be read as float\n  where    tiny.yaml:5:36\n  found    '.nan'\n",
    ),
    "an infinite weight": edited(
        "weight: 0.5",
        "weight: .inf",
        "error: dropout.weight: not a finite number\n"
        "  where    tiny.yaml:5:49\n"
        "  found    .inf\n"
        "  allowed  a finite number\n",
    ),
    "an infinite learning rate": edited(
        "1.0e-2",
        "1e999",
        "error: train.learning_rate: not a finite number\n"
        "  where    tiny.yaml:6:24\n"
        "  found    .inf\n"
        "  allowed  a finite number\n",
    ),
    "infinite epochs": edited(
        "num_train_epochs: 2",
        "num_train_epochs: .inf",
        "error: train.num_train_epochs: not a finite number\n"
        "  where    tiny.yaml:6:50\n"
        "  found    .inf\n"
        "  allowed  a finite number\n",
    ),
    "a number of 5,000 digits": edited(
        "r: 4",
        "r: " + "9" * 5000,
        "error: not a value that can be read as int\n  where    tiny.yaml:4:11\n  found    '999...\n",
    ),
    "half a surrogate pair": edited(
        "name: ",
        'revision: "\\ud800", name: ',
        "error: model.revision: not Unicode: half a surrogate pair\n"
        "  where    tiny.yaml:2:19\n"
        "  found    '\\ud800'\n"
        "  allowed  a text\n",
    ),
    "modules by a broken pattern": edited(
        "[query, value]",
        "'('",
        "error: PEFT refuses the lora section: missing ), unterminated subpattern at position 0\n  where    lora\n",
    ),
    "a package that is not installed": edited(
        "1.0e-2",
        "1.0e-2, deepspeed: zero.json",
        "error: what the train section asks for is not installed\n  where    train.deepspeed\n  found    ...deepspeed...\n",
        code=4,
    ),
    "fewer data workers than none": edited(
        "1.0e-2",
        "1.0e-2, dataloader_num_workers: -1",
        "error: the train section cannot be trained with\n  where    train\n  found    num_workers...\n",
        args=TRAIN,
    ),
}

DATA = {
    "a csv with a BOM": rows("d.csv", "\ufeff" + CSV),
    "a csv with CRLF": rows("d.csv", CSV.replace("\n", "\r\n")),
    "JSON lines with a BOM and CRLF": rows("d.jsonl", "\ufeff" + LINES.replace("\n", "\r\n")),
    "labels of several kinds": rows("d.jsonl", LINES.replace('"positive"', "1")),
    "a field beyond csv's own limit": rows("d.csv", CSV + f"{'long' * 100_000},positive\n"),
    "no file": rows(
        "d.csv",
        "",
        "error: there is no such file\n  where    no.csv\n  hint     did you mean 'd.csv'?\n",
        "data.train=no.csv",
    ),
    "an empty file": rows("d.csv", "", "error: the file is empty\n  where    d.csv\n"),
    "blank lines": rows("d.csv", "\n \n", "error: the file is empty\n  where    d.csv\n"),
    "a header only": rows(
        "d.csv",
        "text,label\n",
        "error: the file has a header and no rows\n  where    d.csv\n  found    columns text, label\n",
    ),
    "binary": rows(
        "d.csv",
        bytes(range(256)),
        "error: this is not UTF-8 text\n"
        "  where    d.csv:2\n"
        "  found    byte 0x80\n"
        "  hint     save it as UTF-8 (in a spreadsheet: 'CSV UTF-8'), or convert it with iconv\n",
    ),
    "zero bytes": rows(
        "d.csv",
        CSV + "a\0b,positive\n",
        "error: this is binary, not text\n  where    d.csv:42\n  found    a zero byte\n",
    ),
    "invalid UTF-8": rows(
        "d.csv",
        CSV.encode() + b"caf\xe9,positive\n",
        "error: this is not UTF-8 text\n"
        "  where    d.csv:42\n"
        "  found    byte 0xe9\n"
        "  hint     save it as UTF-8 (in a spreadsheet: 'CSV UTF-8'), or convert it with iconv\n",
    ),
    "a spreadsheet's Unicode text": rows(
        "d.csv",
        CSV.encode("utf-16"),
        "error: this is not UTF-8 text\n"
        "  where    d.csv\n"
        "  found    UTF-16\n"
        "  hint     save it as UTF-8 (in a spreadsheet: 'CSV UTF-8'), or convert it with iconv\n",
    ),
    "a ragged csv": rows(
        "d.csv",
        CSV + "a,b,c\n",
        "error: 3 fields in a file of 2 columns\n"
        "  where    d.csv:42\n"
        "  found    a,b,c\n"
        "  allowed  one field each for text, label\n"
        "  hint     text that holds a ',' stands in double quotes: \"...\"\n",
    ),
    "an open quote": rows(
        "d.csv",
        CSV + '"never closed,positive\n',
        "error: the quotes of this record do not match\n"
        "  where    d.csv:42\n"
        "  found    unexpected end of data\n"
        '  hint     a quote inside a quoted field is written twice: ""\n',
    ),
    "another column": rows(
        "d.csv",
        CSV.replace("text", "sentence", 1),
        "error: there is no column 'text'\n"
        "  where    d.csv\n"
        "  found    sentence, label\n"
        "  hint     data.text names it; the first line is read as the header\n",
    ),
    "control codes in a header": rows(
        "d.csv",
        CSV.replace("text", "\x1b[31mtext", 1),
        "error: there is no column 'text'\n"
        "  where    d.csv\n"
        "  found    \\x1b[31mtext, label\n"
        "  hint     did you mean '\\x1b[31mtext'?\n",
    ),
    "two columns of one name": rows(
        "d.csv",
        CSV.replace("label", "text", 1),
        "error: two columns have one name\n  where    d.csv:1\n  found    text\n",
    ),
    "NaN for a target": rows(
        "d.csv",
        "text,label\na,1\nb,nan\nc,2\n",
        "error: row 1 (the first is 0) has a label that is no finite number\n"
        "  where    d.csv: label\n"
        "  found    'nan'\n",
        "task=regression",
    ),
    "a word for a target": rows(
        "d.csv",
        "text,label\na,1\nb,good\nc,2\n",
        "error: row 1 (the first is 0) has a label that is no finite number\n"
        "  where    d.csv: label\n"
        "  found    'good'\n"
        "  hint     labels that are names go with `task: classification`\n",
        "task=regression",
    ),
    "no labels": rows(
        "d.csv",
        "text,label\n" + "a,\nb,\n" * 20,
        "error: no row has a label\n"
        "  where    d.csv: label\n"
        "  hint     some test sets hide theirs: they can be predicted on, not trained or evaluated on\n",
    ),
    "one class": rows(
        "d.csv",
        CSV.replace("negative", "positive"),
        "error: every row has the same label: there is nothing to learn\n"
        "  where    d.csv: label\n"
        "  found    'positive'\n",
    ),
    "a label of its own for every row": rows(
        "d.csv",
        "text,label\n" + "".join(f"a {n},l{n}\n" for n in range(40)),
        "error: too few different texts of each class to draw a validation set from\n"
        "  where    d.csv\n"
        "  found    40 rows, 40 different, 40 classes\n"
        "  hint     is 'label' the column of the labels?\n",
    ),
    "a label that only validation has": rows(
        "v.csv",
        CSV + "a,unseen\n",
        "error: row 40 (the first is 0) has a label that training does not know\n"
        "  where    v.csv: label\n"
        "  found    'unseen'\n"
        "  allowed  negative, positive\n",
        "data.train=reviews.csv",
        "data.validation=v.csv",
    ),
    "an object for a text": rows(
        "d.json",
        json.dumps([{**each, "text": {"en": "a"}} for each in OBJECTS]),
        "error: column 'text' holds no text\n  where    d.json\n  found    {'en': 'a'}\n",
    ),
    "a list for a label": rows(
        "d.json",
        json.dumps([{**each, "label": [1]} for each in OBJECTS]),
        "error: a label is one value\n  where    d.json: label\n  found    [1]\n",
    ),
    "one object": rows(
        "d.json",
        json.dumps(OBJECTS[0]),
        "error: this JSON holds no rows\n  where    d.json\n  allowed  a list of objects, or one object a line\n",
    ),
    "a JSON of one number": rows(
        "d.json",
        "42",
        "error: this JSON holds no rows\n  where    d.json\n  allowed  a list of objects, or one object a line\n",
    ),
    "a JSON cut short": rows(
        "d.json",
        json.dumps(OBJECTS)[:-20],
        "error: this is not JSON\n  where    d.json:1:2180\n  found    Unterminated string starting at\n",
    ),
    "JSON nested without end": rows(
        "d.json",
        "[" * 100_000,
        "error: this JSON cannot be read\n  where    d.json:1\n  found    lists or objects nested too deeply\n",
    ),
    "lines of JSON nested without end": rows(
        "d.jsonl",
        LINES + "[" * 100_000,
        "error: this JSON cannot be read\n  where    d.jsonl:41\n  found    lists or objects nested too deeply\n",
    ),
    "a JSON number of 5,000 digits": rows(
        "d.jsonl",
        LINES + f'{{"text": "a", "label": {"9" * 5000}}}',
        "error: this JSON cannot be read\n  where    d.jsonl:41\n  found    a number of too many digits\n",
    ),
    "half a surrogate pair for a name": rows(
        "d.jsonl",
        LINES + '{"text": "a", "label": "b", "\\ud800": 1}',
        "error: column '\\ud800' holds text that is not Unicode (half a surrogate pair)\n  where    d.jsonl\n",
    ),
    "a gzip file cut short": rows(
        "d.csv.gz",
        gzip.compress(CSV.encode())[:-20],
        "error: the gzip file is damaged or cut short\n  where    d.csv.gz\n",
    ),
    "a parquet file cut short": rows(
        "d.parquet",
        PARQUET[: len(PARQUET) // 2],
        "error: this is not a parquet file that can be read\n"
        "  where    d.parquet\n"
        "  found    Parquet magic bytes not found...\n",
    ),
    "parquet with a damaged middle": rows(
        "d.parquet",
        PARQUET[:4] + b"\xff" * 40 + PARQUET[44:],
        "error: this is not a parquet file that can be read\n  where    d.parquet\n  found    ...\n",
    ),
    "parquet of text that is none": rows(
        "d.parquet",
        parquet(no_text(), LABELS),
        "error: this is not a parquet file that can be read\n"
        "  where    d.parquet\n"
        "  found    In column 0: Invalid: Invalid UTF8 sequence at string index 0\n",
    ),
    "parquet with two columns of one name": rows(
        "d.parquet",
        parquet(TEXTS, TEXTS, LABELS, names=("text", "text", "label")),
        "error: two columns have one name\n  where    d.parquet\n  found    text\n",
    ),
    "csv called parquet": rows(
        "d.parquet",
        CSV,
        "error: this is not a parquet file that can be read\n"
        "  where    d.parquet\n"
        "  found    Parquet magic bytes not found...\n",
    ),
    "parquet called csv": rows(
        "d.csv",
        PARQUET,
        "error: this is not UTF-8 text\n"
        "  where    d.csv:1\n"
        "  found    byte 0x80\n"
        "  hint     save it as UTF-8 (in a spreadsheet: 'CSV UTF-8'), or convert it with iconv\n",
    ),
    "an unknown ending": rows(
        "d.xlsx",
        CSV,
        "error: the file's ending names no format hkft reads\n"
        "  where    d.xlsx\n"
        "  allowed  csv, tsv, json, jsonl, ndjson, parquet (.gz too)\n",
    ),
    "a folder for a file": rows(
        "d.csv",
        CSV,
        "error: this is a folder, not a file\n"
        "  where    bert\n"
        "  found    config.json, tokenizer.json, tokenizer_config.json\n",
        "data.train=bert",
    ),
    "a name that is too long": rows(
        "d.csv",
        CSV,
        "error: the file cannot be read\n  where    nnn...nnn.csv\n  found    File name too long\n",
        f"data.train={'n' * 300}.csv",
    ),
}

MODELS = {
    "no model": model(lambda: remove("bert"), not_loaded("...")),
    "a folder that is no model": model(
        lambda: [remove("bert"), Path("bert").mkdir()], not_loaded("a folder without config.json")
    ),
    "a file for a model": Case(
        4,
        f"{TRAIN} --set=model.name=reviews.csv",
        not_loaded("It looks like the config file at 'reviews.csv' is not a valid JSON file.", "reviews.csv"),
    ),
    "a broken config.json": model(
        lambda: write("bert/config.json", "{"),
        not_loaded("It looks like the config file at 'bert/config.json' is not a valid JSON file."),
    ),
    "a list for config.json": model(lambda: write("bert/config.json", "[]"), not_loaded("...mapping, not list")),
    "a word for a size": model(
        lambda: changed("bert/config.json", hidden_size="many"), not_loaded("...'hidden_size' expected int, got str...")
    ),
    "heads that do not divide the size": model(
        lambda: changed("bert/config.json", num_attention_heads=5),
        not_loaded("The hidden size (32) is not a multiple of the number of attention heads (5)"),
    ),
    "an unknown architecture": model(
        lambda: changed("bert/config.json", model_type="nonsense"), not_loaded("...model type `nonsense`...")
    ),
    "an encoder to generate with": model(
        lambda: None,
        "error: bert is no causal language model\n"
        "  where    model.name\n"
        "  found    bert\n"
        "  allowed  a decoder, such as GPT-2, Llama or Qwen, for task generation\n",
        f"{TRAIN} --set=task=generation --set=data.text=null --set=data.label=null --set=data.prompt=text --set=data.completion=label",
    ),
    "code of its own": model(own_code, not_loaded("it needs code of its own")),
    "sizes of another model": model(
        lambda: changed("bert/config.json", hidden_size=48),
        "error: the model's weights do not fit its configuration\n"
        "  where    model.name\n"
        "  found    bert.embeddings.LayerNorm.bias [32], where [48] fits; 35 such\n"
        "  hint     config.json and the weights are of one model\n",
    ),
    "layers that the weights lack": model(
        lambda: changed("bert/config.json", num_hidden_layers=4),
        "error: the model's weights do not fit its configuration\n"
        "  where    model.name\n"
        "  found    no bert.encoder.layer.2.attention.output.LayerNorm.bias; 32 such\n"
        "  hint     config.json and the weights are of one model\n",
    ),
    "no weights": model(
        lambda: remove("bert/model.safetensors"),
        not_loaded("Error no file named model.safetensors found in directory bert."),
    ),
    "weights cut short": model(lambda: torn("bert/model.safetensors"), no_safetensors("...incomplete metadata...")),
    "weights cut short, before training": model(
        lambda: torn("bert/model.safetensors"), no_safetensors("...incomplete metadata..."), CHECK
    ),
    "heads that do not divide the size, before training": model(
        lambda: changed("bert/config.json", num_attention_heads=5),
        not_loaded("The hidden size (32) is not a multiple of the number of attention heads (5)"),
        CHECK,
    ),
    "a negative size, before training": model(
        lambda: changed("bert/config.json", intermediate_size=-3), not_loaded("...negative dimension -3..."), CHECK
    ),
    "pickled weights": model(
        lambda: pickled("bert/pytorch_model.bin", "bert/model.safetensors"),
        "error: the weights are pickled, and opening a pickle runs the code in it\n"
        "  where    bert\n"
        "  found    pytorch_model.bin\n"
        "  allowed  *.safetensors\n"
        "  hint     where you trust them: ...\n",
    ),
    "pickled weights, before training": model(
        lambda: pickled("bert/pytorch_model.bin", "bert/model.safetensors"),
        "error: the weights are pickled, and opening a pickle runs the code in it\n"
        "  where    bert\n"
        "  found    pytorch_model.bin\n"
        "  allowed  *.safetensors\n"
        "  hint     where you trust them: ...\n",
        CHECK,
    ),
    "a pickle called safetensors": model(
        lambda: pickled("bert/model.safetensors"), no_safetensors("Error while deserializing header: header too large")
    ),
    "an index that leads out of the folder": model(
        lambda: indexed("../elsewhere.safetensors"),
        "error: the index leads out of the model's folder\n"
        "  where    bert/model.safetensors.index.json\n"
        "  found    ../elsewhere.safetensors\n"
        "  allowed  names of files beside the index\n"
        "  hint     such a model was not made in good faith: do not use it\n",
    ),
    "an index to anywhere": model(
        lambda: indexed(str(Path("elsewhere.safetensors").resolve())),
        "error: the index leads out of the model's folder\n"
        "  where    bert/model.safetensors.index.json\n"
        "  found    .../elsewhere.safetensors\n"
        "  allowed  names of files beside the index\n"
        "  hint     such a model was not made in good faith: do not use it\n",
    ),
    "an index to a pickle": model(
        lambda: [indexed("weights.bin"), pickled("bert/weights.bin")],
        "error: the weights are pickled, and opening a pickle runs the code in it\n"
        "  where    bert/model.safetensors.index.json\n"
        "  found    weights.bin\n"
        "  allowed  *.safetensors\n"
        "  hint     where you trust them: ...\n",
    ),
    "a broken index": model(
        lambda: [indexed("a.safetensors"), torn("bert/model.safetensors.index.json")],
        "error: the file is damaged or incomplete\n"
        "  where    bert/model.safetensors.index.json\n"
        "  found    no weight_map could be read\n"
        "  hint     fetch or copy it once more\n",
    ),
    "no tokenizer": model(
        lambda: remove("bert/tokenizer.json", "bert/tokenizer_config.json"),
        "error: the model has no tokenizer, or one without words\n"
        "  where    model.name\n"
        "  found    bert\n"
        "  hint     its folder holds tokenizer.json, or the files that its kind of tokenizer reads\n",
    ),
    "a broken tokenizer": model(lambda: write("bert/tokenizer.json", "{"), not_loaded("Expecting property name...")),
    "no padding token": model(
        lambda: changed("bert/tokenizer_config.json", pad_token=None),
        "error: the tokenizer has neither a padding nor an end-of-sequence token: no batch can be built\n"
        "  where    bert\n"
        "  hint     set `pad_token` in its tokenizer_config.json\n",
    ),
    "more words than embeddings": model(
        far_words,
        "error: the tokenizer has tokens that the model has no embeddings for\n"
        "  where    model.name\n"
        "  found    'and' is token 110\n"
        "  allowed  tokens below 32, as many as the model's vocab_size\n"
        "  hint     load the model with transformers, call resize_token_embeddings(len(tokenizer)), and save both\n",
    ),
    "a padding token beyond the embeddings": model(
        added_padding,
        "error: the tokenizer has tokens that the model has no embeddings for\n"
        "  where    model.name\n"
        "  found    '<added>' is token 32\n"
        "  allowed  tokens below 32, as many as the model's vocab_size\n"
        "  hint     load the model with transformers, call resize_token_embeddings(len(tokenizer)), and save both\n",
    ),
}

PICKLED_ADAPTER = (
    "error: the weights are pickled, and opening a pickle runs the code in it\n"
    "  where    run/adapter\n"
    "  found    adapter_model.bin\n"
    "  allowed  *.safetensors\n"
    "  hint     where you trust them: ...\n"
)

ADAPTERS = {
    "no adapter": folder(
        EVAL,
        lambda: remove("run/adapter"),
        2,
        "error: the run has no best adapter\n"
        "  where    run/adapter\n"
        "  allowed  best, last, or the path of an adapter folder\n"
        "  hint     the run may have ended before its first evaluation\n",
    ),
    "an adapter without its weights": folder(
        EVAL,
        lambda: remove("run/adapter/adapter_model.safetensors"),
        4,
        "error: there are no weights\n  where    run/adapter\n  allowed  adapter_model.safetensors\n",
    ),
    "an adapter cut short": folder(
        EVAL,
        lambda: torn("run/adapter/adapter_model.safetensors"),
        4,
        "error: the adapter does not fit the base model\n"
        "  where    run/adapter\n"
        "  found    Error while deserializing header: incomplete metadata, file not fully covered\n"
        "  hint     was it trained on another model, or with another number of labels?\n",
    ),
    "a pickled adapter": folder(
        EVAL,
        lambda: pickled("run/adapter/adapter_model.bin", "run/adapter/adapter_model.safetensors"),
        4,
        PICKLED_ADAPTER,
    ),
    "a pickle called adapter_model.safetensors": folder(
        EVAL,
        lambda: pickled("run/adapter/adapter_model.safetensors"),
        4,
        "error: the adapter does not fit the base model\n"
        "  where    run/adapter\n"
        "  found    Error while deserializing header: header too large\n"
        "  hint     was it trained on another model, or with another number of labels?\n",
    ),
    "a pickled adapter to merge": folder(
        "merge run/adapter --output merged",
        lambda: pickled("run/adapter/adapter_model.bin", "run/adapter/adapter_model.safetensors"),
        4,
        PICKLED_ADAPTER,
    ),
    "a broken adapter_config.json": folder(
        EVAL,
        lambda: write("run/adapter/adapter_config.json", "{"),
        4,
        "error: the adapter does not fit the base model\n"
        "  where    run/adapter\n"
        "  found    Expecting property name enclosed in double quotes: line 1 column 2 (char 1)\n"
        "  hint     was it trained on another model, or with another number of labels?\n",
    ),
    "a list for adapter_config.json": folder(
        EVAL,
        lambda: write("run/adapter/adapter_config.json", "[]"),
        4,
        "error: the adapter does not fit the base model\n"
        "  where    run/adapter\n"
        "  found    list indices must be integers or slices, not str\n"
        "  hint     was it trained on another model, or with another number of labels?\n",
    ),
    "a word for the rank": folder(
        EVAL,
        lambda: changed("run/adapter/adapter_config.json", r="many"),
        4,
        "error: the adapter does not fit the base model\n"
        "  where    run/adapter\n"
        "  found    '<=' not supported between instances of 'str' and 'int'\n"
        "  hint     was it trained on another model, or with another number of labels?\n",
    ),
    "a broken pattern of modules": folder(
        "merge run --output merged --no-verify",
        lambda: changed("run/adapter/adapter_config.json", target_modules="("),
        4,
        "error: the adapter does not fit the base model\n"
        "  where    run/adapter\n"
        "  found    missing ), unterminated subpattern at position 0\n",
    ),
    "another base": folder(
        "eval run/adapter --recipe tiny.yaml --set=model.name=bert",
        of_another_size,
        4,
        "error: the adapter does not fit the base model\n"
        "  where    run/adapter\n"
        "  found    Error(s) in loading...: size mismatch for base_model.model.bert.encoder.layer.0.attention.self.query.lora_A.default.weight: copying a param with shape torch.Size([4, 32]) from checkpoint, the shape in current model is torch.Size([4, 48]).\n"
        "  hint     was it trained on another model, or with another number of labels?\n",
    ),
    "an adapter alone": folder(
        "eval run/adapter",
        lambda: None,
        2,
        "error: an adapter alone does not say what its task and its data are\n"
        "  where    run/adapter\n"
        "  hint     --recipe names the recipe it was trained with, or one like it\n",
    ),
}

RUNS = {
    "no run": folder(
        EVAL,
        lambda: remove("run"),
        2,
        "error: there is no such folder\n  where    run\n  allowed  a run folder, or an adapter folder\n",
    ),
    "an empty folder for a run": folder(
        EVAL,
        lambda: [remove("run"), Path("run").mkdir()],
        2,
        "error: this is neither a run folder nor an adapter folder\n"
        "  where    run\n"
        "  allowed  a folder with summary.json, or with adapter_config.json\n",
    ),
    "an empty folder to compare": folder(
        "compare run bert",
        lambda: None,
        2,
        "error: this is neither a run folder nor a curve of another tool\n"
        "  where    bert\n"
        "  allowed  a folder that `hkft train` or `hkft compare` has written, a trainer_state.json, a table of losses\n",
    ),
    "a run without summary.json": folder(
        "diagnose run",
        lambda: remove("run/summary.json"),
        3,
        "error: a file of this run is missing\n"
        "  where    run/summary.json\n"
        "  hint     the run cannot be used without it\n",
    ),
    "a torn summary.json": folder(
        "diagnose run",
        lambda: torn("run/summary.json"),
        3,
        "error: a file of this run is damaged\n"
        "  where    run/summary.json\n"
        "  hint     the run cannot be used without it\n",
    ),
    "a list for summary.json": folder(
        "compare run",
        lambda: write("run/summary.json", "[]"),
        3,
        "error: a file of this run is damaged\n"
        "  where    run/summary.json\n"
        "  hint     the run cannot be used without it\n",
    ),
    "a summary.json without anything": folder(
        "compare run",
        lambda: write("run/summary.json", "{}"),
        3,
        "error: a file of this run lacks 'status'\n"
        "  where    run/summary.json\n"
        "  hint     the run cannot be used without it\n",
    ),
    "a line of predictions without a label": folder(
        "diagnose run",
        lambda: write("run/predictions/validation.jsonl", '{"id": 0, "logits": [0.0, 1.0]}\n'),
        3,
        "error: a file of this run lacks 'label'\n"
        "  where    run/predictions/validation.jsonl\n"
        "  hint     the run cannot be used without it\n",
    ),
    "predictions of other classes": folder(
        "diagnose run",
        lambda: changed("run/splits.json", labels=["no", "yes"]),
        3,
        "error: the labels of this run's rows are not those of its classes\n"
        "  where    run/predictions/train_probe.jsonl\n"
        "  found    negative, positive\n"
        "  allowed  no, yes\n",
    ),
    "a run of a later hkft": folder(
        EVAL,
        lambda: changed("run/summary.json", schema_version=99),
        3,
        "error: a later version of hkft has written this run\n"
        "  where    run/summary.json: schema_version\n"
        "  found    99\n"
        "  allowed  up to 1\n"
        "  hint     pip install --upgrade hkft\n",
    ),
    "a run of a later hkft to diagnose": folder(
        "diagnose run",
        lambda: changed("run/summary.json", schema_version=99),
        3,
        "error: a later version of hkft has written this run\n"
        "  where    run/summary.json: schema_version\n"
        "  found    99\n"
        "  allowed  up to 1\n"
        "  hint     pip install --upgrade hkft\n",
    ),
    "a run without environment.json": folder(
        EVAL,
        lambda: remove("run/environment.json"),
        3,
        "error: a file of this run is missing\n"
        "  where    run/environment.json\n"
        "  hint     the run cannot be used without it\n",
    ),
    "a torn environment.json": folder(
        "compare run",
        lambda: torn("run/environment.json"),
        3,
        "error: a file of this run is damaged\n"
        "  where    run/environment.json\n"
        "  hint     the run cannot be used without it\n",
    ),
    "an environment.json without anything": folder(
        EVAL,
        lambda: write("run/environment.json", "{}"),
        3,
        "error: a file of this run lacks 'data'\n"
        "  where    run/environment.json\n"
        "  hint     the run cannot be used without it\n",
    ),
    "a run without splits.json": folder(
        EVAL,
        lambda: remove("run/splits.json"),
        3,
        "error: a file of this run is missing\n"
        "  where    run/splits.json\n"
        "  hint     the run cannot be used without it\n",
    ),
    "a torn splits.json": folder(
        "merge run --output merged",
        lambda: torn("run/splits.json"),
        3,
        "error: a file of this run is damaged\n"
        "  where    run/splits.json\n"
        "  hint     the run cannot be used without it\n",
    ),
    "a splits.json without anything": folder(
        EVAL,
        lambda: write("run/splits.json", "{}"),
        3,
        "error: a file of this run lacks 'labels'\n"
        "  where    run/splits.json\n"
        "  hint     the run cannot be used without it\n",
    ),
    "other labels than the adapter's": folder(
        EVAL,
        lambda: changed("run/splits.json", labels=["a", "b", "c"]),
        4,
        "error: the adapter does not fit the base model\n"
        "  where    run/adapter\n"
        "  found    Error(s) in loading...: size mismatch for base_model.model.classifier.modules_to_save.default.weight: copying a param with shape torch.Size([2, 32]) from checkpoint, the shape in current model is torch.Size([3, 32]).\n"
        "  hint     was it trained on another model, or with another number of labels?\n",
    ),
    "a run without resolved.yaml": folder(
        EVAL,
        lambda: remove("run/resolved.yaml"),
        3,
        "error: a file of this run is missing\n"
        "  where    run/resolved.yaml\n"
        "  hint     the run cannot be used without it\n",
    ),
    "a torn resolved.yaml": folder(
        EVAL,
        lambda: write("run/resolved.yaml", "model: {name: bert\n"),
        2,
        "error: a bracket is not closed, or a comma is missing\n"
        "  where    run/resolved.yaml:2:1\n"
        "  hint     close every [ with ] and every { with }\n",
    ),
    "a run without metrics.jsonl": folder("diagnose run", lambda: remove("run/metrics.jsonl"), 0),
    "a metrics.jsonl of other things": folder(
        "diagnose run", lambda: write("run/metrics.jsonl", b"[]\n3\n{}\n\xff\n"), 0
    ),
    "a torn metrics.jsonl": folder("diagnose run", lambda: torn("run/metrics.jsonl"), 0),
    "lines to predict that are no JSON": Case(
        3,
        "predict run --input in.jsonl",
        "error: not a line of JSON\n  where    in.jsonl:2\n  found    b: Expecting value: line 1 column 1 (char 0)\n",
        {"in.jsonl": '{"text": "a"}\nb\n'},
    ),
    "lines to predict without the text": Case(
        3,
        "predict run --input in.jsonl",
        "error: record 1 has no 'text'\n  where    in.jsonl\n  found    sentence\n  hint     data.text names it\n",
        {"in.jsonl": '{"sentence": "a"}\n'},
    ),
    "lines to predict that are binary": Case(
        3,
        "predict run --input in.jsonl",
        "error: this is not UTF-8 text\n  where    in.jsonl\n  found    byte 0x80\n",
        {"in.jsonl": bytes(range(128, 256))},
    ),
    "lines to predict nested without end": Case(
        3,
        "predict run --input in.jsonl",
        "error: not a line of JSON\n"
        "  where    in.jsonl:1\n"
        "  found    [[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[: maximum recursion depth exceeded while decoding a JSON array from a unicode string\n",
        {"in.jsonl": "[" * 100_000},
    ),
}

CASES = {**RECIPES, **DATA, **MODELS, **ADAPTERS, **RUNS}


def pattern(said: str) -> str:
    return re.escape(said).replace(re.escape("..."), ".*")


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_one_message(hkft, tiny, run, tiny_bert, case):
    assert sum(map(len, (RECIPES, DATA, MODELS, ADAPTERS, RUNS))) == len(CASES) >= 60
    shutil.copytree(tiny_bert, "bert")
    text = tiny.read_text(encoding="utf-8")
    assert case.edit[0] in text
    tiny.write_bytes(text.replace(*case.edit).encode() if case.edit[0] else text.encode())
    for name, content in case.files.items():
        write(name, content)
    case.make()
    ran = hkft(*case.args.split())
    told = ran.err[ran.err.index("error: ") :] if "error: " in ran.err else ""
    assert (ran.code, "Traceback" in ran.err) == (case.code, False), ran.err
    assert re.fullmatch(pattern(case.said), told, re.DOTALL), told
    assert not Path("owned").exists()
    assert not Path("out").exists()
