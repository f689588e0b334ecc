"""Finetuning spread over two cards in bf16 over NCCL, beside one card: ranks share rows, experts, or all weights."""

import functools

import pytest
import torch
import torch.nn.functional as F
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
    "model": {"model_parallel_size": 2},
}


def curve(implementation, mesh, tensors, mode="sdp", peft=None, packed=True, graphs=False):
    """Loss and balance of ten steps in bf16, and the mean loss of an evaluation behind them."""
    dtype = torch.bfloat16
    decoder = make_decoder(implementation, mesh, mode, peft=peft, tensors=tensors, device="cuda", dtype=dtype)
    trainer = Trainer(decoder, mesh, LossWeights(ARGS.load_balancing_weight, 0.0, True), clip=1.0, graphs=graphs)
    records = [trainer.step(batches_of(mesh, step, packed=packed), 1e-3) for step in range(STEPS)]
    held_out, _ = trainer.evaluate(batches_of(mesh, STEPS, packed=packed))
    return [r["loss"] + r["balance"] for r in records] + [held_out]


def on_cards(rank, world, store, case, runs, tensors):
    import torch.distributed as dist

    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", store=dist.FileStore(store, world), rank=rank, world_size=world)
    mesh = DeviceMesh.of(Ranks.of(dist.group.WORLD), device_type="cuda", **{"model_parallel_size": 1, **CASES[case]})
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
        {"implementation": "sparse", "peft": LORA, "graphs": True},  # on ranks, where they share all weights
        {"implementation": "base", "mode": "fsdp", "peft": LORA},
    ]
    alone = [curve(tensors=tensors(), mesh=DeviceMesh(), **run) for run in runs]
    for curves in run_ranks(on_cards, 2, str(tmp_path / "store"), case, runs, tensors(), grouped=False):
        for run, got, wanted in zip(runs, curves, alone, strict=True):
            assert got == pytest.approx(wanted, rel=1e-2), run


def loss_of_parts(rank, world, store, dtype):
    """(loss, gradient of h, of this card's part of the head) as it comes and replayed as a CUDA graph."""
    import torch.distributed as dist

    from accessory.ops import cross_entropy
    from accessory.ops.cross_entropy import VocabularyPart, head_cross_entropy_sum
    from accessory.ops.graphs import record
    from accessory.parallel.collectives import copy_to_ranks, stack_from_ranks

    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", store=dist.FileStore(store, world), rank=rank, world_size=world)
    ranks = Ranks.of(dist.group.WORLD)
    cross_entropy.LOGITS_AT_ONCE = 16000 * 100  # three pieces of 256 rows
    h, weight, label = (x.cuda() for x in head_of_mixtral(dtype))
    own = weight.chunk(world)[rank].clone().requires_grad_()
    h.requires_grad_()
    part = VocabularyPart(rank * len(own), len(own), lambda sums: stack_from_ranks(sums, ranks))

    def run():
        loss = head_cross_entropy_sum(h, label, lambda x: F.linear(copy_to_ranks(x, ranks), own), [own], part)
        return [loss.detach(), *torch.autograd.grad(loss, [h, own])]

    came = run()
    replay, out = record(run, torch.cuda.Stream())
    for x in out:
        x.fill_(torch.nan)
    replay()
    return [[x.cpu() for x in outs] for outs in (came, out)]


def head_of_mixtral(dtype):
    """h, the head's weight and labels, some of them ignored: 256 rows and the vocabulary of Mixtral."""
    g = torch.Generator().manual_seed(0)
    h, weight = torch.randn(256, 512, generator=g), torch.randn(32000, 512, generator=g) / 8
    label = torch.randint(0, 32000, (256,), generator=g).where(torch.arange(256) % 7 > 0, -100)
    return h.to(dtype), weight.to(dtype), label


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2e-6), (torch.bfloat16, 1e-2)])
def test_two_cards_share_the_vocabulary(dtype, bound, tmp_path):
    """torch's cross-entropy over the whole logits in fp64, on one card."""
    *inputs, label = (x.cuda() for x in head_of_mixtral(dtype))
    h, weight = (x.double().requires_grad_() for x in inputs)
    loss = F.cross_entropy(h @ weight.T, label, reduction="sum")
    want_h, want_weight = (x.cpu() for x in torch.autograd.grad(loss, [h, weight]))
    for rank, ways in enumerate(run_ranks(loss_of_parts, 2, str(tmp_path / "store"), dtype, grouped=False)):
        for got in ways:
            assert got[0].item() == pytest.approx(loss.item(), rel=bound)
            for ours, theirs in zip(got[1:], (want_h, want_weight.chunk(2)[rank]), strict=True):
                assert (ours - theirs).norm() <= bound * theirs.norm(), (rank, ours.shape)
