from __future__ import annotations

import pickle

import datasets
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from hkft.data.tokenise import collator, tokenise
from hkft.errors import SetupError, UsageError
from hkft.events import Stage

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "good", "film", "bad", "one"]


def tokenizer(pad: str | None = "[PAD]", eos: str | None = None, **more) -> PreTrainedTokenizerFast:
    core = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {"model_input_names": ["input_ids", "token_type_ids", "attention_mask"], "model_max_length": 64, **more}
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token=pad, eos_token=eos, unk_token="[UNK]", **names)


def rows(**columns) -> datasets.Dataset:
    return datasets.Dataset.from_dict({"id": list(range(10, 10 + len(columns["text"]))), **columns})


def test_examples_of_single_sentences(tell):
    got = tokenise(rows(text=["a good film", "bad"], label=[1, 0]), tokenizer(), 16, tell, "train")
    assert got.to_dict() == {
        "input_ids": [[2, 4, 5, 6, 3], [2, 7, 3]],
        "token_type_ids": [[0] * 5, [0] * 3],
        "attention_mask": [[1] * 5, [1] * 3],
        "labels": [1, 0],
        "id": [10, 11],
        "length": [5, 3],
    }
    assert list(tell) == [Stage("tokenising train", 2, 2)]


def test_examples_of_pairs(tell):
    got = tokenise(rows(text=["a"], text_pair=["film"], label=[0.5]), tokenizer(), 16, tell)
    assert got[0]["input_ids"] == [2, 4, 3, 6, 3]
    assert got[0]["token_type_ids"] == [0, 0, 0, 1, 1]
    assert got[0]["labels"] == 0.5


def test_no_token_types_and_no_labels_where_there_are_none(tell):
    got = tokenise(rows(text=["a"]), tokenizer(model_input_names=["input_ids", "attention_mask"]), 16, tell)
    assert sorted(got.column_names) == ["attention_mask", "id", "input_ids", "length"]


@pytest.mark.parametrize(("total", "level"), [(4, "warning"), (40, "info")])
def test_cut_rows_are_counted(tell, total, level):
    texts = ["a good bad film one one"] + ["a"] * (total - 1)
    got = tokenise(rows(text=texts), tokenizer(), 5, tell, "train")
    assert got[0]["input_ids"] == [2, 4, 5, 7, 3]
    assert got[0]["length"] == 5
    assert got[1]["length"] == 3
    notice = tell[-1]
    assert notice.text == f"1 of {total} train ({1 / total:.1%}) are longer than 5 tokens and were cut: data.max_length"
    assert notice.level == level


def test_a_pair_is_cut_at_its_longer_side(tell):
    got = tokenise(rows(text=["a good bad film one"], text_pair=["one"]), tokenizer(), 6, tell)
    assert got[0]["input_ids"] == [2, 4, 5, 3, 8, 3]


def test_the_models_own_limit_holds(tell):
    got = tokenise(rows(text=["a " * 100]), tokenizer(model_max_length=8), 16, tell)
    assert got[0]["length"] == 8
    assert tell.notices[0] == "data.max_length 16 is more than the model takes: 8 is used"


def test_a_limit_without_room_for_text(tell):
    with pytest.raises(UsageError) as caught:
        tokenise(rows(text=["a"], text_pair=["a"]), tokenizer(), 4, tell)
    assert str(caught.value) == (
        "data.max_length: no token of text would be left\n"
        "  found: 4\n  allowed: from 5: the tokenizer adds 3 tokens of its own"
    )


def test_the_end_of_sequence_token_pads_where_nothing_else_does(tell):
    words = tokenizer(pad=None, eos="[SEP]")
    tokenise(rows(text=["a"]), words, 16, tell)
    assert words.pad_token == "[SEP]"
    assert tell.notices == ["the tokenizer has no padding token: its end-of-sequence token '[SEP]' pads"]


def test_a_tokenizer_that_cannot_pad(tell):
    with pytest.raises(SetupError, match="neither a padding nor an end-of-sequence token"):
        tokenise(rows(text=["a"]), tokenizer(pad=None), 16, tell)


@pytest.mark.parametrize(("labels", "dtype"), [([1, 0], torch.int64), ([0.5, 2.0], torch.float32)])
def test_a_batch_is_padded_and_holds_only_the_models_columns(tell, labels, dtype):
    words = tokenizer()
    examples = tokenise(rows(text=["a good film", "bad"], label=labels), words, 16, tell)
    collate = pickle.loads(pickle.dumps(collator(words)))
    batch = collate([examples[0], examples[1]])
    assert sorted(batch) == ["attention_mask", "input_ids", "labels", "token_type_ids"]
    more = [0] * 3 * torch.cuda.is_available()
    assert batch["input_ids"].tolist() == [[2, 4, 5, 6, 3, *more], [2, 7, 3, 0, 0, *more]]
    assert batch["attention_mask"].sum(1).tolist() == [5, 3]
    assert batch["labels"].tolist() == labels
    assert batch["labels"].dtype == dtype


def test_no_bar_reaches_the_terminal(tell, capfd):
    tokenise(rows(text=["a"] * 2500), tokenizer(), 16, tell)
    assert capfd.readouterr() == ("", "")
    assert [(event.done, event.total) for event in tell] == [(1000, 2500), (2000, 2500), (2500, 2500)]
