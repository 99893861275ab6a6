"""One run, a straight line: recipe -> rows -> examples -> base model -> LoRA -> method -> Trainer -> summary."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from peft import PeftModel
from transformers import PrinterCallback, set_seed

from hkft.data import tokenise
from hkft.data.sources import cells_of
from hkft.data.tokenise import texts_of
from hkft.diagnostics.decomposition import Added
from hkft.diagnostics.history import losses_of
from hkft.dropout.method import Method
from hkft.dropout.selfcheck import self_check
from hkft.errors import HkftError, RecipeError, SetupError, Terminated, UsageError
from hkft.evaluation.completions import Completions
from hkft.evaluation.look import look
from hkft.evaluation.predict import Predictions
from hkft.events import Evaluated, Event, Finished, Listener, Notice, Stage, silent
from hkft.folder import (
    RunFolder,
    check_place,
    read_json,
    read_jsonl,
    write_json,
    write_jsonl,
    write_text,
)
from hkft.model import build, memory
from hkft.model.adapter import updates
from hkft.recipe import Recipe
from hkft.training import environment, looks
from hkft.training.average import Average
from hkft.training.prepare import Material, arguments, check_criterion, step_counts
from hkft.training.shelf import Shelf
from hkft.training.summary import started, summarise
from hkft.training.trainer import Trainer

CHECKED = 8  # training rows of the self-check
ASIDE = 32  # rows of the probe of which, at every look, the objective is measured in train mode


def default_folder(recipe: Recipe) -> Path:
    """runs/<recipe>-<method>-s<seed>-<short hash>: another value anywhere in the recipe is another folder."""
    method = recipe.method.name.replace("/", "-")
    return Path("runs") / f"{recipe.name}-{method}-s{recipe.seed}-{recipe.fingerprint()[:6]}"


@dataclass(frozen=True)
class Begun:
    """A run whose folder stands, with everything loaded; `fit()` trains it to its end."""

    recipe: Recipe
    material: Material
    trainer: Trainer
    folder: RunFolder
    tell: Listener
    resume: bool
    held: ExitStack  # the folder, until the run has ended

    def fit(self) -> None:
        """Train, look, keep the best, and write the summary, whatever the end.

        Raises DivergedError and OutOfMemoryError, and KeyboardInterrupt after a checkpoint has been written.
        """
        with self.held:
            _fit(self)


def begin(
    recipe: Recipe,
    output: str | Path | None = None,
    *,
    resume: bool = False,
    tell: Listener = silent,
    shelf: Shelf | None = None,
) -> Begun:
    """Load everything a recipe names, and open its folder: what can be wrong before training is found before it.

    shelf: what other runs of the process have loaded already.

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

    shelf = shelf or Shelf(keeps=False)
    material = shelf.material(recipe, heard)
    check_criterion(recipe, material)
    heard(Stage(f"loading {recipe.model.name}"))
    set_seed(recipe.seed)
    with memory.while_loading(recipe):
        model = build.with_lora(shelf.base(recipe, material.labels, build.padding_id(material.tokenizer)), recipe)
    fresh = not folder.path.exists()
    with ExitStack() as held:
        if int(os.environ.get("RANK", "0")) == 0:  # of several processes of one run the first one writes
            held.enter_context(folder.held())
            _check_free(folder, recipe, resume)  # once more: a run that began at the same moment may have been faster
        with _nothing_left(folder, fresh):
            trainer = trainer_of(recipe, material, model, folder, heard)
            _open(folder, recipe, material, resume)
        held = held.pop_all()

    said = {notice.text for notice in notices if isinstance(notice, Notice)}

    def told(event: Event) -> None:
        if isinstance(event, Notice):
            if event.text in said:  # every look would say it again
                return
            said.add(event.text)
        folder.append(event)
        tell(event)

    if not resume:
        for notice in notices:
            folder.append(notice)
    return Begun(recipe, material, trainer, folder, told, resume, held)


def train(
    recipe: Recipe, output: str | Path | None = None, *, resume: bool = False, tell: Listener = silent
) -> RunFolder:
    """`begin` and `fit`: run a recipe to its end, and return its folder."""
    begun = begin(recipe, output, resume=resume, tell=tell)
    begun.fit()
    return begun.folder


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
    elif folder.path.exists() and any(path.name != folder.lock.name for path in folder.path.iterdir()):
        raise UsageError("the output folder is not empty", where=str(folder.path), hint="--output names another folder")


def _open(folder: RunFolder, recipe: Recipe, material: Material, resume: bool) -> None:
    """Create the folder, once everything that can be wrong with recipe, data and model has been looked at."""
    if resume:
        if read_json(folder.environment)["data"] != material.fingerprints:
            raise UsageError("the data has changed since this run was started", where=str(folder.environment))
        return
    write_text(folder.recipe, recipe.source)
    write_text(folder.resolved, recipe.resolved())
    write_json(folder.environment, environment.describe(recipe, material.fingerprints, material.tokenizer))
    told = {name: getattr(material, name) for name in ("labels", "duplicates", "near_duplicates")}
    write_json(folder.splits, {**material.ids, **told})


