"""The kernel of cross-entropy against torch's own: on a GPU, or in Triton's interpreter."""

import pytest
import torch
import torch.nn.functional as F
from helpers.interpreted import interpret, relative

pytest.importorskip("triton", reason="triton is missing (extra: gpu)")


def poison(device):
    """Fill memory that the next tensors will get with NaN."""
    if device == "cuda":
        torch.full((2**22,), torch.nan, device=device)
    else:
        from unittest import mock

        full = torch.full
        mock.patch("torch.empty", lambda *shape, **how: full(shape, torch.nan, **how)).start()


def cross_entropy(logits, label, gradient):
    """As one part, which is the whole vocabulary."""
    from accessory.ops.cross_entropy import loss_sum
    from accessory.ops.triton.cross_entropy import cross_entropy as kernel

    return loss_sum(kernel(logits, label, 0, None, gradient), label)


def check(device, dtype, bound):
    poison(device)
    for R, V in ((1, 1), (3, 100), (2, 5000), (5, 4096), (0, 7)):
        g = torch.Generator().manual_seed(V)
        logits = (torch.randn(R, V, generator=g) * 4).to(dtype)
        label = torch.randint(0, V, (R,), generator=g)
        wide = logits.double().requires_grad_()
        want = F.cross_entropy(wide, label, reduction="sum")
        want.backward()
        there = logits.to(device, copy=True)
        alone = cross_entropy(there, label.to(device), False)
        assert torch.equal(there.cpu(), logits)
        loss = cross_entropy(there, label.to(device), True)
        assert loss.dtype == torch.float32
        assert torch.equal(loss, alone)
        assert loss.item() == pytest.approx(want.item(), rel=2e-6, abs=1e-6)
        assert there.dtype == dtype
        assert relative(there, wide.grad) <= bound or V == 1
    far = torch.tensor([[1e4, -1e4, 9e3], [float("-inf"), 0.0, 0.0]], device=device, dtype=dtype)
    loss = cross_entropy(far, torch.tensor([2, 1], device=device), True)
    assert loss.item() == pytest.approx(float(far.new_tensor(1e4)) - float(far.new_tensor(9e3)) + 0.6931472, rel=1e-2)
    assert far[1].tolist() == [0.0, -0.5, 0.5]


def check_parts(device, dtype, bound):
    """The vocabulary cut into parts, as ranks have it: values, gradients, and the numbers that are exchanged."""
    from accessory.ops.cross_entropy import in_torch, loss_sum, together
    from accessory.ops.triton.cross_entropy import cross_entropy as kernel

    poison(device)
    for R, widths in ((5, (50, 50)), (4, (4096, 1, 4999)), (0, (3, 3)), (3, (1, 1, 1))):
        V, ends = sum(widths), torch.tensor(widths).cumsum(0).tolist()
        g = torch.Generator().manual_seed(V)
        logits = (torch.randn(R, V, generator=g) * 4).to(dtype)
        label = torch.randint(0, V, (R,), generator=g)
        label[1:2] = -100
        wide = logits.double().requires_grad_()
        want = F.cross_entropy(wide, label, reduction="sum")
        want.backward()
        firsts = [end - width for end, width in zip(ends, widths, strict=True)]
        parts = [logits[:, a:b].to(device, copy=True).contiguous() for a, b in zip(firsts, ends, strict=True)]
        there = label.to(device)
        own = [kernel(part, there, first, None, False) for part, first in zip(parts, firsts, strict=True)]
        for part, first, sums in zip(parts, firsts, own, strict=True):
            assert sums.shape == (3, R)
            torch.testing.assert_close(sums, in_torch(part, there, first, None, False), rtol=5e-6, atol=0)
        sums = together(torch.stack(own))
        assert loss_sum(sums, there).item() == pytest.approx(want.item(), rel=2e-6, abs=1e-6)
        for part, first in zip(parts, firsts, strict=True):
            kernel(part, there, first, sums, True)
        got = torch.cat(parts, dim=1)
        assert got.dtype == dtype
        assert relative(got, wide.grad) <= bound
        assert not got[1:2].any()


@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU itself runs the kernels here")
def test_interpreted():
    how = "'cpu', torch.float32, 1e-6"
    interpret(__file__, f"t.check({how}); t.check_parts({how})")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 3e-3), (torch.float16, 4e-4)])
def test_on_the_card(dtype, bound):
    check("cuda", dtype, bound)
    check_parts("cuda", dtype, bound)
