"""A mixture-of-experts layer: the router, which both implementations share, and one implementation of the experts.

Legend: T tokens, D dim, E experts, K experts a token.
"""

from __future__ import annotations

from torch import Tensor, nn

from accessory.config import Implementation, ModelArgs
from accessory.nn.experts import StackedExperts
from accessory.nn.experts_base import BaseExperts
from accessory.nn.experts_sparse import SparseExperts
from accessory.nn.linear import Linear
from accessory.ops.linear import AdapterRows
from accessory.ops.routing import RouterStatistics, route, router_statistics


class MoE(nn.Module):
    def __init__(self, args: ModelArgs, implementation: Implementation) -> None:
        super().__init__()
        self.k = args.moe.num_experts_per_tok
        self.gate = Linear(args.dim, args.moe.num_experts)
        kind: type[StackedExperts] = BaseExperts if implementation == "base" else SparseExperts
        self.experts = kind(args.dim, args.hidden_dim, args.moe.num_experts)

    def forward(
        self,
        x_TD: Tensor,
        counted_T: Tensor | None = None,
        statistics: bool = False,
        adapters: AdapterRows | None = None,
    ) -> tuple[Tensor, RouterStatistics | None]:
        """adapters: the adapter of each token, where there are several; None: no token takes one."""
        # x_TD is fp32 in every compute dtype, because rounding must not decide between experts with close logits.
        logits_TE = self.gate(x_TD.float(), adapters)
        weight_TK, expert_TK, probability_TE = route(logits_TE, self.k)
        stats = router_statistics(logits_TE, probability_TE, expert_TK, counted_T) if statistics else None
        return self.experts(x_TD, weight_TK, expert_TK, adapters), stats
