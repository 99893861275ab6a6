"""The laws on whole models: tiny random ones of every family, with the patterns and positions of the framework."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from scipy.stats import binom
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from hkft import METHODS, Method, Site, attach, attached
from hkft.dropout import masks

POSITIONS = ["attention_logits", "attention_weights", "hidden", "input", "output"]
ATTENTION = POSITIONS[:2]
PATTERNS = list(masks.PATTERNS)
PADDINGS = [None, "left", "right"]
DECODERS = {"gpt2", "llama", "gemma2"}


def backends(zoo: Any, family: str, position: str = "attention_logits") -> list[str]:
    """The attention backends to try: to the other positions it is all one."""
    if family in zoo.no_sdpa:
        return ["eager"]
    return ["sdpa", "eager"] if position in ATTENTION else ["sdpa"]


def paddings(position: str) -> list[str | None]:
    return PADDINGS if position in ATTENTION else ["left"]


def one(position: str, pattern: str, rate: float, **more: Any) -> Method:
    return Method([Site(position, pattern, rate=rate, layers="all", **more)])  # type: ignore[arg-type]


# --- law 3: inert in eval mode and at rate 0 --------------------------------------------------------------------------


@pytest.mark.parametrize("position", POSITIONS)
def test_law_3_eval_mode_is_bit_for_bit_inert(zoo: Any, family: str, position: str) -> None:
    for backend in backends(zoo, family, position):
        model, batch = zoo.build(family, backend=backend).eval(), zoo.inputs(family, padding="right", real=5)
        with torch.no_grad():
            bare = zoo.run(model, batch)
            for pattern in PATTERNS:
                with attach(model, one(position, pattern, 0.5)) as attachment:
                    assert torch.equal(zoo.run(model, batch), bare), (backend, pattern)
                    assert attachment.report()[0]["calls"] == 0
                    model.train()
                    assert not torch.equal(zoo.run(model, batch), bare), (backend, pattern)  # it can drop
                    model.eval()
                    assert torch.equal(zoo.run(model, batch), bare), (backend, pattern)
                assert torch.equal(zoo.run(model, batch), bare), (backend, pattern, "detached")


@pytest.mark.parametrize("position", POSITIONS)
def test_law_3_rate_0_in_train_mode_is_the_familys_own(zoo: Any, family: str, position: str) -> None:
    for backend in backends(zoo, family, position):
        model, batch = zoo.build(family, backend=backend), zoo.inputs(family, padding="left", real=5)
        with torch.no_grad():
            bare = zoo.run(model, batch)
            with attach(model, one(position, "column", 0)) as attachment:
                assert torch.equal(zoo.run(model, batch), bare)
                assert attachment.report()[0]["calls"] == 0


@pytest.mark.parametrize("position", ATTENTION)
def test_law_3_hkfts_own_path_that_drops_nothing_is_the_familys_too(zoo: Any, family: str, position: str) -> None:
    """Rate 1e-12: hkft computes all and drops nothing, so scale, groups, window, soft cap and mask are proven."""
    rescales = ["none"] if position == "attention_logits" else ["normalised", "inverse_keep"]
    for backend, padding in itertools.product(backends(zoo, family), PADDINGS):
        model, batch = zoo.build(family, backend=backend), zoo.inputs(family, padding=padding, real=5)
        real = batch["attention_mask"].bool() if "attention_mask" in batch else slice(None)
        with torch.no_grad():
            bare = zoo.run(model, batch)
            for pattern, rescale in itertools.product(PATTERNS, rescales):
                with attach(model, one(position, pattern, 1e-12, rescale=rescale)) as attachment:
                    out = zoo.run(model, batch)
                    assert attachment.report()[0]["measured"] == 0.0
                torch.testing.assert_close(out[real], bare[real], atol=2e-4, rtol=2e-4)


# --- law 4: causality -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("position", POSITIONS)
def test_law_4_a_token_never_changes_what_comes_before_it(zoo: Any, decoder: str, position: str) -> None:
    t = 7
    for backend, padding in itertools.product(backends(zoo, decoder, position), paddings(position)):
        model, batch = zoo.build(decoder, backend=backend), zoo.inputs(decoder, padding=padding, real=6)
        tokens = batch["input_ids"].clone()
        tokens[:, t] = (tokens[:, t] + 11) % 61 + 3
        changed = {**batch, "input_ids": tokens}
        for pattern in PATTERNS:
            with torch.no_grad(), attach(model, one(position, pattern, 0.5)):
                before, after = zoo.run(model, batch, seed=3), zoo.run(model, changed, seed=3)
            torch.testing.assert_close(before[1, :t], after[1, :t], atol=1e-5, rtol=1e-5)
            real = batch["attention_mask"][0, :t].bool()
            torch.testing.assert_close(before[0, :t][real], after[0, :t][real], atol=1e-5, rtol=1e-5)
            if position in ATTENTION:  # elsewhere the changed token itself may be dropped
                assert not torch.allclose(before[1, t:], after[1, t:])


# --- law 5: finite ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("position", POSITIONS)
def test_law_5_finite_at_rate_99_with_one_real_token(zoo: Any, family: str, position: str) -> None:
    for backend, padding in itertools.product(backends(zoo, family, position), ["left", "right"]):
        if position not in ATTENTION and padding == "right":
            continue
        model, batch = zoo.build(family, backend=backend), zoo.inputs(family, padding=padding, real=1)
        for pattern in PATTERNS:
            model.zero_grad()
            with attach(model, one(position, pattern, 0.99)):
                out = zoo.run(model, batch)
                (out**2).mean().backward()
            assert torch.isfinite(out).all(), (backend, padding, pattern)
            gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
            wrong = [n for n, g in gradients.items() if not torch.isfinite(g).all()]
            assert gradients
            assert not wrong, (backend, padding, pattern)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "mistral", "qwen3", "gemma3"])
def test_law_5_under_autocast(zoo: Any, name: str, dtype: torch.dtype) -> None:
    for method, padding in itertools.product(("dropkey", "dropattention"), ["left", "right"]):
        model, batch = zoo.build(name), zoo.inputs(name, padding=padding, real=1)
        with attach(model, method, rate=0.9), torch.autocast("cpu", dtype=dtype):
            out = zoo.run(model, batch)
        assert torch.isfinite(out).all(), (method, padding)
        out.float().square().mean().backward()
        wrong = [n for n, p in model.named_parameters() if p.grad is not None and not torch.isfinite(p.grad).all()]
        assert not wrong, (method, padding)


# --- law 6: checkpointing ---------------------------------------------------------------------------------------------

MIXED = Method(
    [
        Site("attention_logits", "column", rate=0.3, layers="all"),
        Site("hidden", "element", rate=0.3, layers="all", rescale="inverse_keep"),
        Site("input", "column", rate=0.2),
        Site("output", "span", rate=0.2),
    ]
)


@pytest.mark.parametrize("reentrant", [False, True], ids=["not-reentrant", "reentrant"])
@pytest.mark.parametrize("name", ["bert", "modernbert", "gpt2", "llama", "gemma2"])
@pytest.mark.parametrize("method", [MIXED, METHODS["dropattention"].with_rate(0.3)], ids=["mixed", "dropattention"])
def test_law_6_gradients_agree_with_and_without_checkpointing(
    zoo: Any, name: str, method: Method, reentrant: bool
) -> None:
    def gradients(checkpointing: bool) -> dict[str, Tensor]:
        model, batch = zoo.build(name), zoo.inputs(name)
        model.enable_input_require_grads()  # what reentrant checkpointing needs, and PEFT does
        if checkpointing:
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": reentrant})
            assert any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
        with attach(model, method) as attachment:
            more = {"use_cache": False} if name in DECODERS else {}
            zoo.run(model, {**batch, **more}, seed=5).square().mean().backward()
            calls[checkpointing] = attachment.report()[0]["calls"]
        return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    calls: dict[bool, int] = {}
    plain, replayed = gradients(False), gradients(True)
    assert calls[True] > calls[False]  # it was replayed
    assert plain.keys() == replayed.keys()
    for n, gradient in plain.items():
        torch.testing.assert_close(replayed[n], gradient, atol=1e-6, rtol=1e-5, msg=lambda m, n=n: f"{n}: {m}")


# --- law 7: what fired ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [0.1, 0.5])
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("name", ["bert", "gpt2", "opt", "llama"])
def test_law_7_report_measures_the_rate(zoo: Any, name: str, position: str, pattern: str, rate: float) -> None:
    rows, length, passes = 4, 12, 3
    model, batch = zoo.build(name), zoo.inputs(name, rows=rows, length=length)
    with attach(model, one(position, pattern, rate)) as attachment:
        assert attachment.report()[0]["measured"] is None
        for _ in range(passes):
            zoo.run(model, batch)
        (report,) = attachment.report()
    places = 2 if position in (*ATTENTION, "hidden") else 1
    head = {"position": position, "pattern": pattern, "modules": places, "calls": places * passes}
    assert {key: report[key] for key in head} == head
    assert report["layers"] == ([0, 1] if places == 2 else [])
    assert report["expected"] == pytest.approx(rate)
    units = rows * (4 if position in ATTENTION else 1)  # heads
    trials = places * passes * units * length
    if pattern == "element":
        trials *= length if position in ATTENTION else 32
    measured = report["measured"] * trials
    if pattern == "span":  # the length varies by one in each row only
        trials, low = places * passes * units, int(length * rate)
        measured -= trials * low
        rate = length * rate - low
    assert measured == pytest.approx(round(measured), abs=1e-6)  # exactly so many were drawn
    bounds = binom.interval(1 - 1e-6, trials, rate)
    assert bounds[0] <= round(measured) <= bounds[1]


@pytest.mark.parametrize("pattern", ["element", "column", "span"])
def test_law_7_what_a_hidden_site_does_to_each_sample(zoo: Any, family: str, pattern: str) -> None:
    """Seen from outside, by a hook behind hkft's own: each sample has its own tokens, elements or one span dropped."""
    model, batch = zoo.build(family), zoo.inputs(family, rows=6)
    seen: list[tuple[Tensor, tuple[int, ...]]] = []
    with attach(model, one("hidden", pattern, 0.4)) as attachment:
        layer = attachment.family.layers[-1]
        assert layer.ffn_output is not None
        handle = layer.ffn_output.register_forward_hook(
            lambda _m, _a, out: seen.append((out.detach() != 0, tuple(out.shape)))
        )
        zoo.run(model, batch)
        handle.remove()
    keep = seen[-1][0].reshape(6, -1, 32)  # [B,L,D]
    tokens = keep.any(-1)
    if pattern == "element":
        assert 0.5 < float(keep.float().mean()) < 0.7
        return
    assert torch.equal(tokens, keep.all(-1))  # whole tokens
    if pattern == "span":
        length = tokens.shape[1]
        for row in tokens.tolist():
            runs = [len(list(run)) for kept, run in itertools.groupby(row) if not kept]
            assert len(runs) == 1, row
            assert runs[0] in (int(length * 0.4), int(length * 0.4) + 1)
    assert len({tuple(row) for row in tokens.tolist()}) > 1  # independent per sample


