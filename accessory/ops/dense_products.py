"""Grouped products of dense stacks: rows sorted by expert, each expert's weight over its own run of rows.

Nothing is padded and no token dropped (the dropless formulation of MegaBlocks, arXiv 2211.15841).

Legend: N rows sorted by expert, E experts, O out, I in features.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from accessory.ops import dispatch


def grouped_dense(x_NI: Tensor, weight_EOI: Tensor, count_E: Tensor) -> Tensor:
    """Rows of x times their expert's weight, (N, O) in x's dtype, by the kernel that `ops.dispatch` chooses."""
    weight_EOI = weight_EOI.to(x_NI.dtype)
    kernel = dispatch.choose(dispatch.product("grouped", x_NI, weight_EOI, len(x_NI)))
    return kernel.load()(x_NI, weight_EOI, count_E)


def grouped_mm(x_NI: Tensor, weight_EOI: Tensor, count_E: Tensor) -> Tensor:
    """torch's grouped product."""
    return F.grouped_mm(x_NI, weight_EOI.transpose(1, 2), offs=count_E.cumsum(0).to(torch.int32))


def grouped_loop(x_NI: Tensor, weight_EOI: Tensor, count_E: Tensor) -> Tensor:
    """A loop over the experts that got rows: what CPUs and fp32 use, and the reference of the tests."""
    runs = x_NI.split(count_E.tolist())
    # While gradients are recorded an idle expert takes part with an empty product. Its gradient is then zero and not
    # None, which collectives over parameters rely on.
    keep_empty = torch.is_grad_enabled() and weight_EOI.requires_grad
    products = [F.linear(x, w) for x, w in zip(runs, weight_EOI.unbind(), strict=True) if len(x) or keep_empty]
    return torch.cat(products) if products else x_NI.new_empty(0, weight_EOI.shape[1])
