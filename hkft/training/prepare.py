"""What a run needs before there is a model: rows, split and tokenised, and transformers' arguments."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from itertools import chain, groupby
from operator import itemgetter
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from transformers import PreTrainedTokenizerBase, TrainingArguments

from hkft.data import cache, probe, splits, tokenise
from hkft.data.completions import IGNORED
from hkft.data.near import drawn, near_duplicates
from hkft.data.sources import batches_of, column_of, picked
from hkft.errors import DataError, RecipeError, SetupError, nearest
from hkft.evaluation.metrics import score
from hkft.events import Event, Listener, Notice, Sample, Stage
from hkft.folder import RunFolder
from hkft.model import build
from hkft.recipe import Recipe

LETTERS = 2_000_000  # of the rows of each set that are searched for near-duplicates: a second or two
BETWEEN = " / "  # the texts of a pair
PAIRS = 50  # of near-duplicates that are kept
SHOWN = 300  # letters of each end of a piece of the example that is shown
MOST_STEPS = 10_000_000
FEW = 20  # validation rows: the standard error of an accuracy is then 0.1 and more


@dataclass(frozen=True)
class Material:
    """What a run trains on: tokenised examples of each set, and what is needed to say what they are."""

    examples: dict[str, datasets.Dataset]  # train, train_probe, validation
    labels: tuple[str, ...] | None
    fingerprints: dict[str, str]
    duplicates: int
    tokenizer: PreTrainedTokenizerBase
    near_duplicates: dict[str, Any] | None  # validation rows compared, and pairs; None in generation

    @property
    def ids(self) -> dict[str, np.ndarray]:
        """Of each set the numbers of its rows in their source, [N]."""
        return {name: column_of(examples, "id") for name, examples in self.examples.items()}


def prepare(recipe: Recipe, tell: Listener) -> Material:
    """Rows, split and tokenised, with the probe: as many training rows as there are validation rows, labels in the same mix."""
    tell = _once(tell)
    tell(Stage("reading the data"))
    rows = splits.load(recipe, tell)
    assert rows.train is not None and rows.validation is not None
    tokenizer = build.tokenizer(recipe)
    encode = partial(tokenise.tokenise, tokenizer=tokenizer, max_length=recipe.data.max_length, tell=tell)
    examples = {
        name: encode(split, name=name, content=rows.fingerprints[name])
        for name, split in (("train", rows.train), ("validation", rows.validation))
    }
    if recipe.task == "generation":
        tell(sample(examples["train"], tokenizer))
    chosen = _probe(recipe, rows, examples)
    if not chosen:
        raise DataError(
            "no training row has a label like those of validation, so the gap cannot be measured like for like",
            where="data.validation",
        )
    examples["train_probe"] = picked(examples["train"], np.array(chosen))
    wanted = min(recipe.diagnostics.probe_size or len(rows.validation), len(rows.validation))
    if len(rows.validation) < FEW:
        tell(
            Notice(f"only {len(rows.validation)} validation rows: what is measured on them is mostly noise", "warning")
        )
    if len(chosen) < wanted and recipe.task != "generation":
        tell(
            Notice(f"the training rows allow a probe of {len(chosen):,} rows with validation's labels, not {wanted:,}")
        )
    near = _near_duplicates(recipe, rows, tell)
    return Material(examples, rows.labels, rows.fingerprints, rows.duplicates, tokenizer, near)


def _once(tell: Listener) -> Listener:
    """A listener to whom no notice is told twice: a cache that cannot be written would be, for every set."""
    said: set[Event] = set()

    def heard(event: Event) -> None:
        if not isinstance(event, Notice) or event not in said:
            tell(event)
        if isinstance(event, Notice):
            said.add(event)

    return heard


def _near_duplicates(recipe: Recipe, rows: splits.Splits, tell: Listener) -> dict[str, Any] | None:
    """Validation rows that nearly stand in train, looked for once in the same rows.

    Of prompts much is alike by design, so that they are left alone.
    """
    if recipe.task == "generation":
        return None
    name = cache.key(
        kind="near-duplicates",
        rows=[rows.fingerprints["train"], rows.fingerprints["validation"]],
        seed=recipe.seed,
        limits=[LETTERS, PAIRS, SHOWN],
        versions=[version(package) for package in ("numpy", "scipy", "scikit-learn")],
    )
    found = cache.kept_facts(name, lambda: _looked_for(recipe, rows, tell), tell)
    if fresh := found.pop("fresh"):
        share = f"{fresh:,} of {found['compared']:,} validation rows compared"
        tell(Notice(f"{share} nearly stand in train, for a word or a mark: report.html shows them", "warning"))
    return found


def _looked_for(recipe: Recipe, rows: splits.Splits, tell: Listener) -> dict[str, Any]:
    """How many rows were compared, how many have a near one in train, how many of these no equal one, and some of them."""
    assert rows.train is not None and rows.validation is not None
    tell(Stage("looking for near-duplicates"))
    letters = _letters(rows.train) / len(rows.train)
    most = int(min(max(LETTERS / max(letters, 1), 500), 20_000))
    of_train, of_validation = (
        picked(split, drawn(len(split), most, recipe.seed)) for split in (rows.train, rows.validation)
    )
    train, validation = (list(chain(*_texts(split))) for split in (of_train, of_validation))
    found, compared = near_duplicates(train, validation, most_rows=most, seed=recipe.seed)
    pairs = [
        {
            "validation_id": of_validation[near.validation]["id"],
            "train_id": of_train[near.train]["id"],
            "similarity": near.similarity,
            "validation_text": validation[near.validation][:SHOWN],
            "train_text": train[near.train][:SHOWN],
        }
        for near in found[:PAIRS]
    ]
    fresh = sum(near.similarity < 1 for near in found)
    return {"compared": compared, "found": len(found), "pairs": pairs, "fresh": fresh}


def _texts(split: datasets.Dataset) -> Iterator[list[str]]:
    """What the rows say, both texts of a pair, some rows at a time."""
    for table in batches_of(split, *_columns(split)):
        yield [BETWEEN.join(parts) for parts in zip(*map(pa.ChunkedArray.to_pylist, table.columns), strict=True)]


def _letters(split: datasets.Dataset) -> int:
    """Of all that the rows say."""
    columns = _columns(split)
    tables = batches_of(split, *columns)
    letters = sum(
        pc.call_function("sum", [pc.call_function("utf8_length", [cells])]).as_py()
        for table in tables
        for cells in table.columns
    )
    return letters + len(BETWEEN) * (len(columns) - 1) * len(split)


def _columns(split: datasets.Dataset) -> list[str]:
    return [name for name in ("text", "text_pair") if name in split.column_names]


def sample(examples: datasets.Dataset, tokenizer: PreTrainedTokenizerBase) -> Sample:
    """The first example, decoded, in pieces that are learned and pieces that are not; of a long piece its two ends."""
    first = examples[0]
    tokens = zip(first["input_ids"], [label != IGNORED for label in first["labels"]], strict=True)
    pieces = []
    for learned, run in groupby(tokens, key=itemgetter(1)):
        text = tokenizer.decode([token for token, _ in run])
        assert isinstance(text, str)
        pieces.append((text if len(text) <= 2 * SHOWN else f"{text[:SHOWN]} ... {text[-SHOWN:]}", learned))
    return Sample(tuple(pieces))


def _probe(recipe: Recipe, rows: splits.Splits, examples: dict[str, datasets.Dataset]) -> list[int]:
    size, seed = recipe.diagnostics.probe_size, recipe.seed
    if recipe.task == "generation":
        train, validation = (splits.groups_of(examples[name]) for name in ("train", "validation"))
        return probe.probe_of_prompts(train, validation, size, seed)
    assert rows.train is not None and rows.validation is not None
    train, validation = (column_of(split, "label") for split in (rows.train, rows.validation))
    return probe.probe_indices(train, validation, size, seed, recipe.task)


def arguments(recipe: Recipe, folder: RunFolder) -> TrainingArguments:
    """The recipe's `train` section as transformers' TrainingArguments, with what hkft decides itself."""
    try:
        return TrainingArguments(
            output_dir=str(folder.checkpoints),
            seed=recipe.seed,
            data_seed=recipe.seed,
            eval_strategy="no",  # looks.py looks and saves
            save_strategy="no",
            save_total_limit=2,
            remove_unused_columns=False,
            label_names=["labels"],
            logging_nan_inf_filter=False,
            disable_tqdm=True,
            use_cpu=build.device(recipe.model.device).type == "cpu",
            **recipe.train,
        )
    except (ValueError, TypeError) as error:
        raise RecipeError(f"transformers refuses the train section: {error}", where="train") from error
    except ImportError as error:
        missing = "train.deepspeed" if recipe.train.get("deepspeed") else "train"
        found = str(error).removeprefix("No package metadata was found for ").strip().splitlines()[0]
        raise SetupError("what the train section asks for is not installed", where=missing, found=found) from error


def step_counts(rows: int, settings: TrainingArguments) -> tuple[int, int]:
    """(optimizer steps in all, in one epoch), as Trainer counts them. Raises RecipeError for more than anybody trains."""
    batches = math.ceil(rows / (settings.train_batch_size * settings.world_size))
    per_epoch = max(1, math.ceil(batches / settings.gradient_accumulation_steps))
    total = settings.max_steps if settings.max_steps > 0 else math.ceil(settings.num_train_epochs * per_epoch)
    if total > MOST_STEPS:
        raise RecipeError(
            "no run makes so many steps",
            where="train.num_train_epochs",
            found=f"{total:,}",
            allowed=f"up to {MOST_STEPS:,}",
        )
    return total, per_epoch


def check_criterion(recipe: Recipe, material: Material) -> None:
    """Raise RecipeError where diagnostics.metric is none that the task has."""
    criterion = recipe.diagnostics.metric
    if criterion is None or criterion == "loss":
        return
    known = ["loss", *_metrics(recipe, material)]
    written = recipe.task == "generation" and criterion in recipe.generation.metrics
    if criterion not in known:
        raise RecipeError(
            f"{recipe.task} has no metric {criterion!r}",
            where="diagnostics.metric",
            allowed=", ".join(known),
            hint="set diagnostics.generate: text is written at the looks" if written else nearest(criterion, known),
        )


def _metrics(recipe: Recipe, material: Material) -> list[str]:
    """Names of what a look will tell beside the loss."""
    if recipe.task == "generation":
        return ["perplexity", "token_accuracy", *(recipe.generation.metrics if recipe.diagnostics.generate else ())]
    logits = torch.eye(max(2, len(material.labels or ()))).numpy() if material.labels else torch.ones(2, 1).numpy()
    return list(score(recipe.task, logits, logits.argmax(1)))
