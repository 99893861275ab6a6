"""Tiny random models of every family, their inputs, and a factory for sites: what the laws are tested on."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

SIZE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GROUPED = {**SIZE, **TOKENS, "num_key_value_heads": 2}
OFF = (
    *("hidden_dropout_prob", "attention_probs_dropout_prob", "attention_dropout", "hidden_dropout", "dropout"),
    *("attn_pdrop", "resid_pdrop", "embd_pdrop", "mlp_dropout", "embedding_dropout"),
)

# name -> (configuration class, its fields). A decoder is built with its language head, an encoder bare.
ENCODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("BertConfig", SIZE),
    "roberta": ("RobertaConfig", {**SIZE, "pad_token_id": 0}),
    "xlm-roberta": ("XLMRobertaConfig", {**SIZE, "pad_token_id": 0}),
    "electra": ("ElectraConfig", {**SIZE, "embedding_size": 16}),
    "distilbert": (
        "DistilBertConfig",
        {"vocab_size": 64, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64, "max_position_embeddings": 64},
    ),
    "albert": ("AlbertConfig", {**SIZE, "embedding_size": 16}),
    "modernbert": (
        "ModernBertConfig",
        {**SIZE, **TOKENS, "cls_token_id": 1, "sep_token_id": 2, "local_attention": 8},
    ),
    "vit": (
        "ViTConfig",
        {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 64,
            "image_size": 24,
            "patch_size": 8,
        },
    ),
}
DECODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": (
        "GPT2Config",
        {**TOKENS, "vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    ),
    "opt": (
        "OPTConfig",
        {
            **TOKENS,
            "vocab_size": 64,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "ffn_dim": 64,
            "max_position_embeddings": 64,
            "word_embed_proj_dim": 32,
        },
    ),
    "gpt-neox": ("GPTNeoXConfig", {**SIZE, **TOKENS}),
    "llama": ("LlamaConfig", GROUPED),
    "mistral": ("MistralConfig", {**GROUPED, "sliding_window": 5}),
    "qwen2": ("Qwen2Config", GROUPED),
    "qwen3": ("Qwen3Config", {**GROUPED, "head_dim": 8}),
    "gemma2": ("Gemma2Config", {**GROUPED, "head_dim": 8, "sliding_window": 5, "attn_logit_softcapping": 2.0}),
    "gemma3": ("Gemma3TextConfig", {**GROUPED, "head_dim": 8, "sliding_window": 5}),
    "phi3": ("Phi3Config", GROUPED),
    "smollm3": ("SmolLM3Config", GROUPED),
    "olmo2": ("Olmo2Config", GROUPED),
}
REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("MixtralConfig", {**GROUPED, "num_local_experts": 2}),
    "gpt-oss": ("GptOssConfig", {**GROUPED, "head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1}),
    "falcon": ("FalconConfig", {**SIZE, **TOKENS}),
    "bloom": ("BloomConfig", {**TOKENS, "vocab_size": 64, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
}
ALL = {**ENCODERS, **DECODERS, **REFUSED}
NO_SDPA = {"gemma2"}  # its soft cap is not in PyTorch's SDPA: transformers runs it with eager attention only


@cache
def _built(name: str, backend: str, layers: int) -> nn.Module:
    kind, fields = ALL[name]
    depth = next((key for key in ("num_hidden_layers", "n_layers", "n_layer") if key in fields), "num_hidden_layers")
    config = getattr(transformers, kind)(**{**fields, depth: layers})
    for key in OFF:
        if hasattr(config, key):
            setattr(config, key, 0.0)
    if hasattr(config, "layerdrop"):
        config.layerdrop = 0.0
    head = transformers.AutoModel if name in ENCODERS else transformers.AutoModelForCausalLM
    torch.manual_seed(1)
    model = head.from_config(config, attn_implementation=backend)
    with torch.no_grad():  # 0.02 makes attention all but uniform, and a wrong one hard to see
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(5.0)
    return model


def build_model(name: str, *, backend: str | None = None, layers: int = 2) -> Any:
    """A tiny model with random weights and no dropout of its own, in train mode."""
    backend = backend or ("eager" if name in NO_SDPA else "sdpa")
    return copy.deepcopy(_built(name, backend, layers)).train()


def make_inputs(
    name: str, *, rows: int = 2, length: int = 12, padding: str | None = None, real: int = 1
) -> dict[str, Tensor]:
    """Fixed tokens. With `padding` "left" or "right" the first row keeps `real` of them, the others keep all."""
    numbers = torch.Generator().manual_seed(7)
    if name == "vit":
        return {"pixel_values": torch.randn(rows, 3, 24, 24, generator=numbers)}
    tokens = torch.randint(3, 64, (rows, length), generator=numbers)
    mask = torch.ones_like(tokens)
    if padding:
        gone = slice(0, length - real) if padding == "left" else slice(real, length)
        mask[0, gone] = 0
        tokens[0, gone] = 0
    return {"input_ids": tokens, "attention_mask": mask}


@dataclass(frozen=True)
class Zoo:
    """The two functions above, for tests: a fixture, since test modules do not import one another."""

    build: Callable[..., Any] = build_model
    inputs: Callable[..., dict[str, Tensor]] = make_inputs
    no_sdpa: frozenset[str] = frozenset(NO_SDPA)

    @staticmethod
    def run(model: Any, batch: dict[str, Tensor], seed: int | None = None) -> Tensor:
        """Logits of a decoder, last hidden state of an encoder, under masks of `seed`."""
        if seed is not None:
            torch.manual_seed(seed)
        return model(**batch)[0]


@pytest.fixture(scope="session")
def zoo() -> Zoo:
    return Zoo()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`family`: every family; `decoder`: those that must not see the future."""
    if "family" in metafunc.fixturenames:
        metafunc.parametrize("family", [*ENCODERS, *DECODERS])
    if "decoder" in metafunc.fixturenames:
        metafunc.parametrize("decoder", list(DECODERS))
