"""How many bytes a network takes on one of several GPUs, and beside it: weights, cache, host memory, disk.

Plain arithmetic on `ModelArgs`, for `accessory plan`: nothing is loaded, and torch is not needed. `peaks` adds what
passes need. GB are 10⁹ bytes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Literal

from accessory.config import LORA_TARGETS, Implementation, ModelArgs
from accessory.errors import ConfigError
from accessory.parallel.sharding import attention_mode, check_ranks, rank_part
from accessory.planner.encoders import encoder_numbers
from accessory.vision_config import PROJECTION

# A process with Python, torch and CUDA; blocks on the way from files; what a rank holds while it writes a state.
HOST_PROCESS, HOST_BLOCKS, HOST_STATE = 2_500_000_000, 300_000_000, 2_000_000_000
# Decoding graphs (`engine.graphs`): the smallest cache, the largest batch, the pairs that kernels read in place.
SMALLEST_CACHE, LARGEST_GRAPH, FEW_PAIRS = 256, 64, 8

# Bytes a number, numbers that share a scale (0: a row), bytes of what they share: see `ops.quantized`.
PACKED: dict[str, tuple[float, int, int]] = {
    "int8": (1, 0, 4),
    "fp8": (1, 0, 4),
    "nf4": (0.5, 64, 4),
    "int4": (0.5, 128, 3),
    "nf4-dq": (0.5, 64, 1),
}
DOUBLED = 256  # scales that nf4-dq scales again, 4 bytes for as many as are sure to be together, and 4 a row


def packed_bytes(format: str, rows: int, columns: int) -> int:
    """Bytes of a quantised weight. ConfigError where a row has no whole groups."""
    number, group, shared = PACKED[format]
    if group and columns % group:
        raise ConfigError(
            f"quant: {format} scales {group} numbers together, but a row, or what a rank holds of it, has {columns}; "
            "use fewer ranks, or int8"
        )
    groups = columns // group if group else 1
    more = 4 * (groups // math.gcd(groups, DOUBLED) + 1) if format == "nf4-dq" else 0
    return int(rows * columns * number) + rows * (groups * shared + more)


@dataclass(frozen=True)
class Formats:
    """Which parts of a network are quantised, and how; None: 16 bits. `adapt.quant.Quant` without torch."""

    experts: str | None = None
    attention: str | None = None
    output: str | None = None

    @classmethod
    def of(cls, quant: str | None, attention: str | None = None, output: str | None = None) -> Formats:
        """As `--quant`, `--quant-attention` and `--quant-output` say; "none" is none."""
        main = None if quant == "none" else quant
        return cls(
            experts=main,
            attention=main if attention is None else None if attention == "none" else attention,
            output=("int8" if main == "int8" else None) if output is None else None if output == "none" else output,
        )

    @property
    def any(self) -> bool:
        return self != Formats()

    def __str__(self) -> str:
        if not self.any:
            return "bf16"
        if self == Formats.of(self.experts):
            return str(self.experts)
        return ", ".join(f"{part} {getattr(self, part) or 'bf16'}" for part in ("experts", "attention", "output"))


@dataclass(frozen=True)
class State:
    """Bytes that every trained number costs: itself, its gradient, AdamW's two moments, and its copy for products."""

    weight: int = 4
    gradient: int = 4
    moments: int = 8
    copy: int = 2


@dataclass(frozen=True, kw_only=True)
class Inference:
    """`context` tokens of prompt and answer in `batch` sequences at once, prompts of `prompt` tokens."""

    batch: int = 1
    context: int = 4096
    prompt: int | None = None  # None: as long as the context allows


# "lora" over a quantised base is QLoRA; "mm_stage1" trains what makes words of images, and nothing else.
Kind = Literal["full", "lora", "mm_stage1"]


@dataclass(frozen=True, kw_only=True)
class Training:
    """A finetuning step; the defaults are `FinetuneConfig`'s."""

    kind: Kind = "full"
    batch_size: int = 4
    max_words: int = 4096
    accum_iter: int = 1
    packing: bool = True
    checkpointing: bool = False
    data_parallel: Literal["sdp", "fsdp"] = "sdp"
    state: State = field(default_factory=State)


