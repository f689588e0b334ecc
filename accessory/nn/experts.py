"""What both implementations share: three stacked weights, and decoding a few tokens with the weights read in place.

Legend: T tokens, D dim, F hidden dim held here, K experts a token, E experts held here.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from accessory.nn.joined import Joined
from accessory.ops.grouped import pairs_in_place, swiglu_pairs


class StackedExperts(nn.Module):
    """w1 and w3 (E, F, D), w2 (E, D, F), each a stack of linear weights (out, in). `first`: number of the first expert.

    `forward(x_TD, weight_TK, expert_TK)` returns this rank's part of Σ_k weight · expert(x), (T, D) fp32.
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
        if pairs_in_place(x_TD, expert_TK, self.joined.tensor):
            w13 = self.joined.tensor
            return swiglu_pairs(x_TD, self.w1, self.w2, self.w3, weight_TK, expert_TK, first=self.first, w13_EGD=w13)
        return self.many(x_TD, weight_TK, expert_TK)

    def host_free(self, x_TD: Tensor, expert_TK: Tensor) -> bool:
        """Whether a GPU runs this without its host learning what was routed where, as a CUDA graph needs it."""
        return x_TD.is_cuda and pairs_in_place(x_TD, expert_TK, None)

    def many(self, x_TD: Tensor, weight_TK: Tensor, expert_TK: Tensor) -> Tensor:
        """The implementation's own way, for prompts, batches and training."""
        raise NotImplementedError