# --- law 8: two passes differ, and nothing is left --------------------------------------------------------------------


def traces(model: nn.Module) -> dict[str, Any]:
    """All that attaching could leave behind."""
    hooks = {
        (name, key): len(value)
        for name, module in model.named_modules()
        for key, value in module.__dict__.items()
        if key.endswith("_hooks") or "hooks_" in key
    }
    entries = {name: sorted(module.__dict__) for name, module in model.named_modules()}
    modules = {name: type(module).__name__ for name, module in model.named_modules()}
    registries = [sorted(r._global_mapping) for r in (AttentionInterface, AttentionMaskInterface)]
    configs = {id(m.config): m.config._attn_implementation for m in model.modules() if hasattr(m, "config")}
    return {
        "hooks": hooks,
        "entries": entries,
        "modules": modules,
        "registries": registries,
        "attention": configs,
        "config": model.config.to_dict(),  # type: ignore[union-attr, operator]
        "training": {name: m.training for name, m in model.named_modules()},
    }


def test_law_8_train_passes_differ_and_nothing_is_left(zoo: Any, family: str) -> None:
    for backend in backends(zoo, family):
        model, batch = zoo.build(family, backend=backend), zoo.inputs(family)
        zoo.run(model, batch)
        before = traces(model)
        sites = [Site("attention_logits", "column"), Site("hidden"), Site("input"), Site("output", "span")]
        attachment = attach(model, Method(sites), rate=0.4)
        assert traces(model) != before  # the traces are visible
        first, second = zoo.run(model, batch), zoo.run(model, batch)
        assert not torch.equal(first, second)
        model.eval()
        assert torch.equal(zoo.run(model, batch), zoo.run(model, batch))
        model.train()
        attachment.detach()
        assert traces(model) == before
        assert attached(model) is None
        assert torch.equal(zoo.run(model, batch), zoo.run(model, batch))


