"""Decoders looked at, written with and kept: per completion token, whatever the batches; the text of transformers' own generate."""

from __future__ import annotations

import json
import math
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import GenerationConfig

from hkft import api
from hkft.data import splits, tokenise
from hkft.data.completions import Encoder
from hkft.evaluation import completions, generate, saved, stream
from hkft.evaluation.texts import bleu
from hkft.events import Notice, Stage, silent
from hkft.folder import RunFolder, read_json
from hkft.model import build
from hkft.model import vocabulary as vocabulary_module
from hkft.recipe import load


@pytest.fixture
def recipe(generation_file: Path):
    return load(generation_file)


@pytest.fixture
def parts(recipe):
    """(model, tokenizer, validation examples)"""
    tokenizer = build.tokenizer(recipe)
    model = build.with_lora(build.base(recipe, None, build.padding_id(tokenizer)), recipe)
    rows = splits.load(recipe, silent).validation
    assert rows is not None
    return model, tokenizer, tokenise.tokenise(rows, tokenizer, recipe.data.max_length, silent)


@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_a_look_is_the_mean_over_completion_tokens_whatever_the_batches(parts, batch_size, monkeypatch):
    monkeypatch.setattr(vocabulary_module, "NUMBERS", 261 * 7)
    model, tokenizer, examples = parts
    model.train()
    collate = tokenise.collator(tokenizer, build.padding_side(model))
    seen = completions.look(model, examples, collate, batch_size=batch_size)
    assert model.training
    total = tokens = hits = 0.0
    model.eval()
    for row in examples:
        with torch.no_grad():
            logits = model(torch.tensor([row["input_ids"]])).logits[0]
        begin = row["prompt_length"]
        target = torch.tensor(row["input_ids"][begin:])
        loss = cross_entropy(logits[begin - 1 : -1], target, reduction="sum").item()
        place = list(examples["id"]).index(row["id"])
        assert seen.losses[place] == pytest.approx(loss, rel=1e-4)
        assert seen.tokens[place] == len(target)
        total, tokens = total + loss, tokens + len(target)
        hits += (logits[begin - 1 : -1].argmax(-1) == target).sum().item()
    metrics = seen.metrics()
    assert metrics["loss"] == pytest.approx(total / tokens, rel=1e-5)
    assert metrics["perplexity"] == pytest.approx(math.exp(total / tokens), rel=1e-4)
    assert metrics["token_accuracy"] == pytest.approx(hits / tokens)
    assert metrics["loss"] != pytest.approx((seen.losses / seen.tokens).mean(), rel=1e-6)  # not a mean of rows


def test_text_is_what_the_model_writes_of_each_prompt_alone(parts, recipe):
    """Batches of unlike prompts, padded on the left, give the text of a batch of one."""
    model, tokenizer, _ = parts
    prompts = [tokenizer(text)["input_ids"] for text in ("name: Bani ->", "a", "name: Loro, food: fish, area: east ->")]
    together = generate.generate(model, tokenizer, prompts, recipe.generation)
    inner = model.base_model.model
    for prompt, text in zip(prompts, together, strict=True):
        with torch.no_grad():
            tokens = inner.generate(torch.tensor([prompt]), max_new_tokens=24, do_sample=False, pad_token_id=0)
        assert text == tokenizer.decode(tokens[0, len(prompt) :], skip_special_tokens=True).strip()
    assert len(set(together)) == 3


def test_a_batch_is_of_like_length_and_progress_is_told(parts, recipe, monkeypatch):
    model, tokenizer, _ = parts
    widths, told = [], []
    own = type(model.base_model.model).generate

    def watched(self, **kwargs):
        widths.append(kwargs["attention_mask"].sum(1).tolist())
        return own(self, **kwargs)

    monkeypatch.setattr(type(model.base_model.model), "generate", watched)
    settings = recipe.replace("generation.batch_size=2", "generation.max_new_tokens=2").generation
    generate.generate(model, tokenizer, [[5] * n for n in (3, 9, 4, 8)], settings, tell=told.append, text="writing")
    assert widths == [[9, 8], [4, 3]]
    assert told == [Stage("writing", 2, 4), Stage("writing", 4, 4)]


