"""What dropping costs: time and peak memory of a training step, as ratios to the same model on plain SDPA.

    python tests/benchmarks/attention.py [--causal] [--lengths 512,1024] [--repeats 20] [--device cuda] [--json FILE]

The model has random weights, LoRA (r 8) on query and value and no dropout of its own: four layers of MiniLM's shape
(hidden 384, 12 heads of 32), or with --causal of Llama's (hidden 768, 12 heads of 64); bfloat16 on CUDA. Every variant drops
in every layer at rate 0.1. A step is one forward and one backward pass without the optimizer, on as many rows as make up
4,096 tokens (32,768 on CUDA).

Time: in each round every variant takes one step, in random order. The ratio is to plain's step of the same round; shown are its
median and quartiles over the rounds. "none" is plain once more, behind `attach`: how far it is from 1 is noise.
Memory: the peak of what PyTorch's allocator holds during a step, above what it held before (weights and inputs).
"naive" is DropKey as other people's code has it: a number drawn for each of the [B,H,Q,K] logits, on eager attention.
"flex" (CUDA only) is column DropKey by FlexAttention. pytest does not collect this file.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from transformers import AttentionInterface, AttentionMaskInterface, AutoModel, BertConfig, LlamaConfig

import hkft

RATE = 0.1
LENGTHS = "128,256,512,1024,2048,4096"
COMMON = {"num_hidden_layers": 4, "num_attention_heads": 12, "max_position_embeddings": 4096, "vocab_size": 1000}
MINILM = BertConfig(
    **COMMON, hidden_size=384, intermediate_size=1536, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
)
LLAMA = LlamaConfig(**COMMON, hidden_size=768, intermediate_size=2048, attention_dropout=0.0)

Step = Callable[[], None]


def naive(
    module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float, **_: Any
) -> tuple[Tensor, None]:
    """Element DropKey, written out. q, k, v [B,H,L,D]; mask, added to the logits, [B,1,Q,K]; returns [B,L,H,D]."""
    logits = q @ k.transpose(-1, -2) * scaling
    if mask is not None:
        logits = logits + mask
    dropped = torch.bernoulli(torch.full_like(logits, RATE)).bool()
    weights = logits.masked_fill(dropped, torch.finfo(logits.dtype).min).softmax(-1)
    return (weights @ v).transpose(1, 2).contiguous(), None


def flex(
    module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float, **_: Any
) -> tuple[Tensor, None]:
    """Column DropKey by FlexAttention, [B,H,K] captured. The first key stays when causal, as in hkft."""
    keep = torch.rand(k.shape[:3], device=k.device) >= RATE
    keep[..., 0] |= module.is_causal
    out = _compiled_flex(q, k, v, keep, scaling, module.is_causal)
    return out.transpose(1, 2).contiguous(), None


@torch.compile(dynamic=False)
def _compiled_flex(q: Tensor, k: Tensor, v: Tensor, keep: Tensor, scale: float, causal: bool) -> Tensor:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def drop(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return torch.where(keep[b, h, j], score, float("-inf"))

    def not_future(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return i >= j

    blocks = create_block_mask(not_future, None, None, q.shape[2], k.shape[2], device=q.device) if causal else None
    return flex_attention(q, k, v, score_mod=drop, block_mask=blocks, scale=scale)


def build(variant: str, causal: bool, device: torch.device) -> nn.Module:
    """The model of one variant, weights equal for all. "naive x" and "flex x": x, its attention not hkft's."""
    kind, _, method = variant.rpartition(" ")
    torch.manual_seed(1)
    config = copy.deepcopy(LLAMA if causal else MINILM)  # models that share one share their attention, too
    model = AutoModel.from_config(config, attn_implementation=kind or "sdpa")
    lora = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"] if causal else ["query", "value"])
    model = get_peft_model(model, lora).to(device, torch.bfloat16 if device.type == "cuda" else None).train()
    if variant == "plain":
        return model
    sites = [replace(site, layers="all") for site in hkft.METHODS[method].sites]
    if kind:
        sites = [site for site in sites if site.position == "hidden"]
    hkft.attach(model, hkft.Method(sites), rate=RATE)
    return model


def step_of(model: nn.Module, tokens: Tensor) -> Step:
    def step() -> None:
        model.zero_grad(set_to_none=True)
        model(input_ids=tokens)[0].float().square().mean().backward()
        if tokens.is_cuda:
            torch.cuda.synchronize()

    return step


