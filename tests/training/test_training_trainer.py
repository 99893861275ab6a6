"""hkft.Trainer in a script of one's own: what it logs, and that accumulated batches weigh what whole ones do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, TrainingArguments

import hkft
from hkft.errors import DivergedError
from hkft.training.sampler import LikeLengthSampler


def build(tmp_path: Path, labels: list, *, dropout: Any = "none", **settings: Any) -> hkft.Trainer:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        num_labels=1 if isinstance(labels[0], float) else 2,
    )
    generator = torch.Generator().manual_seed(1)
    rows = [
        {
            "input_ids": torch.randint(4, 50, (9,), generator=generator),
            "attention_mask": torch.ones(9).long(),
            "labels": y,
        }
        for y in labels
    ]
    chosen = {"max_steps": 1, "learning_rate": 0.1, "optim": "sgd", "lr_scheduler_type": "constant", **settings}
    arguments = TrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True,
        logging_steps=1, max_grad_norm=0.0, **chosen,
    )  # fmt: skip
    return hkft.Trainer(BertForSequenceClassification(config), arguments, train_dataset=rows, dropout=dropout)


@pytest.mark.parametrize("labels", [[0, 1, 1, 0, 1, 0, 0, 1], [0.5, 1.0, 2.5, 0.0, 3.0, 1.5, 2.0, 4.0]])
def test_eight_times_one_is_one_times_eight(tmp_path, labels):
    whole = build(tmp_path, labels, per_device_train_batch_size=8)
    parts = build(tmp_path, labels, per_device_train_batch_size=1, gradient_accumulation_steps=8)
    losses = [trainer.train().training_loss for trainer in (whole, parts)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for a, b in zip(whole.model.parameters(), parts.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_the_consistency_term_of_parts_adds_up_to_that_of_the_whole(tmp_path):
    """One micro-batch's term is a mean over its rows; accumulated, all rows must count alike."""
    method = hkft.Method([hkft.Site("hidden", rate=0.4)], hkft.Consistency("kl", weight=10.0))
    trainer = build(tmp_path, [0, 1] * 4, dropout=method, per_device_train_batch_size=2, gradient_accumulation_steps=4)
    loss = trainer.train().training_loss
    [logged] = [entry for entry in trainer.state.log_history if "task_loss" in entry]
    assert logged["consistency"] > 0
    assert loss == pytest.approx(logged["task_loss"] + 10.0 * logged["consistency"], rel=1e-5)


def test_the_log_keeps_objective_task_loss_and_consistency_apart(tmp_path):
    trainer = build(tmp_path, [0, 1] * 4, dropout="hiddenkey", max_steps=3)
    trainer.train()
    steps = [entry for entry in trainer.state.log_history if "task_loss" in entry]
    assert len(steps) == 3
    for entry in steps:
        assert entry["loss"] == pytest.approx(entry["task_loss"] + entry["consistency"], abs=2e-6)


def test_evaluation_has_no_second_pass_and_no_dropout(tmp_path):
    trainer = build(tmp_path, [0, 1] * 4, dropout="hiddenkey")
    calls = []
    trainer.model.register_forward_hook(lambda *_: calls.append(1))
    first = trainer.evaluate(trainer.train_dataset)["eval_loss"]
    assert len(calls) == 1
    assert trainer.evaluate(trainer.train_dataset)["eval_loss"] == first


def test_a_loss_that_is_not_finite_ends_training_before_the_optimizer_moves(tmp_path):
    trainer = build(tmp_path, [0, 1] * 4)
    with torch.no_grad():
        trainer.model.classifier.bias.fill_(float("nan"))
    before = trainer.model.bert.pooler.dense.weight.clone()
    with pytest.raises(DivergedError, match="the training loss is nan at step 1\n  hint: lower train.learning_rate"):
        trainer.train()
    assert torch.equal(trainer.model.bert.pooler.dense.weight, before)


def test_every_rate_zero_warns_and_drops_the_second_pass(tmp_path):
    method = hkft.METHODS["hiddenkey"].with_rate(0.0)
    with pytest.warns(UserWarning, match="every dropout rate is 0: two passes would be equal"):
        trainer = build(tmp_path, [0, 1], dropout=method)
    assert trainer.consistency is None


def test_lengths_of_many_rows_are_read_without_a_list_of_them(tmp_path, monkeypatch):
    lengths = [5, 9, 7, 3, 8, 6, 4, 9]
    trainer = build(
        tmp_path, [0, 1] * 4, train_sampling_strategy="group_by_length", per_device_train_batch_size=2, seed=3
    )
    listed = trainer._get_train_sampler([{"input_ids": [1] * length} for length in lengths])
    told = datasets.Dataset.from_dict({"length": lengths, "input_ids": [[1]] * 8}).select(range(8))
    with monkeypatch.context() as patch:
        patch.setattr(datasets.Dataset, "__getitem__", None)
        counted = trainer._get_train_sampler(told)
    assert isinstance(listed, LikeLengthSampler) and isinstance(counted, LikeLengthSampler)
    assert counted.lengths.tolist() == lengths
    assert (counted.batch_size, list(counted)) == (listed.batch_size, list(listed)) and counted.batch_size == 2
    trainer.train_dataset = told
    assert list(trainer._get_train_sampler()) == list(counted)
    bare = trainer._get_train_sampler(told.remove_columns("length"))  # counted by transformers
    assert isinstance(bare, LikeLengthSampler) and bare.lengths.tolist() == [1] * 8
    trainer.args.train_sampling_strategy = "random"
    assert not isinstance(trainer._get_train_sampler(), LikeLengthSampler)
