"""Quantised kernels against the dequantised weight: on a GPU, or in Triton's interpreter in fp32."""

import pytest
import torch
from helpers.interpreted import interpret, others_slow, relative

pytest.importorskip("triton", reason="triton is missing (extra: gpu)")

FORMATS = ["int8", "fp8", "int4", "nf4", "nf4-dq"]
CASES = [(1, 8, 2, 256, 384, 0, 8), (3, 5, 2, 128, 256, 0, 5), (2, 8, 3, 384, 128, 4, 4)]  # T, E, K, D, F, first, held


def check(format, case, device, dtype):
    from accessory.ops.linear import Weight
    from accessory.ops.quantized import dequantize, quantize
    from accessory.ops.triton import packed as kernels

    if device == "cpu":  # the interpreter's time grows with the number of programs, not with their size
        for tiles in kernels.TILES.values():
            tiles.update({kernel: (64, cols, warps) for kernel, (_, cols, warps) in tiles.items()})
    T, E, K, D, F, first, held = case
    g = torch.Generator().manual_seed(T * 100 + E)
    w1, w2, w3 = (quantize(torch.randn(E, *s, generator=g) * 0.2, format) for s in ((F, D), (D, F), (F, D)))
    x, weight = torch.randn(T, D, generator=g).to(dtype), torch.rand(T, K, generator=g)
    expert = torch.stack([torch.randperm(E, generator=g)[:K] for _ in range(T)])
    bound = 3e-6 if dtype == torch.float32 else 4e-3

    one = w1[1]
    want = x.double() @ dequantize(one).double().T
    there = one.map(lambda t: t.to(device))
    assert relative(kernels.linear(x.to(device), there), want) <= bound
    assert torch.equal(kernels.dequantize(there, dtype).cpu(), dequantize(one, dtype))

    expected = torch.zeros(T, D, dtype=torch.float64)
    for t in range(T):
        for k in range(K):
            e = expert[t, k].item()
            if first <= e < first + held:
                a = dequantize(w1[e]).double() @ x[t].double()
                h = (a * a.sigmoid() * (dequantize(w3[e]).double() @ x[t].double())).to(dtype).double()
                expected[t] += weight[t, k].double() * (dequantize(w2[e]).double() @ h)
    part = [Weight(w.map(lambda t: t[first : first + held].contiguous().to(device))) for w in (w1, w2, w3)]
    y = kernels.decode_experts(x.to(device), *part, weight.to(device), expert.to(device), first)
    assert relative(y, expected) <= bound


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_packed_on_the_gpu(format, case, dtype):
    check(format, case, device="cuda", dtype=dtype)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU itself runs the kernels here")
@pytest.mark.parametrize("format", others_slow(FORMATS, "int8", "int4"))
def test_packed_in_the_interpreter(format):
    interpret(__file__, f"for case in t.CASES: t.check({format!r}, case, device='cpu', dtype=torch.float32)")
