"""What a newcomer gets wrong: one calm message, the contract's exit code, and nothing left behind."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest

from hkft.dropout.named import METHODS as NAMES
from hkft.folder import read_json
from hkft.recipe.catalogue import shipped

METHODS = ", ".join(NAMES)
RECIPES = ", ".join(shipped())
STARTING = "starting torch and transformers\n"
READING = STARTING + "reading the data\nreading {}\n"


@dataclass(frozen=True)
class Case:
    """edits: what is replaced in tiny.yaml. said: all of stderr."""

    code: int
    said: str
    settings: Sequence[str] = ()
    edits: tuple[tuple[str, str], ...] = ()
    recipe: str = "tiny.yaml"


CASES = {
    "a recipe's name misspelled": Case(
        2,
        "error: there is no recipe 'quickstrat'\n"
        f"  allowed  the path of a .yaml file, or one of {RECIPES}\n"
        "  hint     did you mean 'quickstart'?\n",
        recipe="quickstrat",
    ),
    "a section misspelled": Case(
        2,
        "error: there is no key 'dropuot' at the top level\n"
        "  where    tiny.yaml:5:1\n"
        "  allowed  model, task, data, lora, dropout, train, generation, diagnostics, compare, seed\n"
        "  hint     did you mean 'dropout'?\n",
        edits=(("dropout:", "dropuot:"),),
    ),
    "a key misspelled": Case(
        2,
        "error: there is no key 'weigth' in dropout\n"
        "  where    tiny.yaml:5:41\n"
        "  allowed  method, rate, weight, gradient, sites, consistency\n"
        "  hint     did you mean 'weight'?\n",
        edits=(("weight:", "weigth:"),),
    ),
    "transformers' key misspelled": Case(
        2,
        "error: there is no key 'learning_rat' in train: transformers.TrainingArguments has no such field\n"
        "  where    tiny.yaml:6:9\n"
        "  hint     did you mean 'learning_rate'?\n",
        edits=(("learning_rate:", "learning_rat:"),),
    ),
    "a --set key misspelled": Case(
        2,
        "error: there is no key 'rte' in dropout\n"
        "  where    --set dropout.rte\n"
        "  allowed  method, rate, weight, gradient, sites, consistency\n"
        "  hint     did you mean 'rate'?\n",
        ["dropout.rte=0.1"],
    ),
    "a --set that is none": Case(
        2,
        "error: not an assignment\n  where    --set\n  found    'dropout.rate'\n  allowed  section.key=value\n",
        ["dropout.rate"],
    ),
    "a rate of 1.5": Case(
        2,
        "error: a dropout rate is a probability\n"
        "  where    --set dropout.rate\n  found    1.5\n  allowed  0 <= rate < 1\n",
        ["dropout.rate=1.5"],
    ),
    "an unknown method": Case(
        2,
        "error: there is no method 'hidenkey'\n"
        f"  where    --set dropout.method\n  found    'hidenkey'\n  allowed  {METHODS}\n"
        "  hint     did you mean 'hiddenkey'?\n",
        ["dropout.method=hidenkey"],
    ),
    "several things at once": Case(
        2,
        "error: 4 problems\n"
        "1. there is no key 'lora_alfa' in lora: peft.LoraConfig has no such field\n"
        "  where    tiny.yaml:4:14\n"
        "  hint     did you mean 'lora_alpha'?\n"
        "2. dropout.rate: a dropout rate is a probability\n"
        "  where    tiny.yaml:5:36\n"
        "  found    1.5\n"
        "  allowed  0 <= rate < 1\n"
        "3. there is no key 'evals_per_epok' in diagnostics\n"
        "  where    tiny.yaml:7:15\n"
        "  allowed  evals_per_epoch, probe_size, generate, metric, patience, average\n"
        "  hint     did you mean 'evals_per_epoch'?\n"
        "4. not a whole number\n"
        "  where    --set seed\n"
        "  found    'x'\n"
        "  allowed  a whole number\n",
        ["seed=x"],
        edits=(("lora_alpha:", "lora_alfa:"), ("rate: 0.1", "rate: 1.5"), ("evals_per_epoch:", "evals_per_epok:")),
    ),
    "a column that is not there": Case(
        3,
        READING.format("reviews.csv") + "error: there is no column 'sentence'\n"
        "  where    reviews.csv\n  found    text, other, label, stars\n"
        "  hint     data.text names it; the first line is read as the header\n",
        ["data.text=sentence"],
    ),
    "an empty file": Case(
        3,
        READING.format("empty.csv") + "error: the file is empty\n  where    empty.csv\n",
        ["data.train=empty.csv"],
    ),
    "a file of a header": Case(
        3,
        READING.format("header.csv") + "error: the file has a header and no rows\n"
        "  where    header.csv\n  found    columns text, label\n",
        ["data.train=header.csv"],
    ),
    "a file of one class": Case(
        3,
        READING.format("one.csv") + "error: every row has the same label: there is nothing to learn\n"
        "  where    one.csv: label\n  found    'positive'\n",
        ["data.train=one.csv"],
    ),
    "a file that is not there": Case(
        3,
        READING.format("reveiws.csv") + "error: there is no such file\n"
        "  where    reveiws.csv\n  hint     did you mean 'reviews.csv'?\n",
        ["data.train=reveiws.csv"],
    ),
    "a model that is not there": Case(
        4,
        READING.format("reviews.csv") + "error: the model 'no-such-model' could not be loaded\n"
        "  where    model.name\n  found    (what transformers says)\n"
        "  allowed  a hub id, a local folder, or package:<python package>/<path inside it>\n"
        "  hint     offline, only models in the local hub cache or in a folder can be used; no code of a model's own is run\n",
        ["model.name=no-such-model"],
    ),
    "a device that is not there": Case(
        2,
        "error: no such kind of device\n  where    --set model.device\n  found    'gpu'\n  allowed  auto, cpu, cuda, cuda:1, mps\n",
        ["model.device=gpu"],
    ),
}


@pytest.fixture
def command(case: Case, tiny: Path) -> list[str]:
    """`hkft train` on the case's recipe, and the files that the cases name."""
    text = tiny.read_text(encoding="utf-8")
    for old, new in case.edits:
        assert old in text
        text = text.replace(old, new)
    tiny.write_text(text, encoding="utf-8")
    Path("empty.csv").touch()
    Path("header.csv").write_text("text,label\n")
    Path("one.csv").write_text("text,label\n" + "".join(f"a good film {n},positive\n" for n in range(20)))
    return ["train", "--recipe", case.recipe, "--output", "out", *(f"--set={setting}" for setting in case.settings)]


