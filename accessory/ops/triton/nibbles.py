"""Unpacks 4-bit numbers to floating point in registers. The kernels of quantised weights share these functions.

On NVIDIA, byte permutes (PTX `prmt`) unpack a word of eight numbers. A permute picks four bytes out of eight at once.
nf4's sixteen values are in eight registers as fp16, so they need no lookup in memory. The relative error of fp16 is at
most 3.3e-4 here, a sixth of what rounding to bf16 may add. int4's number q becomes the last bits of the upper half of
an fp32 number, which is then exactly 128 + q. Elsewhere, and in Triton's interpreter, `PERMUTE` is off. Plain
arithmetic does the same there, and nf4 uses the exact table.
"""

from __future__ import annotations

import struct

import torch
import triton
import triton.language as tl

from accessory.ops.quantized import NF4


def _table_words(byte: int) -> list[str]:
    """The low (0) or high (1) bytes of nf4's values in fp16, four in a word."""
    column = [struct.pack("<e", value)[byte] for value in NF4]
    return [f"0x{int.from_bytes(bytes(column[i : i + 4]), 'little'):08x}" for i in range(0, 16, 4)]


def _nf4_half(shift: bool, mask: str, pairs: tuple[str, str]) -> str:
    """PTX for four numbers of a word. Three bits of a number select from each half of the table, the fourth bit selects
    between the two halves. Low and high bytes are then joined."""
    low, high = _table_words(0), _table_words(1)
    lines = ["shr.b32 s, s, 16;"] if shift else []
    lines.append(f"prmt.b32 m, w, u, {mask};")  # the fourth bit of each number, as a whole byte
    for name, words in (("l", low), ("h", high)):
        lines += [
            f"prmt.b32 a, {words[0]}, {words[1]}, s;",
            f"prmt.b32 b, {words[2]}, {words[3]}, s;",
            f"lop3.b32 {name}, m, b, a, 0xCA;",  # m ? b : a
        ]
    return "\n".join([*lines, f"prmt.b32 {pairs[0]}, l, h, 0x7351;", f"prmt.b32 {pairs[1]}, l, h, 0x6240;"])


# In: four bytes. Out: the four high numbers as two pairs of fp16, then the four low ones.
_NF4_ASM = tl.constexpr(
    "\n".join(
        [
            "{",
            ".reg .b32 w, s, u, m, a, b, l, h;",
            "mov.b32 w, $4;",  # a copy: an output may share the input's register and is written before the last read
            "and.b32 s, w, 0x77777777;",
            "shl.b32 u, w, 4;",
            _nf4_half(False, "0x9D8C", ("$0", "$2")),
            _nf4_half(True, "0xBFAE", ("$1", "$3")),
            "}",
        ]
    )
)

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


@triton.jit
def nf4_values(byte, table_ptr, PERMUTE: tl.constexpr):
    """(high, low), fp32: the nf4 values of the two numbers of each byte, before scaling."""
    if PERMUTE:
        high, low = tl.inline_asm_elementwise(
            _NF4_ASM, "=r,=r,=r,=r,r", [byte], dtype=(tl.float16, tl.float16), is_pure=True, pack=4
        )
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
