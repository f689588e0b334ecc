"""Unpacks quantised numbers to floating point in registers. The kernels of quantised weights share these functions.

On NVIDIA, byte permutes (PTX `prmt`) unpack a word of eight numbers. A permute picks four bytes out of eight at once.
nf4's sixteen values are in eight registers as fp16, so they need no lookup in memory. The relative error of fp16 is at
most 3.3e-4 here, a sixth of what rounding to bf16 may add. int4's number q becomes the last bits of the upper half of
an fp32 number, which is then exactly 128 + q. Elsewhere, and in Triton's interpreter, `PERMUTE` is off. Plain
arithmetic does the same there, and nf4 uses the exact table.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from accessory.ops.quantized import NF4


def _table_words(byte: int, dtype: torch.dtype) -> list[str]:
    """The low (0) or high (1) bytes of nf4's values in a 16-bit dtype, four in a word."""
    column = torch.tensor(NF4, dtype=dtype).view(torch.uint8).view(16, 2)[:, byte].tolist()
    return [f"0x{int.from_bytes(bytes(column[i : i + 4]), 'little'):08x}" for i in range(0, 16, 4)]


def _nf4_half(dtype: torch.dtype, shift: bool, mask: str, pairs: tuple[str, str]) -> str:
    """PTX for four numbers of a word. Three bits of a number select from each half of the table, the fourth bit selects
    between the two halves. Low and high bytes are then joined."""
    low, high = _table_words(0, dtype), _table_words(1, dtype)
    low[0], low[2], high[0], high[2] = (f"${operand}" for operand in (5, 9, 13, 17))  # `_words` has them
    lines = ["shr.b32 s, s, 16;"] if shift else []
    lines.append(f"prmt.b32 m, w, u, {mask};")  # the fourth bit of each number, as a whole byte
    for name, words in (("l", low), ("h", high)):
        lines += [
            f"prmt.b32 a, {words[0]}, {words[1]}, s;",
            f"prmt.b32 b, {words[2]}, {words[3]}, s;",
            f"lop3.b32 {name}, m, b, a, 0xCA;",  # m ? b : a
        ]
    return "\n".join([*lines, f"prmt.b32 {pairs[0]}, l, h, 0x7351;", f"prmt.b32 {pairs[1]}, l, h, 0x6240;"])


def _nf4_asm(dtype: torch.dtype) -> tl.constexpr:
    """In: four bytes, four words. Out: the four high numbers as two pairs of 16 bits, then the four low ones."""
    return tl.constexpr(
        "\n".join(
            [
                "{",
                ".reg .b32 w, s, u, m, a, b, l, h;",
                "mov.b32 w, $4;",  # a copy: an output may share the input's register, written before the last read
                "and.b32 s, w, 0x77777777;",
                "shl.b32 u, w, 4;",
                _nf4_half(dtype, False, "0x9D8C", ("$0", "$2")),
                _nf4_half(dtype, True, "0xBFAE", ("$1", "$3")),
                "}",
            ]
        )
    )


_NF4_ASM, _NF4_BF16_ASM = _nf4_asm(torch.float16), _nf4_asm(torch.bfloat16)
_NF4_OPERANDS = tl.constexpr("=r,=r,=r,=r,r" + ",r" * 16)


def literals() -> list[int]:
    """The words that PTX finds in registers, in the order in which `held_words` reads them.

    A literal would be copied to a register before each use, which is a sixth of a loop.
    """
    nf4 = [_table_words(byte, dtype)[n] for dtype in (torch.float16, torch.bfloat16) for byte in (0, 1) for n in (0, 2)]
    return [*(int(word, 16) for word in nf4), 0x43000000]


# In: four bytes. Out: 128 + q in fp32 for the four high numbers, then for the four low ones.
_INT4_ASM = tl.constexpr(
    "\n".join(
        [
            "{",
            ".reg .b32 l, h;",
            "and.b32 l, $8, 0x0F0F0F0F;",
            "shr.b32 h, $8, 4;",
            "and.b32 h, h, 0x0F0F0F0F;",
            *(f"prmt.b32 ${i}, h, 0x43000000, 0x7{i}44;" for i in range(4)),
            *(f"prmt.b32 ${i + 4}, l, 0x43000000, 0x7{i}44;" for i in range(4)),
            "}",
        ]
    )
)


