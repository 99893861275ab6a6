"""From run folders to rows: groups, pairs, warnings, and what each number is."""

import json

import pytest

from hkft import api
from hkft.comparison import tables
from hkft.comparison.compare import compare
from hkft.errors import UsageError
from hkft.folder import RunFolder, write_json


@pytest.fixture
def folder_of(recipe, write_run, tmp_path):
    """A run of a method and a seed; `settings` are `--set`s, the rest is the run's numbers."""

    def make(method, seed, *settings, name="", **numbers):
        chosen = recipe.replace(f"dropout.method={method}", f"seed={seed}", *settings)
        return write_run(tmp_path / f"{method}-{seed}{name}-{chosen.fingerprint()}", chosen, **numbers)

    return make


def test_rows_scores_and_costs(folder_of):
    accuracies = {"hiddenkey": (0.82, 0.85, 0.84), "none": (0.80, 0.81, 0.82)}
    seconds = {"hiddenkey": 15.0, "none": 10.0}
    folders = [
        folder_of(method, seed, accuracy=values[seed - 1], gap=0.3, train_runtime_s=seconds[method] + seed)
        for seed in (1, 2, 3)
        for method, values in accuracies.items()
    ]
    found = compare(folders)
    assert (found.recipe, found.task, found.metric, found.baseline) == ("small", "classification", "accuracy", "none")
    hiddenkey, none = found.rows
    assert (hiddenkey.label, hiddenkey.seeds, hiddenkey.settings) == ("hiddenkey", (1, 2, 3), {})
    assert hiddenkey.runs == tuple(str(folder) for folder in folders[::2])
    assert hiddenkey.scores["best"].values == {1: 0.82, 2: 0.85, 3: 0.84}
    assert hiddenkey.scores["final"].sample.mean == pytest.approx(0.8367 - 0.01, abs=1e-4)
    assert hiddenkey.scores["best_loss"].sample.mean == pytest.approx(0.5)
    assert hiddenkey.scores["final_loss"].sample.mean == pytest.approx(0.6)
    assert hiddenkey.scores["best_gap"].sample.mean == pytest.approx(0.3)
    assert hiddenkey.scores["final_gap"].sample.mean == pytest.approx(0.4)
    assert hiddenkey.scores["best"].difference.mean == pytest.approx(0.08 / 3)
    assert none.scores["best"].difference is None
    assert hiddenkey.verdicts == {"healthy": 3}
    assert hiddenkey.seconds.mean == 17.0
    assert hiddenkey.time_ratio == pytest.approx(17 / 12)
    assert none.time_ratio == 1.0
    assert (hiddenkey.samples_per_s, hiddenkey.peak_memory_bytes) == (50.0, 2**30)
    assert found.warnings == ()


def test_all_that_a_report_needs_is_json(folder_of):
    found = compare(
        [folder_of("none", 1), folder_of("dropkey", 1, best={"validation": {"loss": 0.1, "accuracy": None}})]
    )
    record = found.as_dict()
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    assert record["rows"][1]["scores"]["best"]["values"] == {"1": None}
    assert record["measures"][3]["title"] == "final loss"
    assert record["curves"][0]["points"][1] == {
        "step": 20,
        "epoch": 2.0,
        "train_probe": {"loss": 0.4, "accuracy": 0.95},
        "validation": {"loss": 0.6, "accuracy": 0.79},
    }


def test_a_loss_that_falls_and_a_gap_that_closes_are_better(folder_of):
    losses = {"none": (0.60, 0.61, 0.63), "dropkey": (0.50, 0.52, 0.53)}
    folders = [
        folder_of(m, seed, loss=values[seed - 1], gap=values[seed - 1] / 2)
        for m, values in losses.items()
        for seed in (1, 2, 3)
    ]
    scores = compare(folders).rows[1].scores
    assert scores["final_loss"].difference.word == "better"
    assert scores["final_gap"].difference.word == "better"
    assert scores["best"].difference.text == "cannot tell (n = 3 seeds, and no difference on any)"


def test_rates_of_one_method_are_rows_of_their_own(folder_of):
    folders = [folder_of("none", 1)]
    folders += [folder_of("dropkey", seed, f"dropout.rate={rate}") for rate in (0.1, 0.2) for seed in (2, 1)]
    found = compare(folders)
    assert [(row.label, row.seeds) for row in found.rows] == [
        ("none", (1,)), ("dropkey p=0.1", (1, 2)), ("dropkey p=0.2", (1, 2)),
    ]  # fmt: skip
    assert found.rows[2].settings == {"dropout.rate": 0.2}
    told = (
        "settings tried: none 1, dropkey 2; of each method the one that was best on validation stands for it, "
        "on the rows that are reported: its number and its p are optimistic too"
    )
    assert told in found.notes
    assert [row.chosen for row in found.rows].count(True) == 2


