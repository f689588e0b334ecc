"""nf4's scales in 8 bits: bitsandbytes' "double quantisation" (arXiv 2305.14314). A scale of 64 numbers takes a byte.

The mean of a matrix's scales is subtracted from them. The scales then form blocks of 256, row after row. The largest
magnitude of a block scales the block. Each scale becomes the nearest of 256 values, which are close together near zero.

    scale = VALUES[code] · nested + offset

A block may begin and end inside a row, but a cut of the matrix must still have all its numbers. Therefore `nested` is
stored for every S scales of a row, and `offset` for every row. S is the largest number that divides both the scales of
a row and a block's 256: 64 for a row of 4096 numbers, 32 for a row of 14336.

Legend: O out, G scales of a row, H = G / S, N scales of a matrix, B blocks.
"""

from __future__ import annotations

import math
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from accessory.formats import DOUBLE_QUANTIZATION_BLOCK, nested_scales

BLOCK = DOUBLE_QUANTIZATION_BLOCK
# bitsandbytes' CPU library first rounds a number to a grid of 16 bits and looks its code up there. Its CUDA kernels
# compare with the middles between values. Near a middle the two may differ by one code.
GRID = 2**16 - 1


@cache
def values(device: torch.device) -> Tensor:
    """The values of the 256 codes, ascending, fp32 (256,). Decades go from 10⁻⁶ to 1; each has twice as many values as
    the one before."""
    found = [0.0, 1.0]
    for decade in range(7):
        ends = torch.linspace(0.1, 1, 2**decade + 1)
        middles = 10.0 ** (decade - 6) * ((ends[:-1] + ends[1:]) / 2)
        found += [*middles.tolist(), *(-middles).tolist()]
    return torch.tensor(sorted(found), device=device)


@cache
def _middles(device: torch.device) -> Tensor:
    table = values(device)
    return (table[:-1] + table[1:]) / 2


@cache
def _grid(device: torch.device) -> Tensor:
    at = torch.arange(GRID + 1, dtype=torch.float32, device=device) * (2.0 / GRID) - 1
    return torch.bucketize(at, _middles(device)).to(torch.uint8)


def nearest(x: Tensor, on_grid: bool) -> Tensor:
    """The codes (uint8) of numbers between -1 and 1. `on_grid` first rounds them to 65,536 even steps."""
    if on_grid:
        return _grid(x.device)[((x + 1) * (GRID / 2) + 0.5).to(torch.int32).clamp_(0, GRID)]
    return torch.bucketize(x, _middles(x.device)).to(torch.uint8)


def compress(scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compress the fp32 scales (…, O, G) of a matrix or a stack.

    Returns codes (…, O, G) uint8, nested (…, O, H) fp32 and offset (…, O) fp32.
    """
    if scale.dim() > 2:
        parts = zip(*(compress(matrix) for matrix in scale), strict=True)
        code, nested, offset = (torch.stack(part) for part in parts)
        return code, nested, offset
    O, G = scale.shape  # noqa: E741
    mean = scale.mean()
    centred_N = (scale - mean).flatten()
    centred_Bn = F.pad(centred_N, (0, -len(centred_N) % BLOCK)).view(-1, BLOCK)
    largest_B = centred_Bn.abs().amax(-1)
    inverse_B = torch.where(largest_B > 0, 1.0 / largest_B, 0.0)
    code_Bn = nearest(centred_Bn * inverse_B[:, None], on_grid=not scale.is_cuda)
    code_Bn.masked_fill_(largest_B[:, None] == 0, 0)
    first_OH = torch.arange(0, O * G, G // nested_scales(G), device=scale.device).view(O, -1)
    code = code_Bn.flatten()[: O * G].view(O, G)
    return code, largest_B[first_OH // BLOCK], mean.expand(O).clone()


def expand(code: Tensor, nested: Tensor, offset: Tensor) -> Tensor:
    """Undo `compress`: the scales (…, O, G), fp32."""
    value = values(code.device)[code.int()].unflatten(-1, (nested.shape[-1], -1))
    return (value * nested[..., None]).flatten(-2).add_(offset[..., None])


def columns_of_nested(groups: int, nested: int, start: int, length: int) -> list[int]:
    """Which of a row's `nested` numbers a cut of the row needs.

    The row has `groups` scales; the cut has `length` of them, from `start` on.
    """
    whole = groups // nested
    own = math.gcd(whole, start, length)
    return [(start + at) // whole for at in range(0, length, own)]
