"""Write a checkpoint folder, whole or not at all, in bounded memory, and read it back to check it.

Each canonical tensor is read once, and its parts are copied in blocks from the mapped source to their places in all
files. Files are created in full size first, so that threads can write to any place at any time. CRC-32 compares what
was read with what was written: it detects faults of the disk and costs a third of sha256.
"""

from __future__ import annotations

import errno
import json
import math
import mmap
import os
import shutil
import struct
import threading
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from accessory.checkpoint.atomic import check_free_space, new_file, new_folder
from accessory.checkpoint.files import SAFETENSORS_DTYPES, File, read_pickle
from accessory.checkpoint.folder import survey_folder
from accessory.checkpoint.hashing import as_bytes, each_tensor
from accessory.checkpoint.lazy import Constant, Lazy, Stored
from accessory.checkpoint.names import expected_shapes, image_shapes, shape_problem
from accessory.checkpoint.packed import Quantizing
from accessory.checkpoint.trained_on import TrainedOn
from accessory.checkpoint.writers import Cut, FilePlan, FolderPlan, Target, plan_folder
from accessory.config import ModelArgs, read_json
from accessory.errors import CheckpointError, ConfigError, listed

_SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_NO_TEXTS: Mapping[str, str] = MappingProxyType({})
_NEARLY_FULL = 2**20
_SAFETENSORS_NAMES = {getattr(torch, dtype): name for name, dtype in SAFETENSORS_DTYPES.items()}
_DTYPES = {"bf16": torch.bfloat16, "bfloat16": torch.bfloat16, "fp16": torch.float16, "float16": torch.float16}
_DTYPES |= {"fp32": torch.float32, "float32": torch.float32}


_Sum = tuple[tuple[int, ...], torch.dtype]  # CRC-32 of the bytes for each place; the dtype


@dataclass(frozen=True)
class _Place:
    """Where a part of a canonical tensor goes: file, first byte, and how the part is cut out."""

    file: int
    offset: int
    cut: Cut


def parse_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """Parse "bf16", "fp16", "fp32" or torch's names; None and dtypes pass unchanged. ConfigError otherwise."""
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in _DTYPES:
        raise ConfigError(f"dtype: got {dtype!r}, but it must be one of {', '.join(_DTYPES)}")
    return _DTYPES[dtype]


def write_checkpoint(
    dst: str | Path,
    tensors: Mapping[str, Lazy],
    args: ModelArgs,
    *,
    to: Target,
    shards: int | None = None,
    dtype: str | torch.dtype | None = None,
    safetensors: bool = False,
    resources: Sequence[Path] = (),
    texts: Mapping[str, str] = _NO_TEXTS,
    overwrite: bool = False,
    verify: bool = True,
    progress: bool = True,
    allow_partial: bool = False,
    image_views: int = 0,
    trained_on: TrainedOn | None = None,
) -> None:
    """Write canonical `tensors` as a folder of layout `to`.

    `shards`: for base and sparse the number of model-parallel shards, by default the largest number up to 8 that
    divides the sizes; for hf the number of files, by default one per 5 GB. `dtype` converts every tensor. `resources`
    are copied into the folder. `texts` are more files, by name; one replaces a resource of its name. With `verify`, the
    folder is opened again before it gets its name, and every tensor is read back and compared. `image_views`: the views
    of an image that a model with images takes, for its meta.json.
    `trained_on`: the model that an adapter was trained on, for the meta.json of base and sparse.

    Raises ConfigError for sizes that do not divide. Raises CheckpointError for tensors that are missing (unless
    `allow_partial`), extra or misshapen, a destination that may not be replaced, and a disk that is full or fails.
    """
    target = parse_dtype(dtype)
    if target is not None:
        tensors = {name: tensor.to(target) for name, tensor in tensors.items()}
    _check_tensors(tensors, args, allow_partial)
    plan = plan_folder(to, tensors, args, shards=shards, safetensors=safetensors, image_views=image_views)
    if to == "hf":
        plan.documents["config.json"] |= _special_ids(resources)
    if trained_on is not None and "meta.json" in plan.documents:
        plan.documents["meta.json"] |= trained_on.to_dict()
    write_folder(
        dst, tensors, plan, resources=resources, texts=texts, overwrite=overwrite, verify=verify, progress=progress
    )


