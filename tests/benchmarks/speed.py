"""hkft beside plain Trainer + PEFT: training, evaluation, tokenisation, memory and start-up, as ratios measured in one run.

    python tests/benchmarks/speed.py [training] [profile] [evaluation] [tokenisation] [memory] [start] [score]
        [--rounds 5] [--rows 1280] [--methods none,hiddenkey-,hiddenkey] [--seeds 3] [--device cuda] [--json FILE]

All parts but `score` if none is named. The task is the quickstart recipe's: MiniLM, Rotten Tomatoes, LoRA on query and value,
batches of 32, no dropout of the model's own on either side. In each round every contender does the same work once, in random
order; shown is the ratio to the contender named, in the same round: its median and its range over the rounds. Above 1 is
better, everywhere.

training      one epoch of --rows rows, the Trainer's whole loop but for evaluation: samples per second. "random" batches are
              plain Trainer's default, "grouped" its train_sampling_strategy "group_by_length": that twice, so that noise is seen.
              Below: real tokens (padding left out) per second times the floating-point operations of one token, forward and
              backward through the frozen linear maps, by what the machine's matrix products reach in the same minute.
profile       where the time of a training step with method none goes, by PyTorch's profiler
evaluation    one look at the recipe's whole validation set, 853 rows: Trainer.evaluate with its defaults (batches of 8, random order), the same with hkft's
              batch size, and hkft's look, which has a loss for every row besides
tokenisation  the recipe's whole training set, 9,600 rows: `datasets.map` with the tokenizer, hkft's first start and its second, from the cache
memory        what PyTorch's allocator holds at the peak of one step on the longest batch, above what it held before
start         tests/benchmarks/startup.py
score         the quickstart with method none, --seeds paired seeds, three epochs by plain Trainer with random batches and by
              hkft: accuracy and loss on validation, hkft's less plain's, with a 95 % interval of Student's t

pytest does not collect this file.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import random
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from attention import peak_bytes
from peft import LoraConfig, TaskType, get_peft_model
from torch import nn
from torch.profiler import ProfilerActivity
from transformers import AutoModelForSequenceClassification, DataCollatorWithPadding, PrinterCallback, TrainingArguments
from transformers import Trainer as PlainTrainer
from transformers.utils import logging as transformers_logging

from hkft.data.tokenise import tokenise
from hkft.evaluation.look import look
from hkft.events import silent
from hkft.model import build
from hkft.recipe import Recipe, load
from hkft.training import run

METHODS = ("none", "dropkey", "dropattention", "hiddencut", "hiddenkey-", "hiddenkey")
KINDS = {  # part of an operation's name -> kind of work
    "mm": "products with the base's weights",
    "attention": "attention",
    "gelu": "GELU",
    "layer_norm": "layer norm",
    "copy_": "copies",
    "add": "sums, products by numbers",
    "mul": "sums, products by numbers",
}
PLAIN = ("plain, random", "plain, grouped")
Values = dict[str, list[float]]


def recipe_of(method: str, device: str, *extra: str) -> Recipe:
    return load(
        "quickstart", [f"dropout.method={method}", f"model.device={device}", "train.num_train_epochs=1", *extra]
    )


def plain_trainer(begun: run.Begun, grouped: bool, folder: str, epochs: float = 1, seed: int = 1) -> PlainTrainer:
    """Trainer and PEFT as their manuals have it, on hkft's own rows."""
    recipe, rows = begun.recipe, begun.material.examples
    place = build.location(recipe.model.name)
    torch.manual_seed(seed)
    model = AutoModelForSequenceClassification.from_pretrained(
        place, num_labels=2, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )
    adapter = LoraConfig(task_type=TaskType.SEQ_CLS, r=8, lora_alpha=16, target_modules=["query", "value"])
    settings = TrainingArguments(
        folder,
        learning_rate=recipe.train["learning_rate"],
        num_train_epochs=epochs,
        warmup_steps=recipe.train["warmup_steps"],
        per_device_train_batch_size=32,
        logging_steps=recipe.train["logging_steps"],
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=begun.trainer.args.use_cpu,
        seed=seed,
        **({"train_sampling_strategy": "group_by_length"} if grouped else {}),
    )
    trainer = PlainTrainer(
        model=get_peft_model(model, adapter),
        args=settings,
        train_dataset=rows["train"],
        eval_dataset=rows["validation"],
        data_collator=DataCollatorWithPadding(begun.material.tokenizer),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def began(method: str, device: str, folder: Path, *extra: str) -> run.Begun:
    begun = run.begin(recipe_of(method, device, *extra), folder / f"{method}-{len(list(folder.iterdir()))}")
    begun.trainer.remove_callback(PrinterCallback)
    return begun


def timed(work: Callable[[], Any], device: str) -> float:
    start = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def in_turns(contenders: dict[str, Callable[[], float]], rounds: int, warm: bool = False) -> Values:
    """Seconds of each, once a round, in random order. A first round, unless they are warm, is not counted."""
    names, found = list(contenders), {name: [] for name in contenders}
    for number in range(rounds + (not warm)):
        random.shuffle(names)
        for name in names:
            seconds = contenders[name]()
            if number or warm:
                found[name].append(seconds)
    return found


def show(title: str, values: Values, beside: tuple[str, ...], unit: str = "") -> None:
    """values: smaller is better. A line each: the median, and the ratios to the contenders of `beside`."""
    print(f"\n{title}")
    print(f"{'':28}{unit:>12}" + "".join(f"{'by ' + name:>32}" for name in beside))
    for name, mine in values.items():
        line = f"{name:28}{statistics.median(mine):12.4g}"
        for other in beside:
            ratios = [theirs / own for theirs, own in zip(values[other], mine, strict=True)]
            line += f"{statistics.median(ratios):12.3f} ({min(ratios):.3f} to {max(ratios):.3f})".rjust(32)
        print(line)


def matmul_rate(device: str) -> float:
    """Floating-point operations per second of matrix products of MiniLM's shape, the best of five times 40."""
    x, w = torch.randn(1024, 384, device=device), torch.randn(384, 1536, device=device)
    work = 2 * 1024 * 384 * 1536 * 40

    def products() -> None:
        for _ in range(40):
            x @ w

    return max(work / timed(products, device) for _ in range(5))


def operations(model: nn.Module) -> int:
    """Of one token: two for each weight of the layers' frozen linear maps, forward and once more backward."""
    layers = (
        m for name, m in model.named_modules() if type(m) is nn.Linear and "encoder" in name and "lora" not in name
    )
    return sum(4 * layer.weight.numel() for layer in layers)


def training(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Seconds of an epoch."""
    device, extra = options.device, ("data.validation_rows=32", f"data.train_rows={options.rows}")
    begun = {method: began(method, device, folder, *extra) for method in options.methods or METHODS}
    first, beside = begun["none"], () if options.methods else PLAIN
    plains = {name: plain_trainer(first, "grouped" in name, str(folder / "plain")) for name in beside}
    rates: list[float] = []

    def epoch(trainer: PlainTrainer) -> Callable[[], float]:
        def work() -> float:
            rates.append(matmul_rate(device))
            return timed(trainer.train, device)

        return work

    trainers = {**plains, **{f"{name}, once more": plains[name] for name in beside[1:]}}
    trainers |= {f"hkft {method}": each.trainer for method, each in begun.items()}
    for trainer in trainers.values():
        trainer.args.max_steps = 3
        trainer.train()
        trainer.args.max_steps = -1
    seconds = in_turns({name: epoch(trainer) for name, trainer in trainers.items()}, options.rounds, warm=True)
    rows = first.material.examples["train"]
    tokens = sum(rows["length"][:])
    show(f"training, an epoch of {len(rows)} rows, {tokens:,} tokens", seconds, (*beside, "hkft none"), "seconds")
    rate, work = statistics.median(rates), operations(first.trainer.model)
    print(f"matrix products: {rate / 1e9:.0f} GFLOP/s; a token takes {work / 1e6:.1f} MFLOP")
    for name in ("hkft none", *beside):
        per_second = tokens / statistics.median(seconds[name])
        samples = len(rows) / statistics.median(seconds[name])
        share = per_second * work / rate
        print(
            f"{name:28}{samples:8.1f} samples/s {per_second:8,.0f} tokens/s {share:8.1%} of the matrix products' rate"
        )
    return {"seconds": seconds, "matmul": rates}


def profile(options: argparse.Namespace, folder: Path) -> dict[str, float]:
    """Share of each kind of work in the time of the processor, or of the GPU."""
    begun = began("none", options.device, folder, "data.train_rows=640", "data.validation_rows=32")
    trainer, rank = begun.trainer, begun.recipe.lora["r"]
    batches = [trainer._prepare_inputs(batch) for batch in trainer.get_train_dataloader()]

    def step(batch: Any) -> None:
        trainer.compute_loss(trainer.model, dict(batch)).backward()
        trainer.model.zero_grad(set_to_none=True)

    trainer.model.train()
    for batch in batches[:3]:
        step(batch)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if options.device == "cuda" else [])]
    with torch.profiler.profile(activities=activities, record_shapes=True) as seen:
        for batch in batches:
            step(batch)
    found: dict[str, float] = {}
    for event in seen.key_averages(group_by_input_shape=True):
        low = any(rank in shape for shape in event.input_shapes or ())
        kind = next((kind for sign, kind in KINDS.items() if sign in event.key), "other")
        kind = "LoRA's products" if kind == "products with the base's weights" and low else kind
        took = event.self_device_time_total if options.device == "cuda" else event.self_cpu_time_total
        found[kind] = found.get(kind, 0.0) + took
    whole = sum(found.values())
    print("\nprofile of a training step, method none")
    for kind, took in sorted(found.items(), key=lambda each: -each[1]):
        print(f"{kind:36}{took / whole:8.1%}")
    return {kind: took / whole for kind, took in found.items()}


def evaluation(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Seconds of a look at the validation rows."""
    extra = ("data.train_rows=64", "data.validation_rows=null")
    begun = began("none", options.device, folder, *extra)
    rows, trainer = begun.material.examples["validation"], begun.trainer
    plain = plain_trainer(begun, False, str(folder / "plain"))
    size = trainer.args.per_device_eval_batch_size

    def evaluated(batch: int) -> Callable[[], float]:
        def work() -> None:
            plain.args.per_device_eval_batch_size = batch
            plain.evaluate()

        return lambda: timed(work, options.device)

    def looked() -> None:
        settings: dict[str, Any] = {"write_text": False, "looking": "", "writing": ""}
        look(trainer.model, begun.material.tokenizer, rows, begun.recipe, batch_size=size, **settings)

    contenders = {
        "Trainer.evaluate": evaluated(8),
        f"Trainer.evaluate, {size}": evaluated(size),
        "hkft": lambda: timed(looked, options.device),
    }
    seconds = in_turns(contenders, options.rounds)
    show(f"evaluation, {len(rows)} rows", seconds, tuple(contenders)[:2], "seconds")
    return seconds


def tokenisation(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Seconds of the training rows."""
    from hkft.data import splits

    recipe = recipe_of("none", "cpu", "data.train_rows=null", "data.validation_rows=null")
    found = splits.load(recipe, silent)
    rows, tokenizer = found.train, build.tokenizer(recipe)
    assert rows is not None
    name, cache = "HKFT_CACHE", folder / "cache"

    def mapped() -> None:
        rows.map(
            lambda batch: tokenizer(batch["text"], truncation=True, max_length=64),
            batched=True,
            load_from_cache_file=False,
            keep_in_memory=True,
            new_fingerprint=str(time.time()),
        )

    def hkfts() -> None:
        tokenise(rows, tokenizer, 64, silent, content=found.fingerprints["train"])

    def first() -> float:
        os.environ[name] = str(cache / str(len(list(cache.iterdir()))))
        Path(os.environ[name]).mkdir()
        return timed(hkfts, "cpu")

    def second() -> float:
        os.environ[name] = str(folder / "again")
        hkfts()
        return timed(hkfts, "cpu")

    cache.mkdir()
    before = os.environ.get(name)
    contenders = {"datasets.map": lambda: timed(mapped, "cpu"), "hkft, first": first, "hkft, second": second}
    seconds = in_turns(contenders, options.rounds)
    os.environ.pop(name, None)
    if before is not None:
        os.environ[name] = before
    show(f"tokenisation, {len(rows)} rows", seconds, ("datasets.map",), "seconds")
    return seconds


def memory(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Bytes at the peak of a step on the longest batch, the same rows for all."""
    device = torch.device(options.device)
    begun = {method: began(method, options.device, folder, "data.train_rows=640") for method in METHODS}
    rows = begun["none"].material.examples["train"]
    longest = sorted(range(len(rows)), key=lambda row: -rows[row]["length"])[:32]
    trainers = {"plain": plain_trainer(begun["none"], False, str(folder / "plain"))}
    trainers |= {f"hkft {method}": each.trainer for method, each in begun.items()}
    found: Values = {}
    for name, trainer in trainers.items():
        collate = begun["none"].trainer.data_collator
        batch = trainer._prepare_inputs(collate([rows[row] for row in longest]))
        trainer.model.to(device).train()

        def step(trainer: Any = trainer, batch: Any = batch) -> None:
            trainer.compute_loss(trainer.model, dict(batch)).backward()
            trainer.model.zero_grad(set_to_none=True)

        for _ in range(3):
            step()
        found[name] = [peak_bytes(step, device) / 1e6]
    show("memory of a step on the longest batch", found, ("plain",), "MB")
    return found


def start(options: argparse.Namespace, folder: Path) -> list[dict[str, float]]:
    """Seconds until hkft answers and trains."""
    import startup

    print("\nstart-up")
    rounds = [startup.one_round(folder) for _ in range(min(options.rounds, 3) + 1)][1:]
    startup.show(rounds)
    return rounds


def score(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Accuracy and loss on validation after three epochs, hkft's less plain's."""
    import scipy.stats

    differences: dict[str, list[float]] = {"accuracy": [], "loss": []}
    for seed in range(1, options.seeds + 1):
        begun = began("none", options.device, folder, f"seed={seed}", "train.num_train_epochs=3")
        plain = plain_trainer(begun, False, str(folder / "plain"), 3, seed)
        found = []
        for trainer in (begun.trainer, plain):
            trainer.train()
            rows, settings = begun.material.examples["validation"], {"write_text": False, "looking": "", "writing": ""}
            seen = look(trainer.model, begun.material.tokenizer, rows, begun.recipe, batch_size=64, **settings)
            found.append(seen.metrics())
        for name, each in differences.items():
            each.append(found[0][name] - found[1][name])
        print(f"seed {seed}: " + ", ".join(f"{n} {found[0][n]:.4f} against {found[1][n]:.4f}" for n in differences))
    for name, each in differences.items():
        mean, spread = statistics.mean(each), statistics.stdev(each) / len(each) ** 0.5
        low, high = scipy.stats.t.interval(0.95, len(each) - 1, mean, spread)
        print(f"{name}, hkft less plain: {mean:+.4f} (95 % interval {low:+.4f} to {high:+.4f})")
    return differences


PARTS = {each.__name__: each for each in (training, profile, evaluation, tokenisation, memory, start, score)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", help=", ".join(PARTS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", type=int, default=1280, help="of an epoch, default 1280")
    parser.add_argument(
        "--methods", type=lambda given: given.split(","), help="of training: these alone; none among them"
    )
    parser.add_argument("--seeds", type=int, default=3, help="of score, default 3")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the seconds and bytes there")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.disable(logging.WARNING)
    random.seed(1)
    found: dict[str, Any] = {}
    for name in options.parts or [part for part in PARTS if part != "score"]:
        with tempfile.TemporaryDirectory() as folder:
            found[name] = PARTS[name](options, Path(folder))
    machine = torch.cuda.get_device_name() if options.device == "cuda" else f"{platform.machine()} CPU"
    print(f"\n{machine}, {torch.get_num_threads()} threads, torch {torch.__version__}, {options.rounds} rounds")
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
