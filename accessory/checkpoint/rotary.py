"""The order of rotary pairs in the rows of queries and keys: interleaved in this package, half-split in Hugging Face's.

`rotary_from_hf` and `rotary_to_hf` take any tensor and its canonical name. They return tensors without such rows
unchanged. Every reader and writer of a Hugging Face layout uses them.

In a head of d rows, member j (0 or 1) of pair i is row 2i + j where pairs are interleaved, and row j·d/2 + i where they
are half-split.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from accessory.checkpoint.copying import copy_dense
from accessory.checkpoint.lazy import Concat, Lazy
from accessory.checkpoint.names import companion_of
from accessory.config import ModelArgs
from accessory.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor


def rotary_from_hf(name: str, tensor: Lazy, args: ModelArgs) -> Lazy:
    """Interleave the rotary rows of a tensor from a Hugging Face folder. `name` is its canonical name.

    Raises CheckpointError if the number of query or key rows does not match the heads in `args`.
    """
    heads = _heads(name, tensor, args)
    return tensor if heads is None else to_interleaved(tensor, heads)


def rotary_to_hf(name: str, tensor: Lazy, args: ModelArgs) -> Lazy:
    """The inverse of `rotary_from_hf`."""
    heads = _heads(name, tensor, args)
    return tensor if heads is None else to_half_split(tensor, heads)


def _heads(name: str, tensor: Lazy, args: ModelArgs) -> int | None:
    """The number of heads in the tensor's rows; None if they are not rows of queries or keys."""
    weight, kind = companion_of(name) or (name, "weight")
    if kind == "lora_a.weight":  # its rows are LoRA's rank
        return None
    if weight.endswith(".attention.wq.weight"):
        heads = args.n_heads
    elif weight.endswith(".attention.wk.weight"):
        heads = args.n_kv_heads
    else:
        return None
    if tensor.shape[:1] != (heads * args.head_dim,):
        raise CheckpointError(f"{name}: {tensor.shape} does not hold {heads} heads")
    return heads


def to_interleaved(lazy: Lazy, n_heads: int) -> Lazy:
    """Reorder rows (n_heads·d, …) from half-split to interleaved. ValueError if d is not an even number."""
    return _reordered(lazy, n_heads, to_interleaved=True)


def to_half_split(lazy: Lazy, n_heads: int) -> Lazy:
    """The inverse of `to_interleaved`."""
    return _reordered(lazy, n_heads, to_interleaved=False)


def _reordered(lazy: Lazy, n_heads: int, to_interleaved: bool) -> Lazy:
    if lazy.shape[0] % (2 * n_heads):
        raise ValueError(f"{lazy.shape[0]} rows are not {n_heads} heads of an even size")
    head_dim = lazy.shape[0] // n_heads
    if isinstance(lazy, _Reordered) and lazy.head_dim == head_dim and lazy.to_interleaved != to_interleaved:
        return lazy.base
    if isinstance(lazy, Concat) and (lazy.dim != 0 or all(p.shape[0] % head_dim == 0 for p in lazy.parts)):
        heads = [n_heads if lazy.dim else p.shape[0] // head_dim for p in lazy.parts]
        return Concat([_reordered(p, n, to_interleaved) for p, n in zip(lazy.parts, heads, strict=True)], lazy.dim)
    return _Reordered(lazy, head_dim, to_interleaved)


class _Reordered(Lazy):
    """The rows of `base` in the other order of rotary pairs, head by head."""

    def __init__(self, base: Lazy, head_dim: int, to_interleaved: bool) -> None:
        self.base = base
        self.shape, self.dtype_name, self.piecewise = base.shape, base.dtype_name, base.piecewise
        self.head_dim = head_dim
        self.to_interleaved = to_interleaved

    def load(self) -> Tensor:
        import torch

        out = torch.empty(self.shape, dtype=self.dtype)
        self.copy_to(out)
        return out

    def _copy_to(self, dst: Tensor) -> None:
        half = self.head_dim // 2
        members, pairs = (2, half) if self.to_interleaved else (half, 2)
        src = self.base.load().unflatten(0, (-1, members, pairs)).transpose(1, 2)
        copy_dense(dst.unflatten(0, (-1, pairs, members)), src)

    def _narrow(self, dim: int, start: int, length: int) -> Lazy:
        if dim != 0:
            return _Reordered(self.base.narrow(dim, start, length), self.head_dim, self.to_interleaved)
        first, last = start // self.head_dim * self.head_dim, -(-(start + length) // self.head_dim) * self.head_dim
        heads = _Reordered(self.base.narrow(0, first, last - first), self.head_dim, self.to_interleaved)
        # If the rows begin or end inside a head, whole heads are read and the rows are cut out of them.
        return heads if last - first == length else Lazy._narrow(heads, 0, start - first, length)
