"""LoRA adapters and biases beside weights that are read in place, pair by pair. The host learns no routing.

A kernel multiplies each pair's input by A, which has few rows: `low`. The kernels of the weights then add B · low and
the bias to their own sums, in fp32, with `beside`. Several adapters may serve one batch: each token names its own. The
stacks of A and B then hold every adapter's experts, and a pair's matrices have the number adapter · E + expert.

Legend: T tokens, K experts a token, N = T·K pairs, E experts of this rank (numbers from `first`), IN in and OUT out
features of a weight, R rank of an adapter, S = A·E entries of the stacks of A adapters. 1 and 3 stand for w1 and w3,
which share their input.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from accessory.ops.linear import AdapterRows, Weight
from accessory.ops.triton.card import cdiv, on_its_card
from accessory.ops.triton.grouped import product


@triton.jit
def adapter_number(adapter_ptr, token, e, experts, STACKED: tl.constexpr):
    """The number of the matrices that stand beside expert `e` for a token, or less than 0: none."""
    if STACKED:
        adapter = tl.load(adapter_ptr + token).to(tl.int32)
        return tl.where(adapter < 0, -1, adapter * experts + e.to(tl.int32))
    else:
        return e.to(tl.int32)


@triton.jit
def beside(
    low_ptr, b_ptr, bias_ptr, rows, e, number, OUT: tl.constexpr, R: tl.constexpr, SLOTS: tl.constexpr,
    BIAS: tl.constexpr,
):  # fmt: skip
    """(ROWS,) fp32: what the adapter and the bias add to `rows` of one weight's product.

    low_ptr points to A x of this pair and this weight. SLOTS is R or more, a power of two.
    """
    inside = rows < OUT
    add = tl.zeros_like(rows).to(tl.float32)
    if BIAS:
        add += tl.load(bias_ptr + e.to(tl.int64) * OUT + rows, mask=inside, other=0.0).to(tl.float32)
    if R > 0:
        r = tl.arange(0, SLOTS)
        held = (r < R) & (number >= 0)
        low = tl.load(low_ptr + r, mask=held, other=0.0)
        at = b_ptr + (tl.maximum(number, 0).to(tl.int64) * OUT + rows[:, None]) * R + r[None, :]
        b = tl.load(at, mask=held[None, :] & inside[:, None], other=0.0).to(tl.float32)
        add += tl.sum(b * low[None, :], 1)
    return add


@triton.jit
def _low_kernel(
    x_ptr, a1_ptr, a3_ptr, scale1_ptr, scale3_ptr, expert_ptr, adapter_ptr, low_ptr, first, experts, scale1, scale3,
    IN: tl.constexpr, R1: tl.constexpr, R3: tl.constexpr, K: tl.constexpr, READERS: tl.constexpr,
    STACKED: tl.constexpr, SHARE: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """One number of low_NR = scale · A x: R1 numbers of A₁ x, then R3 of A₃ x. READERS pairs read one row of x.

    SHARE entries of the stacks share one entry of the scales; 0: all have scale1 and scale3.
    """
    r, pair = tl.program_id(0), tl.program_id(1)
    e = tl.load(expert_ptr + pair) - first
    if (e >= 0) & (e < experts):
        number = adapter_number(adapter_ptr, pair // K, e, experts, STACKED)
        if number >= 0:
            of1 = r < R1
            a_ptr = a1_ptr if R3 == 0 else tl.where(of1, a1_ptr, a3_ptr)
            row = tl.where(of1, number.to(tl.int64) * R1 + r, number.to(tl.int64) * R3 + r - R1)
            sums = tl.zeros((COLS,), dtype=tl.float32)
            for start in range(0, IN, COLS):
                col = start + tl.arange(0, COLS)
                x = tl.load(x_ptr + (pair // READERS).to(tl.int64) * IN + col, mask=col < IN, other=0.0)
                a = tl.load(a_ptr + row * IN + col, mask=col < IN, other=0.0)
                sums += a.to(tl.float32) * x.to(tl.float32)
            low = tl.sum(sums, 0)
            if SHARE > 0:
                adapter = number // SHARE
                low *= tl.where(of1, tl.load(scale1_ptr + adapter), tl.load(scale3_ptr + adapter))
            else:
                low *= tl.where(of1, scale1, scale3)
            tl.store(low_ptr + pair * (R1 + R3) + r, low)


def _low(
    x: Tensor, w1: Weight, w3: Weight | None, expert_TK: Tensor, first: int, adapter_T: Tensor | None, readers: int
) -> Tensor:
    """scale · A x of every pair, for one weight or two side by side: fp32 (N, R₁ + R₃). x itself without adapters.

    x: one row for each `readers` pairs. Pairs without an adapter, or with another rank's expert, stay uninitialised.
    """
    w3 = w1._replace(lora_a=None) if w3 is None else w3
    adapted = [w for w in (w1, w3) if w.lora_a is not None]
    if not adapted:
        return x
    assert all((w.scale_A is None) == (adapter_T is None) for w in adapted), "several adapters need each token's number"
    ranks, N = [_rank(w) for w in (w1, w3)], expert_TK.numel()
    low_NR = torch.empty(N, sum(ranks), dtype=torch.float32, device=x.device)
    a1, a3 = (_present(w.lora_a, adapted[0].lora_a) for w in (w1, w3))
    scale1, scale3 = (_present(w.scale_A, _present(adapted[0].scale_A, x)) for w in (w1, w3))
    _low_kernel[(sum(ranks), N)](
        x, a1, a3, scale1, scale3, expert_TK, _present(adapter_T, expert_TK), low_NR, first, w1.weight.shape[0],
        float(w1.lora_scale), float(w3.lora_scale), IN=x.shape[1], R1=ranks[0], R3=ranks[1], K=expert_TK.shape[1],
        READERS=readers, STACKED=adapter_T is not None, SHARE=0 if adapter_T is None else w1.weight.shape[0],
        COLS=_columns(x), num_warps=4,
    )  # fmt: skip
    return low_NR


def _columns(x: Tensor) -> int:
    return min(2048, triton.next_power_of_2(x.shape[1]))


def _rank(weight: Weight) -> int:
    return 0 if weight.lora_a is None else weight.lora_a.shape[-2]


def _present(tensor: Tensor | None, stand_in: Tensor | None) -> Tensor:
    """`tensor`, or in its place one that the kernel gets but does not read."""
    found = stand_in if tensor is None else tensor
    assert found is not None
    return found.contiguous()


@on_its_card
def up_terms(
    x_TD: Tensor, w1: Weight, w3: Weight, expert_TK: Tensor, first: int, adapter_T: Tensor | None
) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    """(tensors, constants) for a kernel that adds what stands beside w1 and w3 to their products with x."""
    low_NR = _low(x_TD, w1, w3, expert_TK, first, adapter_T, readers=expert_TK.shape[1])
    tensors = [_present(t, x_TD) for w in (w1, w3) for t in (w.lora_b, w.bias)]
    constants = {"R1": _rank(w1), "R3": _rank(w3), "BIAS1": w1.bias is not None, "BIAS3": w3.bias is not None}
    slots = triton.next_power_of_2(max(1, _rank(w1), _rank(w3)))
    constants |= {"SLOTS": slots, "STACKED": adapter_T is not None}
    return (low_NR, *tensors, _present(adapter_T, expert_TK)), constants


@on_its_card
def down_terms(
    h_NF: Tensor, w2: Weight, expert_TK: Tensor, first: int, adapter_T: Tensor | None
) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    """(tensors, constants) for a kernel that adds what stands beside w2 to its product with h."""
    low_NR = _low(h_NF, w2, None, expert_TK, first, adapter_T, readers=1)
    tensors = (low_NR, _present(w2.lora_b, h_NF), _present(w2.bias, h_NF), _present(adapter_T, expert_TK))
    slots = triton.next_power_of_2(max(1, _rank(w2)))
    return tensors, {"R": _rank(w2), "BIAS": w2.bias is not None, "SLOTS": slots, "STACKED": adapter_T is not None}


# --------------------------------------------------------------------------- rows of which each names its adapter


@triton.jit
def _add_kernel(
    low_ptr, b_ptr, number_ptr, y_ptr, OUT: tl.constexpr, R: tl.constexpr, SLOTS: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    """y_NO += B · low for ROWS outputs of one row."""
    row = tl.program_id(1)
    number = tl.load(number_ptr + row)
    if number >= 0:
        rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        at = y_ptr + row.to(tl.int64) * OUT + rows
        add = beside(low_ptr + row * R, b_ptr, low_ptr, rows, number, number, OUT, R, SLOTS, False)
        y = tl.load(at, mask=rows < OUT, other=0.0).to(tl.float32) + add
        tl.store(at, y.to(y_ptr.dtype.element_ty), mask=rows < OUT)


@on_its_card
def add_row_by_row(
    y_NO: Tensor, x_NI: Tensor, a_SRI: Tensor, b_SOR: Tensor, scale_A: Tensor, adapters: AdapterRows
) -> Tensor:
    """`ops.linear.add_adapters` for a few rows, in place: each row reads its own matrices. `low` stays in fp32."""
    x_NI, y_NO, a_SRI, b_SOR = (t.contiguous() for t in (x_NI, y_NO, a_SRI, b_SOR))
    number_N, (S, R, I), (N, O) = adapters.number_N, a_SRI.shape, y_NO.shape  # noqa: E741
    if N == 0:
        return y_NO
    low_NR = torch.empty(N, R, dtype=torch.float32, device=x_NI.device)
    _low_kernel[(R, N)](
        x_NI, a_SRI, a_SRI, scale_A, scale_A, number_N, number_N, low_NR, 0, S, 1.0, 1.0, IN=I, R1=R, R3=0, K=1,
        READERS=1, STACKED=False, SHARE=S // len(scale_A), COLS=_columns(x_NI), num_warps=4,
    )  # fmt: skip
    slots = triton.next_power_of_2(R)
    rows = max(16, min(256, 4096 // slots))
    _add_kernel[(cdiv(O, rows), N)](low_NR, b_SOR, number_N, y_NO, OUT=O, R=R, SLOTS=slots, ROWS=rows, num_warps=4)
    return y_NO


@on_its_card
def add_grouped(
    y_NO: Tensor, x_NI: Tensor, a_SRI: Tensor, b_SOR: Tensor, scale_A: Tensor, adapters: AdapterRows
) -> Tensor:
    """`ops.linear.add_adapters` for many rows, in place: grouped products of rows sorted by adapter and expert."""
    order_N, count_S = adapters.sorted
    # Rows without an adapter come last and have no product, so it does not matter which scale they get.
    scale_N = scale_A[adapters.number_N[order_N] // (len(a_SRI) // len(scale_A))]
    low_NR = product(x_NI, a_SRI.to(x_NI.dtype), count_S, from_N=order_N, scale_N=scale_N)
    return product(low_NR, b_SOR.to(x_NI.dtype), count_S, to_N=order_N, add_to=y_NO.contiguous())
