"""Parameters that lie side by side in memory, so that decoding on a CPU reads them in one product instead of several.

Every product there starts a pool of threads anew; at one token that costs as much as a small product itself.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class FusedWeights:
    """Keeps parameters as views of one tensor, joined along `dim`; they stay parameters of their own, with their names.

    `tensor` is None until `refresh` has found them joinable: plain, on a CPU, of one dtype, without gradients.
    """

    def __init__(self, dim: int) -> None:
        self.dim = dim
        self.tensor: Tensor | None = None

    def refresh(self, parameters: Sequence[nn.Parameter]) -> None:
        """Join the parameters, again if any was moved, cast or replaced since; their values are kept."""
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
