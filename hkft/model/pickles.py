"""Weights come from safetensors only: opening a pickle runs whatever code somebody put into it."""

from __future__ import annotations

from pathlib import Path

from hkft.errors import SetupError

PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def refuse(folder: str | Path) -> None:
    """Raise SetupError where a local folder holds pickled weights and no safetensors. Other places are not looked at."""
    place = Path(folder).expanduser()
    if not place.is_dir() or any(place.glob("*.safetensors")):
        return
    found = sorted(path.name for path in place.iterdir() if path.suffix in PICKLED and "model" in path.name)
    if found:
        raise SetupError(
            "the weights are pickled, and opening a pickle runs the code in it",
            where=str(place),
            found=", ".join(found[:3]),
            allowed="*.safetensors",
            hint="where you trust them: load them with transformers or peft in a place of their own and call"
            " save_pretrained, which writes safetensors",
        )
