"""Which setting stands for a method, which baseline it is compared with, and what the grid's other keys become."""

import math

import pytest

from hkft.comparison.choice import standings
from hkft.comparison.compare import NO_WORD, compare
from hkft.comparison.runs import finished, grouped
from hkft.errors import UsageError


@pytest.fixture
def folder_of(recipe, write_run, tmp_path):
    """A run of a method and a seed; `settings` are `--set`s, the rest is the run's numbers."""

    def make(method, seed, *settings, **numbers):
        chosen = recipe.replace(f"dropout.method={method}", f"seed={seed}", *settings)
        return write_run(tmp_path / f"{method}-{seed}-{chosen.fingerprint()}", chosen, **numbers)

    return make


def standing(folders, baseline=None):
    groups, _ = grouped(finished(folders)[0])
    return standings(groups, baseline)


def chosen(folders, baseline=None):
    return [label for label, each in standing(folders, baseline).items() if each.chosen]


def baselines(folders, baseline=None):
    return {label: each.baseline for label, each in standing(folders, baseline).items()}


def rates(folder_of, *settings, seeds=(1, 2), **by_rate):
    """Runs of dropkey: {"loss": (of 0.1, of 0.2)}."""
    return [
        folder_of("dropkey", seed, f"dropout.rate={rate}", *settings, **{k: v[n] for k, v in by_rate.items()})
        for n, rate in enumerate((0.1, 0.2))
        for seed in seeds
    ]


@pytest.mark.parametrize(("settings", "best"), [((), "p=0.1"), (("diagnostics.metric=accuracy",), "p=0.2")])
def test_a_rate_is_chosen_by_the_number_that_chose_the_checkpoints(folder_of, settings, best):
    folders = rates(folder_of, *settings, loss=(0.4, 0.5), accuracy=(0.7, 0.9))
    found = standing([folder_of("none", 1, *settings), *folders])
    assert {label: (each.tried, each.chosen) for label, each in found.items()} == {
        "none": (1, True),
        "dropkey p=0.1": (2, best == "p=0.1"),
        "dropkey p=0.2": (2, best == "p=0.2"),
    }


def test_a_choice_is_by_validation_though_test_says_otherwise(folder_of):
    folders = [folder_of("none", 1, test={"loss": 0.5, "accuracy": 0.8})]
    for rate, loss, accuracy in ((0.1, 0.4, 0.1), (0.2, 0.6, 0.99)):
        tested = {"loss": loss, "accuracy": accuracy}
        folders.append(folder_of("dropkey", 1, f"dropout.rate={rate}", loss=loss, test=tested))
    found = compare(folders)
    assert (found.main, [row.label for row in found.compared]) == ("test", ["none", "dropkey p=0.1"])
    left = found.rows[2].scores["test"].difference
    assert (left.text, left.word, left.p, left.p_holm) == (NO_WORD, "cannot tell", None, None)
    assert "settings tried: none 1, dropkey 2; of each method the one that was best on validation stands for it" in (
        found.notes
    )


def test_a_choice_is_over_the_seeds_that_all_candidates_have(folder_of):
    """Seed 2, which only one rate has, is an easy one: it says nothing of the rate."""
    folders = [*rates(folder_of, loss=(0.5, 0.4), seeds=(1,)), folder_of("dropkey", 2, "dropout.rate=0.1", loss=0.1)]
    assert chosen(folders) == ["dropkey p=0.2"]


def test_a_setting_without_any_number_is_not_chosen(folder_of):
    lost = {"best": {"train_probe": {}, "validation": {"loss": None, "accuracy": None}}}
    for metric in ("loss", "accuracy"):
        of = f"diagnostics.metric={metric}"
        folders = [
            folder_of("dropkey", 1, of, "dropout.rate=0.1", **lost),
            folder_of("dropkey", 1, of, "dropout.rate=0.2"),
        ]
        assert chosen(folders) == ["dropkey p=0.2"]


def test_a_setting_that_is_undefined_on_a_seed_is_not_preferred_for_it(folder_of):
    lost = {"best": {"train_probe": {}, "validation": {"loss": None, "accuracy": None}}}
    folders = rates(folder_of, loss=(0.5, 0.45), seeds=(1,))
    folders += [
        folder_of("dropkey", 2, "dropout.rate=0.1", loss=0.5),
        folder_of("dropkey", 2, "dropout.rate=0.2", **lost),
    ]
    assert chosen(folders) == ["dropkey p=0.1"]


def test_candidates_without_a_common_seed_still_leave_one_chosen(folder_of):
    folders = [folder_of("dropkey", 1, "dropout.rate=0.1"), folder_of("dropkey", 2, "dropout.rate=0.2", loss=math.inf)]
    assert len(chosen(folders)) == 1


