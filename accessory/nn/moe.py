"""A mixture-of-experts layer: the router, which both implementations share, and one implementation of the experts.

Legend: T tokens, D dim, E experts, K experts a token.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from accessory.config import Implementation, ModelArgs
from accessory.nn.experts import StackedExperts
from accessory.nn.experts_base import BaseExperts
from accessory.nn.experts_sparse import SparseExperts
from accessory.nn.linear import Linear, RMSNorm
from accessory.ops.linear import AdapterRows
from accessory.ops.routing import RouterStatistics, route, route_kernel, router_statistics


class MoE(nn.Module):
    def __init__(self, args: ModelArgs, implementation: Implementation) -> None:
        super().__init__()
        self.k = args.moe.num_experts_per_tok
        self.gate = Linear(args.dim, args.moe.num_experts)
        kind: type[StackedExperts] = BaseExperts if implementation == "base" else SparseExperts
        self.experts = kind(args.dim, args.hidden_dim, args.moe.num_experts)

    def route(
        self,
        x_TD: Tensor,
        y_TD: Tensor | None,
        norm: RMSNorm,
        counted_T: Tensor | None = None,
        statistics: bool = False,
        adapters: AdapterRows | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, RouterStatistics | None]:
        """(x + y, its norm, weight_TK, expert_TK, statistics): x is the residual stream, y attention's output.

        The second to fourth are what `experts` takes. adapters: the adapter of each token, where there are several;
        None: no token takes one.
        """
        dtype = self.experts.products_in
        alone = self.gate.weights().plain and adapters is None and not statistics
        kernel = route_kernel(x_TD, len(self.gate.weight)) if alone else None
        if kernel is not None:
            norm_D, gate_ED = norm.weight.float(), self.gate.weight.float()
            exchange = norm.exchange_of(y_TD)
            x_TD, h_TD, weight_TK, expert_TK = kernel.load()(
                x_TD, y_TD, norm_D, norm.eps, gate_ED, self.k, dtype, exchange
            )
            return x_TD, h_TD, weight_TK, expert_TK, None
        # The router's input is fp32 in every compute dtype: rounding must not decide between experts with close logits.
        x_TD, h_TD = norm.after(x_TD, y_TD, torch.float32, adapters)
        logits_TE = self.gate(h_TD, adapters)
        weight_TK, expert_TK, probability_TE = route(logits_TE, self.k)
        stats = router_statistics(logits_TE, probability_TE, expert_TK, counted_T) if statistics else None
        return x_TD, h_TD.to(dtype), weight_TK, expert_TK, stats
