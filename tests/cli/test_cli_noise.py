"""`hkft noise`: on a recipe's fresh adapter, on what was trained, and where it cannot be."""

from __future__ import annotations

import pytest


def test_on_a_recipe_and_on_a_run(hkft, tiny):
    assert hkft("train", "--recipe", tiny, "--output", "run").code == 0
    for source in (["--recipe", tiny], ["run"]):
        ran = hkft("noise", *source, "--draws", "4", "--rows", "8", "--rate", "0.3", "--json")
        assert ran.code == 0
        key, attention = ran.document
        assert [key["method"], attention["method"]] == ["dropkey", "dropattention"]
        assert key["loss"] == pytest.approx(attention["loss"], rel=1e-5)
        assert (key["dropped_share"], key["draws"], key["rate"]) == (0, 4, 0.3)
        assert attention["dropped_share"] > 0.01
        assert min(key["noise"], attention["noise"]) > 0


def test_as_a_table(hkft, tiny):
    ran = hkft("noise", "--recipe", tiny, "--methods", "dropkey,hiddencut", "--draws", "2")
    assert ran.code == 0
    title, head, *rows = ran.out.splitlines()
    assert title == f"{tiny}: 16 rows, rate 0.1, 2 masks"
    assert head.split() == "method loss gradient noise / signal on dropped logits".split()
    assert [row.split()[0] for row in rows] == ["dropkey", "hiddencut"]
    assert [row.split()[-1] for row in rows] == ["0.0%", "-"]


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ([], "there is nothing to measure on"),
        (["nowhere"], "there is no such folder"),
        (["--recipe", "tiny.yaml", "--methods", "dropkee"], "there is no method 'dropkee'"),
        (["--recipe", "tiny.yaml", "--rate", "1.5"], "a dropout rate is a probability"),
    ],
)
def test_errors_are_told_in_one_message(hkft, tiny, args, said):
    ran = hkft("noise", *args)
    assert ran.code == 2
    assert said in ran.err
    assert "Traceback" not in ran.err
