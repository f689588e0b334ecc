"""GPTQ (arXiv 2210.17323): int4 and int8 numbers chosen so that a product's outputs, not the weight, change least.

Over the inputs x that a calibration text sends through a linear weight W, the outputs' squared error is the trace of
(W - W') H (W - W')ᵀ with H = Σ x xᵀ. Columns are rounded one after the other, those of the largest inputs first; the
error that each one makes is worked into the columns still to come, by factors out of H's inverse. int4's scales and
zero points are searched before: an error counts there what it costs when all other columns have made the best of it.
int8's are those of its rows, whose steps are fine enough.

Legend: O out, I in features, G groups of a row, n columns of a block.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from accessory.formats import GROUP, Format
from accessory.ops.quantized import Packed, int4_with, packed_shapes, quantize
from accessory.ops.quantized_search import MANY_ROUNDS, MANY_STARTS, search_int4, search_scales

# Of the mean of H's diagonal, added to all of it: what is not in the text may come all the same. Few inputs say little
# about the rest of the features, so their word counts less; measured on inputs that were not calibrated on.
DAMPING_LEAST, DAMPING_MOST, DAMPING_AT_ONE_INPUT_A_FEATURE = 0.01, 1.0, 0.1
BLOCK = 128


def gptq(weight: Tensor, format: Format, hessian_II: Tensor, tokens: int) -> Packed:
    """int4 or int8 of a weight (O, I) for inputs, `tokens` of them, with Σ x xᵀ = `hessian_II` of any scale; in fp32.

    Weights of the same inputs are best given at once, one above the other. Where nothing came in (H = 0), or what came
    is not finite, int4's scales are searched and numbers rounded to the nearest. ConfigError where I has no whole
    groups.
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
    # The diagonal of H⁻¹ = UᵀU, back in the weight's order: the reciprocal of what an error in that column must cost.
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
    """Every column as what it was rounded to, (O, I): rounding that again gives the same numbers. `groups`: those of
    the columns in order; without zero points codes are -127 … 127, else 0 … 15."""
    left_IO = weight.t()[order_I]  # a copy, with each column of the weight in one piece
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
    """How much `tokens` inputs of `features` numbers are to be trusted, as the share of H's mean diagonal to add."""
    share = DAMPING_AT_ONE_INPUT_A_FEATURE * features / max(1, tokens)
    return min(max(share, DAMPING_LEAST), DAMPING_MOST)


def inverse_root(hessian_II: Tensor, damping: float) -> Tensor:
    """The upper triangular U with UᵀU = H⁻¹, up to H's scale, H damped: row i holds how column i's error spreads."""
    I, mean = len(hessian_II), float(hessian_II.diagonal().mean())  # noqa: E741
    while True:
        # H = RRᵀ with R upper triangular is a Cholesky decomposition read backwards; U is R's inverse.
        backwards_II = hessian_II.float().flip(0, 1).div_(mean)
        backwards_II.diagonal().add_(damping)
        lower_II, failed = torch.linalg.cholesky_ex(backwards_II)
        if not int(failed):
            identity_II = torch.eye(I, device=lower_II.device)
            return torch.linalg.solve_triangular(lower_II, identity_II, upper=False).flip(0, 1)
        damping *= 10  # rounding had made H indefinite
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
    """Round the columns of a block in turn, where they lie, to the least … the largest of `codes`, correcting its later
    ones; returns the errors (n, O), each over its own factor."""
    error_nO = torch.empty_like(now_nO)
    own_n = upper_nn.diagonal().tolist()
    for i, group in enumerate(groups):
        code_O = (now_nO[i] * inverse_GO[group]).add_(zero_GO[group]).round_().clamp_(*codes)
        value_O = code_O.sub_(zero_GO[group]).mul_(scale_GO[group])
        torch.sub(now_nO[i], value_O, out=error_nO[i]).div_(own_n[i])
        now_nO[i] = value_O
        now_nO[i + 1 :].addr_(upper_nn[i, i + 1 :], error_nO[i], alpha=-1)
    return error_nO
