"""Conditions that end a build, and the words that a build requires."""

import pytest

from hkft.comparison import gates
from hkft.comparison.compare import compare
from hkft.errors import UsageError


@pytest.fixture
def comparison(recipe, write_run, tmp_path):
    """None and dropkey over three seeds: of dropkey the loss is lower, at 1.5 times the time. changes: of its last run."""

    def make(tested=True, **changes):
        folders = []
        for method, loss, seconds in (("none", 0.6, 10.0), ("dropkey", 0.5, 15.0)):
            for seed in (1, 2, 3):
                cell = recipe.replace(f"dropout.method={method}", f"seed={seed}")
                more = {"test": {"loss": loss, "accuracy": 0.7 + seed / 100}} if tested else {}
                more |= changes if (method, seed) == ("dropkey", 3) else {}
                numbers = {"accuracy": 0.8 + seed / 100, "loss": loss + seed / 1000, "gap": 0.1 * seed}
                place = tmp_path / f"{method}-{seed}"
                folders.append(write_run(place, cell, **numbers, train_runtime_s=seconds, **more))
        return compare(folders)

    return make


@pytest.mark.parametrize(("text", "found"), [
    ("gap.loss > 0.3", ("gap.loss", ">", 0.3)), ("time>=1.5", ("time", ">=", 1.5)),
    (" best.rouge_l<-1e-3 ", ("best.rouge_l", "<", -0.001)), ("best_gap.f1 <= .5", ("best_gap.f1", "<=", 0.5)),
])  # fmt: skip
def test_a_condition_is_a_name_a_sign_and_a_number(text, found):
    assert gates.check(text) == found


@pytest.mark.parametrize("text", [
    "", "gap", "gap > 0.3", "gap. > 0.3", "gap.loss > much", "gap.loss = 0.3", "gap.loss 0.3", "gaps.loss > 1",
    "time.loss > 1", "gap.loss > 0.3 > 0.2", "gap.loss > nan",
])  # fmt: skip
def test_what_is_no_condition_is_refused(text):
    with pytest.raises(UsageError, match="not a condition") as error:
        gates.check(text)
    (problem,) = error.value.problems
    assert (problem.where, problem.found) == ("--fail-if", repr(text))
    assert '"gap.loss > 0.3"; names: test.<metric>, best.<metric>' in problem.allowed


def test_a_number_with_two_points_is_no_number():
    with pytest.raises(UsageError, match="not a number"):
        gates.check("gap.loss > 1.2.3")


def test_a_name_that_is_nearly_one_has_a_hint():
    with pytest.raises(UsageError) as error:
        gates.check("finl.loss > 1")
    assert error.value.problems[0].hint == "did you mean 'final'?"


def test_a_name_without_its_metric_is_not_answered_by_itself():
    with pytest.raises(UsageError) as error:
        gates.check("gap > 0.3")
    assert error.value.problems[0].hint != "did you mean 'gap'?"


@pytest.mark.parametrize(("condition", "rows"), [
    ("gap.loss > 0.2999", ["none", "dropkey"]), ("gap.loss > 0.3001", []), ("best_gap.loss >= 0.1999", ["none", "dropkey"]),
    ("best.accuracy < 0.82", []), ("best.accuracy <= 0.82001", ["none", "dropkey"]), ("final.loss > 0.65", ["none"]),
    ("test.loss < 0.55", ["dropkey"]), ("time > 1.2", ["dropkey"]), ("time >= 1", ["none", "dropkey"]),
])  # fmt: skip
def test_a_condition_is_of_the_mean_of_every_row(comparison, condition, rows):
    assert [said.partition(":")[0] for said in gates.failures(comparison(), [condition])] == rows


def test_a_sentence_says_what_it_is_and_what_was_asked(comparison):
    assert gates.failures(comparison(), ["test.loss < 0.55"]) == [
        "dropkey: test.loss is 0.5, and --fail-if test.loss < 0.55"
    ]


def test_a_number_that_no_run_has_is_refused(comparison):
    for name in ("best.bleu", "test.accuracy"):
        with pytest.raises(UsageError, match=f"no run of none has a number {name}"):
            gates.failures(comparison(tested=False), [f"{name} < 1"])


def test_a_number_that_one_run_lacks_does_not_pass(comparison):
    found = comparison(best={"train_probe": {}, "validation": {"loss": 0.5, "accuracy": None}})
    assert gates.failures(found, ["best.accuracy < 0.1"])


def test_a_time_that_is_not_known_does_not_pass(recipe, write_run, tmp_path):
    cells = [recipe.replace("dropout.method=none"), recipe.replace("dropout.method=dropkey", "seed=2")]
    found = compare([write_run(tmp_path / cell.method.name, cell) for cell in cells])
    assert found.rows[1].time_ratio is None
    assert gates.failures(found, ["time > 1.2"]) == ["dropkey: time is unknown, and --fail-if time > 1.2"]


def test_required_words(comparison):
    found = comparison()
    assert found.rows[1].scores[found.main].difference.word == "cannot tell"
    assert gates.failures(found, require="not worse") == []
    (said,) = gates.failures(found, require="better")
    assert said.startswith("dropkey against none: cannot tell (n = 3 seeds")
    assert said.endswith(", and --require better")


def test_what_is_surely_better_or_worse(recipe, write_run, tmp_path):
    folders = [
        write_run(
            tmp_path / f"{method}-{seed}",
            recipe.replace(f"dropout.method={method}", f"seed={seed}"),
            accuracy=accuracy + seed / 100 + (seed % 2) / 1000 * (method != "none"),
        )
        for method, accuracy in (("none", 0.7), ("dropkey", 0.8), ("hiddencut", 0.6))
        for seed in (1, 2, 3)
    ]
    found = compare(folders)
    for require in ("better", "not worse"):
        assert gates.failures(found, require=require) == [f"hiddencut against none: worse, and --require {require}"]


def test_settings_that_were_not_chosen_are_no_gates_matter(recipe, write_run, tmp_path):
    folders = [
        write_run(tmp_path / f"{rate}", recipe.replace("dropout.method=dropkey", f"dropout.rate={rate}"), loss=loss)
        for rate, loss in ((0.1, 0.4), (0.5, 0.9))
    ]
    assert gates.failures(compare(folders), ["best.loss > 0.5"]) == []


def test_another_word_is_refused(comparison):
    with pytest.raises(UsageError) as error:
        gates.failures(comparison(), require="best")
    assert str(error.value) == "--require: no such word\n  found: 'best'\n  allowed: better, not worse"
