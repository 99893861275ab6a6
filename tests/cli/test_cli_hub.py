"""A shipped recipe, word for word, from any folder: model and data come from the hub's cache, which is laid out here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hkft.folder import read_json

COMMIT = "0123456789abcdef0123456789abcdef01234567"
CARD = """---
configs:
- config_name: sst2
  data_files: [{split: train, path: sst2/train.jsonl}, {split: validation, path: sst2/validation.jsonl}]
dataset_info:
- config_name: sst2
  features:
  - {name: sentence, dtype: string}
  - {name: label, dtype: {class_label: {names: {'0': negative, '1': positive}}}}
  - {name: idx, dtype: int32}
---
"""


def snapshot(home: Path, name: str) -> Path:
    """An empty entry of the hub's cache, as `hf download` would fill it."""
    entry = home / "hub" / name
    (entry / "refs").mkdir(parents=True)
    (entry / "refs" / "main").write_text(COMMIT)
    folder = entry / "snapshots" / COMMIT
    folder.mkdir(parents=True)
    return folder


def sentences(count: int) -> str:
    rows = [
        {"sentence": f"a {('dull', 'warm')[n % 2]} film, the {n}th of its kind", "label": n % 2, "idx": n}
        for n in range(count)
    ]
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.fixture
def hub(tmp_path: Path) -> Path:
    """RoBERTa in a very small size under the name of the large one, and SST-2 with 32 and 8 rows."""
    import torch
    from tokenizers import ByteLevelBPETokenizer
    from transformers import RobertaConfig, RobertaForMaskedLM, RobertaTokenizerFast

    home = tmp_path / "home"
    model, data = snapshot(home, "models--roberta-large"), snapshot(home, "datasets--nyu-mll--glue")
    learner = ByteLevelBPETokenizer()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    learner.train_from_iterator([sentences(8)], vocab_size=320, special_tokens=special)
    tokenizer = RobertaTokenizerFast(tokenizer_object=learner._tokenizer, model_max_length=62)
    tokenizer.save_pretrained(model)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config = RobertaConfig(vocab_size=320, max_position_embeddings=64, pad_token_id=1, **sizes)
    RobertaForMaskedLM(config).save_pretrained(model)
    (data / "README.md").write_text(CARD)
    (data / "sst2").mkdir()
    (data / "sst2" / "train.jsonl").write_text(sentences(32))
    (data / "sst2" / "validation.jsonl").write_text(sentences(8))
    return home


def test_sst2_hiddenkey_from_any_folder(shell, hub):
    shorter = ["--set", "train.num_train_epochs=1", "--set", "model.device=cpu"]
    environ = {"HF_HOME": str(hub), "HF_HUB_CACHE": str(hub / "hub"), "HF_HUB_OFFLINE": "1"}
    ran = shell("train", "--recipe", "sst2-hiddenkey.yaml", "--output", "run", *shorter, **environ)
    assert ran.code == 0, ran.err
    assert "hiddenkey on roberta-large, classification, cpu" in ran.err
    summary, environment = read_json(Path("run/summary.json")), read_json(Path("run/environment.json"))
    assert (summary["status"], summary["steps"], summary["model"]) == ("finished", 1, "roberta-large")
    assert environment["model"] == {"name": "roberta-large", "revision": COMMIT}
    assert read_json(Path("run/splits.json"))["labels"] == ["negative", "positive"]
    assert "warning: 8 of 8 validation rows (100.0%) are in train too" in ran.err
    assert json.loads(Path("run/adapter/adapter_config.json").read_text())["base_model_name_or_path"] == "roberta-large"
    assert shell("merge", "run", "--output", "merged", **environ).code == 0


def test_a_model_that_is_not_in_the_cache_is_one_message(shell, hub, tiny):
    ran = shell("train", "--recipe", tiny, "--set", "model.name=some/model", HF_HOME=str(hub), HF_HUB_OFFLINE="1")
    assert (ran.code, ran.out) == (4, "")
    assert "error: the model 'some/model' could not be loaded\n  where    model.name\n" in ran.err
    assert "Traceback" not in ran.err
