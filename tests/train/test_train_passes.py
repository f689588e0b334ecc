"""Passes over batches of fixed shapes, as CUDA graphs have them, beside passes over batches as they come."""

import pytest
import torch
from helpers.training import ARGS, batches, make_decoder

from accessory.ops.attention import Documents
from accessory.parallel.mesh import DeviceMesh
from accessory.train import passes
from accessory.train.passes import GraphedPasses, can_be_graphs, inputs_of, of_fixed_shape
from accessory.train.trainer import LossWeights, Trainer

WAYS = {
    "full": {},
    "lora": {"peft": {"lora_rank": 8}},
    "experts alone": {"peft": {"lora_rank": 8, "lora_targets": ("w1", "w2", "w3"), "norm_tuning": False}},
    "all adapters": {"peft": {"lora_rank": 8, "bias_tuning": True}},
}


def trainers(implementation="sparse", device="cpu", dtype=torch.float32, **how):
    """Two of the same network: one with passes as they come, one with fixed shapes."""
    made = [
        Trainer(make_decoder(implementation, device=device, dtype=dtype, **how), DeviceMesh(), WEIGHTS, clip=1.0)
        for _ in range(2)
    ]
    made[1].passes = GraphedPasses(made[1]._backward, made[1].decoder, made[1].named)
    return made


WEIGHTS = LossWeights(ARGS.load_balancing_weight, z=0.01)


@pytest.mark.parametrize("implementation", ["base", "sparse"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_padding_changes_nothing(monkeypatch, way, packed, implementation):
    """Neither rows without a label, nor documents without tokens, nor gradients that are written where they lay."""
    monkeypatch.setattr(passes, "MOST_GRAPHS", 0)
    monkeypatch.setattr(passes, "LENGTHS", 24)
    plain, fixed = trainers(implementation, **WAYS[way])
    for trainer in (plain, fixed):
        trainer.forward_backward(batches(9, parts=2, packed=packed))
    whole = torch.stack([p.grad.norm() for _, p in plain.named]).norm()
    for (name, p), (_, q) in zip(plain.named, fixed.named, strict=True):
        assert (p.grad - q.grad).norm() <= 1e-6 * whole, name
        p.grad = None
    for step in range(3):
        rows = batches(step, parts=2, packed=packed)
        want, got = plain.step(rows, 1e-3), fixed.step(rows, 1e-3)
        for key in ("loss", "balance", "z", "grad_norm", "tokens"):
            assert got[key] == pytest.approx(want[key], rel=1e-4), key


def test_few_shapes_occur():
    """Whatever a batch's length and number of documents."""
    shapes = set()
    for step in range(20):
        (batch,) = batches(step, packed=True)
        inputs = of_fixed_shape(batch, torch.ones(5))
        T = inputs.tokens_BT.shape[1]
        assert T % passes.LENGTHS == 0
        assert T - batch.tokens_BT.shape[1] < passes.LENGTHS
        assert torch.equal(inputs.tokens_BT[:, : batch.tokens_BT.shape[1]], batch.tokens_BT)
        rows_N, label_N = inputs.rows_N, inputs_of(batch, torch.ones(5)).label_N
        assert rows_N is None
        assert torch.equal(inputs.label_N[inputs.label_N >= 0], label_N)
        if isinstance(inputs.documents, Documents):
            start = inputs.documents.start_N
            assert start[-1] == inputs.tokens_BT.numel()
            assert (start.diff() >= 0).all()
            assert len(start) & (len(start) - 1) == 0
            shapes.add((tuple(inputs.tokens_BT.shape), len(start)))
    assert len(shapes) <= 3


def test_a_cpu_has_no_graphs():
    decoder = make_decoder("sparse")
    assert not can_be_graphs(decoder, DeviceMesh(), images=False)
    assert type(Trainer(decoder, DeviceMesh(), WEIGHTS, graphs=True).passes) is passes.Passes


on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.mark.gpu
@on_a_gpu
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_graphs_learn_as_single_launches_do(way, packed, recompute):
    plain, graphed = trainers(device="cuda", dtype=torch.bfloat16, **WAYS[way])
    assert can_be_graphs(graphed.decoder, DeviceMesh(), images=False)
    for trainer in (plain, graphed):
        for layer in trainer.decoder.layers:
            layer.checkpoint_activations(recompute)
    for step in range(6):
        rows = batches(step, parts=2, packed=packed)
        want, got = plain.step(rows, 1e-3), graphed.step(rows, 1e-3)
        for key in ("loss", "balance", "grad_norm"):
            assert got[key] == pytest.approx(want[key], rel=2e-2), (step, key)
    assert graphed.passes._made


@pytest.mark.gpu
@on_a_gpu
def test_a_replay_is_what_was_recorded():
    """The same batch gives the same bits in the pass that ran as it was, in the recorded one, and in a replay."""
    _, trainer = trainers(device="cuda", dtype=torch.bfloat16)
    rows, found = batches(0), []
    for _ in range(3):
        trainer.forward_backward(rows)
        found.append([p.grad.clone() for _, p in trainer.named])
    for again in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], again, strict=True))
