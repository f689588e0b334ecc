"""Rotary position embedding (Su et al., arXiv 2104.09864) on interleaved pairs, with the scalings in common use.

Legend: B batch, T tokens, H query heads, G key/value heads, d head_dim, c = d/2 pairs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from accessory.ops import dispatch


def rope_frequencies(
    head_dim: int, theta: float, scaling: Mapping[str, Any] | None = None, max_seq_len: int = 4096
) -> tuple[Tensor, float]:
    """The angular frequency of each pair, fp32 (c,), and the factor on cos and sin (1.0 except for YaRN).

    `scaling` is a checked `ModelArgs.rope_scaling`: linear interpolation (Chen et al., arXiv 2306.15595), Llama 3.1's
    piecewise interpolation, or YaRN (Peng et al., arXiv 2309.00071).
    """
    freq_c = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim)
    if scaling is None:
        return freq_c, 1.0
    kind, factor = scaling["rope_type"], float(scaling["factor"])
    if kind == "linear":
        return freq_c / factor, 1.0
    if kind == "llama3":
        return _llama3(freq_c, factor, scaling), 1.0
    return _yarn(freq_c, head_dim, theta, factor, scaling, max_seq_len)


def _llama3(freq_c: Tensor, factor: float, scaling: Mapping[str, Any]) -> Tensor:
    """Interpolates long wavelengths, keeps short ones, and blends the two linearly in between."""
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns_c = scaling["original_max_position_embeddings"] * freq_c / (2 * math.pi)  # over the original context
    keep_c = ((turns_c - low) / (high - low)).clamp(0, 1)
    return freq_c / factor * (1 - keep_c) + freq_c * keep_c


def _yarn(
    freq_c: Tensor, head_dim: int, theta: float, factor: float, scaling: Mapping[str, Any], max_seq_len: int
) -> tuple[Tensor, float]:
    original = scaling.get("original_max_position_embeddings") or max_seq_len

    def pair_with_turns(turns: float) -> float:
        return head_dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low = pair_with_turns(scaling.get("beta_fast") or 32)
    high = pair_with_turns(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    interpolate_c = ((torch.arange(head_dim // 2).float() - low) / max(high - low, 0.001)).clamp(0, 1)
    freq_c = freq_c / factor * interpolate_c + freq_c * (1 - interpolate_c)

    def temperature(mscale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0

    attention_factor = scaling.get("attention_factor")
    if attention_factor is None:
        mscale, all_dim = scaling.get("mscale"), scaling.get("mscale_all_dim")
        attention_factor = temperature(mscale) / temperature(all_dim) if mscale and all_dim else temperature(1.0)
    return freq_c, float(attention_factor)


def rotations(positions_BT: Tensor, freq_c: Tensor, factor: float = 1.0) -> Tensor:
    """Complex64 rotations (B, T, 1, c) for `apply_rope`. All layers of a forward pass share them."""
    angle_BTc = positions_BT[..., None].float() * freq_c
    return torch.polar(torch.full_like(angle_BTc, factor), angle_BTc).unsqueeze(-2)


def apply_rope(q_BTHd: Tensor, k_BTGd: Tensor, rotation_BT1c: Tensor) -> tuple[Tensor, Tensor]:
    """Turn each interleaved pair of queries and keys by its position's angle. Computes in fp32, returns their dtype.

    B may be missing in all of them.
    """
    kernel = dispatch.find(dispatch.over_tokens("rope", q_BTHd))
    if kernel is not None:
        return _Turn.apply(q_BTHd, rotation_BT1c, kernel), _Turn.apply(k_BTGd, rotation_BT1c, kernel)
    heads = torch.cat((q_BTHd, k_BTGd), dim=-2)  # one pass for both
    pairs = torch.view_as_complex(heads.float().view(*heads.shape[:-1], -1, 2))
    turned = torch.view_as_real(pairs * rotation_BT1c).view_as(heads).to(heads.dtype)
    q_BTHd, k_BTGd = turned.split_with_sizes((q_BTHd.shape[-2], k_BTGd.shape[-2]), dim=-2)
    return q_BTHd, k_BTGd


class _Turn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BTHd: Tensor, rotation_BT1c: Tensor, kernel: dispatch.Kernel) -> Tensor:
        ctx.rotation, ctx.kernel = torch.view_as_real(rotation_BT1c).flatten(0, -3), kernel
        return kernel.load()(x_BTHd.flatten(0, -3), ctx.rotation, False).view_as(x_BTHd)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return ctx.kernel.load()(grads[0].flatten(0, -3), ctx.rotation, True).view_as(grads[0]), None, None
