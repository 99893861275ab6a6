"""The laws where attention has a position bias: T5 and its kin pass it beside the mask, Swin and BEiT within it."""

from __future__ import annotations

import copy
import itertools
from functools import cache
from typing import Any

import pytest
import torch
import transformers
from scipy.stats import binom
from torch import Tensor

from hkft import Method, Site, attach
from hkft.dropout import families
from hkft.errors import MethodError

T5 = {
    **{
        "vocab_size": 64,
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 64,
        "num_layers": 2,
        "num_decoder_layers": 2,
        "num_heads": 4,
    },
    **{"relative_attention_num_buckets": 8, "relative_attention_max_distance": 16, "dropout_rate": 0.0},
    **{"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0},
}
GATED = {**T5, "feed_forward_proj": "gated-gelu"}
SWIN = {
    **{"image_size": 32, "patch_size": 4, "embed_dim": 16, "window_size": 4, "depths": [2, 2], "num_heads": [2, 4]},
    **{"drop_path_rate": 0.0, "hidden_dropout_prob": 0.0},
}
BEIT = {
    **{"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64},
    **{
        "image_size": 24,
        "patch_size": 8,
        "use_relative_position_bias": True,
        "drop_path_rate": 0.0,
        "layer_scale_init_value": 1.0,
    },
}
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "t5": ("T5ForConditionalGeneration", "T5Config", T5),
    "t5-encoder": ("T5EncoderModel", "T5Config", GATED),
    "mt5": ("MT5ForConditionalGeneration", "MT5Config", GATED),
    "umt5": ("UMT5ForConditionalGeneration", "UMT5Config", GATED),
    "swin": ("SwinModel", "SwinConfig", SWIN),
    "beit": ("BeitModel", "BeitConfig", BEIT),
}
BOTH = {"t5", "mt5", "umt5"}  # with encoder and decoder
IMAGES = {"swin", "beit"}
ATTENTION = ["attention_logits", "attention_weights"]
PATTERNS = ["element", "column", "span"]

every_model = pytest.mark.parametrize("name", MODELS)
every_backend = pytest.mark.parametrize("backend", ["sdpa", "eager"])
either_attention = pytest.mark.parametrize("position", ATTENTION)


@cache
def _built(name: str, backend: str) -> Any:
    kind, config, fields = MODELS[name]
    torch.manual_seed(1)
    model = getattr(transformers, kind)._from_config(
        getattr(transformers, config)(**fields), attn_implementation=backend
    )
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "relative" in key:
                parameter.normal_(std=2.0)  # some begin at 0, where a forgotten bias would not be seen
            elif name in IMAGES and parameter.ndim > 1:
                parameter.mul_(5.0)  # 0.02 makes attention all but uniform, and a wrong one hard to see
    return model


def build(name: str, backend: str = "sdpa") -> Any:
    return copy.deepcopy(_built(name, backend)).train()


def inputs(name: str, *, padding: str | None = None, real: int = 5, rows: int = 2) -> dict[str, Tensor]:
    """Tokens, of which the first row keeps `real`, for an encoder and for a decoder where there is one; or images."""
    numbers = torch.Generator().manual_seed(7)
    if name in IMAGES:
        size = MODELS[name][2]["image_size"]
        return {"pixel_values": torch.randn(rows, 3, size, size, generator=numbers)}
    batch = {}
    for prefix, length in (("", 12), ("decoder_", 9)) if name in BOTH else (("", 12),):
        tokens = torch.randint(3, 64, (rows, length), generator=numbers)
        mask = torch.ones_like(tokens)
        if padding:
            mask[0, : length - real] = 0 if padding == "left" else 1
            mask[0, real:] *= 0 if padding == "right" else 1
        batch |= {f"{prefix}input_ids": tokens * mask, f"{prefix}attention_mask": mask}
    return batch


def paddings(name: str) -> list[str | None]:
    return [None] if name in IMAGES else [None, "left", "right"]


def run(model: Any, batch: dict[str, Tensor], seed: int | None = None) -> Tensor:
    if seed is not None:
        torch.manual_seed(seed)
    return model(**{key: x.to(model.dtype) if x.is_floating_point() else x for key, x in batch.items()})[0]


def real_of(batch: dict[str, Tensor]) -> Any:
    """Where the outputs are those of real tokens."""
    masks = [mask for key, mask in batch.items() if key.endswith("attention_mask")]
    return masks[-1].bool() if masks else slice(None)


def one(position: str, pattern: str, rate: float, **more: Any) -> Method:
    return Method([Site(position, pattern, rate=rate, layers="all", **more)])  # type: ignore[arg-type]


# --- what is tested has a bias, and is accepted -----------------------------------------------------------------------


@every_model
def test_the_bias_matters_here(name: str) -> None:
    model, batch = build(name).eval(), inputs(name)
    with torch.no_grad():
        bare = run(model, batch)
        for key, parameter in model.named_parameters():
            if "relative" in key:
                parameter.zero_()
        assert float((run(model, batch) - bare).abs().max()) > 0.1 * float(bare.std())


@every_model
def test_layers_and_ffn_outputs(name: str) -> None:
    found = families.find(build(name)).layers
    assert len(found) == (4 if name in BOTH | {"swin"} else 2)
    assert [layer.causal for layer in found] == [layer.name.startswith("decoder.") for layer in found]
    output = {"swin": "mlp.fc2", "beit": "mlp.fc2"}.get(name, "DenseReluDense.wo")
    for layer in found:
        names = [n for n, module in layer.block.named_modules() if module is layer.ffn_output]
        assert [n.removeprefix("layer.1.").removeprefix("layer.2.") for n in names] == [output]


@pytest.mark.parametrize("kind", ["Swinv2", "DonutSwin", "MPNet"])
def test_a_bias_outside_the_interface_is_refused(kind: str) -> None:
    """Swin v2's attention is of cosines, with a bias made by an MLP, and written out in its own forward."""
    with torch.device("meta"):
        model = getattr(transformers, f"{kind}Model")(getattr(transformers, f"{kind}Config")())
    with pytest.raises(MethodError) as caught:
        attach(model, "dropkey")
    assert str(caught.value) == (
        f"{kind}Model does not take its attention from transformers' AttentionInterface\n"
        "  hint: hkft acts there; families that write attention out in their own forward cannot be served"
    )


def test_an_encoder_whose_attention_is_out_of_reach_is_refused_though_the_decoders_is_not() -> None:
    """LongT5's: local attention in the encoder, written out; to drop in the decoder alone would be half a method."""
    with torch.device("meta"):
        model = transformers.LongT5ForConditionalGeneration(transformers.LongT5Config(**T5))
    with pytest.raises(MethodError, match="LongT5Stack, a half of LongT5ForConditionalGeneration, does not take"):
        attach(model, "dropkey")


# --- law 1: one mask, one forward -------------------------------------------------------------------------------------


@every_model
@every_backend
@pytest.mark.parametrize("pattern", PATTERNS)
def test_law_1_dropkey_and_dropattention_of_one_mask_are_the_same_forward(
    name: str, backend: str, pattern: str
) -> None:
    model = build(name, backend).double()
    for padding in paddings(name):
        batch, outs = inputs(name, padding=padding), []
        for position in ATTENTION:
            with torch.no_grad(), attach(model, one(position, pattern, 0.4)):
                outs.append(run(model, batch, seed=3)[real_of(batch)])
        torch.testing.assert_close(*outs, atol=1e-9, rtol=1e-9)
        assert not torch.allclose(outs[0], run(model, batch)[real_of(batch)], atol=1e-2)


# --- law 3: inert in eval mode and at rate 0 --------------------------------------------------------------------------


@every_model
@every_backend
@pytest.mark.parametrize("position", [*ATTENTION, "hidden", "output"])
def test_law_3_eval_mode_and_rate_0_are_bit_for_bit_inert(name: str, backend: str, position: str) -> None:
    model, batch = build(name, backend), inputs(name, padding=paddings(name)[-1])
    with torch.no_grad():
        bare = run(model, batch)
        with attach(model, one(position, "column", 0)) as attachment:
            assert torch.equal(run(model, batch), bare)
            assert attachment.report()[0]["calls"] == 0
        model.eval()
        bare = run(model, batch)
        for pattern in PATTERNS:
            with attach(model, one(position, pattern, 0.5)) as attachment:
                assert torch.equal(run(model, batch), bare)
                assert attachment.report()[0]["calls"] == 0
                model.train()
                assert not torch.equal(run(model, batch), bare)
                model.eval()
            assert torch.equal(run(model, batch), bare)


@every_model
@every_backend
@either_attention
def test_law_3_hkfts_own_path_that_drops_nothing_is_the_familys_too(name: str, backend: str, position: str) -> None:
    """Rate 1e-12: hkft computes all and drops nothing. The gradients too: that of the bias goes through hkft's mask."""
    rescales = ["none"] if position == "attention_logits" else ["normalised", "inverse_keep"]

    def outcome() -> tuple[Tensor, dict[str, Tensor]]:
        model.zero_grad()
        out = run(model, batch)[real_of(batch)]
        out.square().mean().backward()
        return out.detach(), {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}

    model = build(name, backend).double()
    close = 1e-5 if backend == "eager" and name in IMAGES else 1e-9  # their softmax is of float32
    for padding in paddings(name):
        batch = inputs(name, padding=padding)
        bare, gradients = outcome()
        assert any("relative" in key and float(gradient.abs().max()) > 0 for key, gradient in gradients.items())
        for pattern, rescale in itertools.product(PATTERNS, rescales):
            with attach(model, one(position, pattern, 1e-12, rescale=rescale)) as attachment:
                out, theirs = outcome()
                assert attachment.report()[0]["measured"] == 0.0
            torch.testing.assert_close(out, bare, atol=close, rtol=close)
            if rescale != "normalised":  # DropAttention stops a gradient, of a mass that is 1 but for rounding
                torch.testing.assert_close(theirs, gradients, atol=close, rtol=100 * close)


# --- law 4: causality -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(BOTH))
@every_backend
@either_attention
def test_law_4_a_token_of_the_decoder_never_changes_what_comes_before_it(
    name: str, backend: str, position: str
) -> None:
    t, model = 5, build(name, backend)
    for padding, pattern in itertools.product(paddings(name), PATTERNS):
        batch = inputs(name, padding=padding, real=6)
        tokens = batch["decoder_input_ids"].clone()
        tokens[:, t] = (tokens[:, t] + 11) % 61 + 3
        with torch.no_grad(), attach(model, one(position, pattern, 0.5)):
            before = run(model, batch, seed=3)
            after = run(model, {**batch, "decoder_input_ids": tokens}, seed=3)
        real = real_of(batch)[:, :t]
        torch.testing.assert_close(before[:, :t][real], after[:, :t][real], atol=1e-5, rtol=1e-5)
        assert not torch.allclose(before[1, t:], after[1, t:])


@either_attention
@pytest.mark.parametrize("pattern", PATTERNS)
def test_swins_shifted_windows_never_look_beyond_their_region(position: str, pattern: str) -> None:
    """Swin's mask is -100, not -inf. Where a row's own region is dropped whole, it must not turn to what is masked."""
    model = build("swin")
    block = model.encoder.layers[0].blocks[1]
    assert block.shift_size == 2
    mask = block.get_attn_mask(8, 8, torch.float32, torch.device("cpu"))
    mine = mask[-1, 0] == 0  # the last window has four regions, here the first token's
    assert int(mine.sum()) == 4
    windows = torch.randn(4 * 16, 16, 16)
    changed = torch.where(mine[:, None], windows, windows + 1.0)
    for rate in (0.0, 0.8):  # and its own attention keeps to it
        outs = []
        with torch.no_grad(), attach(model, one(position, pattern, rate)):
            for x in (windows, changed):
                torch.manual_seed(3)
                outs.append(block.attention(x, mask)[0][3::4, mine])
        torch.testing.assert_close(*outs, atol=1e-5, rtol=1e-5, msg=lambda text, rate=rate: f"rate {rate}: {text}")


# --- laws 5 to 8: finite, replayed, counted, gone ---------------------------------------------------------------------


@every_model
@every_backend
@pytest.mark.parametrize("position", [*ATTENTION, "hidden"])
def test_law_5_finite_at_rate_99_with_one_real_token(name: str, backend: str, position: str) -> None:
    model = build(name, backend)
    for padding, pattern in itertools.product(paddings(name)[-2:], PATTERNS):
        model.zero_grad()
        with attach(model, one(position, pattern, 0.99)):
            out = run(model, inputs(name, padding=padding, real=1))
            out.square().mean().backward()
        assert torch.isfinite(out).all(), (padding, pattern)
        wrong = [n for n, p in model.named_parameters() if p.grad is not None and not torch.isfinite(p.grad).all()]
        assert not wrong, (padding, pattern)


@every_model
@pytest.mark.parametrize("method", ["hiddenkey-", "dropattention"])
def test_law_6_gradients_agree_with_and_without_checkpointing(name: str, method: str) -> None:
    """T5's first layer makes the bias, and hands it on to the layers that are replayed."""
    calls, gradients = [], []
    for checkpointing in (False, True):
        model, batch = build(name), inputs(name, padding=paddings(name)[-1])
        if checkpointing:
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": False})
        with attach(model, method, rate=0.3) as attachment:
            run(model, batch, seed=5).square().mean().backward()
            calls.append(attachment.report()[0]["calls"])
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert calls[1] > calls[0]  # it was replayed
    torch.testing.assert_close(*gradients, atol=5e-6, rtol=1e-5)


@every_model
@every_backend
@either_attention
def test_law_7_report_measures_the_rate_and_cross_attention_is_left_alone(
    name: str, backend: str, position: str
) -> None:
    rows, passes, rate, model = 4, 3, 0.3, build(name, backend)
    keys = {  # heads x keys of a row, over all layers
        "swin": 2 * (2 * 4 * 16) + 2 * (4 * 16),  # 2 heads, 4 windows of 16; then 4 heads, one window
        "beit": 2 * 4 * (9 + 1),
        "t5-encoder": 2 * 4 * 12,
    }.get(name, 2 * 4 * (12 + 9))
    with attach(model, one(position, "column", rate)) as attachment:
        for _ in range(passes):
            run(model, inputs(name, rows=rows))
        (report,) = attachment.report()
    layers = len(attachment.family.layers)
    assert (report["modules"], report["calls"], report["expected"]) == (layers, layers * passes, pytest.approx(rate))
    trials = rows * passes * keys
    dropped = report["measured"] * trials
    assert dropped == pytest.approx(round(dropped), abs=1e-6)  # exactly so many were drawn
    low, high = binom.interval(1 - 1e-6, trials, rate)
    assert low <= round(dropped) <= high


@every_model
def test_law_8_train_passes_differ_and_nothing_is_left(name: str) -> None:
    model, batch = build(name), inputs(name)
    bare, entries = run(model, batch), {n: sorted(m.__dict__) for n, m in model.named_modules()}
    with attach(model, "hiddenkey-", rate=0.4):
        assert not torch.equal(run(model, batch), run(model, batch))
    assert torch.equal(run(model, batch), bare)
    assert {n: sorted(m.__dict__) for n, m in model.named_modules()} == entries
    assert model.config._attn_implementation == "sdpa"
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
