"""`hkft diagnose` on the terminal: the curve, the verdict, what it rests on, what to do next."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from operator import itemgetter
from statistics import fmean
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.constrain import Constrain
from rich.panel import Panel
from rich.text import Text

from hkft.view import words
from hkft.view.chart import SMALLEST, Series, chart
from hkft.view.console import is_plain, output, say
from hkft.view.screen import PROBE, REPORT_CHART, VALIDATION, VERDICT_STYLES, WIDEST, next_steps
from hkft.view.tables import plain_table, rich_table
from hkft.view.words import number

Record = Mapping[str, Any]


def show_diagnosis(found: Record, title: str, console: Console | None = None) -> None:
    """Print what `hkft.diagnostics.diagnosis.diagnose` gives: as lines, or on a terminal with the curve drawn."""
    console = console or output()
    verdict, facts = found["verdict"], _facts(found)
    count = len(found["curve"])
    head = f"{title}: {found['source']}, {count} evaluation{'s' * (count != 1)}"
    if is_plain(console):
        say(console, f"{head}\nverdict: {verdict['name']} ({verdict['confidence']} confidence)\n{verdict['text']}")
        if facts:
            say(console, plain_table(["", "", ""], facts))
        for line in [*(f"note: {note}" for note in found["notes"]), *_next(verdict["next"])]:
            say(console, line)
        return
    width = min(console.width, WIDEST)
    parts: list[RenderableType] = [Text(head, style="bold"), Text()]
    if len(found["curve"]) > 1:
        parts += [*_curve(found, max(width, SMALLEST[0]), console.options.ascii_only), Text()]
    style = VERDICT_STYLES.get(verdict["name"], "red")
    name = Text(f"{verdict['name']}, {verdict['confidence']} confidence", style=f"bold {style}")
    parts.append(Panel(Text(verdict["text"]), title=name, title_align="left", border_style=style))
    if facts:
        parts += [Text(), rich_table(["what", "", "in words"], facts)]
    parts += [Text(note, style="dim") for note in found["notes"]]
    console.print(Constrain(Group(*parts, Text()), width))
    for line in next_steps([(step["why"], step["command"]) for step in verdict["next"]]):
        console.print(line, soft_wrap=True)


def _next(steps: Sequence[Record]) -> list[str]:
    return [f"next: {step['why']}" + (f": {step['command']}" if step["command"] else "") for step in steps]


def _curve(found: Record, width: int, ascii_only: bool) -> Sequence[Text]:
    measured = "probe loss" if found["source"] == "a run of hkft's" else "logged train loss"
    lines = [
        Series(name, [(point["step"], point[key]) for point in found["curve"]], style, letter, dotted=dotted)
        for name, key, style, letter, dotted in (
            (measured, "train_loss", PROBE, "p", True),
            ("validation loss", "validation_loss", VALIDATION, "v", False),
        )
    ]
    looks = [(point["step"], point["validation_loss"]) for point in found["curve"]]
    best = min((look for look in looks if math.isfinite(look[1])), key=itemgetter(1), default=None)
    return chart(lines, width, REPORT_CHART, best=best, ascii_only=ascii_only)


def _facts(found: Record) -> list[list[str]]:
    """What the verdict rests on: a name, the numbers, and what they mean."""
    facts: list[list[str]] = []
    if found.get("decomposition"):
        facts += _parts(found)
    if found.get("calibration"):
        probe, validation = (found["calibration"][split] for split in ("train_probe", "validation"))
        facts.append(
            [
                "calibration error",
                f"{number(validation['calibration_error'])}, probe {number(probe['calibration_error'])}",
                f"of validation, at the best step; with a temperature of {number(validation['temperature'])} "
                f"{number(validation['calibration_error_after'])}",
            ]
        )
    if found.get("memorisation"):
        auc = found["memorisation"]["auc"]
        facts.append(
            [
                "told apart",
                f"{number(auc['value'])} ({number(auc['low'])} to {number(auc['high'])})",
                f"AUC of telling training rows from validation rows by their loss, {_before(found['memorisation'])}",
            ]
        )
        facts.append(["rows", *_rows(found["memorisation"])])
    if near := found.get("near_duplicates"):
        what = "validation rows that nearly stand in train, of those compared"
        facts.append(["near-duplicates", f"{near['found']:,} of {near['compared']:,}", what])
    if found.get("adapter"):
        facts += _adapter(found["adapter"])
    return facts


def _parts(found: Record) -> list[list[str]]:
    last = found["decomposition"][-1]
    added, interval = last["regularisation"], found["gap_intervals"][-1] if found["gap_intervals"] else None
    between = f" ({number(interval['low'])} to {number(interval['high'])})" if interval else ""
    lost = last["regret_interval"]
    since = f" ({number(lost[0])} to {number(lost[1])})" if lost else ""
    rows = [
        ["gap", number(last["gap"]) + between, "validation less probe, both in eval mode"],
        ["net gain", number(last["net_gain"]), "validation loss before training less now"],
        ["regret", number(last["regret"]) + since, "validation loss now less its best"],
    ]
    if added:
        rows.append(["regularisation", number(added["total"]), f"objective less probe loss: {words.added(added)}"])
    return rows


def _before(memorisation: Record) -> str:
    before = memorisation["auc_before"]
    return f"{number(before['value'])} before training" if before else "0.5: not at all"


def _rows(memorisation: Record) -> tuple[str, str]:
    lists = (("memorised", "learned by heart"), ("forgotten", "forgotten"), ("suspicious", "perhaps mislabelled"))
    counts = [f"{memorisation['counts'][name]} {said}" for name, said in lists]
    return ", ".join(counts), "of probe, of validation, of probe; report.html shows the first ten of each"


def _adapter(updates: Sequence[Record]) -> list[list[str]]:
    used, given = fmean(each["effective_rank"] for each in updates), fmean(each["rank"] for each in updates)
    ratios = [each["update_norm"] / each["weight_norm"] for each in updates if each["weight_norm"]]
    rows = [["effective rank", f"{used:.1f} of {given:g}", f"mean of {len(updates)} modules, at the end"]]
    if ratios:
        rows.append(["update", f"{fmean(ratios):.2%}", "norm of BA by that of the weight, mean"])
    return rows