def _int4_pairs_asm(above: int) -> tl.constexpr:
    """In: four bytes. Out: the four high numbers as two pairs of 16 bits, then the four low ones.

    A number q becomes the low byte, and `above` the high byte. 0x43 makes 128 + q in bf16, 0x64 makes 1024 + q in fp16.
    """
    lines = ["and.b32 l, $4, 0x0F0F0F0F;", "shr.b32 h, $4, 4;", "and.b32 h, h, 0x0F0F0F0F;"]
    for number, (word, first) in enumerate((word, first) for word in "hl" for first in (0, 2)):
        lines.append(f"prmt.b32 ${number}, {word}, 0x{above:02x}000000, 0x7{first + 1}7{first};")
    return tl.constexpr("\n".join(["{", ".reg .b32 l, h;", *lines, "}"]))


_INT4_BF16_ASM, _INT4_FP16_ASM = _int4_pairs_asm(0x43), _int4_pairs_asm(0x64)

# In: four bytes, a word. Out: two pairs of bf16. Below 0x43, the word's upper byte, the low seven bits u make 128 + u,
# and the sign bit alone makes 128 or 256. Their difference is the number, exactly.
_INT8_BF16_ASM = tl.constexpr(
    """{
    .reg .b32 w, t, a, c, one;
    mov.b32 w, $2;
    mov.b32 one, 0x3F803F80;
    prmt.b32 t, w, $3, 0x7170;
    and.b32 a, t, 0xFF7FFF7F;
    lop3.b32 c, t, 0xFF80FF80, 0x80008000, 0x6A;
    fma.rn.bf16x2 $0, a, one, c;
    prmt.b32 t, w, $3, 0x7372;
    and.b32 a, t, 0xFF7FFF7F;
    lop3.b32 c, t, 0xFF80FF80, 0x80008000, 0x6A;
    fma.rn.bf16x2 $1, a, one, c;
    }"""
)

# In: four bytes. Out: two pairs of fp16: 1024 + (128 + q), from which 1152 is subtracted.
_INT8_FP16_ASM = tl.constexpr(
    """{
    .reg .b32 w, t, one, less;
    mov.b32 one, 0x3C003C00;
    mov.b32 less, 0xE480E480;
    xor.b32 w, $2, 0x80808080;
    prmt.b32 t, w, 0x64000000, 0x7170;
    fma.rn.f16x2 $0, t, one, less;
    prmt.b32 t, w, 0x64000000, 0x7372;
    fma.rn.f16x2 $1, t, one, less;
    }"""
)

# In: four bytes of e4m3. Out: two pairs of bf16. The bits of exponent and mantissa move to where bf16 has its own, and
# the product with 2^120 makes up for the two biases. Subnormal numbers come out right too.
_FP8_BF16_ASM = tl.constexpr(
    """{
    .reg .b32 w, t, s, by, none;
    mov.b32 w, $2;
    mov.b32 by, 0x7B807B80;
    mov.b32 none, 0x80008000;
    prmt.b32 t, w, 0, 0x1404;
    shr.b32 s, t, 4;
    and.b32 s, s, 0x07F007F0;
    lop3.b32 t, t, 0x80008000, s, 0xEA;
    fma.rn.bf16x2 $0, t, by, none;
    prmt.b32 t, w, 0, 0x3424;
    shr.b32 s, t, 4;
    and.b32 s, s, 0x07F007F0;
    lop3.b32 t, t, 0x80008000, s, 0xEA;
    fma.rn.bf16x2 $1, t, by, none;
    }"""
)

_ONES_BF16_ASM = tl.constexpr("mov.b32 $0, 0x3F803F80;\nmov.b32 $1, 0x3F803F80;")
_ONES_FP16_ASM = tl.constexpr("mov.b32 $0, 0x3C003C00;\nmov.b32 $1, 0x3C003C00;")


