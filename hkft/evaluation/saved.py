"""What was trained, loaded again: a run's adapter, or any PEFT adapter folder, on its base model."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hkft.data import splits, tokenise
from hkft.data.rows import rows as read_rows
from hkft.errors import SetupError, UsageError, first_line
from hkft.evaluation.completions import Completions
from hkft.evaluation.look import look
from hkft.evaluation.predict import Predictions
from hkft.events import Listener, Notice, Stage, silent
from hkft.folder import RunFolder, check_there, read_json, write_json, write_jsonl
from hkft.model import build, memory, pickles
from hkft.model.fused import fuse
from hkft.recipe import Recipe, load

Base = Callable[[Recipe, Sequence[str] | None, int | None], PreTrainedModel]


@dataclass(frozen=True)
class Saved:
    """A trained model in eval mode, and what it was trained with."""

    model: PeftModel
    tokenizer: PreTrainedTokenizerBase
    recipe: Recipe
    labels: tuple[str, ...] | None
    folder: RunFolder | None  # None: an adapter without a run
    adapter: Path


def find(source: str | Path, checkpoint: str = "best") -> tuple[RunFolder | None, Path]:
    """The run (if it is one) and the adapter folder that `source` and `checkpoint` name.

    source: a run folder or a PEFT adapter folder. checkpoint: "best", "last", or a path. Raises UsageError.
    """
    path = Path(source)
    if not path.exists():
        raise UsageError("there is no such folder", where=str(source), allowed="a run folder, or an adapter folder")
    if (path / "adapter_config.json").exists():
        return None, path
    folder = RunFolder(path)
    if not folder.exists:
        raise UsageError(
            "this is neither a run folder nor an adapter folder",
            where=str(source),
            allowed="a folder with summary.json, or with adapter_config.json",
        )
    adapter = {"best": folder.adapter, "last": folder.last_checkpoint()}.get(checkpoint, Path(checkpoint))
    if adapter is None or not (adapter / "adapter_config.json").exists():
        raise UsageError(
            f"the run has no {checkpoint} adapter",
            where=str(adapter or folder.checkpoints),
            allowed="best, last, or the path of an adapter folder",
            hint="the run may have ended before its first evaluation",
        )
    return folder, adapter


def load_saved(
    source: str | Path,
    *,
    checkpoint: str = "best",
    recipe: str | Path | None = None,
    overrides: Sequence[str] = (),
    tell: Listener = silent,
    base: Base = build.base,
) -> Saved:
    """Load a run or an adapter for use. An adapter without a run needs `recipe`, which says base, task and data.

    base: gives the base model of a recipe, its labels and its padding. The labels are those of the run, never those of the data it is now shown. Raises UsageError, SetupError, RecipeError.
    """
    folder, adapter = find(source, checkpoint)
    if folder is None and recipe is None:
        raise UsageError(
            "an adapter alone does not say what its task and its data are",
            where=str(adapter),
            hint="--recipe names the recipe it was trained with, or one like it",
        )
    read, labels, tokenizer = described(folder, recipe, overrides, tell)
    tell(Stage(f"loading {read.model.name}"))
    with memory.while_loading(read):
        model = adapted(base(read, labels, build.padding_id(tokenizer)), adapter).eval()
    return Saved(model, tokenizer, read, labels, folder, adapter)


def described(
    folder: RunFolder | None, recipe: str | Path | None, overrides: Sequence[str], tell: Listener = silent
) -> tuple[Recipe, tuple[str, ...] | None, PreTrainedTokenizerBase]:
    """Recipe, labels and tokenizer of a run, or of a recipe in its stead. Raises SetupError, RecipeError."""
    read = load(recipe if recipe is not None else str(_resolved(folder)), overrides)
    labels, tokenizer = _labels(folder, read, tell), build.tokenizer(read)
    tokenise.ensure_padding(tokenizer, silent)
    return read, labels, tokenizer


def examples_of(saved: Saved, split: str, tell: Listener = silent) -> Any:
    """Tokenised examples of "validation", "test" or "train" of the recipe, or of any file or reference given as `split`.

    A run's train and validation rows are the very rows it had, drawn again with its seed; where its data has changed
    since, or `--set` has, that is said.
    """
    recipe = saved.recipe
    if split in splits.NAMES:
        drawn = splits.load(recipe, tell, (split,), saved.labels)
        chosen, content = getattr(drawn, split), drawn.fingerprints[split]
        trained_with = saved.folder and _fingerprint(saved.folder, split)
        if trained_with and content != trained_with:
            tell(Notice(f"these {split} rows are not those the run was trained with", "warning"))
    else:
        chosen = read_rows(split, recipe, saved.labels, tell)
        content = splits.fingerprint(chosen)
    return tokenise.tokenise(chosen, saved.tokenizer, recipe.data.max_length, tell, name=split, content=content)


def evaluate(
    saved: Saved, split: str = "validation", tell: Listener = silent, examples: Any = None
) -> Predictions | Completions:
    """Predictions on a split, computed as training computes them at every look, so the numbers are the same.

    Of a decoder also the text it writes, and the scores of `generation.metrics`, unless that is empty. examples: those of
    the split, where they are there already.
    """
    recipe = saved.recipe
    examples = examples_of(saved, split, tell) if examples is None else examples
    with memory.while_looking(recipe):
        seen = look(
            saved.model,
            saved.tokenizer,
            examples,
            recipe,
            batch_size=recipe.train["per_device_eval_batch_size"],
            write_text=bool(recipe.generation.metrics),
            tell=tell,
            looking=f"evaluating {split}",
            writing=f"writing for {split}",
        )
    if isinstance(seen, Completions) and seen.written:
        scored = f"text was written for {len(seen.written.texts):,} prompts"
        signed = f"; BLEU is sacrebleu's {seen.written.signature}" if seen.written.signature else ""
        tell(Notice(scored + signed))
    return seen


def keep(saved: Saved, split: str, predictions: Predictions | Completions) -> str | None:
    """Write a run's predictions on its test set, or on another file, into its folder; None where nothing is written.

    Those of the probe and of validation are training's own, of its best step, and stay. What the best adapter gives on the
    test set of the run's own recipe stands in summary.json too, as `test`.
    """
    if saved.folder is None or split in ("train", "validation"):
        return None
    stem = Path(split.partition("#")[0]).stem
    taken = {"train_probe", *splits.NAMES}  # by the run's own rows
    summary = read_json(saved.folder.summary)
    same = saved.recipe.fingerprint() == summary.get("recipe_fingerprint") and saved.adapter == saved.folder.adapter
    name = f"file-{stem}" if split != "test" and stem in taken else stem
    target = saved.folder.predictions("test-other" if split == "test" and "test" in summary and not same else name)
    records = predictions.records(saved.labels)
    write_jsonl(target, records)
    if split == "test" and same:
        rows = json.dumps([(record["id"], record["label"]) for record in records])
        told = {"test": predictions.metrics(), "test_rows": hashlib.sha256(rows.encode()).hexdigest()}
        write_json(saved.folder.summary, {**summary, **told})
    return str(target)


def adapted(base: PreTrainedModel, adapter: Path) -> PeftModel:
    """The base model with the adapter's weights, every one of them. Raises SetupError where they do not fit."""
    pickles.refuse(adapter)
    if not (adapter / "adapter_model.safetensors").exists():  # PEFT would look for it on the hub
        raise SetupError("there are no weights", where=str(adapter), allowed="adapter_model.safetensors")
    try:
        with warnings.catch_warnings():
            # PEFT leaves what it does not find at its first value, which is no adapter at all
            warnings.filterwarnings("error", message="Found missing adapter keys")
            model = PeftModel.from_pretrained(base, str(adapter))
    except Exception as error:  # the border to a foreign library: whatever it raises is about this adapter
        reason = f"no {error}" if isinstance(error, KeyError) else first_line(error)
        raise SetupError(
            "the adapter does not fit the base model",
            where=str(adapter),
            found=reason,
            hint="was it trained on another model, or with another number of labels?",
        ) from error
    fuse(model)
    return model


def _fingerprint(folder: RunFolder, split: str) -> str | None:
    return read_json(folder.environment)["data"].get(split)


def _resolved(folder: RunFolder | None) -> Path:
    assert folder is not None
    check_there(folder.resolved)
    return folder.resolved


def _labels(folder: RunFolder | None, recipe: Recipe, tell: Listener) -> tuple[str, ...] | None:
    if recipe.task != "classification":
        return None
    if folder is not None:
        return tuple(read_json(folder.splits)["labels"])
    drawn = splits.load(recipe, tell)
    return drawn.labels
