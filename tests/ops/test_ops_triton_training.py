"""Kernels of a training step beside the products, against autograd: on a GPU, or in Triton's interpreter."""

import pytest
import torch
from helpers.interpreted import interpret, relative

from accessory.ops.norm import add_rms_norm
from accessory.ops.rope import rope_frequencies, rotations

pytest.importorskip("triton", reason="triton is missing (extra: gpu)")


def check_norm(device, dtype, bound):
    """The sum's gradient comes from the norm and from elsewhere, from one of them, or the weight has none."""
    from accessory.ops.triton.norm_backward import norm_backward

    for T, D, added, learns in ((1, 64, True, True), (5, 100, False, True), (700, 96, True, False), (0, 8, True, True)):
        g = torch.Generator().manual_seed(T)
        x, dh, dsum = (torch.randn(T, D, generator=g) for _ in range(3))
        dh, norm = dh.to(dtype), torch.rand(D, generator=g) + 0.5
        wide, weight = x.double().requires_grad_(), norm.double().requires_grad_()
        h = wide * (wide.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weight
        ((h * dh.double()).sum() + (wide * dsum.double()).sum() * added).backward()
        there = [t.to(device) for t in (x, norm, dh, dsum)]
        dx, dnorm = norm_backward(there[0], there[1], 1e-5, there[2], there[3] if added else None, learns)
        assert dx.dtype == torch.float32
        assert (dnorm is None) != learns
        assert not T or relative(dx, wide.grad) <= bound
        assert dnorm is None or not T or relative(dnorm, weight.grad) <= bound


def check_rope(device, dtype, bound):
    """Back is the inverse, because turning changes no length."""
    from accessory.ops.triton.rope import turn

    for N, H, d in ((1, 1, 2), (7, 3, 12), (5, 8, 64)):
        g = torch.Generator().manual_seed(N)
        x = torch.randn(N, H, d, generator=g).to(dtype)
        rotation = rotations(torch.randint(0, 500, (1, N), generator=g), rope_frequencies(d, 1e4)[0])
        want = torch.view_as_real(torch.view_as_complex(x.double().unflatten(-1, (-1, 2))) * rotation[0]).flatten(-2)
        factors = torch.view_as_real(rotation[0, :, 0]).contiguous().to(device)
        got = turn(x.to(device), factors, False)
        assert got.dtype == dtype
        assert relative(got, want) <= bound
        assert relative(turn(got, factors, True), x) <= 2 * bound


@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU itself runs the kernels here")
@pytest.mark.parametrize("kernel", ["norm", "rope"])
def test_interpreted(kernel):
    interpret(__file__, f"t.check_{kernel}('cpu', torch.float32, 2e-6)")


on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.mark.gpu
@on_a_gpu
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2e-6), (torch.bfloat16, 3e-3), (torch.float16, 4e-4)])
def test_on_the_card(dtype, bound):
    check_norm("cuda", dtype, 2e-6)
    check_rope("cuda", dtype, bound)


@pytest.mark.gpu
@on_a_gpu
@pytest.mark.parametrize("y_dtype", [None, torch.float32, torch.bfloat16])
def test_the_norm_with_gradients_is_autograds(y_dtype):
    def run(device):
        g = torch.Generator().manual_seed(3)
        x, y, norm = (torch.randn(s, generator=g).to(device).requires_grad_() for s in ((4, 9, 64), (4, 9, 64), (64,)))
        given = None if y_dtype is None else y.to(y_dtype)
        total, h = add_rms_norm(x, given, norm, 1e-5, torch.float32)
        (total.sin().sum() + h.cos().sum()).backward()
        return [t.detach().cpu() for t in (total, h, x.grad, norm.grad, *([] if given is None else [y.grad]))]

    for ours, theirs in zip(run("cuda"), run("cpu"), strict=True):
        assert relative(ours, theirs) <= 1e-5
