"""The sparse implementation: every rank has a slice of every expert and computes all experts as grouped products.

Legend: T tokens, D dim, K experts a token.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from accessory.nn.experts import StackedExperts
from accessory.ops.experts import grouped_experts
from accessory.ops.linear import Weight


class SparseExperts(StackedExperts):
    """The same slice of F of all experts of a layer. The sum over ranks is the layer's output."""

    def grouped_weights(self) -> Sequence[Weight]:
        return [self.weights(kind) for kind in ("w1", "w2", "w3")]

    def grouped(self, x_TD: Tensor, weight_TK: Tensor, expert_TK: Tensor) -> Tensor:
        w1, w2, w3 = self.grouped_weights()
        return grouped_experts(x_TD, w1, w2, w3, weight_TK, expert_TK)
