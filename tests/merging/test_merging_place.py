"""Where the output may lie, and that it is there whole or not at all."""

from __future__ import annotations

import os
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from safetensors.torch import load_file, save_file

from hkft.cli import merge as cli
from hkft.errors import CheckFailedError, DivergedError, SetupError, UsageError
from hkft.evaluation.predict import Predictions
from hkft.folder import read_json
from hkft.merging import merge as module
from hkft.merging import place, streaming, verification
from hkft.merging.merge import merge

WRITE_MODEL = module.write_model


def corrupting(parts: Any, target: Any, plan: Any, held: Any, folder: Path, tell: Any) -> None:
    """Write, and lose the head on the way: the complaint that peers hear most."""
    WRITE_MODEL(parts, target, plan, held, folder, tell)
    weights = load_file(folder / "model.safetensors")
    lost = {k: torch.zeros_like(v) if "classifier" in k else v for k, v in weights.items()}
    save_file(lost, folder / "model.safetensors", {"format": "pt"})


def entries(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_existing_target_is_refused(adapter: Path, tmp_path: Path) -> None:
    merge(adapter, tmp_path / "out", verify=False)
    before = (tmp_path / "out" / "merge.json").stat().st_mtime_ns
    with pytest.raises(UsageError, match="there is a merged model already") as caught:
        merge(adapter, tmp_path / "out", verify=False)
    assert caught.value.problems[0].hint == "--force replaces it"
    assert caught.value.exit_code == 2
    assert (tmp_path / "out" / "merge.json").stat().st_mtime_ns == before


def test_force_replaces(adapter: Path, tmp_path: Path) -> None:
    merge(adapter, tmp_path / "out", verify=False)
    (tmp_path / "out" / "old").write_text("old")
    merge(adapter, tmp_path / "out", dtype="bfloat16", verify=False, force=True)
    assert read_json(tmp_path / "out" / "merge.json")["dtype"] == "bfloat16"
    assert not (tmp_path / "out" / "old").exists()
    assert entries(tmp_path) == {"adapter", "base", "out"}


def test_force_keeps_the_old_one_until_the_new_one_is_there(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merge(adapter, tmp_path / "out", verify=False)
    monkeypatch.setattr(module, "_describe", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        merge(adapter, tmp_path / "out", verify=False, force=True)
    assert read_json(tmp_path / "out" / "merge.json")["dtype"] == "float32"
    assert entries(tmp_path) == {"adapter", "base", "out"}


@pytest.mark.parametrize("force", [False, True])
def test_a_strangers_folder_is_never_replaced(force: bool, adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    with pytest.raises(UsageError, match="there is something else in the output's place"):
        merge(adapter, tmp_path / "out", force=force)
    assert (tmp_path / "out" / "thesis.tex").exists()


def test_an_empty_folder_is_taken(adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert (merge(adapter, tmp_path / "out", verify=False).path / "config.json").exists()


@pytest.mark.parametrize("inside", ["adapter", "adapter/out", "base", "base/out", "."])
def test_never_into_what_is_read(inside: str, adapter: Path, tmp_path: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    with pytest.raises(UsageError, match="the output would lie in, or around, what it is made from"):
        merge(adapter, tmp_path / inside, force=True)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_never_into_a_run(run: Path) -> None:
    with pytest.raises(UsageError, match="the output would lie in, or around"):
        merge(run, run / "merged")
    with pytest.raises(UsageError, match="the output would lie in, or around"):
        merge(run / "adapter", run / "merged")
    assert not (run / "merged").exists()


def test_never_into_what_is_read_through_a_link(adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(adapter, target_is_directory=True)
    with pytest.raises(UsageError, match="the output would lie in, or around"):
        merge(adapter, tmp_path / "link" / "out")


def test_failed_check(adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "write_model", corrupting)
    with pytest.raises(CheckFailedError, match="the merged model does not agree with the adapted one") as caught:
        merge(adapter, tmp_path / "out")
    problem = caught.value.problems[0]
    assert caught.value.exit_code == 7
    assert problem.where == str(tmp_path / "out.unverified")
    assert str(problem.found).startswith("logits that differ by up to ")
    assert str(problem.found).endswith("on 32 rows (fixed sentences)")
    assert str(problem.allowed).endswith(" for float32")
    assert entries(tmp_path) == {"adapter", "base", "out.unverified"}
    record = read_json(tmp_path / "out.unverified" / "merge.json")["verification"]
    assert record["passed"] is False
    assert record["max_logit_difference"] > record["tolerance"]
    assert "the check of the merge failed" in (tmp_path / "out.unverified" / "README.md").read_text(encoding="utf-8")


def test_failed_check_again_and_with_force(adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    merge(adapter, tmp_path / "out")
    monkeypatch.setattr(module, "write_model", corrupting)
    for _ in range(2):  # the second replaces the first one's leavings
        with pytest.raises(CheckFailedError):
            merge(adapter, tmp_path / "out", force=True)
    assert read_json(tmp_path / "out" / "merge.json")["verification"]["passed"]
    assert entries(tmp_path) == {"adapter", "base", "out", "out.unverified"}


def test_unmerged_adapter_is_caught(adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the head saved but the update left out, as peers have shipped it."""
    real = streaming.plan

    def forgetful(*args: Any) -> streaming.Plan:
        plan = real(*args)
        return replace(plan, items=tuple(replace(item, layers=()) for item in plan.items))

    monkeypatch.setattr(streaming, "plan", forgetful)
    with pytest.raises(CheckFailedError):
        merge(adapter, tmp_path / "out", dtype="bfloat16")


def test_no_verify(adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "write_model", corrupting)
    assert merge(adapter, tmp_path / "out", verify=False).verification is None


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("moment", ["write_model", "_verified", "_describe"])
def test_nothing_left(
    error: type[BaseException], moment: str, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = getattr(module, moment)

    def broken(*args: Any) -> None:
        whole(*args)
        raise error("now")

    monkeypatch.setattr(module, moment, broken)
    with pytest.raises(error, match="now"):
        merge(adapter, tmp_path / "new" / "deeper" / "out")
    assert entries(tmp_path) == {"adapter", "base"}


def test_sigterm_leaves_nothing_either(adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a scheduler stops a job that has run out of its time."""

    def stopped(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)

    monkeypatch.setattr(module, "write_model", stopped)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(typer.Exit) as caught:
        cli.merge([str(adapter)], tmp_path / "out", json=False)
    assert caught.value.exit_code == 143
    assert entries(tmp_path) == {"adapter", "base"}
    assert signal.getsignal(signal.SIGTERM) is before


def test_full_disk(adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "write_model", full)
    with pytest.raises(SetupError, match="the merged model could not be written") as caught:
        merge(adapter, tmp_path / "out")
    assert "No space left on device" in str(caught.value)
    assert str(caught.value.problems[0].hint).endswith("GB are free there")
    assert entries(tmp_path) == {"adapter", "base"}


def test_nan_in_the_adapter(adapter: Path, tmp_path: Path) -> None:
    weights = load_file(adapter / "adapter_model.safetensors")
    save_file(
        {k: v * float("nan") if "lora_B" in k else v for k, v in weights.items()}, adapter / "adapter_model.safetensors"
    )
    with pytest.raises(DivergedError, match="the adapter holds NaN or inf: there is nothing to merge"):
        merge(adapter, tmp_path / "out")
    assert entries(tmp_path) == {"adapter", "base"}


def test_put_restores_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = tmp_path / "out", tmp_path / "new"
    old.mkdir()
    (old / "old").touch()
    (old / place.RECORD).touch()
    new.mkdir()
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if self == new:
            raise PermissionError("no")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(PermissionError):
        place.put(new, old, force=True)
    assert (old / "old").exists()
    assert entries(tmp_path) == {"out", "new"}


def predictions(logits: list[list[float]], task: str = "classification") -> Predictions:
    return Predictions(task, list(range(len(logits))), np.asarray(logits), None, None)


def test_compare_by_hand() -> None:
    before, after = predictions([[0.0, 0.0], [0.0, 2.0]]), predictions([[np.log(3.0), 0.0], [0.0, 2.0]])
    record = verification.compare(before, after, "bfloat16", "here", effect=5.0)
    assert record["max_logit_difference"] == pytest.approx(np.log(3.0))
    assert record["tolerance"] == pytest.approx(0.1 * 2.0)
    assert record["mean_kl"] == pytest.approx((0.5 * np.log(0.5 / 0.75) + 0.5 * np.log(0.5 / 0.25)) / 2)
    assert record["agreement"] == 1.0  # a tie is decided for the first class
    assert record["passed"] is False


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_compare_never_passes_what_is_not_a_number(value: float) -> None:
    for before, after in (([[0.0, 1.0]], [[value, 1.0]]), ([[value, 1.0]], [[value, 1.0]])):
        with np.errstate(invalid="ignore"):
            record = verification.compare(
                predictions(before, "regression"), predictions(after, "regression"), "float32", "", 1.0
            )
        assert record["passed"] is False


@pytest.mark.parametrize(("dtype", "share"), [("float32", 1e-3), ("float16", 2e-2), ("bfloat16", 1e-1)])
def test_tolerance_is_relative_to_the_largest_logit(dtype: str, share: float) -> None:
    before = predictions([[10.0, -40.0]])
    for factor, passes in ((0.99, True), (1.01, False)):
        after = predictions([[10.0 + 40.0 * share * factor, -40.0]])
        assert verification.compare(before, after, dtype, "", 1.0)["passed"] is passes


def test_source_is_untouched(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    merge(tmp_path / "run", tmp_path / "out")
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before
