"""The router: chooses each token's experts, always in fp32, and counts what it chose.

Legend: T tokens, D dim, E experts, K experts a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from accessory.ops import dispatch
from accessory.ops.norm import rms_norm


class RouterStatistics(NamedTuple):
    """One layer's routing over the counted tokens, without padding. All fields are sums, so batches can be added up.

    `probability_E` carries the router's gradient; the other fields carry none.
    """

    tokens: Tensor  # () number of counted tokens
    count_E: Tensor  # (E,) tokens sent to each expert; sums to tokens · K
    probability_E: Tensor  # (E,) sum over tokens of the fp32 softmax over all experts
    entropy: Tensor  # () sum over tokens of the softmax's entropy, nats
    z: Tensor  # () sum over tokens of logsumexp(logits)² (the router z-loss of arXiv 2202.08906)


def route(logits_TE: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Softmax over all experts, then the `k` largest, renormalised to sum to one (Mixtral, arXiv 2401.04088).

    Returns weight_TK (fp32), expert_TK (int64, largest weight first), probability_TE (fp32).
    """
    probability_TE = F.softmax(logits_TE, dim=-1, dtype=torch.float32)
    weight_TK, expert_TK = torch.topk(probability_TE, k, dim=-1)
    return weight_TK / weight_TK.sum(dim=-1, keepdim=True), expert_TK, probability_TE


def route_kernel(x_TD: Tensor, experts: int) -> dispatch.Kernel | None:
    """The kernel that adds, norms and routes in one pass, as `add_norm_route`; None where there is none."""
    return dispatch.find(dispatch.over_tokens("route", x_TD, experts))


def add_norm_route(
    x_TD: Tensor, y_TD: Tensor | None, norm_D: Tensor, eps: float, gate_ED: Tensor, k: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What stands before the experts: (x + y, its norm in `dtype`, weight_TK, expert_TK). The router sees fp32.

    Kernels of `route_kernel` compute the same; tests compare with this.
    """
    x_TD = x_TD if y_TD is None else x_TD + y_TD
    h_TD = rms_norm(x_TD, norm_D, eps)
    weight_TK, expert_TK, _ = route(F.linear(h_TD, gate_ED), k)
    return x_TD, h_TD.to(dtype), weight_TK, expert_TK


def router_statistics(
    logits_TE: Tensor, probability_TE: Tensor, expert_TK: Tensor, counted_T: Tensor | None = None
) -> RouterStatistics:
    """Statistics over the tokens where `counted_T` (bool) is true, or over all tokens without it."""
    if counted_T is None:
        counted_T = torch.ones(probability_TE.shape[0], dtype=torch.bool, device=probability_TE.device)
    mask_T1 = counted_T.float()[:, None]
    chosen_TE = torch.zeros_like(probability_TE).scatter_(1, expert_TK, mask_T1.expand_as(expert_TK).contiguous())
    p_TE = probability_TE.detach()
    entropy_T = -(p_TE * p_TE.clamp_min(torch.finfo(torch.float32).tiny).log()).sum(-1)
    return RouterStatistics(
        tokens=counted_T.sum().float(),
        count_E=chosen_TE.sum(0),
        probability_E=(probability_TE * mask_T1).sum(0),
        entropy=(entropy_T * counted_T).sum(),
        z=(logits_TE.float().logsumexp(-1).square() * counted_T).sum(),
    )


def balance_loss(layers: Sequence[RouterStatistics]) -> Tensor:
    """The load-balance loss E / (T·K) · Σ_e count_e · mean_t p_te, averaged over layers; 1.0 for a perfect balance.

    Where no token counts, the loss and its gradient are 0.
    """
    per_layer = []
    for s in layers:
        assignments = s.count_E.sum().clamp_min(1.0)
        mean_p_E = s.probability_E / s.tokens.clamp_min(1.0)
        per_layer.append(s.count_E.numel() / assignments * (s.count_E * mean_p_E).sum())
    return torch.stack(per_layer).mean()
