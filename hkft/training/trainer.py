"""transformers.Trainer with the two-pass objective, and nothing else: accumulation, precision, DDP, resume are Trainer's."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import datasets
import torch
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import DataCollatorWithFlattening, set_seed
from transformers import Trainer as TransformersTrainer
from transformers.trainer_pt_utils import LengthGroupedSampler

from hkft.data.sources import column_of
from hkft.diagnostics.decomposition import Added
from hkft.dropout.attach import attach
from hkft.dropout.method import Consistency, Method
from hkft.dropout.selfcheck import untouched
from hkft.errors import DataError, DivergedError, SetupError
from hkft.model.first_token import first_token
from hkft.model.vocabulary import Vocabulary
from hkft.training.objective import IGNORED, Objective, learns_tokens, objective, token_objective
from hkft.training.sampler import LikeLengthSampler

EXPLODED = 1000  # times the first training loss, or 1 if that is less: nothing is learned from there


class Trainer(TransformersTrainer):
    """Train with a dropout method. Takes what transformers.Trainer takes, and two more:

    dropout: a method's name or a `Method`, attached to `model` before training (wrap it in PEFT first). With
        transformers' DataCollatorWithFlattening, masks are drawn for each of the rows it lays end to end.
    dropout_rate: for every site that names none.

    Logs beside Trainer's `loss` (which is the objective) `task_loss` and, with a consistency loss, `consistency`: means
    over the rows (in a decoder, the learned tokens) since the last log, in train mode. A loss or gradient that is not finite,
    and a loss that explodes, end training with DivergedError; a batch without a label, with DataError. A decoder's loss on
    its next token is computed by hkft, with label smoothing as `args` has it, and without [B,L,V] logits;
    `compute_loss_func` is left its own way.
    """

    def __init__(self, *args: Any, dropout: str | Method = "none", dropout_rate: float | None = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        assert self.model is not None
        if learns_tokens(self.model):
            self._loss_shifts_labels = (
                True  # hkft's loss does, also where transformers does not know it of the family's
            )
        end_to_end = isinstance(self.data_collator, DataCollatorWithFlattening)
        self.attachment = attach(self.model, dropout, dropout_rate, padding_free=end_to_end)
        method = self.attachment.method
        self.consistency = method.consistency if method.passes == 2 else None
        if method.consistency and method.consistency.weight and not method.active:
            warnings.warn(
                "every dropout rate is 0: two passes would be equal, so the consistency loss is left out", stacklevel=2
            )
        self.samples_seen = self.tokens_seen = 0  # of all processes, up to the last log
        self._sums: Tensor | None = None  # since then: items, task losses and consistency over them
        self._counts: Tensor | None = None  # since then: samples, tokens
        self._vocabulary: Vocabulary | None = None
        self._first_loss: float | None = None

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler | None:
        """Trainer's; where it groups rows by length, `LikeLengthSampler`, of a column of lengths without a list of them."""
        given = self.train_dataset if train_dataset is None else train_dataset
        grouped, column = self.args.train_sampling_strategy == "group_by_length", self.args.length_column_name
        if grouped and isinstance(given, datasets.Dataset) and column in given.column_names:
            rows, lengths = self.args.train_batch_size * self.args.gradient_accumulation_steps, column_of(given, column)
        else:
            sampler = super()._get_train_sampler(train_dataset)
            if not isinstance(sampler, LengthGroupedSampler):
                return sampler
            rows, lengths = sampler.batch_size, sampler.lengths
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return LikeLengthSampler(rows * self.args.world_size, lengths, seed)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Task loss, plus the weighted consistency in train mode; both scaled alike under gradient accumulation.

        The models' own scaling by `num_items_in_batch` is not used: BERT-like classifiers take the argument and ignore
        it, so that eight batches of one would weigh eight times one batch of eight. A mean times the batch's share of
        the items is right for every model.
        """
        labels = inputs.get("labels")
        scaled = model.training and labels is not None and num_items_in_batch is not None
        self.loss_is_scaled_for_ga = scaled
        share = self._share(labels, num_items_in_batch) if scaled else 1.0
        result = self._objective(model, inputs, return_outputs)
        if model.training:
            self._count(inputs, result.task, result.consistency)
        loss = result.loss * share
        return (loss, result.outputs) if return_outputs else loss

    def _objective(self, model: nn.Module, inputs: dict[str, Any], logits: bool = False) -> Objective:
        """Of one batch, unscaled; the consistency in train mode only. logits: the model's own outputs are wanted."""

        def forward() -> tuple[Tensor, Any]:
            found = super(Trainer, self).compute_loss(model, dict(inputs), True)
            assert isinstance(found, tuple)
            return found

        labels = inputs.get("labels")
        if not logits and self._on_tokens(model, labels):
            return self._tokens(model, inputs, self.consistency)
        assert self.model is not None
        with nullcontext() if logits else first_token(self.model, inputs):
            return objective(model, forward, self.consistency if model.training else None, labels)

    def _on_tokens(self, model: nn.Module, labels: Tensor | None) -> bool:
        """Whether this is a training pass of a decoder on its next token."""
        plain = model.training and self.compute_loss_func is None
        return plain and labels is not None and labels.ndim == 2 and learns_tokens(model)

    def aside(self, rows: list[dict[str, Any]], seed: int) -> Added:
        """What training adds on some examples, measured in train mode, and nothing is learned.

        Means over their items, as training has them. The masks are those of `seed`, at every look the same, and the run's
        own random stream, its counts and its gradients are left as they were. Not for a model spread over devices.
        """
        objective, task, consistency = self._aside(rows, seed)
        smoothing, smoother = self.args.label_smoothing_factor, self.label_smoother
        if not smoothing:
            return Added(objective, task, consistency, task)
        self.args.label_smoothing_factor, self.label_smoother = 0.0, None
        try:
            return Added(objective, task, consistency, self._aside(rows, seed)[1])
        finally:
            self.args.label_smoothing_factor, self.label_smoother = smoothing, smoother

    def _aside(self, rows: list[dict[str, Any]], seed: int) -> tuple[float, float, float]:
        """(objective, task loss, weight x consistency)."""
        assert self.model is not None
        size, sums = self.args.per_device_train_batch_size, torch.zeros(4, dtype=torch.float64)
        aside = untouched(self.model, self.attachment)
        with aside, torch.no_grad(), self.compute_loss_context_manager():
            set_seed(seed)
            self.model.train()
            for start in range(0, len(rows), size):
                batch = self._prepare_inputs(self.data_collator(rows[start : start + size]))
                found = self._objective(self.model, batch)
                items = float(self._items(batch["labels"])) if "labels" in batch else 1.0
                told = (found.loss, found.task, found.loss - found.task)
                sums += torch.tensor([items, *(items * float(each) for each in told)], dtype=torch.float64)
        objective, task, consistency = (sums[1:] / sums[0]).tolist()
        return objective, task, consistency

    def find_shared(self, batch: dict[str, Any]) -> None:
        """Let a batch go through both passes, and nothing be learned, so that `dropout.prefix` knows what they share.

        Else the first step would find it, and a run that is resumed would take a step in full that once was not: the same,
        but for the order in which gradients are added up.
        """
        assert self.model is not None
        if self.consistency is not None:
            with untouched(self.model, self.attachment), torch.no_grad(), self.compute_loss_context_manager():
                self.model.train()
                self._objective(self.model, batch)

    def once(self, model: nn.Module, inputs: dict[str, Any]) -> Any:
        """One pass over a batch as training makes it, without the consistency: its loss, and the model's outputs or states."""
        with self.compute_loss_context_manager():
            if not learns_tokens(model):
                with first_token(model, inputs):
                    return model(**inputs)
            found = self._tokens(model, inputs, None)
            return {"loss": found.loss, **found.outputs}

    def _tokens(self, model: nn.Module, inputs: dict[str, Any], consistency: Consistency | None) -> Objective:
        if self._vocabulary is None:
            whole = self.is_fsdp_enabled or self.is_deepspeed_enabled or bool(self.args.torch_compile)
            self._vocabulary = Vocabulary(self.accelerator.unwrap_model(model), whole)
        with self.accelerator.autocast():
            smoothing = self.args.label_smoothing_factor
            return token_objective(model, self._vocabulary, inputs, consistency, smoothing)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Trainer's step; a loss that is NaN or inf, in any process, stops all here, before the optimizer has moved anything."""
        loss = super().training_step(*args, **kwargs)
        (found,) = self._of_all(loss.detach().reshape(1))
        if not math.isfinite(found):
            labels = args[1].get("labels")
            empty = labels is not None and not (labels != IGNORED).any()
            if any(self._of_all(torch.tensor([float(empty)], device=loss.device))):
                raise DataError(
                    f"the batch of step {self.state.global_step + 1} has no label to learn",
                    hint="leave out rows whose labels are all -100: Trainer would report a loss of 0 for them",
                )
            raise self._diverged(f"the training loss is {found}")
        now = found / self.args.world_size
        if self.loss_is_scaled_for_ga:
            now *= self.args.gradient_accumulation_steps
        self._first_loss = now if self._first_loss is None else self._first_loss
        if now > EXPLODED * max(1.0, self._first_loss):
            raise self._diverged(f"the training loss has exploded from {self._first_loss:.3g} to {now:.3g}")
        return loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """Trainer's; a gradient that is NaN or inf stops here, unless a loss scaler passes over such a step."""
        found = super()._get_grad_norm(model, grad_norm)
        scaled = getattr(self.accelerator, "scaler", None) is not None
        if found is not None and not scaled and not math.isfinite(float(found)):
            raise self._diverged(f"the gradient's norm is {float(found)}")
        return found

    def _diverged(self, what: str) -> DivergedError:
        return DivergedError(
            f"{what} at step {self.state.global_step + 1}",
            hint="lower train.learning_rate, or set train.warmup_steps or train.max_grad_norm",
        )

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        with _fits(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with _fits(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self._counts is not None:
            samples, tokens = self._of_all(self._counts)
            self.samples_seen, self.tokens_seen = self.samples_seen + int(samples), self.tokens_seen + int(tokens)
            self._counts = None
        if "loss" in logs and self._sums is not None:
            items, task, apart = self._of_all(self._sums)
            logs["task_loss"] = task / items
            if self.consistency is not None:
                logs["consistency"] = apart / items
            self._sums = None
        super().log(logs, start_time)

    def _of_all(self, numbers: Tensor) -> list[float]:
        """Summed over the processes, each of which has seen rows of its own."""
        summed = self.accelerator.reduce(numbers, "sum")
        assert isinstance(summed, Tensor)
        return summed.tolist()

    def _share(self, labels: Tensor | None, num_items: Tensor | int | None) -> Tensor:
        """The part of the accumulated batch's items that this micro-batch holds."""
        assert labels is not None and num_items is not None
        share = self._items(labels) / num_items
        return share * self.args.world_size if self.args.average_tokens_across_devices else share

    def _items(self, labels: Tensor) -> Tensor:
        """Labels that are learned: rows, or the tokens that a decoder predicts."""
        return ((labels[..., 1:] if self._loss_shifts_labels else labels) != IGNORED).sum()

    def _count(self, inputs: dict[str, Any], task: Tensor, consistency: Tensor | None) -> None:
        mask, places, labels = (inputs.get(key) for key in ("attention_mask", "position_ids", "labels"))
        tokens = inputs["input_ids"]
        flat = mask is None and places is not None and len(tokens) == 1  # rows end to end, each from place 0
        seen = [
            (places == 0).sum() if flat else tokens.new_full((), len(tokens)),
            tokens.new_full((), tokens.numel()) if mask is None else mask.sum(),
        ]
        items = task.new_ones(()) if labels is None else self._items(labels)
        apart = task.new_zeros(()) if consistency is None else consistency.detach()
        sums = torch.stack([items.float(), items * task.detach().float(), items * apart.float()])
        counts = torch.stack([number.long() for number in seen])
        self._sums = sums if self._sums is None else self._sums + sums
        self._counts = counts if self._counts is None else self._counts + counts


@contextmanager
def _fits(checkpoint: str | None) -> Iterator[None]:
    """Raise SetupError for a checkpoint of another model or optimizer."""
    try:
        yield
    except (RuntimeError, ValueError, KeyError) as error:
        raise SetupError(
            "the checkpoint does not fit the model or the optimizer of now",
            where=checkpoint,
            found=str(error).strip().splitlines()[-1].strip(),
            hint="go on under the recipe the run was started with, or train anew under another --output",
        ) from error
