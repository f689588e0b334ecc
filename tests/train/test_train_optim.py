"""The learning rate at points worked out by hand, weight decay, moments, clipping and fp16's loss scale."""

import math

import pytest
import torch
from helpers.distributed import run_ranks
from helpers.training import ARGS, CLIP, batches, close, make_decoder, oracle_tensors
from torch import nn

from accessory.parallel.fsdp import model_copies, squared_norm
from accessory.parallel.local_shard import local, local_parameters
from accessory.parallel.mesh import DeviceMesh
from accessory.train.adamw import decays
from accessory.train.adamw_offload import OffloadedAdamW
from accessory.train.optim import LossScale, learning_rate, make_optimizer
from accessory.train.trainer import LossWeights, NotFiniteError, Trainer

PLAN = {"lr": 4.0, "min_lr": 1.0, "warmup_epochs": 0.5, "epochs": 2.5}


@pytest.mark.parametrize(
    ("epoch", "rate"),
    [
        (0.0, 0.0),
        (0.125, 1.0),  # a quarter of the warm-up
        (0.5, 4.0),  # its end
        (1.0, 1 + 3 * 0.5 * (1 + math.sqrt(0.5))),  # a quarter of the cosine: cos 45°
        (1.5, 2.5),  # half of it: midway between the two rates
        (2.0, 1 + 3 * 0.5 * (1 - math.sqrt(0.5))),
        (2.5, 1.0),
        (3.0, 1.0),  # never up again
    ],
)
def test_the_rate_at_hand_computed_points(epoch, rate):
    assert learning_rate(epoch, **PLAN) == pytest.approx(rate)


def test_no_warm_up_and_nothing_but_warm_up():
    assert learning_rate(0.0, lr=4.0, min_lr=0.0, warmup_epochs=0.0, epochs=1.0) == 4.0
    assert learning_rate(0.5, lr=4.0, min_lr=0.0, warmup_epochs=1.0, epochs=1.0) == 2.0
    assert learning_rate(1.0, lr=4.0, min_lr=0.0, warmup_epochs=1.0, epochs=1.0) == 4.0


@pytest.mark.parametrize("peft", [None, {"lora_rank": 4, "bias_tuning": True, "norm_tuning": True}])
def test_biases_and_norms_do_not_decay(peft):
    decoder = make_decoder("sparse", peft=peft)
    named = [(n, p) for n, p in decoder.named_parameters() if p.requires_grad]
    spared = {n for n, p in named if not decays(n, p)}
    assert spared == {n for n, _ in named if "bias" in n or n.endswith("norm.weight")}
    assert any("norm" in n for n in spared)
    optimizer = make_optimizer(named, 0.1)
    assert {g["weight_decay"] for g in optimizer.param_groups} == {0.0, 0.1}
    for group in optimizer.param_groups:
        for p in group["params"]:
            (name,) = (n for n, other in named if other is p)
            assert (group["weight_decay"] == 0.0) == (name in spared), name
    assert sum(len(g["params"]) for g in optimizer.param_groups) == len(named)


def test_decay_is_that_of_adamw():
    """Without a gradient, a weight shrinks by lr · decay and a bias stays."""
    weight, bias = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2))
    optimizer = make_optimizer([("w.weight", weight), ("w.bias", bias)], 0.5)
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    weight.grad, bias.grad = torch.zeros(2, 2), torch.zeros(2)
    optimizer.step()
    torch.testing.assert_close(weight.detach(), torch.full((2, 2), 0.95))
    assert torch.equal(bias.detach(), torch.ones(2))


