"""Where the FFN output is found: the last map of the feed-forward network, never another linear map of the block."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from hkft import attach
from hkft.dropout import families
from hkft.errors import MethodError

# the module, as named in its block, whose output goes into the residual
FOUND = {
    "bert": "output.dense",
    "roberta": "output.dense",
    "xlm-roberta": "output.dense",
    "electra": "output.dense",
    "distilbert": "ffn.lin2",
    "albert": "ffn_output",
    "modernbert": "mlp.Wo",
    "vit": "mlp.fc2",
    "gpt2": "mlp.c_proj",
    "opt": "fc2",
    "gpt-neox": "mlp.dense_4h_to_h",
    "llama": "mlp.down_proj",
    "mistral": "mlp.down_proj",
    "qwen2": "mlp.down_proj",
    "qwen3": "mlp.down_proj",
    "gemma2": "mlp.down_proj",
    "gemma3": "mlp.down_proj",
    "phi3": "mlp.down_proj",
    "smollm3": "mlp.down_proj",
    "olmo2": "mlp.down_proj",
}
ENCODERS = {"bert", "roberta", "xlm-roberta", "electra", "distilbert", "albert", "modernbert", "vit"}
# families outside the list of laws, by configuration class: right, or refused, but not somewhere else
OTHERS = {
    "BartConfig": {"fc2"},
    "CohereConfig": {"mlp.down_proj"},
    "GlmConfig": {"mlp.down_proj"},
    "MPNetConfig": set(),
    "PhiConfig": {"mlp.fc2"},
    "Starcoder2Config": {"mlp.c_proj"},
    "Gemma4TextConfig": {"mlp.down_proj"},
    "IdeficsConfig": {"mlp.down_proj", "mlp.fc2"},
    "MobileBertConfig": {"output.dense", "output.bottleneck.dense"},
    "T5GemmaConfig": {"mlp.down_proj"},
    "XmodConfig": {"output.dense"},
    "DFineConfig": {"mlp.layers.1"},
    "Deimv2Config": {"mlp.layers.1", "mlp.down_proj"},
    "Gemma3nTextConfig": {"mlp.down_proj"},
    "VoxtralRealtimeConfig": {"mlp.down_proj", "mlp.fc2"},
}
UNCERTAIN = {"HiggsAudioV2Config", "MobileBertConfig", "Wav2Vec2BertConfig"}  # FFNs side by side, or stacked


def names(model: Any) -> set[str]:
    found = families.find(model).layers
    return {n for layer in found for n, module in layer.block.named_modules() if module is layer.ffn_output}


def test_ffn_output_of_every_family(zoo: Any, family: str) -> None:
    model = zoo.build(family)
    assert names(model) == {FOUND[family]}
    assert all(layer.causal == (family not in ENCODERS) for layer in families.find(model).layers)


def on_meta(kind: str) -> Any:
    """A model of the configuration's own sizes, one layer deep, without weights."""
    config = getattr(transformers, kind)()
    for part in (config, getattr(config, "encoder", None), getattr(config, "decoder", None)):
        for key in ("num_hidden_layers", "encoder_layers", "decoder_layers"):
            if isinstance(getattr(part, key, None), int):
                setattr(part, key, 1)
        if hasattr(part, "num_kv_shared_layers"):
            part.num_kv_shared_layers = 0  # type: ignore[union-attr]
        if isinstance(getattr(part, "layer_types", None), list):
            part.layer_types = part.layer_types[:1]  # type: ignore[union-attr]
    with torch.device("meta"):
        return transformers.AutoModel.from_config(config)


@pytest.mark.parametrize("kind", OTHERS)
def test_ffn_output_elsewhere_is_right_or_refused(kind: str) -> None:
    if not hasattr(transformers, kind):
        pytest.skip("a family of a later transformers")
    model = on_meta(kind)
    try:
        found = names(model)
    except MethodError:
        return
    assert found <= OTHERS[kind]


@pytest.mark.parametrize("kind", sorted(UNCERTAIN))
def test_where_several_maps_may_be_the_ffn_output_only_hidden_is_refused(kind: str) -> None:
    if not hasattr(transformers, kind):
        pytest.skip("a family of a later transformers")
    model = on_meta(kind)
    with pytest.raises(MethodError, match=r"it may be \S+ or \S+"):
        attach(model, "hiddencut")
    attach(model, "dropkey").detach()


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("GptOssConfig", "has attention sinks, which take part in the softmax"),
        ("Inkling2TextConfig", "has attention sinks, which take part in the softmax"),
        (
            "DeepseekV32Config",
            "chooses the keys of each query itself, in a way that hangs on the name of the attention backend",
        ),
    ],
)
def test_attention_that_hkft_would_compute_otherwise_is_refused(kind: str, reason: str) -> None:
    if not hasattr(transformers, kind):
        pytest.skip("a family of a later transformers")
    model = on_meta(kind)
    with pytest.raises(MethodError, match=f"Attention {reason}$"):
        attach(model, "dropkey")
