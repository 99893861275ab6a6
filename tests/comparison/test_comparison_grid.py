"""The grid: which cells, in which order, and what it does with what is there already; training is a stub."""

from contextlib import ExitStack
from pathlib import Path

import pytest

from hkft import api
from hkft.comparison import grid
from hkft.comparison.compare import Failure
from hkft.dropout.named import METHODS
from hkft.errors import DataError, DivergedError, HkftError, MethodError, UsageError
from hkft.events import Notice, Stage
from hkft.folder import RunFolder, read_json, seal, write_json, write_text


def names(cells):
    return [cell.name.rpartition("-")[0] for cell in cells]


def test_cells_are_in_order_of_the_seeds_and_named_by_their_content(recipe):
    cells = grid.cells(recipe.replace("seed=3"), ["none", "hiddenkey-"], 2)
    assert names(cells) == ["none-s3", "hiddenkey--s3", "none-s4", "hiddenkey--s4"]
    assert [cell.title for cell in cells] == [
        "none, seed 3",
        "hiddenkey-, seed 3",
        "none, seed 4",
        "hiddenkey-, seed 4",
    ]
    for cell in cells:
        assert (cell.recipe.method.name, f"{cell.row}, seed {cell.recipe.seed}") == (cell.row, cell.title)
        assert cell.name.endswith("-" + cell.recipe.fingerprint()[:6])
        assert cell.recipe.train == recipe.train
    assert len({cell.recipe.fingerprint() for cell in cells}) == 4


def test_rates_are_an_axis_of_methods_that_have_one(recipe):
    cells = grid.cells(recipe, ["none", "dropkey"], [7], {"dropout.rate": [0.1, 0.2, 0.1]})
    assert names(cells) == ["none-s7", "dropkey-p0.1-s7", "dropkey-p0.2-s7"]
    assert [cell.row for cell in cells] == ["none", "dropkey p=0.1", "dropkey p=0.2"]
    assert cells[2].recipe.method.sites[0].rate == 0.2
    assert cells[2].title == "dropkey p=0.2, seed 7"


def test_the_recipes_own_sites_are_a_method_too(recipe):
    own = recipe.replace("dropout.sites=[{position: hidden, rate: 0.3}]")
    cells = grid.cells(own, ["none", "custom"], 1, {"dropout.rate": [0.1, 0.2]})
    assert names(cells) == ["none-s1", "custom-s1"]  # every site names its rate: no axis
    assert cells[1].recipe.method == own.method
    assert cells[0].recipe.method.sites == ()


def test_every_unknown_method_and_rate_is_told_at_once(recipe):
    with pytest.raises(MethodError) as error:
        grid.cells(recipe, ["none", "dropkee", "hidenkey"], 1, {"dropout.rate": [0.1, 1.5]})
    known = ", ".join(METHODS)
    assert str(error.value) == (
        f"--methods: there is no method 'dropkee'\n  allowed: {known}\n  hint: did you mean 'dropkey'?\n"
        f"--methods: there is no method 'hidenkey'\n  allowed: {known}\n  hint: did you mean 'hiddenkey'?\n"
        "--rates: a dropout rate is a probability\n  found: 1.5\n  allowed: 0 <= rate < 1"
    )


@pytest.mark.parametrize(("methods", "seeds", "axes", "flag"), [
    ([], 1, {}, "--methods"), (["none"], 0, {}, "--seeds"), (["none"], 1, {"lora.r": []}, "--grid lora.r"),
])  # fmt: skip
def test_an_empty_grid_is_refused(recipe, methods, seeds, axes, flag):
    with pytest.raises(UsageError) as error:
        grid.cells(recipe, methods, seeds, axes)
    assert str(error.value) == f"{flag}: the grid is empty\n  allowed: at least one"


def test_a_grid_runs_every_cell_once_and_says_where_it_is(stub, recipe, tmp_path):
    cells, train, told = grid.cells(recipe, ["none", "dropkey"], 2), stub(), []
    outcomes = grid.run(cells, tmp_path / "g", train, told.append)
    assert train.calls == [(cell.name, False) for cell in cells]
    assert [outcome.status for outcome in outcomes] == ["finished"] * 4
    assert [outcome.folder for outcome in outcomes] == [tmp_path / "g" / cell.name for cell in cells]
    assert told[2] == Stage("cell 3 of 4: none, seed 2", 2, 4)

    again, told = stub(), []
    more = grid.cells(recipe, ["none", "dropkey"], 3)
    outcomes = grid.run(more, tmp_path / "g", again, told.append)
    assert again.calls == [(cell.name, False) for cell in more[4:]]
    assert [outcome.status for outcome in outcomes] == ["skipped"] * 4 + ["finished"] * 2
    assert told[0] == Notice("4 of 6 cells are done already")


def test_a_run_of_another_recipe_is_not_taken_for_done(stub, recipe, tmp_path):
    cells, train = grid.cells(recipe, ["none"], 1), stub()
    grid.run(cells, tmp_path, runner=train)
    grid.run(grid.cells(recipe.replace("lora.r=8"), ["none"], 1), tmp_path, runner=train)
    assert len(train.calls) == 2
    assert len(list(tmp_path.glob("none-s1-*"))) == 2


