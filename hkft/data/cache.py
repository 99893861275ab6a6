"""What was made of the same content is not made again: Arrow files on disk, by a key of all that they depend on.

An entry is a folder, named by its key: one or more Arrow files, and `entry.json` with their sizes and checksums. It is
written under a temporary name beside its place and renamed into it, so that of two runs at once either wins, with the same
rows, and a killed one leaves nothing that is ever read. Rows are memory-mapped: they cost no memory until they are looked
at, and what is removed on disk stays readable to whoever has it open.

Place: $HKFT_CACHE, else $XDG_CACHE_HOME/hkft, else ~/.cache/hkft. A cache that cannot be written only costs the cache.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import xxhash

from hkft.events import Listener, Notice
from hkft.folder import cache_directory

FORMAT = 1  # of entries and of what keys are made of: another number, and nothing of before is read
MOST = 20 * 2**30  # bytes of all entries; those that were not used for longest go
ABANDONED = 24 * 3600  # seconds without a change, after which a temporary folder is a dead process's
PARTIAL = ".partial"
PIECE = 2**24  # bytes read at a time

Make = Callable[[Path | None], datasets.Dataset | None]


def key(**parts: Any) -> str:
    """sha256, in hexadecimal, of everything that an entry's rows depend on: values of JSON's types."""
    return hashlib.sha256(json.dumps({"format": FORMAT, **parts}, sort_keys=True).encode()).hexdigest()


def kept(name: str, make: Make, tell: Listener) -> datasets.Dataset:
    """The rows of the entry `name`, memory-mapped; where there is none, or a damaged one, as `make` makes them.

    make(file): writes the rows to `file`, or to several files beside it that end like it; make(None): gives them in
    memory, which is done where the cache cannot be written.
    """
    entry = cache_directory() / name
    found = _opened(entry)
    if found is not None:
        with suppress(OSError):
            os.utime(entry / "entry.json")  # when it was used last
        return found
    try:
        _write(entry, make)
        found = _opened(entry)
    except OSError as error:
        reason = error.strerror or str(error)
        tell(
            Notice(
                f"the cache {cache_directory()} cannot be written ({reason}): the rows are held in memory", "warning"
            )
        )
    if found is None:
        found = make(None)
        assert found is not None
    else:
        prune(entry)
    return found


def _write(entry: Path, make: Make) -> None:
    entry.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f"{entry.name[:16]}.", suffix=PARTIAL, dir=entry.parent))
    try:
        make(partial / "rows.arrow")
        files = {path.name: _described(path) for path in sorted(partial.glob("*.arrow"))}
        (partial / "entry.json").write_text(json.dumps({"files": files}), encoding="utf-8")
        try:
            partial.rename(entry)
        except OSError:
            if _opened(entry) is None:  # a damaged one; else another process was faster, with the same rows
                _remove(entry)
                partial.rename(entry)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _opened(entry: Path) -> datasets.Dataset | None:
    """The rows of an entry; None where there is none, or where it is not as it was written."""
    try:
        files: Mapping[str, Any] = json.loads((entry / "entry.json").read_text(encoding="utf-8"))["files"]
        if not files or any(_described(entry / name) != files[name] for name in files):
            return None
        parts = [datasets.Dataset.from_file(str(entry / name)) for name in sorted(files)]
        return parts[0] if len(parts) == 1 else datasets.concatenate_datasets(parts)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, pa.ArrowException):
        return None


def _described(path: Path) -> list[Any]:
    """Size and checksum. Reading a file to the end costs a small part of what training on it does."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while piece := file.read(PIECE):
            digest.update(piece)
        return [file.tell(), digest.hexdigest()]


def _remove(entry: Path) -> None:
    """At once for whoever looks for it: first its name goes."""
    with suppress(OSError):
        gone = Path(tempfile.mkdtemp(prefix="gone.", suffix=PARTIAL, dir=entry.parent))
        entry.replace(gone)
        shutil.rmtree(gone, ignore_errors=True)


def prune(used: Path | None = None, most: int | None = None) -> None:
    """Remove what dead processes left, and entries beyond `most` bytes (MOST), those first that were not used for longest.

    used: an entry that stays.
    """
    entries: list[tuple[float, int, Path]] = []
    with suppress(OSError):
        for folder in cache_directory().iterdir():
            with suppress(OSError):  # another process removes too
                states = [file.stat() for file in folder.iterdir()]
                last = max([state.st_mtime for state in states], default=folder.stat().st_mtime)
                if folder.name.endswith(PARTIAL):
                    if time.time() - last > ABANDONED:
                        shutil.rmtree(folder, ignore_errors=True)
                elif (folder / "entry.json").exists():
                    used_last = (folder / "entry.json").stat().st_mtime
                    entries.append((used_last, sum(state.st_size for state in states), folder))
    held, most = sum(size for _, size, _ in entries), MOST if most is None else most
    for _, size, folder in sorted(entries):
        if held <= most:
            return
        if folder != used:
            _remove(folder)
            held -= size
