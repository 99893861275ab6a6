"""How far `hkft check --probe` is off: what it predicts of a run, and what the run then measures.

    python tests/benchmarks/prediction.py [--only hiddenkey,llama] [--rows 640] [--json FILE]

Classification is the quickstart's MiniLM (from the `demo` extra) on --rows of its sentences for two epochs, under hiddenkey, under no
method, and on a base of 4 bits; generation a random Llama (hidden 256, 6 layers, 12 M parameters) on made rows. Each of
`hkft check` and `hkft train` runs in a process of its own, on the same recipe, one after the other, after a run of each that
fills the caches. Shown is predicted, measured, and predicted / measured:

  steps, tokens, parameters   optimizer steps, tokens trained on without padding, trained parameters
  memory, forecast            the peak that the plan names without loading a model: on a CPU the resident set of the process
  memory, probe               the same, as it was in the probe's process
  training, evaluations       seconds: `train_runtime_s` and `eval_runtime_s` of the summary

Times are of this machine at that moment: what else runs there changes between both. pytest does not collect this file.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

RECIPE = """\
model: {{name: {folder}/model, device: auto}}
task: generation
data: {{train: {folder}/rows.jsonl, validation: 0.2, prompt: "{{prompt}} ->", completion: " {{completion}}", max_length: 256}}
lora: {{r: 8, lora_alpha: 16, target_modules: [q_proj, v_proj]}}
dropout: {{method: hiddenkey, rate: 0.1}}
train: {{learning_rate: 1.0e-3, num_train_epochs: 2, per_device_train_batch_size: 8}}
diagnostics: {{evals_per_epoch: 1, probe_size: 100}}
"""
CONFIGURATIONS = {
    "hiddenkey": ["dropout.method=hiddenkey"],
    "none": ["dropout.method=none"],
    "4bit": ["dropout.method=hiddenkey", "model.quantization=4bit"],
    "llama": [],
}


def make(folder: Path, rows: int) -> None:
    """A random Llama, with a tokenizer of bytes, and rows of uneven length for it."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = ["<pad>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({word: index for index, word in enumerate(words)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder / "model")
    torch.manual_seed(1)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=16_000,
            hidden_size=256,
            intermediate_size=768,
            num_hidden_layers=6,
            num_attention_heads=8,
            num_key_value_heads=4,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        )
    ).save_pretrained(folder / "model")
    draw = random.Random(1)

    def text(most: int) -> str:
        return " ".join("".join(draw.choices("abcdefghij", k=draw.randint(2, 7))) for _ in range(draw.randint(2, most)))

    lines = [json.dumps({"prompt": text(12), "completion": text(24)}) for _ in range(rows // 2)]
    (folder / "rows.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "llama.yaml").write_text(RECIPE.format(folder=folder), encoding="utf-8")


def hkft(*given: str) -> Any:
    """A command in a process of its own, and the JSON document it prints."""
    done = subprocess.run([sys.executable, "-m", "hkft", *given, "--json"], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr + done.stdout)
    return json.loads(done.stdout)


def compared(name: str, folder: Path, rows: int) -> dict[str, tuple[float, float]]:
    """(predicted, measured) of each quantity."""
    recipe = str(folder / "llama.yaml") if name == "llama" else "quickstart"
    size = (
        [] if name == "llama" else [f"data.train_rows={rows}", "data.validation_rows=200", "train.num_train_epochs=2"]
    )
    chosen = ["--recipe", recipe, *(part for value in (*size, *CONFIGURATIONS[name]) for part in ("--set", value))]
    hkft("check", *chosen)
    hkft("train", *chosen, "--set", "train.max_steps=1", "--output", str(folder / f"{name}-first"))
    plan = hkft("check", *chosen, "--probe")
    hkft("train", *chosen, "--output", str(folder / name))
    summary = json.loads((folder / name / "summary.json").read_text(encoding="utf-8"))
    peak = summary["peak_memory_bytes"]
    return {
        "steps": (plan["steps"], summary["steps"]),
        "tokens": (plan["tokens"]["trained"], summary["train_tokens_per_s"] * summary["train_runtime_s"]),
        "parameters": (plan["parameters"]["trainable"], summary["trainable_parameters"]),
        "memory, forecast": (plan["memory_bytes"]["peak"], peak),
        "memory, probe": (plan["probe"]["peak_memory_bytes"], peak),
        "training": (plan["probe"]["seconds"]["training"], summary["train_runtime_s"]),
        "evaluations": (plan["probe"]["seconds"]["looking"], summary["eval_runtime_s"]),
    }


def show(name: str, found: dict[str, tuple[float, float]]) -> None:
    print(f"{name:20}{'predicted':>14}{'measured':>14}{'ratio':>9}")
    for quantity, (predicted, measured) in found.items():
        scale, unit = (
            (2**20, "MiB") if "memory" in quantity else (1, "s" if quantity in ("training", "evaluations") else "")
        )
        values = "".join(f"{value / scale:>14,.{1 if unit == 's' else 0}f}" for value in (predicted, measured))
        print(f"  {quantity:18}{values}{predicted / measured:>9.3f} {unit}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default=",".join(CONFIGURATIONS), help="configurations, default all")
    parser.add_argument("--rows", type=int, default=640, help="to train on, default 640; of the Llama half as many")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write predicted and measured values there")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder, found = Path(name), {}
        os.environ["HKFT_CACHE"] = str(folder / "cache")
        make(folder, options.rows)
        for configuration in options.only.split(","):
            found[configuration] = compared(configuration, folder, options.rows)
            show(configuration, found[configuration])
    print(f"{platform.machine()} CPU, {os.cpu_count()} cores")
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
