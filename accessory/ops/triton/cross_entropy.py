"""Cross-entropy over a large vocabulary: a program reads a row of logits and writes their gradient in their place.

Legend: R rows, V vocabulary.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from accessory.ops.triton.card import on_its_card

LEAST = tl.constexpr(-3.0e38)  # instead of an infinity, whose difference from itself is no number


@triton.jit
def _cross_entropy_kernel(
    logits_ptr, label_ptr, loss_ptr, V: tl.constexpr, COLS: tl.constexpr, GRADIENT: tl.constexpr
):  # fmt: skip
    """loss = log Σ exp(logits) - logits[label], and softmax(logits) - onehot(label) over the logits. A negative label:
    zeros."""
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * V
    col = tl.arange(0, COLS)
    most = tl.full((COLS,), LEAST, dtype=tl.float32)
    total = tl.zeros((COLS,), dtype=tl.float32)
    for start in range(0, V, COLS):
        x = tl.load(logits_ptr + start + col, mask=start + col < V, other=float("-inf")).to(tl.float32)
        larger = tl.maximum(most, x)
        total = total * tl.exp(most - larger) + tl.exp(x - larger)
        most = larger
    largest = tl.max(most, 0)
    total_of_all = tl.sum(total * tl.exp(most - largest), 0)
    label = tl.load(label_ptr + row)
    chosen = tl.load(logits_ptr + tl.maximum(label, 0)).to(tl.float32)
    tl.store(loss_ptr + row, tl.where(label < 0, 0.0, largest - chosen + tl.log(total_of_all)))
    if GRADIENT:
        for start in range(0, V, COLS):
            held = start + col < V
            x = tl.load(logits_ptr + start + col, mask=held, other=float("-inf")).to(tl.float32)
            p = tl.exp(x - largest) / total_of_all - (start + col == label).to(tl.float32)
            p = tl.where(label < 0, 0.0, p)
            tl.store(logits_ptr + start + col, p.to(logits_ptr.dtype.element_ty), mask=held)


@on_its_card
def cross_entropy(logits_RV: Tensor, label_R: Tensor, gradient: bool) -> Tensor:
    """`ops.cross_entropy.cross_entropy` in one launch and a sum."""
    assert logits_RV.is_contiguous(), "the gradient is written in place"
    R, V = logits_RV.shape
    loss_R = torch.empty(R, dtype=torch.float32, device=logits_RV.device)
    if R:
        _cross_entropy_kernel[(R,)](
            logits_RV, label_R.contiguous(), loss_R,
            V=V, COLS=min(4096, triton.next_power_of_2(V)), GRADIENT=gradient, num_warps=8,
        )  # fmt: skip
    return loss_R.sum()