def _fit(begun: Begun) -> None:
    recipe, material, trainer, folder = begun.recipe, begun.material, begun.trainer, begun.folder
    tell, resume = begun.tell, begun.resume
    watcher = _watcher(recipe, material, folder, trainer, tell)
    checkpoint = folder.last_checkpoint() if resume else None
    if resume:
        _take_up(folder, watcher, checkpoint)
    trainer.remove_callback(PrinterCallback)
    if recipe.diagnostics.average is not None:
        average = Average(_adapted(trainer), recipe.diagnostics.average)
        trainer.add_callback(average)  # before the watcher: at its looks the step is in the average
        watcher.applied = average.applied
    trainer.add_callback(watcher)
    trainable, total = build.parameters(_adapted(trainer))
    tell(started(recipe, material, folder, trainer, watcher, trainable, total))
    facts: dict[str, Any] = {
        "trainable_parameters": trainable,
        "total_parameters": total,
        "quantised": build.quantised(_adapted(trainer)),
        "text_prompts": _prompts_written_for(recipe, material),
    }
    if resume and folder.summary.exists():
        facts["recipe"] = read_json(folder.summary)["recipe"]  # resolved.yaml, by which it may go on, is not its name
    write_json(folder.summary, summarise(recipe, folder, watcher, trainer, "running", facts))
    status = "failed"
    try:
        facts |= _self_check(begun)
        environment.forget_peak(trainer.args.device)
        with memory.while_training(recipe), looks.StopOnSignal(watcher):
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        with watcher.applied():
            facts["adapter"] = [asdict(update) for update in updates(_adapted(trainer))]
        status = "interrupted" if watcher.interrupted is not None else "finished"
    except HkftError as error:
        facts = {**facts, "error": str(error)}
        raise
    except KeyboardInterrupt:
        status = "interrupted"
        raise
    finally:
        told = summarise(recipe, folder, watcher, trainer, status, facts)
        write_json(folder.summary, told)
        if status != "failed":
            tell(Finished(str(folder.path), told, trainer.attachment.report()))
        trainer.attachment.detach()
    if status == "interrupted":
        raise Terminated if watcher.interrupted == signal.SIGTERM else KeyboardInterrupt


def _prompts_written_for(recipe: Recipe, material: Material) -> int | None:
    """How many prompts of each set a look writes text for; None: for none."""
    wanted = recipe.diagnostics.generate
    if recipe.task != "generation" or wanted is None:
        return None
    return min(wanted, *(len(set(cells_of(material.examples[split], "prompt"))) for split in looks.SPLITS))


def _self_check(begun: Begun) -> dict[str, Any]:
    """The method proven and timed on one small batch of training rows; MethodError where it does not hold."""
    trainer, rows = begun.trainer, begun.material.examples["train"]
    if not any(dropper.rate for dropper in trainer.attachment.droppers):
        return {}
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        begun.tell(Notice("no self-check of the method: the model is spread over several devices"))
        return {}
    begun.tell(Stage("checking the method"))
    model, collate = _adapted(trainer), trainer.data_collator
    count = min(CHECKED, trainer.args.per_device_train_batch_size, len(rows))
    batch = trainer._prepare_inputs(collate([rows[n] for n in range(count)]))
    with memory.while_training(begun.recipe):
        found = self_check(model, batch, lambda: trainer.once(model, batch)) | {"rows": count}
        trainer.find_shared(batch)
    begun.tell(
        Notice(
            f"the method was checked on {found['rows']} rows in {found['seconds']:.1f} s: every site acts, eval mode is inert, "
            "and where nothing is dropped the model is its own"
        )
    )
    return {"self_check": found}


def trainer_of(recipe: Recipe, material: Material, model: PeftModel, folder: RunFolder, tell: Listener) -> Trainer:
    """What trains the model of a recipe.

    Raises MethodError for a method that the model cannot carry, SetupError for a logger that is not installed.
    """
    settings = arguments(recipe, folder)
    if recipe.diagnostics.average is not None and (settings.fsdp or settings.deepspeed):
        raise RecipeError("the adapter is spread over devices, and cannot be averaged", where="diagnostics.average")
    if step_counts(len(material.examples["train"]), settings)[0] < 1:
        raise RecipeError("there is no step to train", where="train.num_train_epochs", allowed="more than 0")
    try:
        with memory.while_training(recipe):
            return Trainer(
                model=model,
                args=settings,
                train_dataset=material.examples["train"],
                data_collator=tokenise.collator(
                    material.tokenizer, build.padding_side(model), recipe.data.padding_free
                ),
                processing_class=material.tokenizer,
                dropout=_method(recipe, tell),
            )
    except (RuntimeError, ImportError) as error:
        raise SetupError(
            "what the train section asks for is not here", where="train", found=str(error).strip().splitlines()[0]
        ) from error


