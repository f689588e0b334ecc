"""Root-mean-square normalisation (Zhang and Sennrich, arXiv 1910.07467)."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from accessory.ops import dispatch


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """x / √(mean x² + eps) · w over the last dimension; fp32 in and out."""
    single = x.device.type == "cpu" and x.numel() == len(weight_D)
    if single and not torch.is_grad_enabled() and not dispatch.fixed():
        # Decoding on a CPU: one row's scale is a plain number, which takes a third of the operations.
        row_D = x.view(-1)
        return x.mul(1 / math.sqrt(torch.dot(row_D, row_D).item() / len(row_D) + eps)).mul_(weight_D)
    return F.rms_norm(x, weight_D.shape, weight_D, eps)


class Exchange(NamedTuple):
    """Memory through which the ranks of one host sum a layer's output where it is added to the residual stream.

    inbox_W: the addresses of all ranks' inboxes, int64. turn_T: how often each row was exchanged, int32. An inbox is
    int64 (2, W, rows, D): two turns of every rank's rows. A number comes with its turn in the upper half of the word,
    so that a rank sees when it has arrived.
    """

    inbox_W: Tensor
    turn_T: Tensor
    rank: int
    size: int
    rows: int
    dim: int
    words: Tensor  # this rank's inbox

    def takes(self, part: Tensor) -> bool:
        """Whether this sums `part`, the same on every rank. All else is summed before it comes to the norm: also where
        one way of summing must serve any number of rows."""
        fits = part.is_cuda and part.numel() <= self.rows * self.dim
        return fits and not torch.is_grad_enabled() and not dispatch.fixed()


def add_rms_norm(
    x: Tensor, y: Tensor | None, weight_D: Tensor, eps: float, dtype: torch.dtype, exchange: Exchange | None = None
) -> tuple[Tensor, Tensor]:
    """(x + y, its `rms_norm` in `dtype`): the fp32 residual stream and a layer's output. None: nothing is added.

    May return x itself as the sum. exchange: y is this rank's part of a sum, which `exchange` takes.
    """
    kernel = dispatch.find(dispatch.over_tokens("add_norm", x))
    if kernel is not None:
        return kernel.load()(x, y, weight_D, eps, dtype, exchange)  # type: ignore[return-value]
    assert exchange is None, "without the kernel nothing is exchanged"
    total = x if y is None else x + y
    return total, rms_norm(total, weight_D, eps).to(dtype)
