"""Floors: the bytes that a piece of work must move and the operations that it must do. Standard library only.

Divided by the card's rates, they give the least time that the work can take. Routing is taken to be uniform.
"""

from __future__ import annotations

import random

from accessory.config import ModelArgs
from accessory.formats import Quant


def experts_met(args: ModelArgs, tokens: int) -> float:
    """How many different experts of a layer so many tokens meet, on average."""
    E, K = args.moe.num_experts, args.moe.num_experts_per_tok
    return E * (1 - (1 - K / E) ** tokens)


def busiest_share(args: ModelArgs, tokens: int, ranks: int) -> float:
    """The largest number of experts that any of `ranks` ranks holds of those met, on average over random routings."""
    E, K = args.moe.num_experts, args.moe.num_experts_per_tok
    draw, total, rounds = random.Random(0), 0, 500
    for _ in range(rounds):
        met = {e for _ in range(min(tokens, 8 * E)) for e in draw.sample(range(E), K)}
        total += max(sum(e * ranks // E == rank for e in met) for rank in range(ranks))
    return total / rounds


def weight_bytes(args: ModelArgs, quant: Quant | None, experts: float, number: int = 2) -> float:
    """Bytes of weights that a step reads where it visits `experts` experts of each layer; of the embedding none.

    number: bytes of a number that is not quantised.
    """
    quant, moe = quant or Quant(), args.moe
    one_more = args.replace(moe={"num_experts": moe.num_experts + 1, "num_experts_per_tok": moe.num_experts_per_tok})
    whole = quant.nbytes(args, number)
    per_expert = quant.nbytes(one_more, number) - whole  # in all layers together
    return whole - args.vocab_size * args.dim * number - (moe.num_experts - experts) * per_expert


def decode_bytes(
    args: ModelArgs,
    quant: Quant | None,
    batch: int,
    context: float,
    *,
    ranks: int = 1,
    base: bool = False,
    number: int = 2,
) -> float:
    """Bytes that a rank reads in a decoding step: weights, keys and values. In base the busiest rank counts."""
    met = experts_met(args, batch)
    beside = weight_bytes(args, quant, 0, number)
    experts = weight_bytes(args, quant, met, number) - beside
    mine = busiest_share(args, batch, ranks) / met if base and ranks > 1 else 1 / ranks
    keys = 2 * number * args.n_layers * args.n_kv_heads * args.head_dim * context * batch
    return (beside + keys) / ranks + experts * mine


def decode_operations(args: ModelArgs, batch: int, context: float) -> float:
    attention = 4 * args.n_layers * args.n_heads * args.head_dim * context * batch
    return 2 * batch * products_a_token(args) + attention


def products_a_token(args: ModelArgs) -> int:
    """The numbers that a token is multiplied with, those of the head included."""
    return args.parameter_counts()[1] - (2 * args.n_layers + 1) * args.dim  # norms are no products


def prompt_operations(args: ModelArgs, batch: int, tokens: int, *, every_logit: bool) -> float:
    """Operations of a forward pass over `batch` rows: products and causal attention.

    every_logit: whether the head computes all places, as in training, or a row's last one.
    """
    head = args.vocab_size * args.dim
    products = 2 * (products_a_token(args) - head) * batch * tokens
    logits = 2 * head * batch * (tokens if every_logit else 1)
    return products + logits + batch * args.n_layers * 2 * tokens**2 * args.n_heads * args.head_dim


def layer_bytes(args: ModelArgs, format: str, met: float, number: int = 2) -> float:
    """Bytes of the `met` experts of one layer."""
    one = args.replace(n_layers=1)
    quant = Quant.parse(format)
    return weight_bytes(one, quant, met, number) - weight_bytes(one, quant, 0, number)


def layer_operations(args: ModelArgs, tokens: int) -> int:
    """Operations of the feed-forward of one layer."""
    return 2 * tokens * args.moe.num_experts_per_tok * 3 * args.dim * args.hidden_dim
