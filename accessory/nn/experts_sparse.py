"""The sparse implementation: a slice of every expert on every rank, all experts as one block-sparse product.

Legend: T tokens, D dim, F hidden dim held here, K experts a token, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from accessory.ops.grouped import expert_swiglu


class SparseExperts(nn.Module):
    """All experts of a layer, of each the same slice of F; `forward` returns that slice's part of the sum, fp32."""

    def __init__(self, dim: int, hidden_dim: int, experts: int) -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.empty(experts, hidden_dim, dim))
        self.w2 = nn.Parameter(torch.empty(experts, dim, hidden_dim))
        self.w3 = nn.Parameter(torch.empty(experts, hidden_dim, dim))

    def forward(self, x_TD: Tensor, weight_TK: Tensor, expert_TK: Tensor) -> Tensor:
        return expert_swiglu(x_TD, self.w1, self.w2, self.w3, weight_TK, expert_TK)
