"""When a run can do without bitsandbytes, and that it then does."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from hkft.model import quantisers
from hkft.recipe import Recipe, load

WATCHED = """
import sys
from hkft.cli.main import main
sys.argv[0] = "hkft"
try:
    main()
finally:
    loaded = {name for name, module in sys.modules.items() if module is not None}
    print(sorted({"peft", "bitsandbytes", "torch._inductor.compile_fx"} & loaded), file=sys.stderr)
"""


@pytest.fixture
def recipe(recipe_file: Path) -> Recipe:
    return load(recipe_file)


@pytest.mark.parametrize(
    ("override", "needed"),
    [
        ("seed=2", False),
        ("train.optim=adamw_torch", False),
        ("lora.use_dora=true", False),
        ("model.quantization=4bit", True),
        ("model.quantization=8bit", True),
        ("train.optim=adamw_8bit", True),
        ("train.optim=paged_adamw_32bit", True),
        ("train.optim=lion_32bit", True),
        ("lora.init_lora_weights=loftq", True),
        ("model.name=an-owner/a-model-that-is-not-here", True),
        ("model.name=./no-such-folder", True),
        ("model.name=package:no_such_package/model", True),
    ],
)
def test_what_may_quantise_needs_it(recipe, override, needed):
    assert quantisers.needed(recipe.replace(override)) is needed


def test_so_does_a_model_whose_weights_are_quantised_as_they_lie_there(recipe, tmp_path):
    folder = shutil.copytree(recipe.model.name, tmp_path / "quantised")
    named = recipe.replace(f"model.name={folder}")
    assert not quantisers.needed(named)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "bitsandbytes"}}))
    assert quantisers.needed(named)
    (folder / "config.json").write_text("{")
    assert quantisers.needed(named)


def test_every_optimizer_that_goes_without_it_is_one_of_torch_s_or_transformers(recipe):
    from transformers.training_args import OptimizerNames

    assert {name.value for name in OptimizerNames} >= quantisers.OPTIMIZERS


def test_a_process_that_has_loaded_peft_is_left_as_it_is(recipe):
    import peft  # noqa: F401

    before = sys.modules.get("bitsandbytes")
    assert not quantisers.leave_out(recipe)
    assert sys.modules.get("bitsandbytes") is before


def test_a_run_of_its_own_process_loads_neither_it_nor_torch_s_compiler(recipe_file, tmp_path):
    command = ["train", "--recipe", str(recipe_file), "--set", "train.max_steps=1", "--output", str(tmp_path / "run")]
    ran = subprocess.run([sys.executable, "-c", WATCHED, *command], capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    assert ran.stderr.splitlines()[-1] == "['peft']"
    assert json.loads((tmp_path / "run" / "environment.json").read_text())["versions"]["bitsandbytes"]
