"""Open one file of tensors lazily: .safetensors, a zip pickle of torch, or a file that was published in pieces.

Opening reads only headers. Files are mapped read-only and shared, so neither their size nor the pages that are read
count as the program's own memory. Pickles are always read with `weights_only=True`.
"""

from __future__ import annotations

import io
import json
import logging
import math
import mmap
import os
import platform
import re
import struct
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, BinaryIO

from accessory.checkpoint.lazy import ITEMSIZE, Bytes, Constant, Lazy, Stored
from accessory.errors import CheckpointError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

log = logging.getLogger(__name__)

# What torch calls them.
SAFETENSORS_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}
# These processors load elements from unaligned addresses. On others, an unaligned tensor is copied out of the file.
_UNALIGNED_IS_FINE = platform.machine().lower() in ("x86_64", "amd64", "aarch64", "arm64")
_READ_AHEAD = 2**20
_HEADER_LIMIT = 100 * 2**20


class File(Bytes):
    """A file of fixed size; mapped when it is first read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.size = path.stat().st_size
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
        self._map: mmap.mmap | None = None
        self._lock = Lock()

    def flat(self, dtype: torch.dtype, start: int, count: int, soon: bool = False) -> Tensor:
        import torch

        nbytes = count * dtype.itemsize
        if start % dtype.itemsize and not _UNALIGNED_IS_FINE:  # in old safetensors files and in pieces
            return _owned(self.read(start, nbytes), dtype)
        mapped = self._mapped()
        if soon and nbytes >= _READ_AHEAD:
            # A page fault makes the kernel read only 128 kB. One request for the whole range keeps the disk busy.
            page = start - start % mmap.PAGESIZE
            mapped.madvise(mmap.MADV_WILLNEED, page, start + nbytes - page)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given buffer is not writable")
            return torch.frombuffer(mapped, dtype=dtype, count=count, offset=start)

    def read(self, start: int, nbytes: int) -> bytearray:
        """Copy `nbytes` bytes from byte `start`, where a view is impossible. CheckpointError if the file is shorter."""
        out = bytearray(nbytes)
        done = 0
        with open(self.path, "rb", buffering=0) as handle:
            handle.seek(start)
            while done < nbytes:
                got = handle.readinto(memoryview(out)[done:])
                if not got:
                    raise CheckpointError(f"{self.path}: ends at byte {start + done}, {nbytes - done} bytes too early")
                done += got
        return out

    def _mapped(self) -> mmap.mmap:
        with self._lock:
            if self._map is None:
                with open(self.path, "rb") as handle:
                    if os.fstat(handle.fileno()).st_size < self.size:
                        raise CheckpointError(f"{self.path}: has become shorter since it was opened")
                    self._map = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)
            return self._map


class Pieces(Bytes):
    """Several files that form one file when put end to end (`consolidated.00.pth-split0` …)."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.files = [File(p) for p in paths]
        self.starts = [0]
        for file in self.files:
            self.starts.append(self.starts[-1] + file.size)
        self.size = self.starts[-1]

    def flat(self, dtype: torch.dtype, start: int, count: int, soon: bool = False) -> Tensor:
        nbytes = count * dtype.itemsize
        for first, file in zip(self.starts, self.files, strict=False):
            if first <= start and start + nbytes <= first + file.size:
                return file.flat(dtype, start - first, count, soon)
        return _owned(self.read(start, nbytes), dtype)

    def read(self, start: int, nbytes: int) -> bytearray:
        out = bytearray(nbytes)
        for first, file in zip(self.starts, self.files, strict=False):
            lo, hi = max(start, first), min(start + nbytes, first + file.size)
            if lo < hi:
                out[lo - start : hi - start] = file.read(lo - first, hi - lo)
        return out


