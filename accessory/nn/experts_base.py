"""The base implementation: whole experts, distributed over ranks. Written to be read.

Legend: T tokens, D dim, F hidden dim, K experts a token, E experts held here.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from accessory.nn.joined import Joined
from accessory.ops.grouped import few_pairs, swiglu, swiglu_pairs


class BaseExperts(nn.Module):
    """Experts `first … first + E - 1` of a layer, each whole; a token's other experts are other ranks' business.

    `forward` returns the part of the sum that these experts give, fp32.
    """

    def __init__(self, dim: int, hidden_dim: int, experts: int, first: int = 0) -> None:
        super().__init__()
        self.first = first
        self.w1 = nn.Parameter(torch.empty(experts, hidden_dim, dim))
        self.w2 = nn.Parameter(torch.empty(experts, dim, hidden_dim))
        self.w3 = nn.Parameter(torch.empty(experts, hidden_dim, dim))
        self.joined = Joined(dim=1)

    def join(self) -> None:
        self.joined.refresh([self.w1, self.w3])

    def forward(self, x_TD: Tensor, weight_TK: Tensor, expert_TK: Tensor) -> Tensor:
        if self.joined.tensor is not None and few_pairs(expert_TK):
            return swiglu_pairs(x_TD, self.joined.tensor, self.w2, weight_TK, expert_TK, self.first)
        y_TD = torch.zeros_like(x_TD, dtype=torch.float32)
        for e in self._experts_to_run(expert_TK):
            token_n, k_n = torch.nonzero(expert_TK == self.first + e, as_tuple=True)
            y_nD = swiglu(x_TD[token_n], self.w1[e], self.w2[e], self.w3[e])
            y_TD = y_TD.index_add(0, token_n, y_nD.float() * weight_TK[token_n, k_n, None])
        return y_TD

    def _experts_to_run(self, expert_TK: Tensor) -> list[int]:
        """Those asked for; all while gradients are kept, so that an idle expert's gradient is zero and not None."""
        held = range(len(self.w1))
        if torch.is_grad_enabled():
            return list(held)
        return [e - self.first for e in expert_TK.unique().tolist() if e - self.first in held]