def test_made_moments_are_those_that_a_step_makes():
    def fresh():
        decoder = make_decoder("base")
        return Trainer(decoder, DeviceMesh(), LossWeights(0.1))

    stepped, made = fresh(), fresh()
    stepped.step(batches(0), 1e-3)
    made.optimizer.allocate(1)
    assert stepped.optimizer.updates == made.optimizer.updates == 1
    assert fresh().optimizer.updates == 0
    for (name, a), (_, b) in zip(stepped.named, made.named, strict=True):
        one, other = stepped.optimizer.state[a], made.optimizer.state[b]
        assert one.keys() == other.keys(), name
        for key in one:
            assert (one[key].shape, one[key].dtype, one[key].device) == (
                other[key].shape,
                other[key].dtype,
                other[key].device,
            )
        assert one["exp_avg"].dtype == torch.float32
    # The first moments after one step: (1 - 0.9) g and (1 - 0.95) g²
    again = fresh()
    again.forward_backward(batches(0))
    for (name, a), (_, b) in zip(stepped.named, again.named, strict=True):
        state = stepped.optimizer.state[a]
        torch.testing.assert_close(state["exp_avg"], 0.1 * b.grad, rtol=1e-5, atol=1e-9, msg=name)
        torch.testing.assert_close(state["exp_avg_sq"], 0.05 * b.grad**2, rtol=1e-5, atol=1e-12, msg=name)


def test_clipping_is_torchs():
    decoder = make_decoder("sparse")
    trainer = Trainer(decoder, DeviceMesh(), LossWeights(0.1), clip=CLIP)
    trainer.forward_backward(batches(0))
    parameters = [p for _, p in trainer.named]
    norm = math.sqrt(float(squared_norm(decoder, DeviceMesh())))
    before = [p.grad.clone() for p in parameters]
    wanted = float(torch.nn.utils.clip_grad_norm_(parameters, CLIP))
    assert norm == pytest.approx(wanted, rel=1e-6)
    assert norm > CLIP
    clipped = [p.grad.clone() for p in parameters]
    for p, grad in zip(parameters, before, strict=True):
        p.grad = grad
    trainer.optimizer.step(CLIP / (norm + 1e-6))  # on a CPU it leaves the clipped gradients behind
    for p, grad in zip(parameters, clipped, strict=True):
        torch.testing.assert_close(p.grad, grad, rtol=1e-5, atol=1e-9)


def test_the_parameters_are_moved_before_the_host_reads_what_happened(monkeypatch):
    """So a GPU need not wait for the host between the gradients' norm and the optimiser."""
    trainer = Trainer(make_decoder("sparse"), DeviceMesh(), LossWeights(0.1), clip=CLIP)
    order = []
    monkeypatch.setattr(trainer.optimizer, "step", lambda scale: order.append("moved"))
    monkeypatch.setattr("accessory.train.trainer.Ready.wait", lambda ready: order.append("read"))
    trainer.step(batches(0), 1e-3)
    assert order == ["moved", "read"]


@pytest.mark.parametrize(("broken", "says"), [("loss", "the loss is nan"), ("gradient", "the gradient is inf")])
def test_nothing_moves_where_something_is_not_finite(monkeypatch, broken, says):
    trainer = Trainer(make_decoder("sparse"), DeviceMesh(), LossWeights(0.1), clip=CLIP)
    trainer.step(batches(0), 1e-3)
    held = {
        name: (p.detach().clone(), *(m.clone() for m in trainer.optimizer.state[p].values()))
        for name, p in trainer.named
    }
    if broken == "loss":
        add = trainer.sums.add
        monkeypatch.setattr(trainer.sums, "add", lambda ce, *rest: add(ce * math.nan, *rest))
    else:
        monkeypatch.setattr("accessory.train.trainer.squared_norm", lambda *_: torch.tensor(math.inf))
    with pytest.raises(NotFiniteError, match=says):
        trainer.step(batches(1), 1e-3)
    for name, p in trainer.named:
        now = (p.detach(), *trainer.optimizer.state[p].values())
        assert all(torch.equal(one, other) for one, other in zip(now, held[name], strict=True)), name
        assert p.grad is None
    assert trainer.optimizer.updates == 1


@pytest.mark.parametrize("kind", ["adamw", "adamw_8bit", "offloaded"])
def test_a_scale_that_is_no_number_moves_nothing(kind):
    if kind == "adamw_8bit":
        pytest.importorskip("bitsandbytes", reason="bitsandbytes is missing (extra: optim)")
    weight = nn.Parameter(torch.ones(256, 256))
    named = [("w.weight", weight)]
    optimizer = OffloadedAdamW(named, 0.5) if kind == "offloaded" else make_optimizer(named, 0.5, kind=kind)
    optimizer.param_groups[0]["lr"] = 0.1
    weight.grad = torch.ones(256, 256)
    optimizer.step(torch.tensor(math.nan, dtype=torch.float64))
    assert torch.equal(weight.detach(), torch.ones(256, 256))
    assert all(not moment.any() for moment in optimizer.state[weight].values())
    optimizer.updates -= 1
    optimizer.step(torch.tensor(0.5, dtype=torch.float64))
    assert float(weight.detach().max()) == pytest.approx(1 - 0.1 * 0.5 - 0.1, rel=1e-5)


