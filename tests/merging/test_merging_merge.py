"""The merged folder is the adapted model: the same outputs in plain transformers, head and settings included."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, TaskType
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from hkft.errors import SetupError, UsageError
from hkft.evaluation.saved import load_saved
from hkft.events import Event, Notice, Stage
from hkft.folder import read_json
from hkft.merging import loading
from hkft.merging.merge import merge

TEXT = "the film was not very good"

PLAIN = """
import sys
class NotInstalled:
    finders = list(sys.meta_path)
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("hkft", "peft"):
            return None
        return next(filter(None, (finder.find_spec(name, path, target) for finder in self.finders)), None)
    def find_distributions(self, context):
        if context.name in ("hkft", "peft"):
            return
        for finder in self.finders:
            if hasattr(finder, "find_distributions"):
                yield from finder.find_distributions(context)
sys.meta_path[:] = [NotInstalled()]
for name in ("hkft", "peft"):
    try:
        __import__(name)
    except ImportError:
        continue
    raise SystemExit(f"{name} could be imported")
import json, torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer
folder, text = sys.argv[1:]
model = AutoModelForSequenceClassification.from_pretrained(folder)
with torch.no_grad():
    logits = model(**AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt")).logits
print(json.dumps({"logits": logits.tolist(), "labels": model.config.id2label, "training": model.training}))
"""


def outputs(model: Any, folder: Path, text: str = TEXT) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**AutoTokenizer.from_pretrained(str(folder))(text, return_tensors="pt")).logits


def adapted(base: Path, adapter: Path, labels: int = 3) -> Any:
    model = AutoModelForSequenceClassification.from_pretrained(str(base), num_labels=labels, dtype=torch.float32)
    return PeftModel.from_pretrained(model, str(adapter)).eval()


def opened(folder: Path) -> Any:
    return AutoModelForSequenceClassification.from_pretrained(str(folder))


@pytest.mark.parametrize("family", ["bert", "roberta", "llama"])
def test_merged_is_adapted(family: str, tmp_path: Path, tiny: Any) -> None:
    base = tiny.base(tmp_path / "base", family)
    adapter = tiny.adapter(tmp_path / "adapter", base)
    before = outputs(adapted(base, adapter), base)
    merged = merge(adapter, tmp_path / "out")
    after = outputs(opened(merged.path), merged.path)
    assert merged.path == tmp_path / "out"
    torch.testing.assert_close(after, before, atol=1e-4, rtol=1e-4)
    assert merged.verification is not None
    assert merged.verification["passed"]
    assert merged.verification["max_logit_difference"] < 1e-4
    assert merged.verification["adapter_effect"] > 0.1


@pytest.mark.parametrize("lora", [{"use_rslora": True}, {"use_dora": True}, {"target_modules": "all-linear", "r": 2}])
def test_kinds_of_lora(lora: dict[str, Any], tmp_path: Path, tiny: Any) -> None:
    base = tiny.base(tmp_path / "base")
    adapter = tiny.adapter(tmp_path / "adapter", base, **lora)
    before = outputs(adapted(base, adapter), base)
    folder = merge(adapter, tmp_path / "out").path
    torch.testing.assert_close(outputs(opened(folder), folder), before, atol=1e-4, rtol=1e-4)


def test_plain_transformers_opens_it(run: Path, tmp_path: Path) -> None:
    saved = load_saved(run)
    before = outputs(saved.model, run.parent / "base")
    folder = merge(run, tmp_path / "out").path
    done = subprocess.run(
        [sys.executable, "-c", PLAIN, str(folder), TEXT],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    torch.testing.assert_close(torch.tensor(said["logits"]), before, atol=1e-5, rtol=1e-5)
    assert said["labels"] == {"0": "fine", "1": "poor"}
    assert said["training"] is False


def test_a_run(run: Path, tmp_path: Path) -> None:
    merged = merge(run, tmp_path / "out", verify=True)
    record = merged.verification
    assert record is not None
    assert (record["on"], record["rows"], record["dtype"], merged.dtype) == ("validation", 10, "float32", "float32")
    assert record["agreement"] == 1.0
    assert abs(record["mean_kl"]) < 1e-9
    best = read_json(run / "summary.json")["best"]["validation"]
    assert record["metrics"]["adapted"]["loss"] == pytest.approx(best["loss"], abs=1e-5)
    assert record["metrics"]["merged"]["accuracy"] == best["accuracy"]
    assert record["metrics"]["difference"]["loss"] == pytest.approx(0.0, abs=1e-5)
    assert merged.bytes == sum(path.stat().st_size for path in merged.path.iterdir())
    assert merged.seconds > 0
    assert json.loads(json.dumps(merged.as_dict()))["path"] == str(tmp_path / "out")
    kept = read_json(merged.path / "merge.json")
    assert kept["verification"] == record
    assert (kept["source"], kept["checkpoint"], kept["base"]) == ("run", "best", "base")


def test_configuration_is_the_bases_own(run: Path, tmp_path: Path) -> None:
    folder = merge(run, tmp_path / "out", verify=False).path
    base, written = read_json(run.parent / "base" / "config.json"), read_json(folder / "config.json")
    assert written["hidden_dropout_prob"] == 0.15
    assert written["attention_probs_dropout_prob"] == 0.05
    assert written["id2label"] == {"0": "fine", "1": "poor"}
    assert written["label2id"] == {"fine": 0, "poor": 1}
    assert written["problem_type"] == "single_label_classification"
    assert written["architectures"] == ["BertForSequenceClassification"]
    changed = {"architectures", "id2label", "label2id", "problem_type"}
    assert {key: value for key, value in written.items() if key not in changed} == {
        key: value for key, value in base.items() if key not in changed
    }
    assert "hkft" not in (folder / "config.json").read_text(encoding="utf-8")


def test_files(run: Path, tmp_path: Path) -> None:
    folder = merge(run, tmp_path / "out", verify=False).path
    assert {path.name for path in folder.iterdir()} == {
        "README.md",
        "chat_template.jinja",
        "config.json",
        "merge.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    inner = read_json(folder / "tokenizer.json")
    assert inner["truncation"] is None, "what the tokenizer was used for must not be written with it"
    assert inner["padding"] is None
    assert (folder / "chat_template.jinja").read_text(encoding="utf-8").startswith("{% for message")
    modes = {path.stat().st_mode for path in folder.iterdir()}
    assert len(modes) == 1, "safetensors alone would be unreadable for others"


def test_trained_head_survives(tmp_path: Path, tiny: Any) -> None:
    adapter = tiny.adapter(tmp_path / "adapter", tiny.base(tmp_path / "base", "roberta"), labels=5)
    folder = merge(adapter, tmp_path / "out").path
    trained, written = load_file(adapter / "adapter_model.safetensors"), load_file(folder / "model.safetensors")
    heads = {name.removeprefix("base_model.model."): value for name, value in trained.items() if "classifier" in name}
    assert set(heads) == {f"classifier.{part}.{kind}" for part in ("dense", "out_proj") for kind in ("weight", "bias")}
    for name, value in heads.items():
        assert torch.equal(written[name], value), name
    assert opened(folder).config.num_labels == 5


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_dtype_is_rounded_once(dtype: str, adapter: Path, tmp_path: Path) -> None:
    exact = adapted(tmp_path / "base", adapter).merge_and_unload().state_dict()
    merged = merge(adapter, tmp_path / "out", dtype=dtype)
    written = load_file(merged.path / "model.safetensors")
    kind = getattr(torch, dtype)
    assert merged.dtype == dtype
    assert {value.dtype for value in written.values()} == {kind}
    name = "bert.encoder.layer.0.attention.self.query.weight"
    torch.testing.assert_close(written[name], exact[name].to(kind), atol=1e-6, rtol=0)
    assert read_json(merged.path / "config.json")["dtype"] == dtype
    assert opened(merged.path).dtype == kind


def test_dtype_of_the_bases_files(tmp_path: Path, tiny: Any) -> None:
    base = tiny.base(tmp_path / "base", dtype=torch.bfloat16)
    adapter = tiny.adapter(tmp_path / "adapter", base)
    before = outputs(adapted(base, adapter), base)
    merged = merge(adapter, tmp_path / "out")
    assert merged.dtype == "bfloat16"
    assert merged.verification is not None
    assert merged.verification["passed"]
    assert merged.verification["max_logit_difference"] > 1e-5, "rounding must show"
    after = outputs(opened(merged.path).float(), merged.path)
    torch.testing.assert_close(after, before, atol=merged.verification["tolerance"], rtol=0)


def test_dtype_of_files_whose_config_names_none(tmp_path: Path, tiny: Any) -> None:
    base = tiny.base(tmp_path / "base", dtype=torch.float16)
    config = read_json(base / "config.json")
    del config["dtype"]
    (base / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert merge(tiny.adapter(tmp_path / "adapter", base), tmp_path / "out").dtype == "float16"


def test_regression(regression_run: Path, tmp_path: Path) -> None:
    merged = merge(regression_run, tmp_path / "out")
    record = merged.verification
    assert record is not None
    assert record["passed"]
    assert record["mean_kl"] is None
    assert record["agreement"] is None
    assert set(record["metrics"]["difference"]) == {"loss", "pearson", "spearman", "mse"}
    config = opened(merged.path).config
    assert (config.num_labels, config.problem_type) == (1, "regression")


def test_last_checkpoint(run: Path, tmp_path: Path) -> None:
    merged = merge(run, tmp_path / "out", checkpoint="last")
    last = load_saved(run, checkpoint="last")
    torch.testing.assert_close(
        outputs(opened(merged.path), merged.path), outputs(last.model, merged.path), atol=1e-5, rtol=1e-5
    )
    assert read_json(merged.path / "merge.json")["checkpoint"] == "last"


def test_adapter_inside_a_run_belongs_to_it(run: Path, tmp_path: Path) -> None:
    merged = merge(run / "adapter", tmp_path / "out")
    assert merged.verification is not None
    assert merged.verification["on"] == "validation"
    assert opened(merged.path).config.id2label == {0: "fine", 1: "poor"}


def test_adapter_without_a_run(adapter: Path, tmp_path: Path) -> None:
    merged = merge(adapter, tmp_path / "out")
    record = merged.verification
    assert record is not None
    assert (record["on"], record["rows"], record["metrics"]) == ("fixed sentences", 32, None)
    assert record["agreement"] == 1.0
    assert "None" not in (merged.path / "README.md").read_text(encoding="utf-8")


def test_adapter_with_a_recipe(run: Path, tmp_path: Path) -> None:
    alone = shutil.copytree(run / "adapter", tmp_path / "alone")
    merged = merge(alone, tmp_path / "out", recipe=run.parent / "small.yaml", overrides=["model.native_dropout=0.3"])
    assert merged.verification is not None
    assert merged.verification["on"] == "validation"
    assert opened(merged.path).config.id2label == {0: "fine", 1: "poor"}
    assert opened(merged.path).config.hidden_dropout_prob == 0.15


def test_language_model(tmp_path: Path, tiny: Any) -> None:
    base = tiny.base(tmp_path / "base", "llama")
    adapter = tiny.adapter(tmp_path / "adapter", base, TaskType.CAUSAL_LM)
    before = outputs(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(str(base)), str(adapter)), base)
    merged = merge(adapter, tmp_path / "out")
    after = outputs(AutoModelForCausalLM.from_pretrained(str(merged.path)), merged.path)
    torch.testing.assert_close(after, before, atol=1e-4, rtol=1e-4)
    assert (merged.path / "generation_config.json").exists()
    assert (merged.path / "chat_template.jinja").exists()
    assert "AutoModelForCausalLM" in (merged.path / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("kind", ["4bit", "8bit"])
def test_quantised_run_goes_onto_either_base_and_both_are_told(kind: str, run: Path, tmp_path: Path) -> None:
    heard: list[Event] = []
    overrides = [f"model.quantization={kind}"]
    full = merge(run, tmp_path / "full", overrides=overrides, tell=heard.append)
    text = next(e.text for e in heard if isinstance(e, Notice) and kind in e.text)
    assert text.startswith(f"trained on a {kind} base, merged onto the full-precision one: nothing is quantised again")
    own = merge(run, tmp_path / "own", overrides=overrides, base="dequantised")
    trained = load_saved(run, overrides=[*overrides, "model.native_dropout=keep"])
    said = outputs(trained.model, own.path)
    for merged in (full, own):
        assert "quantization_config" not in read_json(merged.path / "config.json")
        assert merged.dtype == "float32"
        assert merged.streamed
        assert merged.verification is not None
        assert merged.verification["passed"]
        assert merged.bases is not None
        assert read_json(merged.path / "merge.json")["base_weights"] == merged.base
        told = merged.bases[merged.base]["max_logit_difference"]
        assert told == pytest.approx(full.bases[merged.base]["max_logit_difference"], rel=1e-3)  # type: ignore[index]
    further, nearer = (float((outputs(opened(one.path), one.path) - said).abs().max()) for one in (full, own))
    # 8-bit layers round what comes in, too, and by more than their weights: no weights have that, and which base is nearer
    # is chance; 4-bit ones round their weights alone
    closer = {"4bit": 0.2, "8bit": 4.0}[kind]
    assert nearer < closer * further
    told = {name: record["max_logit_difference"] for name, record in full.bases.items()}  # type: ignore[union-attr]
    assert told["dequantised"] < closer * told["full"]


def test_an_average_of_quantised_runs(run: Path, tmp_path: Path) -> None:
    runs, overrides = [run, run / "checkpoints" / "checkpoint-2"], ["model.quantization=4bit"]
    merged = merge(runs, tmp_path / "out", base="dequantised", overrides=overrides)
    assert merged.verification is not None
    assert merged.verification["passed"]
    assert merged.bases is None  # nobody has trained it


def test_a_base_that_is_none(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no base 'ful'"):
        merge(run, tmp_path / "out", base="ful")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="it was trained on full-precision weights"):
        merge(run, tmp_path / "out", base="dequantised")


def test_quantised_files_are_refused(tmp_path: Path, adapter: Path) -> None:
    config = read_json(tmp_path / "base" / "config.json")
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (tmp_path / "base" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(SetupError, match="quantised already: an adapter is merged onto full-precision weights"):
        merge(adapter, tmp_path / "out")


def test_stages(run: Path, tmp_path: Path) -> None:
    heard: list[Event] = []
    merge(run, tmp_path / "out", tell=heard.append)
    texts = [event.text for event in heard if isinstance(event, Stage)]
    order = [f"loading {run.parent / 'base'}", "merging"]
    assert [texts.index(text) for text in order] == sorted(texts.index(text) for text in order)
    last = [event for event in heard if isinstance(event, Stage)][-1]
    assert (last.text, last.done, last.total) == ("verifying", 10, 10)


def test_data_that_is_gone(run: Path, tmp_path: Path) -> None:
    heard: list[Event] = []
    gone = tmp_path / "gone.csv"
    merged = merge(run, tmp_path / "out", overrides=[f"data.train={gone}"], tell=heard.append)
    assert merged.verification is not None
    assert merged.verification["on"] == "fixed sentences"
    assert any(isinstance(e, Notice) and e.text.startswith("no validation rows to verify with (") for e in heard)


def test_a_blind_check_says_so(tmp_path: Path, tiny: Any) -> None:
    heard: list[Event] = []
    adapter = tiny.adapter(tmp_path / "adapter", tiny.base(tmp_path / "base", "llama"), TaskType.CAUSAL_LM)
    weights = load_file(adapter / "adapter_model.safetensors")
    small = {name: value * (1e-9 if "lora_B" in name else 1.0) for name, value in weights.items()}
    save_file(small, adapter / "adapter_model.safetensors")
    merge(adapter, tmp_path / "out", tell=heard.append)
    assert any(
        isinstance(e, Notice) and e.text.endswith("it would have missed an adapter that was not merged") for e in heard
    )


def test_card(run: Path, tmp_path: Path) -> None:
    text = (merge(run, tmp_path / "out").path / "README.md").read_text(encoding="utf-8")
    best = read_json(run / "summary.json")["best"]["validation"]
    assert text.startswith("---\nlibrary_name: transformers\npipeline_tag: text-classification\n")
    for line in (
        "# out",
        "`base`, fine-tuned with LoRA and the dropout method `hiddenkey-`",
        "| Recipe | `small`, seed 1 |",
        "| Training data | `rows.csv` |",
        "| Labels | fine, poor |",
        f"| loss | {best['loss']:.4f} |",
        "Compared with the base model and its adapter on 10 rows (validation)",
    ):
        assert line in text
    assert str(run.parent) not in text, "a local path is no business of whoever gets the folder"
    unchecked = merge(run, tmp_path / "unchecked", verify=False)
    assert unchecked.verification is None
    assert "Not compared with the adapted model." in (unchecked.path / "README.md").read_text(encoding="utf-8")


def test_overrides_without_a_recipe(adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--set changes a recipe, and this adapter has none") as caught:
        merge(adapter, tmp_path / "out", overrides=["seed=2"])
    assert caught.value.problems[0].hint == "--recipe names one"


def test_base_that_is_not_there(adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "base").rename(tmp_path / "elsewhere")
    with pytest.raises(SetupError, match="the adapter's base model could not be loaded") as caught:
        merge(adapter, tmp_path / "out")
    assert str(tmp_path / "base") in str(caught.value.problems[0].hint)
    assert not (tmp_path / "out").exists()


def test_pickled_weights_are_not_opened(adapter: Path, run: Path, tmp_path: Path) -> None:
    """Not the base's, not the adapter's, with a recipe or without."""
    base = tmp_path / "base"
    torch.save(load_file(adapter / "adapter_model.safetensors"), adapter / "adapter_model.bin")
    (adapter / "adapter_model.safetensors").unlink()
    for how in ({}, {"recipe": run.parent / "small.yaml"}):
        with pytest.raises(SetupError, match="opening a pickle runs the code in it") as caught:
            merge(adapter, tmp_path / "out", **how)
        assert caught.value.problems[0].found == "adapter_model.bin"
    torch.save(load_file(base / "model.safetensors"), base / "pytorch_model.bin")
    (base / "model.safetensors").unlink()
    with pytest.raises(SetupError, match="opening a pickle runs the code in it") as caught:
        merge(run, tmp_path / "out", overrides=[f"model.name={base}"])
    assert caught.value.problems[0].where == str(base)
    assert not (tmp_path / "out").exists()


def test_adapter_without_its_head(adapter: Path, tmp_path: Path) -> None:
    weights = load_file(adapter / "adapter_model.safetensors")
    save_file({k: v for k, v in weights.items() if "classifier" not in k}, adapter / "adapter_model.safetensors")
    with pytest.raises(SetupError, match="the adapter does not fit the base model") as caught:
        merge(adapter, tmp_path / "out")
    assert "no base_model.model.classifier.weight" in str(caught.value.problems[0].found)


def test_unknown_task(adapter: Path, tmp_path: Path) -> None:
    config = read_json(adapter / "adapter_config.json") | {"task_type": None}
    (adapter / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(UsageError, match="adapters of this task cannot be merged"):
        merge(adapter, tmp_path / "out")


def test_unknown_dtype(adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="a merged model cannot be bfloat61") as caught:
        merge(adapter, tmp_path / "out", dtype="bfloat61")
    assert caught.value.problems[0].hint == "did you mean 'bfloat16'?"


def test_several_adapters_are_averaged_as_products(tmp_path: Path, tiny: Any) -> None:
    base = tiny.base(tmp_path / "base")
    one, other = (tiny.adapter(tmp_path / name, base) for name in ("one", "other"))
    weights = load_file(other / "adapter_model.safetensors")
    save_file({name: value.flip(0) for name, value in weights.items()}, other / "adapter_model.safetensors")
    for shares in (None, [0.25, 0.75]):
        w, v = shares or (0.5, 0.5)
        merged = merge([one, other], tmp_path / "out", weights=shares, force=True)
        a, b = (adapted(base, each).merge_and_unload().state_dict() for each in (one, other))
        written = load_file(merged.path / "model.safetensors")
        assert set(written) == set(a)
        for name, value in written.items():
            torch.testing.assert_close(value, w * a[name] + v * b[name], atol=1e-5, rtol=1e-5)
        assert merged.verification is not None
        assert merged.verification["passed"]
        assert merged.verification["adapter_effect"] > 0.1
    record = read_json(tmp_path / "out" / "merge.json")
    assert (record["source"], record["weights"]) == (["one", "other"], [0.25, 0.75])
    assert "| Average of | `one`, `other` |" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")


def test_adapters_that_have_no_average(tmp_path: Path, tiny: Any, run: Path) -> None:
    base = tiny.base(tmp_path / "base")
    one, two = tiny.adapter(tmp_path / "one", base), tiny.adapter(tmp_path / "two", base, labels=2)
    with pytest.raises(UsageError, match="adapters of different tasks or labels cannot be averaged"):
        merge([one, two], tmp_path / "out")
    with pytest.raises(UsageError, match="adapters of different bases cannot be averaged"):
        merge([one, run], tmp_path / "out")
    for weights in ([0.5], [0.5, 0.6]):
        with pytest.raises(UsageError, match="as many as its adapters, and add up to 1"):
            merge([one, one], tmp_path / "out", weights=weights)
    assert not (tmp_path / "out").exists()


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_tied_weights_of_which_one_is_adapted_are_untied(target: str, tmp_path: Path, tiny: Any) -> None:
    base = tiny.base(tmp_path / "base", "llama", tie_word_embeddings=True)
    adapter = tiny.adapter(tmp_path / "adapter", base, TaskType.CAUSAL_LM, target_modules=["q_proj", target])
    before = outputs(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(str(base)), str(adapter)), base)
    merged = merge(adapter, tmp_path / "out")
    config = read_json(merged.path / "config.json")
    assert (config["tie_word_embeddings"], merged.streamed) == (False, True)
    after = outputs(AutoModelForCausalLM.from_pretrained(str(merged.path)), merged.path)
    torch.testing.assert_close(after, before, atol=1e-4, rtol=1e-4)


def test_tied_weights_that_no_adapter_touches_stay_tied(tmp_path: Path, tiny: Any) -> None:
    base = tiny.base(tmp_path / "base", "llama", tie_word_embeddings=True)
    merged = merge(tiny.adapter(tmp_path / "adapter", base, TaskType.CAUSAL_LM), tmp_path / "out")
    assert read_json(merged.path / "config.json")["tie_word_embeddings"] is True
    assert "lm_head.weight" not in load_file(merged.path / "model.safetensors")


def test_without_a_check_no_model_is_loaded(adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "load", lambda *_: pytest.fail("the base was loaded"))
    merged = merge(adapter, tmp_path / "out", verify=False)
    assert merged.streamed
    assert outputs(opened(merged.path), merged.path).shape == (1, 3)


def test_what_cannot_be_streamed_is_merged_in_memory_and_said(tmp_path: Path, tiny: Any) -> None:
    heard: list[Event] = []
    adapter = tiny.adapter(tmp_path / "adapter", tiny.base(tmp_path / "base"), init_lora_weights="pissa")
    merged = merge(adapter, tmp_path / "out", tell=heard.append)
    assert not merged.streamed
    assert any(
        isinstance(e, Notice) and e.text.startswith("merged with the whole model in memory: its init_lora_weights")
        for e in heard
    )
