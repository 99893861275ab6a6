"""What the machine does to a run: each has its error, a message that says what next, and a folder that tells what happened."""

from __future__ import annotations

import errno
import os
import resource

import pytest
import torch
from torch import nn
from transformers import TrainerCallback

from hkft import api
from hkft.errors import DivergedError, HkftError, OutOfMemoryError, SetupError
from hkft.events import Evaluated, Notice
from hkft.folder import RunFolder, read_json
from hkft.training import mishaps, run, watcher
from hkft.training.trainer import Trainer

SHORT = ["train.num_train_epochs=1"]  # 8 steps, with looks and checkpoints after 4 and 8


def failed(folder, error) -> None:
    """The run folder says what happened, and what there is of the run can be used."""
    summary = read_json(folder / "summary.json")
    assert summary["status"] == "failed"
    assert summary["error"] == str(error)
    assert (folder / "report.html").exists()
    assert not [path for path in folder.rglob("*") if "partial" in path.name]
    assert not RunFolder(folder).torn_checkpoints()


def goes_on(recipe, folder, overrides=SHORT) -> None:
    api.train(recipe, overrides, output=folder, resume=True)
    assert read_json(folder / "summary.json")["status"] == "finished"


@pytest.fixture
def raising(monkeypatch):
    """Let the training step of a number raise; `once`: only the first time."""

    def arrange(step, error):
        own, armed = Trainer.training_step, [True]

        def training_step(self, *args, **kwargs):
            if self.state.global_step == step and armed:
                armed.clear()
                raise error
            return own(self, *args, **kwargs)

        monkeypatch.setattr(Trainer, "training_step", training_step)

    return arrange


# --- memory -----------------------------------------------------------------------------------------------------------

CPU = "[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
RAN_OUT = {  # the forecast of a method traces several times as much as that of none, seconds of it: once
    "cuda": (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), "hiddenkey"),
    "python": (MemoryError(), "none"),
    "cpu": (RuntimeError(CPU), "none"),
}


@pytest.mark.parametrize(("cause", "method"), RAN_OUT.values(), ids=RAN_OUT)
def test_out_of_memory_names_the_remedies_with_what_they_are_forecast_to_take(
    recipe_file, tmp_path, raising, cause, method
):
    asked = [*SHORT, f"dropout.method={method}"]
    raising(6, cause)
    with pytest.raises(OutOfMemoryError, match="out of memory while training") as caught:
        api.train(recipe_file, asked, output=tmp_path / "run")
    assert caught.value.exit_code == 5
    hint = caught.value.problems[0].hint or ""
    assert "training holds about" in hint
    assert "--set train.per_device_train_batch_size=8 --set train.gradient_accumulation_steps=2 (about" in hint
    assert "--set train.activation_checkpointing=true (about" in hint
    shares = [int(part.partition("%")[0]) for part in hint.split("(about ")[1:]]
    assert all(5 < share < 100 for share in shares)
    failed(tmp_path / "run", caught.value)
    goes_on(recipe_file, tmp_path / "run", asked)


def test_remedies_are_only_what_the_recipe_has_not(recipe_file, tmp_path, raising):
    raising(1, MemoryError())
    with pytest.raises(OutOfMemoryError) as caught:
        api.train(
            recipe_file,
            [
                *("train.per_device_train_batch_size=1", "train.activation_checkpointing=true", "train.max_steps=4"),
                "dropout.method=none",
            ],
            output=tmp_path / "run",
        )
    hint = caught.value.problems[0].hint or ""
    assert "batch_size" not in hint.partition("training holds")[2]
    assert "activation_checkpointing" not in hint.partition("training holds")[2]


def test_out_of_memory_in_a_look_is_that_of_the_look(recipe_file, tmp_path, monkeypatch):
    def look(*args, **kwargs):
        raise MemoryError

    monkeypatch.setattr(watcher, "look", look)
    with pytest.raises(OutOfMemoryError, match="out of memory while evaluating") as caught:
        api.train(recipe_file, SHORT, output=tmp_path / "run")
    assert "--set train.per_device_eval_batch_size=" in (caught.value.problems[0].hint or "")
    assert read_json(tmp_path / "run" / "summary.json")["status"] == "failed"


# --- the disk ---------------------------------------------------------------------------------------------------------


