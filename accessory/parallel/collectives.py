"""What ranks tell each other, with the gradients that belong to it.

Where a tensor is the same on all ranks and each goes on with a part of the network, gradients add up (`spread`); where
parts of a sum meet, values add up (`reduce`); where slices meet, they are joined (`gather`). Megatron-LM's f and g,
arXiv 1909.08053.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from accessory.parallel.mesh import Ranks

GATHERED_AT_MOST = 2**16  # numbers


class _CopyToRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks = ranks
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        grad = grads[0].contiguous().clone()
        dist.all_reduce(grad, group=ctx.ranks.group)
        return grad, None


class _ReduceFromRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: Ranks) -> Tensor:
        ctx.dtype = x.dtype
        return _total(x.float(), ranks)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0].to(ctx.dtype), None


class _GatherFromRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks, ctx.width = ranks, x.shape[-1]
        parts = [torch.empty_like(x) for _ in range(ranks.size)]
        dist.all_gather(parts, x.contiguous(), group=ranks.group)
        return torch.cat(parts, dim=-1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0].narrow(-1, ctx.ranks.rank * ctx.width, ctx.width).contiguous(), None


def _total(x: Tensor, ranks: Ranks) -> Tensor:
    """One all-reduce. Gloo's takes several times as long as gathering what is small, so a CPU adds up itself."""
    if x.is_cuda or x.numel() > GATHERED_AT_MOST:
        total = x.contiguous().clone()
        dist.all_reduce(total, group=ranks.group)
        return total
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(ranks.size)]
    dist.all_gather(parts, x.contiguous(), group=ranks.group)
    total = parts[0]
    for part in parts[1:]:
        total += part
    return total


def copy_to_ranks(x: Tensor, ranks: Ranks) -> Tensor:
    """x as it is; its gradient is summed over ranks."""
    return _CopyToRanks.apply(x, ranks)


def reduce_from_ranks(x: Tensor, ranks: Ranks) -> Tensor:
    """The sum over ranks, fp32 whatever came in, so that the number of ranks does not change how sums are rounded."""
    return _ReduceFromRanks.apply(x, ranks)


def gather_from_ranks(x: Tensor, ranks: Ranks) -> Tensor:
    """The ranks' tensors side by side along the last dimension."""
    return _GatherFromRanks.apply(x, ranks)


def broadcast(value: Tensor, ranks: Ranks) -> Tensor:
    """The first rank's `value`, on every rank (in place)."""
    dist.broadcast(value, src=ranks.first, group=ranks.group)
    return value
