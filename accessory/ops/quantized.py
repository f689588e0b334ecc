"""Quantised weights: how five formats round (`quantize`) and which values they store (`dequantize`).

`accessory.formats` has the formats' sizes. A weight, or a stack of weights, is (…, O, I); products sum over I. The
formats, with their bytes a number:

    int8   1     per row: w = q · scale, q in -127 … 127
    fp8    1     per row: w = q · scale, q in float8 e4m3
    int4   0.523 groups of 128 along I: w = (q - zero/16) · scale, q in 0 … 15, scale bf16, zero uint8
    nf4    0.563 blocks of 64 along I: w = table[q] · scale, scale fp32: the largest magnitude (arXiv 2305.14314)
    nf4-dq 0.518 the same blocks and numbers; scales in 8 bits, centred and scaled again (`ops.double_quantization`)

Two 4-bit numbers share a byte. The even one is in the high half, as bitsandbytes packs nf4. A group is part of one row,
so a cut along O, or along I at multiples of the group, does not change a weight's numbers.

Legend: O out, I in features, E experts, G groups of a row, T rows of input.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from accessory.errors import ConfigError
from accessory.formats import GROUP, PIECES, Format, check_cut, nested_scales
from accessory.ops import double_quantization

ZERO_STEPS = 16  # a zero point is a multiple of 1/16
FP8_LARGEST = 448.0

# The values that nf4 rounds to, quantiles of a normal distribution; constants of the format.
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


@dataclass(frozen=True)
class Packed:
    """A quantised weight (O, I), or a stack (E, O, I), as the tensors that store it."""

    format: Format
    data: Tensor  # int8, fp8: int8, float8 (…, O, I); 4-bit formats: uint8 (…, O, I/2)
    scale: Tensor  # int8, fp8: fp32 (…, O); int4: bf16 (…, O, G); nf4: fp32 (…, O, G); nf4-dq: uint8 (…, O, G)
    zero: Tensor | None = None  # int4: uint8 (…, O, G)
    nested: Tensor | None = None  # nf4-dq: fp32 (…, O, H)
    offset: Tensor | None = None  # nf4-dq: fp32 (…, O)

    @property
    def shape(self) -> torch.Size:
        *rest, I = self.data.shape  # noqa: E741
        return torch.Size((*rest, I * 2 if self.format in GROUP else I))

    def __len__(self) -> int:
        return len(self.data)

    @property
    def device(self) -> torch.device:
        return self.data.device

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.tensors().values())

    def tensors(self) -> dict[str, Tensor]:
        found = {name: getattr(self, name) for name in PIECES}
        return {name: t for name, t in found.items() if t is not None}

    def map(self, function: Callable[[Tensor], Tensor]) -> Packed:
        return Packed(self.format, **{name: function(t) for name, t in self.tensors().items()})

    def __getitem__(self, expert: int) -> Packed:
        """One weight of a stack."""
        return self.map(lambda t: t[expert])

    def narrow(self, dim: int, start: int, length: int) -> Packed:
        """A cut of a weight (O, I) along O (dim 0) or I (dim 1). ConfigError where a cut along I splits a group."""
        if dim == 0:
            return self.map(lambda t: t.narrow(0, start, length))
        group = GROUP.get(self.format)
        if group is None:
            return Packed(self.format, self.data.narrow(1, start, length), self.scale)
        check_cut(self.format, start, length)
        groups = (start // group, length // group)
        zero = None if self.zero is None else self.zero.narrow(1, *groups)
        nested = None if self.nested is None else self.nested[:, self.columns_of_nested(start, length)]
        data, scale = self.data.narrow(1, start // 2, length // 2), self.scale.narrow(1, *groups)
        return Packed(self.format, data, scale, zero, nested, self.offset)

    def columns_of_nested(self, start: int, length: int) -> list[int]:
        """The columns of an nf4-dq weight's `nested` that a cut along I at whole groups needs."""
        assert self.nested is not None, "only nf4-dq has nested scales"
        group = GROUP[self.format]
        return double_quantization.columns_of_nested(
            self.scale.shape[1], self.nested.shape[1], start // group, length // group
        )

    def with_plain_scales(self) -> Packed:
        """An nf4-dq weight as nf4, for code that reads plain scales. Other formats are returned as they are."""
        if self.nested is None or self.offset is None:
            return self
        return Packed("nf4", self.data, double_quantization.expand(self.scale, self.nested, self.offset))


