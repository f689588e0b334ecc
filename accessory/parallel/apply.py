"""Cuts a network for this rank and adds the collectives. The layers themselves compute on local tensors.

Collectives are at three places only. The outputs of embedding and head are gathered; for a loss, three numbers a row
instead of the head's. The outputs of attention and of the experts are summed: two all-reduces a layer. Of data-parallel
ranks, those that share rows gather their keys and values, and those with different experts exchange tokens.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from accessory.config import Implementation, ModelArgs
from accessory.nn.attention import Attention
from accessory.nn.decoder import Decoder
from accessory.nn.experts import StackedExperts
from accessory.nn.linear import RMSNorm
from accessory.nn.moe import MoE
from accessory.ops.cross_entropy import VocabularyPart
from accessory.parallel import sharding
from accessory.parallel.collectives import (
    begin_sum,
    copy_to_ranks,
    gather_from_ranks,
    reduce_from_ranks,
    stack_from_ranks,
)
from accessory.parallel.experts import compute_at_owners
from accessory.parallel.mesh import Ranks
from accessory.parallel.symmetric import exchange

log = logging.getLogger(__name__)


def parallelize(decoder: Decoder, ranks: Ranks) -> Decoder:
    """Replace a decoder's (empty) parameters by this rank's slices, in place, and add hooks for the collectives.

    Raises ConfigError with the field and both numbers where a size cannot be cut. If attention's heads cannot be cut,
    every rank computes the whole attention, and the first rank logs a warning.
    """
    args, implementation = decoder.args, decoder.implementation
    sharding.check_ranks(args, implementation, ranks.size)
    mode = sharding.attention_mode(args, ranks.size)
    if mode == "whole" and ranks.rank == 0:
        log.warning(
            "attention is computed whole on each of %d ranks: n_heads = %d and n_kv_heads = %d cannot be cut so",
            ranks.size, args.n_heads, args.n_kv_heads,
        )  # fmt: skip
    for name, module in decoder.named_modules():
        for kind, parameter in list(module.named_parameters(recurse=False)):
            whole, full = tuple(parameter.shape), f"{name}.{kind}" if name else kind
            offsets, shape = local_part(full, whole, args, implementation, ranks.rank, ranks.size)
            decoder.local_shards[full] = (whole, offsets)
            _cut(module, kind, shape)
        if isinstance(module, StackedExperts):
            if implementation == "base":
                module.first = ranks.rank * args.moe.num_experts // ranks.size
            elif ranks.rank > 0:
                module.bias_factor = 0.0  # the sum over ranks must contain w2's bias once
        elif isinstance(module, Attention) and mode != "whole" and ranks.rank > 0:
            module.wo.bias_factor = 0.0
    _hook(decoder, ranks, attention_is_cut=mode != "whole")
    return decoder


def _cut(module: nn.Module, kind: str, shape: tuple[int, ...]) -> None:
    parameter = module.get_parameter(kind)
    if parameter.shape != shape:
        empty = torch.empty(shape, dtype=parameter.dtype, device=parameter.device)
        module.register_parameter(kind, nn.Parameter(empty, requires_grad=parameter.requires_grad))


def spread_experts(decoder: Decoder, ranks: Ranks) -> None:
    """Keep this rank's whole experts of each layer, in place, and let tokens go to their experts' ranks and back.

    Experts are dealt out as model-parallel ranks of base have them, in either implementation. ConfigError where the
    ranks do not divide them.
    """

    def as_sent(module: StackedExperts, _inputs: Any, output: Tensor) -> Tensor:
        # Results are rounded to the compute dtype already, so the cast loses nothing.
        return output.to(module.products_in)

    count = decoder.args.moe.num_experts
    for name, module in decoder.named_modules():
        if isinstance(module, MoE):
            module.compute_at(partial(compute_at_owners, ranks=ranks, count=count))
        if isinstance(module, StackedExperts):
            module.register_forward_hook(as_sent)
            for kind, parameter in list(module.named_parameters(recurse=False)):
                whole, full = tuple(parameter.shape), f"{name}.{kind}"
                offsets, shape = local_part(full, whole, decoder.args, "base", ranks.rank, ranks.size)
                decoder.local_shards[full] = (whole, offsets)
                _cut(module, kind, shape)


def share_rows(decoder: Decoder, ranks: Ranks) -> None:
    """Let attention gather the keys and values of the ranks that share each row (`ops.shared_rows`)."""

    def gathered(x_BTGd: Tensor) -> Tensor:
        return stack_from_ranks(x_BTGd, ranks).movedim(0, 1).flatten(1, 2)

    for module in decoder.modules():
        if isinstance(module, Attention):
            module.gather_tokens = gathered


def local_part(
    name: str, whole: tuple[int, ...], args: ModelArgs, implementation: Implementation, rank: int, world: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(offsets, sizes) of `rank`'s slice of a network's parameter `name`. Its uncut shape is `whole`; stacked experts
    are the first dimension."""
    if sharding.expert_tensor(name, 0) is None:
        return _box(sharding.rank_part(name, whole, args, implementation, rank, world), whole)
    boxes = {}
    for e in range(whole[0]):
        part = sharding.rank_part(str(sharding.expert_tensor(name, e)), whole[1:], args, implementation, rank, world)
        if part is not None:
            boxes[e] = _box(part, whole[1:])
    offsets, sizes = next(iter(boxes.values()))
    return (min(boxes), *offsets), (len(boxes), *sizes)