def test_a_run_with_the_rate_of_the_recipe_serves_a_grid_of_rates(stub, recipe, tmp_path):
    grid.run(grid.cells(recipe, ["dropkey"], 1), tmp_path, runner=stub())
    train = stub()
    outcomes = grid.run(grid.cells(recipe, ["dropkey"], 1, {"dropout.rate": [0.1, 0.2]}), tmp_path, runner=train)
    assert [name.rpartition("-")[0] for name, _ in train.calls] == ["dropkey-p0.2-s1"]
    assert outcomes[0].folder.name.startswith("dropkey-s1-")


def unfinished(folder: Path, cell: grid.Cell, checkpoint: bool) -> RunFolder:
    run = RunFolder(folder / cell.name)
    write_text(run.recipe, cell.recipe.source)
    write_text(run.resolved, cell.recipe.resolved())
    write_json(run.summary, {"status": "interrupted"})
    write_text(run.metrics, "old\n")
    if checkpoint:
        seal(run.checkpoints / "checkpoint-5", {"step": 5})
    return run


def test_an_unfinished_cell_is_resumed_where_it_has_a_checkpoint(stub, recipe, tmp_path):
    (cell,), train = grid.cells(recipe, ["none"], 1), stub()
    run = unfinished(tmp_path, cell, checkpoint=True)
    grid.run([cell], tmp_path, runner=train)
    assert train.calls == [(cell.name, True)]
    assert run.checkpoints.exists()


def test_an_unfinished_cell_without_one_begins_anew(recipe, tmp_path):
    (cell,) = grid.cells(recipe, ["none"], 1)
    run = unfinished(tmp_path, cell, checkpoint=False)
    seen = []
    grid.run([cell], tmp_path, lambda cell, folder, resume, tell: seen.append((folder.path.exists(), resume)))
    assert seen == [(False, False)]
    assert not run.exists


def test_a_folder_that_is_no_run_is_left_for_training_to_refuse(stub, recipe, tmp_path):
    (cell,), train = grid.cells(recipe, ["none"], 1), stub()
    write_text(tmp_path / cell.name / "diary.txt", "mine")
    grid.run([cell], tmp_path, runner=train)
    assert (tmp_path / cell.name / "diary.txt").read_text() == "mine"


def test_a_failed_cell_is_recorded_and_the_rest_goes_on(stub, recipe, tmp_path):
    train = stub(dropkey1=DivergedError("the loss is nan at step 3", hint="lower train.learning_rate"))
    told = []
    outcomes = grid.run(grid.cells(recipe, ["none", "dropkey"], 2), tmp_path, train, told.append)
    assert [outcome.status for outcome in outcomes] == ["finished", "failed", "finished", "finished"]
    message = "the loss is nan at step 3\n  hint: lower train.learning_rate"
    assert outcomes[1].error == message
    assert isinstance(outcomes[1].cause, DivergedError)
    assert outcomes[1].cause.__traceback__ is None
    assert Notice(f"dropkey, seed 1 failed: {message}", "warning") in told


@pytest.mark.parametrize("stop", [KeyboardInterrupt(), ValueError("a fault of ours")])
def test_an_interrupt_and_a_fault_of_ours_end_the_grid(stub, recipe, tmp_path, stop):
    train = stub(none2=stop)
    with pytest.raises(type(stop)):
        grid.run(grid.cells(recipe, ["none", "dropkey"], 2), tmp_path, runner=train)
    assert len(train.calls) == 3


def test_a_grid_is_run_compared_and_written(stub, recipe, tmp_path):
    train = stub(dropkey2=DivergedError("nan"))
    found, folder = api.compare(
        recipe.path, ["none", "dropkey"], 2, overrides=["lora.r=2"], output=tmp_path / "g", runner=train
    )
    assert folder == tmp_path / "g"
    assert [row.label for row in found.rows] == ["none", "dropkey"]
    assert [row.seeds for row in found.rows] == [(1, 2), (1,)]
    assert found.failed == {"dropkey, seed 2": Failure("nan", 6)}
    assert found.warnings == ("dropkey and none are paired over 1 seed: only none has seed 2",)
    written = sorted(path.name for path in (tmp_path / "g").glob("comparison.*"))
    assert written == ["comparison.csv", "comparison.json", "comparison.md", "comparison.tex"]
    assert (tmp_path / "g" / "report.html").exists()
    assert read_json(tmp_path / "g" / "comparison.json") == found.as_dict()
    assert "- dropkey, seed 2 failed: nan\n" in (tmp_path / "g" / "comparison.md").read_text()


def test_a_grid_compared_later_has_its_names_wherever_it_was_moved(stub, recipe, tmp_path):
    variants = {"a rank of two": {"lora.r": 2}, "decay": {"train.weight_decay": 0.1}}
    made, folder = api.compare(recipe.path, ["none"], 2, variants=variants, output=tmp_path / "g", runner=stub())
    labels = ["none", *variants]
    assert [row.label for row in made.rows] == labels
    moved = folder.rename(tmp_path / "moved")
    again = api.compare_runs([moved])
    assert {row.label: row.seeds for row in again.rows} == dict.fromkeys(labels, (1, 2))
    (moved / "comparison.json").write_text("{")
    assert {row.label for row in api.compare_runs([moved]).rows} == {
        "none",
        "none lora.r=2",
        "none train.weight_decay=0.1",
    }


