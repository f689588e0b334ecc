"""Cross-entropy over a large vocabulary: a program reads a row of logits and writes their gradient in their place.

Where ranks share the vocabulary, they first put together what each has read, and another launch writes the gradient.

Legend: R rows, V vocabulary or a rank's part of it. 3: the numbers that `ops.cross_entropy` names.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from accessory.ops import cross_entropy as reference
from accessory.ops.triton.card import on_its_card

LEAST = tl.constexpr(reference.LEAST)


@triton.jit
def _cross_entropy_kernel(
    logits_ptr, label_ptr, sums_ptr, R, first,
    V: tl.constexpr, COLS: tl.constexpr, KNOWN: tl.constexpr, GRADIENT: tl.constexpr,
):  # fmt: skip
    """The largest logit, Σ exp(logits - largest) and logits[label - first] of a row; KNOWN: they are read instead.

    GRADIENT: softmax(logits) - onehot(label - first) over the logits, zeros for a negative label.
    """
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * V
    sums_ptr += row
    col = tl.arange(0, COLS)
    label = tl.load(label_ptr + row)
    place = label - first  # of the label among these logits; elsewhere if another rank has it
    if KNOWN:
        largest = tl.load(sums_ptr)
        total_of_all = tl.load(sums_ptr + R)
    else:
        # It is read before the sums, behind which other threads may already write gradients.
        chosen = tl.load(logits_ptr + place, mask=(place >= 0) & (place < V), other=0.0).to(tl.float32)
        most = tl.full((COLS,), LEAST, dtype=tl.float32)
        total = tl.zeros((COLS,), dtype=tl.float32)
        for start in range(0, V, COLS):
            x = tl.load(logits_ptr + start + col, mask=start + col < V, other=float("-inf")).to(tl.float32)
            larger = tl.maximum(most, x)
            total = total * tl.exp(most - larger) + tl.exp(x - larger)
            most = larger
        largest = tl.max(most, 0)
        total_of_all = tl.sum(total * tl.exp(most - largest), 0)
        tl.store(sums_ptr, largest)
        tl.store(sums_ptr + R, total_of_all)
        tl.store(sums_ptr + 2 * R, chosen)
    if GRADIENT:
        for start in range(0, V, COLS):
            held = start + col < V
            x = tl.load(logits_ptr + start + col, mask=held, other=float("-inf")).to(tl.float32)
            p = tl.exp(x - largest) / total_of_all - (start + col == place).to(tl.float32)
            p = tl.where(label < 0, 0.0, p)
            tl.store(logits_ptr + start + col, p.to(logits_ptr.dtype.element_ty), mask=held)


@on_its_card
def cross_entropy(logits_RV: Tensor, label_R: Tensor, first: int, sums_3R: Tensor | None, gradient: bool) -> Tensor:
    """`ops.cross_entropy.in_torch` in one launch."""
    assert logits_RV.is_contiguous(), "the gradient is written in place"
    R, V = logits_RV.shape
    known = sums_3R is not None
    if sums_3R is None:
        sums_3R = torch.empty(3, R, dtype=torch.float32, device=logits_RV.device)
    assert sums_3R.is_contiguous()
    if R:
        _cross_entropy_kernel[(R,)](
            logits_RV, label_R.contiguous(), sums_3R, R, first,
            V=V, COLS=min(4096, triton.next_power_of_2(V)), KNOWN=known, GRADIENT=gradient, num_warps=8,
        )  # fmt: skip
    return sums_3R
