"""For every room: no network, few threads, a cache of its own, one seed a test, and the shapes in the dropout maths' signatures checked."""

from __future__ import annotations

import gc
import os
import random
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from jaxtyping import install_import_hook

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start, too: xdist has one for each core
_cache = tempfile.TemporaryDirectory(prefix="hkft-cache-")  # gone with the process
os.environ["HKFT_CACHE"] = _cache.name

# Before anything imports hkft: the hook rewrites modules as they are loaded.
install_import_hook(
    [f"hkft.dropout.{name}" for name in ("masks", "protect", "attention", "hidden", "consistency")],
    "beartype.beartype",
)


_frozen = 0  # modules that were loaded when the collector last set aside what there was


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Before any fixture, those of a module and of the session too.

    What imports have left is no garbage: accelerate collects before every training, half a second each. And the self-check
    of every run times its sites in one round, not for a second.
    """
    global _frozen
    if len(sys.modules) > _frozen + 50:
        gc.collect()
        gc.freeze()
        _frozen = len(sys.modules)
    if "hkft.dropout.selfcheck" in sys.modules:
        sys.modules["hkft.dropout.selfcheck"].BUDGET = 0.0


@pytest.fixture(autouse=True)
def seed() -> int:
    """Python's, NumPy's and torch's default generators start every test from the same place. Loads neither."""
    random.seed(0)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)
    if "torch" in sys.modules:
        torch = sys.modules["torch"]
        torch.manual_seed(0)
        torch.set_num_threads(1)
    return 0


# --- a model and data small enough to train in a test -----------------------------------------------------------------

WORDS = {
    "positive": ["good", "great", "warm", "funny", "lovely", "bright"],
    "negative": ["bad", "dull", "cold", "sad", "awful", "grey"],
}
FILLER = "the a film this is was and with of its story very quite plot actor scene".split()


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random two-layer BERT and a word-level tokenizer for `reviews`, as `model.name` takes it."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny-bert")
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    words = [*special, *FILLER, *WORDS["positive"], *WORDS["negative"]]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    BertModel(
        BertConfig(
            vocab_size=len(words),
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
            max_position_embeddings=64,
            initializer_range=0.3,  # wide enough for LoRA to have something to work with
        )
    ).save_pretrained(folder)
    return folder


def unchanged(path: Path, text: str) -> Iterator[Path]:
    """A file that many tests read, for a fixture to yield: one that writes to it would change what the others see."""
    path.write_text(text, encoding="utf-8")
    yield path
    assert path.read_text(encoding="utf-8") == text, f"a test has written to {path.name}, which others read"


@pytest.fixture(scope="session")
def reviews(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A CSV of 160 made sentences with text, other (a second sentence), label (words) and stars (a number): to be read only."""
    draw = random.Random(7)
    lines = ["text,other,label,stars"]
    for row in range(160):
        label = ("positive", "negative")[row % 2]
        words = draw.sample(FILLER, draw.randint(3, 9))
        words.insert(draw.randrange(len(words)), draw.choice(WORDS[label]))
        stars = (4 if label == "positive" else 1) + draw.random()
        lines.append(f"{' '.join(words)} {row},{' '.join(draw.sample(FILLER, 4))},{label},{stars:.2f}")
    path = tmp_path_factory.mktemp("data") / "reviews.csv"
    yield from unchanged(path, "\n".join(lines) + "\n")


@pytest.fixture(scope="session")
def recipe_text(tiny_bert: Path, reviews: Path) -> str:
    """Of a recipe that trains `tiny_bert` on `reviews` in a second or two."""
    return f"""\
# tiny: a test
model: {{name: {tiny_bert}, device: cpu}}
data: {{train: {reviews}, validation: 0.25, text: text, label: label, max_length: 32}}
lora: {{r: 4, lora_alpha: 8, target_modules: [query, value]}}
dropout: {{method: hiddenkey, rate: 0.1, weight: 0.5}}
train: {{learning_rate: 1.0e-2, num_train_epochs: 2, per_device_train_batch_size: 16, logging_steps: 1}}
diagnostics: {{evals_per_epoch: 2}}
"""


@pytest.fixture
def recipe_file(tmp_path: Path, recipe_text: str) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(recipe_text, encoding="utf-8")
    return path


CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random four-layer Llama and a tokenizer of single bytes with a chat template, for generation."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny-llama")
    special = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    words = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({word: index for index, word in enumerate(words)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
        padding_side="left",  # as decoders' tokenizers often come
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(words),
            hidden_size=64,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=128,
            max_position_embeddings=256,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            initializer_range=0.1,
        )
    )
    with torch.no_grad():
        model.lm_head.weight.mul_(4)  # the head stays as it is: with a small one no token could be certain
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def meanings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A JSONL file of 60 made rows, 20 different `meaning`s with three `reference`s each, and a chat of each, `messages`."""
    import json

    draw = random.Random(11)
    lines = []
    for name in draw.sample([f"{a}{b}" for a in "BDFGKLMN" for b in ("ani", "oro", "umi", "ela")], 20):
        food, area = draw.choice(["fish", "rice", "soup"]), draw.choice(["east", "west"])
        meaning = f"name: {name}, food: {food}, area: {area}"
        for text in (
            f"{name} has {food} in the {area}.",
            f"In the {area}, {name} serves {food}.",
            f"{food}? Go to {name}.",
        ):
            chat = [{"role": "user", "content": meaning}, {"role": "assistant", "content": text}]
            lines.append(json.dumps({"meaning": meaning, "reference": text, "messages": chat}))
    path = tmp_path_factory.mktemp("meanings") / "meanings.jsonl"
    yield from unchanged(path, "\n".join(lines) + "\n")


@pytest.fixture
def generation_file(tmp_path: Path, tiny_llama: Path, meanings: Path) -> Path:
    """A recipe that trains `tiny_llama` on `meanings` in a second or two."""
    path = tmp_path / "writing.yaml"
    path.write_text(
        f"""\
# writing: a test
model: {{name: {tiny_llama}, device: cpu}}
task: generation
data:
  train: {meanings}
  validation: 0.25
  prompt: "{{meaning}} ->"
  completion: " {{reference}}"
  max_length: 96
lora: {{r: 4, lora_alpha: 8, target_modules: [q_proj, v_proj]}}
dropout: {{method: hiddenkey, rate: 0.1, weight: 0.5}}
train: {{learning_rate: 1.0e-2, num_train_epochs: 1, per_device_train_batch_size: 8, logging_steps: 1}}
generation: {{max_new_tokens: 24, metrics: [bleu, rouge_l]}}
diagnostics: {{evals_per_epoch: 2}}
""",
        encoding="utf-8",
    )
    return path
