"""A recipe's data section -> its train, validation and test rows."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from xxhash import xxh3_128_digest

from hkft.data import cache
from hkft.data.holdout import draw, draw_groups, hold_out
from hkft.data.rows import DataRecipe, canonical, rows
from hkft.data.sources import LARGE, batches_of, column_of, content_of, picked, read, written
from hkft.errors import DataError, SetupError, UsageError
from hkft.events import Event, Listener, Notice

__all__ = ["Splits", "fingerprint", "load", "rows"]

NAMES = ("train", "validation", "test")
FACTS = ("labels", "fingerprints", "duplicates")
READ = (  # keys of `data` that rows depend on
    *NAMES,
    *("filter", "text", "label", "prompt", "completion", "messages", "train_rows", "validation_rows"),
)
TEST_SEED = 0  # of a test set that is a fraction of train: the same rows whatever the run's seed


@dataclass(frozen=True)
class Splits:
    """Canonical rows (see `rows`) of each split that was asked for, None for the others.

    labels: the class names in the order of their indices; None in regression.
    fingerprints: split -> sha256 of its rows, the same on every machine.
    duplicates: validation rows whose text, or prompt, stands in train too, letter case and white space aside; 0 unless
        both were asked for.
    """

    train: datasets.Dataset | None
    validation: datasets.Dataset | None
    test: datasets.Dataset | None
    labels: tuple[str, ...] | None
    fingerprints: dict[str, str]
    duplicates: int


def load(
    recipe: DataRecipe,
    tell: Listener,
    splits: Sequence[str] = ("train", "validation"),
    labels: Sequence[str] | None = None,
) -> Splits:
    """The rows a run works with: read, filtered, mapped to the classes of train, split and drawn with the seed.

    A fraction as `data.validation` is drawn from train by class, with repeats of one text on one side; in generation the
    completions of one prompt stay together, here and where so many rows are drawn. A fraction as `data.test` is drawn
    before it, the same rows for every seed. What is made of large sources is kept in the cache, by their content. `labels` gives the classes of an earlier run instead of those found in train.
    Raises what `rows` raises, and UsageError for a test set that the recipe does not name.
    """
    assert set(splits) <= set(NAMES), splits
    data, known = recipe.data, tuple(labels) if labels is not None else None
    if "test" in splits and data.test is None:
        raise UsageError("the recipe names no test set", where="data.test", hint="--set data.test=FILE")
    parts = {name: _fraction(name, value) for name in ("test", "validation") if _is_part(value := getattr(data, name))}
    own = {name for name in splits if name not in parts}
    if any(name in splits for name in parts) or (known is None and recipe.task == "classification"):
        own.add("train")
    sources = {name: _read(name, recipe, tell) for name in NAMES if name in own}

    def draw(tell: Listener) -> Splits:
        return _drawn(recipe, sources, parts, tell, splits, known)

    if sum(source.data.nbytes for source in sources.values()) <= LARGE:
        return draw(tell)
    return _kept(_key(recipe, sources, splits, known), draw, tell)


def _drawn(
    recipe: DataRecipe,
    sources: Mapping[str, datasets.Dataset],
    parts: Mapping[str, float],
    tell: Listener,
    splits: Sequence[str],
    known: tuple[str, ...] | None,
) -> Splits:
    """The rows of what was read; parts: its fractions of train, in the order they are drawn."""
    data = recipe.data
    taken: dict[str, datasets.Dataset] = {}
    if "train" in sources:
        train = canonical(sources["train"], str(data.train), recipe, known, tell)
        known, rest = train.labels, train.rows
        for name, fraction in parts.items():
            rest, taken[name] = _part(rest, fraction, recipe, TEST_SEED if name == "test" else recipe.seed, name)
        taken["train"] = rest
    for name in ("validation", "test"):
        if name in sources:
            taken[name] = canonical(sources[name], str(getattr(data, name)), recipe, known, tell).rows
    limits = {"train": data.train_rows, "validation": data.validation_rows}
    final = {name: _limited(taken[name], limits.get(name), recipe.seed, name, tell) for name in NAMES if name in splits}
    if "train" in final and recipe.task != "generation":
        _check_labels(final["train"], final.get("validation"), known, recipe, tell)
    both = {"train", "validation"} <= set(splits) and "validation" not in parts  # else equal ones are on one side
    repeated = _duplicates(final["train"], final["validation"], tell) if both else 0
    return Splits(
        final.get("train"),
        final.get("validation"),
        final.get("test"),
        known,
        {name: fingerprint(split) for name, split in final.items()},
        repeated,
    )


def _key(
    recipe: DataRecipe, sources: Mapping[str, datasets.Dataset], splits: Sequence[str], known: tuple[str, ...] | None
) -> str:
    """The key of all that `_drawn` gives and tells."""
    return cache.key(
        kind="splits",
        sources={name: content_of(source) for name, source in sources.items()},
        data={name: repr(getattr(recipe.data, name, None)) for name in READ},
        task=recipe.task,
        seed=recipe.seed,
        splits=sorted(splits),
        labels=known,
        versions=[datasets.__version__, platform.python_version()],
    )


def _kept(key: str, draw: Callable[[Listener], Splits], tell: Listener) -> Splits:
    """What `draw` gives, memory-mapped from the cache, where nothing is done if that has it: its notices are told again."""
    made: Splits | None = None
    notices: list[Notice] = []

    def heard(event: Event) -> None:
        if isinstance(event, Notice):
            notices.append(event)
        tell(event)

    def write(folder: Path) -> None:
        nonlocal made
        made = draw(heard)
        for name in made.fingerprints:
            split = getattr(made, name)
            written(batches_of(split, *split.column_names), folder / f"{name}.arrow")
        facts = {name: getattr(made, name) for name in FACTS}
        cache.write_facts(folder, {**facts, "notices": [asdict(notice) for notice in notices]})

    def opened(folder: Path) -> tuple[Splits, list[Notice]]:
        facts = cache.read_facts(folder)
        rows = {name: datasets.Dataset.from_file(str(folder / f"{name}.arrow")) for name in facts["fingerprints"]}
        labels = None if facts["labels"] is None else tuple(facts["labels"])
        given = {name: rows.get(name) for name in NAMES}
        found = Splits(**given, labels=labels, fingerprints=facts["fingerprints"], duplicates=facts["duplicates"])
        return found, [Notice(**notice) for notice in facts["notices"]]

    found = cache.stored(key, write, opened, tell)
    if found is None:
        return made or draw(tell)
    if made is None:
        for notice in found[1]:
            tell(notice)
    return found[0]


def fingerprint(split: datasets.Dataset) -> str:
    """sha256, in hexadecimal, of the rows: one line of JSON each, with the columns in the order of their names."""
    digest = hashlib.sha256()
    names = sorted(split.column_names)
    form = "{" + ", ".join(f"{json.dumps(name)}: %s" for name in names) + "}\n"
    for table in batches_of(split, *names):
        lines = map(form.__mod__, zip(*(_as_json(table.column(name)) for name in names), strict=True))
        digest.update("".join(lines).encode())
    return digest.hexdigest()


def _as_json(cells: pa.ChunkedArray) -> Iterator[str]:
    """Each cell as `json.dumps` writes it: that itself takes twice the time of all else that is done to a row."""
    plain = cells.null_count == 0
    if plain and pa.types.is_string(cells.type):
        return map(json.encoder.encode_basestring_ascii, cells.to_pylist())
    if plain and pa.types.is_integer(cells.type):
        return map(int.__repr__, cells.to_pylist())
    return map(json.dumps, cells.to_pylist())


def _read(name: str, recipe: DataRecipe, tell: Listener) -> datasets.Dataset:
    """The source of a split. What cannot be had is told with the key that asks for it."""
    try:
        return read(str(getattr(recipe.data, name)), tell)
    except SetupError as error:
        (problem,) = error.problems
        instead = f"--set data.{name}=FILE names a local one"
        if name == "validation":
            instead += ", --set data.validation=0.1 a part of train"
        hint = f"{problem.hint}, or {instead}" if problem.hint else instead
        told = replace(problem, where=f"data.{name}: {problem.where}", hint=hint)
        raise SetupError(problems=[told]) from error


def _is_part(value: Any) -> bool:
    return value is not None and not isinstance(value, str)


def _fraction(name: str, value: float) -> float:
    if isinstance(value, bool) or not 0 < value < 1:
        raise UsageError(
            f"as a number, the {name} set is a fraction of train",
            where=f"data.{name}",
            found=repr(value),
            allowed=f"0 < fraction < 1, or a reference such as hub:glue/sst2#{name}",
        )
    return value


def _check_labels(
    train: datasets.Dataset,
    validation: datasets.Dataset | None,
    names: tuple[str, ...] | None,
    recipe: DataRecipe,
    tell: Listener,
) -> None:
    """Raise DataError where the training rows that are left have one label; say which of theirs validation lacks."""
    seen = _labels(train)
    if len(seen) < 2:
        one = seen.pop() if names is None else names[seen.pop()]
        rows = f"{len(train):,} row{'s' * (len(train) != 1)}"
        raise DataError(
            "every training row has the same label: there is nothing to learn",
            where=recipe.data.train,
            found=f"{one!r} in {rows}",
            hint="data.train_rows leaves too few" if recipe.data.train_rows else None,
        )
    if names is not None and validation is not None:
        lacking = [names[index] for index in sorted(seen - _labels(validation))]
        if lacking:
            tell(Notice(f"no validation row is of class {', '.join(lacking)}", level="warning"))


def _labels(split: datasets.Dataset) -> set[Any]:
    return set(np.unique(column_of(split, "label")).tolist())


def groups_of(split: datasets.Dataset) -> np.ndarray:
    """[N], the number of each row's text or prompt, in the order of their first appearance: the same is one group."""
    return _digests(split).dictionary_encode().indices.to_numpy().astype(np.int64)


