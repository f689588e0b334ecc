"""Products on a GPU in which a row has the same bits beside any others: the tile of one number of rows, for any number.

A tile's row is summed in an order that depends neither on the other rows nor on its place. The tile must be one for all
numbers of rows, because another tile may sum in another order. Tokens that decode have a small tile, prompts a large
one. No sum has atomics, and what is split is split in equal parts.

Legend: T rows of x, N rows sorted by expert, E experts, O out, I in features.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from accessory.ops.quantized import Packed
from accessory.ops.triton import grouped, grouped_experts, packed_grouped

# Rows an expert, or of a single weight, whose tile is taken.
DECODING, PROMPT = 16, 2**20


def _linear(x_TI: Tensor, weight: Tensor | Packed, as_rows: float) -> Tensor:
    """x (T, I) times a weight (O, I): (T, O) in x's dtype, also for sizes that are no multiples of 16, and in fp32."""
    if isinstance(weight, Packed):
        return packed_grouped.product(x_TI, weight, as_rows=as_rows)
    count_1 = torch.full((1,), len(x_TI), dtype=torch.int64, device=x_TI.device)
    return grouped.product(x_TI, weight[None], count_1, as_rows=as_rows)


def _grouped(x_NI: Tensor, weight_EOI: Tensor | Packed, count_E: Tensor, as_rows: float) -> Tensor:
    """Rows of x, sorted by expert, times their expert's weight: (N, O) in x's dtype."""
    if isinstance(weight_EOI, Packed):
        return packed_grouped.product(x_NI, weight_EOI, count_E, as_rows)
    return grouped.product(x_NI, weight_EOI, count_E, as_rows=as_rows)


# Products with a single weight, those of rows sorted by expert, and a whole feed-forward, as `ops.dispatch` names them.
decoding_linear_in_tiles = partial(grouped_experts.linear, as_rows=DECODING)
decoding_linear, prompt_linear = (partial(_linear, as_rows=rows) for rows in (DECODING, PROMPT))
decoding_grouped, prompt_grouped = (partial(_grouped, as_rows=rows) for rows in (DECODING, PROMPT))
decoding_experts = partial(grouped_experts.experts_in_tiles, as_rows=DECODING)
