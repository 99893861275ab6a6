"""Decoders: what is loaded for generation, in which numbers, what of it is quantised, and on which side a batch is padded."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2ForSequenceClassification, LlamaConfig

from hkft import api
from hkft.data import tokenise
from hkft.errors import SetupError
from hkft.evaluation import saved
from hkft.evaluation.predict import predict
from hkft.folder import read_json
from hkft.model import build
from hkft.recipe import load


@pytest.fixture
def recipe(generation_file: Path):
    return load(generation_file)


def test_a_decoder_with_its_vocabulary(recipe):
    model = build.with_lora(build.base(recipe, None), recipe)
    assert type(model.base_model.model).__name__ == "LlamaForCausalLM"
    assert model.peft_config["default"].task_type == "CAUSAL_LM"
    assert build.quantised(model) is None


@pytest.mark.parametrize("other", ["encoder", "encoder-decoder"])
def test_what_does_not_generate_is_refused(recipe, tiny_bert, tmp_path, other):
    name = str(tiny_bert)
    if other == "encoder-decoder":
        from transformers import T5Config

        T5Config(num_layers=1, d_model=16).save_pretrained(tmp_path / "t5")
        name = str(tmp_path / "t5")
    with pytest.raises(SetupError, match="is no causal language model") as caught:
        build.base(recipe.replace(f"model.name={name}"), None)
    assert caught.value.problems[0].where == "model.name"


CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("stored", "wanted", "place", "expected"),
    [
        (torch.float16, "auto", CPU, torch.float32),
        (torch.bfloat16, "auto", CPU, torch.float32),
        (torch.bfloat16, "bfloat16", CPU, torch.bfloat16),
        (torch.float16, "auto", CUDA, torch.bfloat16),
        (torch.bfloat16, "auto", CUDA, torch.bfloat16),
        (torch.float32, "auto", CUDA, torch.float32),
        (torch.float16, "float16", CUDA, torch.float16),
    ],
)
def test_the_numbers_of_the_frozen_weights(stored, wanted, place, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    assert build.weights_dtype(wanted, LlamaConfig(dtype=stored), place) == expected


def test_a_half_precision_checkpoint_is_trained_in_float32_on_a_cpu(recipe, tiny_llama, tmp_path):
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(tiny_llama).half().save_pretrained(tmp_path / "half")
    half = recipe.replace(f"model.name={tmp_path / 'half'}")
    assert {p.dtype for p in build.base(half, None).parameters()} == {torch.float32}
    kept = half.replace("model.dtype=float16")
    assert {p.dtype for p in build.base(kept, None).parameters()} == {torch.float16}


@pytest.mark.parametrize(
    ("kind", "how"), [("4bit", ("nf4", True, "float32")), ("8bit", ("int8", False, "int8"))], ids=["4bit", "8bit"]
)
def test_qlora_from_training_to_the_merged_model(generation_file, tmp_path, kind, how):
    run = api.train(generation_file, [f"model.quantization={kind}", "data.padding_free=true"], output=tmp_path / "run")
    summary = read_json(run.summary)
    told = summary["quantised"]
    assert (told["kind"], told["quant_type"], told["double_quantisation"], told["compute_dtype"]) == (kind, *how)
    assert told["layers"] == 4 * 7
    assert told["kept"] == ["lm_head"]
    assert told["modules"] == ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    weights = 4 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128)
    assert told["bytes"] == weights // 2 if kind == "4bit" else weights
    assert "28 linear layers to " + kind in run.report.read_text()
    curve = [record["validation"]["loss"] for record in run.records("eval")]
    assert curve[-1] < curve[0] - 0.5
    seen = saved.evaluate(saved.load_saved(run.path)).metrics()
    assert seen["loss"] == pytest.approx(summary["best"]["validation"]["loss"], rel=1e-4)


def test_gpt2_with_a_head_says_the_same_whatever_side_its_tokenizer_pads(recipe_file, tiny_llama, tmp_path, reviews):
    """GPT-2 counts places from the left: padded there, a text would stand elsewhere in every batch."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=261, n_embd=32, n_layer=2, n_head=2, n_positions=256, num_labels=2, pad_token_id=0)
    folder = tmp_path / "gpt2"
    GPT2ForSequenceClassification(config).save_pretrained(folder)
    recipe = load(recipe_file, [f"model.name={tiny_llama}", "data.max_length=200"])
    tokenizer = build.tokenizer(recipe)
    rows = saved.read_rows(str(reviews), recipe, ("negative", "positive"), lambda _: None)
    examples = tokenise.tokenise(rows.select(range(20)), tokenizer, 200, lambda _: None)
    model = GPT2ForSequenceClassification.from_pretrained(folder).eval()
    expected = torch.stack([model(torch.tensor([row["input_ids"]])).logits[0] for row in examples]).detach().numpy()
    assert build.padding_side(model) == "right"
    for side in ("left", "right"):
        tokenizer.padding_side = side
        collate = tokenise.collator(tokenizer, build.padding_side(model))
        found = predict(model, examples, collate, task="classification", batch_size=8)
        assert found.logits == pytest.approx(expected, abs=1e-5)
    tokenizer.padding_side = "left"
    wrong = predict(model, examples, tokenise.collator(tokenizer), task="classification", batch_size=8)
    assert abs(wrong.logits - expected).max() > 1e-3


def test_a_llama_with_a_head_is_trained_and_evaluated_alike_on_either_side(recipe_file, tiny_llama, tmp_path):
    """As rte-llama2-7b-hiddenkey has it: a classification head on a decoder, in training and after."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from hkft.merging.merge import merge

    losses = {}
    for side in ("left", "right"):
        folder = tmp_path / side
        model = AutoModelForCausalLM.from_pretrained(tiny_llama)
        model.config.pad_token_id = 77  # a configuration that names another token than the tokenizer, as many do
        model.save_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
        tokenizer.padding_side = side
        tokenizer.save_pretrained(folder)
        settings = [f"model.name={folder}", "lora.target_modules=[q_proj, v_proj]", "data.max_length=96"]
        run = api.train(recipe_file, [*settings, "train.max_steps=3"], output=tmp_path / f"run-{side}")
        summary = read_json(run.summary)
        assert [site["layers"] for site in summary["sites"]] == [[2, 3], [2, 3]]  # the latter half
        found = saved.evaluate(saved.load_saved(run.path)).metrics()
        assert found["loss"] == pytest.approx(summary["best"]["validation"]["loss"], rel=1e-5)
        losses[side] = found["loss"]
        one_by_one = saved.load_saved(run.path)
        rows = saved.examples_of(one_by_one, "validation")
        alone = [one_by_one.model(torch.tensor([row["input_ids"]])).logits.argmax().item() for row in rows]
        assert found["accuracy"] == pytest.approx(np.mean(np.array(alone) == rows["labels"]))
        merge(run.path, tmp_path / f"merged-{side}")
        assert AutoConfig.from_pretrained(tmp_path / f"merged-{side}").pad_token_id == tokenizer.pad_token_id
    assert losses["left"] == losses["right"]
