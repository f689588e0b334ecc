"""The experts' feed-forward as grouped products: tokens sorted by expert, each weight over its own run of rows.

Nothing is padded and no token dropped (the dropless formulation of MegaBlocks, arXiv 2211.15841).

Legend: T tokens, K experts a token, N = T·K rows sorted by expert, E experts, D dim, F hidden dim, I/O in/out features.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from accessory.ops.fp8 import fp8_grouped_linear, has_fp8
from accessory.ops.linear import Weight, linear
from accessory.ops.quantized import Packed, dequantizes_in_tiles, has_triton, packed_linear, unpacked

# Up to this many (token, expert) pairs a CPU visits one after the other: sorting them would cost more than it saves.
FEW_PAIRS_CPU = 4
# A GPU reads weights in place while that is no more reading than the grouped product's, which visits each expert once;
# quantised ones take longer to multiply than to read, and so gain more.
FEW_PAIRS_GPU = 8
FEW_PAIRS_PACKED = 12
# Rows an expert up to which a GPU dequantises a stack tile by tile inside the product; with more, each tile would be
# dequantised so often that it is quicker to dequantise the whole stack first.
TILED_ROWS = 256


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

    F may be any slice of the hidden dimension: the result is then this slice's part of the sum.
    """
    order_N, count_E = sort_by_expert(expert_TK, _itself(w1_EFD).shape[0])
    x_ND = x_TD[order_N // expert_TK.shape[1]]
    h_NF = F.silu(grouped_linear(x_ND, w1_EFD, count_E)) * grouped_linear(x_ND, w3_EFD, count_E)
    y_ND = grouped_linear(h_NF, w2_EDF, count_E)
    return combine(y_ND, order_N, weight_TK)


def sort_by_expert(expert_TK: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """(order_N, count_E): the flat (token, k) pairs in order of expert, stable, and how many each expert got."""
    flat_N = expert_TK.flatten()
    # bincount would synchronise a GPU with its host; a sum over one-hot rows does not.
    count_E = (flat_N[:, None] == torch.arange(experts, device=flat_N.device)).sum(0)
    return torch.argsort(flat_N, stable=True), count_E


def combine(y_ND: Tensor, order_N: Tensor, weight_TK: Tensor) -> Tensor:
    """Undo the sort and sum each token's experts by weight, fp32 (T, D); no atomics, so it repeats bit for bit."""
    T, K = weight_TK.shape
    inverse_N = torch.empty_like(order_N).scatter_(0, order_N, torch.arange(len(order_N), device=order_N.device))
    return (y_ND[inverse_N].view(T, K, -1).float() * weight_TK[..., None]).sum(1)


def _itself(weight: Tensor | Packed | Weight) -> Tensor | Packed:
    return weight.weight if isinstance(weight, Weight) else weight


def grouped_linear(x_NI: Tensor, weight_EOI: Tensor | Packed | Weight, count_E: Tensor) -> Tensor:
    """Rows of x, sorted by expert, times their expert's weight, plus its LoRA and bias: (N, O) in x's dtype."""
    if isinstance(weight_EOI, Weight):
        w = weight_EOI
        y_NO = grouped_linear(x_NI, w.weight, count_E)
        if w.lora_a is not None and w.lora_b is not None:
            low_NR = w.scaled(grouped_linear(x_NI, w.lora_a, count_E))
            y_NO = y_NO + grouped_linear(low_NR, w.lora_b, count_E)
        if w.bias is not None:
            bias_EO = w.bias.to(x_NI.dtype)
            y_NO = y_NO + bias_EO.repeat_interleave(count_E, dim=0, output_size=x_NI.shape[0])
        return y_NO
    if isinstance(weight_EOI, Packed):
        if has_fp8(x_NI, weight_EOI):
            return fp8_grouped_linear(x_NI, weight_EOI, count_E.cumsum(0).to(torch.int32))
        if x_NI.is_cuda:
            return _FrozenGrouped.apply(x_NI, weight_EOI, count_E)
        runs = x_NI.split(count_E.tolist())
        products = [packed_linear(x, weight_EOI[e]) for e, x in enumerate(runs) if len(x)]
        return torch.cat(products) if products else x_NI.new_empty(0, weight_EOI.shape[1])
    weight_EOI = weight_EOI.to(x_NI.dtype)
    if has_grouped_mm(x_NI, weight_EOI.shape, weight_EOI.dtype):
        end_E = count_E.cumsum(0).to(torch.int32)
        return F.grouped_mm(x_NI, weight_EOI.transpose(1, 2), offs=end_E)
    return grouped_linear_reference(x_NI, weight_EOI, count_E)


class _FrozenGrouped(torch.autograd.Function):
    """A grouped product with a quantised stack, dequantised for the product alone, forward and backward.

    Tile by tile inside the product where that is quicker, else the whole stack before it.
    """

    @staticmethod
    def forward(ctx: Any, x_NI: Tensor, packed: Packed, count_E: Tensor) -> Tensor:
        ctx.packed, ctx.count_E, ctx.dtype = packed, count_E, x_NI.dtype
        if dequantizes_in_tiles(x_NI) and len(x_NI) <= TILED_ROWS * len(count_E):
            from accessory.ops.triton import packed_grouped as kernels

            return kernels.product(x_NI, packed, count_E)
        return grouped_linear(x_NI, unpacked(packed, x_NI.dtype), count_E)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        dy_NO = grads[0].contiguous()
        if dequantizes_in_tiles(dy_NO) and len(dy_NO) <= TILED_ROWS * len(ctx.count_E):
            from accessory.ops.triton import packed_grouped as kernels

            return kernels.gradient(dy_NO, ctx.packed, ctx.count_E), None, None
        weight_EOI = unpacked(ctx.packed, ctx.dtype)
        if has_grouped_mm(dy_NO, weight_EOI.shape, weight_EOI.dtype):
            end_E = ctx.count_E.cumsum(0).to(torch.int32)
            return F.grouped_mm(dy_NO, weight_EOI, offs=end_E), None, None
        return grouped_linear_reference(dy_NO, weight_EOI.transpose(1, 2), ctx.count_E), None, None


def grouped_linear_reference(x_NI: Tensor, weight_EOI: Tensor, count_E: Tensor) -> Tensor:
    """The same as a loop over the experts that got tokens; the oracle of the tests, and what CPUs and fp32 use."""
    runs = x_NI.split(count_E.tolist())
    # While gradients are kept an idle expert takes part with an empty product: its gradient is then zero and not None,
    # which collectives over parameters rely on.
    keep_empty = torch.is_grad_enabled() and weight_EOI.requires_grad
    products = [linear(x, w) for x, w in zip(runs, weight_EOI.unbind(), strict=True) if len(x) or keep_empty]
    return torch.cat(products) if products else x_NI.new_empty(0, weight_EOI.shape[1])


def has_grouped_mm(x_NI: Tensor, shape_EOI: Sequence[int], dtype: torch.dtype) -> bool:
    """torch's grouped product on GPUs: bf16, compute capability 8.0, strides of whole 16 bytes."""
    return (
        x_NI.is_cuda
        and x_NI.dtype == dtype == torch.bfloat16
        and shape_EOI[1] % 8 == shape_EOI[2] % 8 == 0
        and torch.cuda.get_device_capability(x_NI.device) >= (8, 0)
    )


def pairs_in_place(x_TD: Tensor, expert_TK: Tensor, w13_EGD: Tensor | None, *, quantized: bool = False) -> bool:
    """Whether `decode_experts` runs: few tokens, no gradients, and the device has what it needs."""
    if torch.is_grad_enabled():
        return False
    if x_TD.is_cuda:
        few = FEW_PAIRS_PACKED if quantized else FEW_PAIRS_GPU
        return expert_TK.numel() <= few and x_TD.dtype != torch.float32 and has_triton()
    return expert_TK.numel() <= FEW_PAIRS_CPU and w13_EGD is not None


def decode_experts(
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
    """`grouped_experts` pair by pair, weights read in place; experts are numbered from `first`, others left out.

    A GPU runs the kernels of `ops.triton.decode_experts`. A CPU reads `w13_EGD`: w1 above w3 (G = 2F).
    """
    if x_TD.is_cuda:
        from accessory.ops.triton import decode_experts as dense
        from accessory.ops.triton import packed

        if isinstance(w1_EFD, Packed):
            return packed.decode_experts(x_TD, w1_EFD, w2_EDF, w3_EFD, weight_TK, expert_TK, first)
        return dense.decode_experts(x_TD, w1_EFD, w2_EDF, w3_EFD, weight_TK, expert_TK, first)
    assert w13_EGD is not None, "see pairs_in_place"
    rows = []
    for t, (experts, weights) in enumerate(zip(expert_TK.tolist(), weight_TK.tolist(), strict=True)):
        x_1D, y_1D = x_TD[t : t + 1], None
        for e, weight in zip(experts, weights, strict=True):
            if not 0 <= e - first < w2_EDF.shape[0]:
                continue
            a_1F, b_1F = linear(x_1D, w13_EGD[e - first]).chunk(2, -1)
            # Weighted first and summed then, each rounded: two experts give the same bits on one rank and on two.
            part_1D = linear(F.silu(a_1F).mul_(b_1F), w2_EDF[e - first]).float().mul_(weight)
            y_1D = part_1D if y_1D is None else y_1D.add_(part_1D)
        rows.append(torch.zeros(1, x_TD.shape[1]) if y_1D is None else y_1D)
    return rows[0] if len(rows) == 1 else torch.cat(rows)
