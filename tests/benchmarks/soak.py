"""Many short trainings in one process, as a grid makes them: what each leaves behind.

    python tests/benchmarks/soak.py [--runs 500] [--every 50] [--json FILE]

A random BERT of two layers on made sentences, four methods, seed by seed, each with a look at its test rows, through the
comparison's own runner, which shares rows and weights between its runs. After every so many runs, the garbage collected:
  rss            resident memory of the process, and its slope by run, from the second count on
  threads, fds   of the process; children: processes that it has; temporary: files in its folder for them
  modules        living nn.Modules, and hooks on them; tensors, objects: those that the garbage collector knows
  weak           entries of hkft's weak dictionaries; attention: functions that are registered with transformers
  handlers       of signals that are not those of the beginning; at exit, filters: what is called at exit, and of warnings
pytest does not collect this file; a test of the suite runs it in short.
"""

from __future__ import annotations

import argparse
import atexit
import gc
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
import warnings
from pathlib import Path
from typing import Any

METHODS = ("none", "hiddenkey", "dropkey", "lora-dropout")
RECIPE = """\
model: {{name: {model}, device: cpu}}
data: {{train: {rows}, validation: 0.25, test: 0.25, text: text, label: label, max_length: 16}}
lora: {{r: 4, lora_alpha: 8, target_modules: [query, value]}}
dropout: {{method: hiddenkey, rate: 0.1, weight: 0.5}}
train: {{learning_rate: 1.0e-2, max_steps: 3, per_device_train_batch_size: 8}}
diagnostics: {{evals_per_epoch: 1}}
"""


def recipe_in(folder: Path) -> Path:
    """A recipe with all that it names, in a folder."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", *"the a film was and with of its very plot actor scene good bad".split()]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(
        folder / "model"
    )
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    BertModel(BertConfig(vocab_size=len(words), max_position_embeddings=32, **size)).save_pretrained(folder / "model")
    draw = random.Random(7)
    rows = [f"{' '.join(draw.sample(words[2:-2], 5))} {words[-2 + row % 2]} {row},{row % 2}" for row in range(80)]
    (folder / "rows.csv").write_text("\n".join(["text,label", *rows]) + "\n", encoding="utf-8")
    recipe = folder / "soak.yaml"
    recipe.write_text(RECIPE.format(model=folder / "model", rows=folder / "rows.csv"), encoding="utf-8")
    return recipe


def counted(before: dict[int, Any]) -> dict[str, int]:
    """before: the handlers of signals."""
    import logging

    import psutil
    import torch
    from torch import nn
    from transformers import AttentionInterface, AttentionMaskInterface

    from hkft.dropout import attach
    from hkft.model import first_token, vocabulary

    for _ in range(3):
        gc.collect()
    process, living = psutil.Process(), gc.get_objects()
    modules = [each for each in living if issubclass(type(each), nn.Module)]  # isinstance would ask proxies, which warn
    kept = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    found = {
        "rss": process.memory_info().rss,
        "threads": process.num_threads(),
        "python threads": threading.active_count(),
        "fds": process.num_fds(),
        "children": len(process.children()),
        "temporary": sum(1 for _ in Path(tempfile.gettempdir()).iterdir()),
        "modules": len(modules),
        "hooks": sum(len(getattr(module, name)) for module in modules for name in kept),
        "tensors": sum(type(each) in (torch.Tensor, nn.Parameter) for each in living),
        "objects": len(living),
        "weak": len(attach._LIVE) + len(first_token._places) + len(vocabulary._PROVEN),
        "attention": len(AttentionInterface._global_mapping) + len(AttentionMaskInterface._global_mapping),
        "handlers": sum(signal.getsignal(number) is not handler for number, handler in before.items()),
        "at exit": atexit._ncallbacks(),
        "filters": len(warnings.filters),
        "log handlers": sum(len(getattr(each, "handlers", ())) for each in logging.Logger.manager.loggerDict.values()),
        "environment": len(os.environ),
    }
    del living, modules
    return found


def soak(runs: int, every: int, folder: Path) -> list[dict[str, int]]:
    """What is left after every so many runs, the number of them as "runs"."""
    from hkft import api
    from hkft.cli.shared import quiet
    from hkft.comparison import grid
    from hkft.dropout import selfcheck
    from hkft.events import silent
    from hkft.recipe import load

    quiet(silent)
    selfcheck.BUDGET = 0.0  # the methods are timed in one round
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    seeds = range(1, runs // len(METHODS) + 1)
    cells = grid.cells(load(recipe_in(folder)), METHODS, seeds)
    runner, found = api._runner(), []
    print(f"{'runs':>6} {'s':>6} {'MB':>7}", flush=True)
    began = time.perf_counter()
    for start in range(0, len(cells), every):
        outcomes = grid.run(cells[start : start + every], folder / "grid", runner)
        assert all(outcome.status == "finished" for outcome in outcomes), [outcome.error for outcome in outcomes]
        shutil.rmtree(folder / "grid")
        del outcomes
        found.append({"runs": start + every, **counted(handlers)})
        told = " ".join(f"{name} {number:,}" for name, number in found[-1].items() if name not in ("runs", "rss"))
        seconds = time.perf_counter() - began
        print(f"{start + every:6} {seconds:6.0f} {found[-1]['rss'] / 1e6:7.1f}  {told}", flush=True)
    return found


def slope(found: list[dict[str, int]]) -> float:
    """Bytes by run, the first count left out, by least squares."""
    runs, sizes = [each["runs"] for each in found[1:]], [each["rss"] for each in found[1:]]
    middle, mean = sum(runs) / len(runs), sum(sizes) / len(sizes)
    above = sum((run - middle) * (size - mean) for run, size in zip(runs, sizes, strict=True))
    return above / (sum((run - middle) ** 2 for run in runs) or 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=500, help=f"a multiple of {len(METHODS)}")
    parser.add_argument("--every", type=int, default=50, help="count after so many")
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        os.environ["HKFT_CACHE"] = str(folder / "cache")
        (folder / "tmp").mkdir()
        tempfile.tempdir = os.environ["TMPDIR"] = str(folder / "tmp")
        found = soak(asked.runs, asked.every, folder)
    print(f"memory grows by {slope(found) / 1e3:.1f} kB a run")
    if asked.json:
        asked.json.write_text(json.dumps({"slope": slope(found), "counts": found}))


if __name__ == "__main__":
    sys.exit(main())
