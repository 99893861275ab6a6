"""The run folder: where everything of a run lies, and how it is written, whole or not at all: by the first of its processes."""

from __future__ import annotations

import errno
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
from typing import TYPE_CHECKING, Any

from hkft import processes
from hkft.errors import DataError, UsageError
from hkft.events import Event, Stage, as_record

if TYPE_CHECKING:
    from hkft.recipe import Recipe

SCHEMA_VERSION = 1
SEAL = "complete.json"  # in a checkpoint, written last
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
        """Raises DataError where a later version of hkft has written the run."""
        if self.summary.exists():
            _check_version(self.summary)
        return self.resolved.exists() or self.summary.exists()

    @property
    def status(self) -> str | None:
        """`finished`, `running`, `interrupted`, `failed`, or None where there is no run."""
        return read_json(self.summary)["status"] if self.summary.exists() else None

    @contextmanager
    def held(self) -> Iterator[None]:
        """The run is written to by this process alone. Raises UsageError where another one does."""
        if not processes.first():
            yield
            return
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
        while gone.exists():
            try:
                shutil.rmtree(gone)
            except OSError as error:  # one that came for the lock by the old name may just have made it in here
                if error.errno != errno.ENOTEMPTY:
                    raise

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
        if processes.first():
            self.history.parent.mkdir(exist_ok=True)
        _append(self.history, record)

    def records(self, *events: str) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl, of the named events only if any are named."""
        return [record for record in read_jsonl(self.metrics) if not events or record.get("event") in events]

    def last_checkpoint(self) -> Path | None:
        """The newest checkpoint that was written to its end."""
        found = [p for p in self.checkpoints.glob("checkpoint-*") if is_whole(p)]
        return max(found, key=lambda path: int(path.name.rpartition("-")[2]), default=None)

    def torn_checkpoints(self) -> list[Path]:
        """Those that were not: the run was killed while it wrote them, or a file of theirs is gone or cut since."""
        return sorted(p for p in self.checkpoints.glob("checkpoint-*") if not is_whole(p))


def _is(file: int, path: Path) -> bool:
    """Whether an open file is the one that has this name now."""
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except FileNotFoundError:
        return False


def default_folder(recipe: Recipe) -> Path:
    """runs/<recipe>-<method>-s<seed>-<short hash>: another value anywhere in the recipe is another folder."""
    method = recipe.method.name.replace("/", "-")
    return Path("runs") / f"{recipe.name}-{method}-s{recipe.seed}-{recipe.fingerprint()[:6]}"


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


def seal(checkpoint: Path, told: Mapping[str, Any]) -> None:
    """Mark a checkpoint as written to its end: what is `told` of it, and the size of every file."""
    write_json(checkpoint / SEAL, {**told, "files": _sizes(checkpoint)})


def is_whole(checkpoint: Path) -> bool:
    """Whether a checkpoint is sealed, and every file is there as it was then."""
    try:
        files = read_json(checkpoint / SEAL)["files"]
    except (DataError, KeyError):
        return False
    there = _sizes(checkpoint)
    return all(there.get(name) == size for name, size in files.items())


def _sizes(folder: Path) -> dict[str, int]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != SEAL)
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in sorted(files)}


def move_files(source: Path, target: Path) -> None:
    """Every file of a folder into another, each in the place of one of its name at once; the first is gone then."""
    target.mkdir(parents=True, exist_ok=True)
    for path in sorted(source.iterdir()):
        path.replace(target / path.name)
    source.rmdir()


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all: through a neighbour that is renamed, and gone if the writing fails."""
    _write(path, [text])


def _write(path: Path, pieces: Iterable[str]) -> None:
    if not processes.first():
        return
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
    if not processes.first():
        return
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(jsonable(record)) + "\n")


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The lines of one of a run's files that grow; none where it is not there. DataError for a key that a line lacks."""
    records: list[dict[str, Any]] = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []:
        try:
            record = json.loads(line)
        except ValueError:
            continue  # the last line of a killed run may be torn
        if isinstance(record, dict):
            records.append(_Content(record, path))
    return records


class _Content(dict[str, Any]):
    """What a file of a run holds. That a key is not there is the file's fault: DataError in place of KeyError."""

    def __init__(self, content: Mapping[str, Any], path: Path) -> None:
        super().__init__(content)
        self.path = path

    def __missing__(self, key: str) -> Any:
        raise _unusable(self.path, f"lacks {key!r}")


def read_json(path: Path) -> dict[str, Any]:
    """One of a run's files. Raises DataError where it is missing or damaged; so does asking it for a key that it lacks."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise _unusable(path, "is missing") from error
    except (ValueError, RecursionError) as error:
        raise _unusable(path, "is damaged") from error
    if not isinstance(content, dict):
        raise _unusable(path, "is damaged")
    return _Content(content, path)


def _check_version(summary: Path) -> None:
    try:
        version = read_json(summary).get("schema_version")
    except DataError:  # said when it is needed
        return
    if isinstance(version, int) and version > SCHEMA_VERSION:
        raise DataError(
            "a later version of hkft has written this run",
            where=f"{summary}: schema_version",
            found=str(version),
            allowed=f"up to {SCHEMA_VERSION}",
            hint="pip install --upgrade hkft",
        )


def check_there(path: Path) -> None:
    """Raise DataError where one of a run's files is missing."""
    if not path.exists():
        raise _unusable(path, "is missing")


def _unusable(path: Path, state: str) -> DataError:
    return DataError(f"a file of this run {state}", where=str(path), hint="the run cannot be used without it")


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
