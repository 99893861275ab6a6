"""What a merge costs: time and peak memory of hkft's streamed merge, as ratios to plain PEFT's.

    python tests/benchmarks/merge.py [--targets q_proj,v_proj] [--dtype bfloat16] [--rounds 3] [--layers 12] [--json FILE]

The base is a random Llama in bfloat16 (hidden 2,048, vocabulary 32,000; 12 layers are 1.3 GB), in files of 500 MB at most,
with a LoRA adapter (r 16) on every linear layer or on --targets. "peft" is AutoModelForCausalLM.from_pretrained(dtype="auto"),
PeftModel, merge_and_unload, save_pretrained, "hkft" is plan and write, each in a process of its own, in turns; files lie in
the page cache. Time is from after the imports to the last write, without waiting for the disk.

Memory, above what the process held after its imports:
  peak      the largest resident set (ru_maxrss), in which pages of files that are mapped count as well
  private   the largest resident set less the pages of files, sampled every 5 ms: what the system cannot take back
Shown are medians over the rounds, and of the ratio in each round its median and range. pytest does not collect this file.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import footprint

CONTENDERS = ("peft", "hkft")
KINDS = {"seconds": "time", "peak": "peak", "private": "private"}


def make(folder: Path, layers: int, targets: str) -> None:
    """The base model and its adapter."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    torch.set_default_dtype(torch.bfloat16)
    config = LlamaConfig(
        vocab_size=32_000,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder / "base", max_shard_size="500MB")
    chosen = targets if targets == "all-linear" else targets.split(",")
    wrapped = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules=chosen, task_type="CAUSAL_LM"))
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.01)
    wrapped.save_pretrained(folder / "adapter")


def by_peft(folder: Path, out: Path, dtype: str) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype="auto" if dtype == "bfloat16" else dtype)
    PeftModel.from_pretrained(model, folder / "adapter").merge_and_unload().save_pretrained(out)


def by_hkft(folder: Path, out: Path, dtype: str) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from hkft.merging.streaming import plan

    config = AutoConfig.from_pretrained(folder / "base")
    ready = plan(folder / "base", [(folder / "adapter", 1.0)], AutoModelForCausalLM, config, getattr(torch, dtype))
    out.mkdir()
    ready.write(out)
    config.save_pretrained(out)


def measured(contender: str, folder: Path, out: Path, dtype: str) -> dict[str, float]:
    """Seconds and bytes of one merge, in this process."""
    import peft
    import torch
    import transformers

    import hkft.merging.streaming  # noqa: F401

    assert peft and torch and transformers.LlamaForCausalLM
    return footprint.measured(lambda: (by_peft if contender == "peft" else by_hkft)(folder, out, dtype))


def in_process(*given: str) -> str:
    """This script once more, in a process that inherits no memory worth mention; what it printed last."""
    done = subprocess.run([sys.executable, __file__, *given], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return done.stdout.strip().splitlines()[-1] if done.stdout.strip() else ""


def rounds(folder: Path, count: int, dtype: str) -> dict[str, list[dict[str, float]]]:
    found: dict[str, list[dict[str, float]]] = {contender: [] for contender in CONTENDERS}
    for number in range(count):
        for contender in CONTENDERS if number % 2 == 0 else CONTENDERS[::-1]:
            if hasattr(os, "sync"):
                os.sync()  # not to wait for what another has left to be written
            out = folder / f"out-{contender}"
            found[contender].append(
                json.loads(in_process("--run", contender, "--folder", str(folder), "--dtype", dtype))
            )
            if number < count - 1:
                shutil.rmtree(out)
    return found


def show(found: dict[str, list[dict[str, float]]]) -> None:
    print(f"{'':10}{'peft':>12}{'hkft':>12}{'ratio':>10}   range")
    for kind, text in KINDS.items():
        unit, scale = ("s", 1.0) if kind == "seconds" else ("GB", 1e9)
        plain, ours = ([one[kind] for one in found[contender]] for contender in CONTENDERS)
        ratios = [b / a for a, b in zip(plain, ours, strict=True)]
        values = "".join(f"{statistics.median(one) / scale:>9.2f} {unit:2}" for one in (plain, ours))
        print(f"{text:10}{values}{statistics.median(ratios):>10.3f}   {min(ratios):.3f} to {max(ratios):.3f}")


def difference(folder: Path) -> float:
    """The largest difference of a weight between both outputs, to show that they are the same work."""
    import torch

    from hkft.merging import shards

    one, two = (shards.checkpoint(folder / f"out-{contender}") for contender in CONTENDERS)
    assert one.keys() == two.keys()
    pairs = ((one[name].read(), two[name].read()) for name in one)
    return max(float((a.float() - b.float()).abs().max()) if not torch.equal(a, b) else 0.0 for a, b in pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--targets", default="all-linear", help="layers with LoRA, default all-linear")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16", help="of what is written")
    parser.add_argument("--layers", type=int, default=12, help="default 12")
    parser.add_argument("--rounds", type=int, default=3, help="default 3")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write seconds and bytes there")
    parser.add_argument("--run", choices=["make", *CONTENDERS], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run == "make":
        return make(options.folder, options.layers, options.targets)
    if options.run:
        out = options.folder / f"out-{options.run}"
        return print(json.dumps(measured(options.run, options.folder, out, options.dtype)))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        in_process("--run", "make", "--folder", name, "--layers", str(options.layers), "--targets", options.targets)
        size = sum(path.stat().st_size for path in (folder / "base").glob("*.safetensors"))
        print(f"base {size / 1e9:.2f} GB in bfloat16, LoRA on {options.targets}, written in {options.dtype}")
        found = rounds(folder, options.rounds, options.dtype)
        show(found)
        print(f"largest difference between the weights of both: {difference(folder):.2g}")
    print(f"{platform.machine()} CPU, {os.cpu_count()} cores, {options.rounds} rounds")
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))
    return None


if __name__ == "__main__":
    main()
