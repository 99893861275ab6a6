"""`README.md` of a run folder: a model card that the Hub and people can read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hkft.view import words


def model_card(summary: Mapping[str, Any], *, base_model: str, recipe_yaml: str) -> str:
    """Markdown with YAML front matter: what was trained, how it went in words and numbers, and the recipe."""
    from huggingface_hub import ModelCardData

    tags = ["lora", "hkft", summary["method"]]
    data = ModelCardData(base_model=base_model, library_name="peft", tags=tags)
    verdict = summary.get("verdict")
    fence = "`" * max(3, _longest_run(recipe_yaml, "`") + 1)
    parts = [
        f"---\n{data.to_yaml()}\n---",
        f"# {summary['recipe']}",
        f"A LoRA adapter of `{base_model}` for {summary['task']}, trained with the `{summary['method']}` dropout "
        f"method by hkft (seed {summary['seed']}, {summary['steps']} steps).",
        *([verdict["text"]] if verdict else []),
        "\n".join(["| | |", "|---|---|", *(f"| {label} | {value} |" for label, value in words.figures(summary))]),
        "The gap is how much worse validation is than a fixed probe of the training rows, both in eval mode.",
        "The adapter is in `adapter/`, in plain PEFT format: hkft is not needed to use it.",
        f"## Recipe\n\n{fence}yaml\n{recipe_yaml.rstrip()}\n{fence}",
    ]
    return "\n\n".join(parts) + "\n"


def _longest_run(text: str, letter: str) -> int:
    longest = current = 0
    for each in text:
        current = current + 1 if each == letter else 0
        longest = max(longest, current)
    return longest