def seconds(step: Step) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def peak_bytes(step: Step, device: torch.device) -> int:
    """Peak of the allocator's total during a step, above where it began. On the CPU the profiler sees each allocation."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    changes = [event["args"] for event in sorted(events, key=lambda e: e.get("ts", 0)) if event["name"] == "[memory]"]
    return max(e["Total Allocated"] for e in changes) - changes[0]["Total Allocated"] + changes[0]["Bytes"]


def kernels(step: Step) -> list[str]:
    """Names of the attention kernels that a step runs on CUDA."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        step()
    signs = ("flash", "fmha", "attention", "sdpa", "softmax")
    return sorted({e.key[:100] for e in profiler.key_averages() if any(sign in e.key.lower() for sign in signs)})


def measure(models: dict[str, nn.Module], length: int, repeats: int, device: torch.device) -> dict[str, Any]:
    """One record a variant: seconds of each round, and peak bytes; None where the memory was not enough."""
    rows = max(1, (32768 if device.type == "cuda" else 4096) // length)
    tokens = torch.randint(3, 1000, (rows, length), generator=torch.Generator().manual_seed(7)).to(device)
    steps = {variant: step_of(model, tokens) for variant, model in models.items()}
    records: dict[str, Any] = dict.fromkeys(steps)
    for variant, step in steps.items():
        try:
            step()  # warm up
            records[variant] = {"peak_bytes": peak_bytes(step, device), "seconds": []}
        except torch.OutOfMemoryError:
            models[variant].zero_grad(set_to_none=True)
            continue
        if device.type == "cuda":
            records[variant]["kernels"] = kernels(step)
        models[variant].zero_grad(set_to_none=True)
    order = [variant for variant in steps if records[variant]]
    for _ in range(repeats):
        random.shuffle(order)
        for variant in order:
            records[variant]["seconds"].append(seconds(steps[variant]))
    return records


def add_rows(table: Table, length: int, records: dict[str, Any]) -> None:
    plain = records["plain"]
    for variant, record in records.items():
        if record is None:
            table.add_row(str(length), variant, "out of memory", "", "")
            continue
        if variant == "plain":
            second, gigabyte = statistics.median(record["seconds"]), record["peak_bytes"] / 1e9
            table.add_row(str(length), variant, f"{second:.3g} s", "", f"{gigabyte:.3g} GB")
            continue
        ratios = [a / b for a, b in zip(record["seconds"], plain["seconds"], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
        memory = record["peak_bytes"] / plain["peak_bytes"]
        table.add_row("", variant, f"{middle:.3f}", f"{low:.3f} to {high:.3f}", f"{memory:.3f}")
    table.add_section()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", default=LENGTHS, help=f"tokens in a row, default {LENGTHS}")
    parser.add_argument("--repeats", type=int, default=15, help="rounds, 2 or more, default 15")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--causal", action="store_true", help="a decoder instead of an encoder")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write seconds and bytes there")
    options = parser.parse_args()
    device = torch.device(options.device)
    variants = ["plain", "none", "dropkey", "dropattention", "hiddencut", "hiddenkey-", "naive dropkey"]
    variants += ["naive hiddenkey-"] + ["flex dropkey"] * (device.type == "cuda")
    for name, function in (("naive", naive), ("flex", flex)):
        AttentionInterface.register(name, function)
        AttentionMaskInterface.register(name, AttentionMaskInterface()["eager" if name == "naive" else "sdpa"])
    random.seed(1)
    models = {variant: build(variant, options.causal, device) for variant in variants}
    for model in models.values():  # past the first calls, whose masks hkft counts one and all
        for _ in range(40):
            model(input_ids=torch.full((1, 128), 3, device=device))
    results: dict[int, dict[str, Any]] = {}
    table = Table("length", "variant", "time", "quartiles", "memory", title="Training step, ratios to plain SDPA")
    for length in map(int, options.lengths.split(",")):
        results[length] = measure(models, length, options.repeats, device)
        add_rows(table, length, results[length])
    machine = torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.machine()} CPU"
    place = {"machine": machine, "threads": torch.get_num_threads(), "torch": torch.__version__}
    console = Console()
    console.print(table)
    if device.type == "cuda":
        for variant, record in next(iter(results.values())).items():
            console.print(f"{variant}: {', '.join(record['kernels']) if record else 'out of memory'}", soft_wrap=True)
    console.print(", ".join(f"{name} {value}" for name, value in place.items()) + f", {options.repeats} rounds")
    if options.json:
        options.json.write_text(json.dumps({**place, "causal": options.causal, "lengths": results}, indent=1))


if __name__ == "__main__":
    main()
