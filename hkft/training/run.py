"""One run, a straight line: recipe -> rows -> examples -> base model -> LoRA -> method -> Trainer -> summary."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase, PrinterCallback, TrainingArguments, set_seed

from hkft.data import probe, splits, tokenise
from hkft.diagnostics.curve import from_records
from hkft.diagnostics.gap import main_metric
from hkft.diagnostics.verdict import verdict
from hkft.dropout.method import Method
from hkft.errors import HkftError, OutOfMemoryError, RecipeError, SetupError, UsageError, nearest
from hkft.evaluation.metrics import score
from hkft.evaluation.predict import Predictions, predict
from hkft.events import Evaluated, Event, Finished, Listener, Notice, Stage, Started, as_record, silent
from hkft.folder import (
    SCHEMA_VERSION,
    RunFolder,
    check_place,
    read_json,
    write_json,
    write_jsonl,
    write_text,
)
from hkft.model import build
from hkft.recipe import Recipe
from hkft.training import environment, looks
from hkft.training.trainer import Trainer

FEW = 20  # validation rows: the standard error of an accuracy is then 0.1 and more


@dataclass(frozen=True)
class Material:
    """What a run trains on: tokenised examples of each set, and what is needed to say what they are."""

    examples: dict[str, datasets.Dataset]  # train, train_probe, validation
    labels: tuple[str, ...] | None
    fingerprints: dict[str, str]
    duplicates: int
    tokenizer: PreTrainedTokenizerBase

    @property
    def ids(self) -> dict[str, list[Any]]:
        return {name: list(examples["id"]) for name, examples in self.examples.items()}


def default_folder(recipe: Recipe) -> Path:
    """runs/<recipe>-<method>-s<seed>-<short hash>: another value anywhere in the recipe is another folder."""
    return Path("runs") / f"{recipe.name}-{recipe.method.name}-s{recipe.seed}-{recipe.fingerprint()[:6]}"


@dataclass(frozen=True)
class Begun:
    """A run whose folder stands, with everything loaded; `fit()` trains it to its end."""

    recipe: Recipe
    material: Material
    trainer: Trainer
    folder: RunFolder
    tell: Listener
    resume: bool

    def fit(self) -> None:
        """Train, look, keep the best, and write the summary, whatever the end.

        Raises DivergedError and OutOfMemoryError, and KeyboardInterrupt after a checkpoint has been written.
        """
        _fit(self)


def begin(recipe: Recipe, output: str | Path | None = None, *, resume: bool = False, tell: Listener = silent) -> Begun:
    """Load everything a recipe names, and open its folder: what can be wrong before training is found before it.

    Raises UsageError where the folder holds a run already (a finished one is never overwritten), and what the rooms
    raise, with nothing written.
    """
    folder = RunFolder(Path(output) if output else default_folder(recipe))
    _check_free(folder, recipe, resume)
    notices: list[Event] = []

    def heard(event: Event) -> None:
        if isinstance(event, Notice):
            notices.append(event)
        tell(event)

    material = prepare(recipe, heard)
    check_criterion(recipe, material)
    heard(Stage(f"loading {recipe.model.name}"))
    set_seed(recipe.seed)
    base = build.base(recipe, material.labels, build.padding_id(material.tokenizer))
    model = build.with_lora(base, recipe)
    with _nothing_left(folder.path):
        trainer = _trainer(recipe, material, model, folder, heard)
        _open(folder, recipe, material, resume)

    def told(event: Event) -> None:
        folder.append(event)
        tell(event)

    if not resume:
        for notice in notices:
            folder.append(notice)
    return Begun(recipe, material, trainer, folder, told, resume)


def train(
    recipe: Recipe, output: str | Path | None = None, *, resume: bool = False, tell: Listener = silent
) -> RunFolder:
    """`begin` and `fit`: run a recipe to its end, and return its folder."""
    begun = begin(recipe, output, resume=resume, tell=tell)
    begun.fit()
    return begun.folder


def prepare(recipe: Recipe, tell: Listener) -> Material:
    """Rows, split and tokenised, with the probe: as many training rows as there are validation rows, labels in the same mix."""
    tell(Stage("reading the data"))
    rows = splits.load(recipe, tell)
    assert rows.train is not None and rows.validation is not None
    tokenizer = build.tokenizer(recipe)
    encode = partial(tokenise.tokenise, tokenizer=tokenizer, max_length=recipe.data.max_length, tell=tell)
    examples = {"train": encode(rows.train, name="train"), "validation": encode(rows.validation, name="validation")}
    chosen = probe.probe_indices(
        rows.train["label"], rows.validation["label"], recipe.diagnostics.probe_size, recipe.seed, recipe.task
    )
    examples["train_probe"] = examples["train"].select(chosen)
    wanted = min(recipe.diagnostics.probe_size or len(rows.validation), len(rows.validation))
    if len(rows.validation) < FEW:
        tell(
            Notice(f"only {len(rows.validation)} validation rows: what is measured on them is mostly noise", "warning")
        )
    if len(chosen) < wanted:
        tell(
            Notice(f"the training rows allow a probe of {len(chosen):,} rows with validation's labels, not {wanted:,}")
        )
    return Material(examples, rows.labels, rows.fingerprints, rows.duplicates, tokenizer)


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


def _check_free(folder: RunFolder, recipe: Recipe, resume: bool) -> None:
    check_place(folder.path)
    if resume:
        if not folder.exists:
            raise UsageError("there is no run to resume", where=str(folder.path), hint="leave out --resume")
        if folder.status == "finished":
            raise UsageError("this run is finished", where=str(folder.path), hint=f"hkft eval {folder.path}")
        if folder.resolved.read_text(encoding="utf-8") != recipe.resolved():
            raise UsageError(
                "the run in this folder was started with another recipe",
                where=str(folder.resolved),
                hint=f"hkft train --recipe {folder.resolved} --output {folder.path} --resume",
            )
    elif folder.exists:
        state = folder.status
        raise UsageError(
            f"there is {'a finished' if state == 'finished' else 'an unfinished'} run in this folder already",
            where=str(folder.path),
            hint="--output names another folder" + ("" if state == "finished" else ", --resume continues this one"),
        )
    elif folder.path.exists() and any(folder.path.iterdir()):
        raise UsageError("the output folder is not empty", where=str(folder.path), hint="--output names another folder")


def check_criterion(recipe: Recipe, material: Material) -> None:
    """Raise RecipeError where diagnostics.metric is none that the task has."""
    criterion = recipe.diagnostics.metric
    if criterion is None or criterion == "loss":
        return
    logits = torch.eye(max(2, len(material.labels or ()))).numpy() if material.labels else torch.ones(2, 1).numpy()
    known = ["loss", *score(recipe.task, logits, logits.argmax(1))]
    if criterion not in known:
        raise RecipeError(
            f"{recipe.task} has no metric {criterion!r}",
            where="diagnostics.metric",
            allowed=", ".join(known),
            hint=nearest(criterion, known),
        )


def _open(folder: RunFolder, recipe: Recipe, material: Material, resume: bool) -> None:
    """Create the folder, once everything that can be wrong with recipe, data and model has been looked at."""
    if resume:
        if read_json(folder.environment)["data"] != material.fingerprints:
            raise UsageError("the data has changed since this run was started", where=str(folder.environment))
        return
    write_text(folder.recipe, recipe.source)
    write_text(folder.resolved, recipe.resolved())
    write_json(folder.environment, environment.describe(recipe, material.fingerprints))
    write_json(folder.splits, {**material.ids, "labels": material.labels, "duplicates": material.duplicates})


def _fit(begun: Begun) -> None:
    recipe, material, trainer, folder = begun.recipe, begun.material, begun.trainer, begun.folder
    tell, resume = begun.tell, begun.resume
    watcher = _watcher(recipe, material, folder, trainer, tell)
    checkpoint = folder.last_checkpoint() if resume else None
    if resume:
        _take_up(folder, watcher, checkpoint)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(watcher)
    trainable, total = build.parameters(_adapted(trainer))
    tell(_started(recipe, material, folder, trainer, watcher, trainable, total))
    facts = {"trainable_parameters": trainable, "total_parameters": total}
    write_json(folder.summary, _summary(recipe, watcher, trainer, "running", facts))
    status = "failed"
    environment.forget_peak(trainer.args.device)
    try:
        with out_of_memory_explained(recipe), looks.StopOnSignal(watcher):
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        status = "interrupted" if watcher.interrupted is not None else "finished"
    except HkftError as error:
        facts = {**facts, "error": str(error)}
        raise
    except KeyboardInterrupt:
        status = "interrupted"
        raise
    finally:
        summary = _summary(recipe, watcher, trainer, status, facts)
        write_json(folder.summary, summary)
        if status != "failed":
            tell(Finished(str(folder.path), summary, trainer.attachment.report()))
        trainer.attachment.detach()
    if status == "interrupted":
        raise KeyboardInterrupt


def _trainer(recipe: Recipe, material: Material, model: PeftModel, folder: RunFolder, tell: Listener) -> Trainer:
    """Raises MethodError for a method that the model cannot carry, SetupError for a logger that is not installed."""
    settings = arguments(recipe, folder)
    if step_counts(len(material.examples["train"]), settings)[0] < 1:
        raise RecipeError("there is no step to train", where="train.num_train_epochs", allowed="more than 0")
    try:
        with out_of_memory_explained(recipe):
            return Trainer(
                model=model,
                args=settings,
                train_dataset=material.examples["train"],
                data_collator=tokenise.collator(material.tokenizer),
                processing_class=material.tokenizer,
                dropout=_method(recipe, tell),
            )
    except (RuntimeError, ImportError) as error:
        raise SetupError(
            "what the train section asks for is not here", where="train", found=str(error).strip().splitlines()[0]
        ) from error


@contextmanager
def _nothing_left(path: Path) -> Iterator[None]:
    """What cannot begin leaves no folder, where there was none."""
    there = path.exists()
    try:
        yield
    except BaseException:
        if not there:
            shutil.rmtree(path, ignore_errors=True)
        raise


def _adapted(trainer: Trainer) -> PeftModel:
    assert isinstance(trainer.model, PeftModel)
    return trainer.model


def _method(recipe: Recipe, tell: Listener) -> Method:
    """The recipe's method; where its every rate is 0, without the second pass that would change nothing."""
    method = recipe.method
    if method.consistency and method.consistency.weight and not method.active:
        tell(Notice("every dropout rate is 0, so the consistency loss is exactly 0: left out", "warning"))
        return method.with_weight(0.0)
    return method


