"""The kernel of cross-entropy against torch's own: on a GPU, or in Triton's interpreter."""

import pytest
import torch
import torch.nn.functional as F
from helpers.interpreted import interpret, relative

pytest.importorskip("triton", reason="triton is missing (extra: gpu)")


def check(device, dtype, bound):
    from accessory.ops.triton.cross_entropy import cross_entropy

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


@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU itself runs the kernels here")
def test_interpreted():
    interpret(__file__, "t.check('cpu', torch.float32, 1e-6)")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 3e-3), (torch.float16, 4e-4)])
def test_on_the_card(dtype, bound):
    check("cuda", dtype, bound)
