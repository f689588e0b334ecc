"""Fused weights: parameters next to each other in memory, so that decoding on a CPU needs one product for all of them.

Each product on a CPU starts a pool of threads. For one token that takes as long as a small product itself.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class FusedWeights:
    """Turns parameters into views of one tensor, which concatenates them along `dim`. Their names do not change.

    `tensor` is that tensor. It is None until `refresh` finds parameters that can be fused: plain tensors on a CPU, of
    one dtype, without gradients.
    """

    def __init__(self, dim: int) -> None:
        self.dim = dim
        self.tensor: Tensor | None = None

    def refresh(self, parameters: Sequence[nn.Parameter]) -> None:
        """Fuse the parameters. Does it again where one was moved, cast or replaced. Values do not change."""
        first = parameters[0]
        if any(p.requires_grad or p.device.type != "cpu" or type(p.data) is not Tensor for p in parameters):
            self.tensor = None
            return
        if self.tensor is not None and all(
            p.data_ptr() == part.data_ptr() and p.dtype == part.dtype
            for p, part in zip(parameters, self._parts(self.tensor, parameters), strict=True)
        ):
            return
        if any(p.dtype != first.dtype for p in parameters):
            self.tensor = None
            return
        self.tensor = torch.cat([p.data for p in parameters], self.dim)
        for p, part in zip(parameters, self._parts(self.tensor, parameters), strict=True):
            p.data = part

    def _parts(self, tensor: Tensor, parameters: Sequence[nn.Parameter]) -> tuple[Tensor, ...]:
        return tensor.split([p.shape[self.dim] for p in parameters], self.dim)
