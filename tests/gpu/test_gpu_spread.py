"""Finetuning spread over two cards in bf16 over NCCL, beside one card: ranks that share rows, or the experts."""

import functools

import pytest
import torch
from helpers.distributed import run_ranks
from helpers.training import ARGS, batches_of, make_decoder, oracle_tensors

from accessory.parallel.mesh import DeviceMesh, Ranks
from accessory.train.trainer import LossWeights, Trainer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]
STEPS = 10
LORA = {"lora_rank": 8, "bias_tuning": True}
CASES = {
    "context": {"context_parallel_size": 2},
    "experts": {"expert_parallel_size": 2},
    "both": {"context_parallel_size": 2, "expert_parallel_size": 2},
}


def curve(implementation, mesh, tensors, mode="sdp", peft=None, packed=True):
    """Loss and balance of ten steps in bf16, and the mean loss of an evaluation behind them."""
    dtype = torch.bfloat16
    decoder = make_decoder(implementation, mesh, mode, peft=peft, tensors=tensors, device="cuda", dtype=dtype)
    trainer = Trainer(decoder, mesh, LossWeights(ARGS.load_balancing_weight, 0.0, True), clip=1.0)
    records = [trainer.step(batches_of(mesh, step, packed=packed), 1e-3) for step in range(STEPS)]
    held_out, _ = trainer.evaluate(batches_of(mesh, STEPS, packed=packed))
    return [r["loss"] + r["balance"] for r in records] + [held_out]


def on_cards(rank, world, store, case, runs, tensors):
    import torch.distributed as dist

    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", store=dist.FileStore(store, world), rank=rank, world_size=world)
    mesh = DeviceMesh.of(Ranks.of(dist.group.WORLD), 1, "cuda", **CASES[case])
    return [curve(tensors=tensors, mesh=mesh, **run) for run in runs]


@functools.cache
def tensors():
    return oracle_tensors()


@pytest.mark.parametrize("case", CASES)
def test_two_cards_learn_as_one(case, tmp_path):
    """Losses agree to 1%. Rounding may change a token's expert, but only a mistake moves the curve."""
    runs = [
        {"implementation": "base"},
        {"implementation": "sparse", "packed": False},
        {"implementation": "sparse", "mode": "fsdp"},
        {"implementation": "sparse", "peft": LORA},
        {"implementation": "base", "mode": "fsdp", "peft": LORA},
    ]
    alone = [curve(tensors=tensors(), mesh=DeviceMesh(), **run) for run in runs]
    for curves in run_ranks(on_cards, 2, str(tmp_path / "store"), case, runs, tensors(), grouped=False):
        for run, got, wanted in zip(runs, curves, alone, strict=True):
            assert got == pytest.approx(wanted, rel=1e-2), run