def norms(rank, world, tensors, cases):
    import torch.distributed as dist

    from accessory.parallel.mesh import Ranks

    out = []
    for model, implementation, mode, peft in cases:
        mesh = DeviceMesh.of(Ranks.of(dist.group.WORLD), model, "cpu")
        decoder = make_decoder(implementation, mesh, mode, peft=peft, tensors=tensors)
        trainer = Trainer(decoder, mesh, LossWeights(0.1, 0.01, True))
        trainer.forward_backward(batches(0, parts=mesh.data_size)[mesh.data_rank : mesh.data_rank + 1])
        copies = {h.name: model_copies(decoder, h.name, mesh) if mesh.model else 1 for h in local_parameters(decoder)}
        out.append((float(squared_norm(decoder, mesh)), copies))
    return out


LORA = {"lora_rank": 4, "bias_tuning": True, "norm_tuning": True}
MESHES = {
    2: [(1, "base", "fsdp", None), (2, "base", "sdp", None), (2, "sparse", "sdp", LORA)],
    4: [(2, "base", "fsdp", LORA), (2, "sparse", "sdp", None), (4, "sparse", "sdp", LORA)],  # 4 > key/value heads
}


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_the_norm_counts_each_number_once_on_mixed_meshes(world):
    """Equal to the norm of the whole network's gradient, as torch takes it in one process."""
    for results in run_ranks(norms, world, oracle_tensors(), MESHES[world]):
        for (model, implementation, mode, peft), (squared, copies) in zip(MESHES[world], results, strict=True):
            alone = Trainer(make_decoder(implementation, peft=peft), DeviceMesh(), LossWeights(0.1, 0.01))
            alone.forward_backward(batches(0))
            wanted = torch.nn.utils.get_total_norm([local(p.grad) for _, p in alone.named])
            assert math.sqrt(squared) == pytest.approx(float(wanted), rel=1e-5), (model, implementation, mode)
            assert set(copies.values()) <= {1, 2, 4}
            assert copies["layers.0.attention_norm.weight"] == model
            assert copies["layers.0.attention.wq.weight"] == 1
            assert copies["layers.0.attention.wk.weight"] == max(1, model // ARGS.n_kv_heads)


def test_loss_scale_halves_on_overflow_and_grows_again():
    scale = LossScale(2.0**16, growth_interval=3)
    scale.update(False)
    assert scale.value == 2.0**15
    for _ in range(2):
        scale.update(True)
    assert scale.value == 2.0**15
    scale.update(True)
    assert scale.value == 2.0**16
    scale.update(True)
    scale.update(True)
    scale.update(False)  # this resets the count
    scale.update(True)
    scale.update(True)
    assert scale.value == 2.0**15
    for _ in range(50):
        scale.update(False)
    assert scale.value >= 1
    scale.update(True)
    assert scale.dynamic


def test_wider_dtypes_are_not_scaled():
    for dtype in (torch.float32, torch.bfloat16):
        scale = LossScale.for_dtype(dtype)
        assert not scale.dynamic
        scale.update(False)
        assert scale.value == 1.0


def test_scaled_losses_give_the_same_steps():
    """A loss scale that is a power of two changes no bit of the parameters in any step."""
    curves = []
    for value in (1.0, 2.0**10):
        trainer = Trainer(make_decoder("sparse"), DeviceMesh(), LossWeights(0.1), clip=CLIP)
        trainer.loss_scale = LossScale(value)
        records = [trainer.step(batches(step), 1e-3) for step in range(3)]
        curves.append([(r["loss"], r["balance"], r["grad_norm"]) for r in records])
    close(curves[1], curves[0], 1e-6)