def foreign(text: str) -> str:
    """Without the words of the library below."""
    return re.sub(
        r"(?<=could not be loaded\n  where    model\.name\n)  found .*", "  found    (what transformers says)", text
    )


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_one_message_and_nothing_left_behind(hkft, case, command):
    before = sorted(Path().rglob("*"))
    ran = hkft(*command)
    assert (ran.code, ran.out) == (case.code, "")
    assert foreign(ran.err) == case.said
    assert sorted(Path().rglob("*")) == before


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_same_as_one_json_document(hkft, case, command):
    ran = hkft(*command, "--json")
    assert (ran.code, ran.document["exit_code"]) == (case.code, case.code)
    assert foreign(ran.err) == case.said
    for problem in ran.document["problems"]:
        assert list(problem) == ["message", "where", "found", "allowed", "hint"]
        assert problem["message"] in ran.err
    assert not Path("out").exists()


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_check_finds_what_training_would(hkft, case, command):
    at = command.index("--output")
    ran = hkft("check", *command[1:at], *command[at + 2 :])
    assert (ran.code, ran.out) == (case.code, "")
    assert foreign(ran.err) == case.said


def test_divergence_is_exit_code_6_and_says_what_to_lower(hkft, tiny):
    ran = hkft("train", "--recipe", tiny, "--output", "run", "--set", "train.learning_rate=1e9", "--json")
    assert (ran.code, ran.document["exit_code"], ran.document["error"]) == (6, 6, "DivergedError")
    assert re.search(
        r"\nerror: the \w+( \w+)? loss (is|has exploded) [^\n]+ at step \d+\n  hint     lower train\.learning_rate[^\n]*\n$",
        ran.err,
    )
    summary = read_json(Path("run/summary.json"))
    assert summary["status"] == "failed"
    assert ran.document["problems"][0]["message"] in summary["error"]
    assert not list(Path("run").rglob("*.partial"))
    assert Path("run/report.html").exists()


@pytest.mark.parametrize(
    ("args", "code", "said"),
    [
        (
            ["methods", "hidenkey"],
            2,
            "error: there is no method 'hidenkey'\n"
            f"  where    method\n  allowed  {METHODS}\n  hint     did you mean 'hiddenkey'?\n",
        ),
        (
            ["recipes", "quikstart"],
            2,
            "error: there is no shipped recipe 'quikstart'\n"
            f"  allowed  {RECIPES}\n  hint     did you mean 'quickstart'?\n",
        ),
        (
            ["eval", "nowhere"],
            2,
            STARTING + "error: there is no such folder\n"
            "  where    nowhere\n  allowed  a run folder, or an adapter folder\n",
        ),
        (
            ["merge", "nowhere", "--output", "out"],
            2,
            STARTING + "error: there is no such folder\n"
            "  where    nowhere\n  allowed  a run folder, or an adapter folder\n",
        ),
        (
            ["compare", "nowhere"],
            2,
            STARTING + "error: this is not a run folder\n  where    nowhere\n"
            "  allowed  a folder that `hkft train` has written, with resolved.yaml and summary.json\n",
        ),
        (
            ["compare", "--recipe", "tiny.yaml", "--methods", "none,hidenkey", "--output", "out"],
            2,
            STARTING + "error: there is no method 'hidenkey'\n"
            f"  where    --methods\n  allowed  {METHODS}\n  hint     did you mean 'hiddenkey'?\n",
        ),
        (
            ["compare", "--recipe", "tiny.yaml", "--rates", "0.1,high", "--output", "out"],
            2,
            "error: not a list of numbers\n  where    --rates\n  found    '0.1,high'\n  allowed  0.1,0.2\n",
        ),
    ],
    ids=["methods", "recipes", "eval", "merge", "compare", "compare --methods", "compare --rates"],
)
def test_the_other_commands_alike(hkft, tiny, args, code, said):
    before = sorted(Path().rglob("*"))
    ran = hkft(*args)
    assert (ran.code, ran.out, ran.err) == (code, "", said)
    as_json = hkft(*args, "--json")
    assert (as_json.code, as_json.document["exit_code"], as_json.err) == (code, code, said)
    assert sorted(Path().rglob("*")) == before