def test_the_note_on_selection_names_what_selected(folder_of):
    by_loss, by_metric = folder_of("none", 1), folder_of("none", 1, "diagnostics.metric=accuracy")
    told = (
        "best accuracy is that of the checkpoint with the best validation {}, "
        "selected and reported on the same validation rows: optimistic"
    )
    assert compare([by_loss]).notes[0] == told.format("loss")
    assert compare([by_metric]).notes[0] == told.format("accuracy")


def test_notes_say_what_few_seeds_and_own_rows_mean(folder_of):
    folders = [folder_of(method, seed) for method in ("none", "dropkey") for seed in (1, 2, 3)]
    notes = compare(folders).notes
    assert "with 3 seeds a paired t test needs |t| > 4.30" in notes
    assert "each seed drew its own rows: the spread is that of rows, initial weights and order together" in notes
    rows = {"train": "t", "validation": "v"}
    shared = [folder_of(method, seed, name="f", data=rows) for method in ("none", "dropkey") for seed in (1, 2)]
    told = "all seeds share the validation rows: the spread does not tell what other rows would show"
    assert told in compare(shared).notes


UNFAIR = {
    "rows": (
        {"data": {"train": "train 1", "validation": "f" * 64}},
        ["dropkey and none are no fair pair: other validation rows (seed 1: ffffffff and validation 1)"],
    ),
    "steps": (
        {"total_steps": 40},
        ["dropkey and none are no fair pair: other number of steps (seed 1: 40 and 20)"],
    ),
    "model": (
        {"model": "huge"},
        ["dropkey and none are no fair pair: other model (seed 1: huge and tiny)"],
    ),
    "device": (
        {"device": "cpu (2 threads)"},
        [
            "dropkey and none are no fair pair: other device, so that their times cannot be compared "
            "(seed 1: cpu (2 threads) and cuda:0)"
        ],
    ),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "warnings"), UNFAIR.values(), ids=UNFAIR)
def test_unfair_pairs_are_told(folder_of, changes, warnings):
    folders = [folder_of("none", 1), folder_of("none", 2), folder_of("dropkey", 1, **changes), folder_of("dropkey", 2)]
    assert list(compare(folders).warnings) == warnings


def test_other_settings_than_dropout_are_told(folder_of):
    found = compare([folder_of("none", 1), folder_of("dropkey", 1, "train.learning_rate=0.01", "dropout.rate=0.3")])
    told = "dropkey and none differ in more than dropout: train.learning_rate is 0.01 and 0.001"
    assert found.warnings == (told,)
    assert [row.label for row in found.rows] == ["none", "dropkey"]


def test_other_rows_of_other_seeds_are_fair(folder_of):
    folders = [folder_of(method, seed) for method in ("none", "dropkey") for seed in (1, 2)]
    assert compare(folders).warnings == ()


def test_runs_that_are_not_finished_repeated_or_unpaired_are_told(folder_of):
    broken, again = folder_of("dropkey", 2, status="interrupted"), folder_of("none", 1, name="b")
    found = compare(
        [folder_of("none", 1), folder_of("none", 1), again, folder_of("dropkey", 1), folder_of("dropkey", 3), broken]
    )
    assert found.warnings == (
        f"{broken} is left out: interrupted, not finished",
        f"{again} is left out: none, seed 1 is there already",
        "dropkey and none are paired over 1 seed: only dropkey has seed 3",
    )
    assert found.rows[0].runs == (str(folder_of("none", 1)),)


def test_a_run_that_never_wrote_a_summary_is_left_out(folder_of):
    begun = folder_of("dropkey", 1)
    RunFolder(begun).summary.unlink()
    assert compare([folder_of("none", 1), begun]).warnings == (f"{begun} is left out: begun, not finished",)


def test_an_undefined_metric_is_no_win(folder_of):
    lost = {"train_probe": {"loss": 0.1, "accuracy": 0.5}, "validation": {"loss": 0.1, "accuracy": None}}
    folders = [folder_of("none", seed, accuracy=0.5 + seed / 100) for seed in (1, 2, 3)]
    folders += [folder_of("dropkey", seed, accuracy=0.9 - seed / 100) for seed in (1, 2)] + [
        folder_of("dropkey", 3, best=lost)
    ]
    score = compare(folders).rows[1].scores["best"]
    assert score.difference.text == "cannot tell (undefined for seed 3)"
    assert score.sample.n == 2


