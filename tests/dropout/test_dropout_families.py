"""Where the FFN output is found: the last map of the feed-forward network, never another linear map of the block."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from hkft.dropout import families
from hkft.errors import MethodError

# the module, as named in its block, whose output goes into the residual
FOUND = {
    "bert": "output.dense",
    "roberta": "output.dense",
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
ENCODERS = {"bert", "roberta", "electra", "distilbert", "albert", "modernbert", "vit"}
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
}


def names(model: Any) -> set[str]:
    found = families.find(model).layers
    return {n for layer in found for n, module in layer.block.named_modules() if module is layer.ffn_output}


def test_ffn_output_of_every_family(zoo: Any, family: str) -> None:
    model = zoo.build(family)
    assert names(model) == {FOUND[family]}
    assert all(layer.causal == (family not in ENCODERS) for layer in families.find(model).layers)


@pytest.mark.parametrize("kind", OTHERS)
def test_ffn_output_elsewhere_is_right_or_refused(kind: str) -> None:
    config = getattr(transformers, kind)()
    for part in (config, getattr(config, "encoder", None), getattr(config, "decoder", None)):
        for key in ("num_hidden_layers", "encoder_layers", "decoder_layers"):
            if isinstance(getattr(part, key, None), int):
                setattr(part, key, 1)
        if isinstance(getattr(part, "layer_types", None), list):
            part.layer_types = part.layer_types[:1]  # type: ignore[union-attr]
    with torch.device("meta"):
        model = transformers.AutoModel.from_config(config)
    try:
        found = names(model)
    except MethodError:
        return
    assert found <= OTHERS[kind]
