"""What a run says while it works: one stream of plain records, told to one listener.

The run folder appends them to `metrics.jsonl`, the view draws them, a notebook may collect them. The work itself knows
neither: it only calls `tell(event)`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Stage:
    """A step of the work outside training itself ("tokenising", "evaluating"); `total` None: it cannot be counted."""

    text: str
    done: int = 0
    total: int | None = None


@dataclass(frozen=True, slots=True)
class Notice:
    """Something the user should know that is not an error: duplicates between splits, truncated rows."""

    text: str
    level: str = "info"  # info | warning


@dataclass(frozen=True, slots=True)
class Sample:
    """One training example of a decoder as it is trained on: pieces of text in their order, and whether each is learned."""

    pieces: Sequence[tuple[str, bool]]


@dataclass(frozen=True, slots=True)
class Started:
    """Training is about to begin."""

    run: str  # the run folder
    recipe: str
    method: str
    model: str
    task: str
    device: str
    seed: int
    total_steps: int
    epochs: float
    train_rows: int
    validation_rows: int
    probe_rows: int
    trainable_parameters: int
    total_parameters: int
    metric: str  # the task's main metric: "accuracy", "pearson", ...


@dataclass(frozen=True, slots=True)
class TrainStep:
    """One optimizer step, in train mode: dropout on, so none of these losses is comparable with an `Evaluated`.

    `objective` = `task_loss` + weight * `consistency`: what the optimizer descends.
    """

    step: int
    total_steps: int
    epoch: float
    objective: float
    task_loss: float
    consistency: float | None
    learning_rate: float
    samples_per_s: float
    tokens_per_s: float


@dataclass(frozen=True, slots=True)
class Evaluated:
    """One look in eval mode at the fixed probe of the training set and at the validation set, the same way at both.

    `train_probe` and `validation` hold `loss` and the task's metrics; `gap` is validation minus probe for the loss and
    probe minus validation for metrics where higher is better, so that a positive gap is always a worse validation.
    `net_gain`, `regret` and `regularisation` (None where it was not measured): see `hkft.diagnostics.decomposition`; the
    intervals, of 95 %, of the loss: `hkft.diagnostics.uncertainty`. The regret's is of the loss since its lowest.
    """

    step: int
    epoch: float
    train_probe: Mapping[str, float]
    validation: Mapping[str, float]
    gap: Mapping[str, float]
    best: bool  # the best validation loss or metric so far, by the run's own criterion
    seconds: float
    gap_interval: tuple[float, float] | None = None
    net_gain: Mapping[str, float] = field(default_factory=dict)
    regret: Mapping[str, float] = field(default_factory=dict)
    regret_interval: tuple[float, float] | None = None
    regularisation: Mapping[str, float] | None = None
    accuracy_interval: tuple[float, float] | None = None  # of its change since validation loss was lowest
    rise_p: float | None = None  # of the validation loss up to here, see `hkft.diagnostics.uncertainty`
    extra: bool = False  # where an interrupted run stopped: not among the looks that were planned, and never the best


@dataclass(frozen=True, slots=True)
class Finished:
    """The run is over. `summary` is the content of `summary.json`; `sites` is `Attachment.report()`."""

    run: str
    summary: Mapping[str, Any]
    sites: Sequence[Mapping[str, Any]] = ()


Event = Stage | Notice | Sample | Started | TrainStep | Evaluated | Finished
Listener = Callable[[Event], None]

_NAMES = {
    Stage: "stage",
    Notice: "notice",
    Sample: "sample",
    Started: "start",
    TrainStep: "train",
    Evaluated: "eval",
    Finished: "finish",
}


def as_record(event: Event) -> dict[str, Any]:
    """The event as one line of `metrics.jsonl`: its fields and `"event"`, its name."""
    return {"event": _NAMES[type(event)], **asdict(event)}


def silent(event: Event) -> None:
    """The listener that does not listen."""