def test_a_control_is_a_row_of_its_own_beside_the_baseline(folder_of):
    folders = [folder_of("none", 1), folder_of("dropkey", 1)]
    folders += [folder_of("none", 1, "train.weight_decay=0.1"), folder_of("none", 1, "lora.r=2")]
    found = standing(folders)
    assert {label: (each.facet, each.tried, each.chosen) for label, each in found.items()} == {
        label: ({}, 1, True) for label in ("none", "dropkey", "none train.weight_decay=0.1", "none lora.r=2")
    }
    assert {each.baseline for each in found.values()} == {"none"}
    assert compare(folders).rows[2].scores["best"].difference is not None


def test_one_control_does_not_become_the_baseline(folder_of):
    folders = [
        folder_of("none", 1, "lora.r=16"),
        folder_of("dropkey", 1, "lora.r=16"),
        folder_of("none", 1, "lora.r=4"),
    ]
    assert baselines(folders)["dropkey"] == "none lora.r=16"


def test_the_baseline_may_be_named_by_its_method_beside_one_control(folder_of):
    folders = [folder_of("none", 1), folder_of("dropkey", 1), folder_of("none", 1, "train.weight_decay=0.1")]
    assert baselines(folders, "none")["dropkey"] == "none train.weight_decay=0"


def test_variants_of_dropout_are_rows_and_not_tuned(folder_of):
    """As in recipes/paper/layers.yaml and branches.yaml: what is asked is how they differ."""
    sites = [f"dropout.sites=[{{position: hidden, rate: 0.1, layers: {layers}}}]" for layers in ("all", "[0, 1]")]
    folders = [folder_of("none", 1), *(folder_of("custom", 1, each) for each in sites)]
    folders += [folder_of("hiddenkey", 1), folder_of("hiddenkey", 1, "dropout.gradient=both")]
    found = standing(folders)
    assert len(found) == 5
    assert {(each.tried, each.chosen, each.baseline) for each in found.values()} == {(1, True, "none")}


def test_names_of_a_grid_are_labels(folder_of):
    plain, control, other = folder_of("none", 1), folder_of("none", 1, "lora.r=2"), folder_of("dropkey", 1)
    names = {plain: "none", control: "rank 2", other: "none"}
    found = compare([plain, control, other], names=names)
    assert [row.label for row in found.rows] == ["none", "rank 2", "dropkey"]
    assert compare([plain, control, other], "rank 2", names=names).baseline == "rank 2"


@pytest.mark.parametrize("ranks", [(), (2, 4)])
def test_a_control_of_a_short_name_does_not_become_the_baseline(folder_of, ranks):
    names = {folder_of("none", 1, "train.weight_decay=0.3"): "wd"}
    for method in ("none", "dropkey"):
        of = [(f"lora.r={r}",) for r in ranks] or [()]
        names |= {folder_of(method, 1, *each): " ".join([method, *each]) for each in of}
    found = compare([*names], names=names)
    baselines = {row.baseline for row in found.rows if row.method == "dropkey"}
    assert baselines == ({f"none lora.r={r}" for r in ranks} or {"none"})


def test_ranks_are_facets_each_with_its_own_baseline(folder_of):
    folders = [folder_of(method, 1, f"lora.r={r}") for method in ("none", "dropkey") for r in (4, 8)]
    found = standing(folders)
    assert {label: (each.facet, each.baseline) for label, each in found.items()} == {
        f"{method} lora.r={r}": ({"lora.r": r}, f"none lora.r={r}") for method in ("none", "dropkey") for r in (4, 8)
    }
    assert compare(folders).warnings == ()


@pytest.mark.parametrize("best", [("p=0.1", "p=0.2"), ("p=0.2", "p=0.1")])
def test_a_rate_is_chosen_at_each_rank(folder_of, best):
    folders = [folder_of("none", 1, f"lora.r={r}") for r in (4, 8)]
    for r, winner in zip((4, 8), best, strict=True):
        losses = [0.4 if winner == f"p={rate}" else 0.5 for rate in (0.1, 0.2)]
        folders += rates(folder_of, f"lora.r={r}", seeds=(1,), loss=losses)
    found = {label: each for label, each in standing(folders).items() if label.startswith("dropkey")}
    assert [label for label, each in found.items() if each.chosen] == [
        f"dropkey lora.r=4 {best[0]}", f"dropkey lora.r=8 {best[1]}",
    ]  # fmt: skip
    assert all(each.tried == 2 and each.baseline == f"none lora.r={each.facet['lora.r']}" for each in found.values())


