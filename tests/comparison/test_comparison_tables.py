"""The tables as a whole, on one fixed comparison."""

import csv
import io
import json

import pytest

from hkft.comparison import tables
from hkft.comparison.compare import Comparison, Failure, compare


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
    return compare(folders, failed={"dropkey, seed 1": Failure("the loss is nan\n  hint: lower it", 6)})


MARKDOWN = """\
# small: none, hiddenkey-; 3 seeds; baseline none

| method | seeds | best accuracy | median | difference | final accuracy | final loss | final gap | time | best accuracy in equal time | memory | verdicts |
| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | --- |
| none | 3 | 0.8100 ± 0.0100 | 0.8100 | - | 0.8000 ± 0.0100 | 0.713 ± 0.015 | 0.410 ± 0.010 | 1.00 x | 0.8100 ± 0.0100 | 1.00 GiB | 2 overfitting, 1 healthy |
| hiddenkey- | 3 | 0.8167 ± 0.0208 | 0.8100 | +0.0067 | 0.8067 ± 0.0208 | 0.617 ± 0.015 | 0.300 ± 0.010 | 1.08 x | 0.8167 ± 0.0208 | 1.00 GiB | 3 healthy |

## In words

- best accuracy, hiddenkey- against none: cannot tell (n = 3 seeds; about 44 would be needed); +0.0067 (-0.0313 to +0.0446), p = 0.53, effect +0.2, won 2 of 3 seeds
- no row is both better and faster than these (Pareto): none, hiddenkey-
- final loss against none: better hiddenkey- (-0.097, p = 0.0012)
- final loss gap against none: better hiddenkey- (-0.110, p = 0.0027)

## Warnings

- dropkey, seed 1 failed: the loss is nan

## How to read it

- best accuracy is that of the checkpoint with the best validation loss, selected and reported on the same validation rows: optimistic
- differences are to none, paired by seed, with 95 % intervals; p is of the paired t test
- with 3 seeds a paired t test needs |t| > 4.30
- each seed drew its own rows: the spread is that of rows, initial weights and order together
"""
LATEX = r"""
% dropkey, seed 1 failed: the loss is nan
\begin{table}
  \centering
  \caption{small: none, hiddenkey-; 3 seeds; baseline none. best accuracy is that of the checkpoint with the best validation loss, selected and reported on the same validation rows: optimistic. differences are to none, paired by seed, with 95 \% intervals; p is of the paired t test. with 3 seeds a paired t test needs $|$t$|$ $>$ 4.30. each seed drew its own rows: the spread is that of rows, initial weights and order together.}
  \begin{tabular}{lrrrrrrrrr}
    \toprule
    method & seeds & best accuracy & median & difference & final accuracy & final loss & final gap & time & best accuracy in equal time \\
    \midrule
    none & 3 & 0.8100 $\pm$ 0.0100 & 0.8100 & - & 0.8000 $\pm$ 0.0100 & 0.713 $\pm$ 0.015 & 0.410 $\pm$ 0.010 & 1.00 x & 0.8100 $\pm$ 0.0100 \\
    hiddenkey- & 3 & \textbf{0.8167 $\pm$ 0.0208} & 0.8100 & +0.0067 & 0.8067 $\pm$ 0.0208 & 0.617 $\pm$ 0.015 & 0.300 $\pm$ 0.010 & 1.08 x & 0.8167 $\pm$ 0.0208 \\
    \bottomrule
  \end{tabular}
\end{table}
"""


def test_markdown(comparison):
    assert tables.markdown(comparison) == MARKDOWN


def test_latex(comparison):
    assert tables.latex(comparison) == LATEX.lstrip("\n")


@pytest.mark.parametrize(
    ("width", "wanted"),
    [
        (40, ["method", "seeds", "best accuracy"]),
        (80, ["method", "seeds", "best accuracy", "difference", "final gap", "time"]),
        (100, ["method", "seeds", "best accuracy", "median", "difference", "final loss", "final gap", "time"]),
    ],
)
def test_a_terminal_shows_the_columns_that_it_has_room_for(comparison, width, wanted):
    titles, rows = tables.fitted(comparison, width)
    assert titles == wanted
    assert rows[1][:3] == ["hiddenkey-", "3", "0.8167 ± 0.0208"]
    cells = [max(*(len(row[n]) for row in rows), *map(len, title.split())) for n, title in enumerate(titles)]
    assert sum(cells) + 2 * len(cells) <= width
    assert len(tables.fitted(comparison, 400)[0]) == len(tables.columns(comparison))


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