def test_the_baseline_can_be_named(folder_of):
    folders = [
        folder_of("none", 1),
        folder_of("dropkey", 1),
        folder_of("hiddencut", 1),
        folder_of("hiddencut", 1, "lora.r=2"),
    ]
    assert compare(folders, "dropkey").baseline == "dropkey"
    assert compare(folders, "hiddencut lora.r=2").baseline == "hiddencut lora.r=2"
    assert compare(folders[1:]).baseline == "dropkey"
    with pytest.raises(UsageError) as unknown:
        compare(folders, "dropky")
    rows = "none, dropkey, hiddencut lora.r=4, hiddencut lora.r=2"
    assert str(unknown.value) == (
        f"--baseline: the baseline 'dropky' is none of the rows\n  allowed: {rows}\n  hint: did you mean 'dropkey'?"
    )
    assert compare(folders, "hiddencut").rows[1].baseline == "hiddencut lora.r=4"  # as the others have it


def test_what_cannot_be_compared_is_refused(folder_of, tmp_path):
    with pytest.raises(UsageError, match="this is neither a run folder nor a curve of another tool"):
        compare([tmp_path])
    broken = folder_of("none", 1, status="failed")
    with pytest.raises(UsageError) as error:
        compare([broken])
    assert (
        str(error.value) == f"there is no finished run to compare\n  found: {broken} is left out: failed, not finished"
    )
    with pytest.raises(UsageError) as tasks:
        compare([folder_of("none", 2), folder_of("none", 3, task="regression")])
    assert str(tasks.value) == (
        "runs of different tasks cannot be compared\n  found: classification, regression\n  allowed: one task"
    )


def test_runs_told_by_different_metrics_meet_at_the_tasks_own(folder_of):
    found = compare([folder_of("none", 1, metric="f1"), folder_of("dropkey", 1)])
    assert found.metric == "accuracy"


def test_tables_of_runs_that_exist_are_written_only_where_a_folder_is_named(folder_of, tmp_path):
    folders = [folder_of("none", 1), folder_of("dropkey", 1)]
    before = sorted(tmp_path.rglob("*"))
    api.compare_runs(folders)
    assert sorted(tmp_path.rglob("*")) == before
    api.compare_runs(folders, output=tmp_path / "out")
    assert len(list((tmp_path / "out").iterdir())) == 5


def test_a_long_value_is_shortened_in_the_label_only(folder_of):
    folders = [folder_of("none", 1), folder_of("none", 1, "lora.target_modules=[query, key, value, dense]")]
    rows = compare(folders).rows
    assert rows[0].label == "none lora.target_modules=['query', 'value']"
    assert rows[1].label.startswith("none lora.target_modules=#")
    assert rows[1].settings == {"lora.target_modules": ["query", "key", "value", "dense"]}


def test_a_summary_of_a_run_on_a_cpu_explains_its_memory(folder_of):
    folder = folder_of("none", 1)
    environment = RunFolder(folder).environment
    write_json(environment, {"data": {}, "device": "cpu (2 threads)"})
    assert compare([folder]).notes[-1].startswith("on a CPU peak memory is the process's")


def test_the_papers_metric_stands_beside_its_number_or_neither_does(folder_of):
    """BLEU beside token accuracy would be two units in one row."""
    scored = {"test": {"accuracy": 0.7, "loss": 0.5, "bleu": 61.0}}
    folders = [folder_of(method, 1, **scored) for method in ("none", "hiddenkey")]
    found = compare(folders, paper_cell="table2/bleu")
    titles = [column.title for column in tables.columns(found)]
    assert [measure.title for measure in found.measures][:2] == ["test accuracy", "test bleu"]
    assert titles[2:6] == ["test accuracy", "median", "test bleu", "paper"]
    assert [row.paper for row in found.rows] == [68.50, 69.76]
    assert found.rows[1].scores["test_as_paper"].sample.mean == 61.0
    unscored = folder_of("dropkey", 1, test={"accuracy": 0.7, "loss": 0.5})
    lacking = compare([*folders, unscored], paper_cell="table2/bleu")
    assert (lacking.paper, [row.paper for row in lacking.rows]) == (None, [None] * 3)
    assert any("test bleu, which not every run was scored by" in warning for warning in lacking.warnings)
    same = compare(folders, paper_cell="table1/rte")  # of accuracy: the column that is there anyway
    assert "test_as_paper" not in {measure.key for measure in same.measures}
    assert same.rows[1].paper == 0.8810
