"""`hkft doctor`: what is installed, what is too old, and what works, by trying it."""

from __future__ import annotations

import shutil
import sys
from collections import namedtuple
from importlib.metadata import version

import pytest

from hkft.training import machine

TRIED = [
    "cpu: products of matrices",
    "cpu: bfloat16",
    "cpu: training with dropout",
    "cpu: model.quantization=4bit",
    "cpu: model.quantization=8bit",
    "several processes",
    "the cache",
    "space on the disk",
]


@pytest.fixture
def alone(monkeypatch):
    """Without the two processes, which load torch anew."""
    monkeypatch.setattr(machine, "_processes", lambda: "not tried")
    monkeypatch.setattr(machine, "_places", lambda: ["cpu"])


def checks(ran):
    return {check["name"]: check for check in ran.document["checks"]}


def test_all_works_here(hkft, monkeypatch):
    monkeypatch.setattr(machine, "_places", lambda: ["cpu"])
    ran = hkft("doctor", "--json")
    assert ran.code == 0, ran.out
    assert list(checks(ran)) == TRIED
    for check in checks(ran).values():
        assert check["works"], check
        assert check["told"]
        assert check["next"] is None
    document = ran.document
    assert document["works"]
    assert document["versions"]["torch"] == document["requirements"]["torch"]["installed"] == version("torch")
    assert all(need["works"] for need in document["requirements"].values())
    assert {"python", "transformers", "typer"} <= document["requirements"].keys()
    assert "pytest" not in document["requirements"]
    assert "threads" in document["devices"]["cpu"]


@pytest.mark.usefixtures("alone")
def test_a_line_for_each(hkft):
    ran = hkft("doctor")
    assert ran.code == 0
    rows = [line.split() for line in ran.out.splitlines()]
    needed = machine.requirements()["transformers"]["needed"]
    assert ["transformers", version("transformers"), needed] in rows
    assert ["hkft", version("hkft")] in rows
    assert ["hub", "offline", "(HF_HUB_OFFLINE)"] in rows
    for name in TRIED:
        [line] = [line for line in ran.out.splitlines() if line.startswith(name)]
        assert line[len(name) :].split()[0] == "works"
    assert "trying what works here" in ran.err


@pytest.mark.usefixtures("alone")
def test_what_is_too_old_or_missing_is_told_with_what_to_type(hkft, monkeypatch):
    installed = machine.version
    monkeypatch.setattr(
        machine, "version", lambda name: {"transformers": "4.57.1", "peft": None}.get(name, installed(name))
    )
    ran = hkft("doctor", "--json")
    assert ran.code == 4
    found, needed = checks(ran), ran.document["requirements"]["transformers"]["needed"]
    assert found["transformers"]["told"] == f"4.57.1 is installed, {needed} is needed"
    assert found["transformers"]["next"] == f"pip install 'transformers{needed}'"
    assert found["peft"]["told"].startswith("it is not installed")
    assert not ran.document["works"]
    assert "2 problems" in ran.err
    assert "too old" in next(line for line in hkft("doctor").out.splitlines() if line.startswith("transformers"))


@pytest.mark.usefixtures("alone")
def test_training_that_fails_is_an_error(hkft, monkeypatch):
    def fails(*_):
        raise RuntimeError("no kernel\nat all")

    monkeypatch.setattr("hkft.training.objective.consistency_loss", fails)
    ran = hkft("doctor")
    assert ran.code == 4
    [line] = [line for line in ran.out.splitlines() if line.startswith("cpu: training")]
    assert line.split("  ", 1)[1].split()[:5] == ["does", "not", "RuntimeError:", "no", "kernel"]
    assert line.endswith("pip install --upgrade transformers peft accelerate")
    assert "error: RuntimeError: no kernel" in ran.err
    assert "Traceback" not in ran.err


@pytest.mark.usefixtures("alone")
def test_what_one_can_do_without_is_told_and_is_no_error(hkft, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("HKFT_CACHE", str(tmp_path / "file"))
    monkeypatch.setitem(sys.modules, "bitsandbytes.nn.modules", None)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: namedtuple("Usage", "free")(2**20))
    monkeypatch.setattr(machine, "_processes", PROCESSES)
    monkeypatch.setattr(machine, "MEET", "raise SystemExit('nobody is there')")
    ran = hkft("doctor", "--json")
    assert ran.code == 0
    failed = {name: check for name, check in checks(ran).items() if not check["works"]}
    assert list(failed) == TRIED[3:]
    assert all(check["next"] and not check["required"] for check in failed.values())
    assert failed["several processes"]["told"] == "RuntimeError: nobody is there"
    assert "only 0.0 GiB are free" in failed["space on the disk"]["told"]


PROCESSES = machine._processes


def test_a_torch_that_cannot_be_loaded_is_told_like_anything_else(shell, tmp_path):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "torch.py").write_text("raise ImportError('libtorch.so: cannot open')")
    ran = shell("doctor", "--json", PYTHONPATH=f"{tmp_path / 'broken'}:{':'.join(sys.path)}")
    assert ran.code == 4
    found = checks(ran)
    assert found["cpu: products of matrices"]["told"] == "ImportError: libtorch.so: cannot open"
    assert not found["cpu: training with dropout"]["works"]
    assert found["the cache"]["works"]
    assert "Traceback" not in ran.err
