"""On a GPU: our own kernel of AdamW, moments that visit from the host, 8-bit moments, the factor inside the update, the
16-bit copies that stay from step to step, and the memory of each."""

import gc
import math

import pytest
import torch
from helpers.sizes import CUTTABLE
from helpers.training import ARGS, batches, make_decoder
from torch import nn

from accessory.checkpoint.names import expected_shapes
from accessory.limits import ADAMW_NUMBERS
from accessory.ops import dispatch, gradient_squares
from accessory.ops.compute_copy import copy_of, keep_copy
from accessory.ops.gradient_squares import squares_of_gradient
from accessory.parallel.fsdp import squared_norm
from accessory.parallel.mesh import DeviceMesh
from accessory.planner.peak import WORKSPACE, estimate
from accessory.planner.setup import Setup, Training
from accessory.planner.training import training_moments
from accessory.train import adamw, adamw_offload
from accessory.train.adamw import BETAS, EPS
from accessory.train.optim import make_optimizer
from accessory.train.passes import GraphedPasses
from accessory.train.state import load_state, save_state
from accessory.train.trainer import LossWeights, Trainer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

SHAPES = {"w.weight": (700, 3001), "v.weight": (512, 4096), "a.norm.weight": (300,), "w.bias": (7,), "u.weight": (9, 9)}
# Two that our own kernel updates: rows that no block divides, and an odd number of numbers.
LARGE_SHAPES = {"x.weight": (2052, 2050), "y.weight": (2049, 2051), "z.weight": (30, 50)}
WIDE = CUTTABLE.replace(vocab_size=ARGS.vocab_size)
EIGHT, HOST = {"optimizer": "adamw_8bit"}, {"offload": "optimizer"}


def parameters(shapes=SHAPES):
    generator = torch.Generator("cuda").manual_seed(0)
    return [
        (name, nn.Parameter(torch.randn(shape, generator=generator, device="cuda"))) for name, shape in shapes.items()
    ]


def moved(optimizer, named, steps=5, scale=0.7, dtype=torch.float32, lr=1e-2):
    generator = torch.Generator("cuda").manual_seed(1)
    for _ in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr
        for _, p in named:
            p.grad_dtype = dtype
            p.grad = torch.randn(p.shape, generator=generator, device="cuda").to(dtype)
        optimizer.step(scale)
    return [p.detach().clone() for _, p in named]


def same(got, wanted):
    for n, (a, b) in enumerate(zip(got, wanted, strict=True)):
        assert torch.equal(a, b), n


# --------------------------------------------------------------------------- one update