def test_a_method_of_one_rank_is_compared_at_that_rank(folder_of):
    folders = [folder_of(method, 1, f"lora.r={r}") for method in ("none", "dropkey") for r in (4, 8)]
    assert baselines([*folders, folder_of("hiddencut", 1, "lora.r=8")])["hiddencut"] == "none lora.r=8"


def test_a_rank_that_the_baseline_lacks_is_compared_with_what_there_is(folder_of):
    folders = [folder_of("none", 1, "lora.r=4"), folder_of("none", 1, "lora.r=8")]
    folders += [folder_of("dropkey", 1, f"lora.r={r}") for r in (4, 8, 16)]
    assert baselines(folders)["dropkey lora.r=16"] in ("none lora.r=4", "none lora.r=8")


def test_another_rank_than_the_baselines_is_told(folder_of):
    folders = [folder_of("none", 1, "lora.r=4"), folder_of("none", 1, "lora.r=8")]
    folders += [folder_of("dropkey", 1, f"lora.r={r}") for r in (4, 8, 16)]
    assert any("lora.r is 16" in warning for warning in compare(folders).warnings)


def test_a_usual_value_that_the_baseline_has_not_is_told(folder_of):
    """The row is called `dropkey`, and has ten times the baseline's learning rate."""
    fast = "train.learning_rate=0.01"
    folders = [folder_of("none", 1), folder_of("dropkey", 1, fast), folder_of("dropkey", 1, fast, "lora.r=8")]
    found = compare([*folders, folder_of("dropkey", 1)])
    assert found.rows[1].label != "dropkey" or any(fast.partition("=")[0] in each for each in found.warnings)


def test_a_choice_by_fewer_seeds_than_there_are_is_told(folder_of):
    folders = [folder_of("none", seed) for seed in (1, 2, 3)]
    folders += [folder_of("dropkey", seed, "dropout.rate=0.1") for seed in (1, 2, 3)]
    found = compare([*folders, folder_of("dropkey", 1, "dropout.rate=0.2", loss=0.7)])
    assert found.warnings or any("1 seed" in note for note in found.notes)


def test_that_one_run_has_no_test_number_is_told(folder_of):
    tested = {"test": {"loss": 0.4, "accuracy": 0.8}}
    found = compare([folder_of("none", 1, **tested), folder_of("none", 2, **tested), folder_of("dropkey", 1)])
    assert found.main == "best"
    assert any("test" in each.replace("t test", "") for each in (*found.warnings, *found.notes))


def test_the_baseline_by_label_and_by_method(folder_of):
    folders = [folder_of("none", 1), folder_of("hiddencut", 1), *rates(folder_of, loss=(0.5, 0.4))]
    assert set(baselines(folders).values()) == {"none"}
    assert set(baselines(folders[1:]).values()) == {"hiddencut"}
    assert set(baselines(folders, "hiddencut").values()) == {"hiddencut"}
    assert set(baselines(folders, "dropkey").values()) == {"dropkey p=0.2"}  # a method's chosen setting
    assert set(baselines(folders, "dropkey p=0.1").values()) == {"dropkey p=0.1"}


def test_a_baseline_that_is_named_is_the_baseline_of_its_rank(folder_of):
    folders = [folder_of("none", 1, f"lora.r={r}") for r in (4, 8)]
    folders += [each for r in (4, 8) for each in rates(folder_of, f"lora.r={r}", seeds=(1,), loss=(0.5, 0.4))]
    assert baselines(folders, "dropkey lora.r=4 p=0.1")["none lora.r=4"] == "dropkey lora.r=4 p=0.1"


def test_a_baseline_that_is_none_is_refused(folder_of):
    folders = [folder_of("none", 1), folder_of("hiddencut", 1), folder_of("hiddencut", 1, "lora.r=2")]
    with pytest.raises(UsageError, match="'hidencut' is none of the rows") as unknown:
        standing(folders, "hidencut")
    assert unknown.value.problems[0].where == "--baseline"
    assert standing(folders, "hiddencut")["none"].baseline == "hiddencut lora.r=4"


def test_a_baseline_with_a_grid_of_its_own_is_tuned_too(folder_of):
    folders = [*rates(folder_of, loss=(0.6, 0.5)), folder_of("hiddencut", 1), folder_of("hiddencut", 2)]
    found = compare(folders, "dropkey")
    assert {row.label: (row.tried, row.chosen, row.baseline) for row in found.rows} == {
        "dropkey p=0.1": (2, False, "dropkey p=0.2"),
        "dropkey p=0.2": (2, True, "dropkey p=0.2"),
        "hiddencut": (1, True, "dropkey p=0.2"),
    }
    assert found.baseline == "dropkey p=0.2"
    assert found.rows[1].scores["best"].difference is None
    assert found.rows[0].scores["best"].difference.text == NO_WORD
