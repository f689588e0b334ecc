"""The sparse implementation: a slice of every expert on every rank, all experts as one block-sparse product.

Legend: T tokens, D dim, K experts a token.
"""

from __future__ import annotations

from torch import Tensor

from accessory.nn.experts import StackedExperts
from accessory.ops.grouped import grouped_experts, has_grouped_mm


class SparseExperts(StackedExperts):
    """All experts of a layer, of each the same slice of F; the sum over ranks is the layer."""

    def host_free(self, x_TD: Tensor, expert_TK: Tensor) -> bool:
        return super().host_free(x_TD, expert_TK) or (x_TD.is_cuda and has_grouped_mm(x_TD, self.w1.shape, x_TD.dtype))

    def grouped(self, x_TD: Tensor, weight_TK: Tensor, expert_TK: Tensor) -> Tensor:
        w1, w2, w3 = (self.weights(kind) for kind in ("w1", "w2", "w3"))
        return grouped_experts(x_TD, w1, w2, w3, weight_TK, expert_TK)
