"""Tiny random models with a real tokenizer, adapters that were never trained but change much, and real short runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, TaskType, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
    RobertaConfig,
)

TEXT = "the a film was not good bad dull bright and it is story she said no yes very two of in by"
WORDS = TEXT.split()
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
SIZE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 80,
    "pad_token_id": 0,
}
CONFIGS: dict[str, Any] = {
    "bert": lambda: BertConfig(**SIZE, hidden_dropout_prob=0.15, attention_probs_dropout_prob=0.05),
    "roberta": lambda: RobertaConfig(**SIZE, bos_token_id=2, eos_token_id=3),
    "llama": lambda: LlamaConfig(**SIZE, num_key_value_heads=2, bos_token_id=2, eos_token_id=3, attention_dropout=0.1),
}
QUERY = {"bert": ["query", "value"], "roberta": ["query", "value"], "llama": ["q_proj", "v_proj"]}


def save_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """A WordLevel tokenizer, [CLS] ... [SEP], with a chat template."""
    inner = Tokenizer(WordLevel({word: n for n, word in enumerate([*SPECIAL, *WORDS])}, unk_token="[UNK]"))
    inner.pre_tokenizer = Whitespace()
    inner.post_processor = TemplateProcessing("[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    names = dict(zip(("pad_token", "unk_token", "cls_token", "eos_token"), SPECIAL, strict=True))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, model_max_length=64, **names)
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    tokenizer.save_pretrained(str(folder))
    return tokenizer


def save_base(folder: Path, family: str = "bert", dtype: torch.dtype = torch.float32, **settings: Any) -> Path:
    """A model with random weights and no head of any task, as it would be downloaded."""
    config = CONFIGS[family]()
    for name, value in settings.items():
        setattr(config, name, value)
    torch.manual_seed(1)
    if family == "llama":
        model = AutoModelForCausalLM.from_config(config)
    else:
        model = AutoModelForSequenceClassification.from_config(config).base_model
    with torch.no_grad():  # 0.02 makes every layer all but the identity, and a wrong one hard to see
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(6.0)
    model.to(dtype).save_pretrained(str(folder))
    save_tokenizer(folder)
    return folder


def save_adapter(
    folder: Path, base: Path, task_type: TaskType = TaskType.SEQ_CLS, labels: int = 3, **lora: Any
) -> Path:
    """An adapter of `base` whose B and head are random, not zero: it changes every output."""
    opens = AutoModelForCausalLM if task_type == TaskType.CAUSAL_LM else AutoModelForSequenceClassification
    head = {} if task_type == TaskType.CAUSAL_LM else {"num_labels": labels}
    model = opens.from_pretrained(str(base), dtype=torch.float32, **head)
    family = model.config.model_type
    torch.manual_seed(2)
    fields = {"r": 4, "lora_alpha": 8, "target_modules": QUERY[family], **lora}
    wrapped = get_peft_model(model, LoraConfig(task_type=task_type, **fields))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.5 if "lora_" in name else 1.0)
    wrapped.save_pretrained(str(folder))
    return folder


@dataclass(frozen=True)
class Tiny:
    """The functions above, for tests: a fixture, since test modules do not import one another."""

    base: Callable[..., Path] = save_base
    adapter: Callable[..., Path] = save_adapter
    tokenizer: Callable[..., PreTrainedTokenizerFast] = save_tokenizer


@pytest.fixture(scope="session")
def tiny() -> Tiny:
    return Tiny()


@pytest.fixture
def adapter(tmp_path: Path, tiny: Tiny) -> Path:
    """An adapter folder with three labels on a tiny BERT, and no run around it."""
    return tiny.adapter(tmp_path / "adapter", tiny.base(tmp_path / "base"))


def _rows(regression: bool) -> str:
    lines = ["text,label"]
    for n in range(40):
        good = n % 2
        label = str(n / 10) if regression else ("fine" if good else "poor")
        lines.append(
            f"the film was {'good and bright' if good else 'bad and dull'} {WORDS[n % len(WORDS)]} {n},{label}"
        )
    return "\n".join(lines) + "\n"


def _train(folder: Path, task: str) -> Path:
    from hkft.recipe import load
    from hkft.training.run import train

    save_base(folder / "base")
    (folder / "rows.csv").write_text(_rows(task == "regression"), encoding="utf-8")
    (folder / "small.yaml").write_text(
        f"""
model: {{name: {folder / "base"}, device: cpu}}
task: {task}
data: {{train: {folder / "rows.csv"}, validation: 0.25, text: text, label: label, max_length: 8}}
lora: {{r: 4, lora_alpha: 16, target_modules: [query, value]}}
dropout: {{method: "hiddenkey-", rate: 0.1}}
train: {{learning_rate: 0.05, max_steps: 2, per_device_train_batch_size: 8, warmup_steps: 0}}
diagnostics: {{evals_per_epoch: 1}}
""",
        encoding="utf-8",
    )
    return train(load(folder / "small.yaml"), folder / "run").path


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a real run of two steps; its base model and its rows lie beside it. Not to be changed."""
    return _train(tmp_path_factory.mktemp("classification"), "classification")


@pytest.fixture(scope="session")
def regression_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _train(tmp_path_factory.mktemp("regression"), "regression")