def _watcher(
    recipe: Recipe,
    material: Material,
    folder: RunFolder,
    trainer: Trainer,
    tell: Listener,
) -> looks.Looks:
    settings, model = trainer.args, _adapted(trainer)
    precision = torch.bfloat16 if settings.bf16 else torch.float16 if settings.fp16 else None
    collate = tokenise.collator(material.tokenizer)

    def look(split: str) -> Predictions:
        text = {"train_probe": "looking at the probe", "validation": "looking at validation"}[split]
        return predict(
            model,
            material.examples[split],
            collate,
            task=recipe.task,
            batch_size=settings.per_device_eval_batch_size,
            precision=precision,
            tell=tell,
            text=text,
        )

    def keep(seen: Mapping[str, Predictions]) -> None:
        model.save_pretrained(str(folder.adapter))
        material.tokenizer.save_pretrained(str(folder.adapter))
        for split, predictions in seen.items():
            write_jsonl(folder.predictions(split), predictions.records(material.labels))

    total, per_epoch = step_counts(len(material.examples["train"]), settings)
    return looks.Looks(
        look=look,
        keep=keep,
        tell=tell,
        at=looks.steps(total, per_epoch, recipe.diagnostics.evals_per_epoch),
        criterion=recipe.diagnostics.metric or "loss",
        patience=recipe.diagnostics.patience,
        counters=lambda: (trainer.samples_seen, int(trainer.tokens_seen)),
    )


