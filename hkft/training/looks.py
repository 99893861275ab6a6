"""Looks: at fixed steps the same two sets, a probe of the training rows and the validation rows, in eval mode.

Trainer's own evaluation knows one set, no losses of single examples, and five coupled flags; this callback is all there is
here instead. It tells the events, keeps the best adapter, and stops on a signal. Several processes of a run take a look together:
the first one judges it, and all have what it says.
"""

from __future__ import annotations

import contextlib
import math
import signal
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hkft import processes
from hkft.diagnostics.decomposition import Added, net_gain, regret, regularisation
from hkft.diagnostics.gap import LOWER_IS_BETTER, gap
from hkft.diagnostics.uncertainty import Interval, Losses, change_interval, gap_interval, rise_p
from hkft.dropout.method import Consistency
from hkft.errors import DivergedError
from hkft.evaluation.completions import Completions
from hkft.evaluation.predict import Predictions
from hkft.events import Evaluated, Listener, Notice, TrainStep

SPLITS = ("train_probe", "validation")


def steps(total: int, per_epoch: float, evals_per_epoch: int) -> list[int]:
    """The optimizer steps to look after: `evals_per_epoch` evenly in every epoch, and the last one."""
    count = max(1, round(total / per_epoch * evals_per_epoch))
    spread = {max(1, math.ceil(n * per_epoch / evals_per_epoch)) for n in range(1, count + 1)}
    return sorted({step for step in spread if step <= total} | {total})


def share(count: int, rows: int, trained: float, consistency: Consistency | None) -> float:
    """Roughly the part of a run's time that `count` looks at `rows` rows take, of which `trained` rows are trained on.

    A backward pass costs about two forward ones; a second pass without gradients, one more.
    """
    seen, learned = count * rows, trained * (3 if consistency is None else 6 if consistency.gradient == "both" else 4)
    return seen / (seen + learned)


@dataclass
class Clock:
    """Seconds spent on training itself: looks and saving apart."""

    started: float = 0.0
    outside: float = 0.0
    before: float = 0.0  # of an earlier part of the run, where it was resumed
    looked: float = 0.0  # outside, of that part

    def part(self) -> float:
        """Of this part of the run, which its counts are of."""
        return time.perf_counter() - self.started - self.outside

    def seconds(self) -> float:
        return self.before + self.part()


Seen = Predictions | Completions


class Rows(NamedTuple):
    """Validation at a look: of each row (of rows of one prompt as of one) its loss, and whether it was decided rightly."""

    losses: Losses
    right: NDArray[np.bool_] | None


