"""The experts' feed-forward, in two ways: grouped products over tokens sorted by expert, or, for a few tokens, one
(token, expert) pair at a time.

Legend: T tokens, K experts a token, N = T·K rows sorted by expert, E experts, D dim, F hidden dim, G = 2F.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from accessory.ops import dispatch
from accessory.ops.dense_products import sort_by_expert
from accessory.ops.linear import AdapterRows, Weight, grouped_linear, grouped_products, linear
from accessory.ops.quantized import Packed


def swiglu(x: Tensor, w1_FD: Tensor | Weight, w2_DF: Tensor | Weight, w3_FD: Tensor | Weight) -> Tensor:
    """One feed-forward network: w2 · (silu(w1 · x) ⊙ (w3 · x)), arXiv 2002.05202."""
    return linear(silu(linear(x, w1_FD)) * linear(x, w3_FD), w2_DF)


def silu(x_NF: Tensor) -> Tensor:
    """x · sigmoid(x).

    On a CPU torch takes several numbers at a time, the last ones singly, with another exp. Which are the last depends
    on the number of rows, so rows are computed one by one where their bits must not.
    """
    if x_NF.device.type == "cpu" and dispatch.fixed() and len(x_NF):
        return torch.stack([F.silu(x_F) for x_F in x_NF.unbind()])
    return F.silu(x_NF)


def grouped_experts(
    x_TD: Tensor,
    w1_EFD: Tensor | Weight,
    w2_EDF: Tensor | Weight,
    w3_EFD: Tensor | Weight,
    weight_TK: Tensor,
    expert_TK: Tensor,
    first: int | None = None,
    adapters: AdapterRows | None = None,
) -> Tensor:
    """Σ_k weight_TK · swiglu of expert_TK, (T, D) fp32; the products are in x's dtype.

    F may be a slice of the hidden dimension. The result is then this slice's part of the sum. first: the weights are
    those of the experts `first … first + E - 1`, and pairs of other experts add nothing; None: they are all experts'.
    adapters: each token's adapter, where the weights have several.
    """
    E = _stack(w1_EFD).shape[0]
    order_N, count_E = sort_by_expert(expert_TK, E, first or 0)
    token_N = order_N // expert_TK.shape[1]
    rows = None if adapters is None else adapters.of_pairs(token_N, expert_TK.flatten()[order_N] - (first or 0), E)
    x_ND = x_TD[token_N]
    h_NF = gate(grouped_linear(x_ND, w1_EFD, count_E, rows), grouped_linear(x_ND, w3_EFD, count_E, rows))
    y_ND = grouped_linear(h_NF, w2_EDF, count_E, rows)
    return combine(y_ND, order_N, weight_TK, None if first is None else count_E.sum())


def gate(gate_NF: Tensor, up_NF: Tensor) -> Tensor:
    """silu(gate) ⊙ up."""
    kernel = dispatch.find(dispatch.over_tokens("gate", gate_NF))
    return silu(gate_NF) * up_NF if kernel is None else kernel.load()(gate_NF, up_NF)


def gate_backward(gate_NF: Tensor, up_NF: Tensor, dh_NF: Tensor, weight_N: Tensor, writes_h: bool) -> Tensor:
    """The gradients of weight · silu(gate) ⊙ up, where dh is that of silu(gate) ⊙ up alone: those of gate and up take
    their places, and with `writes_h` weight · h takes the place of dh.

    gate, up and dh are contiguous. Returns the gradients of the weights, (N,) fp32.
    """
    kernel = dispatch.find(dispatch.over_tokens("gate_backward", gate_NF))
    if kernel is not None:
        return kernel.load()(gate_NF, up_NF, dh_NF, weight_N, writes_h)
    g_NF, u_NF, weight_N1 = gate_NF.float(), up_NF.float(), weight_N.float()[:, None]
    sigmoid_NF = g_NF.sigmoid()
    silu_NF = g_NF * sigmoid_NF
    dweight_N = (dh_NF.float() * silu_NF * u_NF).sum(-1)
    d_NF = dh_NF.float() * weight_N1
    if writes_h:
        torch.mul(weight_N1 * silu_NF, u_NF, out=dh_NF)
    torch.mul(d_NF * u_NF * sigmoid_NF, 1 + g_NF * (1 - sigmoid_NF), out=gate_NF)
    torch.mul(d_NF, silu_NF, out=up_NF)
    return dweight_N


def combine(y_ND: Tensor, order_N: Tensor, weight_TK: Tensor, rows: Tensor | None = None) -> Tensor:
    """Undo the sort and sum each token's experts by weight: (T, D) fp32. Without atomics, so the same input gives the
    same bits.

    rows: how many rows of y have a product; None: all. The others may hold anything, NaN too, and add nothing. So do
    pairs that `order_N` leaves out.
    """
    T, K = weight_TK.shape
    places_N = torch.arange(len(order_N), device=order_N.device)
    inverse_N = order_N.new_full((T * K,), len(order_N)).scatter_(0, order_N, places_N)
    kernel = dispatch.find(dispatch.over_tokens("combine", y_ND))
    if kernel is not None:
        return kernel.load()(y_ND, inverse_N, weight_TK, inverse_N.new_full((), len(y_ND)) if rows is None else rows)
    if rows is not None:
        y_ND = F.pad(y_ND, (0, 0, 0, 1))  # a row for the pairs that `order_N` leaves out
    part_TKD = y_ND[inverse_N].view(T, K, -1).float() * weight_TK[..., None]
    if rows is not None:
        part_TKD = part_TKD.where((inverse_N < rows).view(T, K, 1), 0.0)
    first_TD, *others = part_TKD.unbind(1)
    return sum(others, start=first_TD)  # always in the order of k


def _stack(weight: Tensor | Packed | Weight) -> Tensor | Packed:
    return weight.weight if isinstance(weight, Weight) else weight


def decode_kernel(
    x_TD: Tensor, weights: tuple[Weight, Weight, Weight], pairs: int, *, fused: bool
) -> dispatch.Kernel | None:
    """The kernel that computes `pairs` (token, expert) pairs and reads the weights w1, w2 and w3 in place.

    None means: use grouped products instead. fused: whether w1 and w3 are in one tensor, and all weights plain.
    """
    w1_EFD = weights[0]
    if _beside_decoding(weights) or _need_casts(x_TD, weights):
        return None
    plain = all(w.plain for w in weights)
    return dispatch.find(dispatch.product("decode", x_TD, w1_EFD.weight, pairs, fused=fused, plain=plain))


def runs_host_free(x_TD: Tensor, w1_EFD: Weight, w2_EDF: Weight, w3_EFD: Weight, pairs: int) -> bool:
    """Whether a step of `pairs` pairs runs without the host learning the routing. A CUDA graph needs that."""
    weights = (w1_EFD, w2_EDF, w3_EFD)
    plain = all(w.plain for w in weights)
    beside = _beside_decoding(weights) or _need_casts(x_TD, weights)
    decode = None if beside else dispatch.product("decode", x_TD, w1_EFD.weight, pairs, plain=plain)
    return dispatch.host_free(decode, [p for w in weights for p in grouped_products(x_TD, w, pairs)])


def _beside_decoding(weights: tuple[Weight, ...]) -> bool:
    """Whether something stands beside the weights that kernels for pairs do not add: biases of several adapters."""
    return any(w.bias_SO is not None for w in weights)


def _need_casts(x_TD: Tensor, weights: tuple[Weight, ...]) -> bool:
    """Whether dense weights have another dtype than x, as those that are trained have: the kernels would not cast."""
    return any(isinstance(w.weight, Tensor) and w.weight.dtype != x_TD.dtype for w in weights)


def decode_experts(
    kernel: dispatch.Kernel,
    x_TD: Tensor,
    w1_EFD: Weight,
    w2_EDF: Weight,
    w3_EFD: Weight,
    weight_TK: Tensor,
    expert_TK: Tensor,
    *,
    first: int = 0,
    w13_EGD: Tensor | Packed | None = None,
    adapters: AdapterRows | None = None,
) -> Tensor:
    """`grouped_experts` pair by pair, with a `kernel` of `decode_kernel`: (T, D) fp32.

    The weights are those of the experts `first … first + E - 1`; pairs of other experts add nothing. w13_EGD: w1 above
    w3, where they are fused.
    """
    if kernel.fused:
        assert all(w.plain for w in (w1_EFD, w2_EDF, w3_EFD)), "this kernel reads the weights alone"
        return kernel.load()(x_TD, w13_EGD, w2_EDF.weight, weight_TK, expert_TK, first)
    adapter_T = None if adapters is None else adapters.number_N
    return kernel.load()(x_TD, w1_EFD, w2_EDF, w3_EFD, weight_TK, expert_TK, first, adapter_T)


def decode_experts_fused(
    x_TD: Tensor,
    w13_EGD: Tensor | Packed,
    w2_EDF: Tensor | Packed,
    weight_TK: Tensor,
    expert_TK: Tensor,
    first: int = 0,
) -> Tensor:
    """A product for each pair. One product computes w1 and w3, because each product on a CPU starts a pool of threads.

    What is not a product is done for all of a token's experts at once: for one row, an operation takes as long as its
    launch.
    """
    rows = []
    for t, experts in enumerate(expert_TK.tolist()):
        x_D, weight_K1 = x_TD[t], weight_TK[t].unsqueeze(-1)
        local = [e - first for e in experts]
        held = [k for k, e in enumerate(local) if 0 <= e < len(w2_EDF)]
        if not held:
            rows.append(weight_TK.new_zeros(1, x_TD.shape[1]))
            continue
        if len(held) < len(local):
            local, weight_K1 = [local[k] for k in held], weight_K1[held]
        gate_KF, up_KF = torch.stack([linear(x_D, w13_EGD[e]) for e in local]).chunk(2, -1)
        h_KF = F.silu(gate_KF).mul_(up_KF)
        y_KD = torch.stack([linear(h_F, w2_EDF[e]) for e, h_F in zip(local, h_KF.unbind(), strict=True)])
        # Each product is weighted and rounded, in fp32, before it is summed. So two experts give the same bits on one
        # rank as on two ranks.
        rows.append((y_KD * weight_K1).sum(0, keepdim=True))
    return rows[0] if len(rows) == 1 else torch.cat(rows)
