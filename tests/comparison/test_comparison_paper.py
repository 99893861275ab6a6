"""The paper's numbers: that they are copied right, and in hkft's units."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest

from hkft.comparison import paper
from hkft.dropout.named import METHODS, find
from hkft.errors import UsageError
from hkft.evaluation.metrics import score
from hkft.recipe.schema import TextMetric

# The paper's own last column, which hkft does not hold: the mean over the four tasks, in percent.
MEANS = {
    "none": 90.60,
    "hiddencut/element": 91.43,
    "hiddencut/column": 91.26,
    "hiddencut/span": 91.37,
    "dropkey/element": 91.59,
    "dropkey/column": 91.69,
    "dropkey/span": 91.35,
    "dropattention/element": 90.89,
    "dropattention/column": 90.94,
    "dropattention/span": 91.14,
    "hiddenkey-": 91.78,
    "hiddenkey": 92.01,
}
TASKS = ("rte", "mrpc", "stsb", "sst2")


@pytest.mark.parametrize("method", MEANS)
def test_a_row_of_table_1_has_the_mean_that_the_paper_prints(method):
    row = [paper.value(f"table1/{task}", method) for task in TASKS]
    assert 100 * np.mean(row) == pytest.approx(MEANS[method], abs=0.005 + 1e-9)  # pyright: ignore[reportCallIssue, reportArgumentType]


@pytest.mark.parametrize(
    ("cell", "method", "expected"),
    [
        ("table1/rte", "none", 0.8448),
        ("table1/rte", "dropkey", 0.8736),
        ("table1/rte", "dropkey/column", 0.8736),
        ("table1/rte", "dropkey/element", 0.87),
        ("table1/stsb", "hiddencut/element", 0.9194),
        ("table1/stsb", "hiddencut", 0.9194),
        ("table1/sst2", "dropattention", 0.9587),
        ("table1/cola", "hiddenkey", 0.6991),
        ("table1/qnli", "none", 0.9423),
        ("table1/qnli", "dropkey", None),
        ("llama2/rte", "hiddenkey", 0.9025),
        ("llama2/mrpc", "none", 0.8873),
        ("table2/bleu", "hiddenkey-", 69.35),
        ("table2/nist", "dropkey", 8.651),
        ("table2/rouge_l", "hiddencut", 71.39),
        ("table2/cider", "none", 2.490),
        ("table2/bleu", "dropkey/span", None),
        ("table1/rte", "lora-dropout", None),
        ("table1/rte", "weight decay 0.3", None),
    ],
)
def test_numbers_are_in_hkft_s_unit_and_under_its_names(cell, method, expected):
    assert paper.value(cell, method) == expected


@pytest.mark.parametrize("name", paper.cells())
def test_a_cell_s_metric_is_one_of_hkft_s_and_its_methods_are_called_by_their_shortest_name(name):
    cell = paper.cell(name)
    known = {
        *score("classification", np.eye(2), np.arange(2)),
        *score("regression", np.arange(3.0)[:, None], np.arange(3.0)),
        *get_args(TextMetric),
    }
    assert cell.metric in known
    assert all(find(method).name == method for method in cell.values)
    assert {"none", "hiddenkey"} <= set(cell.values)
    assert max(cell.values, key=lambda method: cell.values[method]) == "hiddenkey"
    assert cell.source == f"Wang et al., arXiv 2403.00812: {cell.statistic}"
    assert cell.statistic == ("mean of 3 runs" if name.startswith("table2/") else "median of 5 seeds")
    assert all(0 < value < 1 for value in cell.values.values()) == (not name.startswith("table2/"))


def test_the_cells_are_these():
    tables = {
        "table1": [*TASKS, "cola", "qnli"],
        "llama2": ["rte", "mrpc"],
        "table2": ["bleu", "nist", "rouge_l", "cider"],
    }
    assert list(paper.cells()) == [f"{table}/{column}" for table, columns in tables.items() for column in columns]
    assert {name.partition("/")[0] for name in paper.cell("table1/rte").values} <= set(METHODS)


def test_a_cell_that_is_none_is_told_the_nearest():
    with pytest.raises(UsageError) as refused:
        paper.value("table1/rtee", "none")
    [problem] = refused.value.problems
    assert (problem.where, problem.found) == ("compare.paper", "'table1/rtee'")
    assert problem.allowed == ", ".join(paper.cells())
    assert problem.hint == "did you mean 'table1/rte'?"
    with pytest.raises(UsageError, match="no such table"):
        paper.value("table3/rte", "a control")
