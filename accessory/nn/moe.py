"""A mixture-of-experts layer: the router, which both implementations share, and one implementation of the experts.

Legend: T tokens, D dim, E experts, K experts a token.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from accessory.config import Implementation, ModelArgs
from accessory.nn.experts import StackedExperts
from accessory.nn.experts_base import BaseExperts
from accessory.nn.experts_sparse import SparseExperts
from accessory.nn.linear import Linear, RMSNorm
from accessory.ops.linear import AdapterRows, linear
from accessory.ops.routing import RouterStatistics, route, route_kernel, router_statistics


class MoE(nn.Module):
    def __init__(self, args: ModelArgs, implementation: Implementation) -> None:
        super().__init__()
        self.k = args.moe.num_experts_per_tok
        self.gate = Linear(args.dim, args.moe.num_experts)
        kind: type[StackedExperts] = BaseExperts if implementation == "base" else SparseExperts
        self.experts = kind(args.dim, args.hidden_dim, args.moe.num_experts)
        self.recompute = False
        # Where other ranks have other experts: computes each token with those of all ranks.
        self.compute_at_owners: Callable[[StackedExperts, Tensor, Tensor, Tensor], Tensor] | None = None

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
        gate = self.gate.weights()
        alone = gate.plain and adapters is None and not statistics
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
        logits_TE = linear(h_TD, gate, adapters=adapters)
        weight_TK, expert_TK, probability_TE = route(logits_TE, self.k)
        stats = router_statistics(logits_TE, probability_TE, expert_TK, counted_T) if statistics else None
        return x_TD, h_TD.to(dtype), weight_TK, expert_TK, stats

    def checkpoint_activations(self, wanted: bool) -> None:
        """Whether to keep only the experts' input, and to compute the rest again in backward."""
        self.recompute = wanted
        self.experts.recompute = wanted and self.compute_at_owners is None

    def compute_at(self, owners: Callable[[StackedExperts, Tensor, Tensor, Tensor], Tensor]) -> None:
        """Have each token computed by `owners`, where other ranks have other experts."""
        self.compute_at_owners = owners
        self.checkpoint_activations(self.recompute)

    def output(self, h_TD: Tensor, weight_TK: Tensor, expert_TK: Tensor, adapters: AdapterRows | None = None) -> Tensor:
        """The experts' output, (T, D), for what `route` returns."""
        owners = self.compute_at_owners
        if owners is None:
            return self.experts(h_TD, weight_TK, expert_TK, adapters)
        if not (self.recompute and torch.is_grad_enabled()):
            return owners(self.experts, h_TD, weight_TK, expert_TK)
        routed = (self.experts, h_TD, weight_TK, expert_TK)
        return checkpoint(owners, *routed, use_reentrant=False, preserve_rng_state=False)