@pytest.mark.parametrize(
    ("args", "code", "said"),
    [
        (
            ["--split", "unseen.csv"],
            3,
            "error: there is no such file\n  where    unseen.csv\n"
            "  hint     a relative path is looked for from {here}\n",
        ),
        (
            ["--split", "test"],
            2,
            "error: the recipe names no test set\n  where    data.test\n  hint     --set data.test=FILE\n",
        ),
        (
            ["--split", "other.csv"],
            3,
            "error: there is no column 'text'\n"
            "  where    other.csv\n  found    sentence, label\n  hint     data.text names it; the first line is read as the header\n",
        ),
    ],
    ids=["a file that is not there", "a set that the recipe has not", "a file of other columns"],
)
def test_eval_on_what_cannot_be_evaluated(hkft, run, args, code, said):
    Path("other.csv").write_text("sentence,label\na good film,positive\n")
    ran = hkft("eval", run, *args)
    assert (ran.code, ran.out) == (code, "")
    assert ran.err[ran.err.index("error: ") :] == said.format(here=Path.cwd())
    assert {path.name for path in (run / "predictions").iterdir()} == {
        "history.jsonl",
        "train_probe.jsonl",
        "validation.jsonl",
    }


@pytest.mark.parametrize(
    "args",
    [
        ["recipes", "quickstart", "--copy", "thesis.txt"],
        ["train", "--recipe", "tiny.yaml", "--output", "thesis.txt"],
        ["train", "--recipe", "tiny.yaml", "--output", "thesis.txt/run"],
        ["compare", "--recipe", "tiny.yaml", "--methods", "none", "--seeds", "1", "--output", "thesis.txt"],
        ["merge", "run", "--output", "thesis.txt/merged"],
    ],
    ids=" ".join,
)
def test_a_file_in_the_output_s_place(hkft, tiny, run, args):
    Path("thesis.txt").write_text("years of work")
    ran = hkft(*args)
    assert ran.code in (2, 4)
    assert re.search("^error: .*\\n  where    .*thesis.txt", ran.err, re.MULTILINE)
    assert Path("thesis.txt").read_text() == "years of work"


@pytest.mark.skipif(find_spec("wandb") is not None, reason="wandb is installed")
def test_a_logger_that_is_not_installed_is_a_missing_package(hkft, tiny):
    ran = hkft("train", "--recipe", tiny, "--output", "run", "--set", "train.report_to=wandb")
    assert ran.code == 4
    assert "wandb" in ran.err[ran.err.index("error: ") :]
    assert not Path("run").exists()


def test_a_data_worker_that_died_is_told_wherever_torch_s_signal_handler_raises(hkft, tiny, monkeypatch):
    def dies(*_: object) -> None:  # after training, where nothing waits for it
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")

    monkeypatch.setattr("hkft.training.run.updates", dies)
    ran = hkft("train", "--recipe", tiny, "--output", "run")
    assert ran.code == 4
    assert ran.err.endswith(
        "error: a process that reads the data died\n"
        "  where    train.dataloader_num_workers\n"
        "  found    DataLoader worker (pid 7) is killed by signal: Killed.\n"
        "  hint     --set train.dataloader_num_workers=0; most often memory, or shared memory, did not suffice. "
        "`--resume` goes on from the last checkpoint\n"
    )


def test_debug_shows_the_traceback(shell):
    calm, loud = (shell("train", "--recipe", "quickstrat", *extra) for extra in ((), ("--debug",)))
    assert "Traceback" not in calm.err
    assert "Traceback (most recent call last):" in loud.err
    assert "hkft.errors.RecipeError: there is no recipe 'quickstrat'" in loud.err
    assert loud.code != 0


def test_debug_changes_neither_the_exit_code_nor_the_document(shell):
    assert shell("train", "--recipe", "quickstrat", "--debug").code == 2
    assert shell("train", "--recipe", "quickstrat", "--debug", "--json").document["exit_code"] == 2
