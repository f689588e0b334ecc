"""`accessory bench --what layer`: the feed-forward of one mixture, without its router; with --backward its training.

Forward and backward are timed as autograd runs them, weights in the products' dtype; the gradients of weights, input
and routing weights are wanted. The memory is then what a pass takes beside weights, inputs and their gradients.

Peers get the same tokens and the same routing: torch's grouped products over sorted rows, and one dense feed-forward
(cuBLAS) over as many rows, which has the same operations and no experts.

Legend: T tokens, K experts a token, N = T·K rows sorted by expert, E experts, D dim, F hidden dim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from accessory.bench import floors
from accessory.bench.card import free, peak_gb, seconds_in_turn, wait
from accessory.bench.figures import Figure
from accessory.bench.job import Job
from accessory.config import Implementation
from accessory.nn.experts import StackedExperts
from accessory.ops.dense_products import sort_by_expert

INPUTS = 4  # that take turns
CALLS, CALLS_MANY, MANY = 32, 4, 1024  # timed together: of few tokens, of at least so many tokens


class Input(NamedTuple):
    x_TD: Tensor
    weight_TK: Tensor
    expert_TK: Tensor


def layer(job: Job, implementation: Implementation, format: str) -> None:
    """Every rank calls it. The sum over ranks counts."""
    args = job.args.replace(n_layers=1, vocab_size=max(16, job.size))
    decoder = job.build(job.spec(format, implementation, args))
    experts = next(m for m in decoder.modules() if isinstance(m, StackedExperts))
    experts.requires_grad_(job.backward and format == "none")
    for T in job.tokens:
        inputs = inputs_of(job, T)
        figure = Figure(who=job.who(implementation, format), what=what_of(job, T), format=format)
        if job.backward:
            figure = _trained(figure, [partial(experts, *i) for i in inputs], list(experts.parameters()), inputs, job)
        else:
            with torch.inference_mode():
                graph = job.device.type == "cuda" and experts.host_free(inputs[0].x_TD, inputs[0].expert_TK, False)
                seconds = _seconds([partial(experts, *i) for i in inputs], job, T, graph)
            note = "" if graph or job.device.type == "cpu" else "no graph"
            figure = replace(figure, seconds=seconds, peak_gb=peak_gb(job.device), note=note)
        job.add(_with_floor(figure, job, T, format, _met(job, inputs, implementation)))
    del decoder, experts
    free(job.device)


def _with_floor(figure: Figure, job: Job, T: int, format: str, met: float) -> Figure:
    """met: the experts whose weights are read. Backward multiplies as often again by each weight, and as often by each
    input where the weight is trained; it reads the weights and writes their gradients."""
    passes = 1 if not job.backward else 3 if format == "none" else 2
    nbytes = passes * floors.layer_bytes(job.args, format, met, job.dtype.itemsize)
    operations = passes * floors.layer_operations(job.args, T) / job.size
    return replace(figure, tokens=T, nbytes=nbytes, operations=operations)


def _trained(
    figure: Figure,
    ways: Sequence[Callable[[], Tensor]],
    parameters: Sequence[Tensor],
    inputs: Sequence[Input],
    job: Job,
) -> Figure:
    """The seconds of forward and backward, and their memory."""
    leaves = [*(p for p in parameters if p.requires_grad), *(t for i in inputs for t in (i.x_TD, i.weight_TK))]

    def both(way: Callable[[], Tensor]) -> None:
        for leaf in leaves:
            leaf.grad = None
        y_TD = way()
        y_TD.backward(torch.ones_like(y_TD))

    for i in inputs:
        i.x_TD.requires_grad_(), i.weight_TK.requires_grad_()
    both(ways[0])
    wait(job.device)
    before = sum(p.nbytes for p in leaves if p.grad is not None)
    for leaf in leaves:
        leaf.grad = None
    free(job.device)
    held = torch.cuda.memory_allocated(job.device) / 1e9 if job.device.type == "cuda" else 0.0
    seconds = seconds_in_turn([partial(both, way) for way in ways], job.device, 2 * len(ways), graph=False)
    peak = peak_gb(job.device)
    return replace(figure, seconds=seconds, peak_gb=None if peak is None else peak - held - before / 1e9)


def what_of(job: Job, tokens: int) -> str:
    return f"layer, {tokens} token{'s' * (tokens > 1)}" + (", and back" if job.backward else "")


def inputs_of(job: Job, T: int) -> list[Input]:
    """Tokens and a random routing, the same on all ranks."""
    args = job.args
    draw = torch.Generator(job.device).manual_seed(T)
    random = partial(torch.rand, device=job.device, generator=draw)
    return [
        Input(
            random(T, args.dim).sub_(0.5).to(job.dtype),
            random(T, args.moe.num_experts_per_tok),
            random(T, args.moe.num_experts).topk(args.moe.num_experts_per_tok)[1],
        )
        for _ in range(INPUTS)
    ]


def _seconds(ways: Sequence[Callable[[], Any]], job: Job, T: int, graph: bool) -> float:
    return seconds_in_turn(ways, job.device, CALLS if T < MANY else CALLS_MANY, graph=graph)


def _met(job: Job, inputs: Sequence[Input], implementation: Implementation) -> float:
    """How many experts' weights a rank reads, on average over the inputs: in base the busiest rank's."""
    E, total = job.args.moe.num_experts, 0.0
    for i in inputs:
        met = set(i.expert_TK.flatten().tolist())
        if implementation == "base" and job.size > 1:
            total += max(sum(e * job.size // E == rank for e in met) for rank in range(job.size))
        else:
            total += len(met) / job.size
    return total / len(inputs)


# --------------------------------------------------------------------------- peers


def grouped_mm(job: Job) -> None:
    """torch's grouped products, and one dense feed-forward over as many rows."""
    E, D, H = job.args.moe.num_experts, job.args.dim, job.args.hidden_dim
    stack = partial(torch.empty, dtype=job.dtype, device=job.device)
    w13, w2 = stack(E, 2 * H, D).normal_(0, 0.02), stack(E, D, H).normal_(0, 0.02)
    for T in job.tokens:
        inputs = inputs_of(job, T)
        for who, what, one, met in (
            ("torch grouped_mm", what_of(job, T), partial(_grouped, w13, w2), _met(job, inputs, "sparse")),
            ("torch dense", f"{what_of(job, T)}, all by one expert", partial(_dense, w13, w2), 1),
        ):
            figure = Figure(who=who, what=what, peer=True)
            ways = [partial(one, *i) for i in inputs]
            try:
                if job.backward:
                    figure = _trained(figure, ways, [w13.requires_grad_(), w2.requires_grad_()], inputs, job)
                else:
                    with torch.inference_mode():
                        figure = replace(figure, seconds=_seconds(ways, job, T, True))
            except Exception as error:  # one line of the table says what could not be measured
                job.add(figure.failed(error))
                continue
            job.add(_with_floor(figure, job, T, "none", met))
    del w13, w2
    free(job.device)


def _grouped(w13: Tensor, w2: Tensor, x_TD: Tensor, weight_TK: Tensor, expert_TK: Tensor) -> Tensor:
    order_N, count_E = sort_by_expert(expert_TK, len(w2))
    end_E = count_E.cumsum(0).to(torch.int32)
    token_N = order_N // expert_TK.shape[1]
    gate, up = F.grouped_mm(x_TD[token_N], w13.transpose(1, 2), offs=end_E).chunk(2, -1)
    y_ND = F.grouped_mm(F.silu(gate) * up, w2.transpose(1, 2), offs=end_E)
    y_ND = y_ND * weight_TK.flatten()[order_N, None].to(y_ND.dtype)
    return torch.zeros_like(x_TD).index_add_(0, token_N, y_ND)


def _dense(w13: Tensor, w2: Tensor, x_TD: Tensor, weight_TK: Tensor, expert_TK: Tensor) -> Tensor:
    gate, up = F.linear(x_TD.repeat(expert_TK.shape[1], 1), w13[0]).chunk(2, -1)
    return F.linear(F.silu(gate) * up, w2[0])
