"""The tables as a whole, on one fixed comparison."""

import csv
import io
import json

import pytest

from hkft.comparison import tables
from hkft.comparison.compare import Comparison, compare


@pytest.fixture
def comparison(recipe, write_run, tmp_path) -> Comparison:
    """Plain LoRA and HiddenKey- over three seeds: the accuracy cannot tell, the loss can."""
    numbers = {
        "none": [(0.80, 0.60, 0.30), (0.81, 0.61, 0.32), (0.82, 0.63, 0.31)],
        "hiddenkey-": [(0.81, 0.50, 0.20), (0.80, 0.52, 0.21), (0.84, 0.53, 0.19)],
    }
    folders = []
    for method, seeds in numbers.items():
        for seed, (accuracy, loss, gap) in enumerate(seeds, 1):
            cell = recipe.replace(f"dropout.method={method}", f"seed={seed}")
            name = "overfitting" if method == "none" and seed > 1 else "healthy"
            more = {"verdict": {"name": name}, "train_runtime_s": 10.0 if method == "none" else 10.8}
            folders.append(write_run(tmp_path / f"{method}-{seed}", cell, accuracy, loss, gap, **more))
    return compare(folders, failed={"dropkey, seed 1": "the loss is nan\n  hint: lower it"})


MARKDOWN = """\
"""
LATEX = r"""
"""


def test_markdown(comparison):
    assert tables.markdown(comparison) == MARKDOWN


def test_latex(comparison):
    assert tables.latex(comparison) == LATEX.lstrip("\n")


def test_a_terminal_of_80_columns_holds_the_narrow_table(comparison):
    titles, rows = tables.narrow(comparison)
    assert titles == ["method", "seeds", "best accuracy", "final loss", "final loss gap", "time"]
    assert rows == [
        ["none", "3", "0.8100 ± 0.0100", "0.713 ± 0.015", "0.410 ± 0.010", "1.00 x"],
        ["hiddenkey-", "3", "0.8167 ± 0.0208", "0.617 ± 0.015", "0.300 ± 0.010", "1.08 x"],
    ]
    widths = [max(len(cell) for cell in column) for column in zip(titles, *rows, strict=True)]
    assert sum(widths) + 2 * len(widths) <= 80


def test_comma_separated_values_are_unrounded(comparison):
    lines = list(csv.DictReader(io.StringIO(tables.comma_separated(comparison))))
    assert len(lines) == 2 * 6
    best = next(line for line in lines if (line["row"], line["measure"]) == ("hiddenkey-", "best accuracy"))
    score = comparison.rows[1].scores["best"]
    assert float(best["mean"]) == score.sample.mean
    assert float(best["difference_p"]) == score.difference.p
    assert best["difference_text"] == score.difference.text
    assert float(best["time_ratio"]) == pytest.approx(1.08)
    assert lines[0]["difference_p"] == ""


def test_json_is_the_dictionary(comparison):
    assert json.loads(tables.json_text(comparison)) == comparison.as_dict()


def test_latex_takes_every_character(comparison):
    assert tables._tex(r"a_b & 5 % #1 {x} ~ ^ \ < ±") == (
        r"a\_b \& 5 \% \#1 \{x\} \textasciitilde{} \textasciicircum{} \textbackslash{} $<$ $\pm$"
    )


def test_writing_leaves_no_partial_files(comparison, tmp_path):
    paths = tables.write(comparison, tmp_path / "new" / "grid")
    assert sorted((tmp_path / "new" / "grid").iterdir()) == sorted(paths)
    assert (tmp_path / "new" / "grid" / "comparison.md").read_text(encoding="utf-8") == MARKDOWN
