"""Kernels against the definition: on a GPU where there is one, else in Triton's interpreter, in fp32."""

import pytest
import torch
from helpers.interpreted import interpret, relative

pytest.importorskip("triton", reason="triton is missing (extra: gpu)")

CASES = [  # T, E, K, D, F, first, held
    (1, 8, 2, 64, 96, 0, 8),
    (1, 8, 2, 100, 70, 0, 8),
    (3, 5, 2, 48, 40, 0, 5),
    (4, 4, 1, 32, 64, 0, 4),
    (2, 8, 3, 64, 96, 4, 4),
]


def check(T, E, K, D, F, first, held, device, dtype):
    from accessory.ops.linear import Weight
    from accessory.ops.triton.decode_experts import decode_experts

    g = torch.Generator().manual_seed(T * 100 + E)
    w1, w2, w3 = (torch.randn(E, *s, generator=g) * 0.2 for s in ((F, D), (D, F), (F, D)))
    x, weight = torch.randn(T, D, generator=g), torch.rand(T, K, generator=g)
    expert = torch.stack([torch.randperm(E, generator=g)[:K] for _ in range(T)])
    x, w1, w2, w3 = (t.to(dtype) for t in (x, w1, w2, w3))
    expected = torch.zeros(T, D, dtype=torch.float64)
    for t in range(T):
        for k in range(K):
            e = expert[t, k].item()
            if first <= e < first + held:
                a = w1[e].double() @ x[t].double()
                h = (a * a.sigmoid() * (w3[e].double() @ x[t].double())).to(dtype).double()
                expected[t] += weight[t, k].double() * (w2[e].double() @ h)
    part = [Weight(w[first : first + held].contiguous().to(device)) for w in (w1, w2, w3)]
    y = decode_experts(x.to(device), *part, weight.to(device), expert.to(device), first)
    assert relative(y, expected) <= (2e-6 if dtype == torch.float32 else 2e-3)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_pairs_on_the_gpu(case, dtype):
    check(*case, device="cuda", dtype=dtype)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU itself runs the kernels here")
def test_pairs_in_the_interpreter():
    interpret(__file__, "for case in t.CASES: t.check(*case, device='cpu', dtype=torch.float32)")
