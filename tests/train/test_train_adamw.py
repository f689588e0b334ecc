"""AdamW of one process: torch's numbers bit by bit, pieces, moments on the host and in 8 bits, and what is refused."""

import builtins
import re

import pytest
import torch
from torch import nn

from accessory.errors import ConfigError, MissingExtraError
from accessory.train import adamw_8bit, adamw_offload
from accessory.train.adamw import BETAS, EPS, AdamW, Piece, buckets
from accessory.train.adamw_offload import OffloadedAdamW
from accessory.train.optim import make_optimizer

SHAPES = {"w.weight": (70, 300), "v.weight": (512, 256), "a.norm.weight": (300,), "w.bias": (7,), "gate.weight": (4, 9)}


def parameters(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [(name, nn.Parameter(torch.randn(shape, generator=generator))) for name, shape in SHAPES.items()]


def gradients(step, named):
    generator = torch.Generator().manual_seed(100 + step)
    return [torch.randn(p.shape, generator=generator) for _, p in named]


def run(optimizer, named, steps=6, scale=0.7, lr=1e-2, dtype=torch.float32):
    """The parameters after some steps whose gradients are multiplied by `scale`."""
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr
        for (_, p), gradient in zip(named, gradients(step, named), strict=True):
            p.grad_dtype = dtype
            p.grad = gradient.to(dtype)
        optimizer.step(scale)
    return [p.detach() for _, p in named]


def by_torch(steps=6, scale=0.7, lr=1e-2, dtype=torch.float32):
    """The same by torch's own class."""
    named = parameters()
    groups = [
        {"params": [p for name, p in named if name in ("w.weight", "v.weight", "gate.weight")], "weight_decay": 0.1},
        {"params": [p for name, p in named if name in ("a.norm.weight", "w.bias")], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=BETAS, eps=EPS)
    for step in range(steps):
        for (_, p), gradient in zip(named, gradients(step, named), strict=True):
            p.grad = gradient.to(dtype).float() * scale
        optimizer.step()
    return [p.detach() for _, p in named], [optimizer.state[p]["exp_avg_sq"] for _, p in named]


@pytest.mark.parametrize("scale", [1.0, 0.7])
def test_it_is_torchs_bit_by_bit(scale):
    named = parameters()
    optimizer = make_optimizer(named, 0.1)
    got = run(optimizer, named, scale=scale)
    values, squares = by_torch(scale=scale)
    for (name, p), value, wanted, square in zip(named, got, values, squares, strict=True):
        assert torch.equal(value, wanted), name
        assert torch.equal(optimizer.state[p]["exp_avg_sq"], square), name
    assert optimizer.updates == 6


def test_gradients_in_bf16_are_widened_piece_by_piece(monkeypatch):
    """The factor multiplies what was widened: a product in bf16 would round it."""
    monkeypatch.setattr("accessory.train.adamw.OPTIMIZER_PIECE", 4096)
    named = parameters()
    got = run(make_optimizer(named, 0.1), named, dtype=torch.bfloat16)
    for value, wanted in zip(got, by_torch(dtype=torch.bfloat16)[0], strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("size", [64, 4096, 2**23])
def test_buckets_hold_every_number_once(size):
    named = parameters()
    pieces = [Piece(p.detach(), p.detach() * 2, {"exp_avg": p.detach() * 3}) for _, p in named]
    found = list(buckets(pieces, size))
    assert all(sum(piece.value.numel() for piece in bucket) <= size for bucket in found)
    flat = torch.cat([piece.value for bucket in found for piece in bucket])
    assert torch.equal(flat, torch.cat([p.detach().flatten() for _, p in named]))
    for piece in (piece for bucket in found for piece in bucket):
        assert torch.equal(piece.gradient, piece.value * 2)
        assert torch.equal(piece.moments["exp_avg"], piece.value * 3)


def test_on_a_cpu_nothing_is_offloaded():
    plain, offloaded = parameters(), parameters()
    optimizer = make_optimizer(offloaded, 0.1, offload="optimizer")
    assert type(optimizer) is AdamW
    for value, wanted in zip(run(optimizer, offloaded), run(make_optimizer(plain, 0.1), plain), strict=True):
        assert torch.equal(value, wanted)


@pytest.mark.parametrize("piece", [4096, 2**23])
def test_moments_that_visit_are_updated_and_go_back(monkeypatch, piece):
    """A CPU has no streams; the buckets, their places in the buffers and the views of host memory are the same."""
    monkeypatch.setattr(adamw_offload, "OPTIMIZER_PIECE", piece)
    named = parameters()
    optimizer = OffloadedAdamW(named, 0.1)
    got = run(optimizer, named)
    values, squares = by_torch()
    for (name, p), value, wanted, square in zip(named, got, values, squares, strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-6, atol=1e-7, msg=name)
        torch.testing.assert_close(optimizer.state[p]["exp_avg_sq"], square, rtol=1e-6, atol=1e-9, msg=name)
    memory = {optimizer.state[p]["exp_avg"].untyped_storage().data_ptr() for _, p in named}
    assert len(memory) == 1


# --------------------------------------------------------------------------- 8 bits


def test_eight_bits_is_bitsandbytes_own_optimizer():
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is missing (extra: optim)")
    named, theirs = parameters(), parameters()
    optimizer = make_optimizer(named, 0.1, kind="adamw_8bit")
    groups = [{"params": [p for name, p in theirs if name == "v.weight"], "weight_decay": 0.1}]
    other = bitsandbytes.optim.AdamW8bit(groups, lr=1e-2, betas=BETAS, eps=EPS)
    for step in range(6):
        for (name, p), gradient in zip(theirs, gradients(step, theirs), strict=True):
            p.grad = gradient if name == "v.weight" else None
        other.step()
    run(optimizer, named, scale=1.0)
    ours, p = optimizer.state[named[1][1]], theirs[1][1]
    assert torch.equal(named[1][1], p)
    assert torch.equal(ours["exp_avg_8bit"], other.state[p]["state1"])
    assert torch.equal(ours["exp_avg_sq_scale"].flatten(), other.state[p]["absmax2"])
    assert ours["exp_avg_scale"].shape == (512, 1)


def test_small_and_uneven_tensors_keep_moments_in_fp32():
    """All but v.weight: rows of 300 numbers are no whole blocks. So their numbers are AdamW's."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is missing (extra: optim)")
    named = parameters()
    optimizer = make_optimizer(named, 0.1, kind="adamw_8bit")
    got = run(optimizer, named)
    kept = {name: set(optimizer.state[p]) == {"exp_avg", "exp_avg_sq"} for name, p in named}
    assert kept == {name: name != "v.weight" for name in SHAPES}
    for (name, _), value, wanted in zip(named, got, by_torch()[0], strict=True):
        assert torch.equal(value, wanted) == (name != "v.weight"), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_eight_bits_in_pieces_are_those_of_the_whole(monkeypatch, dtype):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is missing (extra: optim)")
    results = []
    for piece in (2**23, 1024):
        monkeypatch.setattr(adamw_8bit, "OPTIMIZER_PIECE", piece)
        named = parameters()
        results.append(run(make_optimizer(named, 0.1, kind="adamw_8bit"), named, dtype=dtype)[1])
    torch.testing.assert_close(results[1], results[0], rtol=1e-6, atol=1e-7)


def test_a_cut_inside_a_block_is_refused():
    half = nn.Parameter(torch.zeros(64, 128))
    with pytest.raises(
        ConfigError, match=r"optimizer: adamw_8bit rounds blocks of 256 .* 128 numbers of a row of w\.wei"
    ):
        make_optimizer([("w.weight", half)], 0.0, kind="adamw_8bit", wholes={"w.weight": (64, 256)})


def test_without_bitsandbytes_one_line_says_how_to_get_it(monkeypatch):
    real = builtins.__import__

    def missing(name, *rest):
        if name.startswith("bitsandbytes"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(MissingExtraError, match=re.escape("pip install 'mixtral-accessory[optim]'")):
        adamw_8bit.require_8bit("cpu")


def test_a_device_that_cannot_make_an_update_is_named(monkeypatch):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is missing (extra: optim)")
    adamw_8bit.require_8bit("cpu")

    def fails(*_, **__):
        raise NotImplementedError("no kernel for this card")

    monkeypatch.setattr(adamw_8bit.functional(), "optimizer_update_8bit_blockwise", fails)
    with pytest.raises(
        ConfigError, match=r"^optimizer: adamw_8bit cannot run on cpu: .*no kernel for this card; install"
    ):
        adamw_8bit.require_8bit("cpu")