def _box(part: sharding.Slice | None, whole: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    assert part is not None, "only experts can live on other ranks alone"
    offsets, sizes = [0] * len(whole), list(whole)
    if part.dim is not None:
        offsets[part.dim], sizes[part.dim] = part.start, part.length
    return tuple(offsets), tuple(sizes)


def _hook(decoder: Decoder, ranks: Ranks, attention_is_cut: bool) -> None:
    def gathered(output: Tensor) -> Tensor:
        return gather_from_ranks(output, ranks)

    def stacked(part: Tensor) -> Tensor:
        return stack_from_ranks(part, ranks)

    def reduced_before(norm: RMSNorm | None) -> Callable[[nn.Module, Any, Tensor], Tensor]:
        """A hook that sums an output over ranks, unless the norm that comes next does."""

        def reduced(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
            if norm is not None and output.is_cuda and not torch.is_grad_enabled():
                norm.exchange = exchange(ranks, output.device, decoder.args.dim)  # made in the first step
                if norm.exchange_of(output) is not None:
                    return output
            # Training sends half the bytes, as it does with the gradients that come back.
            wire = decoder.products_in if torch.is_grad_enabled() else torch.float32
            return reduce_from_ranks(output, ranks, wire)

        return reduced

    def copy_first(_module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return (copy_to_ranks(inputs[0], ranks), *inputs[1:])

    def copy_to_attention(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        assert isinstance(module, Attention)
        return inputs if module.projects_together else copy_first(module, inputs)

    def copy_to_experts(_module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        # Each rank computes only its experts' part of the routing weights' gradient. That of x they sum themselves.
        x_TD, weight_TK, *rest = inputs
        return x_TD, copy_to_ranks(weight_TK, ranks), *rest

    decoder.tok_embeddings.register_forward_hook(lambda _module, _inputs, output: gathered(output))
    decoder.output.register_forward_pre_hook(copy_first)
    _, (first, _) = decoder.local_shards["output.weight"]
    decoder.vocabulary = VocabularyPart(first, decoder.output.weight.shape[0], stacked)
    decoder.gather_logits = gathered
    layers: list[Any] = list(decoder.layers)
    # The last norm sees some rows only, so the sum before it stands alone.
    for layer, norm in zip(layers, [*(layer.attention_norm for layer in layers[1:]), None], strict=True):
        layer.feed_forward.experts.sum_over_ranks = partial(begin_sum, ranks=ranks)
        layer.feed_forward.experts.register_forward_pre_hook(copy_to_experts)
        layer.feed_forward.experts.register_forward_hook(reduced_before(norm))
        if attention_is_cut:
            layer.attention.sum_over_ranks = partial(begin_sum, ranks=ranks)
            layer.attention.register_forward_pre_hook(copy_to_attention)
            layer.attention.register_forward_hook(reduced_before(layer.ffn_norm))
