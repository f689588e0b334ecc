"""Root-mean-square normalisation (Zhang and Sennrich, arXiv 1910.07467)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from accessory.ops import dispatch


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """x / √(mean x² + eps) · w over the last dimension; fp32 in and out."""
    if x.device.type == "cpu" and x.numel() == len(weight_D) and not torch.is_grad_enabled():
        # Decoding on a CPU: one row's scale is a plain number, which takes a third of the operations.
        row_D = x.view(-1)
        return x.mul(1 / math.sqrt(torch.dot(row_D, row_D).item() / len(row_D) + eps)).mul_(weight_D)
    return F.rms_norm(x, weight_D.shape, weight_D, eps)


def add_rms_norm(
    x: Tensor, y: Tensor | None, weight_D: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """(x + y, its `rms_norm` in `dtype`): the fp32 residual stream and a layer's output. None: nothing is added.

    May return x itself as the sum.
    """
    kernel = dispatch.find(dispatch.over_tokens("add_norm", x))
    if kernel is not None:
        return kernel.load()(x, y, weight_D, eps, dtype)  # type: ignore[return-value]
    total = x if y is None else x + y
    return total, rms_norm(total, weight_D, eps).to(dtype)
