"""How numbers are written for people. Pure functions, shared by the screen, plain lines and the report."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hkft.diagnostics.gap import gap, main_metric
from hkft.events import Evaluated, Started

OBJECTIVE = "not comparable with the losses above"


def number(value: float | None) -> str:
    """A loss, a metric, a rate: three decimals, or three digits where those say nothing; a dash for nothing."""
    if value is None or math.isnan(value):
        return "-"
    return f"{value:z.3f}" if abs(value) < 1e-15 or 0.001 <= abs(value) < 1000 else f"{value:.3g}"


def duration(seconds: float) -> str:
    """`m:ss`, or `h:mm:ss` from an hour on."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def memory(size: float) -> str:
    """Bytes in MiB, or in GiB from one on."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"


def parameters(trainable: int, total: int) -> str:
    return f"{trainable:,} of {total:,} parameters trained ({trainable / total:.2%})"


def setting(started: Started) -> tuple[str, str]:
    """What is trained on what, and how much of it: two lines."""
    head = (
        f"{started.recipe}: {started.method} on {started.model}, {started.task}, {started.device}, seed {started.seed}"
    )
    rows = f"{started.train_rows:,} training rows, {started.validation_rows:,} validation, {started.probe_rows:,} probe"
    length = f"{started.total_steps:,} steps, {started.epochs:g} epochs"
    return head, f"{rows}; {length}; {parameters(started.trainable_parameters, started.total_parameters)}"


def evaluation(event: Evaluated, total_steps: int | None, metric: str | None) -> str:
    """One evaluation as one line."""
    step = f"step {event.step}/{total_steps}" if total_steps else f"step {event.step}"
    names = ["loss", *([metric] if metric and metric in event.validation else [])]
    sides = [
        f"{name} probe {number(event.train_probe.get(name))}, validation {number(event.validation.get(name))}, "
        f"gap {number(event.gap.get(name))}"
        for name in names
    ]
    return "; ".join(
        [f"{step}, epoch {event.epoch:.2f}: {sides[0]}", *sides[1:], *(["best so far"] if event.best else [])]
    )


def objective(value: float, method: str) -> str:
    """The train-mode objective, named so that nobody takes it for a probe or a validation loss."""
    mode = "train mode" if method == "none" else "train mode, with dropout"
    return f"objective {number(value)} ({mode}; {OBJECTIVE})"


def parts(look: Evaluated) -> list[str]:
    """What the loss of a look is made of, each part by its name; see `hkft.diagnostics.decomposition`."""
    told = []
    if look.gap_interval:
        low, high = look.gap_interval
        told.append(f"gap {number(look.gap.get('loss'))} ({number(low)} to {number(high)})")
    told += [
        f"{name} {number(side['loss'])}"
        for name, side in (("net gain", look.net_gain), ("regret", look.regret))
        if side
    ]
    if look.regularisation:
        told.append(f"regularisation {number(look.regularisation['total'])}")
    return told


def added(regularisation: Mapping[str, float]) -> str:
    """What regularisation consists of; smoothing where labels are softened."""
    names = ["dropout", *(["smoothing"] if regularisation.get("smoothing") else []), "consistency"]
    return ", ".join(f"{name} {number(regularisation[name])}" for name in names if name in regularisation)


def metric_of(summary: Mapping[str, Any]) -> str:
    """The metric that a run is told by: the one that chose its best step, or its task's."""
    return summary.get("metric") or main_metric(summary["task"])


