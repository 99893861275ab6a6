"""The head in blocks: the same numbers as the model's own, and none where its logits are more than the head's."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import Gemma2Config, Gemma2ForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from hkft.data.completions import IGNORED
from hkft.model import vocabulary as module
from hkft.model.vocabulary import SummedInBlocks, Vocabulary

SIZE = {"vocab_size": 90, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}


def llama(**more) -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(**SIZE, num_key_value_heads=1, **more)).eval()


def frozen(model: nn.Module) -> nn.Module:
    return model.requires_grad_(False)


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    tokens = torch.randint(3, 90, (3, 12))
    labels = tokens.clone()
    labels[0, :4] = labels[1, :9] = labels[2, :6] = IGNORED
    labels[2, 9:] = IGNORED
    return {"input_ids": tokens, "labels": labels}


def logits_of(vocabulary: Vocabulary, model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    found = vocabulary.run(model, {"input_ids": batch["input_ids"]}, batch["labels"])
    return vocabulary.logits(found.states)


@pytest.mark.parametrize("whole", [False, True])
def test_the_learned_positions_have_the_models_own_logits(batch, whole):
    model = frozen(llama())
    vocabulary = Vocabulary(model, whole)
    assert vocabulary.plain is not whole
    learned = batch["labels"][:, 1:] != IGNORED
    with torch.no_grad():
        expected = model(batch["input_ids"]).logits[:, :-1][learned]
        found = vocabulary.run(model, {"input_ids": batch["input_ids"]}, batch["labels"])
        torch.testing.assert_close(vocabulary.logits(found.states), expected)
    assert torch.equal(found.targets, batch["labels"][:, 1:][learned])
    assert found.rows.tolist() == [0] * 8 + [1] * 3 + [2] * 3


def test_the_head_is_back_afterwards(batch):
    model = frozen(llama())
    before = model(batch["input_ids"]).logits
    Vocabulary(model).run(model, {"input_ids": batch["input_ids"]}, batch["labels"])
    assert "forward" not in model.lm_head.__dict__
    assert torch.equal(model(batch["input_ids"]).logits, before)


def test_a_head_whose_logits_are_capped_is_the_models_own_affair(batch):
    config = Gemma2Config(**SIZE, num_key_value_heads=1, head_dim=16, final_logit_softcapping=0.5)
    model = frozen(Gemma2ForCausalLM(config)).eval()
    vocabulary = Vocabulary(model)
    assert not vocabulary.plain
    learned = batch["labels"][:, 1:] != IGNORED
    expected = model(batch["input_ids"]).logits[:, :-1][learned]
    torch.testing.assert_close(logits_of(vocabulary, model, batch), expected)
    assert expected.abs().max() <= 0.5


def test_scaled_logits_are_seen(batch):
    config = transformers.CohereConfig(**SIZE, num_key_value_heads=1, logit_scale=0.0625, pad_token_id=0)
    assert not Vocabulary(frozen(transformers.CohereForCausalLM(config))).plain


def test_a_model_that_turns_its_logits_to_float32_keeps_its_head():
    config = transformers.MambaConfig(vocab_size=90, hidden_size=32, num_hidden_layers=1, state_size=4)
    model = frozen(transformers.MambaForCausalLM(config))
    assert Vocabulary(model).plain
    assert not Vocabulary(frozen(transformers.MambaForCausalLM(config)).to(torch.bfloat16)).plain


def test_the_proof_is_made_once_a_head(monkeypatch):
    model, proofs = frozen(llama()), []
    own = Vocabulary._hands_on
    monkeypatch.setattr(Vocabulary, "_hands_on", lambda self: proofs.append(1) or own(self))
    assert Vocabulary(model).plain
    assert Vocabulary(model).plain
    assert len(proofs) == 1
    model.lm_head = nn.Sequential(nn.Linear(32, 90, bias=False), nn.Tanh()).requires_grad_(False)
    assert Vocabulary(model).plain
    assert len(proofs) == 2


def test_a_head_that_is_trained_is_left_in_the_model():
    model = llama()
    assert not Vocabulary(model).plain
    model.lm_head.requires_grad_(False)
    assert Vocabulary(model).plain


def test_modes_are_left_alone():
    model = frozen(llama()).train()
    model.model.layers[0].eval()
    Vocabulary(model)
    assert model.training
    assert not model.model.layers[0].training


def test_a_model_without_logits_to_keep(batch, monkeypatch):
    model = frozen(GPT2LMHeadModel(GPT2Config(vocab_size=90, n_embd=32, n_layer=2, n_head=2))).eval()
    expected = logits_of(Vocabulary(model), model, batch)
    vocabulary = Vocabulary(model)
    vocabulary.keeps = False
    torch.testing.assert_close(logits_of(vocabulary, model, batch), expected)


@pytest.mark.parametrize("size", [1, 3, 100])
def test_sums_in_blocks_are_the_sum_and_its_gradient(size, monkeypatch):
    head = nn.Linear(8, 20).double().requires_grad_(False)
    states, other = (torch.randn(7, 8, dtype=torch.float64, requires_grad=True) for _ in range(2))
    targets = torch.randint(20, (7,))

    def term(block, far, place):
        near, apart = head(block), head(far)
        return cross_entropy(near, targets[place], reduction="sum") + (near - apart).square().sum()

    whole = term(states, other, slice(None))
    expected = torch.autograd.grad(3 * whole, [states, other])
    blocks = [slice(start, start + size) for start in range(0, 7, size)]
    total = SummedInBlocks.apply(term, blocks, states, other)
    assert total.item() == pytest.approx(whole.item())
    for found, wanted in zip(torch.autograd.grad(3 * total, [states, other]), expected, strict=True):
        torch.testing.assert_close(found, wanted)


def test_blocks_cover_every_token_once(monkeypatch):
    monkeypatch.setattr(module, "NUMBERS", 4 * 90)
    blocks = list(Vocabulary(frozen(llama())).blocks(10))
    assert [len(range(*block.indices(10))) for block in blocks] == [4, 4, 2]


def test_no_block_of_logits_outlives_its_turn(batch, monkeypatch):
    """What is saved for the backward pass has a row's hidden size, never the vocabulary's."""
    model = llama()
    model.lm_head.requires_grad_(False)
    vocabulary, saved = Vocabulary(model), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(tuple(t.shape)) or t, lambda t: t):
        found = vocabulary.run(model, {"input_ids": batch["input_ids"]}, batch["labels"])
        before = len(saved)
        SummedInBlocks.apply(
            lambda block, place: cross_entropy(vocabulary.logits(block), found.targets[place], reduction="sum"),
            [slice(0, 5), slice(5, None)],
            found.states,
        )
    assert any(90 in shape for shape in saved[before:])  # inside a block
    assert not any(90 in shape for shape in saved[:before] if len(shape) == 3)