@dataclass
class Looks(TrainerCallback):
    """look(split) -> Predictions, in eval mode; keep(seen) saves the adapter as the best so far.

    remember(step, seen) keeps the losses of every row; aside() measures what training adds to the loss on some rows of the
    probe, and gives it with the number of rows; log(numbers) hands them to the loggers. applied() puts in the model's place
    what is looked at and kept, where that is not the model as it is trained.
    """

    look: Callable[[str], Seen]
    keep: Callable[[dict[str, Seen]], None]
    tell: Listener
    at: list[int]
    criterion: str  # "loss" or a metric of the validation set
    patience: int | None
    counters: Callable[[], tuple[int, int]]  # samples and tokens trained on so far
    remember: Callable[[int, dict[str, Seen]], None] = lambda step, seen: None
    aside: Callable[[], tuple[Added, int] | None] = lambda: None
    log: Callable[[dict[str, float]], None] = lambda numbers: None
    applied: Callable[[], AbstractContextManager[None]] = nullcontext
    curve: list[Evaluated] = field(default_factory=list)
    clock: Clock = field(default_factory=Clock)
    rows: list[Rows] = field(default_factory=list)  # a look each
    forgotten: bool = False  # the run was resumed, and rows' losses of its first part are not there
    interrupted: int | None = None  # the signal

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.clock.started = time.perf_counter()
        if not self.curve:
            self._look(state)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.global_step in self.at:
            log_too = control.should_log
            with self.applied():
                self._look(state)
            control.should_log = log_too  # what a look logs is not the log of the step
            control.should_save = True
            if self._out_of_patience():
                control.should_training_stop = True
        if number := processes.largest(self.interrupted or 0):  # all stop after the same step
            self.interrupted = number
            control.should_save = control.should_training_stop = True

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any
    ) -> None:
        if not logs or "task_loss" not in logs:
            return
        samples, tokens = self.counters()
        seconds = max(self.clock.part(), 1e-9)
        self.tell(
            TrainStep(
                step=state.global_step,
                total_steps=state.max_steps,
                epoch=float(state.epoch or 0.0),
                objective=logs["loss"],
                task_loss=logs["task_loss"],
                consistency=logs.get("consistency"),
                learning_rate=logs.get("learning_rate", float("nan")),
                samples_per_s=samples / seconds,
                tokens_per_s=tokens / seconds,
            )
        )

    @property
    def best(self) -> Evaluated | None:
        """The best look so far, by the criterion; the first of equals."""
        return next((seen for seen in reversed(self.curve) if seen.best), None)

    def look_once_more(self, state: TrainerState) -> None:
        """A look beside those that were planned, where an interrupted run ends: it is never the best, and a resumed run drops it."""
        if self.curve and self.curve[-1].step != state.global_step:
            with self.applied():
                self._look(state, extra=True)

    def _look(self, state: TrainerState, extra: bool = False) -> None:
        began = time.perf_counter()
        with processes.together():
            seen = {split: self.look(split) for split in SPLITS}
            evaluated = processes.of_first(lambda: self._judged(state, seen, began, extra))
            if evaluated.best:
                self.keep(seen)
        self.curve.append(evaluated)
        self.log(numbers(evaluated))
        self.clock.outside += time.perf_counter() - began
        self.tell(evaluated)

    def _judged(self, state: TrainerState, seen: dict[str, Seen], began: float, extra: bool) -> Evaluated:
        """What is to be said of a look, whose rows are remembered."""
        metrics = {split: predictions.metrics() for split, predictions in seen.items()}
        step = state.global_step
        for split in SPLITS:
            if not math.isfinite(metrics[split]["loss"]):
                raise DivergedError(
                    f"the {split.replace('_', ' ')} loss is {metrics[split]['loss']} at step {step}",
                    hint="lower train.learning_rate",
                )
        self.remember(step, seen)
        probe, validation = (seen[split].by_row.grouped(seen[split].groups) for split in SPLITS)
        self.rows.append(Rows(validation, seen["validation"].right))
        lowest = min(self.rows, key=lambda rows: rows.losses.mean)
        earlier = [look.validation for look in self.curve]
        return Evaluated(
            step=step,
            epoch=float(state.epoch or 0.0),
            **metrics,
            gap=gap(**metrics),
            best=step > 0 and not extra and self._improves(metrics["validation"]),
            seconds=time.perf_counter() - began,
            gap_interval=gap_interval(probe, validation),
            net_gain=net_gain((earlier or [metrics["validation"]])[0], metrics["validation"]),
            regret=regret(earlier, metrics["validation"]),
            regret_interval=None if self.forgotten else change_interval(lowest.losses, validation),
            regularisation=self._regularisation(seen["train_probe"].by_row),
            accuracy_interval=None if self.forgotten else _change(lowest.right, seen["validation"].right),
            rise_p=None if self.forgotten else rise_p([rows.losses for rows in self.rows]),
            extra=extra,
        )

    def _regularisation(self, probe: Losses) -> dict[str, float] | None:
        found = self.aside()
        if found is None:
            return None
        added, rows = found
        return regularisation(added, Losses(probe.sums[:rows], probe.items[:rows]).mean)

    def _improves(self, validation: dict[str, float]) -> bool:
        if self.best is None:
            return True
        then = self.best.validation
        new, old = (side[self.criterion] for side in (validation, then))
        if old is None or not math.isfinite(old) or not math.isfinite(new):  # JSON has null for NaN, which is no best
            return math.isfinite(new)
        if new == old:  # a metric of few rows stands still while the loss falls
            return validation["loss"] < then["loss"]
        return (new < old) is (self.criterion in LOWER_IS_BETTER)

    def _out_of_patience(self) -> bool:
        if self.patience is None or self.best is None:
            return False
        return sum(seen.step > self.best.step for seen in self.curve) >= self.patience


def _change(before: NDArray[np.bool_] | None, now: NDArray[np.bool_] | None) -> Interval | None:
    """The interval of the change of an accuracy; None where nothing is decided."""
    if before is None or now is None:
        return None
    ones = np.ones(len(now), dtype=np.int64)
    return change_interval(Losses(before.astype(float), ones), Losses(now.astype(float), ones))


def numbers(evaluated: Evaluated) -> dict[str, float]:
    """What a look found, by the names that loggers are given: eval_validation_loss, eval_gap_loss, ..."""
    named = ("train_probe", "validation", "gap", "net_gain", "regret", "regularisation")
    return {f"eval_{name}_{key}": value for name in named for key, value in (getattr(evaluated, name) or {}).items()}


class StopOnSignal:
    """While inside, the first Ctrl-C or SIGTERM asks `looks` to stop after the step; a second one stops at once."""

    def __init__(self, looks: Looks) -> None:
        self.looks = looks
        self.before: dict[int, Any] = {}

    def __enter__(self) -> None:
        if threading.current_thread() is threading.main_thread():
            self.before = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, _: Any) -> None:
        if self.looks.interrupted is not None:
            raise KeyboardInterrupt
        self.looks.interrupted = number
        with contextlib.suppress(RuntimeError):  # where the signal came while something was printed
            self.looks.tell(Notice("stopping after this step, with a checkpoint; once more stops at once", "warning"))