@contextmanager
def _nothing_left(folder: RunFolder, fresh: bool) -> Iterator[None]:
    """What cannot begin leaves no folder, where there was none."""
    try:
        yield
    except BaseException:
        if fresh:
            with suppress(OSError):
                folder.remove()
        raise


def _adapted(trainer: Trainer) -> PeftModel:
    assert isinstance(trainer.model, PeftModel)
    return trainer.model


def _method(recipe: Recipe, tell: Listener) -> Method:
    """The recipe's method; where its every rate is 0, without the second pass that would change nothing."""
    method = recipe.method
    weighed = method.consistency and method.consistency.weight
    if weighed and (not method.active or (not method.sites and recipe.model.native_dropout == 0)):
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

    def look_at(split: str) -> Predictions | Completions:
        name = {"train_probe": "the probe", "validation": "validation"}[split]
        return look(
            model,
            material.tokenizer,
            material.examples[split],
            recipe,
            batch_size=settings.per_device_eval_batch_size,
            write_text=recipe.diagnostics.generate is not None,
            limit=recipe.diagnostics.generate,
            tell=tell,
            looking=f"looking at {name}",
            writing=f"writing for {name}",
        )

    def remember(step: int, seen: Mapping[str, Predictions | Completions]) -> None:
        rows = {split: _of_rows(found) for split, found in seen.items()}
        groups = seen["validation"].groups
        folder.remember({"step": step, **rows, "groups": None if groups is None else groups.tolist()})

    def aside() -> tuple[Added, int] | None:
        if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
            return None
        count = min(ASIDE, len(material.examples["train_probe"]))
        rows = [material.examples["train_probe"][n] for n in range(count)]
        return trainer.aside(rows, recipe.seed), count

    @cache
    def texts(split: str) -> list[str] | None:
        return texts_of(material.examples[split], material.tokenizer)

    def keep(seen: Mapping[str, Predictions | Completions]) -> None:
        model.save_pretrained(str(folder.adapter))
        material.tokenizer.save_pretrained(str(folder.adapter))
        for split, predictions in seen.items():
            write_jsonl(folder.predictions(split), predictions.records(material.labels, texts(split)))

    total, per_epoch = step_counts(len(material.examples["train"]), settings)
    return looks.Looks(
        look=look_at,
        keep=keep,
        remember=remember,
        aside=aside,
        log=trainer.log,
        tell=tell,
        at=looks.steps(total, per_epoch, recipe.diagnostics.evals_per_epoch),
        criterion=recipe.diagnostics.metric or "loss",
        patience=recipe.diagnostics.patience,
        counters=lambda: (int(trainer.samples_seen), int(trainer.tokens_seen)),
    )


def _of_rows(seen: Predictions | Completions) -> dict[str, Any]:
    """What is remembered of a set at a look: of each row its loss, its items where a row has several, and if it was right."""
    rows, right = seen.by_row, seen.right
    return {
        "losses": [float(f"{loss:.6g}") for loss in rows.each],
        "items": None if (rows.items == 1).all() else rows.items.tolist(),
        "right": None if right is None else right.astype(int).tolist(),
    }


def _take_up(folder: RunFolder, watcher: looks.Looks, checkpoint: Path | None) -> None:
    """Bring the curve back to where the checkpoint stands, and forget what came after it."""
    step = int(checkpoint.name.rpartition("-")[2]) if checkpoint else -1
    kept = [r for r in folder.records() if r.get("step", -1) <= step or r["event"] == "notice"]
    write_jsonl(folder.metrics, [r for r in kept if checkpoint or r["event"] == "notice"])
    for record in folder.records("eval"):
        record.pop("event")
        watcher.curve.append(Evaluated(**record))
    past = [record for record in read_jsonl(folder.history) if record["step"] <= step]
    write_jsonl(folder.history, past)
    watcher.forgotten = {look.step for look in watcher.curve} != {record["step"] for record in past}
    for record in past:
        right = record["validation"]["right"]
        groups = None if record["groups"] is None else np.array(record["groups"])
        losses = losses_of(record["validation"]).grouped(groups)
        watcher.rows.append(looks.Rows(losses, None if right is None else np.array(right, dtype=bool)))
    if folder.summary.exists():
        summary = read_json(folder.summary) if checkpoint else {}
        watcher.clock.before = float(summary.get("train_runtime_s") or 0.0)
        watcher.clock.looked = float(summary.get("eval_runtime_s") or 0.0)