def test_the_recipe_s_settings_reach_transformers(parts, recipe):
    model, tokenizer, _ = parts
    chosen = recipe.replace(
        "generation.num_beams=10", "generation.length_penalty=0.9", "generation.no_repeat_ngram_size=4"
    )
    config = generate._config(model.base_model.model, Encoder(tokenizer, False), chosen.generation)
    assert (config.num_beams, config.length_penalty, config.no_repeat_ngram_size) == (10, 0.9, 4)
    assert not config.do_sample
    assert config.eos_token_id == [2, 4]  # the end of text, and what the chat template ends a turn with
    drawn = recipe.replace("generation.do_sample=true", "generation.temperature=0.7", "generation.top_k=5").generation
    config = generate._config(model.base_model.model, Encoder(tokenizer, False), drawn)
    assert (config.do_sample, config.temperature, config.top_k, config.top_p) == (True, 0.7, 5, 1.0)


def test_what_the_checkpoint_asks_of_generate_is_not_asked(parts, recipe):
    """A stop string, several texts a prompt, a record in place of tokens: a published checkpoint may name any of them."""
    model, tokenizer, _ = parts
    inner = model.base_model.model
    expected = generate.generate(model, tokenizer, [[5, 6, 7]], recipe.generation)
    own = GenerationConfig(
        stop_strings=["a"], num_return_sequences=2, num_beams=2, return_dict_in_generate=True, min_new_tokens=20,
        suppress_tokens=list(range(5, 200)), eos_token_id=2,
    )  # fmt: skip
    inner.generation_config = own
    assert generate.generate(model, tokenizer, [[5, 6, 7]], recipe.generation) == expected
    assert inner.generation_config is own


def test_an_end_that_is_no_special_token_ends_the_text_all_the_same(parts, recipe, monkeypatch):
    model, tokenizer, _ = parts
    letters = tokenizer("stop")["input_ids"]
    end = tokenizer("!")["input_ids"][0]
    model.base_model.model.generation_config.eos_token_id = end
    monkeypatch.setattr(
        type(model.base_model.model),
        "generate",
        lambda self, input_ids, **_: torch.cat([input_ids, torch.tensor([[*letters, end, 0, 0]])], 1),
    )
    assert generate.generate(model, tokenizer, [[5, 6, 7]], recipe.generation) == ["stop"]


def test_drawn_text_hangs_on_the_seed_and_leaves_the_random_stream_alone(parts, recipe):
    model, tokenizer, _ = parts
    drawn = recipe.replace("generation.do_sample=true", "generation.temperature=1.5").generation
    state = torch.get_rng_state()
    first, again, other = (generate.generate(model, tokenizer, [[5, 6, 7]], drawn, seed=seed) for seed in (1, 1, 2))
    assert first == again != other
    assert torch.equal(torch.get_rng_state(), state)


def test_no_text_is_longer_than_the_model_has_positions(parts, recipe, monkeypatch):
    model, tokenizer, _ = parts
    limits = []
    own = type(model.base_model.model).generate

    def watched(self, **kwargs):
        limits.append(kwargs["generation_config"].max_new_tokens)
        return own(self, **kwargs)

    monkeypatch.setattr(type(model.base_model.model), "generate", watched)
    settings = recipe.replace("generation.max_new_tokens=40", "generation.batch_size=1").generation
    generate.generate(model, tokenizer, [[20] * 250, [20] * 100], settings)
    assert limits == [6, 40]


def test_one_text_a_prompt_scored_against_all_its_completions(parts, recipe):
    model, tokenizer, examples = parts
    found = generate.write(model, tokenizer, examples, recipe.generation)
    prompts = list(dict.fromkeys(examples["prompt"]))
    assert len(prompts) * 3 == len(examples)
    assert list(found.texts) == prompts
    references = [
        [
            text.strip()
            for text, asked in zip(examples["completion"], examples["prompt"], strict=True)
            if asked == prompt
        ]
        for prompt in prompts
    ]
    assert {len(texts) for texts in references} == {3}
    assert set(found.scores) == {"bleu", "rouge_l"}
    assert found.scores["bleu"] == pytest.approx(
        bleu([found.texts[prompt] for prompt in prompts], references), nan_ok=True
    )
    assert found.signature is not None
    assert "nrefs:3" in found.signature
    some = generate.write(model, tokenizer, examples, recipe.generation, limit=2, seed=1)
    assert len(some.texts) == 2
    assert set(some.texts) <= set(prompts)


