"""Data parallelism: `sharded` on one dimension of a mesh, the model-parallel cuts of `sharding` on the other.

`sharding` cuts a parameter first; `sharded` then cuts this rank's slice again. So the layers compute on plain local
tensors, and each kind of cut has its own collectives. Norms and routers are fp32 and small. They are not sharded, and
their gradients are summed at the end of a step. Experts that are spread over ranks are sharded over those ranks alone
that have the same ones.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from accessory.nn.decoder import Decoder
from accessory.nn.experts import StackedExperts
from accessory.nn.linear import PackedWeight, RMSNorm
from accessory.ops.gradient_squares import squares_of_gradient
from accessory.parallel.local_shard import is_sharded, local
from accessory.parallel.mesh import DeviceMesh
from accessory.parallel.sharding import expert_tensor, gradient_sharers

DataParallel = Literal["sdp", "fsdp"]
_FLAT = 2**24  # the most numbers in one all-reduce of many tensors
_NORMED = 2**16  # the numbers whose norm is taken at once on a CPU


def apply_fsdp(
    decoder: Decoder,
    mesh: DeviceMesh,
    mode: DataParallel,
    compute_dtype: torch.dtype,
    gradient_dtype: torch.dtype = torch.float32,
) -> None:
    """Cut a network's parameters (on the meta device or filled) over the data-parallel ranks.

    sdp: trained parameters are sharded, with their gradients and optimiser states, and stay whole from forward to
    backward; frozen parameters are not sharded. Adapters are small, so every rank has them whole, and nothing is
    gathered. fsdp: all parameters are sharded, and are whole only while a layer runs. gradient_dtype: in which
    gradients add up over micro-batches. Over ranks they are summed in bf16 where products run in bf16.
    """
    if mesh.data is None or (mode == "sdp" and mesh.experts is None and _adapters_alone(decoder)):
        return
    from accessory.parallel.sharded import ShardedChain, ShardedLayer, ShardedParameter  # takes a second

    alone = _small(decoder)
    if mode == "sdp":
        alone |= {p for p in decoder.parameters() if not p.requires_grad}
    of_experts = {p for m in decoder.modules() if isinstance(m, StackedExperts) for p in m.parameters()}
    if mesh.experts is not None and mesh.experts_mesh is None:  # no other rank has them
        alone |= of_experts

    def sharded(module: nn.Module) -> list[ShardedParameter]:
        found = []
        for owner in module.modules():
            # The numbers of a quantised weight are not cast, and a rank has the scales of its rows.
            packed = isinstance(owner, PackedWeight)
            for kind, p in list(owner.named_parameters(recurse=False)):
                over = (mesh.experts_mesh if p in of_experts else None) or mesh.fsdp_mesh
                dim = None if p in alone or is_sharded(p) else _dimension(p, over.size())
                if dim is not None:
                    dtype = p.dtype if packed else compute_dtype
                    found.append(ShardedParameter(owner, kind, over, dim, dtype, gradient_dtype))
        return found

    layers = [ShardedLayer(layer, sharded(layer)) for layer in decoder.layers]
    chain = ShardedChain(ShardedLayer(decoder, sharded(decoder)), layers, reshard_after_forward=mode == "fsdp")
    decoder.parameter_moved = chain.moved


def _dimension(p: Tensor, ranks: int) -> int | None:
    """The dimension along which a parameter is cut: the first one that the ranks divide. None: it stays whole.

    In the base implementation a rank may have a single expert. The cut is then inside the expert.
    """
    return next((d for d in range(p.dim()) if p.shape[d] % ranks == 0), None)


def _adapters_alone(decoder: Decoder) -> bool:
    """Whether nothing is trained but adapters, norms and routers."""
    small = _small(decoder)
    trained = [(name, p) for name, p in decoder.named_parameters() if p.requires_grad]
    return all("lora_" in name or name.endswith("bias") or p in small for name, p in trained)


def _small(decoder: Decoder) -> set[nn.Parameter]:
    """Norms, routers, and the embeddings that begin and end an image. They are fp32, with their gradients."""
    small = {p for m in decoder.modules() if isinstance(m, RMSNorm | nn.LayerNorm) for p in m.parameters()}
    small |= {p for name, p in decoder.named_parameters() if name.endswith("_img")}
    return small | {p for name, m in decoder.named_modules() if name.endswith(".gate") for p in m.parameters()}


def keep_gradients_in(decoder: Decoder, dtype: torch.dtype) -> None:
    """Have the gradients of all but small parameters in `dtype`. Call it when parameters have their place in memory.

    autograd casts a plain parameter's gradient by itself. A sharded one gets it in the dtype in which it was summed.
    """
    small = _small(decoder)
    for p in decoder.parameters():
        if p.requires_grad and p not in small:
            if is_sharded(p):
                p.grad_dtype = None
            elif dtype != torch.float32:
                p.grad_dtype = dtype


def finish_gradients(decoder: Decoder, mesh: DeviceMesh) -> None:
    """Complete the gradients after backward.

    Gradients of parameters that are not sharded are summed over data ranks, unless an expert is spread, which has met
    the tokens of all ranks. Gradients of which each model rank has a part are summed over model ranks. A trained
    parameter that the step did not use gets a zero gradient, so that no rank waits for another.
    """
    alone, partial = [], []
    for name, p in decoder.named_parameters():
        if not p.requires_grad:
            continue
        if p.grad is None:
            p.grad = torch.zeros_like(p, dtype=p.grad_dtype)
        if mesh.data is not None and not is_sharded(p) and not is_spread(name, mesh):
            alone.append(local(p.grad))
        if mesh.model is not None and sharers(decoder, name, mesh) > 1:
            partial.append((local(p.grad), sharers(decoder, name, mesh)))
    if mesh.data is not None:
        for flat, parts in _flattened(alone):
            dist.all_reduce(flat, group=mesh.data.group)
            _scatter(flat, parts)
    if mesh.model is not None:
        world, rank = mesh.model.size, mesh.model.rank
        for flat, parts in _flattened([g for g, n in partial if n == world]):
            dist.all_reduce(flat, group=mesh.model.group)
            _scatter(flat, parts)
        for grad, n in ((g, n) for g, n in partial if n < world):  # key/value heads: small, and rarely shared by ranks
            grads = [torch.empty_like(grad) for _ in range(world)]
            dist.all_gather(grads, grad.contiguous(), group=mesh.model.group)
            first = rank // n * n
            grad.copy_(torch.stack(grads[first : first + n]).sum(0))


def is_spread(name: str, mesh: DeviceMesh) -> bool:
    """Whether parameter `name` is of experts of which other data-parallel ranks have others."""
    return mesh.experts is not None and expert_tensor(name, 0) is not None


def sharers(decoder: Decoder, name: str, mesh: DeviceMesh) -> int:
    """`sharding.gradient_sharers` for a parameter's name in the network (experts stacked)."""
    canonical = expert_tensor(name, 0) or name
    return gradient_sharers(canonical, decoder.args, decoder.implementation, mesh.model_size)