def figures(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The key figures of a run, as label and value; what the summary does not hold is left out."""
    pairs: list[tuple[str, str]] = []
    for label, moment in (("best", "best"), ("final", "final")):
        if summary.get(moment):
            at = summary["best_step"] if moment == "best" else summary.get("final_step", summary["steps"])
            pairs.append((f"{label}, step {at}", _sides(summary[moment], ("loss", metric_of(summary)))))
    if (
        summary.get("best") and summary["task"] == "generation"
    ):  # what a decoder is told by beside loss and token accuracy
        told = [name for name in summary["best"]["validation"] if name not in ("loss", "perplexity", "token_accuracy")]
        for label, names in (("perplexity", ["perplexity"]), (f"text of {summary.get('text_prompts')} prompts", told)):
            if text := _sides(summary["best"], names):
                pairs.append((f"{label}, step {summary['best_step']}", text))
    if summary.get("train_runtime_s") is not None:
        pairs.append(("training time", duration(summary["train_runtime_s"])))
    speeds = [
        f"{summary[key]:,.0f} {unit}"
        for key, unit in (("train_samples_per_s", "samples/s"), ("train_tokens_per_s", "tokens/s"))
        if summary.get(key) is not None
    ]
    if speeds:
        pairs.append(("speed", ", ".join(speeds)))
    if summary.get("peak_memory_bytes"):
        pairs.append(("peak memory", memory(summary["peak_memory_bytes"])))
    if summary.get("trainable_parameters") is not None:
        pairs.append(("trainable parameters", f"{summary['trainable_parameters']:,}"))
    if summary.get("quantised"):
        pairs.append(("quantised", quantised(summary["quantised"])))
    return pairs


def quantised(found: Mapping[str, Any]) -> str:
    """What of the base was quantised, and how."""
    double = ", double quantisation" if found["double_quantisation"] else ""
    how = f"{found['kind']} ({found['quant_type']}{double}, computed in {found['compute_dtype']})"
    kept = f"; {', '.join(found['kept'])} and what is no linear layer are not" if found["kept"] else ""
    return f"{found['layers']} linear layers to {how}, {memory(found['bytes'])}{kept}"


def _sides(moment: Mapping[str, Mapping[str, float]], names: Sequence[str]) -> str:
    """What validation has of these numbers, and their gaps; empty where it has none."""
    validation, gaps = moment["validation"], gap(moment["train_probe"], moment["validation"])
    told = [name for name in names if name in validation]
    return ", ".join(f"validation {name} {number(validation[name])} (gap {number(gaps.get(name))})" for name in told)


def outcome(run: str, summary: Mapping[str, Any]) -> str:
    """A run among others, as one line. A cell of a grid goes by its folder's name: two rows may have one method."""
    cell = re.fullmatch(r"(.+)-s\d+-[0-9a-f]{6}", Path(run).name)
    name, metric = f"{cell[1] if cell else summary['method']}, seed {summary['seed']}", metric_of(summary)
    if not summary.get("best"):
        return f"{name}: {summary['status']}"
    best, end = summary["best"]["validation"], summary["gap"]["final"]["loss"]
    facts = [
        f"best validation loss {number(best['loss'])}",
        *([f"{metric} {number(best[metric])}"] if metric in best else []),
        f"gap at the end {number(end)}",
        summary["verdict"]["name"],
        duration(summary["train_runtime_s"]),
    ]
    return f"{name}: {', '.join(facts)}"


SITE_COLUMNS = ("position", "pattern", "layers", "calls", "rate", "measured", "rescued", "time")


def site_rows(sites: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """What fired, a row per site under `SITE_COLUMNS`."""
    return [
        [
            site["position"],
            site["pattern"],
            ranges(site["layers"]),
            f"{site['calls']:,}",
            f"{site['expected']:.4f}",
            _measured(site),
            "-" if site.get("protected") is None else f"{site['protected']:.1%}",
            "-" if site.get("cost") is None else f"x {site['cost']:.1f}",
        ]
        for site in sites
    ]


def ranges(layers: Sequence[int]) -> str:
    """Layer numbers with runs drawn together: [0, 1, 2, 5] is "0-2, 5"; a dash for none."""
    runs: list[list[int]] = []
    for layer in sorted(layers):
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs) or "-"


def next_steps(run: str, summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What to do after a run, and what to type: what was interrupted goes on, what the verdict asks for, and why it does."""
    folder = shlex.quote(run)
    steps = []
    if summary["status"] == "interrupted":
        steps.append(("go on from here", f"hkft train --recipe {folder}/resolved.yaml --output {folder} --resume"))
    if summary.get("best"):
        steps += [(step["why"], step["command"]) for step in summary["verdict"].get("next", ())]
        steps.append(("what the verdict rests on", f"hkft diagnose {folder}"))
    return steps


def _measured(site: Mapping[str, Any]) -> str:
    """The drop rate that was counted; LoRA's own dropout fires uncounted, for PyTorch draws its masks."""
    if not site["calls"]:
        return "did not fire"
    return "not counted" if site["measured"] is None else f"{site['measured']:.4f}"
