"""The experts' feed-forward, in two ways: grouped products over tokens sorted by expert, or, for a few tokens, one
(token, expert) pair at a time.

Legend: T tokens, K experts a token, N = T·K rows sorted by expert, E experts, D dim, F hidden dim, G = 2F.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from accessory.ops import dispatch
from accessory.ops.linear import Weight, grouped_linear, grouped_products, linear
from accessory.ops.quantized import Packed


def swiglu(x: Tensor, w1_FD: Tensor | Weight, w2_DF: Tensor | Weight, w3_FD: Tensor | Weight) -> Tensor:
    """One feed-forward network: w2 · (silu(w1 · x) ⊙ (w3 · x)), arXiv 2002.05202."""
    return linear(F.silu(linear(x, w1_FD)) * linear(x, w3_FD), w2_DF)


def grouped_experts(
    x_TD: Tensor,
    w1_EFD: Tensor | Weight,
    w2_EDF: Tensor | Weight,
    w3_EFD: Tensor | Weight,
    weight_TK: Tensor,
    expert_TK: Tensor,
) -> Tensor:
    """Σ_k weight_TK · swiglu of expert_TK, (T, D) fp32; the products are in x's dtype.

    F may be a slice of the hidden dimension. The result is then this slice's part of the sum.
    """
    order_N, count_E = sort_by_expert(expert_TK, _stack(w1_EFD).shape[0])
    x_ND = x_TD[order_N // expert_TK.shape[1]]
    h_NF = F.silu(grouped_linear(x_ND, w1_EFD, count_E)) * grouped_linear(x_ND, w3_EFD, count_E)
    y_ND = grouped_linear(h_NF, w2_EDF, count_E)
    return combine(y_ND, order_N, weight_TK)


def sort_by_expert(expert_TK: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """Sort the flat (token, k) pairs by expert. Returns order_N (a stable sort) and count_E, the pairs of each expert,
    both int64."""
    flat_N = expert_TK.flatten()
    # bincount would make the host wait for a GPU; a sum over one-hot rows does not.
    count_E = (flat_N[:, None] == torch.arange(experts, device=flat_N.device)).sum(0)
    return torch.argsort(flat_N, stable=True), count_E


def combine(y_ND: Tensor, order_N: Tensor, weight_TK: Tensor) -> Tensor:
    """Undo the sort and sum each token's experts by weight: (T, D) fp32. Without atomics, so the same input gives the
    same bits."""
    T, K = weight_TK.shape
    inverse_N = torch.empty_like(order_N).scatter_(0, order_N, torch.arange(len(order_N), device=order_N.device))
    return (y_ND[inverse_N].view(T, K, -1).float() * weight_TK[..., None]).sum(1)


def _stack(weight: Tensor | Packed | Weight) -> Tensor | Packed:
    return weight.weight if isinstance(weight, Weight) else weight


def decode_kernel(x_TD: Tensor, w1_EFD: Tensor | Packed, pairs: int, *, fused: bool) -> dispatch.Kernel | None:
    """The kernel that computes `pairs` (token, expert) pairs and reads the weights in place.

    None means: use grouped products instead. fused: whether w1 and w3 are in one tensor.
    """
    return dispatch.find(dispatch.product("decode", x_TD, w1_EFD, pairs, fused=fused))


def runs_host_free(
    x_TD: Tensor, pairs: int, *, decode: Tensor | Packed | None, grouped: Sequence[Tensor | Packed | Weight]
) -> bool:
    """Whether a step of `pairs` pairs runs without the host learning the routing. A CUDA graph needs that.

    decode: w1 where the pairs may be computed one by one, else None. grouped: w1, w2, w3 where they may be computed as
    grouped products; empty where a loop would compute them.
    """
    asked = None if decode is None else dispatch.product("decode", x_TD, decode, pairs)
    return dispatch.host_free(asked, [p for w in grouped for p in grouped_products(x_TD, w, pairs)])


def decode_experts(
    kernel: dispatch.Kernel,
    x_TD: Tensor,
    w1_EFD: Any,
    w2_EDF: Any,
    w3_EFD: Any,
    weight_TK: Tensor,
    expert_TK: Tensor,
    *,
    first: int = 0,
    w13_EGD: Tensor | None = None,
) -> Tensor:
    """`grouped_experts` pair by pair, with a `kernel` of `decode_kernel`: (T, D) fp32.

    The weights are those of the experts `first … first + E - 1`; pairs of other experts add nothing. w13_EGD: w1 above
    w3, where they are fused.
    """
    if kernel.fused:
        return kernel.load()(x_TD, w13_EGD, w2_EDF, weight_TK, expert_TK, first)
    return kernel.load()(x_TD, w1_EFD, w2_EDF, w3_EFD, weight_TK, expert_TK, first)


def decode_experts_fused(
    x_TD: Tensor, w13_EGD: Tensor, w2_EDF: Tensor, weight_TK: Tensor, expert_TK: Tensor, first: int = 0
) -> Tensor:
    """A loop over the pairs. One product computes w1 and w3, because each product on a CPU starts a pool of threads."""
    rows = []
    for t, (experts, weights) in enumerate(zip(expert_TK.tolist(), weight_TK.tolist(), strict=True)):
        x_1D, y_1D = x_TD[t : t + 1], None
        for e, weight in zip(experts, weights, strict=True):
            if not 0 <= e - first < w2_EDF.shape[0]:
                continue
            a_1F, b_1F = linear(x_1D, w13_EGD[e - first]).chunk(2, -1)
            # Each product is weighted and rounded before it is summed. So two experts give the same bits on one rank
            # as on two ranks.
            part_1D = linear(F.silu(a_1F).mul_(b_1F), w2_EDF[e - first]).float().mul_(weight)
            y_1D = part_1D if y_1D is None else y_1D.add_(part_1D)
        rows.append(torch.zeros(1, x_TD.shape[1]) if y_1D is None else y_1D)
    return rows[0] if len(rows) == 1 else torch.cat(rows)
