"""The sparse implementation: a slice of every expert on every rank, all experts as one block-sparse product.

Legend: T tokens, D dim, K experts a token.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from accessory.nn.experts import StackedExperts
from accessory.ops.experts import grouped_experts
from accessory.ops.linear import Weight


class SparseExperts(StackedExperts):
    """All experts of a layer, of each the same slice of F; the sum over ranks is the layer."""

    def grouped_weights(self) -> Sequence[Weight]:
        return [self.weights(kind) for kind in ("w1", "w2", "w3")]

    def grouped(self, x_TD: Tensor, weight_TK: Tensor, expert_TK: Tensor) -> Tensor:
        w1, w2, w3 = self.grouped_weights()
        return grouped_experts(x_TD, w1, w2, w3, weight_TK, expert_TK)
