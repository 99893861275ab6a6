"""The streamed merge is PEFT's merge: the same numbers, in files that transformers opens, without the model in memory."""

from __future__ import annotations

import copy
import json
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForPreTraining,
    BertModel,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    RobertaConfig,
)

from hkft.errors import DivergedError, SetupError, UsageError
from hkft.events import Event, Stage
from hkft.merging import shards, streaming
from hkft.merging.shards import ShardWriter
from hkft.merging.streaming import CannotStream, plan

SIZE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 40,
    "pad_token_id": 0,
}
SPECIAL = {"bos_token_id": 2, "eos_token_id": 3}
CONFIGS: dict[str, Callable[[], Any]] = {
    "bert": lambda: BertConfig(**SIZE, num_labels=3),
    "roberta": lambda: RobertaConfig(**SIZE, **SPECIAL, num_labels=3),
    "llama": lambda: LlamaConfig(**SIZE, **SPECIAL, num_key_value_heads=2, attention_bias=True),
    "tied": lambda: LlamaConfig(**SIZE, **SPECIAL, num_key_value_heads=2, tie_word_embeddings=True),
    "gpt2": lambda: GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=40, **SPECIAL),
}
QUERY = {"bert": ["query", "value"], "roberta": ["query", "value"], "gpt2": ["c_attn", "c_proj"]}
DECODER = ["q_proj", "down_proj"]


def opens_of(family: str) -> Any:
    return AutoModelForSequenceClassification if family in ("bert", "roberta") else AutoModelForCausalLM


def shaken(model: Any) -> Any:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def save_base(folder: Path, family: str, dtype: torch.dtype = torch.float32, opens: Any = None, seed: int = 1) -> Path:
    """A random model in several files."""
    torch.manual_seed(seed)
    config = CONFIGS[family]()
    model = opens(config) if opens else opens_of(family).from_config(config)
    shaken(model).to(dtype).save_pretrained(str(folder), max_shard_size="20KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    return folder


def loaded(base: Path, family: str) -> Any:
    return opens_of(family).from_pretrained(str(base), dtype=torch.float32, num_labels=CONFIGS[family]().num_labels)


def save_adapter(folder: Path, base: Path, family: str, seed: int = 2, **lora: Any) -> Path:
    """An adapter all of whose own numbers are random, as training would leave them."""
    task = "SEQ_CLS" if family in ("bert", "roberta") else "CAUSAL_LM"
    fields = {"r": 4, "lora_alpha": 8, "target_modules": QUERY.get(family, DECODER), "task_type": task, **lora}
    torch.manual_seed(seed)
    wrapped = get_peft_model(loaded(base, family), LoraConfig(**fields))
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    wrapped.save_pretrained(str(folder))
    return folder


def merged_by_peft(base: Path, adapter: Path, family: str) -> Any:
    return PeftModel.from_pretrained(loaded(base, family), str(adapter)).merge_and_unload(safe_merge=True)


def streamed(
    base: Path,
    adapters: Mapping[Path, float],
    family: str,
    out: Path,
    dtype: torch.dtype = torch.float32,
    most: float = 5e9,
    **more: Any,
) -> Any:
    """Merge, write the configuration, and let transformers open the folder and say that nothing was amiss."""
    config = CONFIGS[family]()
    ready = plan(base, list(adapters.items()), opens_of(family), config, dtype, **more)
    out.mkdir()
    ready.write(out, max_shard_size=most)
    assert ready.bytes == sum(one.bytes for one in shards.checkpoint(out).values())
    if ready.unties:
        config.tie_word_embeddings = False
    config.save_pretrained(str(out))
    model, said = opens_of(family).from_pretrained(str(out), dtype="auto", output_loading_info=True)
    assert not any(said.values()), said
    assert model.dtype == dtype
    return model


def same(found: Any, expected: Any, tolerance: float = 1e-6) -> None:
    found, expected = found.state_dict(), expected.state_dict()
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], atol=tolerance, rtol=tolerance, msg=name)


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("bert", {}),
    "bert rslora": ("bert", {"use_rslora": True}),
    "bert dora": ("bert", {"use_dora": True}),
    "bert every linear layer": ("bert", {"target_modules": "all-linear"}),
    "bert patterns": ("bert", {"rank_pattern": {"layer.1.*query": 2}, "alpha_pattern": {"value": 32}}),
    "bert one layer": ("bert", {"layers_to_transform": [1], "layers_pattern": "layer"}),
    "bert bias all": ("bert", {"bias": "all"}),
    "bert bias lora_only": ("bert", {"bias": "lora_only"}),
    "bert embeddings": ("bert", {"target_modules": ["word_embeddings", "query"]}),
    "bert embeddings dora": ("bert", {"target_modules": ["word_embeddings"], "use_dora": True}),
    "roberta": ("roberta", {"target_modules": ["query", "dense"]}),
    "llama": ("llama", {}),
    "llama head saved": ("llama", {"modules_to_save": ["lm_head"]}),
    "llama head adapted": ("llama", {"target_modules": ["lm_head", "q_proj"]}),
    "llama norm saved": ("llama", {"modules_to_save": ["norm"]}),
    "llama embeddings": ("llama", {"target_modules": ["embed_tokens"]}),
    "tied": ("tied", {}),
    "gpt2": ("gpt2", {"fan_in_fan_out": True}),
    "gpt2 dora": ("gpt2", {"fan_in_fan_out": True, "use_dora": True}),
}


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")
@pytest.mark.parametrize("case", CASES)
def test_equals_pefts_merge(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "BLOCK", 200)  # several blocks of rows a tensor, the last a smaller one
    monkeypatch.setattr(shards, "CHUNK", 1000)
    family, lora = CASES[case]
    base = save_base(tmp_path / "base", family)
    adapter = save_adapter(tmp_path / "adapter", base, family, **lora)
    same(streamed(base, {adapter: 1.0}, family, tmp_path / "out"), merged_by_peft(base, adapter, family))


