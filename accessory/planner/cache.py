"""The key/value cache: how many slots a sequence gets, and how many bytes they take."""

from __future__ import annotations

from accessory.limits import DECODE_PAIRS_GPU, GRAPH_LARGEST_BATCH, GRAPH_SMALLEST_EXTENT
from accessory.planner.setup import Inference, Setup


def cache_slots(setup: Setup, tokens: int) -> int:
    """Slots of a cache for so many tokens a sequence: a power of two where decoding runs as CUDA graphs."""
    assert isinstance(setup.task, Inference)
    pairs = setup.task.batch * setup.args.moe.num_experts_per_tok
    plain = setup.args.lora_rank < 1 and not setup.args.bias_tuning
    host_free = setup.implementation == "sparse" or (plain and pairs <= DECODE_PAIRS_GPU)
    if setup.tp > 1 or setup.task.batch > GRAPH_LARGEST_BATCH or not host_free:
        return tokens
    return max(GRAPH_SMALLEST_EXTENT, 1 << (tokens - 1).bit_length())


def cache_bytes(setup: Setup) -> int:
    """Keys and values of all layers, 16 bits, for the key/value heads of one rank."""
    assert isinstance(setup.task, Inference)
    args = setup.args
    slots = cache_slots(setup, setup.task.context)
    return 2 * 2 * args.n_layers * setup.task.batch * slots * setup.kv_heads * args.head_dim
