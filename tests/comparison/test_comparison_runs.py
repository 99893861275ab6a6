"""Finished runs: what their groups are called, and the single rows behind a number."""

import numpy as np
import pytest

from hkft import api
from hkft.comparison.runs import finished, grouped
from hkft.evaluation import saved
from hkft.folder import RunFolder, read_json, write_json, write_jsonl


@pytest.fixture
def run_of(recipe, write_run, tmp_path):
    def make(method, *settings, seed=1, name="", **numbers):
        chosen = recipe.replace(f"dropout.method={method}", f"seed={seed}", *settings)
        ((run,), _) = finished([write_run(tmp_path / f"{method}{seed}{name}{chosen.fingerprint()}", chosen, **numbers)])
        return run

    return make


def labels(*runs):
    return list(grouped(runs)[0])


def test_the_usual_value_goes_without_saying(run_of):
    runs = [run_of("none"), run_of("none", "lora.r=2"), run_of("none", "train.weight_decay=0.1"), run_of("dropkey")]
    assert labels(*runs) == ["none", "none lora.r=2", "none train.weight_decay=0.1", "dropkey"]


def test_where_no_value_is_usual_all_are_told(run_of):
    assert labels(run_of("none", "lora.r=2"), run_of("none")) == ["none lora.r=2", "none lora.r=4"]
    three = [run_of("dropkey", f"dropout.rate={rate}") for rate in (0.1, 0.2, 0.5)]
    assert labels(*three) == ["dropkey p=0.1", "dropkey p=0.2", "dropkey p=0.5"]


def test_what_is_usual_is_counted_over_groups_and_not_over_seeds(run_of):
    runs = [run_of("none", seed=seed) for seed in (1, 2, 3)] + [run_of("none", "lora.r=2")]
    assert labels(*runs) == ["none lora.r=4", "none lora.r=2"]


def test_a_label_is_of_one_group_each(run_of):
    runs = [run_of("dropkey", f"dropout.rate={p}", f"lora.r={r}") for p in (0.1, 0.2) for r in (4, 8)]
    runs.append(run_of("dropkey", "dropout.rate=0.1", "lora.r=16"))
    found, repeated = grouped(runs)
    assert (len(found), repeated) == (5, [])
    assert [dict(group.settings) for group in found.values()] == [
        {"lora.r": run.settings["lora.r"], "dropout.rate": run.settings["dropout.rate"]} for run in runs
    ]


def test_values_that_are_nearly_equal_are_two_groups(run_of):
    runs = [run_of("none", f"train.learning_rate={rate}") for rate in (0.001, 0.0010000001)]
    assert len(grouped(runs)[0]) == 2


def test_neither_the_seed_nor_the_device_makes_a_group(run_of):
    found, repeated = grouped([run_of("none"), run_of("none", "model.device=cpu", seed=2)])
    assert ([group.seeds for group in found.values()], repeated) == ([(1, 2)], [])


def test_a_run_that_is_there_already_is_told_and_left_out(run_of):
    first, again = run_of("none"), run_of("none", name="again")
    found, repeated = grouped([first, again])
    assert found["none"].runs == {1: first}
    assert repeated == [f"{again.folder} is left out: none, seed 1 is there already"]


def test_passes_and_criterion(run_of):
    consistency = {"consistency": {"kind": "kl", "weight": 0.5}}
    assert run_of("hiddenkey", dropout=consistency).passes == 2
    assert run_of("hiddenkey", "dropout.weight=0.0", dropout={"consistency": {"weight": 0.0}}).passes == 1
    assert run_of("none", dropout={"consistency": None}).passes == 1
    assert (run_of("none").criterion, run_of("none", "diagnostics.metric=f1").criterion) == ("loss", "f1")


def keep(run, split, *records):
    write_jsonl(RunFolder(run.folder).predictions(split), [{"id": n, **record} for n, record in enumerate(records)])
    return run


def test_examples_of_a_classification(run_of):
    records = [
        {"label": "yes", "prediction": "yes", "loss": 0.1, "logits": [1, 0]},
        {"label": "no", "prediction": "yes", "loss": 2.5, "logits": [1, 0]},
    ]
    run = keep(run_of("none"), "test", *records)
    found = run.examples("test", "accuracy")
    assert (found.ids, found.values.tolist(), found.weights.tolist()) == ((0, 1), [1.0, 0.0], [1, 1])
    assert run.examples("test", "loss").sums.tolist() == [0.1, 2.5]
    assert run.examples("validation", "accuracy") is None
    assert run.examples("test", "f1") is None  # nobody said which class is the second
    write_json(RunFolder(run.folder).splits, {"labels": ["no", "yes"]})
    assert run.examples("test", "f1").mean == pytest.approx(2 / 3)
    assert run.examples("test", "spearman") is None


def test_examples_of_a_regression(run_of):
    run = keep(run_of("none"), "validation", {"label": 1.0, "prediction": 1.5, "loss": 0.5})
    assert run.examples("validation", "loss").values.tolist() == [0.5]
    other = keep(run_of("dropkey"), "validation", {"label": 1.0, "prediction": 1.5, "loss": 0.25})
    assert other.examples("validation", "loss") is None  # not what the summary's loss was made of
    assert run.examples("validation", "pearson") is None


def test_examples_of_completions_weigh_by_their_tokens(run_of):
    records = [
        {"label": "a", "prediction": "a", "loss": 2.0, "tokens": 3},
        {"label": "b", "prediction": None, "loss": 1.0, "tokens": 1},
    ]
    run = keep(run_of("none"), "test", *records)
    found = run.examples("test", "loss")
    assert (found.weights.tolist(), found.sums.tolist()) == ([3, 1], [6.0, 1.0])
    assert run.examples("test", "accuracy") is None  # text that is the same letter by letter is no accuracy


def test_a_loss_that_is_undefined_is_nan(run_of):
    found = keep(run_of("none"), "test", {"label": "a", "prediction": "a", "loss": None}).examples("test", "loss")
    assert np.isnan(found.values).all()


@pytest.fixture
def tested(recipe_file, tmp_path):
    """A real run with its test rows."""
    run = api.train(recipe_file, ["data.test=0.2", "train.num_train_epochs=1"], output=tmp_path / "run")
    api.evaluate_test(run)
    return run


def agree(folder):
    """Whether the mean over the single rows is the number of the summary."""
    ((run,), _) = finished([folder])
    summary = read_json(RunFolder(folder).summary)
    return [
        run.examples(split, name).values.mean() == pytest.approx(number[name], rel=1e-6)
        for split, number in (("test", summary["test"]), ("validation", summary["best"]["validation"]))
        for name in ("loss", "accuracy")
    ]


def test_single_rows_are_those_of_the_number(tested):
    assert agree(tested.path) == [True] * 4


@pytest.mark.parametrize("how", [{"overrides": ["data.test=0.1"]}, {"checkpoint": "first"}])
def test_single_rows_are_of_the_best_checkpoint_though_another_was_looked_at(tested, how):
    if "checkpoint" in how:
        how = {"checkpoint": str(min(tested.checkpoints.glob("checkpoint-*"), key=lambda path: int(path.name[11:])))}
    other = saved.load_saved(tested.path, **how)
    saved.keep(other, "test", saved.evaluate(other, "test"))
    assert agree(tested.path) == [True] * 4
