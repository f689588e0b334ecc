"""Products with quantised weights on a CPU, in bf16 and fp32. `ops.dispatch` says which runs when.

A weight's numbers become x's dtype a block of rows at a time, in memory that is used again. torch decodes slowly: fp8
number by number, four bits in several passes. A lookup does it in one: each piece of one or two stored bytes is an
index into a table of the numbers that it stands for. The scales of rows, and those of groups where the CPU has AMX,
multiply the sums instead of the numbers.

Legend: T rows of x, O out, I in features, o rows of a block, u rows looked up at a time, W pieces of
a row, G groups of a row, L numbers of a group.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from functools import cache

import torch
from torch import Tensor

from accessory.formats import GROUP
from accessory.limits import BLOCK_NUMBERS_CPU, LOOKUP_NUMBERS_CPU
from accessory.ops.dense_products import dense_linear
from accessory.ops.quantized import ZERO_STEPS, Packed, nf4_table, unpack

# Changes numbers that were just looked up, of some rows.
Finish = Callable[[Tensor, slice], None]
# int4's numbers are looked up less this: in the middle of 0 … 15, so that sums are small before the zero points.
INT4_MIDDLE = 8.0


def int8_packed(x_TI: Tensor, packed: Packed) -> Tensor:
    """torch's own product, which reads int8 in place: for a few rows.

    It takes scales in x's dtype only. Ours are fp32, so it gets ones, and the sums are scaled after it.
    """
    y_TO = torch._weight_int8pack_mm(x_TI.contiguous(), packed.data.contiguous(), _ones(packed.shape[0], x_TI.dtype))
    return y_TO.mul_(packed.scale)


def rows_scaled_after(x_TI: Tensor, packed: Packed) -> Tensor:
    """Formats that scale rows, in bf16: it holds their numbers exactly, and the sums are scaled."""
    return _by_block(x_TI, packed).mul_(packed.scale)


def scaled_before(x_TI: Tensor, packed: Packed) -> Tensor:
    """Numbers are scaled before they are multiplied. In fp32 they are `quantized.dequantize`'s, bit by bit."""
    packed, dtype = packed.with_plain_scales(), x_TI.dtype
    group = GROUP.get(packed.format, packed.shape[1])
    scale_OG1 = packed.scale.to(dtype).view(packed.shape[0], -1, 1)
    zero_OG1 = None if packed.zero is None else _centred(packed.zero).to(dtype)[..., None]  # exact in bf16

    def scale(numbers_uI: Tensor, rows: slice) -> None:
        numbers_uGL = numbers_uI.unflatten(-1, (-1, group))
        if zero_OG1 is not None:
            numbers_uGL.sub_(zero_OG1[rows])
        numbers_uGL.mul_(scale_OG1[rows])

    return _by_block(x_TI, packed, scale)


def groups_scaled_after(x_TI: Tensor, packed: Packed) -> Tensor:
    """The same for a few rows, on CPUs whose tiles make a product of G rows as quick as one of a single row.

    Each row of x becomes G rows, of which the g-th has zeros outside group g. So their products are the sums of the
    groups, which are scaled and summed in fp32.
    """
    packed = packed.with_plain_scales()
    O, T, L = packed.shape[0], len(x_TI), GROUP[packed.format]  # noqa: E741
    x_TGL = x_TI.unflatten(-1, (-1, L))
    G = x_TGL.shape[1]
    x_TGGL = x_TI.new_zeros(T, G, G, L)
    x_TGGL.diagonal(dim1=1, dim2=2).copy_(x_TGL.transpose(1, 2))
    x_IN = x_TGGL.view(T * G, G * L).t()
    sum_OTG = x_TI.new_empty(O, T, G)
    for rows, numbers_oI in _blocks(packed, x_TI.dtype):
        torch.mm(numbers_oI, x_IN, out=sum_OTG[rows].flatten(1))
    sum_OTG = sum_OTG.float()
    if packed.zero is not None:
        sum_OTG -= _centred(packed.zero)[:, None] * x_TGL.float().sum(-1)
    return (sum_OTG * packed.scale[:, None].float()).sum(-1).t().to(x_TI.dtype).contiguous()


