"""Cross-entropy of many tokens over a large vocabulary, without a copy of the logits in fp32.

Legend: N tokens, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from accessory.limits import CROSS_ENTROPY_ROWS

# The logits of this many tokens are converted to fp32 at a time.
ROWS = CROSS_ENTROPY_ROWS


class _CrossEntropySum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, label_N: Tensor) -> Tensor:
        # The gradient is softmax - one-hot. It is computed here, so that the logits are converted to fp32 only once.
        wanted = ctx.needs_input_grad[0]
        grad_NV = torch.empty_like(logits_NV) if wanted else None
        total = torch.zeros((), dtype=torch.float32, device=logits_NV.device)
        for start in range(0, len(logits_NV), ROWS):
            logits_RV = logits_NV[start : start + ROWS].float()
            label_R1 = label_N[start : start + ROWS, None]
            lse_R1 = logits_RV.logsumexp(-1, keepdim=True)
            total += (lse_R1 - logits_RV.gather(1, label_R1)).sum()
            if grad_NV is not None:
                p_RV = logits_RV.softmax(-1)  # more exact than exp(logits - lse), which rounds a difference first
                p_RV.scatter_add_(1, label_R1, torch.full_like(lse_R1, -1.0))
                grad_NV[start : start + ROWS] = p_RV
        ctx.grad = grad_NV
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        # In place: nothing else uses this tensor, and it is the largest one of a small model's step.
        grad_NV, ctx.grad = ctx.grad, None
        return grad_NV.mul_(grads[0].to(grad_NV.dtype)), None


def cross_entropy_sum(logits_NV: Tensor, label_N: Tensor) -> Tensor:
    """Σ_n -log softmax(logits_n)[label_n], () fp32. The sum is computed in fp32 for logits of any dtype.

    Every row counts: pick the rows to train on before the call (`Decoder.forward(rows_N=…)`). `backward` works once.
    """
    return _CrossEntropySum.apply(logits_NV, label_N)
