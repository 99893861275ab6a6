"""The two-pass objective: what is added, what gradient flows, when a second pass is spent."""

from __future__ import annotations

import pytest
import torch
import transformers
from peft import PromptTuningConfig, get_peft_model
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel, T5Config

import hkft
from hkft.dropout.consistency import js, js_symmetric, kl
from hkft.errors import MethodError
from hkft.training import objective as objective_module
from hkft.training.objective import distance, objective

SMALL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


@pytest.fixture
def model() -> BertForSequenceClassification:
    config = BertConfig(vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    config.update(SMALL)
    return BertForSequenceClassification(config).train()


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    return {"input_ids": torch.randint(4, 50, (6, 9)), "labels": torch.tensor([0, 1, 0, 1, 1, 0])}


def two_passes(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> list:
    """What the next two training passes will give, without using up their random numbers."""
    state = torch.get_rng_state()
    with torch.no_grad():
        seen = [model(**batch), model(**batch)]
    torch.set_rng_state(state)
    return seen


def test_the_loss_is_the_second_pass_s_task_loss_plus_the_weighted_kl(model, batch):
    with hkft.attach(model, hkft.METHODS["hiddenkey"].with_rate(0.3).with_weight(0.7)):
        first, second = two_passes(model, batch)
        loss = hkft.consistency_loss(model, batch)
    assert loss.item() == pytest.approx((second.loss + 0.7 * kl(second.logits, first.logits)).item(), rel=1e-6)


def test_one_pass_gradient_is_that_of_a_detached_first_pass(model, batch):
    with hkft.attach(model, hkft.METHODS["hiddenkey"].with_rate(0.3)):
        state = torch.get_rng_state()
        hkft.consistency_loss(model, batch).backward()
        ours = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        torch.set_rng_state(state)
        first = model(**batch)
        second = model(**batch)
        (second.loss + kl(second.logits, first.logits.detach())).backward()
    assert ours
    for name, parameter in model.named_parameters():
        if name in ours:
            torch.testing.assert_close(ours[name], parameter.grad)


def test_gradient_through_both_passes_averages_the_task_loss(model, batch):
    method = hkft.Method(
        [hkft.Site("hidden", rate=0.3, rescale="inverse_keep")], hkft.Consistency("kl", weight=2.0, gradient="both")
    )
    with hkft.attach(model, method):
        first, second = two_passes(model, batch)
        state = torch.get_rng_state()
        loss = hkft.consistency_loss(model, batch)
        loss.backward()
        ours = model.classifier.weight.grad.clone()
        model.zero_grad()
        torch.set_rng_state(state)
        a, b = model(**batch), model(**batch)
        (0.5 * (a.loss + b.loss) + 2.0 * kl(b.logits, a.logits)).backward()
    expected = 0.5 * (first.loss + second.loss) + 2.0 * kl(second.logits, first.logits)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    torch.testing.assert_close(ours, model.classifier.weight.grad)


def test_js_compares_with_the_clean_output_and_leaves_the_mode_alone(model, batch):
    method = hkft.Method([hkft.Site("hidden", rate=0.5)], hkft.Consistency("js"))
    with hkft.attach(model, method):
        with torch.no_grad():
            clean = model.eval()(**batch)
        model.train()
        state = torch.get_rng_state()
        dropped = model(**batch)
        torch.set_rng_state(state)
        loss = hkft.consistency_loss(model, batch)
    assert model.training
    assert loss.item() == pytest.approx((dropped.loss + js(dropped.logits, clean.logits)).item(), rel=1e-6)


def test_every_rate_zero_spends_one_pass(model, batch):
    with hkft.attach(model, hkft.METHODS["hiddenkey"].with_rate(0.0)):
        calls = []
        handle = model.register_forward_hook(lambda *_: calls.append(1))
        loss = hkft.consistency_loss(model, batch)
        handle.remove()
    assert len(calls) == 1
    assert loss.item() == pytest.approx(model(**batch).loss.item())


def test_a_model_without_a_method_is_refused(model, batch):
    with pytest.raises(MethodError, match="the model has no method attached\n  hint: hkft.attach"):
        hkft.consistency_loss(model, batch)


def test_a_regression_takes_the_squared_difference():
    a, b = torch.tensor([[1.0], [2.0]]), torch.tensor([[1.5], [0.0]])
    assert distance("kl", a, b, None).item() == pytest.approx((0.25 + 4.0) / 2)


def test_generation_compares_completion_tokens_only():
    model = GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=16, n_layer=1, n_head=2, n_positions=16))
    ids = torch.randint(0, 40, (2, 7))
    labels = ids.clone()
    labels[:, :4] = -100
    labels[1, 6:] = -100
    a, b = model(ids).logits, torch.randn(2, 7, 40)
    rows = [(0, 3), (0, 4), (0, 5), (1, 3), (1, 4)]  # position t predicts token t + 1
    expected = js_symmetric(torch.stack([a[i, t] for i, t in rows]), torch.stack([b[i, t] for i, t in rows]))
    assert distance("js_symmetric", a, b, labels).item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("kind", ["T5ForConditionalGeneration", "BertForTokenClassification", "GPT2LMHeadModel"])
