"""Scaled dot-product attention with grouped key/value heads.

Legend: B batch, T queries, S keys, H query heads, G key/value heads, R = H/G, d head_dim.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def attention(q_BTHd: Tensor, k_BSGd: Tensor, v_BSGd: Tensor, mask_BTS: Tensor | None) -> Tensor:
    """softmax(q kᵀ/√d) v, (B, T, H, d) in q's dtype.

    `mask_BTS` (bool) is true where a query may look. None means that the queries are the last T of S positions: one
    sees every key, T = S is causal attention. Either takes a fused kernel's fastest path.
    """
    (B, T, H, d), G = q_BTHd.shape, k_BSGd.shape[2]
    k_BGSd, v_BGSd = k_BSGd.transpose(1, 2), v_BSGd.transpose(1, 2)
    if mask_BTS is None and T > 1:
        assert k_BSGd.shape[1] == T, "without a mask, several queries need as many keys"
        return _causal(q_BTHd.transpose(1, 2), k_BGSd, v_BGSd).transpose(1, 2)
    # The R query heads of a group become rows of one attention, so keys and values are never repeated.
    R = H // G
    if T == 1 and mask_BTS is None:
        return F.scaled_dot_product_attention(q_BTHd.reshape(B, G, R, d), k_BGSd, v_BGSd).reshape(B, 1, H, d)
    q_BGQd = q_BTHd.transpose(1, 2).reshape(B, G, R * T, d)
    mask_B1QS = None
    if mask_BTS is not None:
        mask_B1QS = mask_BTS[:, None, None].expand(B, 1, R, T, mask_BTS.shape[-1]).reshape(B, 1, R * T, -1)
    y_BGQd = F.scaled_dot_product_attention(q_BGQd, k_BGSd, v_BGSd, attn_mask=mask_B1QS)
    return y_BGQd.reshape(B, H, T, d).transpose(1, 2)


def _causal(q_BHTd: Tensor, k_BGSd: Tensor, v_BGSd: Tensor) -> Tensor:
    if q_BHTd.is_cuda:
        return F.scaled_dot_product_attention(q_BHTd, k_BGSd, v_BGSd, is_causal=True, enable_gqa=True)
    # The CPU's fused kernel wants equal head counts; asked for groups it falls back to one that keeps all scores.
    R = q_BHTd.shape[1] // k_BGSd.shape[1]
    k_BHSd, v_BHSd = (t.repeat_interleave(R, dim=1) for t in (k_BGSd, v_BGSd))
    return F.scaled_dot_product_attention(q_BHTd, k_BHSd, v_BHSd, is_causal=True)


def attention_reference(q_BTHd: Tensor, k_BSGd: Tensor, v_BSGd: Tensor, mask_BTS: Tensor) -> Tensor:
    """The definition, in fp32 and without a fused kernel: the oracle of the tests."""
    R = q_BTHd.shape[2] // k_BSGd.shape[2]
    q, k, v = (
        q_BTHd.float(),
        k_BSGd.float().repeat_interleave(R, dim=2),
        v_BSGd.float().repeat_interleave(R, dim=2),
    )
    score_BHTS = torch.einsum("bthd,bshd->bhts", q, k) / q.shape[-1] ** 0.5
    score_BHTS = score_BHTS.masked_fill(~mask_BTS[:, None], float("-inf"))
    return torch.einsum("bhts,bshd->bthd", score_BHTS.softmax(-1), v).to(q_BTHd.dtype)
