"""The kernel of AdamW against torch's class, one operation at a time: on a GPU, or in Triton's interpreter."""

import pytest
import torch
from helpers.interpreted import interpret, relative
from torch import nn

pytest.importorskip("triton", reason="triton is missing (extra: gpu)")

BETAS, EPS, LR = (0.9, 0.95), 1e-8, 1e-2
SHAPES = ((1,), (7, 3), (1024,), (33, 65), (2, 512, 3))


def check(device, copied, bound):
    """Five updates. What torch cannot do, the factor and gradients in 16 bits, is done in fp32 before it."""
    from accessory.ops.triton.adamw import update

    for n, shape in enumerate(SHAPES):
        for decay, scale, dtype in ((0.0, 1.0, torch.float32), (0.1, 0.37, torch.float32), (0.1, 0.37, torch.bfloat16)):
            g = torch.Generator().manual_seed(n)
            weight = torch.randn(shape, generator=g)
            theirs = nn.Parameter(weight.clone())
            other = torch.optim.AdamW([theirs], LR, BETAS, EPS, weight_decay=decay, foreach=False)
            weight = weight.to(device)
            moments = [torch.zeros_like(weight) for _ in range(2)]
            copy = None if copied is None else torch.full(shape, float("nan"), dtype=copied, device=device)
            for updates in range(1, 6):
                # Small at first: the bias corrections then matter most.
                gradient = (torch.randn(shape, generator=g) * 10.0 ** (updates - 4)).to(dtype)
                theirs.grad = gradient.float() * scale
                other.step()
                how = {"lr": LR, "betas": BETAS, "eps": EPS, "weight_decay": decay}
                factor = torch.tensor(scale, dtype=torch.float64, device=device)
                update(weight, gradient.to(device), *moments, copy, updates=updates, scale=factor, **how)
            assert (weight.cpu() - theirs.detach()).abs().max() <= bound, (shape, decay, scale, dtype)
            for moment, name in zip(moments, ("exp_avg", "exp_avg_sq"), strict=True):
                assert relative(moment, other.state[theirs][name]) <= bound, name
            assert copy is None or torch.equal(copy, weight.to(copied))
            before = [t.clone() for t in (weight, *moments)]
            update(weight, gradient.to(device), *moments, copy, updates=6, scale=factor * float("nan"), **how)
            assert all(torch.equal(t, was) for t, was in zip((weight, *moments), before, strict=True))


@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU itself runs the kernels here")
def test_interpreted():
    """Triton's interpreter rounds to bf16 towards zero, so the copy is fp16, or fp32, here."""
    interpret(__file__, "for copied in (None, torch.float16, torch.float32): t.check('cpu', copied, 1e-6)")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("copied", [None, torch.bfloat16, torch.float16])
def test_on_the_card(copied):
    check("cuda", copied, 1e-6)