class _PiecesReader(io.RawIOBase):
    """Presents pieces as one seekable file, for torch.load."""

    def __init__(self, pieces: Pieces) -> None:
        self.pieces = pieces
        self.position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.pieces.size}[whence]
        self.position = max(0, base + offset)
        return self.position

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        count = max(0, min(len(view), self.pieces.size - self.position))
        view[:count] = self.pieces.read(self.position, count)
        self.position += count
        return count


def _owned(data: bytearray, dtype: torch.dtype) -> Tensor:
    import torch

    return torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)


def read_file(path: Path) -> dict[str, Lazy]:
    """Read the tensors of a file: as .safetensors if it is named so, otherwise as a torch pickle."""
    return read_safetensors(path) if path.suffix == ".safetensors" else read_pickle(path)


def read_safetensors(path: Path) -> dict[str, Lazy]:
    """The tensors of a .safetensors file under their names in it. CheckpointError if it is broken or truncated."""
    source = File(path)
    header, start = _safetensors_header(source)
    tensors: dict[str, Lazy] = {}
    end = 0
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        try:
            dtype = SAFETENSORS_DTYPES[entry["dtype"]]
            shape = tuple(int(n) for n in entry["shape"])
            lo, hi = (int(n) for n in entry["data_offsets"])
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{path}: tensor {name}: unusable entry in the header: {entry!r}") from error
        if min(shape, default=0) < 0 or lo < 0 or hi - lo != math.prod(shape) * ITEMSIZE[dtype]:
            raise CheckpointError(f"{path}: tensor {name}: shape {shape} and bytes {lo} to {hi} contradict each other")
        if start + hi > source.size:
            raise CheckpointError(_truncated(path, name, start + hi, source.size))
        end = max(end, hi)
        tensors[name] = Stored(source, start + lo, shape, dtype)
    if start + end != source.size:
        raise CheckpointError(f"{path}: {source.size - start - end} bytes follow the last tensor; the file is damaged")
    return tensors


def safetensors_metadata(path: Path) -> dict[str, str]:
    """The `__metadata__` of a .safetensors file, empty if it has none. CheckpointError if the file is broken."""
    header, _ = _safetensors_header(File(path))
    return dict(header.get("__metadata__", {}))


def _safetensors_header(source: File) -> tuple[dict[str, Any], int]:
    path = source.path
    if source.size < 8:
        raise CheckpointError(f"{path}: not a checkpoint ({source.size} bytes)")
    _refuse_stand_ins(path, bytes(source.read(0, min(64, source.size))))
    (length,) = struct.unpack("<Q", source.read(0, 8))
    if length > _HEADER_LIMIT:
        raise CheckpointError(f"{path}: not a safetensors file (its header would be {length} bytes long)")
    if 8 + length > source.size:
        raise CheckpointError(f"{path}: truncated: its header ends at byte {8 + length}, the file at {source.size}")
    try:
        header = json.loads(source.read(8, length))
    except ValueError as error:
        raise CheckpointError(f"{path}: not a safetensors file (its header is not JSON: {error})") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: not a safetensors file (its header is a {type(header).__name__})")
    return header, 8 + length


def read_pickle(path: Path, pieces: Pieces | None = None) -> dict[str, Lazy]:
    """The tensors of a torch pickle, `{"model": {…}}` or bare, under their names in it.

    `pieces`: the file's parts, if it was published in several; `path` is then used only in messages. A pickle in the
    format before torch 1.6 is read into memory. Raises CheckpointError for other files, for code in the pickle and for
    truncated files.
    """
    import torch

    source = File(path) if pieces is None else pieces
    head = bytes(source.read(0, min(64, source.size)))
    _refuse_stand_ins(path, head)
    if head[:4] == b"PK\x03\x04":
        if not zipfile.is_zipfile(path if pieces is None else _PiecesReader(pieces)):
            raise CheckpointError(f"{path}: truncated or incomplete: the directory at its end is missing")
        entries = _load_pickle(path, pieces, on_meta=True)
    elif head[:1] == b"\x80" and pieces is None:
        entries = _load_pickle(path, None, on_meta=False)
        log.warning("%s: written in torch's old format, so all of it was read into memory", path)
    else:
        raise CheckpointError(f"{path}: not a checkpoint (neither a torch file nor safetensors)")
    tensors: dict[str, Lazy] = {}
    for name, value in _state_dict(path, entries).items():
        if not isinstance(value, torch.Tensor) or value.layout != torch.strided or value.is_quantized:
            raise CheckpointError(f"{path}: {name}: expected a tensor, found {type(value).__name__}")
        if value.device.type == "meta":
            tensors[name] = _stored(path, source, name, value)
        else:
            tensors[name] = Constant(value)
    return tensors


