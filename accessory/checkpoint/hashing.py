"""One hash of a whole model, the same in every layout, and the threaded loop over tensors that other code shares."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from accessory.checkpoint.lazy import Lazy
from accessory.progress import progress_bar

T = TypeVar("T")

# Bit patterns of infinity. Positive floats are ordered like their bit patterns read as integers.
_INFINITY = {torch.float16: 0x7C00, torch.bfloat16: 0x7F80, torch.float32: 0x7F800000, torch.float64: 0x7FF << 52}


@dataclass(frozen=True)
class Digest:
    """A tensor's canonical content: shape, dtype, sha256 of its row-major bytes, and whether all values are finite."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    sha256: str
    finite: bool


def as_bytes(block: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, without a copy."""
    return block.reshape(-1).view(torch.uint8).numpy().data


def is_finite(block: Tensor) -> bool:
    """Whether a contiguous CPU tensor has no NaN and no infinity.

    It takes two integer maxima over the bit patterns, which is far quicker than arithmetic on 16-bit floats.
    """
    infinity = _INFINITY.get(block.dtype)
    if infinity is None or block.numel() == 0:
        return True
    size = block.dtype.itemsize
    bits = block.reshape(-1).view(torch.uint8).numpy()
    sign = 1 << (8 * size - 1)
    return bool(bits.view(f"i{size}").max() < infinity and np.max(bits.view(f"u{size}")) < infinity | sign)


def digest(tensor: Lazy) -> Digest:
    """Read a tensor once, block by block, and compute its digest."""
    sha, finite = hashlib.sha256(), True
    for block in tensor.blocks():
        sha.update(as_bytes(block))
        finite = finite and is_finite(block)
    return Digest(tensor.shape, tensor.dtype, sha.hexdigest(), finite)


def digest_all(tensors: Mapping[str, Lazy], *, progress: bool = True, title: str = "checking") -> dict[str, Digest]:
    """The digest of every tensor; each tensor is read once."""
    return each_tensor(tensors, lambda _, tensor: digest(tensor), progress=progress, title=title)


def model_hash(digests: Mapping[str, Digest]) -> str:
    """sha256 over sorted lines of name, shape, dtype and sha256 of the bytes: the same for every layout of a model."""
    whole = hashlib.sha256()
    for name in sorted(digests):
        d = digests[name]
        shape = ",".join(map(str, d.shape))
        whole.update(f"{name} {shape} {str(d.dtype).removeprefix('torch.')} {d.sha256}\n".encode())
    return whole.hexdigest()


def each_tensor(
    tensors: Mapping[str, Lazy], work: Callable[[str, Lazy], T], *, progress: bool = True, title: str = ""
) -> dict[str, T]:
    """Call `work(name, tensor)` for every tensor in a few threads; return the results by name.

    A progress bar counts bytes. The first exception stops the loop and is raised. Two to four threads pay off, because
    hashing, copying and file access release the interpreter lock.
    """
    total = sum(t.nbytes for t in tensors.values())
    out: dict[str, T] = {}
    own_threads = torch.get_num_threads()
    workers = min(4, max(2, os.cpu_count() or 2))
    shown = progress_bar(total, title, progress)
    pool = ThreadPoolExecutor(workers, thread_name_prefix="checkpoint")
    try:
        torch.set_num_threads(1)  # each worker is one thread; torch's own pools would only fight for the cores
        futures = {pool.submit(work, name, tensor): name for name, tensor in tensors.items()}
        for future in as_completed(futures):
            name = futures[future]
            out[name] = future.result()
            shown.update(tensors[name].nbytes)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        torch.set_num_threads(own_threads)
        shown.close()
    return {name: out[name] for name in tensors}
