"""GPTQ (arXiv 2210.17323): rounds to int4 and int8 so that a product's outputs change least, rather than the weight.

A calibration text sends inputs x through a linear weight W. Over them, the outputs' squared error is the trace of
(W - W') H (W - W')ᵀ with H = Σ x xᵀ. Columns are rounded one after the other; columns with the largest inputs come
first. The columns that follow are corrected for the error of each rounded column, with factors from H's inverse. int4's
scales and zero points are searched before that. The search weighs an error by its cost after all other columns have
been corrected as well as possible. int8 keeps plain rounding's scale of each row, because its steps are fine enough.

Legend: O out, I in features, G groups of a row, n columns of a block.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from accessory.formats import GROUP, Format
from accessory.ops.quantized import Packed, int4_with, packed_shapes, quantize
from accessory.ops.quantized_search import MANY_ROUNDS, MANY_STARTS, search_int4, search_scales

# Shares of the mean of H's diagonal. A share is added to the whole diagonal, because inputs that the calibration text
# lacks may still come later. With few inputs H is less certain, so the share is larger. The numbers were measured on
# inputs that calibration had not seen.
DAMPING_LEAST, DAMPING_MOST, DAMPING_AT_ONE_INPUT_A_FEATURE = 0.01, 1.0, 0.1
BLOCK = 128


def gptq(weight: Tensor, format: Format, hessian_II: Tensor, tokens: int) -> Packed:
    """Quantise a weight (O, I) to int4 or int8 for the inputs of a calibration text. Computes in fp32.

    hessian_II: Σ x xᵀ over the inputs, at any scale. tokens: the number of inputs. Weights with the same inputs are
    best stacked along O and quantised in one call. Where no input came (H = 0), or H is not finite, int4's scales are
    searched without H and numbers are rounded to the nearest. ConfigError where I has no whole groups.
    """
    packed_shapes(format, tuple(weight.shape))
    weight = weight.detach().float()
    if not 0 < float(hessian_II.diagonal().sum()) < math.inf:
        if format == "int8":
            return quantize(weight, format)
        return search_int4(weight, starts=MANY_STARTS, rounds=MANY_ROUNDS)
    order_I = hessian_II.diagonal().argsort(descending=True)
    upper_II = inverse_root(hessian_II[order_I][:, order_I], damping_for(weight.shape[1], tokens))
    if format == "int8":
        scale_O = quantize(weight, format).scale
        done_OI = _compensated(weight, upper_II, order_I, [0] * len(order_I), scale_O[:, None], None)
        inverse_O = torch.where(scale_O > 0, 1.0 / scale_O, 0.0)
        return Packed("int8", (done_OI * inverse_O[:, None]).round_().clamp_(-127, 127).to(torch.int8), scale_O)
    # The diagonal of H⁻¹ = UᵀU, back in the weight's order. Its reciprocal is the least cost of an error in a column.
    importance_I = torch.empty_like(upper_II[0]).index_copy_(0, order_I, upper_II.square().sum(0).reciprocal())
    scale_OG, zero_OG = search_scales(weight, importance_I, starts=MANY_STARTS, rounds=MANY_ROUNDS)
    groups = (order_I // GROUP["int4"]).tolist()
    return int4_with(_compensated(weight, upper_II, order_I, groups, scale_OG, zero_OG), scale_OG, zero_OG)


def _compensated(
    weight: Tensor,
    upper_II: Tensor,
    order_I: Tensor,
    groups: list[int],
    scale_OG: Tensor,
    zero_OG: Tensor | None,
) -> Tensor:
    """Round all columns in order, correcting those that follow: (O, I) fp32, the values that the codes stand for.

    Plain rounding of the result gives the same codes. `groups`: the group of each column, in order. Codes are
    -127 … 127 without zero points, else 0 … 15.
    """
    left_IO = weight.t()[order_I]  # a copy, in which each column of the weight is contiguous
    scale_GO = scale_OG.t().contiguous()
    inverse_GO = torch.where(scale_GO > 0, 1.0 / scale_GO, 0.0)
    zero_GO = torch.zeros_like(scale_GO) if zero_OG is None else zero_OG.t().contiguous()
    codes = (-127, 127) if zero_OG is None else (0, 15)
    for start in range(0, len(left_IO), BLOCK):
        end = start + BLOCK
        own_nn, columns = upper_II[start:end, start:end], groups[start:end]
        error_nO = _round_block(left_IO[start:end], own_nn, columns, scale_GO, inverse_GO, zero_GO, codes)
        left_IO[end:].addmm_(upper_II[start:end, end:].t(), error_nO, alpha=-1)
    return torch.empty_like(left_IO).index_copy_(0, order_I, left_IO).t().contiguous()


def damping_for(features: int, tokens: int) -> float:
    """The share of H's mean diagonal to add to the diagonal: more for fewer `tokens` (inputs) a feature."""
    share = DAMPING_AT_ONE_INPUT_A_FEATURE * features / max(1, tokens)
    return min(max(share, DAMPING_LEAST), DAMPING_MOST)


def inverse_root(hessian_II: Tensor, damping: float) -> Tensor:
    """The upper triangular U with UᵀU = H⁻¹ for the damped H, up to H's scale, fp32 (I, I).

    Row i has the factors by which column i's error changes the columns that follow.
    """
    I, mean = len(hessian_II), float(hessian_II.diagonal().mean())  # noqa: E741
    while True:
        # H = RRᵀ with an upper triangular R is the Cholesky decomposition of H with rows and columns reversed. U = R⁻¹.
        backwards_II = hessian_II.float().flip(0, 1).div_(mean)
        backwards_II.diagonal().add_(damping)
        lower_II, failed = torch.linalg.cholesky_ex(backwards_II)
        if not int(failed):
            identity_II = torch.eye(I, device=lower_II.device)
            return torch.linalg.solve_triangular(lower_II, identity_II, upper=False).flip(0, 1)
        damping *= 10  # rounding errors had made H indefinite
        assert damping < 1e6, "H is no sum of x xᵀ, or not finite"


def _round_block(
    now_nO: Tensor,
    upper_nn: Tensor,
    groups: list[int],
    scale_GO: Tensor,
    inverse_GO: Tensor,
    zero_GO: Tensor,
    codes: tuple[int, int],
) -> Tensor:
    """Round a block's columns one after the other, in place, and correct the block's later columns.

    codes: the smallest and the largest code. Returns the errors (n, O), each divided by its column's diagonal factor.
    """
    error_nO = torch.empty_like(now_nO)
    own_n = upper_nn.diagonal().tolist()
    for i, group in enumerate(groups):
        code_O = (now_nO[i] * inverse_GO[group]).add_(zero_GO[group]).round_().clamp_(*codes)
        value_O = code_O.sub_(zero_GO[group]).mul_(scale_GO[group])
        torch.sub(now_nO[i], value_O, out=error_nO[i]).div_(own_n[i])
        now_nO[i] = value_O
        now_nO[i + 1 :].addr_(upper_nn[i, i + 1 :], error_nO[i], alpha=-1)
    return error_nO
