"""hkft: fine-tune with LoRA, hold overfitting back with the HiddenKey family of dropouts, and measure the gap honestly.

    with hkft.attach(model, "hiddenkey-", rate=0.1):
        ...

Names are loaded when first used, so that `import hkft` costs nothing and the command line answers at once.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from hkft.api import compare, train
    from hkft.dropout.attach import Attachment, attach, attached
    from hkft.dropout.method import Consistency, Method, Site
    from hkft.dropout.named import METHODS
    from hkft.dropout.noise import gradient_noise
    from hkft.dropout.selfcheck import self_check
    from hkft.errors import HkftError
    from hkft.training.objective import consistency_loss
    from hkft.training.trainer import Trainer

__all__ = [
    "METHODS",
    "Attachment",
    "Consistency",
    "HkftError",
    "Method",
    "Site",
    "Trainer",
    "attach",
    "attached",
    "compare",
    "consistency_loss",
    "gradient_noise",
    "self_check",
    "train",
]

_HOMES = {
    "Attachment": "hkft.dropout.attach",
    "attach": "hkft.dropout.attach",
    "attached": "hkft.dropout.attach",
    "METHODS": "hkft.dropout.named",
    "Consistency": "hkft.dropout.method",
    "Method": "hkft.dropout.method",
    "Site": "hkft.dropout.method",
    "gradient_noise": "hkft.dropout.noise",
    "self_check": "hkft.dropout.selfcheck",
    "HkftError": "hkft.errors",
    "consistency_loss": "hkft.training.objective",
    "compare": "hkft.api",
    "train": "hkft.api",
    "Trainer": "hkft.training.trainer",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'hkft' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
