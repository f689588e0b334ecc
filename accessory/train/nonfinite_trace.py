"""Which items made a loss that is not finite: `trace_nonfinite_items`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F

from accessory.data.batches import IGNORED, Batch
from accessory.train.trainer import Trainer

POSITIONS = 1024  # whose logits are widened to fp32 at a time
MANY = 64  # where more items are suspects, the fault is not theirs


def trace_nonfinite_items(trainer: Trainer, batches: Sequence[Batch], alone: Callable[[int], Batch]) -> list[int]:
    """The items of a step, on all ranks, that have a learnt token whose loss is NaN or infinite; sorted.

    Empty where only gradients are not finite. Every rank calls it with its own micro-batches; `alone` puts an item into
    a batch of its own.
    """
    found = _on_all_ranks(trainer, {item for batch in batches for item in _at_fault(trainer, batch)})
    if len(found) > MANY:
        return found
    # A mask hides the documents of a row from one another, but 0 · NaN is NaN. So each suspect is tested alone. All
    # ranks test the same items, so that no rank waits for another.
    return _on_all_ranks(trainer, {item for item in found if _at_fault(trainer, alone(item))}) or found


def _on_all_ranks(trainer: Trainer, items: set[int]) -> list[int]:
    if trainer.mesh.all is None:
        return sorted(items)
    everyone: list[set[int]] = [set() for _ in range(trainer.mesh.all.size)]
    dist.all_gather_object(everyone, items, group=trainer.mesh.all.group)
    return sorted(set().union(*everyone))


@torch.no_grad()
def _at_fault(trainer: Trainer, batch: Batch) -> list[int]:
    labels = batch.labels_BT.flatten()
    rows_N = (labels != IGNORED).nonzero().squeeze(1)
    logits_NV = trainer.forward(trainer.inputs(batch), statistics=False, logits=True).logits
    label_N = labels[rows_N].to(logits_NV.device)
    loss_N = torch.cat(
        [
            F.cross_entropy(logits_NV[i : i + POSITIONS].float(), label_N[i : i + POSITIONS], reduction="none")
            for i in range(0, len(label_N), POSITIONS)
        ]
        or [logits_NV.new_zeros(0)]
    )
    bad = rows_N[~loss_N.isfinite().cpu()]
    T = batch.tokens_BT.shape[1]
    # `items` lists the documents row by row: the first one of a row comes after all documents of the rows before it.
    whole = batch.whole or batch
    documents_B = whole.documents_BT.where(whole.counted_BT, -1).amax(1) + 1
    first_B = documents_B.cumsum(0) - documents_B
    return [batch.items[int(first_B[i // T] + batch.documents_BT.flatten()[i])] for i in bad.tolist()]
