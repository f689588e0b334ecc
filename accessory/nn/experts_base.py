"""The base implementation: whole experts, distributed over ranks. Written to be read.

Legend: T tokens, n of them visit an expert, D dim, K experts a token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from accessory.nn.experts import StackedExperts
from accessory.ops.grouped import swiglu


class BaseExperts(StackedExperts):
    """Experts `first … first + E - 1` of a layer, each whole; a token's other experts are other ranks' business."""

    def many(self, x_TD: Tensor, weight_TK: Tensor, expert_TK: Tensor) -> Tensor:
        y_TD = torch.zeros_like(x_TD, dtype=torch.float32)
        w1, w2, w3 = (self.weights(kind).unbind() for kind in ("w1", "w2", "w3"))
        for e in self._experts_to_run(expert_TK):
            token_n, k_n = torch.nonzero(expert_TK == self.first + e, as_tuple=True)
            y_nD = swiglu(x_TD[token_n], w1[e], w2[e], w3[e])
            y_TD = y_TD.index_add(0, token_n, y_nD.float() * weight_TK[token_n, k_n, None])
        return y_TD

    def _experts_to_run(self, expert_TK: Tensor) -> list[int]:
        """Those asked for; all while gradients are kept, so that an idle expert's gradient is zero and not None."""
        held = range(len(self.w1))
        if torch.is_grad_enabled():
            return list(held)
        return [e - self.first for e in expert_TK.unique().tolist() if e - self.first in held]
