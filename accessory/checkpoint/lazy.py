"""Lazy, sliceable tensors, which a checkpoint gives out instead of data.

A `Lazy` knows its shape and dtype. Its bytes are read only when it is copied, loaded or read block by block. Slicing
and transposing apply to the file, so a rank that needs an eighth of a tensor reads an eighth of it. The operations are
`narrow`, `select`, `t`, `to` and `concat`; `rotary` adds the reordering of rotary pairs.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING

from accessory.checkpoint.copying import BLOCK_BYTES, copy_dense

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# The bytes of an element, by the dtype's name in torch. Headers are read without torch, whose import takes seconds.
ITEMSIZE = {
    **dict.fromkeys(("float64", "int64"), 8),
    **dict.fromkeys(("float32", "int32"), 4),
    **dict.fromkeys(("float16", "bfloat16", "int16"), 2),
    **dict.fromkeys(("float8_e4m3fn", "float8_e5m2", "int8", "uint8", "bool"), 1),
}


class Lazy(ABC):
    """A tensor that is not read yet: it has a shape, a dtype, and methods to cut it before reading."""

    shape: tuple[int, ...]
    dtype_name: str  # in torch
    piecewise = True  # reading it piece by piece costs no more than reading it at once

    @property
    def dtype(self) -> torch.dtype:
        import torch

        return getattr(torch, self.dtype_name)

    @dtype.setter
    def dtype(self, dtype: torch.dtype | str) -> None:
        self.dtype_name = str(dtype).removeprefix("torch.")

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * (ITEMSIZE.get(self.dtype_name) or self.dtype.itemsize)

    def narrow(self, dim: int, start: int, length: int) -> Lazy:
        """`length` entries of dimension `dim` from `start` on; only their bytes are read. IndexError out of range."""
        dim = range(len(self.shape))[dim]
        if min(start, length) < 0 or start + length > self.shape[dim]:
            raise IndexError(f"narrow({dim}, {start}, {length}) is outside of shape {self.shape}")
        return self if length == self.shape[dim] else self._narrow(dim, start, length)

    def select(self, dim: int, index: int) -> Lazy:
        """One entry of dimension `dim`, without that dimension (one expert of a stack, for instance)."""
        dim = range(len(self.shape))[dim]
        return self.narrow(dim, index, 1)._squeeze(dim)

    def t(self) -> Lazy:
        """The transpose of a matrix."""
        if len(self.shape) != 2:
            raise ValueError(f"t() wants a matrix, this has shape {self.shape}")
        return self._t()

    def to(self, dtype: torch.dtype) -> Lazy:
        """The same values in another dtype, converted when they are read."""
        return self if str(dtype) == f"torch.{self.dtype_name}" else Cast(self, dtype)

    def copy_to(self, dst: Tensor) -> None:
        """Write the values into `dst` (same shape; any strides, dtype and device).

        Values from a file are copied in blocks, so that the CPU needs no temporary of the tensor's size.
        """
        if tuple(dst.shape) != self.shape:
            raise ValueError(f"copy_to: the tensor has shape {self.shape}, the destination {tuple(dst.shape)}")
        if dst.numel():
            self._copy_to(dst)

    @abstractmethod
    def load(self) -> Tensor:
        """The values as a CPU tensor. Never write to it, because it may be a view of a file."""

    def blocks(self, block_bytes: int = BLOCK_BYTES) -> Iterator[Tensor]:
        """Yield the values in row-major order, as contiguous 1-D CPU tensors.

        A block is valid until the next one is requested.
        """
        if not self.piecewise:
            yield from Constant(self.load()).blocks(block_bytes)
            return
        import torch

        rows = self.shape[0] if self.shape else 1
        row_bytes = max(1, self.nbytes // max(1, rows))
        step = max(1, block_bytes // row_bytes)
        buffer = torch.empty(min(step, rows) * (row_bytes // self.dtype.itemsize), dtype=self.dtype)
        for start in range(0, rows, step):
            part = self.narrow(0, start, min(step, rows - start)) if self.shape else self
            out = buffer[: math.prod(part.shape)]
            part.copy_to(out.view(part.shape))
            yield out

    def _narrow(self, dim: int, start: int, length: int) -> Lazy:
        return _Narrowed(self, dim, start, length)

    def _squeeze(self, dim: int) -> Lazy:
        return _Squeezed(self, dim)

    def _t(self) -> Lazy:
        return _Transposed(self)

    def _copy_to(self, dst: Tensor) -> None:
        copy_dense(dst, self.load())

    def __repr__(self) -> str:
        return f"{type(self).__name__}(shape={self.shape}, dtype=torch.{self.dtype_name})"


class _Strided(Lazy):
    """A strided window on a flat run of elements. Cutting and transposing only change shape, stride and offset."""

    def __init__(
        self, shape: Sequence[int], dtype: torch.dtype | str, stride: Sequence[int] | None, offset: int
    ) -> None:
        self.shape = tuple(shape)
        self.dtype = dtype
        self.stride = tuple(_row_major(self.shape) if stride is None else stride)
        self.offset = offset  # elements

    @abstractmethod
    def _window(self, shape: Sequence[int], stride: Sequence[int], offset: int) -> _Strided: ...

    def _narrow(self, dim: int, start: int, length: int) -> Lazy:
        shape = (*self.shape[:dim], length, *self.shape[dim + 1 :])
        return self._window(shape, self.stride, self.offset + start * self.stride[dim])

    def _squeeze(self, dim: int) -> Lazy:
        return self._window(
            self.shape[:dim] + self.shape[dim + 1 :], self.stride[:dim] + self.stride[dim + 1 :], self.offset
        )

    def _t(self) -> Lazy:
        return self._window(self.shape[::-1], self.stride[::-1], self.offset)

    def blocks(self, block_bytes: int = BLOCK_BYTES) -> Iterator[Tensor]:
        if not self._contiguous():
            yield from super().blocks(block_bytes)
            return
        step = max(1, block_bytes // self.dtype.itemsize)
        flat = self._window((math.prod(self.shape),), (1,), self.offset)
        for start in range(0, flat.shape[0], step):
            yield flat.narrow(0, start, min(step, flat.shape[0] - start)).load()

    def _contiguous(self) -> bool:
        return all(n == 1 or a == b for n, a, b in zip(self.shape, self.stride, _row_major(self.shape), strict=True))


class Bytes(ABC):
    """The source of a stored tensor's bytes: a file, or several files read as one."""

    @abstractmethod
    def flat(self, dtype: torch.dtype, start: int, count: int, soon: bool = False) -> Tensor:
        """`count` elements from byte `start`, a view of the mapped file if possible. `soon`: all will be read now."""


