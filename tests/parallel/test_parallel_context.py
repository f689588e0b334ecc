"""Ranks that share rows: which tokens each has, what its queries see, and the same training as on one rank."""

import functools
from itertools import chain, pairwise

import pytest
import torch
from helpers.distributed import run_ranks
from helpers.training import close, oracle_tensors, train

from accessory.ops.attention import attention, attention_reference
from accessory.ops.shared_rows import SharedRows, places_of
from accessory.parallel.mesh import DeviceMesh, Ranks

LORA = {"lora_rank": 4, "lora_alpha": 8.0, "bias_tuning": True}
IMPLEMENTATIONS = ["base", "sparse"]

# Two rows of 24 tokens: documents, and padding with a number of its own.
NUMBERS = torch.tensor([[0] * 5 + [1] + [2] * 11 + [3] * 7, [0] * 24])


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_have_all_tokens_and_see_as_many_keys(size):
    places = [places_of(24, rank, size).tolist() for rank in range(size)]
    assert sorted(chain.from_iterable(places)) == list(range(24))
    assert [places[0][0], places[0][-1]] == [0, 23]  # the first chunk and the last one
    seen = [sum(place + 1 for place in own) for own in places]
    assert max(seen) == min(seen)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_segments_and_mask_say_the_same_as_the_documents(size):
    """Each query sees, by the mask and by the segments of a kernel, exactly its document up to its own place."""
    order = torch.cat([places_of(24, rank, size) for rank in range(size)])
    for rank in range(size):
        shared = SharedRows.of(NUMBERS, rank, size)
        mask = shared.mask()
        by_kernel = torch.zeros_like(mask)
        for n in range(len(shared.query_start_N) - 1):
            queries = range(*shared.query_start_N[n : n + 2].tolist())
            keys = shared.key_M[slice(*shared.key_start_N[n : n + 2].tolist())]
            assert len(queries) <= shared.longest_query
            assert len(keys) <= shared.longest_key
            for i, query in enumerate(queries):  # bottom-right-aligned: the last query sees all keys
                visible = keys[: len(keys) - len(queries) + i + 1]
                row, place = divmod(query, mask.shape[1])
                assert (visible // 24 == row).all()
                by_kernel[row, place, visible % 24] = True
        for b in range(2):
            for t, place in enumerate(places_of(24, rank, size).tolist()):
                wanted = {s for s in range(place + 1) if NUMBERS[b, s] == NUMBERS[b, place]}
                for told in (mask, by_kernel):
                    assert set(order[told[b, t]].tolist()) == wanted


def by_definition(q_NHd, k_MHd, v_MHd, query_start, key_start, longest_query, longest_key):
    """What torch's kernel for packed rows computes: causal attention, where a segment's queries are its last tokens."""
    out = []
    for (q0, q1), (k0, k1) in zip(pairwise(query_start.tolist()), pairwise(key_start.tolist()), strict=True):
        T, S = q1 - q0, k1 - k0
        assert 0 < T <= min(S, longest_query)
        assert longest_key >= S
        mask_1TS = torch.ones(T, S, dtype=torch.bool).tril(S - T)[None]
        q, k, v = q_NHd[q0:q1], k_MHd[k0:k1], v_MHd[k0:k1]
        out.append(attention_reference(q[None], k[None], v[None], mask_1TS)[0])
    return torch.cat(out)


@pytest.mark.parametrize("size", [2, 4])
def test_attention_by_segments_is_attention_by_mask(size, monkeypatch):
    monkeypatch.setattr("accessory.ops.attention._varlen_attention", lambda: by_definition)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 24, n, 8, generator=generator).requires_grad_() for n in (4, 2, 2))
    pull = torch.randn(2, 24, 4, 8, generator=generator)
    mask = (NUMBERS[:, :, None] == NUMBERS[:, None]) & torch.ones(24, 24, dtype=torch.bool).tril()
    wanted = torch.autograd.grad((attention_reference(q, k, v, mask) * pull).sum(), (q, k, v))
    order = torch.cat([places_of(24, rank, size) for rank in range(size)])
    for segments in (False, True):
        loss = torch.zeros(())
        for rank in range(size):
            place, shared = places_of(24, rank, size), SharedRows.of(NUMBERS, rank, size)
            y = attention(q[:, place], k[:, order], v[:, order], shared if segments else shared.mask())
            loss = loss + (y * pull[:, place]).sum()
        for got, want in zip(torch.autograd.grad(loss, (q, k, v)), wanted, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@functools.cache
def alone(implementation, lora=False):
    return train(implementation, peft=LORA if lora else None)


# Cases for ranks: (replicas, context, model) sizes and options.
TWO = [((1, 2, 1), {}), ((1, 2, 1), {"packed": True, "mode": "fsdp"})]
MORE_OF_TWO = [
    ((1, 2, 1), {"global_statistics": False}),
    ((1, 2, 1), {"mode": "fsdp", "checkpointing": True}),
    ((1, 2, 1), {"peft": LORA, "packed": True}),
    ((1, 2, 1), {"peft": LORA, "mode": "fsdp"}),
]
FOUR = [
    ((2, 2, 1), {"packed": True}),
    ((2, 2, 1), {"mode": "fsdp", "checkpointing": True}),
    ((1, 2, 2), {"packed": True}),
    ((1, 2, 2), {"mode": "fsdp", "peft": LORA}),
    ((1, 4, 1), {}),
    ((1, 4, 1), {"peft": LORA, "packed": True}),
]


def on_grids(rank, world, cases, tensors):
    import torch.distributed as dist

    out = []
    for (_, context, model), options in cases:
        mesh = DeviceMesh.of(Ranks.of(dist.group.WORLD), model, "cpu", context_parallel_size=context)
        out.append([train(i, mesh, tensors=tensors, **options) for i in IMPLEMENTATIONS])
    return out


@pytest.mark.parametrize(
    "cases",
    [
        pytest.param(TWO, id="2 ranks"),
        pytest.param(MORE_OF_TWO, id="2 ranks, more", marks=pytest.mark.slow),
        pytest.param(FOUR, id="4 ranks", marks=pytest.mark.long),
    ],
)
def test_sharing_rows_changes_nothing(cases):
    """Twenty steps have the losses and gradient norms of one rank."""
    replicas, context, model = cases[0][0]
    for rank, results in enumerate(
        run_ranks(on_grids, replicas * context * model, cases, oracle_tensors(), timeout=400)
    ):
        for (sizes, options), losses in zip(cases, results, strict=True):
            for implementation, got in zip(IMPLEMENTATIONS, losses, strict=True):
                try:
                    close(got, alone(implementation, lora="peft" in options))
                except AssertionError as error:
                    raise AssertionError(f"{implementation} on {sizes}, {options}, rank {rank}: {error}") from error
