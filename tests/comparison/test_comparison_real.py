"""One real grid: a tiny BERT with random weights and its own tokenizer, 40 rows, two methods, two seeds."""

import json
from pathlib import Path

import pytest

import hkft
from hkft.folder import RunFolder, read_json

WORDS = ["good", "fine", "bright", "warm", "bad", "poor", "dull", "cold", "film", "plot", "cast", "song"]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from tokenizers.processors import TemplateProcessing
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny")
    vocabulary = {word: index for index, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing("[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=len(vocabulary), max_position_embeddings=32, **sizes)).save_pretrained(folder)
    return folder


@pytest.fixture
def recipe(model: Path, tmp_path: Path) -> Path:
    rows = [f"{WORDS[n % 8]} {WORDS[8 + n % 4]} {WORDS[8 + n // 4 % 4]} {n},{int(n % 8 < 4)}" for n in range(40)]
    (tmp_path / "rows.csv").write_text("\n".join(["text,label", *rows]) + "\n")
    path = tmp_path / "tiny.yaml"
    path.write_text(f"""\
model: {{name: {json.dumps(str(model))}, device: cpu}}
data: {{train: {json.dumps(str(tmp_path / "rows.csv"))}, validation: 0.3, text: text, label: label, max_length: 16}}
lora: {{r: 2, target_modules: [query, value]}}
dropout: {{rate: 0.2}}
train: {{learning_rate: 1.0e-2, num_train_epochs: 2, per_device_train_batch_size: 8}}
diagnostics: {{evals_per_epoch: 1}}
""")
    return path


def test_a_real_grid_is_paired_finishes_and_does_not_run_twice(recipe, tmp_path):
    def run():
        found, _ = hkft.compare(
            recipe, ["none", "dropkey"], 2, overrides=["train.logging_steps=1"], output=tmp_path / "grid"
        )
        return found

    found = run()
    assert [(row.label, row.seeds) for row in found.rows] == [("none", (1, 2)), ("dropkey", (1, 2))]
    assert found.warnings == ()
    assert found.failed == {}
    none, dropkey = ([RunFolder(Path(path)) for path in row.runs] for row in found.rows)
    for plain, dropped in zip(none, dropkey, strict=True):  # the same rows, and the same weights before the first step
        assert plain.splits.read_text() == dropped.splits.read_text()
        first, other = (run.records("eval")[0] for run in (plain, dropped))
        assert (first["step"], first["train_probe"], first["validation"]) == (
            0, other["train_probe"], other["validation"],
        )  # fmt: skip
        assert plain.records("train") != dropped.records("train")
    assert none[0].splits.read_text() != none[1].splits.read_text()
    score = found.rows[1].scores["final_loss"]
    for seed, run_folder in zip((1, 2), dropkey, strict=True):
        assert score.values[seed] == read_json(run_folder.summary)["final"]["validation"]["loss"]
    assert all(run.report.exists() and run.card.exists() for run in (*none, *dropkey))
    assert len(found.curves) == 4
    assert found.curves[0]["points"][-1]["step"] == read_json(none[0].summary)["steps"]

    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "grid").rglob("summary.json")}
    assert len(written) == 4
    assert run().as_dict() == found.as_dict()
    assert {path: path.stat().st_mtime_ns for path in written} == written
