"""Out of memory, whoever says it: one error, exit code 5, and what to do next."""

from __future__ import annotations

import pytest
import torch

from hkft import api
from hkft.errors import OutOfMemoryError
from hkft.evaluation import saved
from hkft.model import build
from hkft.model.memory import out_of_memory


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 102400000000 bytes."),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 102400000000 bytes."),
        RuntimeError("MPS backend out of memory (MPS allocated: 17.18 GB)."),
    ],
    ids=["python", "cuda", "linux", "windows", "mps"],
)
def test_every_allocator(error):
    with pytest.raises(OutOfMemoryError) as caught, out_of_memory("training", "less", "train.x", "32"):
        raise error
    assert caught.value.exit_code == 5
    assert str(caught.value) == "train.x: out of memory while training\n  found: 32\n  hint: less"


def test_another_error_stays_what_it_is():
    with pytest.raises(RuntimeError, match="shape"), out_of_memory("training", "less"):
        raise RuntimeError("a shape is wrong")


def test_before_training(recipe_file, tmp_path, monkeypatch):
    def starved(*_, **__):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 102400000000 bytes.")

    monkeypatch.setattr(build, "with_lora", starved)
    with pytest.raises(OutOfMemoryError, match="while loading"):
        api.train(recipe_file, output=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_looks_after_training(recipe_file, tmp_path, monkeypatch):
    run = api.train(recipe_file, ["train.num_train_epochs=1"], output=tmp_path / "run")
    loaded = saved.load_saved(run.path)

    def starved(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(loaded.model, "forward", starved)
    with pytest.raises(OutOfMemoryError, match=r"(?s)while evaluating.*--set train.per_device_eval_batch_size="):
        saved.evaluate(loaded)
