"""An encoder's last layer is computed for the one token its head reads, where that is proven, and nowhere else."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers

from hkft.dropout.attach import attach
from hkft.dropout.method import Method, Site
from hkft.model import first_token as room
from hkft.model.first_token import first_token

SIZES = {
    "vocab_size": 50,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 40,
    "pad_token_id": 0,
}
DISTIL = {"vocab_size": 50, "dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64}
MODERN = {**SIZES, "cls_token_id": 1, "sep_token_id": 2, "bos_token_id": 1, "eos_token_id": 2}
SHORT = [
    ("Bert", "SequenceClassification", SIZES),
    ("Roberta", "SequenceClassification", SIZES),
    ("Electra", "SequenceClassification", SIZES),
    ("XLMRoberta", "SequenceClassification", SIZES),
    ("DistilBert", "SequenceClassification", DISTIL),
]
WHOLE = [
    ("Bert", "TokenClassification", SIZES),  # reads every token
    ("Bert", "QuestionAnswering", SIZES),  # has no logits
    ("ModernBert", "SequenceClassification", MODERN),  # layer norm first: the residual goes around
    ("Albert", "SequenceClassification", {**SIZES, "embedding_size": 16}),  # its last layer is its first
    ("Llama", "SequenceClassification", SIZES),  # reads the last token
]


def made(family, head, sizes, **more):
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**sizes, **more)
    return getattr(transformers, f"{family}For{head}")(config).eval()


def batch(rows=4, tokens=9):
    mask = torch.ones(rows, tokens, dtype=torch.long)
    mask[1, tokens // 2 :] = 0
    return {"input_ids": torch.randint(5, 50, (rows, tokens)), "attention_mask": mask}


def lengths(model, run):
    """How many tokens left the last layer, in each of its calls."""
    seen, block = [], room.families.find(model).layers[-1].block
    handle = block.register_forward_hook(lambda _, __, output: seen.append(room._state(output).shape[1]))
    try:
        run()
    finally:
        handle.remove()
    return seen


def gradients(model, given):
    model.zero_grad()
    labels = torch.arange(len(given["input_ids"])) % model.config.num_labels
    loss = model(**given, labels=labels).loss
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("family", "head", "sizes"), SHORT, ids=[kind[0] for kind in SHORT])
def test_logits_and_gradients_are_those_of_the_whole_layer(family, head, sizes):
    model, given = made(family, head, sizes), batch()
    whole, expected = model(**given).logits, gradients(model, given)
    with first_token(model, given):
        assert lengths(model, lambda: torch.testing.assert_close(model(**given).logits, whole)) == [1]
        found = gradients(model, given)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], msg=name, rtol=1e-4, atol=1e-6)
    assert lengths(model, lambda: model(**given)) == [9]  # outside, all is as it was


@pytest.mark.parametrize(("family", "head", "sizes"), WHOLE, ids=["-".join(kind[:2]) for kind in WHOLE])
def test_a_model_that_needs_more_computes_all(family, head, sizes):
    model, given = made(family, head, sizes), batch()
    with first_token(model, given):
        assert set(lengths(model, lambda: model(**given))) == {9}
    assert room._places[model] is None


def test_a_head_on_the_mean_computes_all():
    model, given = made(*SHORT[0]), batch()
    model.bert.pooler.forward = lambda states: states.mean(1)
    with first_token(model, given):
        assert lengths(model, lambda: model(**given)) == [9]


def test_a_head_that_reads_a_little_of_another_token_computes_all():
    model, given = made(*SHORT[0]), batch()
    model.bert.pooler.forward = lambda states: states[:, 0] + 1e-9 * states[:, -1]
    with first_token(model, given):
        assert lengths(model, lambda: model(**given)) == [9]


def test_the_proof_is_made_once_and_draws_nothing(monkeypatch):
    model, given = made(*SHORT[0]), batch()
    model.train()
    torch.manual_seed(5)
    before, found = torch.get_rng_state(), []
    own = room._find
    monkeypatch.setattr(room, "_find", lambda *args: (found.append(1), own(*args))[1])
    for _ in range(3):
        with first_token(model, given):
            pass
    assert found == [1] and model.training
    assert torch.equal(torch.get_rng_state(), before)
    assert all(p.grad is None for p in model.parameters())


def test_a_batch_of_one_token_a_row_proves_nothing():
    model, long = made(*SHORT[0]), batch()
    short = {name: value[:, :1] for name, value in long.items()}
    with first_token(model, short):
        assert lengths(model, lambda: model(**short)) == [1]
    with first_token(model, long):
        assert lengths(model, lambda: model(**long)) == [1]


@pytest.mark.parametrize(
    ("site", "expected"),
    [
        (Site("hidden", "element", rate=0.3), [1]),
        (Site("hidden", "column", rate=0.3), [1]),
        (Site("hidden", "span", rate=0.3), [9]),
        (Site("hidden", "span", rate=0.3, layers=(0,)), [1]),
        (Site("output", "span", rate=0.3), [9]),
        (Site("attention_logits", "column", rate=0.3), [1]),
        (Site("attention_weights", "span", rate=0.3), [1]),
    ],
)
def test_only_spans_of_tokens_in_the_last_layer_need_them_all(site, expected):
    model, given = made(*SHORT[0]), batch()
    with attach(model, Method([site])):
        model.train()
        with first_token(model, given):
            assert lengths(model, lambda: model(**given)) == expected


def test_what_is_dropped_there_is_dropped_at_the_method_s_rate():
    torch.manual_seed(0)
    model, given = made(*SHORT[0], hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0), batch(64)
    with attach(model, Method([Site("hidden", "element", rate=0.25, layers=(1,))]), seed=3) as attachment:
        model.train()
        with first_token(model, given):
            for _ in range(20):
                model(**given)
        (row,) = attachment.report()
    spread = (0.25 * 0.75 / (20 * 64 * 32)) ** 0.5
    assert row["calls"] == 20
    assert abs(row["measured"] - 0.25) < 4 * spread


def test_a_checkpointed_model_computes_all():
    model, given = made(*SHORT[0]), batch()
    model.activation_checkpointing_enable()
    with first_token(model, given):
        assert lengths(model, lambda: model(**given)) == [9]


def test_a_copy_has_a_proof_of_its_own():
    model, given = made(*SHORT[0]), batch()
    with first_token(model, given):
        pass
    other = copy.deepcopy(model)
    with first_token(other, given):
        assert lengths(other, lambda: other(**given)) == [1]
        assert lengths(model, lambda: model(**given)) == [9]