@triton.jit
def held_words(table_ptr, kind: tl.constexpr, CODE: tl.constexpr, PERMUTE: tl.constexpr):
    """Four of `literals`, int32 (1, 1), for the functions below, which unpack to dtype `kind`.

    table_ptr: `packed.pointers` has the table, in which every thread of a warp has its own copy of each word. What all
    threads load from one place, ptxas holds as it holds literals.
    """
    if PERMUTE and (CODE == 0 or CODE >= 3):
        lane = tl.inline_asm_elementwise(
            "mov.u32 $0, %laneid;", "=r,r", [tl.zeros((1, 1), dtype=tl.int32)], dtype=tl.int32, is_pure=True, pack=1
        )
        at = table_ptr.to(tl.pointer_type(tl.int32)) + 16 + 256 + lane
        if CODE == 0:
            word = tl.load(at + 8 * 32)
            return word, word, word, word
        else:
            at += 4 * 32 if kind == tl.bfloat16 else 0
            return tl.load(at), tl.load(at + 32), tl.load(at + 64), tl.load(at + 96)
    else:
        return 0, 0, 0, 0


@triton.jit
def byte_numbers(data, words, kind: tl.constexpr, FP8: tl.constexpr, PERMUTE: tl.constexpr):
    """The int8 or fp8 numbers of `data` in dtype `kind`, exactly, before scaling. With PERMUTE, fp8's are bytes."""
    if PERMUTE and kind == tl.bfloat16:
        if FP8:
            return tl.inline_asm_elementwise(_FP8_BF16_ASM, "=r,=r,r", [data], dtype=tl.bfloat16, is_pure=True, pack=4)
        else:
            return tl.inline_asm_elementwise(
                _INT8_BF16_ASM, "=r,=r,r,r,r,r,r", [data, words[0]], dtype=tl.bfloat16, is_pure=True, pack=4
            )
    elif PERMUTE and kind == tl.float16 and not FP8:
        return tl.inline_asm_elementwise(_INT8_FP16_ASM, "=r,=r,r", [data], dtype=tl.float16, is_pure=True, pack=4)
    elif PERMUTE and FP8:
        return data.to(tl.float8e4nv, bitcast=True).to(tl.float32).to(kind)
    else:
        return data.to(tl.float32).to(kind)


@triton.jit
def _nf4_pairs(byte, words, BF16: tl.constexpr):
    """Of the four operands that each word has, one a byte, the programs use the first."""
    if BF16:
        return tl.inline_asm_elementwise(
            _NF4_BF16_ASM, _NF4_OPERANDS, [byte, words[0], words[1], words[2], words[3]],
            dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=4,
        )  # fmt: skip
    else:
        return tl.inline_asm_elementwise(
            _NF4_ASM, _NF4_OPERANDS, [byte, words[0], words[1], words[2], words[3]],
            dtype=(tl.float16, tl.float16), is_pure=True, pack=4,
        )  # fmt: skip


@triton.jit
def nibble_numbers(byte, words, table_ptr, kind: tl.constexpr, INT4: tl.constexpr, PERMUTE: tl.constexpr):
    """(high, low) in dtype `kind`: the two numbers of each byte before scaling.

    int4's are exact, each plus `nibble_bias`. nf4's values are rounded to `kind`.
    """
    if PERMUTE and kind == tl.bfloat16:
        if INT4:
            return tl.inline_asm_elementwise(
                _INT4_BF16_ASM, "=r,=r,=r,=r,r", [byte], dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=4
            )
        else:
            return _nf4_pairs(byte, words, True)
    elif PERMUTE and kind == tl.float16:
        if INT4:
            return tl.inline_asm_elementwise(
                _INT4_FP16_ASM, "=r,=r,=r,=r,r", [byte], dtype=(tl.float16, tl.float16), is_pure=True, pack=4
            )
        else:
            return _nf4_pairs(byte, words, False)
    elif INT4:
        return (byte >> 4).to(kind), (byte & 15).to(kind)
    else:
        high, low = nf4_values(byte, words, table_ptr, False)
        return high.to(kind), low.to(kind)


