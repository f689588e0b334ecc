"""Stand named adapters beside a network that is built: each token of a batch takes one of them, or none.

An adapter's folder holds LoRA pairs and biases, and norms and routers in place of the model's. Each rank reads and
holds its local shards of them, cut as they are where an adapter is part of the network.

Legend: E experts, D dim.
"""

from __future__ import annotations

from dataclasses import replace
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor, nn

from accessory.build.network import NetworkSpec, outline
from accessory.checkpoint.chain import chained_args
from accessory.checkpoint.folder import Checkpoint
from accessory.checkpoint.hashing import digest_all, model_hash
from accessory.checkpoint.load import fill
from accessory.checkpoint.names import companion_of
from accessory.errors import CheckpointError, listed
from accessory.nn.decoder import Decoder
from accessory.nn.experts import StackedExperts
from accessory.nn.linear import Linear, RMSNorm
from accessory.ops.linear import LinearAdapter
from accessory.parallel.apply import parallelize
from accessory.parallel.mesh import DeviceMesh
from accessory.parallel.sharding import expert_tensor

_REPLACED = ("norm.weight", ".feed_forward.gate.weight")  # what an adapter may have in place of the model's own


def check_adapters(spec: NetworkSpec) -> None:
    """Raise CheckpointError, before any weight is read, for adapters that cannot stand beside their network."""
    if spec.adapters and (own := [n for c in spec.checkpoints for n in c.tensors if n.endswith(".lora_a.weight")]):
        where = next(c.path for c in reversed(spec.checkpoints) if own[0] in c.tensors)
        raise CheckpointError(
            f"{where}: has a LoRA adapter itself, so no named adapters can stand beside it; merge it (`accessory "
            "merge`), or give it as one of them"
        )
    for checkpoint in spec.adapters.values():
        whole = [n for n in checkpoint.tensors if companion_of(n) is None and not n.endswith(_REPLACED)]
        if whole:
            raise CheckpointError(
                f"{checkpoint.path}: {len(whole)} of its tensors replace the model's ({listed(sorted(whole))}); an "
                "adapter that requests name may have LoRA, biases, norms and routers; load this one over the model"
            )
        outline(_with(spec, checkpoint))


def stand_adapters(
    decoder: Decoder, spec: NetworkSpec, mesh: DeviceMesh | None = None, *, dtype: torch.dtype = torch.bfloat16
) -> None:
    """Stand the adapters of `spec` beside the weights of `decoder`, which was built from it. Their numbers are in the
    order of their names there.

    Raises CheckpointError for what does not fit the network.
    """
    if not spec.adapters:
        return
    twins = [_load(decoder, _with(spec, adapter), mesh or DeviceMesh(), dtype) for adapter in spec.adapters.values()]
    for name, module in decoder.named_modules():
        if not isinstance(module, StackedExperts | Linear | RMSNorm):
            continue
        parts: list[Any] = [twin.get_submodule(name) for twin in twins]
        if isinstance(module, StackedExperts):
            for kind in ("w1", "w2", "w3"):
                module.set_adapters(kind, [_stack_part(module, part, kind) for part in parts])
        elif isinstance(module, Linear):
            module.set_adapters([_linear_part(module, part) for part in parts])
        else:
            module.set_adapters([_held(part.weight) for part in parts])
    decoder.adapters = len(twins)


def adapter_roots(spec: NetworkSpec) -> dict[str, bytes]:
    """A digest of each adapter's content, by its name: with another one, a token has other keys and values."""
    roots = {}
    for name, checkpoint in spec.adapters.items():
        content = f"{model_hash(digest_all(checkpoint.tensors, progress=False))} {checkpoint.args.lora_scale!r}"
        roots[name] = blake2b(content.encode(), digest_size=16).digest()
    return roots


def _with(spec: NetworkSpec, adapter: Checkpoint) -> NetworkSpec:
    """The network as it is with this adapter as a part of it."""
    chain = [*spec.checkpoints, adapter]
    return replace(spec, checkpoints=chain, adapters={}, args=chained_args(chain), quant=None)


def _load(decoder: Decoder, spec: NetworkSpec, mesh: DeviceMesh, dtype: torch.dtype) -> Decoder:
    """The network of `spec` on the meta device, but for what its last checkpoint holds: that is loaded.

    Names, casts and cuts are thus those of `build`.
    """
    twin, tensors = outline(spec, dtype=dtype)
    if mesh.model is not None and mesh.model.size > 1:
        parallelize(twin, mesh.model)
    given, experts = spec.checkpoints[-1].tensors.keys(), spec.args.moe.num_experts
    for name, parameter in list(twin.named_parameters()):
        stacked = {str(expert_tensor(name, e)) for e in range(experts)} if expert_tensor(name, 0) else {name}
        if stacked & given:
            path, _, kind = name.rpartition(".")
            empty = torch.empty_like(parameter, device=decoder.tok_embeddings.weight.device)
            twin.get_submodule(path).register_parameter(kind, nn.Parameter(empty, requires_grad=False))
    fill(twin, tensors)
    return twin


def _held(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None or tensor.is_meta else tensor.detach()


def _linear_part(own: Linear, twin: Linear) -> LinearAdapter:
    """What an adapter adds to the linear `own`, which is `twin` in the adapter's network."""
    a = None if twin.lora_a is None else _held(twin.lora_a.weight)
    b = None if twin.lora_b is None else _held(twin.lora_b.weight)
    scale = twin.lora_scale
    if (weight_ED := _held(twin.weight)) is not None:
        # A router of its own: the difference has no more rows than there are experts, so it is a LoRA pair (I, W - W₀).
        delta_ED, one_EE = weight_ED - own.weight, torch.eye(len(weight_ED), device=weight_ED.device)
        if a is not None and b is not None:
            delta_ED, one_EE = torch.cat([scale * a, delta_ED]), torch.cat([b, one_EE], 1)
        a, b, scale = delta_ED, one_EE, 1.0
    bias = _bias_part(own.bias, own.bias_factor, twin.bias, twin.bias_factor)
    return LinearAdapter(a, b, scale, bias)


def _stack_part(own: StackedExperts, twin: StackedExperts, kind: str) -> LinearAdapter:
    """What an adapter adds to the stack `kind` of `own`, which is `twin` in the adapter's network."""
    factors = (own.bias_factor, twin.bias_factor) if kind == "w2" else (1.0, 1.0)
    bias = _bias_part(getattr(own, f"{kind}_bias"), factors[0], getattr(twin, f"{kind}_bias"), factors[1])
    a, b = (_held(getattr(twin, f"{kind}_{part}")) for part in ("lora_a", "lora_b"))
    return LinearAdapter(a, b, twin.lora_scale, bias)


def _bias_part(own: Tensor | None, own_factor: float, twin: Tensor | None, twin_factor: float) -> Tensor | None:
    """What an adapter's bias adds to the module's own."""
    if (bias := _held(twin)) is None:
        return None
    return bias * twin_factor if own is None else bias * twin_factor - own.detach() * own_factor
