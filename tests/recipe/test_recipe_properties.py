"""Whatever text is a recipe: it is read, or refused with a RecipeError, and soon."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hkft.errors import RecipeError
from hkft.recipe import load
from hkft.recipe.fields import CLASSES, installed
from hkft.recipe.schema import SECTIONS, Schema
from hkft.recipe.text import dump, parse

KEYS = [*Schema.model_fields, *(key for section in SECTIONS.values() for key in section.model_fields), "sites", "<<"]
KEYS += [key for section in CLASSES for key in list(installed(section))[:20]]
MARKS = [
    "{",
    "}",
    "[",
    "]",
    ":",
    ": ",
    ",",
    "- ",
    "\n",
    "\n  ",
    "\t",
    "&a ",
    "*a",
    "!!",
    "!x ",
    "'",
    '"',
    "|",
    ">",
    "#",
    "---",
    "%",
    "@",
    "\0",
]
WORDS = st.sampled_from(
    [*MARKS, *KEYS, "1e999", ".nan", "-.inf", "0o9", "0x", "~", "true", "\ud800", "\x85", "\u2028", "9" * 5000]
)

scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(KEYS)
trees = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=4), inner, max_size=4)
    ),
    max_leaves=12,
)
VALID = """\
model: {name: m, quantization: none}
task: classification
data: {train: t.csv, validation: 0.25, text: [a, b], label: l, filter: {c: [1, x]}}
lora: {r: 4, lora_alpha: 8, target_modules: [query, value]}
dropout: {sites: [{position: hidden, pattern: column, layers: [1]}], consistency: {kind: kl}}
train: {learning_rate: 1.0e-2, num_train_epochs: 2, bf16: off}
diagnostics: {evals_per_epoch: 2}
seed: 1
"""

quick = settings(
    max_examples=150,
    deadline=2000,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@pytest.fixture
def read(tmp_path: Path):
    """Read a text, or bytes, as a recipe, with what is to be set on it."""
    path = tmp_path / "r.yaml"

    def go(content: str | bytes, *overrides: str) -> None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
        try:
            recipe = load(path, overrides)
        except RecipeError as error:
            told = [problem.message for problem in error.problems]
        else:
            told = [recipe.resolved()]
            assert parse(told[0], "again").value == parse(dump(recipe.values()), "again").value
        assert told and all(told)

    return go


@quick
@given(content=st.binary(max_size=200) | st.text(max_size=200))
def test_any_text(read, content):
    read(content)


@quick
@given(words=st.lists(WORDS, max_size=30))
def test_any_marks_of_yaml(read, words):
    read("".join(words))


@quick
@given(tree=trees)
def test_any_structure(read, tree):
    read(yaml.safe_dump(tree))


@quick
@given(section=st.sampled_from([*SECTIONS, *CLASSES]), values=st.dictionaries(st.sampled_from(KEYS), trees, max_size=4))
def test_any_section(read, section, values):
    read(yaml.safe_dump({**yaml.safe_load(VALID), section: values}))


@quick
@given(data=st.data())
def test_a_valid_recipe_with_something_else_in_it(read, data):
    start = data.draw(st.integers(0, len(VALID)))
    end = data.draw(st.integers(start, min(len(VALID), start + 12)))
    read(VALID[:start] + data.draw(WORDS) + VALID[end:])


@quick
@given(
    key=st.lists(st.sampled_from([*KEYS, "0", "-1", "", "x"]), min_size=1, max_size=4),
    value=WORDS | st.text(max_size=10),
)
def test_any_override(read, key, value):
    read(VALID, f"{'.'.join(key)}={value}")
