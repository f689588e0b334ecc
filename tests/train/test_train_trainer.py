"""Twenty steps give the same result in every setup, and the same as a plain loop over transformers' model."""

import functools

import pytest
from helpers.distributed import run_ranks
from helpers.training import close, hf_losses, oracle_tensors, train

IMPLEMENTATIONS = ["base", "sparse"]
LORA = {"lora_rank": 4, "lora_alpha": 8.0, "bias_tuning": True}

# Cases for ranks: (data-parallel, model-parallel) sizes and options. The processes start once for a whole list.
TWO = [((1, 2), {})]
FOUR = [((2, 2), {"mode": "fsdp", "checkpointing": True}), ((2, 2), {"peft": LORA})]
MORE_OF_TWO = [
    ((2, 1), {"mode": "fsdp", "peft": LORA}),
    ((2, 1), {}),
    ((2, 1), {"mode": "fsdp"}),
    ((2, 1), {"packed": True}),
    ((1, 2), {"peft": LORA, "checkpointing": True}),
    ((2, 1), {"peft": LORA}),
]
MORE_OF_FOUR = [
    ((4, 1), {}),
    ((4, 1), {"mode": "fsdp", "checkpointing": True}),
    ((1, 4), {}),
    ((1, 4), {"peft": LORA}),
    ((2, 2), {}),
    ((2, 2), {"packed": True}),
    ((2, 2), {"mode": "fsdp", "peft": LORA}),
]


@functools.cache
def oracle():
    return hf_losses()


@functools.cache
def alone(implementation, lora=False):
    return train(implementation, peft=LORA if lora else None)


def on_grids(rank, world, cases, tensors):
    import torch.distributed as dist

    from accessory.parallel.mesh import DeviceMesh, Ranks

    out = []
    for (_, model), options in cases:
        mesh = DeviceMesh.of(Ranks.of(dist.group.WORLD), model, "cpu")
        out.append([train(i, mesh, tensors=tensors, **options) for i in IMPLEMENTATIONS])
    return out


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_one_process_is_transformers(implementation):
    close(alone(implementation), oracle())


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_recomputing_changes_nothing(implementation):
    close(train(implementation, checkpointing=True), alone(implementation), 1e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_packing_changes_nothing(implementation):
    """A step has the same documents, but two in a row instead of one."""
    close(train(implementation, packed=True), alone(implementation))


def test_accumulation_keeps_cross_entropy():
    """The balance loss is computed for each part, so it is not part of the loss here."""
    whole = train("sparse", balance=0.0)
    parts = train("sparse", balance=0.0, accum=4)
    close([(ce,) for ce, _, _ in parts], [(ce,) for ce, _, _ in whole])
    assert [b for _, b, _ in parts] != [b for _, b, _ in whole]


def test_both_implementations_learn_adapters_alike():
    close(alone("base", lora=True), alone("sparse", lora=True))


@pytest.mark.parametrize(
    "cases",
    [
        pytest.param(TWO, id="2 ranks"),
        pytest.param(FOUR, id="4 ranks", marks=pytest.mark.slow),
        pytest.param(MORE_OF_TWO, id="2 ranks, more", marks=pytest.mark.slow),
        pytest.param(MORE_OF_FOUR, id="4 ranks, more", marks=pytest.mark.long),
    ],
)
def test_ranks_change_nothing(cases):
    world = cases[0][0][0] * cases[0][0][1]
    for rank, results in enumerate(run_ranks(on_grids, world, cases, oracle_tensors(), timeout=400)):
        for (sizes, options), losses in zip(cases, results, strict=True):
            for implementation, got in zip(IMPLEMENTATIONS, losses, strict=True):
                try:
                    close(got, alone(implementation, lora="peft" in options))
                except AssertionError as error:
                    raise AssertionError(f"{implementation} on {sizes}, {options}, rank {rank}: {error}") from error
