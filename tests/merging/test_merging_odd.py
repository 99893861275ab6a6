"""What adapters and bases are in the wild: other heads, larger vocabularies, lost weights, code of their own, broken files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, PrefixTuningConfig, TaskType, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from hkft.errors import SetupError, UsageError
from hkft.events import Event, Notice
from hkft.folder import read_json
from hkft.merging import place
from hkft.merging.merge import merge

pytestmark = pytest.mark.filterwarnings(
    "ignore:Setting `save_embedding_layers`", "ignore:Model has `tie_word_embeddings"
)


def says(model: Any, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.tensor([ids])).logits


def agree(folder: Path, adapted: Any, opens: Any = AutoModelForCausalLM, ids: tuple[int, ...] = (2, 9, 11, 30)) -> None:
    merged = opens.from_pretrained(str(folder))
    torch.testing.assert_close(says(merged, list(ids)), says(adapted, list(ids)), atol=1e-4, rtol=1e-4)


def randomised(wrapped: Any) -> Any:
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.5)
    return wrapped


@pytest.mark.parametrize("labels", [2, 5, 40])
def test_a_base_with_another_head(labels: int, tmp_path: Path, tiny: Any) -> None:
    """From MNLI to RTE; and more labels than the head's first layer has rows."""
    base = tmp_path / "base"
    tiny.base(base, "roberta")
    AutoModelForSequenceClassification.from_pretrained(str(base), num_labels=3).save_pretrained(str(base))
    model = AutoModelForSequenceClassification.from_pretrained(
        str(base), num_labels=labels, ignore_mismatched_sizes=True
    )
    lora = LoraConfig(task_type=TaskType.SEQ_CLS, r=2, target_modules=["query"])
    wrapped = randomised(get_peft_model(model, lora))
    wrapped.save_pretrained(str(tmp_path / "adapter"))
    merged = merge(tmp_path / "adapter", tmp_path / "out")
    assert AutoConfig.from_pretrained(str(merged.path)).num_labels == labels
    agree(merged.path, wrapped, AutoModelForSequenceClassification)


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
        {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    ],
    ids=["saved", "lora"],
)
@pytest.mark.parametrize("rows", [64, 70])
def test_embeddings_that_were_trained_and_may_have_grown(
    fields: dict[str, Any], rows: int, tmp_path: Path, tiny: Any
) -> None:
    base = tiny.base(tmp_path / "base", "llama")
    model = AutoModelForCausalLM.from_pretrained(str(base))
    model.resize_token_embeddings(rows)
    wrapped = randomised(get_peft_model(model, LoraConfig(task_type=TaskType.CAUSAL_LM, r=2, **fields)))
    wrapped.save_pretrained(str(tmp_path / "adapter"))
    merged = merge(tmp_path / "adapter", tmp_path / "out")
    assert read_json(merged.path / "config.json")["vocab_size"] == rows
    agree(merged.path, wrapped, ids=(2, 9, 11, rows - 1))


def test_a_tokenizer_with_more_tokens_than_the_model_has_rows_is_told(tmp_path: Path, tiny: Any) -> None:
    heard: list[Event] = []
    adapter = tiny.adapter(tmp_path / "adapter", tiny.base(tmp_path / "base", "llama"), TaskType.CAUSAL_LM)
    tokenizer = AutoTokenizer.from_pretrained(str(tmp_path / "base"))
    tokenizer.add_tokens([f"<{n}>" for n in range(72)])
    tokenizer.save_pretrained(str(adapter))
    merge(adapter, tmp_path / "out", tell=heard.append)
    assert any(isinstance(e, Notice) and e.text.endswith("tokens, and the model rows for 64") for e in heard)


