"""A moving average of the adapter, which the looks look at and keep: training itself is untouched by it.

    average <- d average + (1 - d) adapter    after every optimizer step t, d = min(decay, (1 + t) / (10 + t))

so that the first steps, where there is nothing to average yet, do not weigh on it (Polyak and Juditsky 1992; the warm-up is
that of most implementations).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

FILE = "average.pt"  # in a checkpoint


class Average(TrainerCallback):
    """Of every trained parameter of `model`. `applied()` puts it in the model's place for a while."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.trained = {name: each for name, each in model.named_parameters() if each.requires_grad}
        self.average: dict[str, Tensor] = {}

    @torch.no_grad()
    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        saved = _file(args, state)
        if saved.exists():
            average = torch.load(saved, map_location="cpu", weights_only=True)
            self.average = {name: average[name].to(each.device) for name, each in self.trained.items()}
        else:
            self.average = {name: each.detach().clone() for name, each in self.trained.items()}

    @torch.no_grad()
    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        decay = min(self.decay, (2 + state.global_step) / (11 + state.global_step))  # this step is not counted yet
        get_ema_multi_avg_fn(decay)(list(self.average.values()), list(self.trained.values()), state.global_step)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.is_world_process_zero:
            torch.save(self.average, _file(args, state))

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The average in the model; inside, nothing is trained."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, average in self.average.items():
            trained = self.trained[name].detach().clone()
            self.trained[name].copy_(average)
            average.copy_(trained)


def _file(args: TrainingArguments, state: TrainerState) -> Path:
    assert args.output_dir
    return Path(args.output_dir) / f"checkpoint-{state.global_step}" / FILE
