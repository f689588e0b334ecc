"""The residual stream's kernels, and rows times a dense weight, against torch: on a GPU, or interpreted."""

from importlib.metadata import version

import pytest
import torch
from helpers.interpreted import interpret, relative
from packaging.version import Version

from accessory.ops.norm import Exchange, add_rms_norm, rms_norm
from accessory.ops.routing import add_norm_route

pytest.importorskip("triton", reason="triton is missing (extra: gpu)")

# (tokens, dim, experts, experts a token): sizes that are no power of two, and every expert chosen.
CASES = [(1, 64, 8, 2), (5, 576, 8, 2), (3, 100, 3, 3), (2, 130, 64, 6)]
SIZES = [(1, 96, 64), (2, 33, 130), (3, 48, 4100), (4, 130, 256)]  # (tokens, out, in)


def check(case, device, dtype, bound):
    from accessory.ops.triton import add_norm as kernels

    T, D, E, K = case
    g = torch.Generator().manual_seed(D)
    x_TD, y_TD = torch.randn(T, D, generator=g), torch.randn(T, D, generator=g).to(dtype)
    norm_D, gate_ED = torch.rand(D, generator=g) + 0.5, torch.randn(E, D, generator=g) * D**-0.5
    there = [t.to(device) for t in (x_TD, y_TD, norm_D, gate_ED)]
    for added in (True, False):
        x, y, norm, gate = there if added else (there[0], None, *there[2:])
        want = add_norm_route(x_TD, y_TD if added else None, norm_D, 1e-5, gate_ED, K, dtype)
        got = kernels.add_norm_route(x, y, norm, 1e-5, gate, K, dtype)
        assert torch.equal(got[0].cpu(), want[0])
        assert torch.equal(got[3].cpu(), want[3])
        assert (got[1].dtype, got[3].dtype) == (dtype, torch.int64)
        assert relative(got[1], want[1]) <= bound
        assert relative(got[2], want[2]) <= 1e-5
        total, h = kernels.add_rms_norm(x, y, norm, 1e-5, dtype)
        assert torch.equal(total.cpu(), want[0])
        assert relative(h, want[1]) <= bound
        if device == "cuda" or Version(version("triton")) < Version(
            "3.8"
        ):  # since then its interpreter refuses a row of NaN
            nan = x.clone()
            nan[0, 0] = torch.nan
            expert_TK = kernels.add_norm_route(nan, y, norm, 1e-5, gate, K, dtype)[3].cpu()
            assert ((expert_TK >= 0) & (expert_TK < E)).all()  # a broken row still names experts that exist
            assert torch.equal(expert_TK[1:], want[3][1:])


def check_exchange(device, ranks, route):
    """Each rank's launch on its own: the other ranks' words have arrived already, two turns of them."""
    from accessory.ops.triton import add_norm as kernels

    T, D, E, K, rows = 3, 100, 8, 2, 5
    g = torch.Generator().manual_seed(ranks)
    norm_D, gate_ED = torch.rand(D, generator=g).to(device) + 0.5, torch.randn(E, D, generator=g).to(device) * D**-0.5
    x_TD = torch.randn(T, D, generator=g).to(device)
    part_NWTD = torch.randn(2, ranks, T, D, generator=g).to(device)
    for rank in range(ranks):
        inboxes = torch.zeros(ranks, 2, ranks, rows, D, dtype=torch.int64, device=device)
        for turn in (1, 2):
            bits = part_NWTD[turn - 1].view(torch.int32).long() & 0xFFFFFFFF
            inboxes[rank, turn % 2, :, :T] = bits | turn << 32
        mine = inboxes[rank].clone()
        address_W = torch.tensor([inbox.data_ptr() for inbox in inboxes], device=device)
        turn_T = torch.zeros(rows, dtype=torch.int32, device=device)
        exchange = Exchange(address_W, turn_T, rank, ranks, rows, D, inboxes)
        for turn in (1, 2):
            parts = part_NWTD[turn - 1]
            y_TD = sum(parts[1:], parts[0])
            want = add_norm_route(x_TD, y_TD, norm_D, 1e-5, gate_ED, K, torch.float32)
            if route:
                got = kernels.add_norm_route(x_TD, parts[rank], norm_D, 1e-5, gate_ED, K, torch.float32, exchange)
                assert torch.equal(got[3], want[3])
            else:
                got = kernels.add_rms_norm(x_TD, parts[rank], norm_D, 1e-5, torch.float32, exchange)
            assert torch.equal(got[0], want[0])  # in the order of ranks, to the bit
            assert relative(got[1], want[1]) <= 1e-6
            for other in range(ranks):
                sent = inboxes[other, turn % 2, rank, :T]
                assert other == rank or torch.equal(sent, mine[turn % 2, rank, :T])
        assert torch.equal(inboxes[rank], mine)
        assert turn_T.tolist() == [2] * T + [0] * (rows - T)


def check_rows(size, device, dtype, bound):
    from accessory.ops.triton.rows import linear

    T, O, I = size  # noqa: E741
    g = torch.Generator().manual_seed(O)
    x_TI, w_OI = torch.randn(T, I, generator=g).to(dtype), torch.randn(O, I, generator=g).to(dtype)
    assert relative(linear(x_TI.to(device), w_OI.to(device)), x_TI.double() @ w_OI.double().T) <= bound


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_the_gpu(dtype):
    bound = {torch.bfloat16: 3e-3, torch.float16: 4e-4, torch.float32: 1e-6}[dtype]
    for case in [*CASES, (1, 4096, 8, 2), (64, 4096, 8, 2)]:
        check(case, "cuda", dtype, bound)
    for size in [*SIZES, (1, 6144, 4096), (4, 4096, 14336)]:
        check_rows(size, "cuda", dtype, bound)
    for ranks in (2, 3):
        check_exchange("cuda", ranks, ranks == 2)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU itself runs the kernels here")
def test_in_the_interpreter():
    how = "'cpu', torch.float32, 1e-6"
    interpret(
        __file__,
        f"for c in t.CASES: t.check(c, {how})\nfor s in t.SIZES: t.check_rows(s, {how})\n"
        "for ranks in (2, 3): t.check_exchange('cpu', ranks, ranks == 2)",
    )


def test_the_definition_adds_then_norms():
    x, y, w = torch.randn(3, 8), torch.randn(3, 8), torch.rand(8)
    total, h = add_rms_norm(x, y, w, 1e-5, torch.bfloat16)
    assert torch.equal(total, x + y)
    assert torch.equal(h, rms_norm(x + y, w, 1e-5).bfloat16())
    assert add_rms_norm(x, None, w, 1e-5, torch.float32)[0] is x