class Stored(_Strided):
    """A tensor in a file. `start` is the byte where its storage begins. The first read opens the file."""

    def __init__(
        self,
        source: Bytes,
        start: int,
        shape: Sequence[int],
        dtype: torch.dtype | str,
        stride: Sequence[int] | None = None,
        offset: int = 0,
    ) -> None:
        super().__init__(shape, dtype, stride, offset)
        self.source = source
        self.start = start

    def load(self) -> Tensor:
        if 0 in self.shape:
            import torch

            return torch.empty(self.shape, dtype=self.dtype)
        count = 1 + sum((n - 1) * s for n, s in zip(self.shape, self.stride, strict=True))
        first, dense = self.start + self.offset * self.dtype.itemsize, count == math.prod(self.shape)
        flat = self.source.flat(self.dtype, first, count, dense)
        return flat.as_strided(self.shape, self.stride)

    def _window(self, shape: Sequence[int], stride: Sequence[int], offset: int) -> Stored:
        return Stored(self.source, self.start, shape, self.dtype_name, stride, offset)


class Constant(_Strided):
    """A tensor that is already in memory (its strides and offset are kept)."""

    def __init__(self, tensor: Tensor) -> None:
        super().__init__(tensor.shape, tensor.dtype, tensor.stride(), int(tensor.storage_offset()))
        self.tensor = tensor.detach()

    def load(self) -> Tensor:
        return self.tensor.as_strided(self.shape, self.stride, self.offset).cpu()

    def _window(self, shape: Sequence[int], stride: Sequence[int], offset: int) -> Constant:
        return Constant(self.tensor.as_strided(tuple(shape), tuple(stride), offset))


class Computed(Lazy):
    """A tensor that `fn()` computes at each read (dequantised, noise, a sum), always with the same values."""

    piecewise = False

    def __init__(self, shape: Sequence[int], dtype: torch.dtype, fn: Callable[[], Tensor]) -> None:
        self.shape, self.dtype, self.fn = tuple(shape), dtype, fn

    def load(self) -> Tensor:
        tensor = self.fn()
        if tuple(tensor.shape) != self.shape:
            raise ValueError(f"a computed tensor came out as {tuple(tensor.shape)} where {self.shape} was promised")
        return tensor.detach().cpu().to(self.dtype)


class _Wrapper(Lazy):
    """A view of another lazy tensor, where that tensor cannot apply the operation itself."""

    def __init__(self, base: Lazy, shape: Sequence[int]) -> None:
        self.base = base
        self.shape = tuple(shape)
        self.dtype_name = base.dtype_name
        self.piecewise = base.piecewise


class _Narrowed(_Wrapper):
    def __init__(self, base: Lazy, dim: int, start: int, length: int) -> None:
        super().__init__(base, (*base.shape[:dim], length, *base.shape[dim + 1 :]))
        self.cut = (dim, start, length)
        self.piecewise = False

    def load(self) -> Tensor:
        return self.base.load().narrow(*self.cut)