@pytest.fixture
def run(generation_file: Path, tmp_path: Path) -> RunFolder:
    asked = ["diagnostics.generate=3", "diagnostics.metric=rouge_l", "data.padding_free=true"]
    return api.train(generation_file, asked, output=tmp_path / "run")


def test_a_run_tells_the_gap_per_token_and_on_request_of_the_text_of_both(run):
    summary = read_json(run.summary)
    assert (summary["task"], summary["status"]) == ("generation", "finished")
    assert summary["metric"] == "rouge_l"
    names = {"loss", "perplexity", "token_accuracy", "bleu", "rouge_l"}
    for moment in ("best", "final"):
        assert set(summary[moment]["train_probe"]) == set(summary[moment]["validation"]) == names
        assert set(summary["gap"][moment]) == names
    final, gap = summary["final"], summary["gap"]["final"]
    assert gap["loss"] == pytest.approx(final["validation"]["loss"] - final["train_probe"]["loss"])
    assert gap["rouge_l"] == pytest.approx(final["train_probe"]["rouge_l"] - final["validation"]["rouge_l"])
    assert final["train_probe"]["loss"] < run.records("eval")[0]["train_probe"]["loss"]
    kept = [json.loads(line) for line in run.predictions("validation").read_text().splitlines()]
    assert set(kept[0]) == {"id", "prompt", "label", "prediction", "loss", "tokens"}
    assert sum(row["prediction"] is not None for row in kept) == 9  # three prompts with three completions each
    assert "perplexity" in run.report.read_text()


def test_eval_and_predict_look_under_the_precision_of_training(generation_file, tmp_path, monkeypatch):
    run = api.train(generation_file, ["train.bf16=true"], output=tmp_path / "half")
    best = read_json(run.summary)["best"]["validation"]
    loaded = saved.load_saved(run.path)
    assert saved.evaluate(loaded).metrics()["loss"] == pytest.approx(best["loss"], rel=1e-7)
    seen = []
    own = stream.generate
    monkeypatch.setattr(stream, "generate", lambda *a, **k: seen.append(k["precision"]) or own(*a, **k))
    record = {"meaning": "x"}
    list(stream.predictions(loaded, [record], "here", silent))
    assert seen == [torch.bfloat16]


def test_eval_has_the_numbers_that_training_saw(run):
    best = read_json(run.summary)["best"]["validation"]
    heard = []
    found = saved.evaluate(saved.load_saved(run.path), tell=heard.append)
    for name in ("loss", "perplexity", "token_accuracy"):
        assert found.metrics()[name] == pytest.approx(best[name], rel=1e-5)
    assert any(isinstance(event, Notice) and "prompts; BLEU is sacrebleu's nrefs:3" in event.text for event in heard)
    silent_eval = saved.evaluate(saved.load_saved(run.path, overrides=["generation.metrics=[]"]))
    assert set(silent_eval.metrics()) == {"loss", "perplexity", "token_accuracy"}


def test_the_merged_model_writes_what_the_adapted_one_does(run, tmp_path):
    from transformers import AutoModelForCausalLM

    from hkft.merging.merge import merge

    merge(run.path, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    loaded = saved.load_saved(run.path)
    tokens = torch.tensor([loaded.tokenizer("name: Bani ->")["input_ids"]])
    with torch.no_grad():
        torch.testing.assert_close(merged(tokens).logits, loaded.model(tokens).logits, rtol=1e-3, atol=1e-3)


def test_prompts_are_numbered_without_an_array_as_wide_as_the_longest():
    prompts = ["b", "\U0001f600", "a", "b", "\uffff", "", "a" * 10_000_000] * 3
    ids, numbers = list(range(len(prompts))), np.ones(len(prompts), np.int64)
    seen = completions.Completions(ids, prompts, prompts, numbers.astype(float), numbers, numbers)
    tracemalloc.start()
    groups = seen.groups
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert groups.tolist() == [3, 5, 1, 3, 4, 0, 2] * 3  # in the order of the prompts, as np.unique numbers them
    assert most < 1_000_000
