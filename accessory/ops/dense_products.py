"""Grouped products with dense stacks: rows are sorted by expert, and each expert's weight multiplies its own rows.

Nothing is padded and no token dropped (the dropless formulation of MegaBlocks, arXiv 2211.15841).

Legend: N rows sorted by expert, E experts, O out, I in features.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from accessory.ops import dispatch


def grouped_dense(x_NI: Tensor, weight_EOI: Tensor, count_E: Tensor) -> Tensor:
    """Multiply each row of x by its expert's weight: (N, O) in x's dtype. `ops.dispatch` chooses the kernel."""
    weight_EOI = weight_EOI.to(x_NI.dtype)
    kernel = dispatch.choose(dispatch.product("grouped", x_NI, weight_EOI, len(x_NI)))
    return kernel.load()(x_NI, weight_EOI, count_E)


def grouped_mm(x_NI: Tensor, weight_EOI: Tensor, count_E: Tensor) -> Tensor:
    """torch's grouped product."""
    return F.grouped_mm(x_NI, weight_EOI.transpose(1, 2), offs=count_E.cumsum(0).to(torch.int32))


def grouped_loop(x_NI: Tensor, weight_EOI: Tensor, count_E: Tensor) -> Tensor:
    """A loop over the experts that got rows. CPUs and fp32 use it, and tests compare with it."""
    runs = x_NI.split(count_E.tolist())
    # While gradients are recorded, an expert without rows contributes an empty product. Its gradient is then zero
    # instead of None, and collectives over parameters rely on that.
    keep_empty = torch.is_grad_enabled() and weight_EOI.requires_grad
    products = [F.linear(x, w) for x, w in zip(runs, weight_EOI.unbind(), strict=True) if len(x) or keep_empty]
    return torch.cat(products) if products else x_NI.new_empty(0, weight_EOI.shape[1])
