"""Sums over GPUs of one host through memory that all of them can address (torch's symmetric memory).

A small sum is all latency. Here a rank reads the other ranks' parts itself: 8 µs for a token's activations on two
H100s, where NCCL takes 18. Larger sums, ranks of several hosts and GPUs that cannot address one another take NCCL.

Legend: N numbers.
"""

from __future__ import annotations

import logging
import socket
from functools import cache

import torch
import torch.distributed as dist
from torch import Tensor

from accessory.limits import EXCHANGED_DIM, EXCHANGED_NUMBERS, ONE_SHOT_NUMBERS, TWO_SHOT_NUMBERS
from accessory.ops.machine import has_triton
from accessory.ops.norm import Exchange
from accessory.parallel.mesh import Ranks

log = logging.getLogger(__name__)


class SymmetricSum:
    """The buffer through which one group of ranks sums. All ranks make it, and use it in the same order.

    one_shot: every rank reads all parts. two_shot: every rank sums a slice, then all read the slices; from some size on
    that is the quicker way.
    """

    def __init__(self, ranks: Ranks, device: torch.device) -> None:
        import torch.distributed._symmetric_memory as symmetric_memory

        self._buffer_N = symmetric_memory.empty(TWO_SHOT_NUMBERS, dtype=torch.float32, device=device)
        symmetric_memory.rendezvous(self._buffer_N, ranks.group)
        self._name = ranks.group.group_name

    def __call__(self, part: Tensor, one_shot: bool = False) -> Tensor:
        """The sum of the ranks' parts (N ≤ `TWO_SHOT_NUMBERS` fp32 numbers), in a tensor of its own.

        one_shot: in this way for any N; by default for few numbers.
        """
        buffer_N = self._buffer_N[: part.numel()]
        buffer_N.copy_(part.reshape(-1))
        if one_shot or part.numel() <= ONE_SHOT_NUMBERS:
            return torch.ops.symm_mem.one_shot_all_reduce(buffer_N, "sum", self._name).view(part.shape)
        torch.ops.symm_mem.two_shot_all_reduce_(buffer_N, "sum", self._name)
        return buffer_N.clone().view(part.shape)


@cache
def exchange(ranks: Ranks, device: torch.device, dim: int) -> Exchange | None:
    """What sums a layer's output in the next norm's launch; None where it cannot. All ranks must ask."""
    if symmetric_sum(ranks, device) is None or not has_triton() or dim > EXCHANGED_DIM:
        return None
    import torch.distributed._symmetric_memory as symmetric_memory

    rows = max(1, EXCHANGED_NUMBERS // (dim * (ranks.size - 1)))
    words = symmetric_memory.empty(2 * ranks.size * rows * dim, dtype=torch.int64, device=device)
    handle = symmetric_memory.rendezvous(words, ranks.group)
    words.zero_()  # the first turn is 1
    torch.cuda.synchronize(device)
    dist.barrier(group=ranks.group, device_ids=[device.index])
    inbox_W = torch.tensor(handle.buffer_ptrs, dtype=torch.int64, device=device)
    turn_T = torch.zeros(rows, dtype=torch.int32, device=device)
    return Exchange(inbox_W, turn_T, ranks.rank, ranks.size, rows, dim, words)


@cache
def symmetric_sum(ranks: Ranks, device: torch.device) -> SymmetricSum | None:
    """The `SymmetricSum` of a group, or None where its GPUs cannot address one another. All ranks must ask."""
    there: list[tuple[str, bool] | None] = [None] * ranks.size
    dist.all_gather_object(there, (socket.gethostname(), _reaches_peers(device)), group=ranks.group)
    if len({host for host, _ in there}) > 1 or not all(reaches for _, reaches in there):  # type: ignore[misc]
        return None
    try:
        made = SymmetricSum(ranks, device)
    except (RuntimeError, ImportError) as error:
        log.info("sums over ranks take NCCL: %s", error)
        made = None
    works = torch.tensor(made is not None, device=device, dtype=torch.int32)
    dist.all_reduce(works, op=dist.ReduceOp.MIN, group=ranks.group)
    return made if works.item() else None


def _reaches_peers(device: torch.device) -> bool:
    others = [n for n in range(torch.cuda.device_count()) if n != device.index]
    return all(torch.cuda.can_device_access_peer(device, n) for n in others)