def write_folder(
    dst: str | Path,
    tensors: Mapping[str, Lazy],
    plan: FolderPlan,
    *,
    resources: Sequence[Path] = (),
    texts: Mapping[str, str] = _NO_TEXTS,
    overwrite: bool = False,
    verify: bool = True,
    progress: bool = True,
) -> None:
    """Write canonical `tensors` as `plan` says; options and errors are those of `write_checkpoint`."""
    places: dict[str, list[_Place]] = {name: [] for name in tensors}
    make = new_file if plan.is_file else new_folder
    with make(Path(dst), overwrite=overwrite) as folder:
        check_free_space(folder, sum(file.nbytes for file in plan.files))
        try:
            sums = _write(folder, plan, tensors, places, progress)
            for resource in resources:
                shutil.copyfile(resource, folder / resource.name)
                _sync(folder / resource.name)
            for name, text in texts.items():
                (folder / name).write_text(text, encoding="utf-8")
                _sync(folder / name)
        except OSError as error:
            place = f": {error.filename}" if error.filename else ""
            raise CheckpointError(f"{dst}{place}: cannot be written ({error.strerror})") from error
        if verify and all(file.lay_out is None for file in plan.files):
            _check_written(folder, sums, places, progress)
        elif verify:
            _check_bytes(folder, plan, tensors, sums, places, progress)


def _check_tensors(tensors: Mapping[str, Lazy], args: ModelArgs, allow_partial: bool) -> None:
    expected = expected_shapes(args)
    if "start_img" in tensors:
        expected |= image_shapes(args)
    missing = [name for name in expected if name not in tensors]
    if missing and not allow_partial:
        raise CheckpointError(f"missing tensors: {listed(missing)} ({len(missing)} of {len(expected)})")
    for name, tensor in tensors.items():
        problem = shape_problem(name, tensor, expected)
        if problem:
            raise CheckpointError(problem)


def _special_ids(resources: Sequence[Path]) -> dict[str, Any]:
    """The special token ids in generation_config.json, if it is among `resources`; config.json must agree with it."""
    for path in resources:
        if path.name == "generation_config.json":
            return {key: value for key, value in read_json(path).items() if key in _SPECIAL_IDS}
    return {}


def _write(
    folder: Path, plan: FolderPlan, tensors: Mapping[str, Lazy], places: Mapping[str, list[_Place]], progress: bool
) -> dict[str, _Sum]:
    """Write all files of the plan and add to `places`; return the checksums of each canonical tensor."""
    handles: list[int] = []
    try:
        for number, file in enumerate(plan.files):
            starts = _lay_out(folder / file.name, file)
            handles.append(os.open(folder / file.name, os.O_WRONLY))
            for name, slot in file.slots.items():
                offset = starts[name]
                for canonical, cut in slot.parts:
                    places[canonical].append(_Place(number, offset, cut))
                    offset += cut(tensors[canonical]).nbytes

        def work(name: str, tensor: Lazy) -> _Sum:
            return _write_tensor(tensor, places[name], handles)

        with _flushing(handles):
            sums = each_tensor(tensors, work, progress=progress, title="writing")
        for handle in handles:
            os.fsync(handle)
            _forget(handle)
    finally:
        for handle in handles:
            os.close(handle)
    for name, content in plan.documents.items():
        (folder / name).write_text(json.dumps(content, indent=2, default=dict) + "\n", encoding="utf-8")
        _sync(folder / name)
    return sums


def _write_tensor(tensor: Lazy, places: Sequence[_Place], handles: Sequence[int]) -> _Sum:
    """Read one canonical tensor once and write all its parts; return the CRC-32 of each part, and the dtype."""
    if isinstance(tensor, Quantizing):
        sources: Iterable[Lazy] = tensor.blocks_of_rows()
    else:
        sources = [tensor if tensor.piecewise else Constant(tensor.load())]
    sums, offsets = [0] * len(places), [place.offset for place in places]
    for source in sources:
        for n, place in enumerate(places):
            for block in place.cut(source).blocks():
                data = as_bytes(block)
                sums[n] = zlib.crc32(data, sums[n])
                offsets[n] = _write_at(handles[place.file], data, offsets[n])
    return tuple(sums), tensor.dtype


def _write_at(handle: int, data: memoryview, offset: int) -> int:
    """Write all of `data`; returns the offset after it."""
    while data:
        done = os.pwrite(handle, data, offset)
        if done == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        data, offset = data[done:], offset + done
    return offset


