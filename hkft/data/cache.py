"""What was made of the same content is not made again: files on disk, by a key of all that they depend on.

An entry is a folder, named by its key: rows as Arrow files, facts as JSON, and `entry.json` with the sizes and checksums of
both. It is written under a temporary name beside its place and renamed into it, so that of two runs at once either wins, with the same
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
from typing import Any, TypeVar

import datasets
import pyarrow as pa
import xxhash

from hkft.events import Listener, Notice
from hkft.folder import cache_directory

FORMAT = 1  # of entries and of what keys are made of: another number, and nothing of before is read
MOST = 20 * 2**30  # bytes of all entries; those that were not used for longest go
ABANDONED = 24 * 3600  # seconds without a change, after which a temporary folder is a dead process's
PARTIAL = ".partial"
ENTRY = "entry.json"
PIECE = 2**24  # bytes read at a time

T = TypeVar("T")
Make = Callable[[Path | None], datasets.Dataset | None]


def key(**parts: Any) -> str:
    """sha256, in hexadecimal, of everything that an entry depends on: values of JSON's types."""
    return hashlib.sha256(json.dumps({"format": FORMAT, **parts}, sort_keys=True).encode()).hexdigest()


def kept(name: str, make: Make, tell: Listener) -> datasets.Dataset:
    """The rows of the entry `name`, memory-mapped; where there is none, or a damaged one, as `make` makes them.

    make(file): writes the rows to `file`, or to several files beside it that end like it; make(None): gives them in
    memory, which is done where the cache cannot be written.
    """

    def write(folder: Path) -> None:
        make(folder / "rows.arrow")

    found = stored(name, write, _rows, tell)
    if found is None:
        found = make(None)
        assert found is not None
    return found


def kept_facts(name: str, make: Callable[[], dict[str, Any]], tell: Listener) -> dict[str, Any]:
    """What `make` gives, of JSON's types: of the entry `name` where there is one."""
    made: dict[str, Any] | None = None

    def write(folder: Path) -> None:
        nonlocal made
        made = make()
        write_facts(folder, made)

    found = stored(name, write, read_facts, tell)
    return found if found is not None else made if made is not None else make()


def write_facts(folder: Path, facts: Mapping[str, Any]) -> None:
    (folder / "facts.json").write_text(json.dumps(facts), encoding="utf-8")


def read_facts(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "facts.json").read_text(encoding="utf-8"))


def stored(name: str, write: Callable[[Path], None], opened: Callable[[Path], T], tell: Listener) -> T | None:
    """What `opened` makes of the folder of the entry `name`, which `write` fills where there is none, or a damaged one.

    None where the cache cannot be written, which is told.
    """
    entry = cache_directory() / name
    found = _opened(entry, opened)
    if found is not None:
        with suppress(OSError):
            os.utime(entry / ENTRY)  # when it was used last
        return found
    try:
        _write(entry, write)
        found = _opened(entry, opened)
    except OSError as error:
        reason = error.strerror or str(error)
        tell(
            Notice(
                f"the cache {cache_directory()} cannot be written ({reason}): the rows are held in memory", "warning"
            )
        )
    if found is not None:
        prune(entry)
    return found


def _write(entry: Path, write: Callable[[Path], None]) -> None:
    entry.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f"{entry.name[:16]}.", suffix=PARTIAL, dir=entry.parent))
    try:
        write(partial)
        files = {path.name: _described(path) for path in sorted(partial.iterdir())}
        (partial / ENTRY).write_text(json.dumps({"files": files}), encoding="utf-8")
        try:
            partial.rename(entry)
        except OSError:
            if not _whole(entry):  # a damaged one; else another process was faster, with the same rows
                _remove(entry)
                partial.rename(entry)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _opened(entry: Path, opened: Callable[[Path], T]) -> T | None:
    """None where there is no entry, or where it is not as it was written."""
    try:
        return opened(entry) if _whole(entry) else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, pa.ArrowException):
        return None


def _whole(entry: Path) -> bool:
    """Whether the entry is there as it was written."""
    try:
        files: Mapping[str, Any] = json.loads((entry / ENTRY).read_text(encoding="utf-8"))["files"]
        return bool(files) and all(_described(entry / name) == files[name] for name in files)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _rows(entry: Path) -> datasets.Dataset:
    parts = [datasets.Dataset.from_file(str(path)) for path in sorted(entry.glob("*.arrow"))]
    return parts[0] if len(parts) == 1 else datasets.concatenate_datasets(parts)


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
                elif (folder / ENTRY).exists():
                    used_last = (folder / ENTRY).stat().st_mtime
                    entries.append((used_last, sum(state.st_size for state in states), folder))
    held, most = sum(size for _, size, _ in entries), MOST if most is None else most
    for _, size, folder in sorted(entries):
        if held <= most:
            return
        if folder != used:
            _remove(folder)
            held -= size
