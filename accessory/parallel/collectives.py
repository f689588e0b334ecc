"""The collectives between model-parallel ranks, with their gradients.

`copy_to_ranks`: all ranks have the same tensor, and each continues with its part of the network; gradients are summed.
Where an operation has its input's gradient before its weights', it may `begin_sum` of it itself.
`reduce_from_ranks`: each rank has a part of a sum; values are summed. `gather_from_ranks`: each rank has a slice;
slices are concatenated. The first two are Megatron-LM's f and g (arXiv 1909.08053).

Between data-parallel ranks: `stack_from_ranks`: each rank has its own tensor and needs those of all. `exchange_rows`:
each rank has rows for each other one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from accessory.limits import TWO_SHOT_NUMBERS
from accessory.ops import dispatch
from accessory.parallel.mesh import Ranks
from accessory.parallel.symmetric import symmetric_sum

GATHERED_AT_MOST = 2**16  # numbers

# Versions of torch differ in the names of these two.
all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


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
    def forward(ctx: Any, x: Tensor, ranks: Ranks, wire: torch.dtype) -> Tensor:
        ctx.dtype = x.dtype
        if x.is_cuda and x.dtype != wire:  # the cast is a copy already
            total = x.to(wire)
            dist.all_reduce(total, group=ranks.group)
            return total.float()
        total = _total(x.to(wire), ranks)
        return total if x.dtype == wire else total.float()  # what comes next widens it while it reads

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0].to(ctx.dtype), None, None


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


class _StackFromRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks = ranks
        parts = x.new_empty(ranks.size, *x.shape)
        all_gather_single(parts.view(-1), x.reshape(-1), group=ranks.group)
        return parts

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (grad,) = grads
        own = torch.empty(grad.shape[1:], dtype=torch.float32, device=grad.device)
        reduce_scatter_single(own.view(-1), grad.float().reshape(-1), group=ctx.ranks.group)
        return own.to(grad.dtype), None


class _ExchangeRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, sent: list[int], received: list[int], ranks: Ranks) -> Tensor:
        ctx.sent, ctx.received, ctx.ranks = sent, received, ranks
        return _exchanged(x_ND, sent, received, ranks)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return _exchanged(grads[0], ctx.received, ctx.sent, ctx.ranks), None, None, None


def _exchanged(x_ND: Tensor, sent: list[int], received: list[int], ranks: Ranks) -> Tensor:
    y_MD = x_ND.new_empty(sum(received), x_ND.shape[1])
    dist.all_to_all_single(y_MD, x_ND.contiguous(), received, sent, group=ranks.group)
    return y_MD


def _total(x: Tensor, ranks: Ranks) -> Tensor:
    """The sum over ranks. Gloo's all-reduce of a small tensor takes several times as long as its all-gather, so on a
    CPU small tensors are gathered and added up here. On GPUs of one host they are read from the other ranks' memory.

    Where a row's bits must not depend on the others, tensors of any size are summed in these ways, rank after rank.
    NCCL and gloo choose an order by the size, and by a number's place."""
    fixed = bool(dispatch.fixed())
    if x.is_cuda and (fixed or x.numel() <= TWO_SHOT_NUMBERS) and not torch.is_grad_enabled():
        add = symmetric_sum(ranks, x.device)
        if add is not None and fixed:
            return torch.cat([add(part, one_shot=True) for part in x.reshape(-1).split(TWO_SHOT_NUMBERS)]).view(x.shape)
        if add is not None:
            return add(x)
    if not fixed and (x.is_cuda or x.numel() > GATHERED_AT_MOST):
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
    """Return x unchanged. Its gradient is summed over ranks."""
    return _CopyToRanks.apply(x, ranks)


def begin_sum(x: Tensor, ranks: Ranks) -> Callable[[], object]:
    """Begin to sum x over ranks, in place. The function that is returned has what comes next wait for the sum."""
    return dist.all_reduce(x, group=ranks.group, async_op=True).wait


def reduce_from_ranks(x: Tensor, ranks: Ranks, wire: torch.dtype = torch.float32) -> Tensor:
    """The sum of x over ranks, in fp32, or as it was sent where x has the dtype `wire`.

    wire: the dtype in which the ranks' parts are sent and added; with fp32 the number of ranks does not change how sums
    are rounded.
    """
    return _ReduceFromRanks.apply(x, ranks, wire)


def gather_from_ranks(x: Tensor, ranks: Ranks) -> Tensor:
    """Concatenate the ranks' tensors along the last dimension."""
    return _GatherFromRanks.apply(x, ranks)


def stack_from_ranks(x: Tensor, ranks: Ranks) -> Tensor:
    """The tensors of all ranks along a new first dimension. Gradients are summed over ranks in fp32, and each rank gets
    that of its own tensor."""
    return _StackFromRanks.apply(x, ranks)


def exchange_rows(x_ND: Tensor, sent: list[int], received: list[int], ranks: Ranks) -> Tensor:
    """Send the first `sent[0]` rows to the first rank, the next `sent[1]` to the second, and so on: (M, D), the rows
    that the ranks sent here, `received` of each. Gradients go the same way back."""
    return _ExchangeRows.apply(x_ND, sent, received, ranks)


def broadcast(value: Tensor, ranks: Ranks) -> Tensor:
    """Copy the first rank's `value` to every rank, in place."""
    dist.broadcast(value, src=ranks.first, group=ranks.group)
    return value