def _digests(split: datasets.Dataset) -> pa.Array:
    """16 bytes for each row that are the same where the example is: its text or its prompt, case and white space aside."""
    columns = [name for name in ("text", "text_pair", "prompt") if name in split.column_names]
    found: list[pa.Array] = []
    for table in batches_of(split, *columns):
        rows = zip(*(table.column(name).to_pylist() for name in columns), strict=True)
        plain = ("\n".join(" ".join(text.casefold().split()) for text in texts) for texts in rows)
        found.append(pa.array([xxh3_128_digest(text.encode()) for text in plain], pa.binary(16)))
    return pa.concat_arrays(found) if found else pa.array([], pa.binary(16))


def _part(
    rows: datasets.Dataset, fraction: float, recipe: DataRecipe, seed: int, name: str
) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Training rows without a part of them, and that part, called `name`."""
    groups = groups_of(rows)
    strata = column_of(rows, "label") if recipe.task == "classification" else np.zeros(len(groups), np.int64)
    held = hold_out(groups, strata, fraction, seed)
    if not held.any():
        classes = len(np.unique(strata))
        found = f"{len(groups):,} rows, {len(np.unique(groups)):,} different"
        raise DataError(
            f"too few different {'prompts' if recipe.task == 'generation' else 'texts of each class'} "
            f"to draw a {name} set from",
            where=recipe.data.train,
            found=f"{found}, {classes:,} classes" if recipe.task == "classification" else found,
            hint=f"is {recipe.data.label!r} the column of the labels?" if 2 * classes > len(groups) > 2 else None,
        )
    return picked(rows, np.flatnonzero(~held)), picked(rows, np.flatnonzero(held))


def _limited(split: datasets.Dataset, wanted: int | None, seed: int, name: str, tell: Listener) -> datasets.Dataset:
    if wanted is None:
        return split
    if wanted > len(split):
        tell(Notice(f"data.{name}_rows asks for {wanted:,} rows; there are {len(split):,}, all are used"))
    if wanted >= len(split):
        return split
    if "prompt" in split.column_names:
        return picked(split, draw_groups(groups_of(split), wanted, seed))
    return picked(split, draw(len(split), wanted, seed))


def _duplicates(train: datasets.Dataset, validation: datasets.Dataset, tell: Listener) -> int:
    among = pc.SetLookupOptions(value_set=_digests(train))
    count = int(np.count_nonzero(pc.call_function("is_in", [_digests(validation)], among)))
    if count:
        share = f"{count:,} of {len(validation):,} validation rows ({count / len(validation):.1%})"
        what = "have a prompt that is in train too" if "prompt" in train.column_names else "are in train too"
        tell(Notice(f"{share} {what}: the validation scores flatter", level="warning"))
    return count
