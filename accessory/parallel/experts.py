"""Experts spread over ranks: each rank has some whole experts, and (token, expert) pairs go there and back.

Every rank calls for its own tokens. The rest of the network is data-parallel.

Legend: T tokens, K experts a token, N = T·K pairs of this rank's tokens, M pairs that this rank computes, R ranks,
E experts, C = E/R of them here, D dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from accessory.nn.experts import StackedExperts
from accessory.ops.dense_products import sort_by_expert
from accessory.ops.experts import combine
from accessory.parallel.collectives import exchange_rows, stack_from_ranks
from accessory.parallel.mesh import Ranks


def compute_at_owners(
    experts: StackedExperts, x_TD: Tensor, weight_TK: Tensor, expert_TK: Tensor, *, ranks: Ranks, count: int
) -> Tensor:
    """Σ_k weight · expert(x), (T, D) fp32, of all `count` experts of a layer. `experts` are this rank's; they return
    the compute dtype.

    Rank r of `ranks` has the experts r·C … (r+1)·C - 1. Weights stay here: results are weighted after they came back.
    """
    R, C = ranks.size, count // ranks.size
    order_N, count_E = sort_by_expert(expert_TK, count)
    x_ND = x_TD.to(experts.products_in)[order_N // expert_TK.shape[1]]
    pairs_RRC = stack_from_ranks(count_E, ranks).view(R, R, C)  # from which rank, to which rank, for which expert
    sizes = pairs_RRC.sum(-1).tolist()  # the host waits for the GPU: a collective's sizes are the host's
    sent, received = sizes[ranks.rank], [row[ranks.rank] for row in sizes]
    M = sum(received)

    x_MD = exchange_rows(x_ND, sent, received, ranks)
    expert_M = torch.arange(C, device=x_TD.device).repeat(R)
    expert_M = expert_M.repeat_interleave(pairs_RRC[:, ranks.rank].flatten(), output_size=M)
    if not M:  # kernels want rows, and other ranks wait for this one's gradients
        x_MD, expert_M = torch.cat([x_MD, x_MD.new_zeros(1, x_MD.shape[1])]), expert_M.new_zeros(1)
    one_M1 = torch.ones(len(x_MD), 1, device=x_TD.device)
    y_MD = experts(x_MD, one_M1, expert_M[:, None])[:M]
    y_ND = exchange_rows(y_MD, received, sent, ranks)
    return combine(y_ND, order_N, weight_TK)