# --- law 9: what is saved knows nothing of hkft -----------------------------------------------------------------------

LOAD = """
import sys
sys.modules["hkft"] = None  # importing hkft raises ImportError
import torch, peft, transformers
for folder, kind, backend in zip(sys.argv[1::3], sys.argv[2::3], sys.argv[3::3]):
    base = getattr(transformers, kind).from_pretrained(folder + "/base", attn_implementation=backend)
    model = peft.PeftModel.from_pretrained(base, folder + "/adapter").eval()
    with torch.no_grad():
        out = model(**torch.load(folder + "/batch.pt"))[0]
    torch.save(out, folder + "/out.pt")
assert not any(name.startswith("hkft.") for name in sys.modules)
"""
SAVED = [
    ("bert", ["query", "value"], "AutoModel", "sdpa"),
    ("llama", ["q_proj", "down_proj"], "AutoModelForCausalLM", "eager"),
]


def save(zoo: Any, folder: Path, name: str, targets: list[str], backend: str) -> Tensor:
    """Save base and adapter of an attached model in training, and what it says in eval mode."""
    base = zoo.build(name, backend=backend)
    base.save_pretrained(folder / "base")
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    batch = zoo.inputs(name, padding="right", real=5)
    torch.save(batch, folder / "batch.pt")
    with attach(model, "hiddenkey-", rate=0.3):
        model.train()
        zoo.run(model, batch).sum().backward()
        model.save_pretrained(folder / "adapter")
        model.get_base_model().save_pretrained(folder / "attached")
        model.eval()
        with torch.no_grad():
            return zoo.run(model, batch)


def test_law_9_what_is_saved_loads_where_hkft_is_not(zoo: Any, tmp_path: Path) -> None:
    expected: dict[Path, Tensor] = {}
    arguments: list[str] = []
    for name, targets, kind, backend in SAVED:
        folder = tmp_path / name
        folder.mkdir()
        expected[folder] = save(zoo, folder, name, targets, backend)
        arguments += [str(folder), kind, backend]
        written = sorted(path for path in folder.rglob("*") if path.suffix in {".json", ".md"})
        assert {"config.json", "adapter_config.json"} <= {path.name for path in written}
        assert [path.name for path in written if "hkft" in path.read_text().lower()] == []
        configs = [json.loads((folder / part / "config.json").read_text()) for part in ("base", "attached")]
        assert configs[0] == configs[1]
    command = [sys.executable, "-W", "ignore", "-c", LOAD, *arguments]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for folder, out in expected.items():
        torch.testing.assert_close(torch.load(folder / "out.pt"), out, atol=1e-5, rtol=1e-5)
