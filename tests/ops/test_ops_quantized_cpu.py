"""Products with quantised weights on a CPU against fp64 products of the dequantised weight."""

import threading

import pytest
import torch

from accessory.formats import FORMATS
from accessory.ops import dispatch, quantized_cpu
from accessory.ops.experts import decode_experts_fused, grouped_experts
from accessory.ops.linear import linear
from accessory.ops.quantized import Packed, dequantize, quantize

KERNELS = [k for k in dispatch.TABLE if k.function.startswith("quantized_cpu")]
# bf16 keeps 8 bits, and a kernel rounds numbers, scales or sums, and the result.
BOUND = {torch.bfloat16: 5e-3, torch.float32: 2e-6}


def weight(rows, columns, format, seed=0):
    return quantize(torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.02, format)


def check(y, x, packed):
    """The error is relative to the sums, which are rounded, and to their usual size: a sum may be close to zero."""
    w = dequantize(packed).double()
    assert y.dtype == x.dtype
    assert y.shape == (len(x), len(w))
    expected, usual = x.double() @ w.T, (x.double().square() @ w.square().T).sum().sqrt()
    assert (y.double() - expected).norm() <= BOUND[x.dtype] * (expected.norm() + usual)


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda k: k.function)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("rows", "columns"), [(96, 256), (7, 128), (101, 384), (32, 640), (1, 1152)])
def test_each_kernel_is_exact_in_every_shape_that_it_takes(kernel, format, rows, columns, monkeypatch):
    packed, tried = weight(rows, columns, format), 0
    for dtype in BOUND:
        for T in (0, 1, 2, 3, 4, 5, 8, 9, 40):
            x = torch.randn(T, columns, generator=torch.Generator().manual_seed(T)).to(dtype)
            p = dispatch.product("linear", x, packed, T)._replace(amx=True)
            if kernel.fits(p):
                check(kernel.load()(x, packed), x, packed)
                # Several blocks, the last of which is smaller, and several lookups in a block.
                monkeypatch.setattr(quantized_cpu, "BLOCK_NUMBERS_CPU", 40 * columns)
                monkeypatch.setattr(quantized_cpu, "LOOKUP_NUMBERS_CPU", 17 * columns)
                check(kernel.load()(x, packed), x, packed)
                monkeypatch.undo()
                tried += 1
    fits = format in kernel.weights and (kernel.multiple == 1 or rows % kernel.multiple == 0)
    assert (tried > 0) == fits


@pytest.mark.parametrize("format", ["int8", "fp8"])
@pytest.mark.parametrize("columns", [1, 3, 33, 100])
def test_rows_of_any_length_have_products(format, columns):
    """An odd row has no pairs of bytes."""
    packed = weight(6, columns, format)
    for dtype in BOUND:
        x = torch.randn(2, columns).to(dtype)
        check(linear(x, packed), x, packed)


@pytest.mark.parametrize("format", FORMATS)
def test_a_part_of_a_weight_has_products(format):
    """Ranks hold parts, which need not lie in one piece."""
    whole = weight(64, 512, format)
    x = torch.randn(1, 256).bfloat16()
    check(linear(x, whole.narrow(1, 128, 256)), x, whole.narrow(1, 128, 256))
    x = torch.randn(1, 512).bfloat16()
    check(linear(x, whole.narrow(0, 3, 11)), x, whole.narrow(0, 3, 11))


def test_a_cut_after_an_odd_number_of_bytes_has_a_product():
    whole = weight(8, 65, "fp8")
    part = whole.narrow(1, 1, 64)
    x = torch.randn(1, 64).bfloat16()
    check(linear(x, part), x, part)


@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize("format", FORMATS)
def test_decoding_and_grouped_products_agree_with_fp64(format, dtype):
    """Experts' whole feed-forward, of a token and of a prompt, with weights in a stack."""
    E, D, F = 4, 128, 256
    g = torch.Generator().manual_seed(0)
    w1, w2, w3 = (quantize(torch.randn(E, *s, generator=g) * 0.1, format) for s in ((F, D), (D, F), (F, D)))
    both = {name: torch.cat([w1.tensors()[name], w3.tensors()[name]], 1) for name in w1.tensors()}
    for T in (1, 2, 9):
        x, expert_TK = torch.randn(T, D, generator=g).to(dtype), torch.randint(0, E, (T, 2), generator=g)
        weight_TK = torch.rand(T, 2, generator=g)
        d1, d2, d3 = (dequantize(w).double() for w in (w1, w2, w3))
        expected = torch.zeros(T, D, dtype=torch.float64)
        for t in range(T):
            for k in range(2):
                e, row = int(expert_TK[t, k]), x[t].double()
                h = torch.nn.functional.silu(d1[e] @ row) * (d3[e] @ row)
                expected[t] += weight_TK[t, k].double() * (d2[e] @ h)
        with torch.no_grad():
            results = [grouped_experts(x, w1, w2, w3, weight_TK, expert_TK)]
            results.append(decode_experts_fused(x, Packed(w1.format, **both), w2, weight_TK, expert_TK))
        for y in results:
            assert (y.double() - expected).norm() <= 3 * BOUND[dtype] * expected.norm()


def test_training_after_generation_and_two_threads_have_their_own_memory():
    """The memory that blocks lie in is made in inference mode, and written to in training as well."""
    packed = weight(96, 256, "nf4")
    wrong = []

    def run():
        for n in range(20):
            x = torch.full((5, 256), float(n + 1))
            with torch.inference_mode():
                y = linear(x, packed)
            if not torch.allclose(y, x @ dequantize(packed).T, atol=1e-4):
                wrong.append(n)
        x = torch.randn(5, 256, requires_grad=True)
        linear(x, packed).sum().backward()
        if not torch.allclose(x.grad, dequantize(packed).sum(0).expand(5, -1), atol=1e-4):
            wrong.append("gradient")

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_row_in_bf16_has_the_product_of_rows():
    w, x = torch.randn(50, 96).bfloat16(), torch.randn(1, 1, 96).bfloat16()
    expected = x.double() @ w.double().T
    y = linear(x, w)
    assert y.shape == (1, 1, 50)
    assert (y.double() - expected).norm() <= 3e-3 * expected.norm()
    w.requires_grad_()
    linear(x, w).sum().backward()
    torch.testing.assert_close(w.grad, x[0].expand(50, -1))
