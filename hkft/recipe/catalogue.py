"""The recipes that come with hkft, and how a name or a path becomes a file.

They live in the top-level `recipes/` of the checkout, and in `hkft/recipes/` of an installed wheel. One in a folder there
has the folder in its name: `paper/table1-rte`.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path

from hkft.errors import RecipeError, UsageError
from hkft.recipe.text import MAX_BYTES

_PACKAGE = Path(__file__).resolve().parents[1]


def shipped() -> dict[str, Path]:
    """The shipped recipes by name, without `.yaml`: `quickstart` first, those in folders last."""
    folders = [_PACKAGE / "recipes"]
    if (_PACKAGE.parent / "pyproject.toml").is_file():  # a checkout: next to an installed hkft stand other packages
        folders.append(_PACKAGE.parent / "recipes")
    files = {
        path.relative_to(folder).with_suffix("").as_posix(): path
        for folder in folders
        for path in folder.rglob("*.yaml")
    }
    return dict(sorted(files.items(), key=lambda item: (item[0] != "quickstart", "/" in item[0], item[0])))


def choose(name: str | None) -> dict[str, Path]:
    """The shipped recipe of this name, with or without `.yaml`, or all of them. Raises UsageError for an unknown one."""
    found = shipped()
    if name is None:
        return found
    name = name.removesuffix(".yaml")
    if name not in found:
        raise UsageError(f"there is no shipped recipe {name!r}", allowed=", ".join(found), hint=_hint(name, found))
    return {name: found[name]}


def copy(recipes: Iterable[Path], folder: Path) -> list[Path]:
    """Copy recipes into a folder, to edit them: one as it is called, more of them in the folders they are in.

    Raises UsageError, with nothing copied, where one is there already.
    """
    chosen, names = list(recipes), {path: f"{name}.yaml" for name, path in shipped().items()}
    targets = {path: folder / (path.name if len(chosen) == 1 else names.get(path, path.name)) for path in chosen}
    taken = [str(target) for target in targets.values() if target.exists()]
    if taken:
        raise UsageError("a file of this name is there already", where=", ".join(taken))
    for target in targets.values():
        target.parent.mkdir(parents=True, exist_ok=True)
    return [Path(shutil.copy(path, target)) for path, target in targets.items()]


def describe(path: Path) -> str:
    """The first line of a recipe's head comment, without its name; "" where it has none."""
    with path.open(encoding="utf-8") as file:
        line = file.readline().strip()
    if not line.startswith("#"):
        return ""
    name, colon, title = line.lstrip("# ").partition(": ")
    return title if colon and _end(name) == path.stem else line.lstrip("# ")


def locate(source: str | Path) -> Path:
    """The file of a recipe: an existing path, else a shipped recipe of this name, with or without `.yaml`.

    Raises RecipeError with the nearest shipped name.
    """
    path = Path(source)
    if path.is_file():
        return path
    recipes = shipped()
    name = str(source).removesuffix(".yaml")
    if name in recipes:
        return recipes[name]
    if path.is_dir():
        raise RecipeError("this is a folder, not a recipe", where=str(source), hint="name the .yaml file in it")
    raise RecipeError(
        f"there is no recipe {str(source)!r}",
        allowed=f"the path of a .yaml file, or one of {', '.join(recipes)}",
        hint=_hint(name, recipes),
    )


def _hint(name: str, recipes: Iterable[str]) -> str | None:
    """The shipped recipe that is called so, in whatever folder, or the one whose name is spelled most like it."""
    by_end = {_end(each): each for each in recipes}
    if _end(name) in by_end:
        return f"there is a shipped recipe `{by_end[_end(name)]}`"
    close = get_close_matches(_end(name), by_end, n=1)
    return f"did you mean {by_end[close[0]]!r}?" if close else None


def _end(name: str) -> str:
    return name.replace("\\", "/").rpartition("/")[2]


def read(path: Path) -> str:
    """The text of a recipe. Raises RecipeError where the file cannot be read, is too large, or is not UTF-8."""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise RecipeError(f"the recipe cannot be read: {error.strerror}", where=str(path)) from None
    if len(content) > MAX_BYTES:
        raise RecipeError("too large for a recipe", where=str(path), found="more than 1 MB", allowed="1 MB")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        column = error.start - content.rfind(b"\n", 0, error.start)
        raise RecipeError(
            "not UTF-8 text",
            where=f"{path}:{line}:{column}",
            found=f"byte 0x{content[error.start]:02x}",
            hint="save the file as UTF-8",
        ) from None