@pytest.mark.parametrize("verify", [True, False])
def test_weights_that_nobody_saved_are_not_made_up(verify: bool, tmp_path: Path, tiny: Any) -> None:
    """A BERT without its pooler, which the classifier reads: transformers would draw one at random."""
    base = tiny.base(tmp_path / "base")
    adapter = tiny.adapter(tmp_path / "adapter", base)
    weights = load_file(base / "model.safetensors")
    save_file({k: v for k, v in weights.items() if "pooler" not in k}, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(SetupError, match="the model has weights that were never saved") as caught:
        merge(adapter, tmp_path / "out", verify=verify)
    assert "pooler.dense" in str(caught.value.problems[0].found)
    assert not (tmp_path / "out").exists()


def test_code_of_a_model_s_own_is_not_run(adapter: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    (base / "evil.py").write_text(f"open({str(tmp_path / 'RAN')!r}, 'w')\n", encoding="utf-8")
    known = read_json(base / "config.json") | {"auto_map": {"AutoConfig": "evil.Config", "AutoModel": "evil.Model"}}
    (base / "config.json").write_text(json.dumps(known), encoding="utf-8")
    written = read_json(merge(adapter, tmp_path / "out").path / "config.json")
    assert "auto_map" not in written
    (base / "config.json").write_text(json.dumps(known | {"model_type": "of-its-own"}), encoding="utf-8")
    with pytest.raises(SetupError, match="base model could not be loaded") as caught:
        merge(adapter, tmp_path / "other")
    assert caught.value.problems[0].found == "it needs code of its own"
    assert not (tmp_path / "RAN").exists()


def test_a_folder_that_appears_in_the_meantime_is_left(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def size(folder: Path) -> int:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "notes.txt").write_text("mine", encoding="utf-8")
        return 0

    monkeypatch.setattr(place, "size", size)
    with pytest.raises(UsageError, match="there is something else in the output's place"):
        merge(adapter, tmp_path / "out", verify=False)
    assert (tmp_path / "out" / "notes.txt").read_text(encoding="utf-8") == "mine"


def test_float16_that_is_too_narrow(tmp_path: Path, tiny: Any) -> None:
    base = tiny.base(tmp_path / "base", dtype=torch.bfloat16)
    adapter = tiny.adapter(tmp_path / "adapter", base)
    weights = load_file(base / "model.safetensors")
    name = next(name for name in weights if name.endswith("LayerNorm.weight"))
    weights[name][0] = 1e6
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(SetupError, match="float16 cannot hold the numbers of this model"):
        merge(adapter, tmp_path / "out", dtype="float16", verify=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("damage", ["cut", "gone", "index"])
def test_a_base_whose_files_are_damaged(damage: str, adapter: Path, tmp_path: Path) -> None:
    file = tmp_path / "base" / "model.safetensors"
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:1000])
    else:
        file.unlink()
    if damage == "index":
        (tmp_path / "base" / "model.safetensors.index.json").write_text("{", encoding="utf-8")
    with pytest.raises(SetupError, match="damaged or incomplete|there are no weights"):
        merge(adapter, tmp_path / "out")


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "adapter_config.json"])
def test_an_adapter_whose_files_are_damaged(file: str, adapter: Path, tmp_path: Path) -> None:
    (adapter / file).write_bytes((adapter / file).read_bytes()[:20])
    with pytest.raises(SetupError, match="damaged or incomplete|cannot be read"):
        merge(adapter, tmp_path / "out")


def test_without_a_tokenizer_none_is_made_up(adapter: Path, tmp_path: Path) -> None:
    heard: list[Event] = []
    for path in (tmp_path / "base").glob("tokenizer*"):
        path.unlink()
    merged = merge(adapter, tmp_path / "out", tell=heard.append)
    assert not list(merged.path.glob("tokenizer*"))
    assert any(isinstance(e, Notice) and "neither the adapter nor its base has a tokenizer" in e.text for e in heard)


def test_a_prefix_is_no_change_of_weights(tmp_path: Path, tiny: Any) -> None:
    model = AutoModelForCausalLM.from_pretrained(str(tiny.base(tmp_path / "base", "llama")))
    prefix = get_peft_model(model, PrefixTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=3))
    assert isinstance(prefix, PeftModel)
    prefix.save_pretrained(str(tmp_path / "adapter"))
    with pytest.raises(UsageError, match="no change of weights"):
        merge(tmp_path / "adapter", tmp_path / "out")
