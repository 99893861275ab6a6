"""The whole walk: train, what it says to type next, eval, merge, compare."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest

from hkft.folder import RunFolder, read_json, write_text


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# --- eval -------------------------------------------------------------------------------------------------------------


def test_eval_gives_training_s_own_numbers(hkft, run):
    summary = read_json(run / "summary.json")
    assert summary["status"] == "finished"
    ran = hkft("eval", "run", "--json")
    assert ran.code == 0, ran.err
    assert (ran.document["split"], ran.document["checkpoint"], ran.document["rows"]) == ("validation", "best", 40)
    assert ran.document["metrics"] == pytest.approx(summary["best"]["validation"], rel=1e-6)
    last = hkft("eval", "run", "--checkpoint", "last", "--json").document
    assert last["metrics"] == pytest.approx(summary["final"]["validation"], rel=1e-6)


def test_eval_in_text_is_one_table(hkft, run):
    ran = hkft("eval", "run")
    best = read_json(run / "summary.json")["best"]["validation"]
    title, head, *rows = ran.out.splitlines()
    assert title == "run (best), 40 rows"
    assert head.split() == ["metric", "validation"]
    assert {name: float(value) for name, value in map(str.split, rows)} == pytest.approx(best, abs=1e-4, rel=1e-3)
    assert ran.err.splitlines()[0] == "starting torch and transformers"
    assert ran.err.splitlines()[-1] == "evaluating validation"


def test_eval_on_any_file_with_the_same_columns(hkft, run, reviews):
    rows = reviews.read_text(encoding="utf-8").splitlines()
    Path("unseen.csv").write_text("\n".join(rows[:11]) + "\n", encoding="utf-8")
    ran = hkft("eval", "run", "--split", "unseen.csv", "--json")
    assert ran.code == 0, ran.err
    assert ran.document["rows"] == 10
    kept = Path(ran.document["predictions"])
    assert kept == run / "predictions" / "unseen.jsonl"
    predicted = lines(kept)
    right = sum(row["prediction"] == row["label"] for row in predicted) / len(predicted)
    assert ran.document["metrics"]["accuracy"] == pytest.approx(right)
    named = hkft("eval", "run", "--split", "test", "--set", "data.test=unseen.csv", "--json").document
    assert named["metrics"] == ran.document["metrics"]


def test_eval_on_a_bare_adapter_needs_its_recipe(hkft, run, tiny):
    expected = read_json(run / "summary.json")["best"]["validation"]
    shutil.move(run / "adapter", "adapter")
    shutil.rmtree(run)
    alone = hkft("eval", "adapter")
    assert alone.code == 2
    assert "error: an adapter alone does not say what its task and its data are" in alone.err
    ran = hkft("eval", "adapter", "--recipe", tiny, "--json")
    assert ran.document["metrics"] == pytest.approx(expected, rel=1e-6)
    assert ran.document["predictions"] is None


# --- merge ------------------------------------------------------------------------------------------------------------


def test_merge_writes_what_plain_transformers_opens(hkft, run, reviews):
    ran = hkft("merge", "run", "--output", "merged", "--json")
    assert ran.code == 0, ran.err
    assert ran.document["verification"]["passed"] is True
    assert ran.document["verification"]["rows"] == 40
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model, tokenizer = (kind.from_pretrained("merged") for kind in (AutoModelForSequenceClassification, AutoTokenizer))
    text = {row: line.split(",")[0] for row, line in enumerate(reviews.read_text(encoding="utf-8").splitlines()[1:])}
    predicted = lines(run / "predictions" / "validation.jsonl")
    batch = tokenizer([text[row["id"]] for row in predicted], padding=True, return_tensors="pt")
    found = [model.config.id2label[label] for label in model(**batch).logits.argmax(-1).tolist()]
    assert found == [row["prediction"] for row in predicted]
    assert type(model).__module__.startswith("transformers.")


def test_merge_in_text_says_what_was_verified(hkft, run):
    ran = hkft("merge", "run", "--output", "merged", "--dtype", "bfloat16")
    assert ran.code == 0, ran.err
    table = dict(re.split("  +", line, maxsplit=1) for line in ran.out.splitlines()[1:])
    assert table["merged model"] == str(Path("merged").resolve())
    assert table["dtype"] == "bfloat16"
    assert table["verified on"] == "40 rows of validation"
    assert "tolerance" in table["max |logit difference|"]
    assert re.fullmatch(r"loss [+-]\S+, accuracy \+0", table["merged less adapted"])
    unverified = hkft("merge", "run", "--output", "quick", "--no-verify")
    assert re.search("verified +no \\(--no-verify\\)", unverified.out)


def test_merge_of_several_is_their_average(hkft, run):
    told = hkft("merge", "run", "run", "--output", "soup", "--weights", "0.25,0.75", "--json").document
    assert told["verification"]["passed"]
    assert read_json(Path("soup") / "merge.json")["weights"] == [0.25, 0.75]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--weights", "a,b"), "not a list of numbers"),
        (("--weights", "0.5,0.5"), "the weights of an average are as many as its adapters"),
        (("--base", "dequantized"), "there is no base 'dequantized'"),
        (("--public",), "nothing is uploaded"),
        (("--push-to-hub", "not a name"), "--push-to-hub"),
    ],
)
def test_merge_options_that_make_no_sense_are_told_before_anything_is_written(hkft, run, options, said):
    refused = hkft("merge", "run", "--output", "merged", *options)
    assert refused.code == 2
    assert said in refused.err
    assert not Path("merged").exists()


def test_merge_into_an_existing_folder_is_refused(hkft, run):
    write_text(Path("mine/thesis.txt"), "years of work")
    refused = hkft("merge", "run", "--output", "mine")
    assert (refused.code, refused.out) == (2, "")
    assert "Traceback" not in refused.err
    assert [path.name for path in Path("mine").iterdir()] == ["thesis.txt"]
    assert hkft("merge", "run", "--output", "merged").code == 0
    before = (Path("merged") / "merge.json").stat().st_mtime_ns
    again = hkft("merge", "run", "--output", "merged")
    assert again.code == 2
    assert again.err.endswith(
        f"error: there is a merged model already\n  where    {Path('merged').resolve()}\n  hint     --force replaces it\n"
    )
    assert (Path("merged") / "merge.json").stat().st_mtime_ns == before
    assert hkft("merge", "run", "--output", "merged", "--force").code == 0
    assert sorted(path.name for path in Path().iterdir()) == ["merged", "mine", "run"]


# --- the commands that training names ---------------------------------------------------------------------------------


def test_the_commands_that_training_ends_with_work(hkft, tiny):
    trained = hkft("train", "--recipe", tiny)
    assert trained.code == 0
    following = [line.rpartition(": ")[2] for line in trained.err.splitlines() if line.startswith("next: ")]
    assert following[-1].startswith("hkft diagnose runs/tiny-")
    for command in following:
        if "hkft compare" in command:  # another test's matter
            continue
        ran = hkft(*shlex.split(command)[1:])
        assert ran.code == 0, ran.err


# --- compare ----------------------------------------------------------------------------------------------------------

GRID = ("--methods", "none,dropkey", "--seeds", "2", "--output", "grid")


def test_compare_runs_a_grid_once_and_tells_it(hkft, tiny):
    ran = hkft("compare", "--recipe", tiny, *GRID, "--json")
    assert ran.code == 0, ran.err
    assert [(row["label"], row["seeds"]) for row in ran.document["rows"]] == [("none", [1, 2]), ("dropkey", [1, 2])]
    assert ran.document["baseline"] == "none"
    assert ran.document == read_json(Path("grid/comparison.json"))
    for row in ran.document["rows"]:
        for seed, run in zip(row["seeds"], row["runs"], strict=True):
            summary = RunFolder(Path(run)).summary
            best = read_json(summary)["best"]["validation"]["accuracy"]
            assert row["scores"]["best"]["values"][str(seed)] == best

    written = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in Path("grid").rglob("summary.json")}
    assert len(written) == 4
    again = hkft("compare", "--recipe", tiny, *GRID)
    assert again.code == 0
    assert "note: 4 of 4 cells are done already\n" in again.err
    assert "cell 1 of 4" not in again.err
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in written} == written
    assert len(list(Path("grid").glob("*-s*"))) == 4

    table = again.out.splitlines()
    head = re.split("  +", table[0])
    assert head[:3] == ["method", "seeds", "best accuracy"]
    assert [re.split("  +", line)[:2] for line in table[1:3]] == [["none", "2"], ["dropkey", "2"]]
    mean = ran.document["rows"][1]["scores"]["best"]["sample"]["mean"]
    assert f"{mean:.4f} ± " in table[2]
    assert re.search("^best accuracy, dropkey against none: ", again.out, re.MULTILINE)

    folders = [run for row in ran.document["rows"] for run in row["runs"]]
    existing = hkft("compare", *folders, "--json")
    assert existing.code == 0, existing.err
    assert existing.document["rows"] == ran.document["rows"]


def test_compare_writes_its_tables_and_one_page(hkft, tiny):
    assert hkft("compare", "--recipe", tiny, "--methods", "none", "--seeds", "1", "--output", "grid").code == 0
    files = {path.name for path in Path("grid").iterdir() if path.is_file()}
    assert files == {"comparison.json", "comparison.md", "comparison.tex", "comparison.csv", "report.html"}


def test_the_commands_of_a_grid_run_it(hkft, tiny):
    """What a cluster's scheduler runs one by one is what the same call takes as done; with test rows, looked at too."""
    args = ["compare", "--recipe", tiny, "--methods", "none,dropkey", "--seeds", "1", "--output", "grid"]
    args += ["--set", "train.max_steps=2", "--set", "data.test=0.2"]
    printed = hkft(*args, "--print-commands")
    assert printed.code == 0, printed.err
    lines = printed.out.splitlines()
    assert len(lines) == 2
    assert not Path("grid").exists()
    for line in lines:
        for command in line.split(" && "):
            ran = hkft(*shlex.split(command)[1:])
            assert ran.code == 0, ran.err
    assert hkft(*args, "--print-commands").out.strip() == ""
    ran = hkft(*args, "--json")
    assert "note: 2 of 2 cells are done already\n" in ran.err
    assert ran.document["main"] == "test"
    for row in ran.document["rows"]:
        summary = read_json(RunFolder(Path(row["runs"][0])).summary)
        assert row["scores"]["test"]["values"] == {"1": summary["test"]["accuracy"]}


