"""Products on a CPU in which a row has the same bits beside any others: in blocks of one number of rows.

Libraries choose the order of their sums by the number of rows, so one row alone differs from the same row in a batch.
Here every product has as many rows as any other; missing ones are zero. It also matters whether each place of a block
sums in the same order. Every CPU library may decide that differently, so it is tried once for each size; where places
differ, a block is one row.

Legend: T rows of x, M rows of a block, O out, I in features.
"""

from __future__ import annotations

import torch
from torch import Tensor

from accessory.limits import FIXED_ROWS_CPU
from accessory.ops import dispatch
from accessory.ops.dense_products import dense_linear
from accessory.ops.quantized import Packed
from accessory.ops.quantized_products import packed_linear

TRIED = 2048  # numbers of a product's output
# Whether all places of a block sum in one order, by what a product is.
_places: dict[tuple[object, ...], bool] = {}


def linear(x_TI: Tensor, weight: Tensor | Packed) -> Tensor:
    """x (T, I) times a dense or quantised weight (O, I): (T, O) in x's dtype."""
    (T, I), O = x_TI.shape, weight.shape[0]  # noqa: E741
    M = FIXED_ROWS_CPU[dispatch.fixed()][x_TI.element_size()]
    y_TO = x_TI.new_empty(T, O)
    with dispatch.fixing(""):
        M = M if _places_are_equal(weight, M, x_TI.dtype) else 1
        for first in range(0, T, M):
            # Each block in memory of its own: libraries choose their ways by where a tensor begins, too.
            x_MI, rows_nI = x_TI.new_zeros(M, I), x_TI[first : first + M]
            x_MI[: len(rows_nI)] = rows_nI
            y_TO[first : first + M] = _product(x_MI, weight)[: len(rows_nI)]
    return y_TO


def _product(x_MI: Tensor, weight: Tensor | Packed) -> Tensor:
    return packed_linear(x_MI, weight) if isinstance(weight, Packed) else dense_linear(x_MI, weight)


def _places_are_equal(weight: Tensor | Packed, M: int, dtype: torch.dtype) -> bool:
    """Whether equal rows of a block have equal products. Tried with random numbers, once for each size."""
    O, I = weight.shape  # noqa: E741
    format = weight.format if isinstance(weight, Packed) else dispatch.DENSE
    kind = (format, O, I, M, dtype, torch.get_num_threads())
    if kind not in _places:
        generator = torch.Generator().manual_seed(0)
        _places[kind] = True
        # Two orders of a sum often give the same number, so a few numbers would show nothing.
        for _ in range(-(-TRIED // O)):
            y_MO = _product(torch.randn(1, I, generator=generator).to(dtype).repeat(M, 1), weight)
            _places[kind] = _places[kind] and bool((y_MO == y_MO[0]).all())
    return _places[kind]
