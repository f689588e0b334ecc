"""The sparse implementation: a slice of every expert on every rank, all experts as one block-sparse product.

Legend: T tokens, D dim, F hidden dim held here, K experts a token, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from accessory.nn.joined import Joined
from accessory.ops.grouped import expert_swiglu, few_pairs, swiglu_pairs


class SparseExperts(nn.Module):
    """All experts of a layer, of each the same slice of F; `forward` returns that slice's part of the sum, fp32."""

    def __init__(self, dim: int, hidden_dim: int, experts: int) -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.empty(experts, hidden_dim, dim))
        self.w2 = nn.Parameter(torch.empty(experts, dim, hidden_dim))
        self.w3 = nn.Parameter(torch.empty(experts, hidden_dim, dim))
        self.joined = Joined(dim=1)

    def join(self) -> None:
        self.joined.refresh([self.w1, self.w3])

    def forward(self, x_TD: Tensor, weight_TK: Tensor, expert_TK: Tensor) -> Tensor:
        if self.joined.tensor is not None and few_pairs(expert_TK):
            return swiglu_pairs(x_TD, self.joined.tensor, self.w2, weight_TK, expert_TK)
        return expert_swiglu(x_TD, self.w1, self.w2, self.w3, weight_TK, expert_TK)
