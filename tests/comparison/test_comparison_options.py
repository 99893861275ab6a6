"""What a person types of a grid."""

import pytest

from hkft.comparison import grid, options
from hkft.errors import UsageError


@pytest.mark.parametrize(("text", "found"), [
    (None, None), ("5", 5), ("1", 1), ("1,2,7", [1, 2, 7]), ("3,", [3]), ("0,1", [0, 1]), (" 4 ", 4),
])  # fmt: skip
def test_seeds_are_a_number_or_a_list(text, found):
    assert options.seeds(text) == found


@pytest.mark.parametrize("text", ["", "many", "1.5", "-1", "1,-2", "true", "1,x", "[1]", "1]", "null", "1,,2", "1e3x"])
def test_what_are_no_seeds(text):
    with pytest.raises(UsageError) as error:
        options.seeds(text)
    (problem,) = error.value.problems
    assert (problem.where, problem.found, problem.allowed) == ("--seeds", repr(text), "5, or 1,2,7")


def test_no_seed_is_an_empty_grid():
    with pytest.raises(UsageError, match="--seeds: the grid is empty"):
        options.seeds("0")


def test_rates_ranks_and_any_key_are_axes():
    assert options.axes(None, None, ()) == {}
    assert options.axes("0.1,0.2", "4,8", ["train.learning_rate=1e-4,1e-3", "lora.use_dora = true,false"]) == {
        "dropout.rate": [0.1, 0.2],
        "lora.r": [4, 8],
        "train.learning_rate": [1e-4, 1e-3],
        "lora.use_dora": [True, False],
    }


def test_values_are_read_as_a_recipe_reads_them():
    found = options.axes(None, None, ["data.text=[a, b],c", "x.y=on,'1'", "lora.modules_to_save={a: 1}"])
    assert found == {"data.text": [["a", "b"], "c"], "x.y": ["on", "1"], "lora.modules_to_save": [{"a": 1}]}


@pytest.mark.parametrize(("rates", "ranks", "where", "allowed"), [
    ("", None, "--rates", "0.1,0.2"), ("0.1,a", None, "--rates", "0.1,0.2"), ("true", None, "--rates", "0.1,0.2"),
    ("0.1 0.2", None, "--rates", "0.1,0.2"), (None, "4,eight", "--ranks", "4,8,16"), (None, "]", "--ranks", "4,8,16"),
    (None, "4,null", "--ranks", "4,8,16"),
])  # fmt: skip
def test_what_are_no_numbers(rates, ranks, where, allowed):
    with pytest.raises(UsageError) as error:
        options.axes(rates, ranks, ())
    (problem,) = error.value.problems
    assert (problem.where, problem.found, problem.allowed) == (
        where,
        repr(rates if rates is not None else ranks),
        allowed,
    )


@pytest.mark.parametrize(("text", "message", "where"), [
    ("lora.r", "not an axis", "--grid"), ("=4,8", "not an axis", "--grid"),
    ("lora.r=", "not a list of values", "--grid lora.r"), ("lora.r=[4", "not a list of values", "--grid lora.r"),
    ("lora.r=4,null", "not a list of values", "--grid lora.r"),
])  # fmt: skip
def test_what_is_no_axis(text, message, where):
    with pytest.raises(UsageError) as error:
        options.axes(None, None, [text])
    (problem,) = error.value.problems
    assert (problem.message, problem.where) == (message, where)
    assert problem.allowed == "section.key=value,value"


def test_names():
    assert options.names(None) is None
    assert options.names("none, dropkey/span") == ["none", "dropkey/span"]


@pytest.mark.parametrize(("axes", "where"), [
    ({"lora.rank": [4]}, "--grid lora.rank"), ({"lora.r": [4, "x"]}, "--grid lora.r"), ({"seed": [1]}, "--grid seed"),
    ({"train.learning_rate": [-1e-3, "fast"]}, "--grid train.learning_rate"),
])  # fmt: skip
def test_keys_and_values_that_the_recipe_refuses(recipe, axes, where):
    with pytest.raises(UsageError) as error:
        grid.cells(recipe, ["none"], 1, axes)
    assert {problem.where for problem in error.value.problems} == {where}


def test_values_may_be_lists(recipe):
    axes = options.axes(None, None, ["lora.target_modules=[query],[query, value]"])
    assert len(grid.cells(recipe, ["none"], 1, axes)) == 2


def test_values_are_what_the_cells_have(recipe):
    cells = grid.cells(recipe, ["none", "dropkey"], [3, 5], options.axes("0.2,0.3", "2,4", ()))
    found = [(each.recipe.seed, each.row, each.recipe.dropout.rate, each.recipe.lora["r"]) for each in cells]
    assert found == [
        (seed, *of)
        for seed in (3, 5)
        for of in (
            ("none r=2", 0.1, 2),  # a rate is nothing to it
            ("none r=4", 0.1, 4),
            *((f"dropkey p={p:g} r={r}", p, r) for p in (0.2, 0.3) for r in (2, 4)),
        )
    ]
