"""What a run costs as it grows: in rows, in the length of a sequence, in the vocabulary.

    python tests/benchmarks/scale.py rows [--rows 10000,100000,1000000] [--folder DIR] [--json FILE]
    python tests/benchmarks/scale.py length [--lengths 512,1024,2048,4096,8192] [--json FILE]
    python tests/benchmarks/scale.py vocabulary [--vocabularies 8000,32000,128000,256000] [--json FILE]

rows: everything before there is a model. A csv of made sentences of 5 to 15 words, two classes, a tenth of it validation.
Measured is what a run does with it: reading, canonical rows, drawing the split, duplicates, fingerprints, tokenising (a
word-level tokenizer built here, at most 32 tokens), the probe, and writing splits.json. Once with an empty cache ("first start"), and once more ("second start"),
each in a process of its own. Time is from after the imports, and beside it that of the processors ("cpu"), which tells
more where others use the machine; the file lies in the page cache. Looking for near-duplicates is part of it, and costs the
same from 20,000 rows a side on. 10,000,000 rows are a csv of 0.9 GB and a few GB of cache: --folder says where, and nothing
is left there.

Memory, above what the process held after its imports:
  peak      the largest resident set (ru_maxrss), in which pages of files that are mapped count as well
  private   the largest resident set less the pages of files, sampled every 5 ms: what the system cannot take back

length, vocabulary: a random Llama (two layers, hidden 128, LoRA on q_proj and v_proj) on the CPU, and a batch of rows whose
second half is completion: one row of each length, vocabulary 4,096; two rows of 512 tokens for each vocabulary. A step is
forward and backward pass of hkft's own objective, without the optimizer, under no method, HiddenKey- and HiddenKey; "look"
is an evaluation of the same rows. Shown are the median time of the processors per token of `--repeats` steps, the peak of
what PyTorch's allocator holds during a step above what it held before, and of both the ratio to the row before; beside them
what [B,L,V] logits would take in float32, which nothing here holds.

pytest does not collect this file.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

from footprint import measured

SYLLABLES = [a + b for a in "bdfghklmnprst" for b in ("a", "e", "in", "or")]
WORDS = [a + b + c for a in SYLLABLES for b in SYLLABLES for c in ("", "s", "ly", "ness")]
MARKS = ("good", "bad")


def make(path: Path, rows: int) -> None:
    """The csv, a block of lines at a time."""
    draw = random.Random(7)
    with path.open("w", encoding="utf-8") as file:
        file.write("text,label\n")
        for start in range(0, rows, 10_000):
            lines = []
            for row in range(start, min(start + 10_000, rows)):
                label = row % 2
                words = draw.choices(WORDS, k=draw.randint(5, 15))
                lines.append(f"{' '.join(words)} {MARKS[label]} {row % 1000},{MARKS[label]}\n")
            file.write("".join(lines))


def tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS, *MARKS]
    core = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="[PAD]", unk_token="[UNK]", model_max_length=512)


def start_run(folder: Path) -> None:
    """What a run does before it loads its model, by the same functions."""
    from hkft.folder import write_json
    from hkft.model import build
    from hkft.recipe import load
    from hkft.training.prepare import prepare

    words = tokenizer()
    build.tokenizer = lambda recipe: words
    material = prepare(load(folder / "recipe.yaml"), lambda event: None)
    write_json(folder / "splits.json", {**material.ids, "labels": material.labels})


def in_process(folder: Path, *given: str) -> dict[str, float]:
    """This script once more, in a process that inherits no memory worth mention, with a cache of its own."""
    environment = {**os.environ, "HKFT_CACHE": str(folder / "cache")}
    command = [sys.executable, __file__, *given, "--measure", "--folder", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.strip().splitlines()[-1])


def rows(counts: list[int], place: Path | None) -> list[dict[str, Any]]:
    """A row of the table for each count: first start, second start."""
    print(f"{'':22}   {'first start':>33}   {'second start':>33}")
    columns = f"{'s':>7} {'cpu s':>7} {'peak MB':>8} {'private':>8}"
    print(f"{'rows':>12}{'csv':>10}   {columns}   {columns}{'cache':>9}")
    found = []
    for count in counts:
        with tempfile.TemporaryDirectory(dir=place) as name:
            folder = Path(name)
            make(folder / "rows.csv", count)
            (folder / "recipe.yaml").write_text(RECIPE.format(train=folder / "rows.csv"), encoding="utf-8")
            one: dict[str, Any] = {"rows": count, "csv": (folder / "rows.csv").stat().st_size}
            one["first"], one["second"] = in_process(folder, "rows"), in_process(folder, "rows")
            one["cache"] = sum(path.stat().st_size for path in folder.glob("cache/**/*") if path.is_file())
            shutil.rmtree(folder / "cache", ignore_errors=True)
        found.append(one)
        parts = "   ".join(shown(one[start]) for start in ("first", "second"))
        print(f"{count:>12,}{one['csv'] / 1e6:>7.0f} MB   {parts}{one['cache'] / 1e6:>6.0f} MB", flush=True)
    return found


def growing(part: str, values: list[int], repeats: int) -> list[dict[str, Any]]:
    """A row of the table for each value and each of `WAYS`."""
    print(f"{part:>12}  {'':<11}{'us/token':>9}{'ratio':>7}{'peak MB':>10}{'ratio':>7}{'[B,L,V] MB':>12}")
    found: list[dict[str, Any]] = []
    for value in values:
        rows, length, vocabulary = (1, value, 4096) if part == "length" else (2, 512, value)
        before = {one["way"]: one for one in found[-len(WAYS) :]}
        for way in WAYS:
            seconds, peak = step_of(way, rows, length, vocabulary, repeats)
            one = {part: value, "way": way, "us": seconds / (rows * length) * 1e6, "bytes": peak}
            found.append(one)
            ratios = [f"{one[key] / before[way][key]:.2f}" if before else "" for key in ("us", "bytes")]
            logits = rows * length * vocabulary * 4
            print(
                f"{value:>12,}  {way:<11}{one['us']:>9.0f}{ratios[0]:>7}{peak / 1e6:>10.0f}{ratios[1]:>7}{logits / 1e6:>12.0f}",
                flush=True,
            )
    return found


WAYS = ("none", "hiddenkey-", "hiddenkey", "look")


def step_of(way: str, rows: int, length: int, vocabulary: int, repeats: int) -> tuple[float, int]:
    """(median seconds of the processors, peak bytes) of a training step under a method, or of a look."""
    import datasets
    import torch
    from attention import peak_bytes
    from decoder import IGNORED, model_of, padded

    import hkft
    from hkft.evaluation.completions import look
    from hkft.model.vocabulary import Vocabulary
    from hkft.training.objective import token_objective

    device, draw = torch.device("cpu"), random.Random(7)
    model = model_of(vocabulary, 128, 2, device)
    tokens = [[draw.randrange(3, vocabulary) for _ in range(length)] for _ in range(rows)]
    labels = [[IGNORED] * (length // 2) + row[length // 2 :] for row in tokens]
    given = {"input_ids": tokens, "attention_mask": [[1] * length] * rows, "labels": labels}
    examples = [dict(zip(given, row, strict=True)) for row in zip(*given.values(), strict=True)]
    batch = padded(examples)
    told = {"id": list(range(rows)), "length": [length] * rows, "prompt": [""] * rows, "completion": [""] * rows}
    dataset = datasets.Dataset.from_dict({**given, **told})
    method = hkft.METHODS["none" if way == "look" else way].with_rate(0.1)

    def step() -> None:
        if way == "look":
            look(model, dataset, padded, batch_size=rows)
        else:
            token_objective(model, head, batch, method.consistency).loss.backward()
            model.zero_grad(set_to_none=True)

    with hkft.attach(model, method):
        head = Vocabulary(model)
        step()
        peak = peak_bytes(step, device)
        times = [time.process_time()]
        for _ in range(repeats):
            step()
            times.append(time.process_time())
        return statistics.median(b - a for a, b in pairwise(times)), peak


def shown(one: dict[str, float]) -> str:
    return f"{one['seconds']:>7.1f} {one['cpu']:>7.1f} {one['peak'] / 1e6:>8.0f} {one['private'] / 1e6:>8.0f}"


RECIPE = """\
# scale: made sentences
model: {{name: made, device: cpu}}
data: {{train: {train}, validation: 0.1, text: text, label: label, max_length: 32}}
lora: {{r: 4, lora_alpha: 8, target_modules: [query, value]}}
dropout: {{method: none}}
train: {{learning_rate: 1.0e-2, num_train_epochs: 1, per_device_train_batch_size: 16}}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=["rows", "length", "vocabulary"], help="what grows")
    parser.add_argument("--rows", default="10000,100000,1000000", help="default 10000,100000,1000000")
    parser.add_argument("--lengths", default="512,1024,2048,4096,8192", help="tokens, to 8192 by default")
    parser.add_argument("--vocabularies", default="8000,32000,128000,256000", help="to 256000 by default")
    parser.add_argument("--repeats", type=int, default=3, help="timed steps of each, default 3")
    parser.add_argument("--folder", type=Path, help="for what is made, default the system's temporary one")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write seconds and bytes there")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        import hkft.training.prepare  # noqa: F401

        return print(json.dumps(measured(lambda: start_run(options.folder))))
    given = {"rows": options.rows, "length": options.lengths, "vocabulary": options.vocabularies}[options.part]
    values = [int(value) for value in given.split(",")]
    found = rows(values, options.folder) if options.part == "rows" else growing(options.part, values, options.repeats)
    print(f"{platform.machine()} CPU, {os.cpu_count()} cores")
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))
    return None


if __name__ == "__main__":
    main()
