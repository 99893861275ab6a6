"""The recipes that come with hkft, and how a name or a path becomes a file.

They live in the top-level `recipes/` of the checkout, and in `hkft/recipes/` of an installed wheel.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

from hkft.errors import RecipeError, UsageError, nearest
from hkft.recipe.text import MAX_BYTES

_PACKAGE = Path(__file__).resolve().parents[1]


def shipped() -> dict[str, Path]:
    """The shipped recipes by name, without `.yaml`, `quickstart` first."""
    folders = [_PACKAGE / "recipes"]
    if (_PACKAGE.parent / "pyproject.toml").is_file():  # a checkout: next to an installed hkft stand other packages
        folders.append(_PACKAGE.parent / "recipes")
    files = {path.stem: path for folder in folders for path in folder.glob("*.yaml")}
    return dict(sorted(files.items(), key=lambda item: (item[0] != "quickstart", item[0])))


def choose(name: str | None) -> dict[str, Path]:
    """The shipped recipe of this name, with or without `.yaml`, or all of them. Raises UsageError for an unknown one."""
    found = shipped()
    if name is None:
        return found
    name = name.removesuffix(".yaml")
    if name not in found:
        raise UsageError(f"there is no shipped recipe {name!r}", allowed=", ".join(found), hint=nearest(name, found))
    return {name: found[name]}


def copy(recipes: Iterable[Path], folder: Path) -> list[Path]:
    """Copy recipes into a folder, to edit them. Raises UsageError, with nothing copied, where one is there already."""
    targets = {path: folder / path.name for path in recipes}
    taken = [str(target) for target in targets.values() if target.exists()]
    if taken:
        raise UsageError("a file of this name is there already", where=", ".join(taken))
    folder.mkdir(parents=True, exist_ok=True)
    return [Path(shutil.copy(path, target)) for path, target in targets.items()]


def describe(path: Path) -> str:
    """The first line of a recipe's head comment, without its name; "" where it has none."""
    with path.open(encoding="utf-8") as file:
        line = file.readline().strip()
    return line.lstrip("# ").removeprefix(f"{path.stem}: ") if line.startswith("#") else ""


def locate(source: str | Path) -> Path:
    """The file of a recipe: an existing path, else a shipped recipe of this name, with or without `.yaml`.

    Raises RecipeError with the nearest shipped name.
    """
    path = Path(source)
    if path.is_file():
        return path
    recipes = shipped()
    name = path.name.removesuffix(".yaml")
    if str(source) in (name, path.name) and name in recipes:
        return recipes[name]
    if path.is_dir():
        raise RecipeError("this is a folder, not a recipe", where=str(source), hint="name the .yaml file in it")
    hint = f"there is a shipped recipe `{name}`" if name in recipes else nearest(name, recipes)
    raise RecipeError(
        f"there is no recipe {str(source)!r}",
        allowed=f"the path of a .yaml file, or one of {', '.join(recipes)}",
        hint=hint,
    )


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
