"""LoRA over a quantised base learns the same as over the dequantised weights, however the ranks share it."""

import functools

import pytest
from helpers.distributed import run_ranks
from helpers.training import ARGS, close, oracle_tensors, train

from accessory.formats import Quant
from accessory.ops.quantized import dequantize, quantize

IMPLEMENTATIONS = ["base", "sparse"]
LORA = {"lora_rank": 4, "lora_alpha": 8.0, "bias_tuning": True}
SIZES = ARGS.replace(dim=256, hidden_dim=256, n_heads=8, n_kv_heads=4, head_dim=32)  # whole groups on two ranks
STEPS = 6
SHARED, SPREAD = {"context_parallel_size": 2}, {"expert_parallel_size": 2}
TWO = [
    ((2, 1), {}, "sdp", "nf4"),
    ((2, 1), {}, "fsdp", "int4"),
    ((1, 2), {}, "sdp", "nf4-dq"),
    ((2, 1), SHARED, "fsdp", "nf4"),
    ((2, 1), SPREAD, "sdp", "nf4-dq"),
    ((2, 1), SPREAD, "fsdp", "int8"),
]
FOUR = [
    ((2, 2), {}, "fsdp", "nf4-dq"),
    ((2, 2), {}, "sdp", "int4"),
    ((4, 1), {}, "fsdp", "int8"),
    ((4, 1), SPREAD, "fsdp", "nf4"),
    ((4, 1), SPREAD, "sdp", "int4"),
]


@functools.cache
def tensors():
    return oracle_tensors(SIZES)


@functools.cache
def alone(implementation, quant):
    return train(implementation, peft=LORA, steps=STEPS, args=SIZES, quant=quant, tensors=tensors())


@pytest.mark.parametrize(
    ("implementation", "quant"),
    [
        ("base", "nf4"),
        ("sparse", "int4"),
        pytest.param("base", "int4", marks=pytest.mark.slow),
        pytest.param("sparse", "nf4", marks=pytest.mark.slow),
    ],
)
def test_it_is_lora_beside_the_dequantized_weights(implementation, quant):
    choice = Quant.parse(quant)
    rounded = {n: dequantize(quantize(t, f)) if (f := choice.format_of(n)) else t for n, t in tensors().items()}
    close(alone(implementation, quant), train(implementation, peft=LORA, steps=STEPS, args=SIZES, tensors=rounded))


def on_grids(rank, world, cases, values):
    import torch.distributed as dist

    from accessory.parallel.mesh import DeviceMesh, Ranks

    out = []
    for (_, model), more, mode, quant in cases:
        mesh = DeviceMesh.of(Ranks.of(dist.group.WORLD), model, "cpu", **more)
        options = {"mode": mode, "quant": quant, "peft": LORA, "steps": STEPS, "args": SIZES, "tensors": values}
        out.append([train(i, mesh, **options) for i in IMPLEMENTATIONS])
    return out


@pytest.mark.parametrize(
    "cases",
    [
        pytest.param(TWO, id="2 ranks", marks=pytest.mark.slow),
        pytest.param(FOUR, id="4 ranks", marks=pytest.mark.long),
    ],
)
def test_ranks_change_nothing(cases):
    world = cases[0][0][0] * cases[0][0][1]
    for rank, results in enumerate(run_ranks(on_grids, world, cases, tensors(), timeout=400)):
        for (sizes, more, mode, quant), losses in zip(cases, results, strict=True):
            for implementation, got in zip(IMPLEMENTATIONS, losses, strict=True):
                try:
                    close(got, alone(implementation, quant))
                except AssertionError as error:
                    raise AssertionError(
                        f"{implementation}, {quant} on {sizes} {more} {mode}, rank {rank}: {error}"
                    ) from error


def ranks_of_experts(rank, world):
    """For each sharded parameter of experts and of all else, how many ranks have parts of it. No rank is there."""
    import torch.distributed as dist
    from helpers.training import make_decoder
    from torch.distributed.tensor import DTensor
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from accessory.parallel.mesh import DeviceMesh, Ranks

    dist.init_process_group("fake", rank=0, world_size=4, store=FakeStore())
    mesh = DeviceMesh.of(Ranks.of(dist.group.WORLD), 1, "cpu", **SPREAD)
    sizes = {True: set(), False: set()}
    for quant in (None, "nf4"):
        decoder = make_decoder("base", mesh, "fsdp", quant=quant, peft=LORA, args=SIZES)
        for name, p in decoder.named_parameters():
            if isinstance(p, DTensor):
                sizes[".experts." in name].add(p.device_mesh.size())
    return sizes


def test_experts_that_are_spread_are_sharded_over_the_ranks_that_have_them():
    """Also the numbers of quantised ones, which are parameters of a module inside the experts."""
    (sizes,) = run_ranks(ranks_of_experts, 1, grouped=False)
    assert sizes == {True: {2}, False: {4}}
