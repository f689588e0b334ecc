"""From a row of logits and a random number to an id.

Probabilities are whole numbers here, in units of 2^-40 of the largest one. Their sums are the same in any order of
adding, so a draw is the same in any batch. Devices whose exp differs in the last bit round to the same whole numbers,
but for a few that differ by one unit. Of equal logits the lowest id comes first.

Legend: R rows, V ids, K the best ids of a row.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Up to so many best ids come from a top-k; more come from a sort.
MOST_BY_TOP_K = 1024
_ONE = 2.0**40  # the weight of the likeliest token; int64 holds the sum of as many as any vocabulary has


def draw(x_RV: Tensor, numbers_R5: Tensor, k: int) -> Tensor:
    """One id for each row of finite or -inf fp32 logits, int64 (R,).

    `numbers_R5` are float64: a number in [0, 1), temperature, top_k, top_p, min_p. `k` is at least every top_k: ids
    then lie on [0, 1) by falling logits. `k` is 0 for rows whose top_k and top_p leave all ids, which then lie there in
    the order of ids; no ranking is needed.
    """
    uniform_R1, temperature_R1, top_k_R1, top_p_R1, min_p_R1 = numbers_R5.split(1, dim=1)
    x_RV = x_RV + 0.0  # -0.0 becomes 0.0; they are equal, but a sort may tell them apart
    top_R1 = x_RV.amax(-1, keepdim=True).double()
    if k == 0:
        weight_RV = _weights(x_RV, top_R1, temperature_R1)
        mass_RV = (weight_RV * (weight_RV >= min_p_R1 * _ONE)).cumsum(-1)
        return _find(mass_RV, mass_RV[:, -1:], uniform_R1)
    if k <= MOST_BY_TOP_K:
        x_RK, ids_RK = best(x_RV, k)
    else:
        x_RK, ids_RK = x_RV.sort(dim=-1, descending=True, stable=True)
    weight_RK = _weights(x_RK, top_R1, temperature_R1)
    mass_RK = weight_RK.cumsum(-1)
    # The nucleus is the smallest set of tokens whose share of the top_k tokens' mass reaches top_p. A token belongs to
    # it if the share before the token is less than top_p.
    in_nucleus_RK = mass_RK - weight_RK < top_p_R1 * mass_RK.gather(1, top_k_R1.long() - 1)
    kept_RK = in_nucleus_RK & (weight_RK >= min_p_R1 * _ONE)
    # What is kept are the first ids of a row's ranking, so their number says which.
    last_R1 = kept_RK.sum(-1, keepdim=True) - 1
    rank_R = _find(mass_RK, mass_RK.gather(1, last_R1), uniform_R1)
    return ids_RK.gather(1, rank_R[:, None]).squeeze(1)


def best(x_RV: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest fp32 numbers of each row and their ids, (R, k). Of equal ones the lowest id comes first.

    `topk` does not promise that, so it gets unique int64 keys. A key's high half is the number, as an int32 of the same
    order; its low half counts ids backwards.
    """
    bits_RV = (x_RV + 0.0).view(torch.int32)
    # A negative number's bits, read as an int32, grow with its size: all but the sign are turned over.
    high_RV = bits_RV ^ ((bits_RV >> 31) & 0x7FFFFFFF)
    last = x_RV.shape[1] - 1
    key_RV = (high_RV.long() << 32) + torch.arange(last, -1, -1, device=x_RV.device)
    ids_RK = last - (key_RV.topk(k).values & 0xFFFFFFFF)
    return x_RV.gather(1, ids_RK), ids_RK


def _weights(x_RK: Tensor, top_R1: Tensor, temperature_R1: Tensor) -> Tensor:
    """exp((x - top) / temperature) in units of 2^-40, int64. With the difference taken first, no quotient is +inf."""
    return x_RK.double().sub_(top_R1).div_(temperature_R1).exp_().mul_(_ONE).round_().long()


def _find(mass_RK: Tensor, whole_R1: Tensor, uniform_R1: Tensor) -> Tensor:
    """The index where the cumulative mass exceeds the uniform number's share of `whole_R1`, int64 (R,)."""
    # A product of two float64 may round up to the whole.
    target_R1 = (uniform_R1 * whole_R1).long().minimum(whole_R1 - 1)
    return torch.searchsorted(mass_RK, target_R1, right=True).squeeze(1)
