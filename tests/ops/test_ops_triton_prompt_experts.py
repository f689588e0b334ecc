"""What experts do beside their products for many tokens, against torch: on a GPU, or in Triton's interpreter."""

import pytest
import torch
from helpers.interpreted import interpret, relative

from accessory.ops.dense_products import sort_by_expert
from accessory.ops.experts import combine, silu

pytest.importorskip("triton", reason="triton is missing (extra: gpu)")


def check_gate(device, dtype, bound):
    from accessory.ops.triton import prompt_experts as kernels

    for N, F in ((1, 1), (3, 100), (5, 1000), (0, 8)):
        gate, up = (torch.randn(N, F, generator=torch.Generator().manual_seed(n)).to(dtype) for n in range(2))
        want = silu(gate.double()) * up.double()
        got = kernels.gate(gate.to(device), up.to(device))
        assert got.dtype == dtype
        assert got.shape == want.shape
        assert not N or relative(got, want) <= bound
    far = torch.tensor([[-1e4, 1e4, 0.0, torch.nan]], device=device, dtype=dtype)
    assert kernels.gate(far, torch.ones_like(far))[0, :3].tolist() == [0.0, far[0, 1].item(), 0.0]
    assert kernels.gate(far, torch.ones_like(far))[0, 3].isnan()


def check_gate_backward(device, dtype, bound):
    """In place of what it reads: the gradients of gate and up, weight · h, and the weights' gradients."""
    from accessory.ops.experts import gate_backward as reference
    from accessory.ops.triton import prompt_experts as kernels

    for N, F in ((1, 8), (3, 100), (5, 2100), (0, 8)):
        g = torch.Generator().manual_seed(N)
        gate, up, dh = (torch.randn(N, F, generator=g).to(dtype) for _ in range(3))
        weight = torch.rand(N, generator=g)
        wants = [t.to(torch.float32, copy=True) for t in (gate, up, dh)]
        want_N = reference(*wants, weight, True)
        inputs = [t.to(device, copy=True) for t in (gate, up, dh)]
        got_N = kernels.gate_backward(*inputs, weight.to(device), True)
        assert got_N.dtype == torch.float32
        for ours, theirs in zip(inputs, wants, strict=True):
            assert not N or relative(ours, theirs) <= bound
        size_N = (silu(gate.double()) * up.double() * dh.double()).abs().sum(1)  # the sum's terms may cancel out
        assert bool(((got_N.cpu() - want_N).abs() <= 1e-6 * size_N).all())


def check_combine(device, dtype, bound):
    """Of 5 experts, a rank has those from 1 to 3: the other pairs have no product, and what lies there adds nothing."""
    from accessory.ops.triton import prompt_experts as kernels

    for T, K, D in ((1, 2, 33), (7, 2, 100), (4, 3, 1030)):
        g = torch.Generator().manual_seed(T)
        expert_TK = torch.rand(T, 5, generator=g).topk(K)[1]
        weight_TK, y_ND = torch.rand(T, K, generator=g), torch.randn(T * K, D, generator=g).to(dtype)
        order_N, count_E = sort_by_expert(expert_TK, 3, 1)
        rows = count_E.sum()
        y_ND[int(rows) :] = torch.nan
        want = combine(y_ND, order_N, weight_TK, rows)
        place_N = torch.empty_like(order_N).scatter_(0, order_N, torch.arange(len(order_N)))
        got = kernels.combine(*(t.to(device) for t in (y_ND, place_N, weight_TK, rows)))
        assert got.dtype == torch.float32
        assert got.shape == (T, D)
        assert relative(got, want) <= bound


@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU itself runs the kernels here")
def test_interpreted():
    how = "('cpu', torch.float32, 1e-6)"
    interpret(__file__, f"t.check_gate{how}; t.check_gate_backward{how}; t.check_combine{how}")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 3e-3), (torch.float16, 4e-4)])
def test_on_the_card(dtype, bound):
    check_gate("cuda", dtype, bound)
    check_gate_backward("cuda", dtype, bound)
    check_combine("cuda", dtype, 1e-6)