@dataclass(frozen=True, kw_only=True)
class Setup:
    """A network, how it is cut over GPUs, and what it is to do. LoRA's rank and targets are those of `args`.

    views: of an image, one in every sequence; training, as many as fit into its rows. 0: text alone, no encoders.
    """

    args: ModelArgs
    task: Inference | Training
    implementation: Implementation = "sparse"
    formats: Formats = field(default_factory=Formats)
    tp: int = 1
    dp: int = 1
    views: int = 0

    def __post_init__(self) -> None:
        check_ranks(self.args, self.implementation, self.tp)

    @property
    def gpus(self) -> int:
        return self.tp * self.dp

    @property
    def image_tokens(self) -> int:
        """Positions that an image takes."""
        return self.args.sees_with.image_tokens(self.views) if self.views else 0

    @property
    def images(self) -> int:
        """Images at once: at most, where rows are packed."""
        if not self.views:
            return 0
        if isinstance(self.task, Inference):
            return self.task.batch
        fitting = self.task.max_words // self.image_tokens if self.task.packing else 1
        return self.task.batch_size * max(1, fitting)


# --------------------------------------------------------------------------- what a rank holds


Role = Literal["product", "embedding", "projection", "fp32", "adapter"]


@dataclass(frozen=True)
class Piece:
    """All tensors of one kind that a model-parallel rank holds: `count` of (rows, columns)."""

    name: str
    rows: int
    columns: int
    count: int
    role: Role
    format: str | None = None
    in_layer: bool = True

    @property
    def numbers(self) -> int:
        return self.rows * self.columns * self.count

    def nbytes(self, bytes_of_dense: int = 2) -> int:
        if self.format is not None:
            return packed_bytes(self.format, self.rows, self.columns) * self.count
        return self.numbers * (4 if self.role == "fp32" else bytes_of_dense)


def pieces(setup: Setup) -> Iterator[Piece]:
    """Everything that the first model-parallel rank holds; the others hold as much."""
    args, formats, L = setup.args, setup.formats, setup.args.n_layers
    D, V, E, F = args.dim, args.vocab_size, args.moe.num_experts, args.hidden_dim
    q, kv = args.n_heads * args.head_dim, args.n_kv_heads * args.head_dim
    held_experts = E // setup.tp if setup.implementation == "base" else E
    yield _piece(setup, "tok_embeddings.weight", (V, D), 1, "embedding", in_layer=False)
    yield _piece(setup, "norm.weight", (D,), 1, "fp32", in_layer=False)
    yield _piece(setup, "layers.0.attention_norm.weight", (D,), 2 * L, "fp32")
    yield _piece(setup, "layers.0.feed_forward.gate.weight", (E, D), L, "fp32")
    linears = {
        **{f"layers.0.attention.{w}": ((n, D), L, formats.attention) for w, n in (("wq", q), ("wk", kv), ("wv", kv))},
        "layers.0.attention.wo": ((D, q), L, formats.attention),
        **{
            f"layers.0.feed_forward.experts.0.{w}": (shape, L * held_experts, formats.experts)
            for w, shape in (("w1", (F, D)), ("w2", (D, F)), ("w3", (F, D)))
        },
        "output": ((V, D), 1, formats.output),
        "layers.0.feed_forward.gate": ((E, D), L, None),
    }
    for name, (shape, count, format) in linears.items():
        kind, in_layer = name.rpartition(".")[2], name != "output"
        if kind != "gate":
            yield _piece(setup, f"{name}.weight", shape, count, "product", format, in_layer)
        if args.lora_rank > 0 and kind in args.lora_targets:
            for what, size in (("lora_a", (args.lora_rank, shape[1])), ("lora_b", (shape[0], args.lora_rank))):
                yield _piece(setup, f"{name}.{what}.weight", size, count, "adapter", None, in_layer)
        if args.bias_tuning and kind in LORA_TARGETS:
            yield _piece(setup, f"{name}.bias", shape[:1], count, "adapter", None, in_layer)
    if setup.views:
        yield from _projections(setup)


def _projections(setup: Setup) -> Iterator[Piece]:
    """What makes words of images."""
    for name, shape in setup.args.sees_with.projection_shapes(setup.args.dim).items():
        role: Role = "fp32" if "_proj.1." in name else "projection"  # LayerNorms
        yield _piece(setup, name, shape[-2:], 1, role, in_layer=False)