def _stored(path: Path, source: File | Pieces, name: str, value: Tensor) -> Stored:
    start = value.untyped_storage()._checkpoint_offset
    assert start is not None  # `_offsets_come_with_meta` has checked this
    end = start + value.untyped_storage().nbytes()
    if end > source.size:
        raise CheckpointError(_truncated(path, name, end, source.size))
    return Stored(source, start, value.shape, value.dtype, value.stride(), int(value.storage_offset()))


def _state_dict(path: Path, entries: Any) -> Mapping[str, Any]:
    if isinstance(entries, Mapping) and isinstance(entries.get("model"), Mapping):
        entries = entries["model"]
    if not isinstance(entries, Mapping) or not all(isinstance(k, str) for k in entries):
        raise CheckpointError(f"{path}: expected a dict of named tensors, found {type(entries).__name__}")
    return entries


def _load_pickle(path: Path, pieces: Pieces | None, on_meta: bool) -> Any:
    handle: Path | BinaryIO = path if pieces is None else io.BufferedReader(_PiecesReader(pieces), 2**20)
    try:
        with warnings.catch_warnings():  # of what the file is made for: an error below says what is wrong with it
            warnings.simplefilter("ignore")
            return _load_tensors(handle, path, pieces is None, on_meta)
    except Exception as error:  # torch.load raises exceptions of many kinds
        raise CheckpointError(f"{path}: {_reason(error)}") from error


def _load_tensors(handle: Path | BinaryIO, path: Path, whole: bool, on_meta: bool) -> Any:
    import torch

    if not on_meta:
        return torch.load(handle, map_location="cpu", weights_only=True)
    if _offsets_come_with_meta():
        return torch.load(handle, map_location="meta", weights_only=True)
    log.warning("%s: this torch does not tell where tensors lie in a file; mapping all of it instead", path)
    return torch.load(handle, map_location="cpu", weights_only=True, mmap=whole)


@lru_cache(maxsize=1)
def _offsets_come_with_meta() -> bool:
    """Whether tensors loaded onto `meta` know their place in the file (an undocumented attribute of torch)."""
    import torch

    memory = io.BytesIO()
    torch.save(torch.zeros(1), memory)
    memory.seek(0)
    probe = torch.load(memory, map_location="meta", weights_only=True)
    return getattr(probe.untyped_storage(), "_checkpoint_offset", None) is not None


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())
    code = re.search(r"[Uu]nsupported (?:global|class|operand|instruction)[^.]*|GLOBAL ([\w.]+)", text)
    if code:
        named = re.search(r"GLOBAL ([\w.]+)", text)
        what = f"the pickle asks for {named[1]}" if named else "the pickle holds more than tensors"
        return f"{what}; code in a checkpoint is never run, save it as plain tensors"
    return f"cannot be read as a torch file: {text[:200]}"


def _refuse_stand_ins(path: Path, head: bytes) -> None:
    if head.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{path}: a Git LFS pointer, not the file itself; run `git lfs pull`")
    if head.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        raise CheckpointError(f"{path}: a web page, not a checkpoint; the download failed")


def _truncated(path: Path, name: str, end: int, size: int) -> str:
    return f"{path}: truncated: tensor {name} ends at byte {end}, the file at {size}"
