"""The 16-bit copies of trained weights that stay from step to step, and the kernel of AdamW that writes them."""

import pytest
import torch
from helpers.training import batches, make_decoder
from torch import nn

from accessory.ops.compute_copy import copy_of, in_dtype, keep_copy
from accessory.parallel.mesh import DeviceMesh
from accessory.planner.setup import Setup, Training
from accessory.planner.training import training_moments
from accessory.train import adamw, adamw_offload, passes
from accessory.train.adamw import BETAS, EPS, AdamW
from accessory.train.adamw_offload import OffloadedAdamW
from accessory.train.optim import make_optimizer
from accessory.train.passes import GraphedPasses
from accessory.train.state import load_state, save_state
from accessory.train.trainer import LossWeights, Trainer

BF16 = torch.bfloat16
LORA = {"lora_rank": 8, "bias_tuning": True}


@pytest.fixture(autouse=True)
def as_they_come(monkeypatch):
    """A CPU records nothing."""
    monkeypatch.setattr(passes, "MOST_GRAPHS", 0)
    monkeypatch.setattr(passes, "LENGTHS", 24)


def trainer(copies=True, optimizer="adamw", dtype=BF16, **how):
    made = Trainer(
        make_decoder("sparse", dtype=dtype, **how), DeviceMesh(), LossWeights(0.1), clip=1.0, optimizer=optimizer
    )
    made.passes = GraphedPasses(made._backward, made.decoder, made.named)
    if not copies:
        for _, p in made.named:
            if copy_of(p) is not None:
                del p.compute_copy
    return made


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit"])
@pytest.mark.parametrize("peft", [None, LORA], ids=["full", "lora"])
def test_steps_are_those_without_copies(tmp_path, peft, optimizer):
    """Bit by bit: with micro-batches, evaluations, weights that somebody sets, and a state that is read."""
    if optimizer == "adamw_8bit":
        pytest.importorskip("bitsandbytes", reason="bitsandbytes is missing (extra: optim)")
    ends = []
    for copies in (True, False):
        made, found = trainer(copies, optimizer, peft=peft), []
        assert any(copy_of(p) is not None for _, p in made.named) == copies
        for step in range(5):
            found.append(made.evaluate(batches(50))[0])
            found.append(made.step(batches(step, parts=2), 1e-2)["loss"])
            if step == 1:
                state = save_state(made, tmp_path / str(copies), 2, {"updates": 2, "loss_scale": [1.0, 0]}, 1)
            if step == 2:
                with torch.no_grad():
                    for _, p in made.named:
                        p.mul_(1.01)
            if step == 3:
                load_state(made, state)
        ends.append((found, [p.detach() for _, p in made.named]))
    assert ends[0][0] == ends[1][0]
    assert all(torch.equal(a, b) for a, b in zip(ends[0][1], ends[1][1], strict=True))


@pytest.mark.parametrize(
    ("how", "without"),
    [
        ({}, ("norm.weight", "gate.weight", "tok_embeddings.weight")),
        ({"peft": LORA}, ("norm.weight",)),
        ({"checkpointing": True}, ("",)),  # one layer's copies at a time
        ({"dtype": torch.float32}, ("",)),
    ],
    ids=str,
)
def test_what_products_in_16_bits_read_has_a_copy(how, without):
    for name, p in trainer(**how).named:
        assert (copy_of(p) is None) == name.endswith(without), name


@pytest.mark.parametrize("peft", [None, LORA], ids=["full", "lora"])
def test_the_planner_counts_the_copies(peft):
    made = trainer(peft=peft)
    held = sum(copy_of(p).tensor.nbytes for _, p in made.named if copy_of(p) is not None)
    task = Training(kind="lora" if peft else "full", batch_size=2, max_words=12, cuda_graphs=True)
    for moment, terms in training_moments(Setup(args=made.decoder.args, task=task), task).items():
        assert terms["16-bit copies of weights"] == held, moment


# --------------------------------------------------------------------------- who writes them

SHAPES = {"w.weight": (70, 300), "v.weight": (512, 256), "a.norm.weight": (300,)}


class Kernel:
    """Stands for the kernel: the same numbers from torch's class, and the copy; it counts what it updates."""

    def __init__(self):
        self.numbers = 0

    def load(self):
        return self.update

    def update(self, value, gradient, exp_avg, exp_avg_sq, copy, *, lr, betas, eps, weight_decay, updates, scale):
        self.numbers += value.numel()
        exp_avg.lerp_(gradient.float() * scale, 1 - betas[0])
        exp_avg_sq.lerp_((gradient.float() * scale).square(), 1 - betas[1])
        denominator = (exp_avg_sq / (1 - betas[1] ** updates)).sqrt() + eps
        moved = value * (1 - lr * weight_decay) - lr / (1 - betas[0] ** updates) * exp_avg / denominator
        value.data.copy_(moved)  # past torch's version counter, as a kernel writes
        if copy is not None:
            copy.data.copy_(moved)


@pytest.fixture
def kernel(monkeypatch):
    """It takes all but small parameters. A copy that it has written need not be cast again."""
    made = Kernel()
    monkeypatch.setattr(adamw.dispatch, "find", lambda product: made if product.rows > 1000 else None)
    return made


def parameters():
    generator = torch.Generator().manual_seed(0)
    return [(name, nn.Parameter(torch.randn(shape, generator=generator))) for name, shape in SHAPES.items()]


def moved(optimizer, named, dtype):
    for group in optimizer.param_groups:
        group["lr"] = 1e-2
    for step in range(4):
        generator = torch.Generator().manual_seed(step)
        for _, p in named:
            p.grad_dtype = dtype
            p.grad = torch.randn(p.shape, generator=generator).to(dtype)
        optimizer.step(0.7)


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize("offloaded", [False, True])
def test_large_parameters_take_the_kernel_with_their_copies(monkeypatch, kernel, offloaded, dtype):
    """In whatever pieces they come; small ones take torch's update, and are cast when they are needed."""
    monkeypatch.setattr(adamw_offload, "OPTIMIZER_PIECE", 4096)
    named, theirs = parameters(), parameters()
    for _, p in named:
        keep_copy(p, BF16)
    moved((OffloadedAdamW if offloaded else AdamW)(named, 0.1), named, dtype)
    assert kernel.numbers == 4 * (70 * 300 + 512 * 256)
    groups = [{"params": [p for name, p in theirs if name.endswith("norm.weight") == norm]} for norm in (True, False)]
    groups[1]["weight_decay"] = 0.1
    other = torch.optim.AdamW(groups, 1e-2, BETAS, EPS, weight_decay=0.0, foreach=False)
    for step in range(4):
        generator = torch.Generator().manual_seed(step)
        for _, p in theirs:
            p.grad = torch.randn(p.shape, generator=generator).to(dtype).float() * 0.7
        other.step()
    for (name, p), (_, q) in zip(named, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6, msg=name)
        assert copy_of(p).is_current(p) == (name != "a.norm.weight")
        assert torch.equal(in_dtype(p, BF16), p.to(BF16)), name


def test_moments_in_8_bits_have_another_kernel(kernel):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is missing (extra: optim)")
    named = parameters()
    for _, p in named:
        keep_copy(p, BF16)
        in_dtype(p, BF16)
    moved(make_optimizer(named, 0.1, kind="adamw_8bit"), named, torch.float32)
    assert kernel.numbers == 4 * 70 * 300  # v.weight has whole blocks
    for name, p in named:
        assert torch.equal(in_dtype(p, BF16), p.to(BF16)), name
