"""Products that dequantise tile by tile, against dense ones with the dequantised weight: on a GPU, or interpreted."""

import pytest
import torch
from helpers.interpreted import interpret, others_slow, relative

pytest.importorskip("triton", reason="triton is missing (extra: gpu)")

FORMATS = ["int8", "fp8", "int4", "nf4", "nf4-dq"]
# (out, in, rows of each expert): unequal and idle experts, one expert, sizes that are no multiple of a tile, and fewer
# groups than a tile has.
CASES = [(40, 384, (5, 0, 20)), (130, 256, (33,)), (96, 128, (0, 0, 1, 0)), (72, 640, (70, 3, 0, 0, 18))]
LARGE = [(384, 512, (300, 0, 41, 7, 1, 0, 128, 200)), (320, 1024, (1500, 900))]


def check(format, case, device, dtype, bound):
    from accessory.ops.quantized import dequantize, quantize
    from accessory.ops.triton import packed_grouped as kernels

    O, I, counts = case  # noqa: E741
    g = torch.Generator().manual_seed(O + len(counts))
    stack = quantize(torch.randn(len(counts), O, I, generator=g) * 0.2, format)
    x = torch.randn(sum(counts), I, generator=g).to(dtype)
    dy = torch.randn(sum(counts), O, generator=g).to(dtype)
    there, count = stack.map(lambda t: t.to(device)), torch.tensor(counts, device=device)

    dense = dequantize(stack, dtype).double()
    expert = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    want = torch.stack([dense[e] @ row for e, row in zip(expert, x.double(), strict=True)])
    back = torch.stack([row @ dense[e] for e, row in zip(expert, dy.double(), strict=True)])
    assert relative(kernels.product(x.to(device), there, count), want) <= bound
    assert relative(kernels.gradient(dy.to(device), there, count), back) <= bound
    assert relative(kernels.product(x.to(device), there[0]), x.double() @ dense[0].T) <= bound
    assert relative(kernels.gradient(dy.to(device), there[0]), dy.double() @ dense[0]) <= bound


