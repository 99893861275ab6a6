"""One run, a straight line: recipe -> rows -> examples -> base model -> LoRA -> method -> Trainer -> summary."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch.utils.data import DataLoader
from transformers import PrinterCallback, set_seed

from hkft import processes
from hkft.data import tokenise
from hkft.data.sources import cells_of
from hkft.dropout.method import Method
from hkft.dropout.selfcheck import self_check
from hkft.errors import HkftError, RecipeError, SetupError, Terminated, UsageError, as_told, first_line
from hkft.events import Event, Finished, Listener, Notice, Stage, silent
from hkft.folder import (
    RunFolder,
    check_place,
    default_folder,
    read_json,
    write_json,
    write_text,
)
from hkft.model import build, memory
from hkft.model.adapter import updates
from hkft.model.warm import start_from_adapter
from hkft.recipe import Recipe
from hkft.training import environment, looks
from hkft.training.average import Average
from hkft.training.mishaps import guard_loggers, working, writing
from hkft.training.prepare import Material, arguments, check_criterion, step_counts
from hkft.training.resume import Seal, check_processes, check_recipe, check_rows, is_beginning, take_up
from hkft.training.shelf import Shelf
from hkft.training.summary import started, summarise
from hkft.training.trainer import Trainer
from hkft.training.watcher import adapted, is_spread, watcher_of

CHECKED = 8  # training rows of the self-check


@dataclass(frozen=True)
class Begun:
    """A run whose folder stands, with everything loaded; `fit()` trains it to its end."""

    recipe: Recipe
    material: Material
    trainer: Trainer
    folder: RunFolder
    tell: Listener
    resume: bool
    other_rows: bool  # than the run was started with
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
    force: bool = False,
    tell: Listener = silent,
    shelf: Shelf | None = None,
) -> Begun:
    """Load everything a recipe names, and open its folder: what can be wrong before training is found before it.

    force: resume under a recipe or rows that have changed. shelf: what other runs of the process have loaded already. Of several
    processes of a run the first one reads and prepares first, writes the folder, and tells; where one fails, all do.

    Raises UsageError where the folder holds a run already (a finished one is never overwritten), and what the rooms
    raise, with nothing written.
    """
    with processes.together():
        folder = RunFolder(Path(output) if output else default_folder(recipe))
        _join(recipe, folder)
        told = tell if processes.first() else silent
        return _begin(recipe, folder, resume, force, told, shelf or Shelf(keeps=False))


def _begin(recipe: Recipe, folder: RunFolder, resume: bool, force: bool, tell: Listener, shelf: Shelf) -> Begun:
    changed = processes.of_first(lambda: _check_free(folder, recipe, resume, force))
    notices: list[Event] = []

    def heard(event: Event) -> None:
        if isinstance(event, Notice):
            notices.append(event)
        tell(event)

    material = processes.in_turn(lambda: shelf.material(recipe, heard))
    check_criterion(recipe, material)
    heard(Stage(f"loading {recipe.model.name}"))
    set_seed(recipe.seed)
    with memory.while_loading(recipe):
        model = build.with_lora(shelf.base(recipe, material.labels, build.padding_id(material.tokenizer)), recipe)
        start_from_adapter(model, recipe, material.labels, heard)
    fresh = processes.first() and not folder.path.exists()
    with ExitStack() as held:
        with processes.together():
            held.enter_context(folder.held())
            if processes.first():  # once more: a run that began at the same moment may have been faster
                _check_free(folder, recipe, resume, force)
            with _nothing_left(folder, fresh):
                trainer = trainer_of(recipe, material, model, folder, heard)
                other_rows = processes.of_first(lambda: _open(folder, recipe, material, resume, force, bool(changed)))
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
    if changed := [*changed, *(f"other rows in {name}" for name in other_rows)]:
        told(Notice(f"resumed with what is not as it was: {'; '.join(changed)}", "warning"))
    return Begun(recipe, material, trainer, folder, told, resume, bool(other_rows), held)


def train(
    recipe: Recipe,
    output: str | Path | None = None,
    *,
    resume: bool = False,
    force: bool = False,
    tell: Listener = silent,
) -> RunFolder:
    """`begin` and `fit`: run a recipe to its end, and return its folder."""
    begun = begin(recipe, output, resume=resume, force=force, tell=tell)
    begun.fit()
    return begun.folder


def _join(recipe: Recipe, folder: RunFolder) -> None:
    """Where several processes train a run, let them find each other, as transformers does it, and each its device."""
    if processes.count() == 1:
        return
    if ":" in recipe.model.device:
        raise RecipeError(
            "every process has a device of its own",
            where="model.device",
            found=recipe.model.device,
            allowed="auto, cuda, cpu",
        )
    arguments(recipe, folder)
    processes.check_joined()


def _check_free(folder: RunFolder, recipe: Recipe, resume: bool, force: bool) -> list[str]:
    """Whether a run may begin here, or go on; what its recipe has otherwise than when it began. Raises UsageError."""
    check_place(folder.path)
    if force and not resume:
        raise UsageError("--force is for --resume", hint="--output names another folder for a new run")
    if resume:
        if not folder.exists:
            raise UsageError("there is no run to resume", where=str(folder.path), hint="leave out --resume")
        if folder.status == "finished":
            raise UsageError("this run is finished", where=str(folder.path), hint=f"hkft eval {folder.path}")
        return check_recipe(folder, recipe, force)
    if folder.exists:
        state = folder.status
        raise UsageError(
            f"there is {'a finished' if state == 'finished' else 'an unfinished'} run in this folder already",
            where=str(folder.path),
            hint="--output names another folder" + ("" if state == "finished" else ", --resume continues this one"),
        )
    if not is_beginning(folder):
        raise UsageError("the output folder is not empty", where=str(folder.path), hint="--output names another folder")
    return []


def _open(folder: RunFolder, recipe: Recipe, material: Material, resume: bool, force: bool, changed: bool) -> list[str]:
    """Write what a run is of, once everything that can be wrong with it has been looked at; which sets have other rows.

    What makes the folder a run comes last.
    """
    other_rows = check_rows(folder, material.fingerprints, force) if resume else []
    if resume:
        check_processes(folder)
    if not resume or changed or other_rows:
        with writing(folder):
            _write(folder, recipe, material)
    return other_rows


def _write(folder: RunFolder, recipe: Recipe, material: Material) -> None:
    write_text(folder.recipe, recipe.source)
    write_json(folder.environment, environment.describe(recipe, material.fingerprints, material.tokenizer))
    told = {name: getattr(material, name) for name in ("labels", "duplicates", "near_duplicates")}
    write_json(folder.splits, {**material.ids, **told})
    write_text(folder.resolved, recipe.resolved())


def _fit(begun: Begun) -> None:
    recipe, material, trainer, folder = begun.recipe, begun.material, begun.trainer, begun.folder
    tell, resume = begun.tell, begun.resume
    watcher = watcher_of(recipe, material, folder, trainer, tell)
    checkpoint = None
    if resume:
        checkpoint = processes.of_first(lambda: take_up(folder, watcher, begun.other_rows, tell))
        watcher.curve = processes.of_first(lambda: watcher.curve)
    trainer.remove_callback(PrinterCallback)
    if recipe.diagnostics.average is not None:
        average = Average(adapted(trainer), recipe.diagnostics.average)
        trainer.add_callback(average)  # before the watcher: at its looks the step is in the average
        watcher.applied = average.applied
    trainer.add_callback(watcher)
    trainer.add_callback(Seal(watcher.clock, trainer.accelerator.wait_for_everyone))
    trainable, total = build.parameters(adapted(trainer))
    guard_loggers(trainer.callback_handler.callbacks, (Average, looks.Looks, Seal), tell)
    tell(started(recipe, material, folder, trainer, watcher, trainable, total))
    facts: dict[str, Any] = {
        "trainable_parameters": trainable,
        "total_parameters": total,
        "quantised": build.quantised(adapted(trainer)),
        "text_prompts": _prompts_written_for(recipe, material),
    }
    if resume and folder.summary.exists():
        facts["recipe"] = read_json(folder.summary)["recipe"]  # resolved.yaml, by which it may go on, is not its name
    write_json(folder.summary, summarise(recipe, folder, watcher, trainer, "running", facts))
    status = "failed"
    try:
        with processes.together():
            facts |= _self_check(begun)
        environment.forget_peak(trainer.args.device)
        mishaps = working(folder, recipe, material)
        training = memory.while_training(recipe)
        with mishaps, training, processes.noticing(), looks.StopOnSignal(watcher):
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
            whole = trainer.state.global_step >= watcher.at[-1] or watcher.interrupted is None
            status = "finished" if whole else "interrupted"
            if not whole:
                watcher.look_once_more(trainer.state)
        with watcher.applied():
            facts["adapter"] = [asdict(update) for update in updates(adapted(trainer))]
    except KeyboardInterrupt:
        status = "interrupted"
        raise
    except Exception as error:
        facts = {**facts, "error": str(as_told(error))}
        raise
    finally:
        told = summarise(recipe, folder, watcher, trainer, status, facts)
        if status == "failed" and processes.first():
            for torn in folder.torn_checkpoints():  # on a full disk they are in the way
                shutil.rmtree(torn, ignore_errors=True)
        with suppress(OSError) if status == "failed" else nullcontext():  # which is not to hide why
            write_json(folder.summary, told)
        if status != "failed":
            tell(Finished(str(folder.path), told, trainer.attachment.report()))
        trainer.attachment.detach()
    if watcher.interrupted is not None:
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
    if is_spread(trainer):
        begun.tell(Notice("no self-check of the method: the model is spread over several devices"))
        return {}
    begun.tell(Stage("checking the method"))
    model, collate = adapted(trainer), trainer.data_collator
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
    if settings.fsdp and (processes.count() == 1 or settings.device.type == "cpu"):  # transformers would train unspread
        raise SetupError(
            "FSDP spreads a model over several GPUs, with a process for each",
            where="train.fsdp",
            found=environment.device_name(settings.device),
            hint="torchrun --nproc-per-node 2 -m hkft train ..., or leave train.fsdp out",
        )
    if step_counts(len(material.examples["train"]), settings)[0] < 1:
        raise RecipeError("there is no step to train", where="train.num_train_epochs", allowed="more than 0")
    try:
        with memory.while_training(recipe):
            trainer = Trainer(
                model=model,
                args=settings,
                train_dataset=material.examples["train"],
                data_collator=tokenise.collator(
                    material.tokenizer, build.padding_side(model), recipe.data.padding_free
                ),
                processing_class=material.tokenizer,
                dropout=_method(recipe, tell),
            )
            # what an optimizer or a data loader cannot be made of is said before the folder is begun
            if not is_spread(trainer):
                trainer.create_optimizer()
            DataLoader(
                material.examples["train"],  # type: ignore[arg-type]
                num_workers=settings.dataloader_num_workers,
                prefetch_factor=settings.dataloader_prefetch_factor,
                persistent_workers=settings.dataloader_persistent_workers,
            )
            return trainer
    except HkftError:
        raise
    except (RuntimeError, ImportError) as error:
        raise SetupError(
            "what the train section asks for is not here", where="train", found=first_line(error)
        ) from error
    except ValueError as error:
        raise RecipeError("the train section cannot be trained with", where="train", found=first_line(error)) from error


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


def _method(recipe: Recipe, tell: Listener) -> Method:
    """The recipe's method; where its every rate is 0, without the second pass that would change nothing."""
    method = recipe.method
    weighed = method.consistency and method.consistency.weight
    if weighed and (not method.active or (not method.sites and recipe.model.native_dropout == 0)):
        tell(Notice("every dropout rate is 0, so the consistency loss is exactly 0: left out", "warning"))
        return method.with_weight(0.0)
    return method