def test_the_factor_inside_the_update_is_a_pass_before_it():
    """To fp32 rounding: the kernel divides by 1 / 0.7, a pass multiplies by 0.7."""
    named, theirs = parameters(), parameters()
    got = moved(make_optimizer(named, 0.1), named)
    groups = [
        {"params": [p for name, p in theirs if name in ("w.weight", "v.weight", "u.weight")], "weight_decay": 0.1},
        {"params": [p for name, p in theirs if name in ("a.norm.weight", "w.bias")], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, betas=BETAS, eps=EPS, fused=True)
    generator = torch.Generator("cuda").manual_seed(1)
    for _ in range(5):
        for _, p in theirs:
            p.grad = torch.randn(p.shape, generator=generator, device="cuda")
        torch._foreach_mul_([p.grad for _, p in theirs], 0.7)
        optimizer.step()
    for name, value, (_, wanted) in zip(SHAPES, got, theirs, strict=True):
        torch.testing.assert_close(value, wanted.detach(), rtol=1e-5, atol=1e-6, msg=name)


def test_without_a_factor_it_is_torchs_fused_update_bit_by_bit():
    named, theirs = parameters(), parameters()
    got = moved(make_optimizer(named, 0.0), named, scale=1.0)
    optimizer = torch.optim.AdamW([p for _, p in theirs], lr=1e-2, betas=BETAS, eps=EPS, weight_decay=0.0, fused=True)
    generator = torch.Generator("cuda").manual_seed(1)
    for _ in range(5):
        for _, p in theirs:
            p.grad = torch.randn(p.shape, generator=generator, device="cuda")
        optimizer.step()
    same(got, [p.detach() for _, p in theirs])


@pytest.mark.parametrize("shapes", [SHAPES, LARGE_SHAPES])
def test_a_scale_that_is_no_number_moves_nothing_and_nobody_waits_for_it(shapes):
    named = parameters(shapes)
    optimizer = make_optimizer(named, 0.1)
    moved(optimizer, named, steps=2)
    before = [t.clone() for _, p in named for t in (p.detach(), *optimizer.state[p].values())]
    scale = torch.tensor(math.nan, dtype=torch.float64, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step(scale)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    same([t for _, p in named for t in (p.detach(), *optimizer.state[p].values())], before)


@pytest.mark.parametrize("graphs", [False, True])
def test_a_step_waits_for_the_card_at_its_end_alone(graphs):
    """An event is waited for when everything has been launched. Anything else that waits is an error here."""
    decoder = make_decoder("sparse", device="cuda", dtype=torch.bfloat16)
    trainer = Trainer(decoder, DeviceMesh(), LossWeights(0.1), clip=1.0, graphs=graphs)
    for _ in range(3):
        trainer.step(batches(0), 1e-3)
    torch.cuda.set_sync_debug_mode("error")
    try:
        trainer.step(batches(0), 1e-3)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("scale", [1.0, 0.7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("copied", [None, torch.bfloat16, torch.float16])
def test_large_parameters_are_updated_as_torchs_fused_kernel_does(copied, dtype, scale):
    """To fp32 rounding, by our kernel, with their copies bit by bit; small ones by torch's."""
    assert all((math.prod(shape) >= ADAMW_NUMBERS[0]) == (name != "z.weight") for name, shape in LARGE_SHAPES.items())
    named, theirs = parameters(LARGE_SHAPES), parameters(LARGE_SHAPES)
    if copied is not None:
        for _, p in named:
            keep_copy(p, copied)
    ours = make_optimizer(named, 0.1)
    moved(ours, named, scale=scale, dtype=dtype)
    optimizer = torch.optim.AdamW([p for _, p in theirs], 1e-2, BETAS, EPS, weight_decay=0.1, fused=True)
    generator = torch.Generator("cuda").manual_seed(1)
    for _ in range(5):
        for _, p in theirs:
            p.grad = torch.randn(p.shape, generator=generator, device="cuda").to(dtype).float() * scale
        optimizer.step()
    for (name, p), (_, q) in zip(named, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6, msg=name)
        for moment, tensor in ours.state[p].items():
            torch.testing.assert_close(tensor, optimizer.state[q][moment], rtol=2e-6, atol=1e-6, msg=name)
        if copied is not None:
            assert copy_of(p).is_current(p) == (name != "z.weight")
            assert torch.equal(copy_of(p).current(p), p.to(copied)), name


def test_the_update_reads_gradients_in_bf16_as_they_are():
    named = parameters(LARGE_SHAPES)
    optimizer = make_optimizer(named, 0.1)
    moved(optimizer, named, steps=1, dtype=torch.bfloat16)
    torch.cuda.synchronize()
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    optimizer.step(0.5)
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - held < 2**20


@pytest.mark.parametrize("shapes", [SHAPES, LARGE_SHAPES], ids=["small", "large"])
@pytest.mark.parametrize("piece", [2**16, 2**23])
@pytest.mark.parametrize("scale", [1.0, 0.7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_moments_on_the_host_give_the_same_bits(monkeypatch, piece, scale, dtype, shapes):
    """There are more small pieces than buffers, so that a buffer is used again while copies are under way."""
    plain, visiting = parameters(shapes), parameters(shapes)
    wanted = moved(make_optimizer(plain, 0.1), plain, scale=scale, dtype=dtype)
    monkeypatch.setattr(adamw_offload, "OPTIMIZER_PIECE", piece)
    optimizer = make_optimizer(visiting, 0.1, offload="optimizer")
    same(moved(optimizer, visiting, scale=scale, dtype=dtype), wanted)
    for (name, p), (_, q) in zip(plain, visiting, strict=True):
        for moment, tensor in optimizer.state[q].items():
            assert tensor.device.type == "cpu", name
            assert tensor.is_pinned(), name
            assert p.grad is not None
            assert tensor.isfinite().all(), name
            assert tensor.abs().sum() > 0, (name, moment)


def test_gradients_in_bf16_are_widened_in_pieces(monkeypatch):
    named, pieces = parameters(), parameters()
    wanted = moved(make_optimizer(named, 0.1), named, dtype=torch.bfloat16)
    monkeypatch.setattr(adamw, "OPTIMIZER_PIECE", 2**16)
    same(moved(make_optimizer(pieces, 0.1), pieces, dtype=torch.bfloat16), wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_norm_is_that_of_all_numbers(dtype):
    decoder = make_decoder("sparse", device="cuda", args=WIDE, gradient_dtype=dtype)
    exact = 0.0
    for p in decoder.parameters():
        p.grad = torch.randn_like(p, dtype=p.grad_dtype)
        exact += float(p.grad.double().square().sum())
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    assert float(squared_norm(decoder, DeviceMesh())) == pytest.approx(exact, rel=1e-5)
    assert torch.cuda.max_memory_allocated() - before < 2**20  # no fp32 copy of a gradient


@pytest.mark.parametrize("gradient_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.skipif(not torch.cuda.is_available() or torch.cuda.get_device_capability() < (9, 0), reason="no TMA")
def test_the_norm_takes_the_squares_that_the_products_summed(graphs, gradient_dtype, monkeypatch):
    """Those of the last micro-batch, replayed or not, in every step."""
    monkeypatch.setattr(gradient_squares, "FEWEST", 2**10)
    made = trainer(gradient_dtype, graphs=graphs)
    for step in range(4):
        made.forward_backward(batches(step % 2) * 2)
        gradients = [p.grad for _, p in made.named]
        known = [squares_of_gradient(p) is not None for _, p in made.named]
        assert sum(known) >= 3 * made.decoder.args.n_layers, "the stacks"
        exact = sum(float(gradient.double().square().sum()) for gradient in gradients)
        assert float(squared_norm(made.decoder, DeviceMesh())) == pytest.approx(exact, rel=1e-5)
        made.optimizer.step(1.0)
        made.optimizer.zero_grad()


# --------------------------------------------------------------------------- steps


def trainer(gradient_dtype=torch.float32, args=WIDE, tensors=None, **choices):
    made = {"device": "cuda", "dtype": torch.bfloat16, "args": args, "gradient_dtype": gradient_dtype}
    decoder = make_decoder("sparse", tensors=tensors, **made)
    return Trainer(decoder, DeviceMesh(), LossWeights(0.0), weight_decay=0.1, clip=1.0, **choices)


def curve(trainer, first=0, last=20):
    return [trainer.step(batches(step % 2), 3e-5)["loss"] for step in range(first, last)]


@pytest.mark.parametrize("gradient_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("choices", [{}, EIGHT, HOST], ids=["fp32", "8 bits", "host"])
def test_each_way_trains(gradient_dtype, choices):
    if choices == EIGHT:
        pytest.importorskip("bitsandbytes", reason="bitsandbytes is missing (extra: optim)")
        from accessory.train.adamw_8bit import require_8bit

        require_8bit("cuda")
    wanted, got = curve(trainer()), curve(trainer(gradient_dtype, **choices))
    assert wanted[-1] < 0.75 * wanted[0]
    for a, b in zip(got, wanted, strict=True):
        assert math.isclose(a, b, rel_tol=5e-2), (got, wanted)


@pytest.mark.parametrize("choices", [EIGHT, HOST], ids=["8 bits", "host"])
def test_a_state_is_read_where_the_moments_lie(tmp_path, choices):
    if choices == EIGHT:
        pytest.importorskip("bitsandbytes", reason="bitsandbytes is missing (extra: optim)")
    whole, again = trainer(**choices), trainer(**choices)
    curve(whole, last=3)
    folder = save_state(whole, tmp_path, 3, {"updates": 3, "loss_scale": [1.0, 0]}, 1)
    load_state(again, folder)
    for (name, p), (_, q) in zip(whole.named, again.named, strict=True):
        for moment, tensor in whole.optimizer.state[p].items():
            other = again.optimizer.state[q][moment]
            assert torch.equal(tensor, other), (name, moment)
            assert (tensor.device, tensor.is_pinned()) == (other.device, other.is_pinned()), (name, moment)
        assert torch.equal(p, q), name


# --------------------------------------------------------------------------- memory

LARGE = WIDE.replace(dim=1024, hidden_dim=4096, n_heads=8, n_kv_heads=4, head_dim=128, vocab_size=32000)


@pytest.fixture(scope="module")
def large():
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(shape, generator=generator) * 0.02 if len(shape) > 1 else torch.ones(shape)
        for name, shape in expected_shapes(LARGE).items()
    }


def planned(**choices):
    task = Training(kind="full", batch_size=4, max_words=12, packing=False, **choices)
    return Setup(args=LARGE, task=task)


CHOICES = [{}, {"gradient_dtype": "bf16"}, EIGHT, HOST, EIGHT | {"gradient_dtype": "bf16"}]


@pytest.mark.parametrize("choices", CHOICES, ids=["fp32", "bf16 gradients", "8 bits", "host", "8 bits, bf16 gradients"])
def test_memory_is_what_the_planner_says(large, choices):
    """What lasts, beside the libraries' workspace; gradients, to 2 %; what the update adds; a step's peak, to 10 %."""
    if choices.get("optimizer"):
        pytest.importorskip("bitsandbytes", reason="bitsandbytes is missing (extra: optim)")
    gc.collect()
    torch.cuda.empty_cache()
    began = torch.cuda.memory_allocated()
    others = {key: value for key, value in choices.items() if key != "gradient_dtype"}
    dtype = torch.bfloat16 if "gradient_dtype" in choices else torch.float32
    made = trainer(dtype, LARGE, large, **others)
    made.step(batches(0), 1e-4)
    setup = planned(**choices)
    step = training_moments(setup, setup.task)["the optimiser's step"]

    torch.cuda.synchronize()
    lasting = torch.cuda.memory_allocated() - began
    assert -1e6 <= lasting - step["weights"] - step["optimiser"] <= WORKSPACE + 40e6

    torch.cuda.reset_peak_memory_stats()
    made.forward_backward(batches(1))
    torch.cuda.synchronize()
    passes = torch.cuda.max_memory_allocated() - began
    gradients = torch.cuda.memory_allocated() - began - lasting
    assert gradients == pytest.approx(step["gradients"], rel=0.02, abs=10e6)

    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    made.optimizer.step(0.5)
    torch.cuda.synchronize()
    added = torch.cuda.max_memory_allocated() - held
    assert added == pytest.approx(step["pieces that are updated"], abs=40e6)
    assert max(passes, held - began + added) == pytest.approx(estimate(setup).allocated, rel=0.10)


# --------------------------------------------------------------------------- copies that stay


def graphed(large, copies=True, **choices):
    """A trainer whose passes are CUDA graphs."""
    made = trainer(args=LARGE, tensors=large, graphs=True, **choices)
    assert isinstance(made.passes, GraphedPasses)
    if not copies:
        made.passes.copied.clear()
        for _, p in made.named:
            if copy_of(p) is not None:
                del p.compute_copy
    return made


@pytest.mark.parametrize("choices", [{}, EIGHT, HOST], ids=["fp32", "8 bits", "host"])
def test_a_run_with_copies_is_one_without(large, choices, tmp_path):
    """Bit by bit: with replays, evaluations, weights that somebody sets, and a state that is read."""
    if choices == EIGHT:
        pytest.importorskip("bitsandbytes", reason="bitsandbytes is missing (extra: optim)")
    losses, values = [], []
    for copies in (True, False):
        made, found = graphed(large, copies, **choices), []
        state = None
        for step in range(7):
            found.append(made.step(batches(step % 2, parts=2), 3e-4)["loss"])
            if step == 3:
                state = save_state(made, tmp_path / str(copies), 4, {"updates": 4, "loss_scale": [1.0, 0]}, 1)
            if step == 4:
                with torch.no_grad():
                    torch._foreach_mul_([p for _, p in made.named], 1.01)
            if step == 5:
                load_state(made, state)
            if step > 3:
                found.append(made.evaluate(batches(9))[0])
        assert made.passes._made
        kept = [p for _, p in made.named if copy_of(p) is not None]
        assert bool(kept) == copies
        if copies and not choices:
            large_ones = [p for p in kept if dispatch.find(dispatch.over_numbers("adamw", p)) is not None]
            assert large_ones
            assert all(copy_of(p).is_current(p) for p in large_ones)
        losses.append(found)
        values.append({name: p.detach().cpu() for name, p in made.named})
        del made, kept
        gc.collect()
        torch.cuda.empty_cache()
    assert losses[0] == losses[1]
    for name, value in values[0].items():
        assert torch.equal(value, values[1][name]), name


def test_copies_that_stay_do_not_raise_a_steps_peak(large):
    """What lasts is what the planner says; the peak is that of a step which makes the copies, to 2 %."""
    peaks = []
    for copies in (False, True):
        gc.collect()
        torch.cuda.empty_cache()
        began = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        made = graphed(large, copies)
        for step in range(4):
            made.step(batches(step), 1e-4)
        torch.cuda.synchronize()
        peaks.append(torch.cuda.max_memory_allocated() - began)
        lasting = torch.cuda.memory_allocated() - began
        copied = sum(copy_of(p).tensor.nbytes for _, p in made.named if copy_of(p) is not None)
        del made
    setup = planned(cuda_graphs=True)
    step = training_moments(setup, setup.task)["the optimiser's step"]
    assert copied == step["16-bit copies of weights"]
    assert -1e6 <= lasting - sum(step.values()) <= 2 * WORKSPACE + 40e6
    assert peaks[1] <= 1.02 * peaks[0]
