"""Foreign progress bars and log lines, silenced: the one stream of hkft is `tell`."""

from __future__ import annotations

import datasets
from huggingface_hub.utils import disable_progress_bars


def quiet() -> None:
    """Turn off the bars of datasets and huggingface_hub and datasets' warnings, for this process."""
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    disable_progress_bars()
