"""What a decoder's batches cost: real tokens per second by how rows are batched, and the peak memory of a large vocabulary.

    python tests/benchmarks/decoder.py [padding] [memory] [lengths] [--rounds 5] [--device cuda] [--json FILE]

padding: training steps (forward, backward; no optimizer) of a random Llama with LoRA (r 8, on q_proj and v_proj; four layers,
hidden 512, vocabulary 4,096) over the same 96 rows, whose lengths are spread as those of instructions are (log-normal, median
64, at most 512), in batches of 16. "random" is what plain Trainer + PEFT does: rows as they come, padded, the model's own loss.
"grouped" are batches of like length, "padding-free" such batches laid end to end, both with hkft's loss. In each round every
way goes through all rows once, in random order; shown is the median over the rounds of tokens per second, padding not counted,
by that of "random" in the same round. "random" stands there twice: how far the second is from 1 is noise.

memory: peak of what PyTorch's allocator holds in one step above what it held before, 4 rows of 512 tokens, half of them
completion, vocabulary 128,256, hidden 256, two layers. "plain" is one pass with the model's own loss. "HiddenKey, written out" is
two passes with the model's own loss and KL between both logits in float32; "HiddenKey" is hkft's.

lengths: a training step (forward, backward; no optimizer) on rows of 512 to 4,096 tokens, half of each completion, as many as
make 4,096 tokens (32,768 on CUDA, in bfloat16), by plain PEFT with the model's own loss and by hkft's methods: tokens per second
and peak memory, as ratios to plain's of the same round. The model is a random Llama with LoRA (r 8, on q_proj and v_proj), of
four layers, hidden 512 and vocabulary 4,096; on CUDA sixteen layers, hidden 2,048 and vocabulary 128,256. hkft drops in the
latter half of the layers.

pytest does not collect this file.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from attention import peak_bytes, seconds
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import hkft
from hkft.data.tokenise import IGNORED, collator
from hkft.dropout.consistency import kl
from hkft.model.vocabulary import Vocabulary
from hkft.training.objective import token_objective

METHOD = "hiddenkey-"
BATCH = 16
Batch = dict[str, Tensor]


def model_of(vocabulary: int, hidden: int, layers: int, device: torch.device) -> nn.Module:
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        max_position_embeddings=4096,
        use_cache=False,
    )
    lora = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(LlamaForCausalLM(config), lora)
    return model.to(device, torch.bfloat16 if device.type == "cuda" else None).train()


def rows_of(count: int, vocabulary: int) -> list[dict[str, Any]]:
    draw = random.Random(3)
    lengths = [min(512, max(8, round(draw.lognormvariate(4.16, 0.8)))) for _ in range(count)]
    rows = []
    for number, length in enumerate(lengths):
        tokens = [draw.randrange(3, vocabulary) for _ in range(length)]
        labels = [IGNORED] * (length // 2) + tokens[length // 2 :]
        rows.append({"input_ids": tokens, "attention_mask": [1] * length, "labels": labels, "id": number})
    return rows


def padded(rows: list[dict[str, Any]]) -> Batch:
    """As hkft's collator does it, without a tokenizer."""
    width = -(-max(len(row["input_ids"]) for row in rows) // 8) * 8
    fill = {"input_ids": 0, "attention_mask": 0, "labels": IGNORED}
    return {
        name: torch.tensor([row[name] + [value] * (width - len(row[name])) for row in rows])
        for name, value in fill.items()
    }


def batches(rows: list[dict[str, Any]], way: str, device: torch.device) -> list[Batch]:
    ordered = rows if way.startswith("random") else sorted(rows, key=lambda row: len(row["input_ids"]))
    groups = [ordered[start : start + BATCH] for start in range(0, len(ordered), BATCH)]
    collate: Callable[..., Any] = padded if way != "padding-free" else collator(None, padding_free=True)  # type: ignore[arg-type]
    return [{name: value.to(device) for name, value in dict(collate(group)).items()} for group in groups]


def epoch(model: nn.Module, given: list[Batch], way: str) -> None:
    with hkft.attach(model, METHOD, rate=0.1, padding_free=way == "padding-free"):
        vocabulary = Vocabulary(model)
        for batch in given:
            model.zero_grad(set_to_none=True)
            own = way.startswith("random")
            loss = model(**batch).loss if own else token_objective(model, vocabulary, batch, None).loss
            loss.backward()
        if given[0]["input_ids"].is_cuda:
            torch.cuda.synchronize()


def padding(rounds: int, device: torch.device) -> dict[str, Any]:
    model, rows = model_of(4096, 512, 4, device), rows_of(96, 4096)
    ways = ["random", "random once more", "grouped", "padding-free"]
    given = {way: batches(rows, way, device) for way in ways}
    times: dict[str, list[float]] = {way: [] for way in ways}
    for way in ways:
        epoch(model, given[way][:2], way)
    for _ in range(rounds):
        random.shuffle(ways)
        for way in ways:
            times[way].append(seconds(lambda way=way: epoch(model, given[way], way)))
    real = sum(len(row["input_ids"]) for row in rows)
    held = {way: sum(batch["input_ids"].numel() for batch in given[way]) for way in given}
    print(f"\n{len(rows)} rows, {real:,} real tokens; {METHOD}; by plain Trainer's padded random batches")
    for way in given:
        ratios = [plain / took for plain, took in zip(times["random"], times[way], strict=True)]
        share, ratio = 1 - real / held[way], statistics.median(ratios)
        print(f"{way:18} tokens/s x {ratio:.3f} ({min(ratios):.3f} to {max(ratios):.3f})  padding {share:.1%}")
    return {"seconds": times, "tokens": real, "held": held}


def memory(device: torch.device) -> dict[str, int]:
    model = model_of(128_256, 256, 2, device)
    tokens = torch.randint(3, 128_256, (4, 512), generator=torch.Generator().manual_seed(7)).to(device)
    labels = tokens.clone()
    labels[:, :256] = IGNORED
    batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": labels}
    method = hkft.METHODS["hiddenkey"].with_rate(0.1)
    vocabulary = Vocabulary(model)

    def written_out() -> None:
        with torch.no_grad():
            other = model(**batch).logits
        outputs = model(**batch)
        learned = labels[:, 1:] != IGNORED
        (outputs.loss + kl(outputs.logits[:, :-1][learned], other[:, :-1][learned])).backward()

    steps = {
        "plain": lambda: model(**batch).loss.backward(),
        "plain, hkft's loss": lambda: token_objective(model, vocabulary, batch, None).loss.backward(),
        "HiddenKey, written out": written_out,
        "HiddenKey": lambda: token_objective(model, vocabulary, batch, method.consistency).loss.backward(),
    }
    peaks: dict[str, int] = {}
    print(f"\nvocabulary 128,256; [B,L,V] logits in float32 are {4 * 512 * 128_256 * 4 / 1e9:.2f} GB")
    for name, step in steps.items():
        with hkft.attach(model, method if name.startswith("HiddenKey") else "none"):
            step()
            model.zero_grad(set_to_none=True)
            peaks[name] = peak_bytes(step, device)
            model.zero_grad(set_to_none=True)
        print(f"{name:24} {peaks[name] / 1e9:6.2f} GB  x {peaks[name] / peaks['plain']:.3f}")
    return peaks


def lengths(rounds: int, device: torch.device) -> dict[int, Any]:
    large = device.type == "cuda"
    model = model_of(128_256, 2048, 16, device) if large else model_of(4096, 512, 4, device)
    vocabulary, found = Vocabulary(model), {}
    methods = {name: hkft.METHODS[name].with_rate(0.1) for name in ("none", "hiddenkey-", "hiddenkey")}
    print(f"\n{'length':8}{'':12}{'tokens/s':>12}{'by plain':>28}{'memory':>12}{'by plain':>12}")
    for length in (512, 1024, 2048, 4096):
        rows = (32_768 if large else 4096) // length
        tokens = torch.randint(3, 4096, (rows, length), generator=torch.Generator().manual_seed(7)).to(device)
        labels = tokens.clone()
        labels[:, : length // 2] = IGNORED
        batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": labels}

        def step(name: str, batch: Batch = batch) -> None:
            if name == "plain":
                model(**batch).loss.backward()
            else:
                token_objective(model, vocabulary, batch, methods[name].consistency).loss.backward()
            model.zero_grad(set_to_none=True)
            if large:
                torch.cuda.synchronize()

        names = ["plain", *methods]
        times: dict[str, list[float]] = {name: [] for name in names}
        peaks: dict[str, int] = {}
        for number in range(rounds + 1):
            random.shuffle(names)
            for name in names:
                with hkft.attach(model, methods.get(name, "none")) as attachment:
                    step(name)  # what two passes share is found in the first
                    for dropper in attachment.droppers:
                        dropper.calls = 100  # past the first calls, whose masks are counted one and all
                    if number:
                        times[name].append(seconds(lambda name=name: step(name)))
                    else:
                        peaks[name] = peak_bytes(lambda name=name: step(name), device)
        for name in ("plain", *methods):
            ratios = [plain / took for plain, took in zip(times["plain"], times[name], strict=True)]
            rate, spread = tokens.numel() / statistics.median(times[name]), f"({min(ratios):.3f} to {max(ratios):.3f})"
            print(
                f"{length:<8}{name:12}{rate:12,.0f}{statistics.median(ratios):9.3f} {spread:>18}"
                f"{peaks[name] / 1e9:9.2f} GB{peaks[name] / peaks['plain']:12.3f}"
            )
        found[length] = {"seconds": times, "peak_bytes": peaks}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", help="padding, memory, lengths; all if none is named")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write seconds and bytes there")
    options = parser.parse_args()
    device, parts = torch.device(options.device), options.parts or ["padding", "memory", "lengths"]
    random.seed(1)
    found: dict[str, Any] = {}
    if "padding" in parts:
        found["padding"] = padding(options.rounds, device)
    if "memory" in parts:
        found["memory"] = memory(device)
    if "lengths" in parts:
        found["lengths"] = lengths(options.rounds, device)
    machine = torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.machine()} CPU"
    print(f"\n{machine}, {torch.get_num_threads()} threads, torch {torch.__version__}, {options.rounds} rounds")
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
