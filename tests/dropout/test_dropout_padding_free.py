"""Rows laid end to end, [1,T]: the padded batch's numbers at rate 0, masks of each row its own, no row that sees another."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    BertConfig,
    BertModel,
    DataCollatorWithFlattening,
    FalconH1Config,
    FalconH1ForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    Lfm2Config,
    Lfm2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import hkft
from hkft import Method, Site
from hkft.dropout import interface
from hkft.dropout.padding_free import FLAT
from hkft.errors import MethodError

SIZE = {
    "vocab_size": 70, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
    "intermediate_size": 64, "max_position_embeddings": 64, "attention_dropout": 0.0,
}  # fmt: skip
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZE)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZE, head_dim=16)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SIZE, sliding_window=32)),
    "mistral, short window": lambda: MistralForCausalLM(MistralConfig(**SIZE, sliding_window=5)),
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**SIZE, head_dim=16, sliding_window=16)),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=70, n_embd=32, n_layer=2, n_head=2, n_positions=64, attn_pdrop=0, resid_pdrop=0, embd_pdrop=0)
    ),
    "neox": lambda: GPTNeoXForCausalLM(
        GPTNeoXConfig(**{k: v for k, v in SIZE.items() if k != "num_key_value_heads"}, hidden_dropout=0.0)
    ),
    "opt": lambda: OPTForCausalLM(
        OPTConfig(
            vocab_size=70, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, ffn_dim=64, word_embed_proj_dim=32,
            max_position_embeddings=64, dropout=0.0,
        )
    ),
}  # fmt: skip
LENGTHS = (9, 3, 14, 1, 7)
ROW_BY_ROW = ("llama", "qwen3", "mistral", "gpt2", "neox", "opt")  # the others tell rows apart by the mask alone


def rows() -> list[dict[str, list[int]]]:
    draw = torch.Generator().manual_seed(5)
    made = [torch.randint(3, 70, (length,), generator=draw).tolist() for length in LENGTHS]
    return [{"input_ids": tokens, "labels": tokens} for tokens in made]


def end_to_end() -> dict[str, torch.Tensor]:
    return dict(DataCollatorWithFlattening()(rows()))


def padded() -> dict[str, torch.Tensor]:
    given, width = rows(), max(LENGTHS)
    fill = {"input_ids": 0, "labels": -100}
    batch = {k: torch.tensor([row[k] + [v] * (width - len(row[k])) for row in given]) for k, v in fill.items()}
    return batch | {"attention_mask": torch.tensor([[1] * n + [0] * (width - n) for n in LENGTHS])}


def loss_and_gradients(model, batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.fixture(params=MODELS)
def name(request) -> str:
    return request.param


@pytest.fixture
def model(name):
    torch.manual_seed(0)
    return MODELS[name]().double().train()


@pytest.mark.parametrize("method", ["none", "hiddenkey-", "dropattention"])
def test_at_rate_0_loss_and_gradients_are_those_of_the_padded_batch(name, model, method):
    with hkft.attach(model, method, rate=0.0):
        expected, wanted = loss_and_gradients(model, padded())
    with hkft.attach(model, method, rate=0.0, padding_free=True):
        found, gradients = loss_and_gradients(model, end_to_end())
    assert found.item() == pytest.approx(expected.item(), rel=1e-12)
    for parameter, gradient in gradients.items():
        close = (
            {"rtol": 1e-5, "atol": 1e-7} if name == "gemma2" else {"rtol": 1e-8, "atol": 1e-12}
        )  # its softmax is float32
        torch.testing.assert_close(gradient, wanted[parameter], msg=parameter, **close)


def test_attention_goes_row_by_row_where_the_family_tells_its_places(name, model, monkeypatch):
    seen = []
    own = interface.rows
    monkeypatch.setattr(interface, "rows", lambda x, lengths: seen.append(tuple(lengths)) or own(x, lengths))
    with hkft.attach(model, "none", padding_free=True):
        seen.clear()  # attaching proves on two short rows that neither sees the other
        model(**end_to_end())
    assert set(seen) == ({LENGTHS} if name in ROW_BY_ROW else set())


@pytest.mark.parametrize("within", [5, 13])  # the last one is within a short window's reach of the next row
@pytest.mark.parametrize("pattern", ["element", "column"])
@pytest.mark.parametrize("position", ["attention_logits", "attention_weights", "hidden"])
def test_no_row_hangs_on_another_and_no_token_on_a_later_one(model, position, pattern, within):
    """Law 4 across rows: another token in the third row changes nothing before it, and in no other row anything."""
    check_independence(model, position, pattern, sum(LENGTHS[:2]) + within)


def check_independence(model, position, pattern, place) -> None:
    batch, other = end_to_end(), end_to_end()
    other["input_ids"] = other["input_ids"].clone()
    other["input_ids"][0, place] = 3 + (other["input_ids"][0, place] + 1) % 60
    with hkft.attach(model, Method([Site(position, pattern, rate=0.5, layers="all")]), padding_free=True):
        logits = []
        for each in (batch, other):
            torch.manual_seed(1)
            logits.append(model(**each).logits[0])
    row = slice(place, sum(LENGTHS[:3]))
    changed = (logits[0] != logits[1]).any(-1)
    assert torch.isfinite(logits[0]).all()
    assert changed[row].any()
    assert not changed[: row.start].any()
    assert not changed[row.stop :].any()


@pytest.mark.parametrize("pattern", ["element", "column", "span"])
def test_masks_are_drawn_for_each_row_and_its_first_key_stays(pattern, monkeypatch):
    torch.manual_seed(0)
    model = MODELS["llama"]().train()
    masks = []
    own = interface.attention.dropkey

    def watched(q, k, v, keep, **kwargs):
        masks.append(keep)
        return own(q, k, v, keep, **kwargs)

    monkeypatch.setattr(interface.attention, "dropkey", watched)
    with hkft.attach(model, Method([Site("attention_logits", pattern, rate=0.4, layers="all")]), padding_free=True):
        for _ in range(40):
            model(**end_to_end())
    keep = torch.stack(masks)  # [calls,N,H,R,L]
    assert keep.shape[1] == len(LENGTHS)
    assert keep[..., 0].all()
    rows_differ = (keep[:, 0] != keep[:, 2]).flatten(1).any(1)
    assert rows_differ.float().mean() > 0.9
    assert (~keep[..., 1:]).float().mean() == pytest.approx(0.4, abs=0.05)


def test_where_the_mask_alone_tells_rows_apart_each_rows_first_key_is_protected(monkeypatch):
    """TRL's and transformers' flattened batches, without hkft being told: at rate 0.99 no row is left without a key."""
    torch.manual_seed(0)
    model = MODELS["llama"]().train()
    masks = []
    own = interface.attention.dropkey

    def watched(q, k, v, keep, **kwargs):
        masks.append(keep)
        assert kwargs["rescued"] is None or not kwargs["rescued"].any()
        return own(q, k, v, keep, **kwargs)

    monkeypatch.setattr(interface.attention, "dropkey", watched)
    with hkft.attach(model, Method([Site("attention_logits", "column", rate=0.99, layers="all")])):
        assert torch.isfinite(model(**end_to_end(), use_cache=False).logits).all()  # as Trainer sets it
    firsts = [sum(LENGTHS[:n]) for n in range(len(LENGTHS))]
    for keep in masks:
        assert keep[..., firsts].all()
        assert (~keep).sum() > keep.numel() / 2


@pytest.mark.parametrize("position", ["hidden", "input", "output"])
def test_a_span_of_tokens_is_refused(position):
    with pytest.raises(MethodError, match="a span of tokens would run across rows"):
        hkft.attach(MODELS["llama"](), Method([Site(position, "span", rate=0.1)]), padding_free=True)


def test_a_span_of_keys_is_refused_where_rows_cannot_be_told_apart():
    model = MODELS["mistral, short window"]().train()
    site = Site("attention_logits", "span", rate=0.1, layers="all")
    with (
        hkft.attach(model, Method([site]), padding_free=True),
        pytest.raises(MethodError, match="span would run across"),
    ):
        model(**end_to_end())


def test_an_encoder_is_refused():
    config = BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    with pytest.raises(MethodError, match="rows laid end to end are for decoders"):
        hkft.attach(BertModel(config), "dropkey", padding_free=True)


def test_nothing_is_left_behind():
    model = MODELS["llama"]().train()
    before = model.config._attn_implementation
    hkft.attach(model, "none", padding_free=True).detach()
    assert model.config._attn_implementation == before
    assert not any(FLAT in module.__dict__ for module in model.modules())


def test_the_self_check_holds_end_to_end():
    model = MODELS["llama"]().train()
    with hkft.attach(model, "hiddenkey-", rate=0.1, padding_free=True):
        assert hkft.self_check(model, end_to_end())["cost"]


def test_one_tensor_filled_anew_is_read_anew():
    torch.manual_seed(0)
    model = MODELS["llama"]().double().eval()
    batch = end_to_end()
    with hkft.attach(model, "none", padding_free=True):
        model(**batch)
        batch["position_ids"].copy_(torch.arange(sum(LENGTHS)).unsqueeze(0))  # one row now
        found = model(**batch).logits
    torch.testing.assert_close(found, model(batch["input_ids"]).logits)


def test_several_rows_with_places_in_common_are_a_batch_like_any_other():
    torch.manual_seed(0)
    model = MODELS["llama"]().eval()
    tokens = torch.randint(3, 70, (2, 8))
    expected = model(tokens).logits
    with hkft.attach(model, "none", padding_free=True):
        found = model(tokens, position_ids=torch.arange(8).unsqueeze(0)).logits
    torch.testing.assert_close(found, expected)


def test_one_row_is_cached_when_asked():
    model = MODELS["llama"]().eval()
    with hkft.attach(model, "none", padding_free=True):
        assert model(torch.randint(3, 70, (1, 8)), use_cache=True).past_key_values is not None
        assert model(**end_to_end(), use_cache=True).past_key_values is None


TINY = {
    key: SIZE[key]
    for key in ("vocab_size", "hidden_size", "num_attention_heads", "num_key_value_heads", "intermediate_size")
}
CONVOLUTION = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1}


@pytest.mark.parametrize(
    ("build", "says"),
    [
        (
            lambda: Lfm2ForCausalLM(Lfm2Config(**TINY, num_hidden_layers=2, layer_types=["conv", "full_attention"])),
            "layers without attention",
        ),
        (
            lambda: FalconH1ForCausalLM(FalconH1Config(**TINY, num_hidden_layers=2, **CONVOLUTION)),
            "a row laid behind another sees it",
        ),
    ],
    ids=["beside attention layers", "within them"],
)
def test_what_looks_back_without_attention_is_refused(build, says):
    torch.manual_seed(0)
    model = build()
    with pytest.raises(MethodError, match=says):
        hkft.attach(model, "none", padding_free=True)
    assert model.config._attn_implementation == "sdpa"


def test_a_window_that_only_the_mask_knows_of():
    """Qwen2-MoE does not tell its attention function of the window."""
    torch.manual_seed(0)
    config = Qwen2MoeConfig(
        **TINY, num_hidden_layers=2, use_sliding_window=True, sliding_window=4, max_window_layers=2, num_experts=2,
        num_experts_per_tok=1, moe_intermediate_size=16, shared_expert_intermediate_size=16,
    )  # fmt: skip
    config.layer_types = ["sliding_attention"] * 2
    model = Qwen2MoeForCausalLM(config).eval()
    expected = [model(torch.tensor([row["input_ids"]])).logits[0] for row in rows()]
    with hkft.attach(model, "none", padding_free=True):
        found = model(**end_to_end()).logits[0]
    torch.testing.assert_close(found, torch.cat(expected), rtol=1e-4, atol=1e-6)