Shapes = dict[str, tuple[tuple[int, ...], torch.dtype]]


class Rounding(NamedTuple):
    """The functions of a format. `formats.STORAGE` says how many bytes it takes."""

    shapes: Callable[[tuple[int, ...], int], Shapes]  # from (…, O) and I: shape and dtype of each tensor of `Packed`
    quantize: Callable[[Tensor], Packed]  # takes an fp32 weight (…, O, I)
    dequantize: Callable[[Packed], Tensor]  # gives fp32 (…, O, I)


def packed_shapes(format: str, shape: tuple[int, ...]) -> Shapes:
    """Shape and dtype of each tensor that stores a weight (…, O, I). ConfigError where I has no whole groups."""
    check_cut(format, 0, shape[-1])
    return ROUNDINGS[format].shapes(shape[:-1], shape[-1])


def _row_scaled(dtype: torch.dtype) -> Callable[[tuple[int, ...], int], Shapes]:
    return lambda rows, I: {"data": ((*rows, I), dtype), "scale": (rows, torch.float32)}  # noqa: E741


def _int4_shapes(rows: tuple[int, ...], I: int) -> Shapes:  # noqa: E741
    groups = (*rows, I // GROUP["int4"])
    return {"data": ((*rows, I // 2), torch.uint8), "scale": (groups, torch.bfloat16), "zero": (groups, torch.uint8)}


def _nf4_shapes(rows: tuple[int, ...], I: int) -> Shapes:  # noqa: E741
    return {"data": ((*rows, I // 2), torch.uint8), "scale": ((*rows, I // GROUP["nf4"]), torch.float32)}


def _nf4_dq_shapes(rows: tuple[int, ...], I: int) -> Shapes:  # noqa: E741
    groups = I // GROUP["nf4-dq"]
    return {
        "data": ((*rows, I // 2), torch.uint8),
        "scale": ((*rows, groups), torch.uint8),
        "nested": ((*rows, nested_scales(groups)), torch.float32),
        "offset": (rows, torch.float32),
    }


def quantize(weight: Tensor, format: str) -> Packed:
    """Round a weight (…, O, I) to a format, in fp32 and on the weight's device.

    int4's scales come from each group's smallest and largest number; `ops.quantized_search` finds better ones.
    ConfigError for an unknown format, and for rows without whole groups.
    """
    if format not in ROUNDINGS:
        raise ConfigError(f"quant: got {format!r}, but it must be one of {', '.join(ROUNDINGS)}")
    packed_shapes(format, tuple(weight.shape))
    return ROUNDINGS[format].quantize(weight.detach().float())


def _int8(weight: Tensor) -> Packed:
    largest = weight.abs().amax(-1)
    factor = torch.where(largest > 0, 127.0 / largest, 0.0)
    q = (weight * factor[..., None]).round_().to(torch.int8)
    return Packed("int8", q, largest * (1.0 / 127.0))


def _fp8(weight: Tensor) -> Packed:
    # Multiply by the inverse. A GPU divides by a constant in this way, so a division would round differently on a CPU.
    scale = weight.abs().amax(-1) * (1.0 / FP8_LARGEST)
    inverse = torch.where(scale > 0, 1.0 / scale, 0.0)
    q = (weight * inverse[..., None]).clamp_(-FP8_LARGEST, FP8_LARGEST).to(torch.float8_e4m3fn)
    return Packed("fp8", q, scale)


def int4_with(weight: Tensor, scale: Tensor, zero: Tensor) -> Packed:
    """int4 with given scales and zero points (…, O, G), both fp32.

    Scales and zero points are rounded to their stored dtypes first. The numbers are then rounded with those.
    """
    scale = scale.to(torch.bfloat16)
    zero = (zero * ZERO_STEPS).round().clamp_(0, 255).to(torch.uint8)
    grouped = weight.unflatten(-1, (-1, GROUP["int4"]))
    inverse = torch.where(scale > 0, 1.0 / scale.float(), 0.0)
    q = (grouped * inverse[..., None] + zero[..., None] / ZERO_STEPS).round_().clamp_(0, 15)
    return Packed("int4", _pack(q.flatten(-2).to(torch.uint8)), scale, zero)


def _int4(weight: Tensor) -> Packed:
    """Scale and zero point from each group's smallest and largest number; the range always includes zero."""
    grouped = weight.unflatten(-1, (-1, GROUP["int4"]))
    low, high = grouped.amin(-1).clamp_max(0), grouped.amax(-1).clamp_min(0)
    scale = (high - low) / 15
    return int4_with(weight, scale, torch.where(scale > 0, -low / scale, 0.0))


def _nf4(weight: Tensor) -> Packed:
    grouped = weight.unflatten(-1, (-1, GROUP["nf4"]))
    scale = grouped.abs().amax(-1)
    # As bitsandbytes does: multiply by the reciprocal, then compare with the middles between neighbouring values.
    inverse = torch.where(scale > 0, 1.0 / scale, 0.0)
    q = torch.bucketize(grouped * inverse[..., None], _nf4_middles(weight.device), right=False)
    return Packed("nf4", _pack(q.flatten(-2).to(torch.uint8)), scale)


def double_quantized(nf4: Packed) -> Packed:
    """Turn nf4 into nf4-dq. It needs whole matrices (or a stack of them): the mean of the scales is over a matrix."""
    code, nested, offset = double_quantization.compress(nf4.scale)
    return Packed("nf4-dq", nf4.data, code, None, nested, offset)


@cache
def nf4_table(device: torch.device) -> Tensor:
    return torch.tensor(NF4, dtype=torch.float32, device=device)


@cache
def _nf4_middles(device: torch.device) -> Tensor:
    table = nf4_table(device)
    return (table[1:] + table[:-1]) / 2


def _pack(q: Tensor) -> Tensor:
    return (q[..., 0::2] << 4) | q[..., 1::2]


def unpack(data: Tensor) -> Tensor:
    """The 4-bit numbers (…, I) of packed bytes (…, I/2), uint8."""
    return torch.stack([data >> 4, data & 15], dim=-1).flatten(-2)


def dequantize(packed: Packed, dtype: torch.dtype = torch.float32) -> Tensor:
    """The values of a quantised weight (…, O, I): computed in fp32, rounded once to `dtype`. Defines the formats."""
    return ROUNDINGS[packed.format].dequantize(packed).to(dtype)


def _times_row_scale(packed: Packed) -> Tensor:
    return packed.data.to(torch.float32) * packed.scale[..., None]


def _int4_values(packed: Packed) -> Tensor:
    assert packed.zero is not None, "int4 has zero points"
    q = _groups(packed).float() - packed.zero[..., None].float() / ZERO_STEPS
    return (q * packed.scale[..., None].float()).flatten(-2)


def _nf4_values(packed: Packed) -> Tensor:
    packed = packed.with_plain_scales()
    return (nf4_table(packed.data.device)[_groups(packed).int()] * packed.scale[..., None]).flatten(-2)


def _groups(packed: Packed) -> Tensor:
    """The 4-bit numbers by group: (…, G, numbers of a group), uint8."""
    return unpack(packed.data).unflatten(-1, (-1, GROUP[packed.format]))


ROUNDINGS: dict[str, Rounding] = {
    "int8": Rounding(_row_scaled(torch.int8), _int8, _times_row_scale),
    "fp8": Rounding(_row_scaled(torch.float8_e4m3fn), _fp8, _times_row_scale),
    "int4": Rounding(_int4_shapes, _int4, _int4_values),
    "nf4": Rounding(_nf4_shapes, _nf4, _nf4_values),
    "nf4-dq": Rounding(_nf4_dq_shapes, lambda weight: double_quantized(_nf4(weight)), _nf4_values),
}
