"""Which tensors a model-parallel rank holds, which of them are trained, and how many bytes they take.

Legend: L layers, D dim, V vocabulary, E experts, F hidden dim of an expert.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from accessory.config import LORA_TARGETS
from accessory.formats import Format, Quant, check_rows, packed_bytes
from accessory.parallel.sharding import expert_of, rank_part
from accessory.planner.setup import Setup, Training
from accessory.vision_config import PROJECTION

# product: multiplied in 16 bits, and may be quantised. projection: of image features. fp32: norms and routers.
# adapter: LoRA's matrices and biases.
Role = Literal["product", "embedding", "projection", "fp32", "adapter"]


@dataclass(frozen=True)
class TensorGroup:
    """`count` tensors of one kind and shape (rows, columns), as one model-parallel rank holds them."""

    name: str  # the canonical name of one of them
    rows: int
    columns: int
    count: int
    role: Role
    format: Format | None = None  # None: not quantised
    in_layer: bool = True

    @property
    def numel(self) -> int:
        """Numbers that all of them hold together."""
        return self.rows * self.columns * self.count

    def nbytes(self, bytes_of_dense: int = 2) -> int:
        """Bytes of all of them while nothing is trained. ConfigError where a quantised row has no whole groups."""
        if self.format is not None:
            return packed_bytes(self.format, self.rows, self.columns) * self.count
        return self.numel * (4 if self.role == "fp32" else bytes_of_dense)


def tensor_groups(setup: Setup) -> Iterator[TensorGroup]:
    """All tensors that the first model-parallel rank holds. The other ranks hold as much."""
    args, quant, L = setup.args, setup.quant, setup.args.n_layers
    D, V, E, F = args.dim, args.vocab_size, args.moe.num_experts, args.hidden_dim
    q, kv = args.n_heads * args.head_dim, args.n_kv_heads * args.head_dim
    yield _group(setup, "tok_embeddings.weight", (V, D), 1, "embedding", in_layer=False)
    yield _group(setup, "norm.weight", (D,), 1, "fp32", in_layer=False)
    yield _group(setup, "layers.0.attention_norm.weight", (D,), 2 * L, "fp32")  # and ffn_norm
    yield _group(setup, "layers.0.feed_forward.gate.weight", (E, D), L, "fp32")
    attention, expert = "layers.0.attention", "layers.0.feed_forward.experts.0"
    linears: dict[str, tuple[tuple[int, int], int, Format | None]] = {
        f"{attention}.wq": ((q, D), L, quant.attention),
        f"{attention}.wk": ((kv, D), L, quant.attention),
        f"{attention}.wv": ((kv, D), L, quant.attention),
        f"{attention}.wo": ((D, q), L, quant.attention),
        f"{expert}.w1": ((F, D), L * setup.experts, quant.experts),
        f"{expert}.w2": ((D, F), L * setup.experts, quant.experts),
        f"{expert}.w3": ((F, D), L * setup.experts, quant.experts),
        "output": ((V, D), 1, quant.output),
        "layers.0.feed_forward.gate": ((E, D), L, None),
    }
    for name, (shape, count, format) in linears.items():
        kind, in_layer = name.rpartition(".")[2], name != "output"
        if kind != "gate":  # the router's weight is above: it is fp32
            yield _group(setup, f"{name}.weight", shape, count, "product", format, in_layer)
        if args.lora_rank > 0 and kind in args.lora_targets:
            for matrix, size in (("lora_a", (args.lora_rank, shape[1])), ("lora_b", (shape[0], args.lora_rank))):
                yield _group(setup, f"{name}.{matrix}.weight", size, count, "adapter", None, in_layer)
        if args.bias_tuning and kind in LORA_TARGETS:
            yield _group(setup, f"{name}.bias", shape[:1], count, "adapter", None, in_layer)
    if setup.views:
        yield from projection_groups(setup)


def projection_groups(setup: Setup) -> Iterator[TensorGroup]:
    """The projections that turn image features into embeddings, and the embeddings of an image's start and end."""
    for name, shape in setup.args.sees_with.projection_shapes(setup.args.dim).items():
        role: Role = "fp32" if "_proj.1." in name else "projection"  # each projection is a linear (0) and a norm (1)
        yield _group(setup, name, shape[-2:], 1, role, in_layer=False)


def _group(
    setup: Setup,
    name: str,
    shape: tuple[int, ...],
    count: int,
    role: Role,
    format: Format | None = None,
    in_layer: bool = True,
) -> TensorGroup:
    if format is not None:
        check_rows(name, format, shape[-1])
    part = rank_part(name, shape, setup.args, setup.implementation, 0, setup.tp)
    held = [part.length if part and part.dim == d else n for d, n in enumerate(shape)]
    rows, columns = held if len(held) == 2 else (1, held[0])
    return TensorGroup(name, rows, columns, count, role, format, in_layer)


def is_trained(group: TensorGroup, setup: Setup) -> bool:
    """Whether the setup's task trains these tensors; the same rule as `adapt.peft.trainable_rule`."""
    if not isinstance(setup.task, Training):
        return False
    if setup.task.kind == "full" or PROJECTION.fullmatch(group.name):
        return True
    if setup.task.kind == "mm_stage1":
        return False
    norm = group.name.endswith("norm.weight") and setup.args.norm_tuning
    return group.role == "adapter" or norm


def weight_bytes(setup: Setup) -> int:
    """All weights of a model-parallel rank, before data-parallel ranks share them out."""
    return sum(group_bytes(group, setup) for group in tensor_groups(setup))


def group_bytes(group: TensorGroup, setup: Setup) -> int:
    """The weights of one group: trained ones, norms and routers in fp32, the others dense or quantised."""
    if isinstance(setup.task, Training) and is_trained(group, setup):
        return group.numel * (4 if group.role == "fp32" else setup.task.parameter.weight)
    # Adapters of a quantised network are fp32, whether they are trained or only used.
    fp32 = group.role == "adapter" and setup.quantized
    return group.nbytes(4 if fp32 else setup.dense_bytes)


def rank_share(group: TensorGroup, nbytes: int, setup: Setup, task: Training) -> int:
    """What one data-parallel rank holds of `nbytes` that belong to a group.

    Norms and routers lie whole on every rank, and so do frozen weights under sdp.
    """
    cut, ranks = is_trained(group, setup) or task.data_parallel == "fsdp", replicas_of(group, setup)
    whole = group.role == "fp32" or ranks == 1 or not cut or not setup.fsdp
    return nbytes if whole else math.ceil(nbytes / ranks)


def replicas_of(group: TensorGroup, setup: Setup) -> int:
    """Data-parallel ranks that have these tensors. Ranks that hold the experts together have different ones."""
    return setup.dp // setup.ep if expert_of(group.name) is not None else setup.dp


def trained_parameters(setup: Setup) -> int:
    """How many parameters the task trains, in the whole network and not on one rank."""
    whole = uncut(setup)
    return sum(group.numel for group in tensor_groups(whole) if is_trained(group, whole))


def uncut(setup: Setup) -> Setup:
    """The same task on one rank, with nothing quantised: its tensors are whole."""
    return replace(setup, quant=Quant(), tp=1, dp=1, cp=1, ep=1)