def _piece(
    setup: Setup,
    name: str,
    shape: tuple[int, ...],
    count: int,
    role: Role,
    format: str | None = None,
    in_layer: bool = True,
) -> Piece:
    part = rank_part(name, shape, setup.args, setup.implementation, 0, setup.tp)
    held = [part.length if part and part.dim == d else n for d, n in enumerate(shape)]
    rows, columns = held if len(held) == 2 else (1, held[0])
    return Piece(name, rows, columns, count, role, format, in_layer)


def is_trained(piece: Piece, setup: Setup) -> bool:
    """What full finetuning trains, and what LoRA and stage 1 do: the rule of `adapt.peft.trainable_rule`."""
    if not isinstance(setup.task, Training):
        return False
    if setup.task.kind == "full" or PROJECTION.fullmatch(piece.name):
        return True
    if setup.task.kind == "mm_stage1":
        return False
    norm = piece.name.endswith("norm.weight") and setup.args.norm_tuning
    return piece.role == "adapter" or norm


def weight_bytes(setup: Setup) -> int:
    """Of a model-parallel rank, before data parallelism: trained numbers in fp32, norms and routers too."""
    return sum(piece_weight(p, setup) for p in pieces(setup))


def piece_weight(piece: Piece, setup: Setup) -> int:
    if isinstance(setup.task, Training) and is_trained(piece, setup):
        return piece.numbers * (4 if piece.role == "fp32" else setup.task.state.weight)
    beside_packed = piece.role == "adapter" and setup.formats.any
    return piece.nbytes(4 if beside_packed else 2)


def trained_numbers(setup: Setup) -> int:
    """Of the whole network."""
    whole = replace(setup, formats=Formats(), tp=1, dp=1)
    return sum(p.numbers for p in pieces(whole) if is_trained(p, whole))


def cache_slots(setup: Setup, tokens: int) -> int:
    """Slots of a cache for so many tokens a sequence: a power of two where decoding runs as CUDA graphs."""
    assert isinstance(setup.task, Inference)
    pairs = setup.task.batch * setup.args.moe.num_experts_per_tok
    plain = setup.args.lora_rank < 1 and not setup.args.bias_tuning
    host_free = setup.implementation == "sparse" or (plain and pairs <= FEW_PAIRS)
    if setup.tp > 1 or setup.task.batch > LARGEST_GRAPH or not host_free:
        return tokens
    return max(SMALLEST_CACHE, 1 << (tokens - 1).bit_length())


def cache_bytes(setup: Setup) -> int:
    """Keys and values, 16 bits, of one rank's key/value heads."""
    assert isinstance(setup.task, Inference)
    args = setup.args
    heads = {"cut": args.n_kv_heads // setup.tp, "kv replicated": 1, "whole": args.n_kv_heads}
    held = heads[attention_mode(args, setup.tp)]
    slots = cache_slots(setup, setup.task.context)
    return 2 * 2 * args.n_layers * setup.task.batch * slots * held * args.head_dim


# --------------------------------------------------------------------------- beside the GPU


def host_bytes(setup: Setup, per_machine: int = 8) -> int:
    """Of one machine while the model is loaded, or a state written; pages of files, which the system takes back, not
    counted."""
    own = HOST_PROCESS + max(HOST_BLOCKS, HOST_STATE if isinstance(setup.task, Training) else 0)
    return min(setup.gpus, per_machine) * own


def disk_bytes(setup: Setup, model: int | None = None, keep: int = 2) -> dict[str, int]:
    """The model's files (`model`, or 16 bits a number, image encoders among them), and of a finetune its states, one
    more than it keeps, and what it leaves: a whole model in 16 bits, or in fp32 what alone was trained."""
    total = setup.args.parameter_counts()[0]
    if setup.views:
        total += sum(map(encoder_numbers, setup.args.sees_with.all))
        total += sum(piece.numbers for piece in _projections(setup))
    out = {"model": model if model is not None else 2 * total}
    if isinstance(setup.task, Training):
        trained = trained_numbers(setup)
        out["states"] = (keep + 1) * 12 * trained
        out["result"] = 2 * total if setup.task.kind == "full" else 4 * trained
    return out
