"""Grouped products with dense stacks: rows are sorted by expert, and each expert's weight multiplies its own rows.

Nothing is padded and no token dropped (the dropless formulation of MegaBlocks, arXiv 2211.15841). Rows behind the last
expert's, which belong to other ranks' experts, get no product: what lies in them afterwards is undefined.

Legend: T tokens, K experts a token, N = T·K rows sorted by expert, E experts, O out, I in features.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from accessory.limits import IN_PLACE_ROWS_DENSE
from accessory.ops import dispatch
from accessory.ops.compute_copy import in_dtype
from accessory.ops.gradient_squares import GradientSquares


def dense_linear(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """x (…, I) times a weight: (…, O). All have one dtype."""
    if dispatch.fixed():
        x_TI = x.reshape(-1, x.shape[-1])
        y_TO = dispatch.choose(dispatch.product("linear", x_TI, weight_OI, len(x_TI))).load()(x_TI, weight_OI)
        y = y_TO.view(*x.shape[:-1], len(weight_OI))
        return y if bias_O is None else y + bias_O
    if x.dtype == torch.bfloat16 and x.numel() == x.shape[-1] and x.device.type == "cpu" and bias_O is None:
        # One row in bf16: torch's `linear` takes a third to two thirds longer than its product with a vector.
        return torch.mv(weight_OI, x) if x.dim() == 1 else torch.mv(weight_OI, x.view(-1)).view(*x.shape[:-1], -1)
    if x.is_cuda and bias_O is None and 0 < x.numel() <= IN_PLACE_ROWS_DENSE * x.shape[-1]:
        kernel = dispatch.find(dispatch.product("linear", x, weight_OI, x.numel() // x.shape[-1]))
        if kernel is not None:
            return kernel.load()(x.reshape(-1, x.shape[-1]), weight_OI).view(*x.shape[:-1], -1)
    return F.linear(x, weight_OI, bias_O)


def sort_by_expert(expert_TK: Tensor, experts: int, first: int = 0) -> tuple[Tensor, Tensor]:
    """Sort the flat (token, k) pairs by expert, those of the experts `first … first + experts - 1`. Pairs of other
    experts come behind them.

    Returns order_N (a stable sort) and count_E, the pairs of each of these experts, both int64.
    """
    local_N = expert_TK.flatten() - first
    local_N = torch.where((local_N >= 0) & (local_N < experts), local_N, experts)
    # bincount would make the host wait for a GPU; a sum over one-hot rows does not.
    count_E = (local_N[:, None] == torch.arange(experts, device=local_N.device)).sum(0)
    # A GPU sorts numbers of a byte in fewer passes.
    return torch.argsort(local_N.to(torch.uint8) if experts < 256 else local_N, stable=True), count_E


def grouped_dense(x_NI: Tensor, weight_EOI: Tensor, count_E: Tensor) -> Tensor:
    """Multiply each row of x by its expert's weight: (N, O) in x's dtype. `ops.dispatch` chooses the kernel."""
    weight_EOI = in_dtype(weight_EOI, x_NI.dtype)
    kernel = dispatch.choose(dispatch.product("grouped", x_NI, weight_EOI, len(x_NI)))
    return kernel.load()(x_NI, weight_EOI, count_E)


def grouped_mm(x_NI: Tensor, weight_EOI: Tensor, count_E: Tensor) -> Tensor:
    """torch's grouped product."""
    return F.grouped_mm(x_NI, weight_EOI.transpose(1, 2), offs=count_E.cumsum(0).to(torch.int32))


def grouped_loop(x_NI: Tensor, weight_EOI: Tensor, count_E: Tensor) -> Tensor:
    """A loop over the experts that got rows. CPUs and training in fp32 use it, and tests compare with it."""
    *runs, others = by_expert(x_NI, count_E)
    products = [dense_linear(x, w) for x, w in zip(runs, weight_EOI.unbind(), strict=True) if len(x)]
    return torch.cat([*products, x_NI.new_zeros(len(others), weight_EOI.shape[1])])


def by_expert(x_NI: Tensor, count_E: Tensor) -> list[Tensor]:
    """The rows of each expert, and at the end the rows of no expert. The host waits for the counts."""
    counts = count_E.tolist()
    return list(x_NI.split([*counts, len(x_NI) - sum(counts)]))


# --------------------------------------------------------------------------- gradients


class Term(NamedTuple):
    """Rows times a stack, plus rows of a low rank r times a stack of that rank."""

    x_NI: Tensor
    weight: Tensor  # (E, O, I), or, where gradients go back, (E, I, O)
    low_Nr: Tensor | None = None
    low_weight: Tensor | None = None  # (E, O, r), or (E, r, O)


