"""Experts spread over data-parallel ranks: the same training as on one rank, and pairs that go there and back."""

import functools

import pytest
import torch
from helpers.distributed import run_ranks
from helpers.training import close, oracle_tensors, train

from accessory.nn.experts_sparse import SparseExperts
from accessory.ops.routing import route
from accessory.parallel.experts import compute_at_owners
from accessory.parallel.mesh import DeviceMesh, Ranks

LORA = {"lora_rank": 4, "lora_alpha": 8.0, "bias_tuning": True}
IMPLEMENTATIONS = ["base", "sparse"]


@functools.cache
def alone(implementation, lora=False):
    return train(implementation, peft=LORA if lora else None)


# Cases for ranks: sizes and options. Four ranks in groups of two have each expert twice.
TWO = [({"expert_parallel_size": 2}, {}), ({"expert_parallel_size": 2}, {"packed": True, "mode": "fsdp"})]
MORE_OF_TWO = [
    ({"expert_parallel_size": 2}, {"mode": "fsdp", "checkpointing": True}),
    ({"expert_parallel_size": 2}, {"peft": LORA, "packed": True}),
    ({"expert_parallel_size": 2}, {"peft": LORA, "mode": "fsdp"}),
    ({"expert_parallel_size": 2, "context_parallel_size": 2}, {"packed": True}),
]
FOUR = [
    ({"expert_parallel_size": 2}, {}),
    ({"expert_parallel_size": 2}, {"mode": "fsdp", "checkpointing": True}),
    ({"expert_parallel_size": 2}, {"peft": LORA}),
    ({"expert_parallel_size": 2}, {"peft": LORA, "mode": "fsdp"}),
    ({"expert_parallel_size": 4}, {}),
    ({"expert_parallel_size": 4, "context_parallel_size": 2}, {"mode": "fsdp"}),
]


def on_grids(rank, world, cases, tensors):
    import torch.distributed as dist

    out = []
    for sizes, options in cases:
        mesh = DeviceMesh.of(Ranks.of(dist.group.WORLD), 1, "cpu", **sizes)
        out.append([train(i, mesh, tensors=tensors, **options) for i in IMPLEMENTATIONS])
    return out


@pytest.mark.parametrize(
    ("world", "cases"),
    [
        pytest.param(2, TWO, id="2 ranks"),
        pytest.param(2, MORE_OF_TWO, id="2 ranks, more", marks=pytest.mark.slow),
        pytest.param(4, FOUR, id="4 ranks", marks=pytest.mark.long),
    ],
)
def test_spreading_experts_changes_nothing(world, cases):
    """Twenty steps have the losses and gradient norms of one rank."""
    for rank, results in enumerate(run_ranks(on_grids, world, cases, oracle_tensors(), timeout=400)):
        for (sizes, options), losses in zip(cases, results, strict=True):
            for implementation, got in zip(IMPLEMENTATIONS, losses, strict=True):
                try:
                    close(got, alone(implementation, lora="peft" in options))
                except AssertionError as error:
                    raise AssertionError(f"{implementation} on {sizes}, {options}, rank {rank}: {error}") from error


def layer(first, count):
    """Experts `first` … `first + count - 1` of four, which are the same on every rank."""
    experts = SparseExperts(8, 12, 4)
    generator = torch.Generator().manual_seed(5)
    for parameter in experts.parameters():
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)[first : first + count]
    return experts


def tokens_of(rank, chosen):
    """A rank's tokens, routing weights and experts. Every token has two of the first `chosen` experts."""
    generator = torch.Generator().manual_seed(rank)
    x_TD = torch.randn(5 + 3 * rank, 8, generator=generator)
    weight_TK, expert_TK, _ = route(torch.randn(5 + 3 * rank, chosen, generator=generator), 2)
    return x_TD.requires_grad_(), weight_TK.requires_grad_(), expert_TK


def exchanged(rank, world):
    import torch.distributed as dist

    ranks, out = Ranks.of(dist.group.WORLD), []
    for chosen in (4, 2):
        experts = layer(2 * rank, 2)  # in fp32, which is their compute dtype
        x_TD, weight_TK, expert_TK = tokens_of(rank, chosen)
        y_TD = compute_at_owners(experts, x_TD, weight_TK, expert_TK, ranks=ranks, count=4)
        y_TD.square().sum().backward()
        out.append((y_TD.detach(), x_TD.grad, weight_TK.grad, [p.grad for p in experts.parameters()]))
    return out


def test_pairs_go_to_their_experts_and_back():
    """Outputs and gradients are those of all experts in one place, also where a rank's experts get no token."""
    for chosen, *results in zip((4, 2), *run_ranks(exchanged, 2), strict=True):
        experts, wanted = layer(0, 4), []
        for rank in range(2):
            x_TD, weight_TK, expert_TK = tokens_of(rank, chosen)
            y_TD = experts(x_TD, weight_TK, expert_TK)
            y_TD.square().sum().backward()
            wanted.append((y_TD.detach(), x_TD.grad, weight_TK.grad))
        for rank, (*got, grads) in enumerate(results):
            for a, b in zip(got, wanted[rank], strict=True):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
            for grad, parameter in zip(grads, experts.parameters(), strict=True):
                torch.testing.assert_close(grad, parameter.grad[2 * rank : 2 * rank + 2], rtol=1e-5, atol=1e-5)
            assert chosen == 4 or rank == 0 or not any(grad.any() for grad in grads)
