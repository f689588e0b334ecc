"""The head and cross-entropy as one operation: the logits of a batch never exist as a whole.

Some rows at a time become logits, then the gradient of these logits in their place, then gradients of the head's input
and weights. All of it happens in forward, so that the head multiplies each row once, as without pieces (the idea of
Liger's fused linear cross-entropy, arXiv 2410.10989).

Legend: N tokens, D dim, V vocabulary, R rows at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from accessory.limits import CROSS_ENTROPY_ROWS, LOGITS_AT_ONCE
from accessory.ops import dispatch

# The logits of this many tokens are converted to fp32 at a time, where no kernel reads them as they are.
ROWS = CROSS_ENTROPY_ROWS


def head_cross_entropy_sum(
    h_ND: Tensor, label_N: Tensor, head: Callable[[Tensor], Tensor], parameters: Sequence[Tensor], vocabulary: int
) -> Tensor:
    """Σ_n -log softmax(head(h_n))[label_n], () fp32. The sum is computed in fp32 for logits of any dtype.

    head: maps (R, D) to logits (R, V), which it does not keep, and which may be written over. parameters: what it
    reads that gets gradients. Rows with a negative label add nothing, but the head multiplies them. `backward` works
    once.
    """
    rows = max(1, LOGITS_AT_ONCE // vocabulary)
    return _HeadCrossEntropySum.apply(h_ND, label_N, head, rows, torch.is_grad_enabled(), *parameters)


class _HeadCrossEntropySum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, h_ND: Tensor, label_N: Tensor, head: Callable[[Tensor], Tensor], rows: int, wanted: bool,
        *parameters: Tensor,
    ) -> Tensor:  # fmt: skip
        total = torch.zeros((), dtype=torch.float32, device=h_ND.device)
        dh_ND = torch.empty_like(h_ND) if wanted else None
        gradients: list[Tensor] = []
        # Without rows the head still runs once: its gradients are then zeros and not missing.
        for start in range(0, max(1, len(h_ND)), rows):
            h_RD, label_R = h_ND[start : start + rows].detach(), label_N[start : start + rows]
            if dh_ND is None:
                total += cross_entropy(head(h_RD), label_R, gradient=False)
                continue
            with torch.enable_grad():
                logits_RV = head(h_RD.requires_grad_())
            dlogits_RV = logits_RV.detach()
            total += cross_entropy(dlogits_RV, label_R, gradient=True)
            dh_ND[start : start + rows], *found = torch.autograd.grad(logits_RV, (h_RD, *parameters), dlogits_RV)
            if not gradients:
                gradients = list(found)
            else:
                torch._foreach_add_(gradients, found)
            del logits_RV, dlogits_RV, found
        ctx.gradients = dh_ND, gradients
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        # In place: nothing else uses these tensors.
        (dh_ND, gradients), ctx.gradients = ctx.gradients, (None, None)
        return dh_ND.mul_(grads[0]), None, None, None, None, *(g.mul_(grads[0]) for g in gradients)


def cross_entropy(logits_RV: Tensor, label_R: Tensor, *, gradient: bool) -> Tensor:
    """Σ_r -log softmax(logits_r)[label_r], () fp32. gradient: that of the logits takes their place.

    Rows with a negative label add nothing, and have no gradient.
    """
    kernel = dispatch.find(dispatch.over_tokens("cross_entropy", logits_RV))
    if kernel is not None:
        return kernel.load()(logits_RV, label_R, gradient)
    total = torch.zeros((), dtype=torch.float32, device=logits_RV.device)
    for start in range(0, len(logits_RV), ROWS):
        wide_RV = logits_RV[start : start + ROWS].float()
        label_R1 = label_R[start : start + ROWS, None].clamp_min(0)
        counts_R1 = label_R[start : start + ROWS, None] >= 0
        lse_R1 = wide_RV.logsumexp(-1, keepdim=True)
        total += (lse_R1 - wide_RV.gather(1, label_R1)).where(counts_R1, 0.0).sum()
        if gradient:
            p_RV = wide_RV.softmax(-1)  # more exact than exp(logits - lse), which rounds a difference first
            p_RV.scatter_add_(1, label_R1, torch.full_like(lse_R1, -1.0))
            logits_RV[start : start + ROWS] = p_RV.where(counts_R1, 0.0)
    return total
