"""The paper's results, to print beside ours: Wang et al., arXiv 2403.00812.

    cell                           model            metric                 of                       statistic
    table1/rte, mrpc, sst2, qnli   RoBERTa-large    accuracy               GLUE's validation set    median of 5 seeds
    table1/stsb                    RoBERTa-large    pearson                GLUE's validation set    median of 5 seeds
    table1/cola                    RoBERTa-large    matthews_correlation   GLUE's validation set    median of 5 seeds
    llama2/rte, mrpc               LLaMA2-7B        accuracy               GLUE's validation set    median of 5 seeds
    table2/bleu, nist, rouge_l,    GPT-2 Medium     the same               E2E's test set           mean of 3 runs
        cider

Units are hkft's: the paper prints an accuracy of 0.8448 as 84.48, here it is 0.8448, and so with both correlations; BLEU and
ROUGE-L are percent, NIST and CIDEr as they come, in both. CoLA and QNLI stand in a table of the paper apart, for plain LoRA
and HiddenKey alone; they are kept beside the other tasks of their model. The METEOR of Table 2 is left out: it is version
1.5 of the Java program, which hkft's is not (see `hkft.evaluation.texts`). Rate and weight behind a number are not published.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from hkft.dropout.named import find
from hkft.errors import MethodError, UsageError, nearest

SOURCE = "Wang et al., arXiv 2403.00812"

_COLUMNS = {"rte": "accuracy", "mrpc": "accuracy", "stsb": "pearson", "sst2": "accuracy"}
_TABLE1 = {  # percent; hkft's names: dropkey is its column, hiddencut its element, dropattention its column
    "none": (84.48, 89.95, 91.96, 95.99),
    "hiddencut": (87.00, 90.69, 91.94, 96.10),
    "hiddencut/column": (86.64, 90.20, 91.96, 96.22),
    "hiddencut/span": (86.64, 90.69, 92.05, 96.10),
    "dropkey/element": (87.00, 90.93, 92.21, 96.22),
    "dropkey": (87.36, 90.93, 92.25, 96.22),
    "dropkey/span": (86.28, 90.69, 92.21, 96.22),
    "dropattention/element": (85.56, 90.20, 92.03, 95.76),
    "dropattention": (85.56, 90.20, 92.11, 95.87),
    "dropattention/span": (86.28, 89.95, 92.21, 96.10),
    "hiddenkey-": (87.70, 90.90, 92.28, 96.22),
    "hiddenkey": (88.10, 91.20, 92.30, 96.44),
}
_PAIRS = {  # percent: plain LoRA, HiddenKey
    "table1/cola": ("matthews_correlation", 67.96, 69.91),
    "table1/qnli": ("accuracy", 94.23, 95.04),
    "llama2/rte": ("accuracy", 88.45, 90.25),
    "llama2/mrpc": ("accuracy", 88.73, 89.46),
}
_TABLE2 = {  # E2E: BLEU, NIST, ROUGE-L, CIDEr
    "none": (68.50, 8.615, 71.08, 2.490),
    "hiddencut": (69.22, 8.700, 71.39, 2.491),
    "dropkey": (68.78, 8.651, 71.40, 2.486),
    "hiddenkey-": (69.35, 8.726, 71.61, 2.510),
    "hiddenkey": (69.76, 8.765, 71.78, 2.511),
}


@dataclass(frozen=True)
class Cell:
    """A column of one of the paper's tables. metric: its name and unit in hkft; values: by hkft's name of the method."""

    metric: str
    statistic: str
    values: Mapping[str, float]

    @property
    def source(self) -> str:
        """What to print under the column."""
        return f"{SOURCE}: {self.statistic}"


def _nlu(metric: str, percent: Mapping[str, float]) -> Cell:
    return Cell(metric, "median of 5 seeds", {name: round(value / 100, 4) for name, value in percent.items()})


_CELLS: dict[str, Cell] = {
    **{
        f"table1/{task}": _nlu(metric, {name: row[place] for name, row in _TABLE1.items()})
        for place, (task, metric) in enumerate(_COLUMNS.items())
    },
    **{name: _nlu(metric, {"none": plain, "hiddenkey": best}) for name, (metric, plain, best) in _PAIRS.items()},
    **{
        f"table2/{metric}": Cell(metric, "mean of 3 runs", {name: row[place] for name, row in _TABLE2.items()})
        for place, metric in enumerate(("bleu", "nist", "rouge_l", "cider"))
    },
}


def cells() -> tuple[str, ...]:
    """The names of all cells: what a recipe's `compare.paper` may be."""
    return tuple(_CELLS)


def cell(name: str) -> Cell:
    """The cell of this name. Raises UsageError with the nearest one."""
    if name not in _CELLS:
        raise UsageError(
            "the paper has no such table and column",
            where="compare.paper",
            found=repr(name),
            allowed=", ".join(_CELLS),
            hint=nearest(name, _CELLS),
        )
    return _CELLS[name]


def value(name: str, method: str) -> float | None:
    """The paper's number for a method by hkft's name, `dropkey` or `dropkey/column`; None where the paper has none.

    Raises UsageError where there is no such cell.
    """
    try:
        method = find(method).name
    except MethodError:  # a control of the recipe's own
        return cell(name).values.get(method)
    return cell(name).values.get(method)
