"""Copy dense tensors at memory speed in bounded memory.

Transposing copies go tile by tile. Copies to a GPU go block by block through pinned memory.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

BLOCK_BYTES = 8 * 2**20  # size of the blocks of a reader, and the most anonymous memory that a copy takes
_TILE = 512  # rows and columns of a tile of a transposing copy: 0.5 MB of 16-bit numbers fit the cache


def copy_dense(dst: Tensor, src: Tensor) -> None:
    """Do `dst.copy_(src)` for a CPU source of any strides, in bounded memory and at memory speed."""
    if _columns_first(src) and dst.dim() == 2:
        dst, src = dst.t(), src.t()
    if dst.device.type != "cpu":
        _copy_to_device(dst, src)
    elif _columns_first(dst) and min(dst.shape) > 1:
        _copy_transposed(dst, src)
    else:
        dst.copy_(src)


def _columns_first(tensor: Tensor) -> bool:
    return tensor.dim() == 2 and tensor.stride(0) == 1 and tensor.stride(1) != 1


def _copy_transposed(dst: Tensor, src: Tensor) -> None:
    """Copy tile by tile, because an element-wise transposing copy of a narrowed matrix is five times slower."""
    import torch

    for row in range(0, src.shape[0], _TILE):
        for column in range(0, src.shape[1], _TILE):
            tile = src[row : row + _TILE, column : column + _TILE].contiguous()
            turned = torch.empty(tile.shape[::-1], dtype=tile.dtype).copy_(tile.t())
            dst[row : row + _TILE, column : column + _TILE].t().copy_(turned)


class _Staging(threading.local):
    """Two pinned buffers per thread: one is filled from the file while the other is copied to the GPU."""

    def __init__(self) -> None:
        self.turn = 0
        self.buffers: list[Tensor] = []
        self.events: list[torch.cuda.Event | None] = [None, None]


_staging = _Staging()


def _copy_to_device(dst: Tensor, src: Tensor) -> None:
    row_bytes = max(1, src[0].numel() * src.element_size()) if src.dim() else src.element_size()
    rows = src.shape[0] if src.dim() else 1
    step = max(1, BLOCK_BYTES // row_bytes)
    for start in range(0, rows, step):
        part = src[start : start + step] if src.dim() else src
        out = dst[start : start + step] if src.dim() else dst
        if dst.device.type == "cuda" and part.nbytes <= BLOCK_BYTES:
            _through_pinned(out, part)
        else:
            out.copy_(part)


def _through_pinned(dst: Tensor, src: Tensor) -> None:
    import torch

    if not _staging.buffers:
        _staging.buffers = [torch.empty(BLOCK_BYTES, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
    turn = _staging.turn = 1 - _staging.turn
    event = _staging.events[turn]
    if event is not None:
        event.synchronize()
    pinned = _staging.buffers[turn][: src.nbytes].view(src.dtype).view(src.shape)
    pinned.copy_(src)
    dst.copy_(pinned, non_blocking=True)
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(dst.device))
    _staging.events[turn] = event
