"""Products in which a row has the same bits beside any others: a CPU's, and Triton's on a GPU or interpreted."""

import importlib.util

import pytest
import torch
from helpers.interpreted import interpret, multiply_rows_alike, others_slow, relative  # noqa: F401
from helpers.paging import paged

from accessory.ops.paged_attention import paged_attention_reference, query_by_query

FORMATS = ["dense", "int8", "int4", "nf4-dq"]
SIZES = [(128, 96), (256, 50)]  # (in, out) features
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is missing (extra: gpu)")
on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU itself runs the kernels here")


def weight_of(format, shape, device, dtype):
    from accessory.ops.quantized import quantize

    dense = torch.randn(*shape, generator=torch.Generator().manual_seed(3)) * 0.1
    return dense.to(device, dtype) if format == "dense" else quantize(dense, format).map(lambda t: t.to(device))


def values(weight):
    from accessory.ops.quantized import Packed, dequantize

    return (dequantize(weight) if isinstance(weight, Packed) else weight).double().cpu()


def check_linear(format, kind, device, dtype, bound):
    """Each row alone, in a batch of any size, at any place."""
    from accessory.ops import dispatch
    from accessory.ops.linear import linear

    for I, O in SIZES:  # noqa: E741
        weight = weight_of(format, (O, I), device, dtype)
        x = torch.randn(40, I, generator=torch.Generator().manual_seed(4)).to(device, dtype)
        with torch.no_grad(), dispatch.fixing(kind):
            whole = linear(x, weight)
            assert relative(whole, x.double().cpu() @ values(weight).T) <= bound
            for rows in ([7], [3, 7], list(range(17)), list(range(39, -1, -1))):
                assert torch.equal(linear(x[rows], weight), whole[rows]), (format, kind, I, O, rows)


def check_experts(format, kind, device, dtype, bound):
    """Each token alone, and beside others that send more rows to its experts. Some experts are another rank's."""
    from accessory.ops import dispatch
    from accessory.ops.experts import decode_experts, decode_kernel, grouped_experts
    from accessory.ops.linear import Weight

    T, D, F, E, K, first = 24, 128, 256, 4, 2, 1
    w1, w2, w3 = (Weight(weight_of(format, (E, *size), device, dtype)) for size in ((F, D), (D, F), (F, D)))
    g = torch.Generator().manual_seed(5)
    x = torch.randn(T, D, generator=g).to(device, dtype)
    expert = torch.stack([torch.randperm(6, generator=g)[:K] for _ in range(T)])
    share = torch.rand(T, K, generator=g)
    want = torch.zeros(T, D, dtype=torch.float64)
    v1, v2, v3 = values(w1.weight), values(w2.weight), values(w3.weight)
    for t, k in torch.cartesian_prod(torch.arange(T), torch.arange(K)).tolist():
        e = int(expert[t, k]) - first
        if 0 <= e < E:
            x_D = x[t].double().cpu()
            want[t] += share[t, k].double() * (v2[e] @ (torch.nn.functional.silu(v1[e] @ x_D) * (v3[e] @ x_D)))
    expert, share = expert.to(device), share.to(device)

    def feed_forward(rows):
        arguments = (x[rows], w1, w2, w3, share[rows], expert[rows])
        kernel = decode_kernel(x[rows], (w1, w2, w3), len(rows) * K, fused=False)
        assert (kernel is not None) == (kind == "decode" and device == "cuda" and dtype != torch.float32)
        if kernel is None:
            return grouped_experts(*arguments, first)
        return decode_experts(kernel, *arguments, first=first)

    with torch.no_grad(), dispatch.fixing(kind):
        whole = feed_forward(list(range(T)))
        assert relative(whole, want) <= bound
        for rows in ([7], [3, 7], list(range(17)), list(range(T - 1, -1, -1))):
            assert torch.equal(feed_forward(rows), whole[rows]), (format, kind, rows)


def check_kernels(format, dtype=torch.float32):
    """The kernels of `triton.fixed` themselves: in the interpreter no dispatch finds them."""
    from accessory.ops.linear import Weight
    from accessory.ops.quantized import Packed
    from accessory.ops.triton import fixed

    x = torch.randn(40, 128, generator=torch.Generator().manual_seed(4)).to(dtype)
    weight, stack = weight_of(format, (96, 128), "cpu", dtype), weight_of(format, (3, 96, 128), "cpu", dtype)
    for function in (fixed.decoding_linear_in_tiles, fixed.decoding_linear, fixed.prompt_linear):
        whole = function(x, weight)
        assert relative(whole, x.double() @ values(weight).T) <= 1e-6
        for rows in ([7], [3, 7], list(range(17)), list(range(39, -1, -1))):
            assert torch.equal(function(x[rows], weight), whole[rows]), (format, function, rows)
    for function in (fixed.decoding_grouped, fixed.prompt_grouped):
        whole = function(x, stack, torch.tensor([20, 0, 20]))
        assert relative(whole[20:], x[20:].double() @ values(stack)[2].T) <= 1e-6
        for count, rows in (([1, 0, 2], [7, 30, 22]), ([3, 0, 0], [5, 1, 2]), ([0, 0, 17], list(range(38, 21, -1)))):
            assert torch.equal(function(x[rows], stack, torch.tensor(count)), whole[rows]), (format, function, rows)
    up, down = (Weight(weight_of(format, (4, *size), "cpu", dtype)) for size in ((256, 128), (128, 256)))
    g = torch.Generator().manual_seed(5)
    expert, share = torch.stack([torch.randperm(5, generator=g)[:2] for _ in range(40)]), torch.rand(40, 2, generator=g)

    def experts(rows):
        return fixed.decoding_experts(x[rows], up, down, up, share[rows], expert[rows], 1)

    whole = experts(list(range(40)))
    for rows in ([7], [3, 7], list(range(39, 22, -1))):
        assert torch.equal(experts(rows), whole[rows]), (format, rows)
    assert isinstance(stack, Packed) == (format != "dense")


