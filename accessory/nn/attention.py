"""Grouped-query attention (arXiv 2305.13245) with rotary embedding.

Legend: B batch, T tokens, D dim, H query heads, G key/value heads, d head_dim, c = d/2.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from accessory.config import ModelArgs
from accessory.nn.cache import PagedCache
from accessory.nn.fused import FusedWeights
from accessory.nn.linear import Linear
from accessory.ops.attention import Mask, attention
from accessory.ops.compute_copy import in_dtype
from accessory.ops.linear import AdapterRows, linear
from accessory.ops.linear_autograd import SumOverRanks, projections
from accessory.ops.rope import apply_rope


class Attention(nn.Module):
    """Attention of one layer: `forward` maps (B, T, D) to (B, T, D) in the compute dtype.

    The head counts follow the weights' shapes, so a rank with a slice of the heads runs the same code.
    """

    def __init__(self, args: ModelArgs, layer: int) -> None:
        super().__init__()
        self.layer, self.head_dim = layer, args.head_dim
        self.wq = Linear(args.dim, args.n_heads * args.head_dim)
        self.wk = Linear(args.dim, args.n_kv_heads * args.head_dim)
        self.wv = Linear(args.dim, args.n_kv_heads * args.head_dim)
        self.wo = Linear(args.n_heads * args.head_dim, args.dim)
        self.fused = FusedWeights(dim=0)
        self._fused_heads: list[int] = []  # of queries, keys and values in `fused`
        # Where ranks share rows: makes (B, S, G, d) of all ranks' tokens of (B, T, G, d).
        self.gather_tokens: Callable[[Tensor], Tensor] | None = None
        self.compute_dtype: torch.dtype | None = None  # None: the weights' dtype
        self.sum_over_ranks: SumOverRanks | None = None  # of the input's gradient, where `projects_together`

    @property
    def projects_together(self) -> bool:
        """Whether the input's three products are differentiated together: where dense weights stand alone."""
        inputs = (self.wq, self.wk, self.wv)
        return torch.is_grad_enabled() and all(
            isinstance(w.weight, Tensor) and w.weights().plain and w.adapters is None for w in inputs
        )

    @property
    def products_in(self) -> torch.dtype:
        """The compute dtype."""
        return self.compute_dtype or self.wq.weight.dtype

    def fuse(self) -> None:
        if all(w.weights().without_adapters().plain for w in (self.wq, self.wk, self.wv)):
            weights = [self.wq.weight, self.wk.weight, self.wv.weight]
            self.fused.refresh(weights)
            self._fused_heads = [weight.shape[0] // self.head_dim for weight in weights]

    def forward(
        self,
        x_BTD: Tensor,
        rotation_BT1c: Tensor,
        mask_BTS: Mask,
        cache: PagedCache | None,
        adapters: AdapterRows | None = None,
    ) -> Tensor:
        """adapters: the adapter of each of the B·T tokens, where there are several; None: no token takes one."""
        q_BTHd, k_BTGd, v_BTGd = self._project(x_BTD.to(self.products_in), adapters)
        if cache is not None:
            y_NHd = cache.attend(self.layer, q_BTHd[0], k_BTGd[0], v_BTGd[0], rotation_BT1c[0])
            return self.wo(y_NHd.flatten(-2)[None], adapters)
        q_BTHd, k_BTGd = apply_rope(q_BTHd, k_BTGd, rotation_BT1c)
        if self.gather_tokens is not None:
            k_BTGd, v_BTGd = self.gather_tokens(torch.cat([k_BTGd, v_BTGd], dim=2)).chunk(2, dim=2)
        return self.wo(attention(q_BTHd, k_BTGd, v_BTGd, mask_BTS).flatten(-2), adapters)

    def _project(self, x_BTD: Tensor, adapters: AdapterRows | None) -> Sequence[Tensor]:
        if self.fused.tensor is not None and adapters is None and not torch.is_grad_enabled():
            heads_BTHd = linear(x_BTD, self.fused.tensor).view(*x_BTD.shape[:-1], -1, self.head_dim)
            return heads_BTHd.split_with_sizes(self._fused_heads, dim=2)
        inputs = (self.wq, self.wk, self.wv)
        if self.projects_together:
            parts = projections(x_BTD, [in_dtype(w.weight, x_BTD.dtype) for w in inputs], self.sum_over_ranks)
        else:
            parts = tuple(w(x_BTD, adapters) for w in inputs)
        return [part.unflatten(-1, (-1, self.head_dim)) for part in parts]
