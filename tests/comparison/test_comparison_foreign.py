"""Curves of other tools beside runs of hkft's."""

import json
import math

import pytest

from hkft.comparison import tables
from hkft.comparison.compare import compare
from hkft.comparison.foreign import told_apart
from hkft.errors import DataError, UsageError

LOSSES = [(0.9, 0.8), (0.5, 0.6), (0.2, 0.75), (0.1, 0.9)]  # while learning, on validation


def state(folder, losses=LOSSES, name="trainer_state.json"):
    """What transformers' Trainer writes."""
    history = []
    for epoch, (train, validation) in enumerate(losses, 1):
        history.append({"epoch": epoch, "step": 10 * epoch, "loss": train})
        history.append({"epoch": epoch, "step": 10 * epoch, "eval_loss": validation, "eval_accuracy": 0.7})
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps({"log_history": history}))
    return folder / name


@pytest.fixture
def runs(recipe, write_run, tmp_path):
    cells = [recipe.replace(f"dropout.method={method}") for method in ("none", "dropkey")]
    return [write_run(tmp_path / cell.method.name, cell) for cell in cells]


def test_a_curve_is_told_apart_by_file_and_by_folder(runs, tmp_path):
    curve = state(tmp_path / "theirs")
    for place in (curve, curve.parent):
        own, (found,) = told_apart([runs[0], place, runs[1]])
        assert own == runs
        assert found.label == "theirs"
        assert (found.best_loss, found.final_loss) == (0.6, 0.9)
        assert found.final_gap == pytest.approx(0.8)
        assert [point["step"] for point in found.points] == [10, 20, 30, 40]
        assert found.points[1]["train_probe"] == {"loss": 0.5}
        assert found.points[1]["validation"] == {"loss": 0.6}
        assert "dropout on" in found.notes[0]


def test_a_curve_stands_beside_the_rows_and_is_none(runs, tmp_path):
    alone, found = compare(runs), compare([*runs, state(tmp_path / "theirs")])
    assert found.rows == alone.rows
    assert found.notes == alone.notes
    (said,) = tables.foreign(found)
    assert said.startswith("theirs (")
    assert "validation loss 0.900 at the end, 0.600 at its lowest; 0.800 above the loss logged while learning" in said
    assert said in tables.markdown(found)
    assert json.loads(tables.json_text(found))["foreign"][0]["label"] == "theirs"


def test_a_curve_of_another_name_keeps_it(tmp_path):
    _, (found,) = told_apart([state(tmp_path / "a", name="log.json")])
    assert found.label == "log.json"


def test_a_folder_that_is_neither_and_a_path_that_is_not_there(runs, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError) as neither:
        compare([*runs, tmp_path / "empty"])
    (problem,) = neither.value.problems
    assert problem.message == "this is neither a run folder nor a curve of another tool"
    assert problem.where == str(tmp_path / "empty")
    with pytest.raises(UsageError, match="this is not a run folder"):
        compare([*runs, tmp_path / "nowhere"])


def test_a_file_that_is_no_curve_says_why(runs, tmp_path):
    (tmp_path / "notes.txt").write_text("dear diary\n")
    with pytest.raises(DataError):
        compare([*runs, tmp_path / "notes.txt"])


def test_a_damaged_curve_in_a_folder_says_why(runs, tmp_path):
    state(tmp_path / "theirs").write_text('{"log_history": [')
    with pytest.raises(DataError):
        compare([*runs, tmp_path / "theirs"])


def test_curves_alone_are_no_comparison(tmp_path):
    with pytest.raises(UsageError, match="there is no finished run to compare"):
        compare([state(tmp_path / "theirs")])


@pytest.mark.parametrize("at", [0, 2])
def test_the_lowest_loss_is_the_lowest_finite_one(tmp_path, at):
    losses = [(train, math.nan if n == at else loss) for n, (train, loss) in enumerate(LOSSES)]
    _, (found,) = told_apart([state(tmp_path / "theirs", losses)])
    assert found.best_loss == 0.6


@pytest.mark.parametrize("place", ["validation", "train"])
def test_a_curve_that_diverged_at_its_end_is_valid_json(runs, tmp_path, place):
    losses = [*LOSSES[:-1], (0.1, math.nan) if place == "validation" else (math.nan, 0.9)]
    found = compare([*runs, state(tmp_path / "theirs", losses)])
    assert math.isnan(found.foreign[0].final_gap)
    json.dumps(found.as_dict(), allow_nan=False)
    assert "nan" in tables.foreign(found)[0]


def test_a_grid_s_folder_is_its_runs_and_so_is_all_that_lies_in_it(recipe, write_run, tmp_path):
    cells = [recipe.replace(f"dropout.method={method}", "seed=1") for method in ("none", "dropkey")]
    for cell in cells:
        write_run(tmp_path / f"{cell.method.name}-s1-{cell.fingerprint()[:6]}", cell)
    (tmp_path / "comparison.csv").write_text("row,baseline\n")
    (tmp_path / "report.html").write_text("<!doctype html>")
    for places in ([tmp_path], sorted(tmp_path.iterdir())):
        own, curves = told_apart([place for place in places if place.name != "small.yaml"])
        assert ([place.name.partition("-")[0] for place in own], curves) == (["dropkey", "none"], [])
