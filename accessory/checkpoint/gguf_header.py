"""Parse the header of a GGUF file: its metadata, and where each tensor is.

We do not use the reader of the `gguf` package: it takes seconds and much memory for a large vocabulary, and it fails on
a damaged file with exceptions of any kind.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accessory.errors import CheckpointError, MissingExtraError

MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_FLOAT32, _STRING, _ARRAY = 6, 8, 9


@dataclass(frozen=True)
class Entry:
    """A tensor of the file: its row-major shape, the name of its type, and where its bytes are."""

    name: str
    shape: tuple[int, ...]
    kind: str
    start: int
    nbytes: int


@dataclass(frozen=True)
class GGUFFile:
    """A file's header: metadata under its own keys, and the tensors it lists (all lie inside the file)."""

    path: Path
    metadata: dict[str, Any]
    entries: dict[str, Entry]


def read_header(path: Path) -> GGUFFile:
    """Parse a GGUF file's header and check that every tensor it lists lies inside the file.

    Raises CheckpointError for a damaged file or another kind of file, and MissingExtraError without the gguf package.
    """
    try:
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
    except ImportError as error:
        raise MissingExtraError(f"{path}: reading GGUF needs gguf: pip install 'mixtral-accessory[gguf]'") from error
    try:
        with open(path, "rb") as handle:
            start = handle.read(8)
            if start[:4] != MAGIC:
                raise CheckpointError(f"{path}: not a GGUF file (it does not begin with GGUF)")
            if len(start) < 8:
                raise CheckpointError(f"{path}: truncated: a GGUF file of {len(start)} bytes")
            version = int.from_bytes(start[4:], "little")
            if version & 0xFFFF == 0:
                raise CheckpointError(f"{path}: a big-endian GGUF file; only little-endian ones can be read")
            if version not in _VERSIONS:
                raise CheckpointError(f"{path}: GGUF version {version}; readable are versions 2 and 3")
            with mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _Header(path, data).parse(GGML_QUANT_SIZES, GGMLQuantizationType)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error


class _Header:
    """A cursor on the header's bytes."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.size, self.at = path, data, len(data), 8

    def parse(self, sizes: Mapping[Any, tuple[int, int]], kinds: Any) -> GGUFFile:
        tensors, keys = self.scalar("Q"), self.scalar("Q")
        metadata = {}
        for _ in range(keys):
            key = self.string()
            metadata[key] = self.value(self.scalar("I"))
        found = [self.tensor() for _ in range(tensors)]
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1:
            raise CheckpointError(f"{self.path}: general.alignment is {alignment!r}, but it must be a positive number")
        base = -(-self.at // alignment) * alignment
        entries: dict[str, Entry] = {}
        for name, shape, number, offset in found:
            try:
                kind = kinds(number)
            except ValueError:
                raise CheckpointError(f"{self.path}: {name} is of an unknown type (number {number})") from None
            block, block_bytes = sizes[kind]
            if shape and shape[-1] % block:
                raise CheckpointError(
                    f"{self.path}: {name}: rows of {shape[-1]} are no multiple of {kind.name}'s {block}"
                )
            nbytes = math.prod(shape) // block * block_bytes
            if base + offset + nbytes > self.size:
                raise CheckpointError(
                    f"{self.path}: truncated: {name} ends at byte {base + offset + nbytes}, the file at {self.size}"
                )
            if name in entries:
                raise CheckpointError(f"{self.path}: holds {name} twice")
            entries[name] = Entry(name, shape, kind.name, base + offset, nbytes)
        return GGUFFile(self.path, metadata, entries)

    def take(self, count: int) -> int:
        """Advance by `count` bytes and return where they begin; CheckpointError if the file ends first."""
        start = self.at
        if start + count > self.size:
            raise CheckpointError(f"{self.path}: truncated: the header goes on after the file's {self.size} bytes")
        self.at += count
        return start

    def scalar(self, code: str) -> Any:
        return struct.unpack_from("<" + code, self.data, self.take(struct.calcsize("<" + code)))[0]

    def string(self) -> str:
        length = self.scalar("Q")
        start = self.take(length)
        return self.data[start : start + length].decode("utf-8", errors="replace")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            inner, length = self.scalar("I"), self.scalar("Q")
            if inner in _SCALARS:
                start = self.take(length * struct.calcsize("<" + _SCALARS[inner]))
                return list(struct.unpack_from(f"<{length}{_SCALARS[inner]}", self.data, start))
            return [self.value(inner) for _ in range(length)]
        if kind not in _SCALARS:
            raise CheckpointError(f"{self.path}: metadata of unknown type {kind}; the header is damaged or too new")
        value = self.scalar(_SCALARS[kind])
        if kind != _FLOAT32:
            return value
        import numpy as np  # here, because those that need the magic number alone import this module

        # A float32 that was written as 1e-5 becomes 1e-5 again, not 9.999999747378752e-06.
        return float(str(np.float32(value)))

    def tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self.string()
        dims = self.scalar("I")
        if dims > 4:
            raise CheckpointError(f"{self.path}: {name} has {dims} dimensions; the header is damaged")
        shape = tuple(self.scalar("Q") for _ in range(dims))[::-1]
        return name, shape, self.scalar("I"), self.scalar("Q")
