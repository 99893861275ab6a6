"""Killed at any moment, a run goes on as if it had not been; under another recipe or other rows only if that is wanted."""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hkft import api
from hkft.errors import SetupError, UsageError
from hkft.events import Evaluated, Event, Notice, Stage, TrainStep
from hkft.folder import RunFolder, is_whole, read_json, read_jsonl, write_json
from hkft.recipe import load

WRITING = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate"}  # Python's audit events


def touches(folder: Path):
    """Calls what is given, with a number, before every access to a file of the folder. Cannot be taken back."""

    def listen(at):
        count = 0

        def hook(event, args):
            nonlocal count
            if event in WRITING and args and str(args[0]).startswith(str(folder)):
                count += 1
                at(count)

        sys.addaudithook(hook)

    return listen


def forked(work) -> int:
    """Run in a process of its own, as it is now; the exit code, negative for a signal."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            torch.set_num_threads(1)
            work()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def killed_at(number: int, folder: Path, *args, **kwargs) -> None:
    """A training that is killed before its n-th access to a file of its folder."""

    def work():
        touches(folder)(lambda count: os.kill(os.getpid(), signal.SIGKILL) if count == number else None)
        api.train(*args, output=folder, **kwargs)

    assert forked(work) == -signal.SIGKILL


def accesses(folder: Path, *args, **kwargs) -> int:
    """How often a whole training accesses a file of its folder."""

    def work():
        seen = []
        touches(folder)(seen.append)
        api.train(*args, output=folder, **kwargs)
        (folder.parent / "count").write_text(str(len(seen)))

    assert forked(work) == 0
    return int((folder.parent / "count").read_text())


def same(one: RunFolder, two: RunFolder) -> None:
    """Everything that two runs measured and made, but for the time it took."""
    times = ("samples_per_s", "tokens_per_s", "seconds")

    def told(folder, event):
        return [{k: v for k, v in record.items() if k not in times} for record in folder.records(event)]

    assert told(one, "train") == told(two, "train")
    assert told(one, "eval") == told(two, "eval")
    assert read_jsonl(one.history) == read_jsonl(two.history)
    weights = [load_file(folder.adapter / "adapter_model.safetensors") for folder in (one, two)]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    for split in ("validation", "train_probe"):
        assert one.predictions(split).read_text() == two.predictions(split).read_text()
    for key in ("status", "best_step", "best", "final", "gap", "steps", "total_steps", "adapter"):
        assert read_json(one.summary)[key] == read_json(two.summary)[key], key
    assert read_json(one.splits) == read_json(two.splits)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, recipe_text):
    """A recipe, and what a run of it is that was never killed; how often it wrote."""
    folder = tmp_path_factory.mktemp("whole")
    recipe = folder / "tiny.yaml"
    recipe.write_text(recipe_text.replace("evals_per_epoch: 2", "evals_per_epoch: 2, average: 0.8"), encoding="utf-8")
    api.train(recipe, ["train.max_steps=1"], output=folder / "first")  # loads what a run imports, for every child
    count = accesses(folder / "run", recipe)
    return recipe, RunFolder(folder / "run"), count


def carry_on(recipe: Path, folder: RunFolder, tell=lambda event: None) -> None:
    api.train(recipe, output=folder.path, resume=folder.exists, tell=tell)


@pytest.mark.parametrize("draw", range(4))
def test_a_run_killed_at_any_moment_ends_as_if_it_had_not_been(whole, tmp_path, draw):
    recipe, expected, count = whole
    folder = RunFolder(tmp_path / "run")
    killed_at(random.Random(draw).randint(1, count - 1), folder.path, recipe)
    carry_on(recipe, folder)
    same(folder, expected)
    assert not [path.name for path in folder.path.rglob("*.partial")]
    assert len(list(folder.checkpoints.iterdir())) <= 2
    assert all(map(is_whole, folder.checkpoints.iterdir()))


def test_a_run_may_be_killed_again_and_again(whole, tmp_path):
    recipe, expected, count = whole
    folder, draw, kills = RunFolder(tmp_path / "run"), random.Random(3), 0
    for _ in range(4):
        point = draw.randint(count // 8, count // 2)

        def work(point=point):
            touches(folder.path)(lambda n: os.kill(os.getpid(), signal.SIGKILL) if n == point else None)
            carry_on(recipe, folder)

        kills += forked(work) == -signal.SIGKILL
        if folder.status == "finished":
            break
    assert kills >= 2
    if folder.status != "finished":
        carry_on(recipe, folder)
    same(folder, expected)


# --- checkpoints ------------------------------------------------------------------------------------------------------


def cut(expected: RunFolder, place: Path) -> RunFolder:
    """A copy of a run, as it was before its end."""
    folder = RunFolder(shutil.copytree(expected.path, place))
    write_json(folder.summary, {**read_json(folder.summary), "status": "running"})
    return folder


@pytest.mark.parametrize("damage", ["cut", "gone", "unsealed"])
def test_a_checkpoint_that_is_not_whole_is_passed_over_and_said(whole, tmp_path, damage):
    recipe, expected, _ = whole
    folder, heard = cut(expected, tmp_path / "cut"), []
    newest = folder.checkpoints / "checkpoint-16"
    victim = newest / {"unsealed": "complete.json"}.get(damage, "optimizer.pt")
    if damage == "cut":
        victim.write_bytes(victim.read_bytes()[:-10])
    else:
        victim.unlink()
    assert folder.last_checkpoint() == folder.checkpoints / "checkpoint-12"
    api.train(recipe, output=folder.path, resume=True, tell=heard.append)
    said = "checkpoint-16 was not written to its end, and is left out"
    assert said in [event.text for event in heard if isinstance(event, Notice)]
    assert {event.step for event in heard if isinstance(event, TrainStep)} == {13, 14, 15, 16}
    same(folder, expected)


def test_where_no_checkpoint_is_whole_the_run_begins_anew(whole, tmp_path):
    recipe, expected, _ = whole
    folder = cut(expected, tmp_path / "cut")
    for checkpoint in folder.checkpoints.iterdir():
        (checkpoint / "complete.json").unlink()
    api.train(recipe, output=folder.path, resume=True)
    same(folder, expected)


def test_only_the_last_two_checkpoints_are_kept(whole):
    _, expected, _ = whole
    names = ["checkpoint-12", "checkpoint-16"]
    assert sorted(path.name for path in expected.checkpoints.iterdir()) == names


# --- another recipe, other rows ---------------------------------------------------------------------------------------


def test_what_has_changed_is_named_and_refused(whole, tmp_path):
    recipe, expected, _ = whole
    folder = cut(expected, tmp_path / "cut")
    before = folder.resolved.read_text()
    changed = ["train.learning_rate=0.002", "dropout.rate=0.3"]
    with pytest.raises(UsageError, match="was started with another recipe") as caught:
        api.train(recipe, changed, output=folder.path, resume=True)
    told = str(caught.value)
    assert "train.learning_rate: 0.002, was 0.01" in told
    assert "dropout.rate: 0.3, was 0.1" in told
    assert "lora" not in told.partition("found")[2].partition("hint")[0]
    assert "--resume --force goes on with what changed" in told
    assert folder.resolved.read_text() == before


def test_force_goes_on_with_what_has_changed_and_says_so(whole, tmp_path):
    recipe, expected, _ = whole
    folder, heard = cut(expected, tmp_path / "cut"), []
    api.train(recipe, ["train.num_train_epochs=3"], output=folder.path, resume=True, force=True, tell=heard.append)
    assert {event.step for event in heard if isinstance(event, TrainStep)} == set(range(17, 25))
    said = [record["text"] for record in folder.records("notice") if "not as it was" in record["text"]]
    assert said == ["resumed with what is not as it was: train.num_train_epochs: 3, was 2"]
    assert load(folder.resolved).train["num_train_epochs"] == 3
    assert read_json(folder.summary)["status"] == "finished"
    assert [seen["step"] for seen in folder.records("eval")] == [0, 4, 8, 12, 16, 20, 24]


def test_force_without_resume_is_no_way_to_begin(whole, tmp_path):
    with pytest.raises(UsageError, match="--force is for --resume"):
        api.train(whole[0], output=tmp_path / "new", force=True)
    assert not (tmp_path / "new").exists()


def test_a_rank_that_does_not_fit_the_checkpoint_is_said(whole, tmp_path):
    recipe, expected, _ = whole
    folder = cut(expected, tmp_path / "cut")
    with pytest.raises(SetupError, match="the checkpoint does not fit"):
        api.train(recipe, ["lora.r=2"], output=folder.path, resume=True, force=True)


def test_other_rows_are_named_and_refused_unless_wanted(whole, tmp_path, reviews):
    recipe, _, _ = whole
    mine = tmp_path / "mine.csv"
    shutil.copy(reviews, mine)
    text = recipe.read_text().replace(str(reviews), str(mine))
    (tmp_path / "mine.yaml").write_text(text)
    first = api.train(tmp_path / "mine.yaml", output=tmp_path / "first")
    folder = cut(first, tmp_path / "cut")
    shutil.rmtree(folder.checkpoints / "checkpoint-16")
    lines = mine.read_text().splitlines()
    mine.write_text("\n".join([*lines[:-3], *lines[-2:]]) + "\n")
    with pytest.raises(UsageError, match="the data has changed") as caught:
        api.train(tmp_path / "mine.yaml", output=folder.path, resume=True)
    assert "other rows in: train" in str(caught.value)
    heard: list[Event] = []
    api.train(tmp_path / "mine.yaml", output=folder.path, resume=True, force=True, tell=heard.append)
    assert any("other rows in train" in getattr(event, "text", "") for event in heard)
    looks = [event for event in heard if isinstance(event, Evaluated)]
    assert looks[-1].rise_p is None  # the rows of earlier looks are others: nothing is compared row by row
    assert read_json(folder.environment)["data"] != read_json(first.environment)["data"]
    assert len(read_json(folder.splits)["train"]) < len(read_json(first.splits)["train"])


# --- signals ----------------------------------------------------------------------------------------------------------


def interrupted(recipe: Path, folder: RunFolder, step: int) -> list[Event]:
    """What a run told that got Ctrl-C once a step was logged."""
    heard: list[Event] = []

    def interrupt(event: Event) -> None:
        heard.append(event)
        if isinstance(event, TrainStep) and event.step == step:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        api.train(recipe, output=folder.path, tell=interrupt)
    return heard


def test_an_interrupted_run_is_looked_at_where_it_stops_and_that_look_is_none_of_the_plan(whole, tmp_path):
    recipe, expected, _ = whole
    folder = RunFolder(tmp_path / "run")
    heard = interrupted(recipe, folder, step=6)
    assert "stopping after this step, with a checkpoint; once more stops at once" in [
        event.text for event in heard if isinstance(event, Notice)
    ]
    assert folder.last_checkpoint() == folder.checkpoints / "checkpoint-7"  # a step is logged after its end
    last = folder.records("eval")[-1]
    assert (last["step"], last["extra"], last["best"]) == (7, True, False)
    summary = read_json(folder.summary)
    assert (summary["status"], summary["final_step"], summary["best_step"]) == ("interrupted", 7, 4)
    assert folder.report.exists()
    carry_on(recipe, folder)
    same(folder, expected)


def test_a_second_signal_stops_at_once(whole, tmp_path):
    recipe, expected, _ = whole
    folder = RunFolder(tmp_path / "run")

    def insist(event: Event) -> None:
        if isinstance(event, Stage) and event.text == "looking at validation" and event.done and not sent:
            if not folder.records("eval"):
                return  # the look before the first step
            for _ in range(2):
                sent.append(1)
                os.kill(os.getpid(), signal.SIGTERM)

    sent: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        api.train(recipe, output=folder.path, tell=insist)
    assert len(sent) == 2
    assert [record["step"] for record in folder.records("eval")] == [0]  # the look at step 4 did not end
    assert folder.status == "interrupted"
    assert folder.report.exists()
    carry_on(recipe, folder)
    same(folder, expected)


def test_a_signal_in_the_last_step_interrupts_a_run_that_is_whole(whole, tmp_path):
    recipe, expected, _ = whole
    folder = RunFolder(tmp_path / "run")
    interrupted(recipe, folder, step=16)
    same(folder, expected)  # "finished"


def test_what_a_run_leaves_that_was_killed_before_it_began_is_no_hindrance(whole, tmp_path):
    recipe, expected, _ = whole
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    for name in (".lock", "recipe.yaml", ".resolved.yaml.77.partial"):
        (folder.path / name).touch()
    api.train(recipe, output=folder.path)
    same(folder, expected)