class _Squeezed(_Wrapper):
    def __init__(self, base: Lazy, dim: int) -> None:
        super().__init__(base, base.shape[:dim] + base.shape[dim + 1 :])
        self.dim = dim

    def load(self) -> Tensor:
        return self.base.load().squeeze(self.dim)


class _Transposed(_Wrapper):
    def __init__(self, base: Lazy) -> None:
        super().__init__(base, base.shape[::-1])

    def load(self) -> Tensor:
        return self.base.load().t()

    def _copy_to(self, dst: Tensor) -> None:
        self.base.copy_to(dst.t())

    def _narrow(self, dim: int, start: int, length: int) -> Lazy:
        return _Transposed(self.base.narrow(1 - dim, start, length))

    def _t(self) -> Lazy:
        return self.base


class Cast(_Wrapper):
    """A lazy tensor in another dtype; values are converted while they are copied."""

    def __init__(self, base: Lazy, dtype: torch.dtype) -> None:
        super().__init__(base, base.shape)
        self.dtype = dtype

    def load(self) -> Tensor:
        return self.base.load().to(self.dtype)

    def _copy_to(self, dst: Tensor) -> None:
        # If `dst` has a third dtype, the values must be rounded to this one first.
        if dst.dtype == self.dtype:
            self.base.copy_to(dst)
        else:
            super()._copy_to(dst)

    def _narrow(self, dim: int, start: int, length: int) -> Lazy:
        return Cast(self.base.narrow(dim, start, length), self.dtype)

    def _squeeze(self, dim: int) -> Lazy:
        return Cast(self.base._squeeze(dim), self.dtype)

    def _t(self) -> Lazy:
        return Cast(self.base.t(), self.dtype)

    def blocks(self, block_bytes: int = BLOCK_BYTES) -> Iterator[Tensor]:
        for block in self.base.blocks(block_bytes):
            yield block.to(self.dtype)


class Concat(Lazy):
    """Tensors concatenated along one dimension; `concat` makes it."""

    def __init__(self, parts: Sequence[Lazy], dim: int) -> None:
        first = parts[0]
        self.parts = tuple(parts)
        self.piecewise = all(p.piecewise for p in parts)
        self.dim = dim
        self.dtype_name = first.dtype_name
        for part in parts:
            same = len(part.shape) == len(first.shape) and all(
                a == b for i, (a, b) in enumerate(zip(part.shape, first.shape, strict=True)) if i != dim
            )
            if not same or part.dtype_name != first.dtype_name:
                raise ValueError(f"concat({dim=}): {part} does not fit beside {first}")
        ends = list(accumulate(p.shape[dim] for p in parts))
        self._starts = [0, *ends[:-1]]
        self.shape = (*first.shape[:dim], ends[-1], *first.shape[dim + 1 :])

    def load(self) -> Tensor:
        import torch

        out = torch.empty(self.shape, dtype=self.dtype)
        self.copy_to(out)
        return out

    def _copy_to(self, dst: Tensor) -> None:
        for start, part in zip(self._starts, self.parts, strict=True):
            part.copy_to(dst.narrow(self.dim, start, part.shape[self.dim]))

    def _narrow(self, dim: int, start: int, length: int) -> Lazy:
        if dim != self.dim:
            return Concat([p.narrow(dim, start, length) for p in self.parts], self.dim)
        kept: list[Lazy] = []
        for first, part in zip(self._starts, self.parts, strict=True):
            lo, hi = max(start, first), min(start + length, first + part.shape[dim])
            if lo < hi or (length == 0 and not kept):
                kept.append(part.narrow(dim, max(0, min(lo - first, part.shape[dim])), max(0, hi - lo)))
        return concat(kept, dim)

    def _squeeze(self, dim: int) -> Lazy:
        if dim == self.dim:
            return _Squeezed(self, dim)
        return Concat([p._squeeze(dim) for p in self.parts], self.dim - (dim < self.dim))

    def _t(self) -> Lazy:
        return Concat([p.t() for p in self.parts], 1 - self.dim)

    def blocks(self, block_bytes: int = BLOCK_BYTES) -> Iterator[Tensor]:
        if self.dim != 0:
            yield from super().blocks(block_bytes)
            return
        for part in self.parts:
            yield from part.blocks(block_bytes)


def concat(parts: Sequence[Lazy], dim: int) -> Lazy:
    """Concatenate the parts along `dim` (0 or more); a single part is returned as it is."""
    return parts[0] if len(parts) == 1 else Concat(parts, dim)


def _row_major(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(math.prod(max(1, n) for n in shape[i + 1 :]) for i in range(len(shape)))