def _by_block(x_TI: Tensor, packed: Packed, finish: Finish | None = None) -> Tensor:
    """x times each block, (T, O)."""
    y_TO = x_TI.new_empty(len(x_TI), packed.shape[0])
    if len(x_TI):
        for rows, numbers_oI in _blocks(packed, x_TI.dtype, finish):
            y_TO[:, rows] = dense_linear(x_TI, numbers_oI)
    return y_TO


def _centred(zero_OG: Tensor) -> Tensor:
    """int4's zero points less what its numbers are looked up less, fp32."""
    return zero_OG.float() / ZERO_STEPS - INT4_MIDDLE


def _blocks(packed: Packed, dtype: torch.dtype, finish: Finish | None = None) -> Iterator[tuple[slice, Tensor]]:
    """The numbers of a weight before scales and zero points, block after block: its rows, and (o, I).

    Every block lies in the same memory, so use one before the next is asked for.
    """
    O, I = packed.shape  # noqa: E741
    data_OW, table = packed.data.contiguous(), None
    if packed.format != "int8":
        # Two bytes at a time would give numbers of four bytes too large a table. And an odd row has no pairs.
        size = 2 if dtype.itemsize == 2 and data_OW.shape[1] % 2 == 0 else 1
        data_OW, table = data_OW.view(torch.uint16 if size == 2 else torch.uint8), _table(packed.format, dtype, size)
    o, u = (min(O, max(1, numbers // I)) for numbers in (BLOCK_NUMBERS_CPU, LOOKUP_NUMBERS_CPU))
    number_oI = _scratch("numbers", o * I, dtype).view(o, I)
    for start in range(0, O, o):
        end = min(start + o, O)
        for row in range(start, end, u):
            rows = slice(row, min(row + u, end))
            number_uI = number_oI[row - start : rows.stop - start]
            if table is None:
                number_uI.copy_(data_OW[rows])
            else:
                _look_up(data_OW[rows], table, number_uI)
            if finish is not None:
                finish(number_uI, rows)
        yield slice(start, end), number_oI[: end - start]


def _look_up(data_uW: Tensor, table: Tensor, out_uI: Tensor) -> None:
    # `gather` runs on all threads where its index has several rows; `index_select` and `take` do not.
    index_uW = _scratch("indices", data_uW.numel(), torch.int64).view(data_uW.shape).copy_(data_uW)
    torch.gather(table.expand(len(data_uW), -1), 1, index_uW, out=out_uI.view(table.dtype))


_memory = threading.local()


def _scratch(name: str, numbers: int, dtype: torch.dtype) -> Tensor:
    """This thread's memory of a name, with any content. New memory for each product would be mapped page by page."""
    size, memory = numbers * dtype.itemsize, getattr(_memory, name, None)
    if memory is None or len(memory) < size:
        with torch.inference_mode(False):  # else training could not write to it
            memory = torch.empty(size, dtype=torch.uint8)
        setattr(_memory, name, memory)
    return memory[:size].view(dtype)


@cache
def _table(format: str, dtype: torch.dtype, size: int) -> Tensor:
    """For each value of `size` stored bytes, the numbers that they stand for, as one integer of their bytes."""
    byte_PB = torch.arange(256**size, dtype=torch.int32).view(torch.uint8).view(-1, 4)[:, :size].contiguous()
    if format == "fp8":
        number_PN = byte_PB.view(torch.float8_e4m3fn).float()
    elif format == "int4":
        number_PN = unpack(byte_PB).float() - INT4_MIDDLE
    else:
        number_PN = nf4_table(byte_PB.device)[unpack(byte_PB).int()]
    number_PN = number_PN.to(dtype)
    whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}[number_PN.shape[1] * dtype.itemsize]
    return number_PN.view(whole).flatten()


@cache
def _ones(n: int, dtype: torch.dtype) -> Tensor:
    return torch.ones(n, dtype=dtype)