def test_which_rows_are_compared_hangs_on_the_model(kind: str, monkeypatch: pytest.MonkeyPatch):
    """An encoder-decoder and a tagger predict label t at position t; a decoder label t + 1."""
    sizes = {"vocab_size": 40, "num_labels": 5}
    config = {
        "T5ForConditionalGeneration": lambda: T5Config(
            **sizes, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0
        ),
        "BertForTokenClassification": lambda: BertConfig(
            **sizes, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
        ),
        "GPT2LMHeadModel": lambda: GPT2Config(**sizes, n_embd=16, n_layer=1, n_head=2, n_positions=16),
    }[kind]()
    model = getattr(transformers, kind)(config).train()
    labels = torch.tensor([[1, 2, 3, -100], [-100, 4, 0, 2]])
    seen: list[torch.Tensor] = []
    monkeypatch.setitem(objective_module.LOSSES, "kl", lambda p, q: seen.append(p.detach()) or (p - q).square().mean())
    with hkft.attach(model, "hiddenkey", rate=0.3):
        state = torch.get_rng_state()
        hkft.consistency_loss(model, {"input_ids": torch.full((2, 4), 7), "labels": labels})
        torch.set_rng_state(state)
        views = [model(input_ids=torch.full((2, 4), 7), labels=labels).logits for _ in range(2)]
    at = [(0, 0), (0, 1), (0, 2), (1, 1), (1, 2), (1, 3)]
    if kind == "GPT2LMHeadModel":
        at = [(0, 0), (0, 1), (1, 0), (1, 1), (1, 2)]
    torch.testing.assert_close(seen[0], torch.stack([views[1][place] for place in at]))


def test_a_soft_prompt_stands_in_front_of_the_labels():
    """Prompt tuning gives logits for its own tokens, too."""
    base = GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=32, bos_token_id=1))
    model = get_peft_model(base, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)).train()
    tokens = torch.randint(0, 40, (2, 7))
    with hkft.attach(model, "hiddenkey", rate=0.3):
        loss = hkft.consistency_loss(model, {"input_ids": tokens, "labels": tokens})
    assert torch.isfinite(loss)
    logits, other = torch.randn(2, 11, 40), torch.randn(2, 11, 40)
    assert distance("kl", logits, other, tokens) == distance("kl", logits[:, 4:], other[:, 4:], tokens)


def test_a_clean_pass_leaves_a_frozen_module_in_eval_mode(model, batch):
    model.bert.embeddings.eval()
    method = hkft.Method([hkft.Site("hidden", rate=0.3)], hkft.Consistency("js"))
    with hkft.attach(model, method):
        hkft.consistency_loss(model, batch).backward()
    assert not any(module.training for module in model.bert.embeddings.modules())
    assert model.bert.encoder.training


def test_no_consistency_is_the_plain_loss():
    outputs = {"logits": torch.zeros(1, 2)}
    found = objective(torch.nn.Identity(), lambda: (torch.tensor(3.0), outputs), None, None)
    assert found.loss == found.task == 3.0
    assert found.consistency is None
