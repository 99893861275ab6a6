"""Where a merged model may be written, and how it gets there: whole or not at all.

Everything is written into a hidden folder beside the target and renamed at the end. An older folder in the target's
place is set aside first and removed last, so that at no moment is there neither the old one nor the new one.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

from hkft.errors import UsageError
from hkft.folder import check_place

RECORD = "merge.json"  # what tells a folder of ours from any other


def check(target: Path, keep: Sequence[Path], force: bool) -> None:
    """Raise UsageError unless a merged model may be written to `target`, an absolute path without links.

    keep: folders that must not change, the source and the base model: nothing is written inside or around one.
    force: a merged model that is there may be replaced; any other folder may not, unless it is empty.
    """
    for folder in (path.resolve() for path in keep):
        if target == folder or folder in target.parents or target in folder.parents:
            raise UsageError(
                "the output would lie in, or around, what it is made from",
                where=str(target),
                found=str(folder),
                hint="--output names a folder of its own",
            )
    check_place(target.parent)
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not target.is_dir() or not (target / RECORD).exists():
        raise UsageError(
            "there is something else in the output's place",
            where=str(target),
            allowed="a new folder, an empty one, or with --force one that `hkft merge` wrote",
            hint="--output names another folder",
        )
    if not force:
        raise UsageError("there is a merged model already", where=str(target), hint="--force replaces it")


@contextmanager
def beside(target: Path) -> Iterator[Path]:
    """A folder next to `target`, to fill and then `put`. What is there at the end, whatever the end, is removed."""
    made = [folder for folder in target.parents if not folder.exists()]
    partial = target.with_name(f".{target.name}.partial-{uuid4().hex[:8]}")
    try:
        partial.mkdir(parents=True)
        yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        with suppress(OSError):  # the first that is not empty holds the finished model
            for folder in made:
                folder.rmdir()


def put(partial: Path, target: Path, force: bool) -> None:
    """Rename the filled folder to `target`, and remove what was there once that is done.

    Raises UsageError, as `check` does, where something has come to be there in the meantime.
    """
    check(target, (), force)
    old = target.with_name(f".{target.name}.old-{uuid4().hex[:8]}")
    try:
        if target.exists():
            target.rename(old)
        partial.rename(target)
    except BaseException:
        if old.exists() and not target.exists():
            old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def size(folder: Path) -> int:
    """Bytes of all its files."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