def test_a_grid_of_which_nothing_is_left_raises_what_its_cells_raised(stub, recipe, tmp_path):
    error = DataError("the file is empty", where="rows.csv")
    with pytest.raises(HkftError) as raised:
        api.compare(recipe.path, ["none"], 2, output=tmp_path / "g", runner=stub(none1=error, none2=error))
    assert type(raised.value) is DataError
    assert str(raised.value) == "rows.csv: the file is empty"
    assert not (tmp_path / "g" / "comparison.json").exists()


def test_a_cell_that_another_process_runs_is_left_to_it(stub, recipe, tmp_path):
    """As on a cluster, where the lines of --print-commands are still running: nothing of theirs is removed."""
    cells, train, told = grid.cells(recipe, ["none", "dropkey"], 1), stub(), []
    theirs = unfinished(tmp_path, cells[0], checkpoint=False)
    with theirs.held():
        outcomes = grid.run(cells, tmp_path, train, told.append)
        assert theirs.metrics.read_text() == "old\n"
        with pytest.raises(UsageError, match="every cell that is left is being run by another process"):
            raise grid.nothing_finished(outcomes[:1])
    assert [outcome.status for outcome in outcomes] == ["running", "finished"]
    assert Notice("none, seed 1 is being run by another process, and left out", "warning") in told
    assert [outcome.status for outcome in grid.run(cells, tmp_path, train)] == ["finished", "skipped"]


REFUSED = UsageError("another process is writing this run")


def test_a_cell_that_another_process_began_at_the_same_moment_is_left_to_it(stub, recipe, tmp_path):
    cells, train = grid.cells(recipe, ["none", "dropkey"], 1), stub(none1=REFUSED)
    with ExitStack() as theirs:

        def slower(cell, folder, resume, tell):
            if cell == cells[0]:
                theirs.enter_context(folder.held())
            train(cell, folder, resume, tell)

        assert [outcome.status for outcome in grid.run(cells, tmp_path, slower)] == ["running", "finished"]


def test_a_cell_that_another_process_finished_meanwhile_is_taken(stub, recipe, tmp_path):
    train = stub()

    def slower(cell, folder, resume, tell):
        train(cell, folder, resume, tell)
        raise REFUSED

    assert [outcome.status for outcome in grid.run(grid.cells(recipe, ["none"], 1), tmp_path, slower)] == ["skipped"]


def test_cells_that_were_left_to_another_process_are_looked_at_again_at_the_end(stub, recipe, tmp_path):
    cells, train = grid.cells(recipe, ["none", "dropkey"], 1), stub()
    with ExitStack() as theirs:
        theirs.enter_context(cells[0].folder(tmp_path).held())

        def meanwhile(cell, folder, resume, tell):
            train(cell, folder, resume, tell)
            train(cells[0], cells[0].folder(tmp_path), resume, tell)
            theirs.close()

        found, _ = api.compare(recipe.path, ["none", "dropkey"], 1, output=tmp_path, runner=meanwhile)
    assert ([row.label for row in found.rows], found.failed) == (["none", "dropkey"], {})


@pytest.mark.parametrize(("asked", "where"), [({"baseline": "dropky"}, "--baseline"), ({"paper": "table1/rtee"}, None)])
def test_what_the_table_cannot_show_is_told_before_anything_runs(stub, recipe, tmp_path, asked, where):
    train = stub()
    with pytest.raises(UsageError) as error:
        api.compare(recipe.path, ["none", "dropkey"], 1, output=tmp_path / "g", runner=train, **asked)
    assert error.value.problems[0].where == where or where is None
    assert error.value.problems[0].hint
    assert train.calls == []
    assert not (tmp_path / "g").exists()


def test_values_that_are_lists_are_an_axis_too(recipe):
    cells = grid.cells(recipe, ["none"], 1, {"lora.target_modules": [["query"], ["query", "value"], ["query"]]})
    assert [cell.recipe.lora["target_modules"] for cell in cells] == [["query"], ["query", "value"]]


def test_variants_are_the_recipe_without_dropout_and_with_their_values(recipe):
    more = {"rank 2": {"lora.r": 2}, "own": {"dropout.method": "dropkey", "dropout.rate": 0.3}, "plain": {}}
    cells = grid.cells(recipe, ["none", "hiddenkey"], 1, {}, more)
    assert [cell.row for cell in cells] == ["none", "hiddenkey", "rank 2", "own"]  # plain is none
    assert [(c.recipe.method.name, c.recipe.lora["r"]) for c in cells[2:]] == [("none", 2), ("dropkey", 4)]
    assert cells[3].recipe.method.sites[0].rate == 0.3


def test_the_default_folder(recipe):
    assert grid.default_output(recipe) == Path("runs/compare-small")