def test_a_condition_that_holds_ends_with_7(hkft, tiny):
    args = ["compare", "--recipe", tiny, "--methods", "none,dropkey", "--seeds", "1", "--output", "grid"]
    args += ["--set", "train.max_steps=2"]
    ran = hkft(*args, "--fail-if", "final.loss > 0.01")
    assert ran.code == 7
    assert re.search(r"dropkey: final\.loss is [\d.]+, and --fail-if final\.loss > 0\.01", ran.err)
    assert ran.out.startswith("method")  # the table stands all the same
    assert hkft(*args, "--fail-if", "final.loss > 100").code == 0
    as_json = hkft(*args, "--require", "better", "--json")
    assert (as_json.code, len(as_json.document["broken"])) == (7, 1)


def test_a_cell_that_fails_is_told_and_leaves_the_others(hkft, tiny):
    args = ["compare", "--recipe", tiny, "--methods", "none,dropkey", "--seeds", "1", "--output", "grid"]
    args += ["--set", "train.max_steps=2"]
    assert hkft(*args).code == 0
    [cell] = Path("grid").glob("dropkey-*")
    shutil.rmtree(cell)
    write_text(cell / "thesis.txt", "years of work")  # so that the cell cannot run
    ran = hkft(*args)
    assert ran.code == 2
    assert "Traceback" not in ran.err
    assert f"warning: dropkey, seed 1 failed: {cell}: the output folder is not empty\n" in ran.err
    assert [re.split("  +", line)[0] for line in ran.out.splitlines()[1:2]] == ["none"]
    as_json = hkft(*args, "--json")
    assert as_json.code == 2
    assert [row["label"] for row in as_json.document["rows"]] == ["none"]
    assert list(as_json.document["failed"]) == ["dropkey, seed 1"]
    assert [path.name for path in cell.iterdir()] == ["thesis.txt"]


def test_compare_wants_a_recipe_or_runs(hkft, run, tiny):
    expected = (
        "error: say either --recipe, to run a grid, or the run folders to compare\n  hint     hkft compare --help\n"
    )
    for args in ((), (run, "--recipe", tiny)):
        ran = hkft("compare", *args)
        assert (ran.code, ran.out, ran.err) == (2, "", expected)


@pytest.mark.parametrize(("file", "harm"), [("splits.json", None), ("summary.json", "{"), ("environment.json", "")])
@pytest.mark.parametrize(
    ("args", "needs"),
    [
        (["eval", "run"], {"splits.json", "environment.json"}),
        (["compare", "run"], {"summary.json", "environment.json"}),
        (["merge", "run", "--output", "merged"], {"splits.json", "summary.json"}),
    ],
    ids=["eval", "compare", "merge"],
)
def test_a_run_with_a_file_missing_or_damaged(hkft, run, args, needs, file, harm):
    path = run / file
    path.unlink() if harm is None else path.write_text(harm)
    ran = hkft(*args)
    assert ran.code == (3 if file in needs else 0), ran.err
    if ran.code:
        state = "is missing" if harm is None else "is damaged"
        assert f"error: a file of this run {state}\n  where    run/{file}\n" in ran.err
