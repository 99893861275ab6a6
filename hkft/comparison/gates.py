"""What must hold of a comparison for a build to go on: `--fail-if "gap.loss > 0.3"`, `--require better`."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from hkft.errors import UsageError, nearest
from hkft.folder import RunFolder, read_json

if TYPE_CHECKING:
    from hkft.comparison.compare import Comparison, Row

# A name's first part -> where summary.json has the rest.
PLACES: Mapping[str, tuple[str, ...]] = {
    "test": ("test",),
    "best": ("best", "validation"),
    "final": ("final", "validation"),
    "gap": ("gap", "final"),
    "best_gap": ("gap", "best"),
}
SIGNS: Mapping[str, Callable[[float, float], bool]] = {
    ">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt,
}  # fmt: skip
REQUIRED: Mapping[str, tuple[str, ...]] = {"better": ("better",), "not worse": ("better", "cannot tell")}
CONDITION = re.compile(r"\s*([\w.]+)\s*(>=|<=|>|<)\s*(-?[\d.]+(?:[eE][+-]?\d+)?)\s*")


def check(condition: str) -> tuple[str, str, float]:
    """`gap.loss > 0.3` as name, sign and number. Raises UsageError for what is none."""
    found = CONDITION.fullmatch(condition)
    name = found[1] if found else condition.split()[0] if condition.split() else ""
    known = [*(f"{part}.<metric>" for part in PLACES), "time"]
    part, _, rest = name.partition(".")
    if not found or (name != "time" and (part not in PLACES or not rest)):
        raise UsageError(
            "not a condition",
            where="--fail-if",
            found=repr(condition),
            allowed=f'a name, a sign and a number, such as "gap.loss > 0.3"; names: {", ".join(known)}',
            hint=f"{part}.loss, for one" if part in PLACES else nearest(part, PLACES),
        )
    try:
        return name, found[2], float(found[3])
    except ValueError:
        raise UsageError("not a number", where="--fail-if", found=found[3], allowed="0.3") from None


def check_word(require: str | None) -> None:
    """Raise UsageError for what `--require` does not know."""
    if require is not None and require not in REQUIRED:
        raise UsageError("no such word", where="--require", found=repr(require), allowed=", ".join(REQUIRED))


def failures(comparison: Comparison, conditions: Sequence[str] = (), require: str | None = None) -> list[str]:
    """A sentence for everything that does not hold, of the rows that stand for their methods; none: all is well.

    A condition is of a mean over seeds; time is the ratio to the baseline's; what is not known fails. require: what must be
    said of every other method than the baseline's, "better" or "not worse", which "cannot tell" is. Raises UsageError where
    no run has such a number.
    """
    check_word(require)
    said = []
    for condition in conditions:
        name, sign, bound = check(condition)
        for row in comparison.compared:
            value = _value(row, name)
            if SIGNS[sign](value, bound) or math.isnan(value):
                known = "unknown" if math.isnan(value) else f"{value:.4g}"
                said.append(f"{row.label}: {name} is {known}, and --fail-if {condition}")
    methods = {row.label: row.method for row in comparison.rows}
    for row in comparison.compared if require else ():
        difference, control = row.scores[comparison.main].difference, row.method == methods[row.baseline]
        if difference is not None and not control and difference.word not in REQUIRED[require or ""]:
            said.append(f"{row.label} against {row.baseline}: {difference.text}, and --require {require}")
    return said


def _value(row: Row, name: str) -> float:
    if name == "time":
        return float("nan") if row.time_ratio is None else row.time_ratio
    part, _, rest = name.partition(".")
    values = [_at(read_json(RunFolder(run).summary), (*PLACES[part], rest)) for run in map(Path, row.runs)]
    if all(value is None for value in values):
        raise UsageError(f"no run of {row.label} has a number {name}", where="--fail-if")
    return fmean(float("nan") if value is None else value for value in values)


def _at(summary: Mapping[str, Any], place: Sequence[str]) -> float | None:
    value: Any = summary
    for part in place:
        value = (value or {}).get(part)
    return value
