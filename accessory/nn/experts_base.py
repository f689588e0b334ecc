"""The base implementation: whole experts, distributed over ranks. The code favours readability over speed.

Legend: T tokens, K experts a token, n (token, k) pairs visit an expert, D dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from accessory.nn.experts import StackedExperts
from accessory.ops.dense_products import by_expert, sort_by_expert
from accessory.ops.experts import grouped_experts, swiglu
from accessory.ops.linear import AdapterRows


class BaseExperts(StackedExperts):
    """The whole experts `first … first + E - 1` of a layer. Other ranks compute a token's other experts."""

    def __init__(self, dim: int, hidden_dim: int, experts: int, first: int = 0) -> None:
        super().__init__(dim, hidden_dim, experts, first)
        self.experts = experts  # those of all ranks

    @property
    def held(self) -> int | None:
        return None if len(self.w1) == self.experts else self.first

    def grouped(self, x_TD: Tensor, weight_TK: Tensor, expert_TK: Tensor, adapters: AdapterRows | None) -> Tensor:
        if adapters is not None or x_TD.is_cuda:  # the loop below would wait for the GPU
            weights = self.all_weights(adapters is not None)
            return grouped_experts(x_TD, *weights, weight_TK, expert_TK, self.first, adapters)
        y_TD = torch.zeros_like(x_TD, dtype=torch.float32)
        w1, w2, w3 = (w.unbind() for w in self.all_weights(adapted=False))
        for e, pair_n in enumerate(self._visits(expert_TK)):
            if len(pair_n):
                token_n = pair_n // expert_TK.shape[1]
                y_nD = swiglu(x_TD[token_n], w1[e], w2[e], w3[e])
                y_TD.index_add_(0, token_n, y_nD.float() * weight_TK.flatten()[pair_n, None])
        return y_TD

    def _visits(self, expert_TK: Tensor) -> list[Tensor]:
        """For each of this rank's experts, the numbers t · K + k of the pairs that visit it, in ascending order."""
        order_N, count_E = sort_by_expert(expert_TK, len(self.w1), self.first)
        *visits, _ = by_expert(order_N, count_E)
        return visits
