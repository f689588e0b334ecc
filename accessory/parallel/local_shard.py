"""What of a network this process holds: each parameter's box in the whole tensor, however often it was cut.

Model parallelism cuts by `plan`, data parallelism (FSDP2) cuts what is left once more. Loading, saving and counting ask
here, and know nothing of either.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from accessory.nn.decoder import Decoder
from accessory.nn.experts import StackedExperts
from accessory.nn.linear import PackedWeight
from accessory.parallel.sharding import expert_tensor


@dataclass(frozen=True)
class LocalShard:
    """`tensor` is the box of `tensor.shape` that begins at `offsets` in parameter (or canonical tensor) `name`."""

    name: str
    whole: tuple[int, ...]  # the shape of the uncut tensor
    offsets: tuple[int, ...]
    tensor: Any  # Tensor; Packed where the weight is quantised, with the shape of what it stands for


def local(tensor: Tensor) -> Tensor:
    """The numbers that lie in this process, without gradients."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def local_parameters(decoder: nn.Module) -> Iterator[LocalShard]:
    """Every weight of the network, experts stacked, quantised ones as what they stand for; a box may be empty."""
    cuts = decoder.local_shards if isinstance(decoder, Decoder) else {}
    packed = {name: m for name, m in decoder.named_modules() if isinstance(m, PackedWeight)}
    for name, m in packed.items():
        shape, data = tuple(m.shape), m.get_parameter("data")
        whole, offsets = cuts.get(name, (shape, (0,) * len(shape)))
        # FSDP2 cuts experts or rows, and all tensors of a weight alike: see `fsdp.apply_fsdp`.
        yield LocalShard(name, whole, _plus(offsets, _data_parallel_offsets(data)), m.packed().map(local))
    for name, parameter in decoder.named_parameters():
        if name.rpartition(".")[0] in packed:
            continue
        shape = tuple(parameter.shape)
        whole, offsets = cuts.get(name, (shape, (0,) * len(shape)))
        yield LocalShard(name, whole, _plus(offsets, _data_parallel_offsets(parameter)), local(parameter))


def shard_like(shard: LocalShard, tensor: Tensor) -> LocalShard:
    """The same box of a tensor that is shaped and cut as the parameter is: a gradient or an optimiser's moment."""
    return LocalShard(shard.name, shard.whole, shard.offsets, local(tensor))


def local_tensors(decoder: nn.Module) -> Iterator[LocalShard]:
    """Every canonical tensor of which something lies here: stacks are taken apart into their experts'."""
    for shard in local_parameters(decoder):
        if expert_tensor(shard.name, 0) is None:
            yield shard
            continue
        stack = decoder.get_submodule(shard.name.rpartition(".")[0])
        # A stack without cuts may still begin at a later expert: a module made for a part of them.
        first = stack.first if isinstance(stack, StackedExperts) and shard.offsets[0] == 0 else shard.offsets[0]
        for e in range(shard.tensor.shape[0]):
            yield LocalShard(
                str(expert_tensor(shard.name, first + e)), shard.whole[1:], shard.offsets[1:], shard.tensor[e]
            )


def _plus(a: tuple[int, ...], b: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(x + y for x, y in zip(a, b, strict=True))


def _data_parallel_offsets(parameter: Tensor) -> tuple[int, ...]:
    """Where FSDP2's slice begins: equal parts of one dimension, rounded up, the last ones short or empty."""
    offsets = [0] * parameter.dim()
    if isinstance(parameter, DTensor):
        (placement,) = parameter.placements
        if isinstance(placement, Shard):
            n, ranks = parameter.shape[placement.dim], parameter.device_mesh.size()
            offsets[placement.dim] = min(n, parameter.device_mesh.get_local_rank() * -(-n // ranks))
    return tuple(offsets)