def step_counts(rows: int, settings: TrainingArguments) -> tuple[int, int]:
    """(optimizer steps in all, in one epoch), as Trainer counts them."""
    batches = math.ceil(rows / (settings.train_batch_size * settings.world_size))
    per_epoch = max(1, math.ceil(batches / settings.gradient_accumulation_steps))
    total = settings.max_steps if settings.max_steps > 0 else math.ceil(settings.num_train_epochs * per_epoch)
    return total, per_epoch


def _take_up(folder: RunFolder, watcher: looks.Looks, checkpoint: Path | None) -> None:
    """Bring the curve back to where the checkpoint stands, and forget what came after it."""
    step = int(checkpoint.name.rpartition("-")[2]) if checkpoint else -1
    kept = [r for r in folder.records() if r.get("step", -1) <= step or r["event"] == "notice"]
    write_jsonl(folder.metrics, [r for r in kept if checkpoint or r["event"] == "notice"])
    for record in folder.records("eval"):
        record.pop("event")
        watcher.curve.append(Evaluated(**record))
    if folder.summary.exists():
        watcher.clock.before = float(read_json(folder.summary).get("train_runtime_s") or 0.0)


def _started(
    recipe: Recipe,
    material: Material,
    folder: RunFolder,
    trainer: Trainer,
    watcher: looks.Looks,
    trainable: int,
    total: int,
) -> Started:
    return Started(
        run=str(folder.path),
        recipe=recipe.name,
        method=recipe.method.name,
        model=recipe.model.name,
        task=recipe.task,
        device=environment.device_name(trainer.args.device),
        seed=recipe.seed,
        total_steps=watcher.at[-1],
        epochs=float(trainer.args.num_train_epochs),
        train_rows=len(material.examples["train"]),
        validation_rows=len(material.examples["validation"]),
        probe_rows=len(material.examples["train_probe"]),
        trainable_parameters=trainable,
        total_parameters=total,
        metric=_metric(recipe),
    )