@pytest.mark.parametrize("case", CASES + LARGE, ids=str)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_grouped_on_the_gpu(format, case, dtype):
    # Sums round to 16 bits. Before that, nf4's table is exact to 3.3e-4.
    check(format, case, device="cuda", dtype=dtype, bound=3e-3 if dtype == torch.bfloat16 else 6e-4)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("rows", [2, 20, 100, 3000])
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_gradients_on_the_gpu(format, rows):
    """At every size, whichever kernel runs, the gradient equals the dense product's."""
    from accessory.ops.dense_products import sort_by_expert
    from accessory.ops.quantized import dequantize, quantize
    from accessory.ops.quantized_products import packed_grouped, packed_grouped_backward, packed_linear

    torch.manual_seed(rows)
    stack = quantize(torch.randn(4, 256, 384, device="cuda") * 0.2, format)
    dense = dequantize(stack, torch.bfloat16).float()
    _, count = sort_by_expert(torch.randint(0, 3, (rows, 1), device="cuda"), 4)  # the last expert idles
    expert = torch.arange(4, device="cuda").repeat_interleave(count)
    x = torch.randn(rows, 384, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    dy = torch.randn(rows, 256, device="cuda", dtype=torch.bfloat16)

    y, dx = packed_grouped(x.detach(), stack, count, grad=True), packed_grouped_backward(dy, stack, count)
    assert relative(y, torch.stack([dense[e] @ r for e, r in zip(expert, x.detach().float(), strict=True)])) <= 3e-3
    assert relative(dx, torch.stack([r @ dense[e] for e, r in zip(expert, dy.float(), strict=True)])) <= 3e-3
    packed_linear(x, stack[1]).backward(dy)
    assert relative(x.grad, dy.float() @ dense[1]) <= 3e-3


@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU itself runs the kernels here")
@pytest.mark.parametrize("format", others_slow(FORMATS, "int8", "nf4"))
def test_grouped_in_the_interpreter(format):
    how = "device='cpu', dtype=torch.float32, bound=1e-6"
    interpret(__file__, f"for case in t.CASES: t.check({format!r}, case, {how})")


# The PTX instructions of `nibbles` in Python, so that a machine without a GPU can run them.


def _permute(a, b, selector):
    source = [(word >> 8 * i) & 255 for word in (a, b) for i in range(4)]
    out = 0
    for i in range(4):
        choice = (selector >> 4 * i) & 15
        byte = source[choice & 7]
        out |= (byte if choice < 8 else 255 * (byte >> 7)) << 8 * i
    return out


STEPS = {
    "mov": lambda a: a,
    "and": lambda a, b: a & b,
    "shl": lambda a, n: (a << n) & 0xFFFFFFFF,
    "shr": lambda a, n: a >> n,
    "prmt": _permute,
    "xor": lambda a, b: a ^ b,
    "lop3": lambda a, b, c, table: sum(
        (table >> ((a >> i & 1) * 4 + (b >> i & 1) * 2 + (c >> i & 1)) & 1) << i for i in range(32)
    ),
    "fma.rn.bf16x2": lambda a, b, c: _multiply_add(a, b, c, torch.bfloat16),
    "fma.rn.f16x2": lambda a, b, c: _multiply_add(a, b, c, torch.float16),
}


def _numbers(words, dtype):
    return torch.tensor(words).to(torch.uint32).view(dtype).double()


def _multiply_add(a, b, c, dtype):
    """Two numbers at a time, rounded once."""
    a, b, c = (_numbers([word], dtype) for word in (a, b, c))
    return int((a * b + c).to(dtype).view(torch.int32)) & 0xFFFFFFFF


def follow(asm, outputs, word, held=()):
    """Run inline PTX with `word` in its input register, and return the output registers.

    held: words that the program finds in registers, each four times.
    """
    registers = {f"${outputs}": word}
    registers |= {f"${outputs + 1 + 4 * n}": literal for n, literal in enumerate(held)}
    for line in asm.splitlines():
        line = line.strip()
        if line[0] not in "{}.":
            name, operands = line.rstrip(";").split(" ", 1)
            target, *sources = operands.split(", ")
            values = [registers[s] if s in registers else int(s, 0) for s in sources]
            registers[target] = STEPS[name if name in STEPS else name.split(".")[0]](*values)
    return [registers[f"${i}"] for i in range(outputs)]


def test_the_permuted_tables_are_the_formats():
    from accessory.ops.quantized import NF4
    from accessory.ops.triton import nibbles

    for first in range(0, 256, 4):
        data = bytes([first, 255 - first, first + 1, (first * 7 + 3) % 256])
        word = int.from_bytes(data, "little")
        numbers = [b >> 4 for b in data] + [b & 15 for b in data]
        words = follow(nibbles._INT4_ASM.value, 8, word)
        assert torch.tensor(words).to(torch.int32).view(torch.float32).tolist() == [128.0 + q for q in numbers]
        words = torch.tensor(follow(nibbles._NF4_ASM.value, 4, word, nibbles.literals()[:4])).to(torch.uint32)
        got = words.view(torch.float16).double()
        want = torch.tensor([NF4[q] for q in numbers], dtype=torch.float64)
        assert torch.equal(got, want.half().double())
        assert ((got - want).abs() <= 3.3e-4 * want.abs()).all()


@pytest.mark.parametrize(("dtype", "bias"), [(torch.bfloat16, 128.0), (torch.float16, 1024.0)])
def test_pairs_of_numbers_are_the_formats(dtype, bias):
    """What the tensor cores get: exact integers, exact fp8, and nf4's table rounded to 16 bits."""
    from accessory.ops.quantized import NF4
    from accessory.ops.triton import nibbles

    name = "BF16" if dtype == torch.bfloat16 else "FP16"
    table = torch.tensor(NF4).to(dtype).double()
    for first in range(0, 256, 4):
        data = torch.tensor([first, 255 - first, first + 1, (first * 7 + 3) % 256], dtype=torch.uint8)
        word = int.from_bytes(bytes(data.tolist()), "little")
        q = torch.cat([data >> 4, data & 15]).long()
        four = follow(getattr(nibbles, f"_INT4_{name}_ASM").value, 4, word)
        assert torch.equal(_numbers(four, dtype), q + bias)
        nf4, held = {torch.bfloat16: (nibbles._NF4_BF16_ASM, slice(4, 8)), torch.float16: (nibbles._NF4_ASM, slice(4))}[
            dtype
        ]
        four = follow(nf4.value, 4, word, nibbles.literals()[held])
        assert torch.equal(_numbers(four, dtype), table[q])
        two = follow(getattr(nibbles, f"_INT8_{name}_ASM").value, 2, word, nibbles.literals()[8:])
        assert torch.equal(_numbers(two, dtype), data.view(torch.int8).double())
        assert torch.equal(
            _numbers(follow(getattr(nibbles, f"_ONES_{name}_ASM").value, 2, word), dtype), torch.ones(4).double()
        )
        if dtype == torch.bfloat16:
            known = (data & 0x7F) != 0x7F  # not a number, which no weight has
            two = _numbers(follow(nibbles._FP8_BF16_ASM.value, 2, word), dtype)
            assert torch.equal(two[known], data.view(torch.float8_e4m3fn).double()[known])