def squared_norm(decoder: Decoder, mesh: DeviceMesh) -> Tensor:
    """The sum of squares of all gradients, () fp32, on all ranks. A number with copies on several ranks counts once.

    DTensor cannot add parts of different meshes, and a plain sum over all ranks would count copies.
    """
    device = next(decoder.parameters()).device
    alike: dict[tuple[int, torch.dtype], list[Tensor]] = {}  # by copies and dtype
    total = torch.zeros((), device=device, dtype=torch.float32)
    for parameter_name, p in decoder.named_parameters():
        if p.grad is None or not local(p.grad).numel():
            continue
        copies = 1
        if mesh.data is not None and not is_sharded(p) and not is_spread(parameter_name, mesh):
            copies *= mesh.data.size
        if mesh.model is not None:
            copies *= model_copies(decoder, parameter_name, mesh)
        known = squares_of_gradient(p)
        if known is not None:
            total += known / copies
        else:
            alike.setdefault((copies, p.grad.dtype), []).append(local(p.grad))
    for (copies, _), grads in alike.items():
        if device.type == "cpu":  # where torch adds up a tensor's squares in turn, and loses digits of a long sum
            grads = [part for grad in grads for part in grad.flatten().split(_NORMED)]
        norms = torch._foreach_norm(grads, 2, dtype=torch.float32)  # makes no fp32 copies of the gradients
        total += torch.stack(norms).square().sum() / copies
    return mesh.sum_over_all(total)


def model_copies(decoder: Decoder, name: str, mesh: DeviceMesh) -> int:
    """The number of model-parallel ranks that have the same part of a parameter."""
    whole, _ = decoder.local_shards[name]
    return mesh.model_size * decoder.get_parameter(name).numel() // math.prod(whole)


def _flattened(tensors: Iterable[Tensor]) -> Iterable[tuple[Tensor, list[Tensor]]]:
    """Concatenate tensors into flat vectors of about `_FLAT` numbers: many small tensors then need one collective."""
    batch: list[Tensor] = []
    size = 0
    for tensor in tensors:
        if batch and size + tensor.numel() > _FLAT:
            yield torch.cat([t.flatten() for t in batch]), batch
            batch, size = [], 0
        batch.append(tensor)
        size += tensor.numel()
    if batch:
        yield torch.cat([t.flatten() for t in batch]), batch


def _scatter(flat: Tensor, parts: list[Tensor]) -> None:
    for part, values in zip(parts, flat.split([p.numel() for p in parts]), strict=True):
        part.copy_(values.view_as(part))
