"""Weights come from safetensors only: opening a pickle runs whatever code somebody put into it.

And only from the folder that was named: what an index says of other places is not followed.
"""

from __future__ import annotations

import json
from pathlib import Path, PurePosixPath, PureWindowsPath

from safetensors import SafetensorError, safe_open

from hkft.errors import SetupError

PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
SAFE = ".safetensors"


def refuse(folder: str | Path) -> None:
    """Raise SetupError where a local folder holds pickled weights and no safetensors, or an index of others than its own.

    And for a model's safetensors that are damaged. Other places are not looked at.
    """
    place = Path(folder).expanduser()
    if not place.is_dir():
        return
    for path in place.glob(f"*{SAFE}.index.json"):
        index(path)
    for path in place.glob(f"model*{SAFE}"):
        whole(path)
    if any(place.glob(f"*{SAFE}")):
        return
    found = sorted(path.name for path in place.iterdir() if path.suffix in PICKLED and "model" in path.name)
    if found:
        raise _pickled(place, ", ".join(found[:3]))


def index(path: Path) -> dict[str, str]:
    """Tensor name -> name of the file, in the same folder, that holds it, of a model's index.

    Raises SetupError where it is damaged, names a file elsewhere, or one that is pickled.
    """
    try:
        files = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        plain = all(isinstance(file, str) and file for file in files.values()) and bool(files)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise damaged(path, "no weight_map could be read") from error
    if not plain:
        raise damaged(path, "a weight_map that does not give each tensor a file")
    for file in sorted(set(files.values())):
        if PurePosixPath(file).name != file or PureWindowsPath(file).name != file or file == "..":
            raise SetupError(
                "the index leads out of the model's folder",
                where=str(path),
                found=file,
                allowed="names of files beside the index",
                hint="such a model was not made in good faith: do not use it",
            )
        if not file.endswith(SAFE):
            raise _pickled(path, file)
    return files


def whole(path: Path) -> None:
    """Raise SetupError for safetensors whose places do not fit the shapes, follow one another and fill the file."""
    try:
        with safe_open(path, "np"):
            pass
    except (OSError, SafetensorError) as error:
        raise damaged(path, str(error).strip().splitlines()[0]) from error


def damaged(path: Path, found: str) -> SetupError:
    return SetupError(
        "the file is damaged or incomplete", where=str(path), found=found, hint="fetch or copy it once more"
    )


def _pickled(where: Path, found: str) -> SetupError:
    return SetupError(
        "the weights are pickled, and opening a pickle runs the code in it",
        where=str(where),
        found=found,
        allowed=f"*{SAFE}",
        hint="where you trust them: load them with transformers or peft in a place of their own and call"
        " save_pretrained, which writes safetensors",
    )
