"""Safetensors files, one tensor at a time: what is in a folder, reading a tensor of it, writing a model of any size.

A file is the length of its header (8 bytes, little-endian), the header (JSON: each tensor's dtype, shape and place), and
the numbers, little-endian. A header is read and checked by safetensors itself; the numbers are read by their place, so
that no more of a file is in memory than was asked for.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from hkft.errors import SetupError
from hkft.model import pickles

FLOATING = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
WHOLE = {"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8}
DTYPES = {**FLOATING, **WHOLE, "BOOL": torch.bool}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
CHUNK = 1 << 20  # Linux writes larger pieces several times more slowly into its cache


@dataclass(frozen=True)
class Stored:
    """A tensor in a file. dtype: as safetensors writes it ("BF16"); start: its first byte, counted from the file's."""

    path: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    bytes: int

    def read(self) -> Tensor:
        """The tensor, in memory of its own. Raises SetupError: the file has become shorter."""
        data = torch.empty(self.bytes, dtype=torch.uint8)
        with self.path.open("rb", buffering=0) as file:
            file.seek(self.start)
            self._fill(data.numpy().data, file)
        return data.view(DTYPES[self.dtype]).view(self.shape)

    def chunks(self) -> Iterator[memoryview]:
        """Its bytes in pieces; each is overwritten by the next. Raises SetupError: the file has become shorter."""
        buffer = memoryview(bytearray(min(CHUNK, self.bytes)))
        with self.path.open("rb", buffering=0) as file:
            file.seek(self.start)
            for first in range(0, self.bytes, CHUNK):
                chunk = buffer[: self.bytes - first]
                self._fill(chunk, file)
                yield chunk

    def _fill(self, buffer: memoryview, file: FileIO) -> None:
        while len(buffer):  # one call reads 2 GB at most
            count = file.readinto(buffer)
            if not count:
                raise pickles.damaged(self.path, f"no bytes are left of {self.name}")
            buffer = buffer[count:]


def checkpoint(folder: Path) -> dict[str, Stored]:
    """The tensors of a model folder: of model.safetensors, or of the files that model.safetensors.index.json names.

    Raises SetupError: no such files, pickled ones only, a damaged file, an index that leads out of the folder.
    """
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.exists():
        return header(single)
    if not index.exists():
        raise _no_weights(folder)
    files = pickles.index(index)
    tensors = {file: header(folder / file) for file in sorted(set(files.values()))}
    lost = next((name for name, file in files.items() if name not in tensors[file]), None)
    if lost is not None:
        raise pickles.damaged(index, f"{lost} is not in {files[lost]}")
    return {name: tensors[file][name] for name, file in files.items()}


def adapter(folder: Path) -> dict[str, Stored]:
    """The tensors of a PEFT adapter folder, adapter_model.safetensors. Raises SetupError, as `checkpoint` does."""
    path = folder / "adapter_model.safetensors"
    if not path.exists():
        raise _no_weights(folder)
    return header(path)


def header(path: Path) -> dict[str, Stored]:
    """The tensors of one file. Raises SetupError: it is not there, or damaged."""
    pickles.whole(path)
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        entries = json.loads(file.read(length))
    return {
        name: Stored(path, name, entry["dtype"], tuple(entry["shape"]), 8 + length + first, last - first)
        for name, entry in entries.items()
        if name != "__metadata__"
        for first, last in [entry["data_offsets"]]
    }


class ShardWriter:
    """Writes a model into `folder`, tensor by tensor and in any order; on leaving the `with` block it is complete.

    tensors: dtype and shape of every name. One model.safetensors, or where its numbers would take more than
    `max_shard_size` bytes model-00001-of-0000N.safetensors ... and model.safetensors.index.json. A tensor is never
    split. Raises OSError.
    """

    def __init__(
        self, folder: Path, tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], max_shard_size: float = 5e9
    ) -> None:
        self._bytes = {name: math.prod(shape) * dtype.itemsize for name, (dtype, shape) in tensors.items()}
        self._tensors, self._missing, self._stack = tensors, set(tensors), ExitStack()
        self._places: dict[str, tuple[Path, int]] = {}
        shards = self._split(max_shard_size)
        several = [f"model-{n:05}-of-{len(shards):05}.safetensors" for n in range(1, len(shards) + 1)]
        files = several if len(shards) > 1 else ["model.safetensors"]
        for file, names in zip(files, shards, strict=True):
            self._begin(folder / file, names)
        if len(shards) > 1:
            places = {name: file for file, names in zip(files, shards, strict=True) for name in names}
            index = {"metadata": {"total_size": sum(self._bytes.values())}, "weight_map": dict(sorted(places.items()))}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        self._files = {
            path: self._stack.enter_context(path.open("r+b", buffering=0)) for path, _ in self._places.values()
        }

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._stack.close()
        assert kind is not None or not self._missing, f"never written: {sorted(self._missing)[:3]}"

    def write(self, name: str, tensor: Tensor) -> None:
        """Write one tensor, of the dtype and the shape that were announced."""
        assert (tensor.dtype, tuple(tensor.shape)) == self._tensors[name], name
        self.copy(name, [tensor.contiguous().view(-1).view(torch.uint8).numpy().data])

    def copy(self, name: str, chunks: Iterable[memoryview]) -> None:
        """Write one tensor from the bytes it has in another file."""
        path, start = self._places[name]
        file, written = self._files[path], 0
        file.seek(start)
        for chunk in chunks:
            while len(chunk):
                count = file.write(chunk[:CHUNK])
                chunk, written = chunk[count:], written + count
        assert written == self._bytes[name], name
        self._missing.remove(name)

    def _split(self, most: float) -> list[list[str]]:
        shards: list[list[str]] = [[]]
        filled = 0
        for name, size in self._bytes.items():
            if shards[-1] and filled + size > most:
                shards.append([])
                filled = 0
            shards[-1].append(name)
            filled += size
        return shards

    def _begin(self, path: Path, names: list[str]) -> None:
        """Write the header. Wide dtypes come first, so that every number lies at a multiple of its size."""
        names = sorted(names, key=lambda name: -self._tensors[name][0].itemsize)
        entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
        first = 0
        for name in names:
            dtype, shape = self._tensors[name]
            entries[name] = {"dtype": NAMES[dtype], "shape": shape, "data_offsets": [first, first + self._bytes[name]]}
            first += self._bytes[name]
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        path.write_bytes(struct.pack("<Q", len(text)) + text)
        for name in names:
            place = entries[name]
            assert isinstance(place, dict)
            self._places[name] = (path, 8 + len(text) + place["data_offsets"][0])


def _no_weights(folder: Path) -> SetupError:
    pickles.refuse(folder)
    return SetupError("there are no weights", where=str(folder), allowed="safetensors files")
