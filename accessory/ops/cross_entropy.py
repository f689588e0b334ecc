"""The head and cross-entropy as one operation: the logits of a batch never exist as a whole.

Some rows at a time become logits, then the gradient of these logits in their place, then gradients of the head's input
and weights. All of it happens in forward, so that the head multiplies each row once, as without pieces (the idea of
Liger's fused linear cross-entropy, arXiv 2410.10989).

Where ranks share the vocabulary, each makes the logits of its own tokens only (Megatron-LM's vocab-parallel
cross-entropy, arXiv 1909.08053). Three numbers a row go to the other ranks, in one gather: the largest logit, the sum
of exponentials relative to it, and the label's logit. The gradient of a rank's logits needs nothing else.

Legend: N tokens, D dim, V vocabulary or a rank's part of it, R rows at a time, P parts. 3: those three numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from accessory.limits import CROSS_ENTROPY_ROWS, LOGITS_AT_ONCE
from accessory.ops import dispatch

# The logits of this many tokens are converted to fp32 at a time, where no kernel reads them as they are.
ROWS = CROSS_ENTROPY_ROWS
LEAST = -3.0e38  # instead of an infinity, whose difference from itself is no number


class VocabularyPart(NamedTuple):
    """The tokens whose logits the head makes here: `size` of them from `first` on. Other ranks have as many each."""

    first: int
    size: int
    gather: Callable[[Tensor], Tensor] | None = None  # (…) of each rank to (P, …); None: there is only this part


def head_cross_entropy_sum(
    h_ND: Tensor, label_N: Tensor, head: Callable[[Tensor], Tensor], parameters: Sequence[Tensor], part: VocabularyPart
) -> Tensor:
    """Σ_n -log softmax(head(h_n))[label_n], () fp32. The sum is computed in fp32 for logits of any dtype.

    head: maps (R, D) to logits (R, V), which it does not keep, and which may be written over. They are those of `part`,
    while labels are of the whole vocabulary. parameters: what it reads that gets gradients. Rows with a negative label
    add nothing, but the head multiplies them. `backward` works once.
    """
    rows = max(1, LOGITS_AT_ONCE // part.size)
    return _HeadCrossEntropySum.apply(h_ND, label_N, head, part, rows, torch.is_grad_enabled(), *parameters)


class _HeadCrossEntropySum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, h_ND: Tensor, label_N: Tensor, head: Callable[[Tensor], Tensor], part: VocabularyPart, rows: int,
        wanted: bool, *parameters: Tensor,
    ) -> Tensor:  # fmt: skip
        total = torch.zeros((), dtype=torch.float32, device=h_ND.device)
        dh_ND = torch.empty_like(h_ND) if wanted else None
        gradients: list[Tensor] = []
        # Without rows the head still runs once: its gradients are then zeros and not missing.
        for start in range(0, max(1, len(h_ND)), rows):
            h_RD, label_R = h_ND[start : start + rows].detach(), label_N[start : start + rows]
            if dh_ND is None:
                total += cross_entropy(head(h_RD), label_R, part, gradient=False)
                continue
            with torch.enable_grad():
                logits_RV = head(h_RD.requires_grad_())
            dlogits_RV = logits_RV.detach()
            total += cross_entropy(dlogits_RV, label_R, part, gradient=True)
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
        return dh_ND.mul_(grads[0]), None, None, None, None, None, *(g.mul_(grads[0]) for g in gradients)


def cross_entropy(logits_RV: Tensor, label_R: Tensor, part: VocabularyPart, *, gradient: bool) -> Tensor:
    """Σ_r -log softmax(logits_r)[label_r], () fp32, over all parts. gradient: that of the logits takes their place.

    Rows with a negative label add nothing, and have no gradient.
    """
    kernel = dispatch.find(dispatch.over_tokens("cross_entropy", logits_RV))
    run = in_torch if kernel is None else kernel.load()
    # A part that is the whole needs no second look at its logits.
    sums_3R = run(logits_RV, label_R, part.first, None, gradient and part.gather is None)
    if part.gather is not None:
        sums_3R = together(part.gather(sums_3R))
        if gradient:
            run(logits_RV, label_R, part.first, sums_3R, True)
    return loss_sum(sums_3R, label_R)


def in_torch(logits_RV: Tensor, label_R: Tensor, first: int, sums_3R: Tensor | None, gradient: bool) -> Tensor:
    """The three numbers of each row, (3, R) fp32: the largest logit, Σ exp(logits - largest), and the label's logit, 0
    where the label is not among the tokens from `first` on.

    sums_3R: they are known, for the whole vocabulary. gradient: write softmax - onehot over the logits.
    """
    known = sums_3R is not None
    if sums_3R is None:
        sums_3R = torch.empty(3, len(logits_RV), dtype=torch.float32, device=logits_RV.device)
    for start in range(0, len(logits_RV), ROWS):
        piece_RV, sums_3R1 = logits_RV[start : start + ROWS], sums_3R[:, start : start + ROWS, None]
        label_R1 = label_R[start : start + ROWS, None]
        here_R1 = (label_R1 >= first) & (label_R1 < first + logits_RV.shape[1])
        place_R1 = (label_R1 - first).where(here_R1, 0)
        wide_RV = piece_RV.float()
        if not known:
            sums_3R1[0] = wide_RV.amax(-1, keepdim=True).clamp_min(LEAST)
            sums_3R1[1] = (wide_RV - sums_3R1[0]).exp_().sum(-1, keepdim=True)
            sums_3R1[2] = wide_RV.gather(1, place_R1).where(here_R1, 0.0)
        if gradient:
            p_RV = (wide_RV - sums_3R1[0]).exp_().div_(sums_3R1[1])  # more exact than exp(logits - log Σ exp)
            p_RV.scatter_add_(1, place_R1, -here_R1.float())
            piece_RV.copy_(p_RV.masked_fill_(label_R1 < 0, 0.0))
    return sums_3R


def together(parts_P3R: Tensor) -> Tensor:
    """The three numbers of each row over the whole vocabulary, (3, R), from those of its parts. Ranks that have the
    same parts get the same bits."""
    most_PR, total_PR, chosen_PR = parts_P3R.unbind(1)
    most_R = most_PR.amax(0)
    return torch.stack([most_R, (total_PR * (most_PR - most_R).exp()).sum(0), chosen_PR.sum(0)])


def loss_sum(sums_3R: Tensor, label_R: Tensor) -> Tensor:
    """() fp32, from the three numbers of each row over the whole vocabulary."""
    most_R, total_R, chosen_R = sums_3R
    return (most_R - chosen_R + total_R.log()).masked_fill(label_R < 0, 0.0).sum()
