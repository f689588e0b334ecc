"""The local shards of a network: for each parameter, this process's tensor and its place in the uncut tensor.

Model parallelism cuts a parameter as `sharding` says; data parallelism (`sharded`) cuts the result again. Loading,
saving and counting use local shards and need not know how a parameter was cut.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from accessory.nn.decoder import Decoder
from accessory.nn.experts import StackedExperts
from accessory.nn.linear import PackedWeight
from accessory.parallel.sharding import expert_tensor


@dataclass(frozen=True)
class LocalShard:
    """`tensor` is the part of shape `tensor.shape` at `offsets` of parameter (or canonical tensor) `name`."""

    name: str
    whole: tuple[int, ...]  # the shape of the uncut tensor
    offsets: tuple[int, ...]
    tensor: Any  # Tensor; for a quantised weight Packed, whose shape is that of the dequantised weight


def is_sharded(tensor: Tensor) -> bool:
    """Whether data-parallel ranks have parts of a tensor. Then it is a `DTensor`.

    torch takes a second to import that class. So only `parallel.sharded` does, which makes such tensors.
    """
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor, without gradients. torch counts writes to it as writes to the tensor's part."""
    if is_sharded(tensor):
        with torch.no_grad():
            tensor = tensor.to_local()  # type: ignore[attr-defined]
    return tensor.detach()


def local_parameters(decoder: nn.Module) -> Iterator[LocalShard]:
    """The local shard of every parameter, with stacked experts. A quantised weight is one `Packed`. Shards may be
    empty."""
    cuts = decoder.local_shards if isinstance(decoder, Decoder) else {}
    packed = {name: m for name, m in decoder.named_modules() if isinstance(m, PackedWeight)}
    for name, m in packed.items():
        shape, data = tuple(m.shape), m.get_parameter("data")
        whole, offsets = cuts.get(name, (shape, (0,) * len(shape)))
        # Experts or rows are cut, and all tensors of a weight in the same way: see `fsdp.apply_fsdp`.
        yield LocalShard(name, whole, _plus(offsets, _data_parallel_offsets(data)), m.packed().map(local))
    for name, parameter in decoder.named_parameters():
        if name.rpartition(".")[0] in packed:
            continue
        shape = tuple(parameter.shape)
        whole, offsets = cuts.get(name, (shape, (0,) * len(shape)))
        yield LocalShard(name, whole, _plus(offsets, _data_parallel_offsets(parameter)), local(parameter))


def shard_like(shard: LocalShard, tensor: Tensor) -> LocalShard:
    """The same shard of a tensor with the parameter's shape and cuts: a gradient or an optimiser's moment.

    Or of a tensor with one number for several of a row: the scales of a moment in 8 bits.
    """
    part = local(tensor)
    if part.shape == shard.tensor.shape:
        return LocalShard(shard.name, shard.whole, shard.offsets, part)
    several = shard.tensor.shape[-1] // part.shape[-1]
    whole = (*shard.whole[:-1], shard.whole[-1] // several)
    return LocalShard(shard.name, whole, (*shard.offsets[:-1], shard.offsets[-1] // several), part)


def local_tensors(decoder: nn.Module) -> Iterator[LocalShard]:
    """The local shard of every canonical tensor of which this process has a part. Stacks are split into experts."""
    for shard in local_parameters(decoder):
        if expert_tensor(shard.name, 0) is None:
            yield shard
            continue
        stack = decoder.get_submodule(shard.name.rpartition(".")[0])
        # An uncut stack may still begin at a later expert, where a module was made for only some experts.
        first = stack.first if isinstance(stack, StackedExperts) and shard.offsets[0] == 0 else shard.offsets[0]
        for e in range(shard.tensor.shape[0]):
            yield LocalShard(
                str(expert_tensor(shard.name, first + e)), shard.whole[1:], shard.offsets[1:], shard.tensor[e]
            )


def _plus(a: tuple[int, ...], b: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(x + y for x, y in zip(a, b, strict=True))


def _data_parallel_offsets(parameter: Tensor) -> tuple[int, ...]:
    """The offsets of this rank's slice. One dimension is cut into equal parts."""
    offsets = [0] * parameter.dim()
    if is_sharded(parameter):
        (placement,), mesh = parameter.placements, parameter.device_mesh  # type: ignore[attr-defined]
        offsets[placement.dim] = mesh.get_local_rank() * parameter.shape[placement.dim] // mesh.size()
    return tuple(offsets)