def grouped_backward(dy_NO: Tensor, weight_EOI: Tensor, count_E: Tensor) -> Tensor:
    """The gradient of `grouped_dense`'s rows: each row times its expert's weight as it lies, (N, I) in dy's dtype."""
    weight_EOI = weight_EOI.to(dy_NO.dtype)
    kernel = dispatch.choose(dispatch.product("grouped_backward", dy_NO, weight_EOI, len(dy_NO)))
    return kernel.load()(dy_NO, weight_EOI, count_E)


def grouped_mm_backward(dy_NO: Tensor, weight_EOI: Tensor, count_E: Tensor) -> Tensor:
    """torch's grouped product."""
    return F.grouped_mm(dy_NO, weight_EOI, offs=count_E.cumsum(0).to(torch.int32))


def grouped_loop_backward(dy_NO: Tensor, weight_EOI: Tensor, count_E: Tensor) -> Tensor:
    *runs, others = by_expert(dy_NO, count_E)
    products = [dy @ w for dy, w in zip(runs, weight_EOI.unbind(), strict=True)]
    return torch.cat([*products, dy_NO.new_zeros(len(others), weight_EOI.shape[2])])


def sum_of_terms(terms: Sequence[Term], count_E: Tensor, *, back: bool) -> Tensor:
    """The sum of the terms' products: (N, O) in x's dtype. back: weights are taken as they lie, as `grouped_backward`
    does."""
    kernel = dispatch.find(dispatch.product("grouped_terms", terms[0].x_NI, terms[0].weight, len(terms[0].x_NI)))
    if kernel is not None and len(terms) <= 2:
        return kernel.load()(count_E, terms, back)
    one = grouped_backward if back else grouped_dense
    parts = [one(t.x_NI, t.weight, count_E) for t in terms]
    parts += [one(t.low_Nr, t.low_weight, count_E) for t in terms if t.low_Nr is not None and t.low_weight is not None]
    total, *others = parts
    for part in others:
        total += part
    return total


def grouped_weight_gradient(
    dy_NO: Tensor, x_NI: Tensor, count_E: Tensor, dtype: torch.dtype, out: Tensor | None = None, *, adds: bool = True,
    squares: GradientSquares | None = None,
) -> Tensor:  # fmt: skip
    """The gradient of `grouped_dense`'s weights, Σ over each expert's rows: (E, O, I) in `dtype`.

    out: a contiguous gradient on top of which it is written, or, without `adds`, in its place; it is returned. An
    expert without rows gets zeros. squares: learns the sum of its squares where the kernel makes it.
    """
    # The stack of weights stands for its gradient, which has its shape.
    like = x_NI.new_empty(0).expand(len(count_E), dy_NO.shape[1], 0)
    found = dispatch.product("grouped_weights", dy_NO, like, len(dy_NO))._replace(in_features=x_NI.shape[1])
    kernel = dispatch.choose(found)
    if squares is not None and kernel.squares:
        sums = squares.buffer((len(count_E), dy_NO.shape[1], x_NI.shape[1]), x_NI.device)
        gradient = kernel.load()(dy_NO, x_NI, count_E, dtype, out, adds, sums)
        squares.record(gradient)
        return gradient
    if squares is not None:
        squares.disable()
    return kernel.load()(dy_NO, x_NI, count_E, dtype, out, adds)


def grouped_mm_weights(
    dy_NO: Tensor, x_NI: Tensor, count_E: Tensor, dtype: torch.dtype, out: Tensor | None, adds: bool
) -> Tensor:
    """torch's grouped product."""
    dw_EOI = F.grouped_mm(dy_NO.t(), x_NI, offs=count_E.cumsum(0).to(torch.int32))
    if out is None:
        return dw_EOI.to(dtype)
    return out.add_(dw_EOI) if adds else out.copy_(dw_EOI)


def grouped_loop_weights(
    dy_NO: Tensor, x_NI: Tensor, count_E: Tensor, dtype: torch.dtype, out: Tensor | None, adds: bool
) -> Tensor:
    *runs, _ = by_expert(dy_NO, count_E)
    *inputs, _ = by_expert(x_NI, count_E)
    if out is None:
        out = x_NI.new_zeros(len(count_E), dy_NO.shape[1], x_NI.shape[1], dtype=dtype)
    elif not adds:
        out.zero_()
    for dw_OI, dy, x in zip(out.unbind(), runs, inputs, strict=True):
        if len(x):
            dw_OI.add_(dy.t() @ x)
    return out
