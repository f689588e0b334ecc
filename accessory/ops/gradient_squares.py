"""The squares of a large gradient, summed by the kernel that writes it, so that nobody reads it again for its norm.

A gradient may change afterwards. So the sums are given out only while the parameter's gradient is the tensor that the
kernel wrote, unchanged: in the same memory, at the same version, which torch counts up with each write.

Legend: E experts, O out, I in features.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

FEWEST = 2**20  # numbers of a gradient whose squares are worth it
SIDE = 64  # no tile of such a gradient is smaller in either direction


class GradientSquares:
    """Those of one parameter's gradient. Its memory stays where it is, so a CUDA graph may write there."""

    def __init__(self) -> None:
        self.sums: Tensor | None = None  # one a tile, fp32; what no tile writes is zero
        self._of: tuple[StorageWeakRef, int] | None = None
        self._enabled = True

    def buffer(self, shape: tuple[int, int, int], device: torch.device) -> Tensor:
        """Where a kernel leaves the sums of a gradient (E, O, I), each in the place of its tile."""
        E, O, I = shape  # noqa: E741
        if self.sums is None:
            self.sums = torch.zeros(E * -(-O // SIDE) * -(-I // SIDE), device=device)
        return self.sums

    def record(self, gradient: Tensor) -> None:
        """The sums are those of `gradient` as it is now."""
        self._of = StorageWeakRef(gradient.untyped_storage()), gradient._version

    def disable(self) -> None:
        """A kernel wrote the gradient that sums nothing. It may be part of a CUDA graph and do so again, unseen."""
        self._enabled = False

    def sum_for(self, gradient: Tensor) -> Tensor | None:
        """The sum of the gradient's squares, () fp32; None where nobody knows it."""
        if self.sums is None or self._of is None or not self._enabled:
            return None
        storage, version = self._of
        # A weak reference keeps the storage's number from being given to another one.
        if StorageWeakRef(gradient.untyped_storage()).cdata != storage.cdata or gradient._version != version:
            return None
        return self.sums.sum()


def squares_for(parameter: Tensor) -> GradientSquares | None:
    """Those of a parameter to be written; None for a small one, and where the gradient goes on to other ranks."""
    if parameter.numel() < FEWEST or not parameter.is_leaf or getattr(parameter, "_post_accumulate_grad_hooks", None):
        return None
    squares: GradientSquares | None = getattr(parameter, "gradient_squares", None)
    if squares is None:
        squares = GradientSquares()
        parameter.gradient_squares = squares  # type: ignore[attr-defined]
    return squares


def squares_of_gradient(parameter: Tensor) -> Tensor | None:
    """The sum of squares of the parameter's gradient, () fp32, where the kernel that wrote it knows it."""
    squares: GradientSquares | None = getattr(parameter, "gradient_squares", None)
    return None if squares is None or parameter.grad is None else squares.sum_for(parameter.grad)