@pytest.mark.parametrize("opens", [BertModel, BertForPreTraining])
def test_base_with_another_head(opens: Any, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "bert", opens=opens)
    adapter = save_adapter(tmp_path / "adapter", base, "bert")
    same(streamed(base, {adapter: 1.0}, "bert", tmp_path / "out"), merged_by_peft(base, adapter, "bert"))


def test_names_of_old_files(tmp_path: Path) -> None:
    """transformers renames them when it loads, and so do we."""
    base = save_base(tmp_path / "base", "bert")
    adapter = save_adapter(tmp_path / "adapter", base, "bert")
    expected = merged_by_peft(base, adapter, "bert")
    for path in base.glob("*.safetensors"):
        old = {n.replace("LayerNorm.weight", "LayerNorm.gamma"): value for n, value in load_file(path).items()}
        save_file(old, path, {"format": "pt"})
    index = base / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("LayerNorm.weight", "LayerNorm.gamma"))
    same(streamed(base, {adapter: 1.0}, "bert", tmp_path / "out"), expected)


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")
@pytest.mark.filterwarnings("ignore:Model (has|with) `tie_word_embeddings:UserWarning")
@pytest.mark.parametrize(
    "lora",
    [
        {"modules_to_save": ["embed_tokens"]},
        {"modules_to_save": ["lm_head"]},
        {"target_modules": ["embed_tokens", "q_proj"]},
        {"target_modules": ["lm_head"]},
    ],
    ids=str,
)
def test_tied_embeddings_come_apart(lora: dict[str, Any], tmp_path: Path) -> None:
    """What the merged model computes is what the adapted one does, which PEFT's own merge of tied layers misses."""
    base = save_base(tmp_path / "base", "tied")
    adapter = save_adapter(tmp_path / "adapter", base, "tied", **lora)
    adapted = PeftModel.from_pretrained(loaded(base, "tied"), str(adapter)).eval()
    model = streamed(base, {adapter: 1.0}, "tied", tmp_path / "out")
    assert model.config.tie_word_embeddings is False
    rows = torch.randint(4, 60, (2, 9))
    with torch.no_grad():
        torch.testing.assert_close(model(rows).logits, adapted(rows).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_rounded_once(dtype: torch.dtype, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "llama", torch.bfloat16)
    adapter = save_adapter(tmp_path / "adapter", base, "llama")
    exact = merged_by_peft(base, adapter, "llama").state_dict()
    found = streamed(base, {adapter: 1.0}, "llama", tmp_path / "out", dtype).state_dict()
    for name, value in exact.items():
        assert torch.equal(found[name], value.to(dtype)), name


def test_what_no_adapter_touches_stays_bit_for_bit(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "llama", torch.bfloat16)
    adapter = save_adapter(tmp_path / "adapter", base, "llama", target_modules=["q_proj"])
    streamed(base, {adapter: 1.0}, "llama", tmp_path / "out", torch.bfloat16)
    before, after = shards.checkpoint(base), shards.checkpoint(tmp_path / "out")
    assert before.keys() == after.keys()
    for name, stored in before.items():
        equal = b"".join(map(bytes, stored.chunks())) == b"".join(map(bytes, after[name].chunks()))
        assert equal == ("q_proj.weight" not in name), name


@pytest.mark.parametrize("other", [{"use_rslora": True}, {"use_dora": True}, {"alpha_pattern": {"query": 40}}], ids=str)
def test_soup_is_the_mean_of_products(other: dict[str, Any], tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "bert")
    weights = {0.25: ("one", {}), 0.75: ("two", {"r": 2, "target_modules": ["query"], **other})}
    adapters = {
        save_adapter(tmp_path / name, base, "bert", seed=len(name) + n, **lora): weight
        for n, (weight, (name, lora)) in enumerate(weights.items())
    }
    found = streamed(base, adapters, "bert", tmp_path / "out").state_dict()
    plain = loaded(base, "bert").state_dict()
    expected = {name: torch.zeros_like(value) for name, value in plain.items()}
    for adapter, weight in adapters.items():
        for name, value in merged_by_peft(base, adapter, "bert").state_dict().items():
            expected[name] = expected[name] + weight * value
    for name, value in expected.items():
        torch.testing.assert_close(found[name].double(), value.double(), atol=2e-6, rtol=2e-6, msg=name)
    query = "bert.encoder.layer.0.attention.self.query.weight"
    assert (found[query] - plain[query]).abs().max() > 0.1


def test_weights_that_are_no_mean(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "bert")
    adapter = save_adapter(tmp_path / "adapter", base, "bert")
    with pytest.raises(UsageError, match="classifier.* of their own, and a mean of these is needed") as caught:
        plan(base, [(adapter, 1.0), (adapter, 1.0)], opens_of("bert"), CONFIGS["bert"](), torch.float32)
    assert (caught.value.problems[0].found, caught.value.problems[0].allowed) == ("a sum of 2", "a sum of 1")


def test_weights_of_a_sum(tmp_path: Path) -> None:
    """Without anything saved whole, any weights do: 0 is the base."""
    base = save_base(tmp_path / "base", "llama")
    adapter = save_adapter(tmp_path / "adapter", base, "llama")
    same(streamed(base, {adapter: 0.0}, "llama", tmp_path / "out"), loaded(base, "llama"))


def test_held_base(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "llama", torch.bfloat16)
    adapter = save_adapter(tmp_path / "adapter", base, "llama")
    seen = {}

    def held(name: str, tensor: Tensor) -> Tensor:
        seen[name] = tensor.dtype
        return (tensor.float() * 4).round() / 4

    model = loaded(base, "llama")
    expected = PeftModel.from_pretrained(copy.deepcopy(model), str(adapter))
    with torch.no_grad():
        for name, parameter in expected.named_parameters():
            if "lora_" not in name:
                parameter.copy_((parameter * 4).round() / 4)
    same(
        streamed(base, {adapter: 1.0}, "llama", tmp_path / "out", held=held), expected.merge_and_unload(safe_merge=True)
    )
    assert seen == dict.fromkeys(model.state_dict(), torch.bfloat16)


def test_several_files(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "tied")
    adapter = save_adapter(tmp_path / "adapter", base, "tied")
    one = streamed(base, {adapter: 1.0}, "tied", tmp_path / "one")
    several = streamed(base, {adapter: 1.0}, "tied", tmp_path / "several", most=20_000)
    same(several, one, 0.0)
    assert [path.name for path in (tmp_path / "one").glob("*.safetensors")] == ["model.safetensors"]
    index = json.loads((tmp_path / "several" / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in (tmp_path / "several").glob("*.safetensors"))
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    assert sorted(set(index["weight_map"].values())) == files
    assert "lm_head.weight" not in index["weight_map"]
    total = sum(value.numel() * value.itemsize for value in load_file(tmp_path / "one" / "model.safetensors").values())
    assert index["metadata"]["total_size"] == total
    modes = {path.stat().st_mode for path in (tmp_path / "several").iterdir()}
    assert modes == {(tmp_path / "several" / "config.json").stat().st_mode}


def test_progress(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "llama")
    adapter = save_adapter(tmp_path / "adapter", base, "llama")
    heard: list[Event] = []
    ready = plan(base, [(adapter, 1.0)], opens_of("llama"), CONFIGS["llama"](), torch.float32)
    (tmp_path / "out").mkdir()
    ready.write(tmp_path / "out", heard.append)
    assert heard[-1] == Stage("merging", len(ready.items), len(ready.items))
    assert len(heard) == len(ready.items)


def test_memory_is_that_of_a_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every byte that PyTorch's allocator gives, by its own record: no more than a few tensors' at any time."""
    size = {"vocab_size": 400, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 24}
    monkeypatch.setitem(CONFIGS, "llama", lambda: LlamaConfig(**SIZE | size))
    base = save_base(tmp_path / "base", "llama")
    adapter = save_adapter(tmp_path / "adapter", base, "llama")
    sizes = [one.bytes for one in shards.checkpoint(base).values()]
    assert sum(sizes) > 55e6
    (tmp_path / "out").mkdir()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        ready = plan(base, [(adapter, 1.0)], opens_of("llama"), CONFIGS["llama"](), torch.float32)
        ready.write(tmp_path / "out")
    profiler.export_chrome_trace(str(tmp_path / "trace.json"))
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    changes = [one["args"] for one in sorted(events, key=lambda e: e.get("ts", 0)) if one["name"] == "[memory]"]
    before = changes[0]["Total Allocated"] - changes[0]["Bytes"]
    most = max(one["Total Allocated"] for one in changes) - before
    assert max(sizes) <= most < 4 * max(sizes) < sum(sizes) / 20


@pytest.mark.parametrize("kind", ["bfloat16 beside int64", "a scalar", "nothing at all", "bool"])
def test_writer(kind: str, tmp_path: Path) -> None:
    tensors = {
        "bfloat16 beside int64": {"a": torch.randn(3).bfloat16(), "b": torch.arange(5), "c": torch.randn(2, 2)},
        "a scalar": {"a": torch.tensor(3.5)},
        "nothing at all": {"a": torch.zeros(0, 4), "b": torch.randn(4, 6).T},
        "bool": {"a": torch.tensor([True, False, True])},
    }[kind]
    with ShardWriter(tmp_path, {name: (one.dtype, tuple(one.shape)) for name, one in tensors.items()}) as writer:
        for name in reversed(tensors):
            writer.write(name, tensors[name])
    path = tmp_path / "model.safetensors"
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert {name: file.get_tensor(name).tolist() for name in tensors} == {n: t.tolist() for n, t in tensors.items()}
    assert struct.unpack("<Q", path.read_bytes()[:8])[0] % 8 == 0
    for name, stored in shards.header(path).items():
        assert torch.equal(stored.read(), tensors[name])
        assert stored.start % tensors[name].itemsize == 0


def test_writer_knows_what_is_missing(tmp_path: Path) -> None:
    with (
        pytest.raises(AssertionError, match="never written: .'a'"),
        ShardWriter(tmp_path, {"a": (torch.float32, (2,))}),
    ):
        pass


def ready(tmp_path: Path, family: str = "bert", **lora: Any) -> tuple[Path, Path, Callable[[], Any]]:
    """A base, an adapter, and what plans their merge."""
    base = save_base(tmp_path / "base", family)
    adapter = save_adapter(tmp_path / "adapter", base, family, **lora)
    return base, adapter, lambda: plan(base, [(adapter, 1.0)], opens_of(family), CONFIGS[family](), torch.float32)


@pytest.mark.parametrize(
    "name", ["../evil.safetensors", "/evil.safetensors", "a/../b.safetensors", "..", "a\\b", "c:x"]
)
def test_index_that_leads_away(name: str, tmp_path: Path) -> None:
    base, _, go = ready(tmp_path)
    path = base / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"][next(iter(index["weight_map"]))] = name
    path.write_text(json.dumps(index))
    with pytest.raises(SetupError, match="the index leads out of the model's folder") as caught:
        go()
    assert caught.value.problems[0].found == name


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": 1}}', '{"weight_map": 3}']
)
def test_index_that_is_damaged(text: str, tmp_path: Path) -> None:
    base, _, go = ready(tmp_path)
    (base / "model.safetensors.index.json").write_text(text)
    with pytest.raises(SetupError, match="the file is damaged or incomplete"):
        go()


def test_index_of_a_tensor_that_is_not_there(tmp_path: Path) -> None:
    base, _, go = ready(tmp_path)
    path = base / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["more"] = next(iter(index["weight_map"].values()))
    path.write_text(json.dumps(index))
    with pytest.raises(SetupError, match="damaged or incomplete") as caught:
        go()
    assert str(caught.value.problems[0].found).startswith("more is not in model-0")


@pytest.mark.parametrize("which", ["base", "adapter"])
def test_pickles_are_not_opened(which: str, tmp_path: Path) -> None:
    base, adapter, go = ready(tmp_path)
    folder, name = (base, "pytorch_model.bin") if which == "base" else (adapter, "adapter_model.bin")
    for path in [*folder.glob("*.safetensors"), *folder.glob("*.index.json")]:
        path.unlink()
    with pytest.raises(SetupError, match="there are no weights"):
        go()
    (folder / name).write_bytes(b"\x80\x04 whatever")
    with pytest.raises(SetupError, match="opening a pickle runs the code in it") as caught:
        go()
    problem = caught.value.problems[0]
    assert problem.found == name
    assert "save_pretrained, which writes safetensors" in str(problem.hint)


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
@pytest.mark.parametrize("which", ["base", "adapter"])
def test_damaged_files(which: str, keep: int, tmp_path: Path) -> None:
    base, adapter, go = ready(tmp_path)
    path = min((base if which == "base" else adapter).glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(SetupError, match="the file is damaged or incomplete") as caught:
        go()
    assert str(caught.value.problems[0].where) == str(path)


def test_file_that_is_gone(tmp_path: Path) -> None:
    base, _, go = ready(tmp_path)
    min(base.glob("*.safetensors")).unlink()
    with pytest.raises(SetupError, match="the file is damaged or incomplete"):
        go()


def test_file_that_shrinks_meanwhile(tmp_path: Path) -> None:
    base, _, go = ready(tmp_path)
    planned = go()
    path = min(base.glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-4])
    (tmp_path / "out").mkdir()
    with pytest.raises(SetupError, match="the file is damaged or incomplete"):
        planned.write(tmp_path / "out")


def changed(adapter: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = load_file(adapter / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, adapter / "adapter_model.safetensors")


A = "base_model.model.bert.encoder.layer.0.attention.self.query.lora_A.weight"
UNFIT: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "shape": (lambda t: t.update({A: torch.zeros(4, 31)}), f"{A} [4, 31], where [4, 32] fits"),
    "missing": (lambda t: t.pop(A), f"no {A}"),
    "no place": (
        lambda t: t.update({"elsewhere.lora_A.weight": t[A].clone()}),
        "elsewhere.lora_A.weight, which has no place",
    ),
    "head": (lambda t: t.pop("base_model.model.classifier.weight"), "no base_model.model.classifier.weight"),
}


@pytest.mark.parametrize("case", UNFIT)
def test_adapter_that_does_not_fit(case: str, tmp_path: Path) -> None:
    _, adapter, go = ready(tmp_path)
    change, text = UNFIT[case]
    changed(adapter, change)
    with pytest.raises(SetupError, match="the adapter does not fit the base model") as caught:
        go()
    assert text in str(caught.value.problems[0].found)


def test_adapter_of_other_layers(tmp_path: Path) -> None:
    _, adapter, go = ready(tmp_path)
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"target_modules": ["elsewhere"]}))
    with pytest.raises(SetupError, match="the adapter does not fit the base model"):
        go()


@pytest.mark.parametrize("text", [None, "{", '{"peft_type": "NO_SUCH"}'])
def test_adapter_without_a_configuration(text: str | None, tmp_path: Path) -> None:
    _, adapter, go = ready(tmp_path)
    path = adapter / "adapter_config.json"
    path.unlink() if text is None else path.write_text(text)
    with pytest.raises(SetupError, match="the adapter's configuration cannot be read"):
        go()


@pytest.mark.parametrize("part", ["lora_B", "classifier"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_none(part: str, value: float, tmp_path: Path) -> None:
    _, adapter, go = ready(tmp_path)
    changed(adapter, lambda tensors: [one.view(-1)[0].fill_(value) for name, one in tensors.items() if part in name])
    planned = go()
    (tmp_path / "out").mkdir()
    with pytest.raises(DivergedError, match="the adapter holds NaN or inf: there is nothing to merge"):
        planned.write(tmp_path / "out")


def test_only_lora_streams(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "llama")
    config = IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj"], feedforward_modules=[])
    get_peft_model(loaded(base, "llama"), config).save_pretrained(str(tmp_path / "adapter"))
    with pytest.raises(CannotStream, match="is .*IA3, not LoRA"):
        plan(base, [(tmp_path / "adapter", 1.0)], opens_of("llama"), CONFIGS["llama"](), torch.float32)


@pytest.mark.parametrize(
    "field", [{"init_lora_weights": "pissa"}, {"lora_bias": True}, {"target_parameters": ["weight"]}]
)
def test_settings_that_do_not_stream(field: dict[str, Any], tmp_path: Path) -> None:
    _, adapter, go = ready(tmp_path)
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | field))
    with pytest.raises(CannotStream, match=next(iter(field))):
        go()


def test_experts_that_transformers_fuses_do_not_stream(tmp_path: Path) -> None:
    torch.manual_seed(1)
    config = MixtralConfig(**SIZE, **SPECIAL, num_key_value_heads=2, num_local_experts=2)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(str(tmp_path / "base"))
    lora = LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    get_peft_model(model, lora).save_pretrained(str(tmp_path / "adapter"))
    with pytest.raises(CannotStream, match="transformers makes other tensors of"):
        plan(tmp_path / "base", [(tmp_path / "adapter", 1.0)], AutoModelForCausalLM, config, torch.float32)


def test_threads_are_given_back(tmp_path: Path) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    try:
        base = save_base(tmp_path / "base", "llama")
        adapter = save_adapter(tmp_path / "adapter", base, "llama")
        streamed(base, {adapter: 1.0}, "llama", tmp_path / "out")
        assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)


def test_base_that_lacks_a_tensor(tmp_path: Path) -> None:
    base, _, go = ready(tmp_path)
    path = base / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    del index["weight_map"]["bert.pooler.dense.bias"]
    path.write_text(json.dumps(index))
    with pytest.raises(
        CannotStream, match="neither the base model's files nor the adapter hold bert.pooler.dense.bias"
    ):
        go()


def test_base_of_another_size(tmp_path: Path) -> None:
    base, adapter, _ = ready(tmp_path)
    config = CONFIGS["bert"]()
    config.vocab_size = 65
    with pytest.raises(CannotStream, match="word_embeddings.weight is F32 .64, 32. in the files, and the model needs"):
        plan(base, [(adapter, 1.0)], opens_of("bert"), config, torch.float32)


def test_tied_tensors_that_differ(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "llama")
    adapter = save_adapter(tmp_path / "adapter", base, "llama")
    config = CONFIGS["llama"]()
    config.tie_word_embeddings = True
    with pytest.raises(CannotStream, match="are one tensor in the model, and several in the files"):
        plan(base, [(adapter, 1.0)], opens_of("llama"), config, torch.float32)


def test_big_end_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, _, go = ready(tmp_path)
    monkeypatch.setattr(streaming.sys, "byteorder", "big")
    with pytest.raises(CannotStream, match="this machine's numbers"):
        go()