def _lay_out(path: Path, file: FilePlan) -> dict[str, int]:
    """Create a file in full size, with everything but tensor data; return the byte where each tensor's data begins."""
    if file.lay_out is not None:
        return file.lay_out(path, file)
    if path.suffix == ".safetensors":
        return _lay_out_safetensors(path, file)
    # torch writes the archive without reading the storages, so all tensors of a dtype can share reserved address space.
    largest: dict[torch.dtype, int] = {}
    for slot in file.slots.values():
        largest[slot.dtype] = max(largest.get(slot.dtype, 1), math.prod(slot.shape) * slot.dtype.itemsize)
    spaces = {
        dtype: mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) for dtype, size in largest.items()
    }
    stand_ins: dict[str, Tensor] = {
        name: torch.frombuffer(spaces[slot.dtype], dtype=slot.dtype, count=math.prod(slot.shape)).view(slot.shape)
        for name, slot in file.slots.items()
    }
    content: dict[str, Any] = {"model": stand_ins} if file.nested else dict(stand_ins)
    try:
        with torch.serialization.skip_data():
            torch.save(content, path)
    except RuntimeError as error:  # torch's file writer does not raise OSError
        full = shutil.disk_usage(path.parent).free < _NEARLY_FULL
        reason = os.strerror(errno.ENOSPC) if full else str(error).splitlines()[0]
        raise CheckpointError(f"{path}: cannot be written ({reason})") from error
    starts = {}
    for name, stored in read_pickle(path).items():
        if not isinstance(stored, Stored):
            raise CheckpointError(f"{path}: this torch does not tell where tensors lie; write with safetensors=True")
        starts[name] = stored.start + stored.offset * stored.dtype.itemsize
    return starts


def _lay_out_safetensors(path: Path, file: FilePlan) -> dict[str, int]:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    # Wide dtypes come first, so that every tensor is aligned to its element size.
    for name, slot in sorted(file.slots.items(), key=lambda item: -item[1].dtype.itemsize):
        end = offset + math.prod(slot.shape) * slot.dtype.itemsize
        kind = _SAFETENSORS_NAMES[slot.dtype]
        header[name] = {"dtype": kind, "shape": list(slot.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    with open(path, "wb") as handle:
        handle.write(struct.pack("<Q", len(text)) + text)
        handle.truncate(start + offset)
    return {name: start + entry["data_offsets"][0] for name, entry in header.items() if name != "__metadata__"}


def _check_written(
    folder: Path, sums: Mapping[str, _Sum], places: Mapping[str, Sequence[_Place]], progress: bool
) -> None:
    """Open the folder like any reader, cut its tensors as when writing, and raise unless the checksums are the same."""

    def read(name: str, tensor: Lazy) -> _Sum:
        sums = []
        for place in places.get(name, ()):
            crc = 0
            for block in place.cut(tensor).blocks():
                crc = zlib.crc32(as_bytes(block), crc)
            sums.append(crc)
        return tuple(sums), tensor.dtype

    survey = survey_folder(folder, allow_partial=True, thorough=True)
    survey.raise_problems()
    tensors = survey.checkpoint.tensors if survey.checkpoint else {}
    _compare(sums, each_tensor(tensors, read, progress=progress, title="checking"))


def _check_bytes(
    folder: Path,
    plan: FolderPlan,
    tensors: Mapping[str, Lazy],
    sums: Mapping[str, _Sum],
    places: Mapping[str, Sequence[_Place]],
    progress: bool,
) -> None:
    """The same for files that hold other numbers than their readers give, such as rounded ones: compare their bytes."""
    survey_folder(folder).raise_problems()
    files = [File(folder / file.name) for file in plan.files]

    def read(name: str, tensor: Lazy) -> _Sum:
        sums = []
        for place in places[name]:
            stored = Stored(files[place.file], place.offset, (place.cut(tensor).nbytes,), torch.uint8)
            crc = 0
            for block in stored.blocks():
                crc = zlib.crc32(as_bytes(block), crc)
            sums.append(crc)
        return tuple(sums), tensor.dtype

    _compare(sums, each_tensor(tensors, read, progress=progress, title="checking"))


def _compare(sums: Mapping[str, _Sum], again: Mapping[str, _Sum]) -> None:
    if again != sums:
        wrong = [name for name in {**sums, **again} if again.get(name) != sums.get(name)]
        raise CheckpointError(f"what was written reads back differently: {listed(wrong)}; the disk may be failing")


@contextmanager
def _flushing(handles: Sequence[int]) -> Iterator[None]:
    """Flush written data to the disk during the block, so that it neither fills memory nor makes the end wait."""
    end = threading.Event()
    errors: list[OSError] = []

    def flush() -> None:
        while not errors and not end.wait(0.2):
            for handle in handles:
                try:
                    getattr(os, "fdatasync", os.fsync)(handle)  # some systems have no fdatasync
                except OSError as error:  # the system reports it only once, so keep it
                    errors.append(error)

    thread = threading.Thread(target=flush, daemon=True)
    thread.start()
    try:
        yield
    finally:
        end.set()
        thread.join()
    if errors:
        raise errors[0]


def _sync(path: Path) -> None:
    with open(path, "rb") as handle:
        os.fsync(handle.fileno())


def _forget(handle: int) -> None:
    """Drop a synced file from the page cache, so that checking reads what is on the disk."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
