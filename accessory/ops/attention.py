"""Scaled dot-product attention with grouped key/value heads.

Legend: B batch, T queries, S keys, H query heads, G key/value heads, R = H/G, d head_dim.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from accessory.ops.shared_rows import SharedRows
from accessory.ops.transfer import to_device


class Documents(NamedTuple):
    """Packed rows: the document of each token, and the same documents as boundaries.

    Kernels for packed rows read the boundaries and skip the pairs of tokens from different documents.
    """

    number_BT: Tensor  # int64; a token sees the earlier tokens of its row that have the same number
    start_N: Tensor  # int32 (documents of the whole batch + 1): each one's start in the flattened batch, then the end
    longest: int  # tokens of the longest document

    @classmethod
    def of(cls, number_BT: Tensor) -> Documents:
        """Find the boundaries. Call it on the CPU: reading the numbers would make a GPU wait."""
        new_BT = torch.ones_like(number_BT, dtype=torch.bool)
        new_BT[:, 1:] = number_BT[:, 1:] != number_BT[:, :-1]
        start_N = torch.cat([new_BT.flatten().nonzero().squeeze(1), torch.tensor([number_BT.numel()])])
        return cls(number_BT, start_N.to(torch.int32), int(start_N.diff().max()))

    def to(self, device: torch.device | str) -> Documents:
        there = torch.device(device)
        return Documents(to_device(self.number_BT, there), to_device(self.start_N, there), self.longest)


@cache
def _varlen_attention() -> Callable[..., Any] | None:
    """torch's causal kernel for packed rows, or None. Versions of torch differ in how they ask for causal attention."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    known = inspect.signature(varlen_attn).parameters
    causal = {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
    return partial(varlen_attn, **causal)


def has_varlen(device: torch.device, dtype: torch.dtype | None) -> bool:
    """Whether torch has the kernel for packed rows and runs it on this device and dtype: CUDA, 16 bits."""
    return device.type == "cuda" and dtype in (torch.bfloat16, torch.float16) and _varlen_attention() is not None


def packed_attention(
    q_NHd: Tensor,
    k_NGd: Tensor,
    v_NGd: Tensor,
    start_C: Tensor,
    longest: int,
    key_start_C: Tensor | None = None,
    longest_key: int | None = None,
) -> Tensor:
    """Causal attention within each document of a flat batch, (N, H, d), where `has_varlen`.

    start_C: int32, each document's start, then N. longest: tokens of the longest document. key_start_C, longest_key:
    the same of the keys, where there are more of them than queries. A document's queries are then its last tokens.
    """
    varlen = _varlen_attention()
    assert varlen is not None, "see has_varlen"
    R = q_NHd.shape[1] // k_NGd.shape[1]
    # Some versions of torch do not let this kernel share key/value heads, so they are repeated. The copies cost much
    # less than the kernel saves.
    k_NHd, v_NHd = (t.repeat_interleave(R, dim=1) for t in (k_NGd, v_NGd))
    key_start_C, longest_key = (start_C, longest) if key_start_C is None else (key_start_C, longest_key)
    return varlen(q_NHd, k_NHd, v_NHd, start_C, key_start_C, longest, longest_key)


# What says which keys a query may attend to.
Mask = Tensor | Documents | SharedRows | None


def attention(q_BTHd: Tensor, k_BSGd: Tensor, v_BSGd: Tensor, mask_BTS: Mask) -> Tensor:
    """softmax(q kᵀ/√d) v, (B, T, H, d) in q's dtype.

    `mask_BTS` (bool) is true where a query may attend to a key. None means that the queries are the last T of S
    positions: a single query (T = 1) sees every key, and T = S is causal attention. Both take a fused kernel's fastest
    path. With `Documents`, T = S and attention is causal within each document. With `SharedRows`, keys and values are
    those of all ranks.
    """
    if isinstance(mask_BTS, SharedRows):
        # The keys of the segments overlap, so they are copied: the kernel wants one segment's behind another's.
        k_MGd, v_MGd = (t.flatten(0, 1).index_select(0, mask_BTS.key_M) for t in (k_BSGd, v_BSGd))
        queries, keys = (mask_BTS.query_start_N, mask_BTS.longest_query), (mask_BTS.key_start_N, mask_BTS.longest_key)
        return packed_attention(q_BTHd.flatten(0, 1), k_MGd, v_MGd, *queries, *keys).view_as(q_BTHd)
    if isinstance(mask_BTS, Documents):
        q_NHd, k_NGd, v_NGd = (t.flatten(0, 1) for t in (q_BTHd, k_BSGd, v_BSGd))
        return packed_attention(q_NHd, k_NGd, v_NGd, mask_BTS.start_N, mask_BTS.longest).view_as(q_BTHd)
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
    # The CPU's fused kernel needs equal head counts. With grouped heads torch falls back to a kernel that stores all
    # scores.
    R = q_BHTd.shape[1] // k_BGSd.shape[1]
    k_BHSd, v_BHSd = (t.repeat_interleave(R, dim=1) for t in (k_BGSd, v_BGSd))
    return F.scaled_dot_product_attention(q_BHTd, k_BHSd, v_BHSd, is_causal=True)


def attention_reference(q_BTHd: Tensor, k_BSGd: Tensor, v_BSGd: Tensor, mask_BTS: Tensor) -> Tensor:
    """The definition of `attention`, in fp32 and without a fused kernel. Tests compare with it."""
    R = q_BTHd.shape[2] // k_BSGd.shape[2]
    q, k, v = (
        q_BTHd.float(),
        k_BSGd.float().repeat_interleave(R, dim=2),
        v_BSGd.float().repeat_interleave(R, dim=2),
    )
    score_BHTS = torch.einsum("bthd,bshd->bhts", q, k) / q.shape[-1] ** 0.5
    score_BHTS = score_BHTS.masked_fill(~mask_BTS[:, None], float("-inf"))
    return torch.einsum("bhts,bshd->bthd", score_BHTS.softmax(-1), v).to(q_BTHd.dtype)
