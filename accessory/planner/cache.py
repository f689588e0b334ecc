"""The key/value cache: how many slots a sequence gets, and how many bytes they take."""

from __future__ import annotations

from accessory.limits import GRAPH_LARGEST_BATCH, GRAPH_SMALLEST_EXTENT
from accessory.ops.dispatch import DENSE, Op, Product, host_free
from accessory.planner.setup import Inference, Setup
from accessory.planner.weights import TensorGroup, tensor_groups


def cache_bytes(setup: Setup) -> int:
    """Keys and values of all layers, for the key/value heads of one rank."""
    assert isinstance(setup.task, Inference)
    args = setup.args
    slots = cache_slots(setup, setup.task.context)
    return 2 * setup.dense_bytes * args.n_layers * setup.task.batch * slots * setup.kv_heads * args.head_dim


def cache_slots(setup: Setup, tokens: int) -> int:
    """Slots for so many tokens a sequence: a power of two where decoding runs as CUDA graphs."""
    if not decodes_as_graphs(setup):
        return tokens
    return max(GRAPH_SMALLEST_EXTENT, 1 << (tokens - 1).bit_length())


def decodes_as_graphs(setup: Setup) -> bool:
    """Whether the engine replays decoding steps as CUDA graphs.

    `engine.graphs` and `nn.experts` ask `ops.dispatch` the same questions about tensors.
    """
    assert isinstance(setup.task, Inference)
    if setup.tp > 1 or setup.task.batch > GRAPH_LARGEST_BATCH:
        return False
    pairs, E = setup.task.batch * setup.args.moe.num_experts_per_tok, setup.args.moe.num_experts

    def product(op: Op, stack: TensorGroup) -> Product:
        dtype = "bfloat16" if setup.dense_bytes == 2 else "float32"
        return Product(op, stack.format or DENSE, pairs, E, stack.columns, stack.rows, setup.device, dtype=dtype)

    experts = [group for group in tensor_groups(setup) if ".experts." in group.name]
    stacks = [group for group in experts if not group.name.endswith(".bias")]
    return host_free(product("decode", experts[0]), [product("grouped", stack) for stack in stacks])