def limited(bytes_: int, work) -> tuple[int, str]:
    """Run in a process of its own where no file may grow beyond a size; its exit code and what it told."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            torch.set_num_threads(1)
            resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_, bytes_))
            work()
            code = 0
        except HkftError as error:
            os.write(writer, str(error).encode())
            code = error.exit_code
        finally:
            os._exit(code)
    os.close(writer)
    with os.fdopen(reader, "rb") as told:
        text = told.read().decode()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), text


@pytest.mark.parametrize(
    ("size", "status"),
    [(2_000, None), (9_000, "failed"), (20_000, "finished")],  # before it began, in a checkpoint, in the report
)
def test_a_disk_without_room_is_said_and_the_run_goes_on_later(recipe_file, tmp_path, size, status):
    folder = RunFolder(tmp_path / "run")
    code, told = limited(size, lambda: api.train(recipe_file, SHORT, output=folder.path))
    assert code == SetupError.exit_code, told
    assert "there is no room left" in told
    again = "--resume goes on from the last checkpoint" if status else "begin again"
    assert f"Free some space. Then {again}." in told
    assert folder.status == status
    assert not folder.torn_checkpoints()
    api.train(recipe_file, SHORT, output=folder.path, resume=status is not None)
    assert folder.status == "finished"
    assert folder.card.exists()


def test_an_output_that_may_not_be_written_is_said(recipe_file):
    with pytest.raises((OSError, HkftError)) as caught:
        api.train(recipe_file, SHORT, output="/proc/hkft-run")
    assert "/proc/hkft-run" in str(caught.value)


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "there is no room left"),
        (OSError(errno.EIO, os.strerror(errno.EIO), "/a/file"), "the disk refuses"),
        (RuntimeError("[enforce fail at inline_container.cc:668] . unexpected pos 64 vs 0"), "there is no room left"),
    ],
)
def test_whatever_a_disk_says_is_one_error(recipe_file, tmp_path, raising, error, text):
    raising(5, error)
    with pytest.raises(SetupError, match="the run cannot be written") as caught:
        api.train(recipe_file, SHORT, output=tmp_path / "run")
    assert text in str(caught.value)
    failed(tmp_path / "run", caught.value)
    goes_on(recipe_file, tmp_path / "run")


# --- processes --------------------------------------------------------------------------------------------------------


def test_a_dead_data_worker_is_said(recipe_file, tmp_path, raising):
    raising(
        2, RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")
    )  # as torch's signal handler has it
    with pytest.raises(SetupError, match="a process that reads the data died") as caught:
        api.train(recipe_file, ["train.dataloader_num_workers=1"], output=tmp_path / "run")
    assert "--set train.dataloader_num_workers=0" in str(caught.value)
    failed(tmp_path / "run", caught.value)


# --- numbers ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def spoiled(monkeypatch):
    """Let the loss be what `change(loss, a trained parameter)` makes of it, from a step on."""

    def arrange(step, change):
        own = Trainer.compute_loss

        def compute_loss(self, model, *args, **kwargs):
            loss = own(self, model, *args, **kwargs)
            if self.state.global_step < step or not model.training:
                return loss
            return change(loss, next(p for p in model.parameters() if p.requires_grad))

        monkeypatch.setattr(Trainer, "compute_loss", compute_loss)

    return arrange


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda loss, p: loss * torch.nan, "the training loss is nan at step 6"),
        (lambda loss, p: loss * torch.inf, "the training loss is inf at step 6"),
        (lambda loss, p: loss + torch.sqrt(p.sum() * 0), "the gradient's norm is nan at step 6"),
        (lambda loss, p: loss * 1e5, "the training loss has exploded from"),
    ],
    ids=["nan", "inf", "gradient", "exploded"],
)
def test_numbers_that_are_none_end_a_run_before_they_do_harm(recipe_file, tmp_path, spoiled, change, text):
    spoiled(5, change)
    with pytest.raises(DivergedError) as caught:
        api.train(recipe_file, SHORT, output=tmp_path / "run")
    assert text in str(caught.value)
    assert "lower train.learning_rate" in str(caught.value)
    assert caught.value.exit_code == 6
    failed(tmp_path / "run", caught.value)
    assert read_json(tmp_path / "run" / "summary.json")["best_step"] == 4


# --- loggers ----------------------------------------------------------------------------------------------------------


class Thrower(TrainerCallback):
    """A logger that fails from an event's nth time on."""

    def __init__(self, event: str, count: int) -> None:
        self.calls, self.count = 0, count
        setattr(self, event, self.fail)

    def fail(self, *args, **kwargs):
        self.calls += 1
        if self.calls >= self.count:
            raise ConnectionError("the service is gone\nfor good")


@pytest.fixture
def logging(monkeypatch):
    def arrange(logger):
        own = run.trainer_of

        def trainer_of(*args):
            trainer = own(*args)
            trainer.add_callback(logger)
            return trainer

        monkeypatch.setattr(run, "trainer_of", trainer_of)

    return arrange


def test_a_logger_that_fails_is_left_out_and_the_run_goes_on(recipe_file, tmp_path, logging):
    logger, heard = Thrower("on_log", 3), []
    logging(logger)
    folder = api.train(recipe_file, SHORT, output=tmp_path / "run", tell=heard.append)
    said = "the logger Thrower failed and is left out from here on: ConnectionError: the service is gone"
    assert [event.text for event in heard if isinstance(event, Notice)].count(said) == 1
    assert said in [record["text"] for record in folder.records("notice")]
    assert logger.calls == 3
    assert folder.status == "finished"
    assert len([event for event in heard if isinstance(event, Evaluated)]) == 3


def test_a_logger_that_cannot_begin_is_an_error_before_anything_is_lost(recipe_file, tmp_path, logging):
    logging(Thrower("on_train_begin", 1))
    with pytest.raises(SetupError, match="the logger Thrower cannot begin") as caught:
        api.train(recipe_file, SHORT, output=tmp_path / "run")
    assert "--set train.report_to=none" in str(caught.value)


def test_hkft_s_own_callbacks_are_not_guarded():
    own = nn.Module  # stands for a kind that is named as hkft's own

    class Mine(TrainerCallback, own):
        def on_log(self, *args, **kwargs):
            raise ValueError("a fault of hkft's")

    mine = Mine()
    mishaps.guard_loggers([mine], (Mine,), lambda event: None)
    with pytest.raises(ValueError, match="a fault of hkft's"):
        mine.on_log()
