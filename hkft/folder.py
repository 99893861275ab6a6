"""The run folder: where everything of a run lies, and how it is written, whole or not at all."""

from __future__ import annotations

import fcntl
import json
import math
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hkft.errors import DataError, UsageError
from hkft.events import Event, Stage, as_record

SCHEMA_VERSION = 1
PIECE = 10_000  # numbers of an array that are written at a time
INSTANT = 0.1  # seconds for which a lock is waited for: `busy` holds it for less, to look


@dataclass(frozen=True)
class RunFolder:
    """`runs/<recipe>-<method>-s<seed>-<hash>/`, with the names the contract gives."""

    path: Path

    @property
    def recipe(self) -> Path:
        return self.path / "recipe.yaml"

    @property
    def resolved(self) -> Path:
        return self.path / "resolved.yaml"

    @property
    def environment(self) -> Path:
        return self.path / "environment.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def splits(self) -> Path:
        return self.path / "splits.json"

    @property
    def adapter(self) -> Path:
        return self.path / "adapter"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def summary(self) -> Path:
        return self.path / "summary.json"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    @property
    def card(self) -> Path:
        return self.path / "README.md"

    @property
    def history(self) -> Path:
        return self.path / "predictions" / "history.jsonl"

    def predictions(self, split: str) -> Path:
        return self.path / "predictions" / f"{split}.jsonl"

    @property
    def exists(self) -> bool:
        return self.resolved.exists() or self.summary.exists()

    @property
    def status(self) -> str | None:
        """`finished`, `running`, `interrupted`, `failed`, or None where there is no run."""
        return read_json(self.summary)["status"] if self.summary.exists() else None

    @contextmanager
    def held(self) -> Iterator[None]:
        """The run is written to by this process alone. Raises UsageError where another one does."""
        file = self._locked()
        if file is None:
            raise UsageError("another process is writing this run", where=str(self.path), hint="wait for it")
        try:
            yield
        finally:
            if _is(file, self.lock):  # not where the folder was removed, and another process has made it anew
                self.lock.unlink()
            os.close(file)

    def remove(self) -> None:
        """By who holds it: its name goes at once, so that what another process makes in its place stays."""
        gone = self.path.with_name(f".{self.path.name}.{os.getpid()}.gone")
        self.path.rename(gone)
        shutil.rmtree(gone)

    @property
    def busy(self) -> bool:
        """Whether a process is writing this run. One that was killed is not."""
        try:
            file = os.open(self.lock, os.O_RDONLY)
        except FileNotFoundError:
            return False
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:  # a file system without locks
            pass
        finally:
            os.close(file)
        return False

    def _locked(self) -> int | None:
        """The lock's file, open, and locked until it is closed. None where another process has it.

        Whoever had it before removes it, or the whole folder, while holding it: a lock on what is gone is none.
        """
        deadline = time.monotonic() + INSTANT
        self.path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            with suppress(FileExistsError):
                self.path.mkdir()
            try:
                file = os.open(self.lock, os.O_RDWR | os.O_CREAT)
            except FileNotFoundError:  # the folder was removed in between
                continue
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(file)
                if time.monotonic() > deadline:
                    return None
                time.sleep(INSTANT / 10)
                continue
            except OSError:  # a file system without locks
                return file
            if _is(file, self.lock):
                return file
            os.close(file)

    @property
    def lock(self) -> Path:
        return self.path / ".lock"

    def append(self, event: Event) -> None:
        """One line of metrics.jsonl. A stage's progress is for the eyes only, and is not kept."""
        if not isinstance(event, Stage):
            _append(self.metrics, as_record(event))

    def remember(self, record: Mapping[str, Any]) -> None:
        """One line of predictions/history.jsonl: a step, and of the rows of each set their losses at it."""
        self.history.parent.mkdir(exist_ok=True)
        _append(self.history, record)

    def records(self, *events: str) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl, of the named events only if any are named."""
        return [record for record in read_jsonl(self.metrics) if not events or record["event"] in events]

    def last_checkpoint(self) -> Path | None:
        """The newest checkpoint that was written to its end."""
        found = [p for p in self.checkpoints.glob("checkpoint-*") if (p / "trainer_state.json").exists()]
        return max(found, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def _is(file: int, path: Path) -> bool:
    """Whether an open file is the one that has this name now."""
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except FileNotFoundError:
        return False


def open_run(path: str | Path) -> RunFolder:
    """The run in a folder. Raises UsageError where there is none."""
    folder = RunFolder(Path(path))
    if not folder.exists:
        raise UsageError(
            "this is not a run folder",
            where=str(path),
            allowed="a folder that `hkft train` has written, with resolved.yaml and summary.json",
        )
    return folder


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all: through a neighbour that is renamed, and gone if the writing fails."""
    _write(path, [text])


def _write(path: Path, pieces: Iterable[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.writelines(pieces)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """JSON, indented; a numpy array of numbers in `content` is a list, written a piece at a time."""
    _write(path, _indented(content))


def _indented(content: Mapping[str, Any]) -> Iterator[str]:
    before = "{"
    for key, value in content.items():
        yield f"{before}\n  {json.dumps(str(key))}: "
        if getattr(value, "ndim", 0) and len(value):  # a numpy array
            for start in range(0, len(value), PIECE):
                items = value[start : start + PIECE].tolist()
                shown = map(str, items) if value.dtype.kind in "iu" else (json.dumps(jsonable(item)) for item in items)
                numbers = ",".join(f"\n    {item}" for item in shown)
                yield f"{',' if start else '['}{numbers}"
            yield "\n  ]"
        else:
            yield json.dumps(jsonable(value), indent=2).replace("\n", "\n  ")
        before = ","
    yield "\n}\n" if content else "{}\n"


def write_jsonl(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    _write(path, (json.dumps(jsonable(record)) + "\n" for record in records))


def _append(path: Path, record: Mapping[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(jsonable(record)) + "\n")


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The lines of one of a run's files that grow; none where it is not there."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue  # the last line of a killed run may be torn
    return records


def read_json(path: Path) -> dict[str, Any]:
    """One of a run's files. Raises DataError where it is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError) as error:
        state = "is missing" if isinstance(error, FileNotFoundError) else "is damaged"
        raise DataError(
            f"a file of this run {state}", where=str(path), hint="the run cannot be used without it"
        ) from error


def check_place(path: Path) -> None:
    """Raise UsageError where a file stands in the place of this folder, or of one above it."""
    nearest = next(place for place in (path, *path.absolute().parents) if place.exists())
    if not nearest.is_dir():
        raise UsageError("there is a file in the output's place", where=str(nearest), hint="--output names a folder")


def cache_directory() -> Path:
    """Where hkft keeps what can be made again, whether or not it is there: $HKFT_CACHE, else hkft in the user's cache."""
    if named := os.environ.get("HKFT_CACHE"):
        return Path(named).expanduser()
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "hkft"


def jsonable(value: Any) -> Any:
    """The same content in JSON's own types; NaN and inf, which JSON has not, become null."""
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set):
        return [jsonable(item) for item in value]
    if getattr(value, "ndim", 0):  # a numpy array
        return jsonable(value.tolist())
    if hasattr(value, "item"):  # a numpy scalar
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value