def check_attention(device="cpu", dtype=torch.float32, fp8=False, bound=1e-6, *, function=None):
    """Prompts cut anywhere, beside others or alone, and tokens that decode likewise, over the same pages."""
    from accessory.ops.paged_attention import PagedBatch

    if function is None:
        from accessory.ops.triton.paged_attention import fixed_attention as function
    lengths = [150, 70, 600]
    here = paged([(n, n) for n in lengths], 4, 2, 16, dtype=dtype, fp8=fp8)
    p, begin = here.to(device), [0, 150, 220]

    def ask(parts, prompts):
        """Attention of (sequence, first query, end), and what the whole prompts have there."""
        asked = [(end - first, end, here.batch.page_BP[n].tolist()) for n, first, end in parts]
        batch = PagedBatch.of(asked, device)._replace(longest_length=1024)
        if prompts:
            batch = batch._replace(decodes=0, longest=max(n for n, _, _ in asked))
        rows = [begin[n] + i for n, first, end in parts for i in range(first, end)]
        return function(p.q_NHd[rows], p.pages, batch), rows

    whole, _ = ask([(n, 0, length) for n, length in enumerate(lengths)], True)
    assert relative(whole, paged_attention_reference(here.q_NHd.float(), here.pages, here.batch)) <= bound
    for parts in (
        [(1, 0, 1)],
        [(0, 0, 64)],
        [(0, 64, 150)],
        [(0, 63, 65), (2, 300, 305)],
        [(2, 500, 600), (1, 69, 70)],
    ):
        got, rows = ask(parts, True)
        assert torch.equal(got, whole[rows]), parts
    beside = [(n, length - 1, length) for n, length in enumerate(lengths)]
    together, _ = ask(beside, False)
    for n, part in enumerate(beside):
        alone, _ = ask([part], False)
        assert torch.equal(alone[0], together[n]), part


@pytest.mark.parametrize("kind", ["decode", "prompt"])
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_on_a_cpu(format, kind, dtype):
    check_linear(format, kind, "cpu", dtype, 1e-6 if dtype == torch.float32 else 1e-2)
    check_experts(format, kind, "cpu", dtype, 1e-6 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize(("dtype", "fp8"), [(torch.float32, False), (torch.bfloat16, False), (torch.float32, True)])
def test_attention_on_a_cpu(dtype, fp8):
    check_attention("cpu", dtype, fp8, 1e-6 if dtype == torch.float32 else 1e-2, function=query_by_query)


def test_a_block_whose_places_differ_is_given_up(monkeypatch):
    """A library may sum the last row of a block in another order."""
    from accessory.ops import dispatch, fixed_cpu

    def last_row_differs(x_MI, weight):
        y_MO = x_MI @ weight.T
        y_MO[-1] = (x_MI[-1].flip(0) * weight.flip(1)).sum(-1)
        return y_MO if len(x_MI) > 1 else x_MI @ weight.T

    monkeypatch.setattr(fixed_cpu, "_product", last_row_differs)
    monkeypatch.setattr(fixed_cpu, "_places", {})
    x, weight = torch.randn(9, 100), torch.randn(24, 100)
    with dispatch.fixing("decode"):
        whole = fixed_cpu.linear(x, weight)
        assert torch.equal(whole, torch.cat([fixed_cpu.linear(x[n : n + 1], weight) for n in range(9)]))


@needs_triton
@interpreted
@pytest.mark.parametrize("format", others_slow(FORMATS, "dense", "int8"))
def test_rows_in_the_interpreter(format):
    interpret(__file__, f"t.multiply_rows_alike(); t.check_kernels({format!r})")


@needs_triton
@interpreted
@pytest.mark.parametrize("fp8", others_slow([False, True], False))
def test_attention_in_the_interpreter(fp8):
    interpret(__file__, f"t.multiply_rows_alike(); t.check_attention(fp8={fp8})")


@needs_triton
@on_a_gpu
@pytest.mark.parametrize("kind", ["decode", "prompt"])
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_on_the_gpu(format, kind, dtype):
    check_linear(format, kind, "cuda", dtype, 1e-5 if dtype == torch.float32 else 1e-2)
    check_experts(format, kind, "cuda", dtype, 1e-5 if dtype == torch.float32 else 2e-2)


@needs_triton
@on_a_gpu
@pytest.mark.parametrize(("dtype", "fp8"), [(torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)])
def test_attention_on_the_gpu(dtype, fp8):
    if fp8 and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("kernels for fp8 need a newer card")
    check_attention("cuda", dtype, fp8, 1e-5 if dtype == torch.float32 else 1e-2)
