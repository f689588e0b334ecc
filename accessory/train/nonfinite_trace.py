"""Which items made a loss that is not finite: `trace_nonfinite_items`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F

from accessory.data.batches import IGNORED, Batch
from accessory.train.trainer import Trainer

ROWS = 1024  # of logits widened to fp32 at a time
MANY = 64  # suspects: where there are more, it is not the items


def trace_nonfinite_items(trainer: Trainer, batches: Sequence[Batch], alone: Callable[[int], Batch]) -> list[int]:
    """Items of any rank's micro-batches of a step in which a learnt token's loss is NaN or infinite, in order.

    Empty where only gradients are not finite. Every rank calls it; `alone` gives an item in a batch of its own.
    """
    found = sorted({item for batch in batches for item in _at_fault(trainer, batch)})
    if trainer.mesh.all is not None:
        everyone: list[list[int]] = [[] for _ in range(trainer.mesh.all.size)]
        dist.all_gather_object(everyone, found, group=trainer.mesh.all.group)
        found = sorted({item for items in everyone for item in items})
    if len(found) > MANY:
        return found
    # A mask hides documents of a row from one another, but 0 · NaN is NaN: each suspect is asked alone. All ranks ask
    # the same ones, so none of them waits for another.
    return [item for item in found if _at_fault(trainer, alone(item))] or found


@torch.no_grad()
def _at_fault(trainer: Trainer, batch: Batch) -> list[int]:
    labels = batch.labels_BT.flatten()
    rows_N = (labels != IGNORED).nonzero().squeeze(1)
    logits_NV = trainer._forward(batch, rows_N, statistics=False).logits
    label_N = labels[rows_N].to(logits_NV.device)
    loss_N = torch.cat(
        [
            F.cross_entropy(logits_NV[i : i + ROWS].float(), label_N[i : i + ROWS], reduction="none")
            for i in range(0, len(label_N), ROWS)
        ]
        or [logits_NV.new_zeros(0)]
    )
    bad = rows_N[~loss_N.isfinite().cpu()]
    T = batch.tokens_BT.shape[1]
    # `items` goes through the rows, and through the documents of each: a row's first one stands behind all before it.
    documents_B = batch.documents_BT.where(batch.counted_BT, -1).amax(1) + 1
    first_B = documents_B.cumsum(0) - documents_B
    return [batch.items[int(first_B[i // T] + batch.documents_BT.flatten()[i])] for i in bad.tolist()]
