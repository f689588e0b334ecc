"""int4 with scales and zero points that minimise the squared error, instead of covering each group's whole range.

A group of 128 numbers is rounded to (q - zero) · scale. A range from the smallest to the largest number spends most of
the sixteen values on few numbers. A narrower range clips those and is closer to the rest. For given q the best scale
and zero come from a straight line through the points (q, w), by weighted least squares. For given scale and zero the
best q is the nearest. Neither step raises the error. The search alternates them from several starts and takes the best
result. It compares errors with scale and zero as they are stored. No group ends worse than with plain rounding.

Legend: O out, I in features, G groups of a row, N groups, n numbers of a group.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from accessory.formats import GROUP
from accessory.ops.quantized import ZERO_STEPS, Packed, int4_with, packed_shapes

# The search starts from these shares of the whole range. Normal and heavy-tailed groups end between 0.8 and 0.95 of it.
STARTS = (0.98, 0.93, 0.88)
ROUNDS = 3
# For calibration, where most time goes elsewhere and a few inputs may count more than all others.
MANY_STARTS = (1.0, 0.96, 0.92, 0.88, 0.84, 0.78, 0.7, 0.6, 0.5)
MANY_ROUNDS = 4
# Numbers searched at a time. On a CPU the intermediate tensors then fit its caches; on a GPU they fill the card.
BLOCK_CPU, BLOCK_GPU = 2**19, 2**26


def search_int4(
    weight: Tensor, importance: Tensor | None = None, *, starts: Sequence[float] = STARTS, rounds: int = ROUNDS
) -> Packed:
    """Round a weight or a stack (…, O, I) to int4 and search for the smallest squared error of each group.

    `importance` (I,), not negative: the weight of an error, by input feature. ConfigError where I has no whole groups.
    """
    packed_shapes("int4", tuple(weight.shape))
    weight = weight.detach().float()
    return int4_with(weight, *search_scales(weight, importance, starts=starts, rounds=rounds))


def search_scales(
    weight: Tensor, importance: Tensor | None = None, *, starts: Sequence[float] = STARTS, rounds: int = ROUNDS
) -> tuple[Tensor, Tensor]:
    """The best scales and zero points of an fp32 weight (…, O, I): both (…, O, G) fp32, with values int4 can store."""
    n = GROUP["int4"]
    grouped_Nn = weight.reshape(-1, n)
    groups = weight.shape[-1] // n
    step = max(1, (BLOCK_GPU if weight.is_cuda else BLOCK_CPU) // n // groups) * groups  # whole rows
    found = []
    for w_Nn in grouped_Nn.split(step):
        h_Nn = None
        if importance is not None:
            h_Nn = importance.float().view(groups, n).repeat(w_Nn.shape[0] // groups, 1)
        found.append(_search(w_Nn, h_Nn, starts, rounds))
    scale_N, zero_N = (torch.cat(parts) for parts in zip(*found, strict=True))
    shape = (*weight.shape[:-1], groups)
    return scale_N.view(shape), zero_N.view(shape)


def _search(w_Nn: Tensor, h_Nn: Tensor | None, starts: Sequence[float], rounds: int) -> tuple[Tensor, Tensor]:
    low_N, high_N = w_Nn.amin(-1).clamp_max_(0), w_Nn.amax(-1).clamp_min_(0)
    whole_N = (high_N - low_N) / 15
    plain = _stored(whole_N, torch.where(whole_N > 0, -low_N / whole_N, 0.0))
    hw_Nn = w_Nn if h_Nn is None else w_Nn * h_Nn
    total = float(w_Nn.shape[1]) if h_Nn is None else h_Nn.sum(-1)
    sum_w_N, sum_ww_N = hw_Nn.sum(-1), torch.linalg.vecdot(hw_Nn, w_Nn)
    best = (torch.full_like(whole_N, float("inf")), *plain)
    for start in starts:
        scale_N, zero_N = _stored(whole_N * start, plain[1])
        for turn in range(rounds + 1):
            v_Nn = _codes(w_Nn, scale_N, zero_N).sub_(zero_N[:, None])
            sum_wv_N = torch.linalg.vecdot(hw_Nn, v_Nn)
            hv_Nn = v_Nn if h_Nn is None else v_Nn * h_Nn
            sum_v_N, sum_vv_N = hv_Nn.sum(-1), torch.linalg.vecdot(hv_Nn, v_Nn)
            error_N = sum_ww_N - 2 * scale_N * sum_wv_N + scale_N.square() * sum_vv_N
            better_N = error_N < best[0]
            new = (error_N, scale_N, zero_N)
            best = tuple(torch.where(better_N, a, b) for a, b in zip(new, best, strict=True))  # type: ignore[assignment]
            if turn == rounds:
                break
            slope_N = (total * sum_wv_N - sum_w_N * sum_v_N) / (total * sum_vv_N - sum_v_N.square())
            offset_N = (sum_w_N - slope_N * sum_v_N) / total
            fits_N = slope_N > 0  # false for NaN too: all numbers of the group are equal, or all importance is zero
            moved_N = zero_N - offset_N / slope_N
            scale_N, zero_N = _stored(torch.where(fits_N, slope_N, scale_N), torch.where(fits_N, moved_N, zero_N))
    # The sums of squares above are exact to a few digits only, so the final comparison uses the errors themselves.
    better_N = _error(w_Nn, h_Nn, *best[1:]) < _error(w_Nn, h_Nn, *plain)
    return torch.where(better_N, best[1], plain[0]), torch.where(better_N, best[2], plain[1])


def _stored(scale_N: Tensor, zero_N: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and zero point as they will be read back: rounded to bf16 and to 1/16."""
    return scale_N.to(torch.bfloat16).float(), (zero_N * ZERO_STEPS).round_().clamp_(0, 255).div_(ZERO_STEPS)


def _codes(w_Nn: Tensor, scale_N: Tensor, zero_N: Tensor) -> Tensor:
    """The codes that `int4_with` rounds to."""
    inverse_N = torch.where(scale_N > 0, 1.0 / scale_N, 0.0)
    return (w_Nn * inverse_N[:, None]).add_(zero_N[:, None]).round_().clamp_(0, 15)


def _error(w_Nn: Tensor, h_Nn: Tensor | None, scale_N: Tensor, zero_N: Tensor) -> Tensor:
    e_Nn = _codes(w_Nn, scale_N, zero_N).sub_(zero_N[:, None]).mul_(scale_N[:, None]).sub_(w_Nn).square_()
    return (e_Nn if h_Nn is None else e_Nn.mul_(h_Nn)).sum(-1)