def _metric(recipe: Recipe) -> str:
    chosen = recipe.diagnostics.metric
    return chosen if chosen and chosen != "loss" else main_metric(recipe.task)


def _summary(
    recipe: Recipe, watcher: looks.Looks, trainer: Trainer, status: str, facts: Mapping[str, Any]
) -> dict[str, Any]:
    """The content of summary.json."""
    curve = watcher.curve
    best, final = watcher.best, curve[-1] if curve else None
    found = verdict(from_records(map(as_record, curve)), metric=_metric(recipe))
    seconds = watcher.clock.seconds() if watcher.clock.started else 0.0
    samples, tokens = watcher.counters()

    def sets(seen: Evaluated | None) -> dict[str, Any] | None:
        return None if seen is None else {split: dict(getattr(seen, split)) for split in looks.SPLITS}

    return {
        "schema_version": SCHEMA_VERSION,
        "status": status,
        "recipe": recipe.name,
        "recipe_fingerprint": recipe.fingerprint(),
        "method": recipe.method.name,
        "dropout": recipe.method.as_dict(),
        "model": recipe.model.name,
        "seed": recipe.seed,
        "task": recipe.task,
        "metric": _metric(recipe),
        "steps": trainer.state.global_step,
        "total_steps": watcher.at[-1],
        "best_step": best.step if best else None,
        "best": sets(best),
        "final": sets(final),
        "gap": {"best": dict(best.gap) if best else None, "final": dict(final.gap) if final else None},
        "verdict": found.as_dict(),
        "sites": trainer.attachment.report(),
        "train_runtime_s": seconds,
        "eval_runtime_s": watcher.clock.outside,
        "train_samples_per_s": samples / seconds if seconds else None,
        "train_tokens_per_s": tokens / seconds if seconds else None,
        "peak_memory_bytes": environment.peak_memory(trainer.args.device),
        **facts,
    }


@contextmanager
def out_of_memory_explained(recipe: Recipe) -> Iterator[None]:
    """Turn torch's out-of-memory into hkft's, with what to do about it."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if not isinstance(error, torch.OutOfMemoryError | MemoryError) and "not enough memory" not in str(error):
            raise
        batch = recipe.train["per_device_train_batch_size"]
        raise OutOfMemoryError(
            "out of memory while training",
            where="train.per_device_train_batch_size",
            found=str(batch),
            hint=f"--set train.per_device_train_batch_size={max(1, batch // 2)} --set train.gradient_accumulation_steps=2, "
            "--set train.gradient_checkpointing=true, or --set model.quantization=4bit",
        ) from error
