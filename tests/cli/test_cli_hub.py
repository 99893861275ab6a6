"""A shipped recipe, word for word, from any folder: model and data come from the hub's cache, which is laid out here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
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


COMMANDS = """
import json, sys
from typer.testing import CliRunner
from hkft.cli.main import app
ran = [CliRunner().invoke(app, command.split()) for command in sys.argv[1:]]
print(json.dumps([[each.exit_code, each.stdout, each.stderr] for each in ran]))
"""


def test_a_shipped_recipe_from_any_folder_and_a_model_that_is_not_in_the_cache(hub, tiny):
    """A process of its own: where the cache lies is read on import. All commands in one, which loads torch once."""
    commands = [
        "train --recipe sst2-hiddenkey.yaml --output run --set train.num_train_epochs=1 --set model.device=cpu",
        "merge run --output merged",
        f"train --recipe {tiny} --set model.name=some/model",
    ]
    environ = {"HF_HOME": str(hub), "HF_HUB_CACHE": str(hub / "hub"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", COMMANDS, *commands],
        capture_output=True,
        text=True,
        timeout=200,
        env={**os.environ, **environ},
    )
    assert done.returncode == 0, done.stderr
    trained, merged, missing = json.loads(done.stdout)

    code, _, said = trained
    assert code == 0, said
    assert "hiddenkey on roberta-large, classification, cpu" in said
    summary, environment = read_json(Path("run/summary.json")), read_json(Path("run/environment.json"))
    assert (summary["status"], summary["steps"], summary["model"]) == ("finished", 1, "roberta-large")
    assert environment["model"] == {"name": "roberta-large", "revision": COMMIT}
    assert read_json(Path("run/splits.json"))["labels"] == ["negative", "positive"]
    assert "warning: 8 of 8 validation rows (100.0%) are in train too" in said
    assert json.loads(Path("run/adapter/adapter_config.json").read_text())["base_model_name_or_path"] == "roberta-large"
    assert merged[0] == 0, merged

    code, out, said = missing
    assert (code, out) == (4, "")
    assert "error: the model 'some/model' could not be loaded\n  where    model.name\n" in said
    assert "Traceback" not in said
