"""A weight and, where there is one, a bias; the product itself is chosen in `ops.linear`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from accessory.ops.linear import linear
from accessory.ops.norm import rms_norm


class Linear(nn.Module):
    """y = x Wᵀ (+ b). Unlike torch's, it draws no random numbers when made: checkpoints or `init_weights` fill it."""

    def __init__(self, in_features: int, out_features: int, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class RMSNorm(nn.Module):
    """x / rms(x) · w (arXiv 1910.07467), fp32 in and out."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(dim))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight.float(), self.eps)
