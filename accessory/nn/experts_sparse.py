"""The sparse implementation: every rank has a slice of every expert and computes all experts as grouped products.

Legend: T tokens, D dim, K experts a token.
"""

from __future__ import annotations

from torch import Tensor

from accessory.nn.experts import StackedExperts
from accessory.ops.experts import grouped_experts
from accessory.ops.linear import AdapterRows


class SparseExperts(StackedExperts):
    """The same slice of F of all experts of a layer. The sum over ranks is the layer's output."""

    @property
    def held(self) -> int | None:
        return None

    def grouped(self, x_TD: Tensor, weight_TK: Tensor, expert_TK: Tensor, adapters: AdapterRows | None) -> Tensor:
        return grouped_experts(x_TD, *self.all_weights(adapters is not None), weight_TK, expert_TK, adapters=adapters)
