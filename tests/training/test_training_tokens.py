"""A decoder's objective, by token: against transformers' own loss and the written-out KL, whatever the batches are cut into."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import (
    DataCollatorWithFlattening,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    TrainingArguments,
)

import hkft
from hkft.data.completions import IGNORED
from hkft.data.tokenise import collator
from hkft.dropout.consistency import LOSSES
from hkft.errors import DataError
from hkft.model import vocabulary as vocabulary_module
from hkft.model.vocabulary import Vocabulary
from hkft.recipe import load
from hkft.training import run
from hkft.training.objective import learns_tokens, token_objective

CONFIG = LlamaConfig(
    vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, intermediate_size=64,
    use_cache=False, pad_token_id=0,
)  # fmt: skip


@pytest.fixture
def model():
    torch.manual_seed(0)
    base = LlamaForCausalLM(deepcopy(CONFIG))
    return get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)).train()


def rows(lengths=(9, 5, 14, 7, 11, 6, 8, 12)) -> list[dict]:
    draw = torch.Generator().manual_seed(3)
    made = []
    for number, length in enumerate(lengths):
        tokens = torch.randint(3, 60, (length,), generator=draw).tolist()
        labels = [IGNORED] * (2 + number % 3) + tokens[2 + number % 3 :]
        made.append({"input_ids": tokens, "attention_mask": [1] * length, "labels": labels})
    return made


def padded(given: list[dict]) -> dict[str, torch.Tensor]:
    width = max(len(row["input_ids"]) for row in given)
    fill = {"input_ids": 0, "attention_mask": 0, "labels": IGNORED}
    return {k: torch.tensor([row[k] + [v] * (width - len(row[k])) for row in given]) for k, v in fill.items()}


def gradients(model) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def assert_same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor], **close) -> None:
    assert one.keys() == two.keys()
    assert any(gradient.abs().max() > 0 for gradient in one.values())
    for name in one:
        torch.testing.assert_close(one[name], two[name], **close)


@pytest.mark.parametrize("whole", [False, True])
def test_without_a_consistency_loss_it_is_transformers_own(model, monkeypatch, whole):
    monkeypatch.setattr(vocabulary_module, "NUMBERS", 60 * 5)
    batch = padded(rows())
    own = model(**batch).loss
    own.backward()
    expected = gradients(model)
    found = token_objective(model, Vocabulary(model, whole), batch, None)
    found.loss.backward()
    assert found.loss.item() == pytest.approx(own.item(), rel=1e-6)
    assert found.task.item() == pytest.approx(own.item(), rel=1e-6)
    assert found.consistency is None
    assert_same(gradients(model), expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("gradient", ["one", "both"])
@pytest.mark.parametrize("kind", ["kl", "js", "js_symmetric"])
def test_two_passes_are_the_written_out_formula(model, kind, gradient, monkeypatch):
    monkeypatch.setattr(vocabulary_module, "NUMBERS", 60 * 5)
    batch, method = padded(rows()), hkft.METHODS["hiddenkey-"].with_rate(0.3)
    learned = batch["labels"][:, 1:] != IGNORED
    consistency = hkft.Consistency(kind, weight=0.7, gradient=gradient)
    with hkft.attach(model, method):
        state = torch.get_rng_state()
        clean = kind == "js"
        model.train(not clean)
        with torch.set_grad_enabled(gradient == "both"):
            other = model(**batch)
        main = model.train()(**batch)
        task = 0.5 * (main.loss + other.loss) if gradient == "both" and not clean else main.loss
        term = LOSSES[kind](main.logits[:, :-1][learned], other.logits[:, :-1][learned])
        (task + 0.7 * term).backward()
        expected = gradients(model)
        torch.set_rng_state(state)
        found = token_objective(model, Vocabulary(model), batch, consistency)
        found.loss.backward()
    assert term.item() > 1e-5
    assert found.consistency.item() == pytest.approx(term.item(), rel=1e-4)
    assert found.loss.item() == pytest.approx((task + 0.7 * term).item(), rel=1e-5)
    assert_same(gradients(model), expected, rtol=1e-3, atol=1e-6)


def test_the_term_is_a_mean_over_completion_tokens_whatever_the_batch(model):
    """Twice the same rows: twice the tokens, the same loss."""
    batch = padded(rows()[:2])
    twice = {name: value.repeat(2, 1) for name, value in batch.items()}
    one, two = (token_objective(model, Vocabulary(model), b, None).loss.item() for b in (batch, twice))
    assert one == pytest.approx(two, rel=1e-6)


def test_label_smoothing_is_trainers_own(model, tmp_path):
    from transformers.trainer_pt_utils import LabelSmoother

    batch = padded(rows())
    expected = LabelSmoother(0.1)(model(**batch), batch["labels"], shift_labels=True)
    found = token_objective(model, Vocabulary(model), batch, None, smoothing=0.1)
    assert found.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert abs(found.loss.item() - model(**batch).loss.item()) > 1e-4


def test_what_learns_tokens(model):
    assert learns_tokens(model)
    soft = get_peft_model(
        LlamaForCausalLM(deepcopy(CONFIG)), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    )
    assert not learns_tokens(soft)


def trained(model, tmp_path: Path, *, dropout="none", flat=False, data=None, **arguments) -> list[dict]:
    """The log of a few steps of hkft.Trainer over `rows`, in their order."""
    settings = TrainingArguments(
        output_dir=str(tmp_path / "out"), report_to="none", max_steps=2, logging_steps=1, save_strategy="no", use_cpu=True,
        learning_rate=1e-2, remove_unused_columns=False, disable_tqdm=True, seed=1, lr_scheduler_type="constant",
        train_sampling_strategy="sequential", **arguments,
    )  # fmt: skip
    collate = DataCollatorWithFlattening() if flat else padded
    trainer = hkft.Trainer(
        model=model,
        args=settings,
        train_dataset=Dataset.from_list(data or rows()),
        data_collator=collate,
        dropout=dropout,
    )
    trainer.train()
    trainer.attachment.detach()
    return [log for log in trainer.state.log_history if "loss" in log]


def fresh():
    torch.manual_seed(0)
    base = LlamaForCausalLM(deepcopy(CONFIG))
    return get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)).train()


WAYS = {
    "8 x 1": {"per_device_train_batch_size": 8},
    "1 x 8": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8},
    "checkpointing": {"per_device_train_batch_size": 8, "gradient_checkpointing": True},
    "2 x 4, checkpointing": {
        "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "gradient_checkpointing": True
    },
    "end to end": {"per_device_train_batch_size": 8, "flat": True},
    "end to end, 4 x 2": {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "flat": True},
}  # fmt: skip


# the older name works in every transformers 5
checkpointing = pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")


@checkpointing
@pytest.mark.parametrize("way", WAYS)
def test_however_a_batch_is_cut_the_losses_and_weights_are_the_same(way, tmp_path):
    """Rows have 3 to 12 learned tokens, so that a mean of means would be another number."""
    model, reference = fresh(), fresh()
    expected = trained(reference, tmp_path, **WAYS["8 x 1"])
    found = trained(model, tmp_path, **WAYS[way])
    for one, two in zip(found, expected, strict=True):
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-5)
        assert one["task_loss"] == pytest.approx(two["task_loss"], rel=1e-5)
        assert one["grad_norm"] == pytest.approx(two["grad_norm"], rel=1e-4)
    for (name, one), two in zip(model.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=2e-5, msg=name)
    assert expected[0]["loss"] != expected[1]["loss"]


@checkpointing
@pytest.mark.parametrize("way", ["checkpointing", "end to end"])
def test_every_way_trains_with_two_passes(way, tmp_path):
    logs = trained(fresh(), tmp_path, dropout=hkft.METHODS["hiddenkey"].with_rate(0.2), **WAYS[way])
    assert all(log["consistency"] > 0 for log in logs)
    assert all(log["loss"] == pytest.approx(log["task_loss"] + log["consistency"], rel=1e-4) for log in logs)


@pytest.mark.parametrize("flat", [False, True])
def test_a_batch_without_a_label_is_an_error_and_no_loss_of_zero(flat, tmp_path):
    masked = [{**row, "labels": [IGNORED] * len(row["labels"])} for row in rows()]
    with pytest.raises(DataError, match="no label to learn"):
        trained(fresh(), tmp_path, flat=flat, data=masked, per_device_train_batch_size=8)


def test_the_self_check_of_a_run_holds_no_more_logits_than_a_step(generation_file, tmp_path, monkeypatch):
    monkeypatch.setattr(vocabulary_module, "NUMBERS", 261 * 7)
    begun = run.begin(load(generation_file, ["dropout.method=hiddenkey"]), tmp_path / "run")
    head, most = begun.trainer.model.get_output_embeddings(), []
    inner = begun.trainer.model.base_model.model
    inner.register_forward_hook(lambda _m, _a, out: most.append(out.logits.shape[-1]))
    own = head.forward
    monkeypatch.setattr(head, "forward", lambda x: most.append(x.numel() // x.shape[-1]) or own(x))
    assert run._self_check(begun)["self_check"]["rows"] > 1
    assert len(most) > 20
    assert max(most) <= 64  # hidden size: the head was left out, and given 7 tokens at a time


def test_labels_from_the_first_token_on_weigh_alike_however_a_batch_is_cut(tmp_path):
    """GPT-2, whose loss transformers does not know to be shifted: the first label is none that is predicted."""
    given = [{**row, "labels": row["input_ids"]} for row in rows()]
    told = []
    for size in (8, 1):
        torch.manual_seed(0)
        gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=60, n_embd=32, n_layer=2, n_head=2, n_positions=64))
        args = TrainingArguments(
            str(tmp_path), per_device_train_batch_size=size, gradient_accumulation_steps=8 // size, max_steps=1, logging_steps=1,
            use_cpu=True, report_to="none", disable_tqdm=True, save_strategy="no",
        )  # fmt: skip
        for module in gpt2.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        trainer = hkft.Trainer(model=gpt2, args=args, train_dataset=Dataset.from_list(given), data_collator=padded)
        trainer.train()
        told.append(trainer.state.log_history[0])
    for name in ("loss", "task_loss", "grad_norm"):
        assert told[0][name] == pytest.approx(told[1][name], rel=1e-5)


def test_hkfts_own_collator_lays_rows_end_to_end():
    given = [
        {**row, "id": 1, "length": 3, "prompt": "a", "completion": "b", "prompt_length": 2} for row in rows((4, 6))
    ]
    batch = dict(collator(None, padding_free=True)(given))
    assert set(batch) == {"input_ids", "labels", "position_ids"}
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 0, 1, 2, 3, 4, 5]]
    assert batch["labels"][0, 4] == IGNORED


def test_a_short_run_learns_a_mapping_by_heart_and_writes_it_back(tmp_path, tiny_llama):
    """End to end: real files, a random model, near-zero loss, and the text it generates is the text it was given."""
    from hkft.evaluation import saved

    pairs = {"ka": "stone", "ri": "water", "mo": "fire and air", "te": "a small bird", "lu": "", "so": "wood"}
    lines = [{"q": q, "a": a} for q, a in pairs.items()]
    data, asked = tmp_path / "pairs.jsonl", tmp_path / "asked.jsonl"
    data.write_text("\n".join(map(json.dumps, lines * 40)) + "\n", encoding="utf-8")
    asked.write_text("\n".join(map(json.dumps, lines)) + "\n", encoding="utf-8")
    recipe = tmp_path / "mapping.yaml"
    recipe.write_text(
        f"""\
model: {{name: {tiny_llama}, device: cpu}}
task: generation
data: {{train: {data}, validation: {asked}, prompt: "{{q}} ->", completion: " {{a}}", max_length: 64}}
lora: {{r: 16, lora_alpha: 32, target_modules: all-linear}}
dropout: {{method: hiddenkey-, rate: 0.02}}
train:
  learning_rate: 1.0e-2
  num_train_epochs: 6
  per_device_train_batch_size: 8
  lr_scheduler_type: cosine
generation: {{max_new_tokens: 24}}
diagnostics: {{evals_per_epoch: 1}}
""",
        encoding="utf-8",
    )
    learned = hkft.train(recipe, output=tmp_path / "run")
    seen = saved.evaluate(saved.load_saved(learned.path))
    answers = {row["prompt"]: (row["label"], row["prediction"]) for row in seen.records()}
    assert len(answers) == 5  # "lu" has nothing to say, and was left out
    assert all(label == prediction for label, prediction in answers.values()), answers
    metrics = seen.metrics()
    assert metrics["loss"] < 0.05
    assert metrics["token_accuracy"] > 0.98
    assert metrics["rouge_l"] == pytest.approx(100)