@triton.jit
def nibble_ones(byte, kind: tl.constexpr, PERMUTE: tl.constexpr):
    """A one in dtype `kind` for each byte, in the registers where `nibble_numbers` has that byte's numbers.

    A plain constant would be written to shared memory before the tensor cores read it.
    """
    if PERMUTE and kind == tl.bfloat16:
        return tl.inline_asm_elementwise(_ONES_BF16_ASM, "=r,=r,r", [byte], dtype=tl.bfloat16, is_pure=True, pack=4)
    elif PERMUTE and kind == tl.float16:
        return tl.inline_asm_elementwise(_ONES_FP16_ASM, "=r,=r,r", [byte], dtype=tl.float16, is_pure=True, pack=4)
    else:
        return tl.full(byte.shape, 1.0, kind)


@triton.jit
def nibble_bias(kind: tl.constexpr, PERMUTE: tl.constexpr):
    """What `nibble_numbers` adds to int4's numbers."""
    if PERMUTE and kind == tl.bfloat16:
        return 128.0
    elif PERMUTE and kind == tl.float16:
        return 1024.0
    else:
        return 0.0


@triton.jit
def nf4_values(byte, words, table_ptr, PERMUTE: tl.constexpr):
    """(high, low), fp32: the nf4 values of the two numbers of each byte, before scaling."""
    if PERMUTE:
        high, low = _nf4_pairs(byte, words, False)
        return high.to(tl.float32), low.to(tl.float32)
    else:
        return tl.load(table_ptr + (byte >> 4).to(tl.int32)), tl.load(table_ptr + (byte & 15).to(tl.int32))


@triton.jit
def int4_values(byte, PERMUTE: tl.constexpr):
    """(high, low), fp32: the two numbers of each byte, each plus `int4_bias`."""
    if PERMUTE:
        return tl.inline_asm_elementwise(
            _INT4_ASM, "=r,=r,=r,=r,=r,=r,=r,=r,r", [byte], dtype=(tl.float32, tl.float32), is_pure=True, pack=4
        )
    else:
        return (byte >> 4).to(tl.float32), (byte & 15).to(tl.float32)


@triton.jit
def int4_bias(PERMUTE: tl.constexpr):
    return 128.0 if PERMUTE else 0.0


@triton.jit
def nested_scale(
    code_ptr, nested_ptr, offset_ptr, table_ptr, row, group, mask, G: tl.constexpr, NESTED: tl.constexpr
):  # fmt: skip
    """nf4-dq's scales (`ops.double_quantization`) of rows and groups, fp32.

    `table_ptr` points to nf4's 16 values, followed by the values of the 256 scale codes.
    """
    code = tl.load(code_ptr + row.to(tl.int64) * G + group, mask=mask, other=0).to(tl.int32)
    nested = tl.load(nested_ptr + row.to(tl.int64) * (G // NESTED) + group // NESTED, mask=mask, other=0.0)
    return tl.load(table_ptr + 16 + code) * nested + tl.load(offset_ptr + row, mask=mask, other=0.0)


@triton.jit
def finished(acc, PERMUTE: tl.constexpr):
    """Wait until the tensor cores have finished a product's sums, and return the sums.

    Hopper's tensor cores read their left operand from registers while the program goes on. Triton 3.6 starts the loop's
    next turn meanwhile and may reuse those registers (seen in its machine code, and in wrong results). Triton waits
    where a sum is used at once. The move below is such a use and costs nothing.
    """
    if PERMUTE:
        return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=f,f", [acc], dtype=tl.float32, is_pure=True, pack=1)
    else:
        return acc


def permutes() -> bool:
    """Whether kernels run on NVIDIA's instructions: not in Triton's interpreter, not on AMD."""
    return isinstance(nf4_values, triton.runtime.JITFunction) and torch.version.hip is None
