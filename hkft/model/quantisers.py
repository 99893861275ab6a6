"""bitsandbytes, left out of a process that quantises nothing.

PEFT imports bitsandbytes wherever it is installed, for any LoRA, and that imports torch's compiler: a sixth of the time to a
run's first step. A process that needs neither goes on as if bitsandbytes were not installed, in Python's own words for that:
`sys.modules["bitsandbytes"] = None`. PEFT, transformers and accelerate ask for it before they use it.

Whether a recipe needs it is told without them: by what it says of `model.quantization`, `lora` and `train`, and by the
model's own configuration, which may be of weights that are quantised already. What is not known here to do without needs it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from hkft.data.references import PACKAGE, package_path
from hkft.errors import HkftError

if TYPE_CHECKING:
    from hkft.recipe import Recipe

NAME = "bitsandbytes"
# What PEFT and transformers do without it: no LoftQ, and none of the optimizers in 8 bits.
LORA = {
    "r",
    "lora_alpha",
    "lora_dropout",
    "target_modules",
    "bias",
    "use_rslora",
    "use_dora",
    "rank_pattern",
    "alpha_pattern",
}
OPTIMIZERS = {"adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop"}


def leave_out(recipe: Recipe) -> bool:
    """Keep this process from importing bitsandbytes where the recipe does not need it; whether it is kept from it.

    For a process that does nothing else than this recipe, and before PEFT is imported: afterwards nothing is to be saved.
    """
    if NAME in sys.modules or "peft" in sys.modules or needed(recipe):
        return False
    sys.modules[NAME] = None  # type: ignore[assignment]
    return True


def needed(recipe: Recipe) -> bool:
    """Whether a run of the recipe may need bitsandbytes; True where that cannot be told before it is loaded."""
    plain = recipe.model.quantization == "none" and recipe.lora.keys() <= LORA
    return not plain or recipe.train.get("optim", "adamw_torch") not in OPTIMIZERS or _quantised(recipe)


def _quantised(recipe: Recipe) -> bool:
    """Whether the model's weights are quantised as they lie there; True for one that is not on this machine."""
    from huggingface_hub import try_to_load_from_cache

    name = recipe.model.name
    try:
        folder = package_path(name) if name.startswith(PACKAGE) else Path(name)
        there = folder / "config.json"
        if not folder.is_dir():  # a hub id
            there = try_to_load_from_cache(name, "config.json", revision=recipe.model.revision)
        return not isinstance(there, str | Path) or "quantization_config" in json.loads(Path(there).read_text("utf-8"))
    except (HkftError, OSError, ValueError):
        return True
