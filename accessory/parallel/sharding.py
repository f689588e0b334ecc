"""The sharding table: how each tensor is cut between ranks or shards, for both implementations.

Dimensions are those of the canonical tensors (experts one by one, w2 as (D, F)). Files, tensor-parallel loading, FSDP
and merging all use this table.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from accessory.config import Implementation, ModelArgs
from accessory.errors import ConfigError
from accessory.vision_config import ENCODER_PREFIXES, PROJECTION

# (names, dimension cut in base, dimension cut in sparse); None: the tensor is not cut. Column-parallel linears cut
# their rows, biases and lora_b; row-parallel linears cut their columns and lora_a. In base, a whole expert is on one
# rank.
_TABLE: tuple[tuple[re.Pattern[str], int | None, int | None], ...] = tuple(
    (re.compile(pattern), base, sparse)
    for pattern, base, sparse in (
        (r"tok_embeddings\.weight", 1, 1),
        (r"output\.(weight|bias|lora_b\.weight)", 0, 0),
        (r"output\.lora_a\.weight", None, None),
        (r"(.*_)?norm\.(weight|bias)", None, None),
        (r"attention\.w[qkv]\.(weight|bias|lora_b\.weight)", 0, 0),
        (r"attention\.w[qkv]\.lora_a\.weight", None, None),
        (r"attention\.wo\.(weight|lora_a\.weight)", 1, 1),
        (r"attention\.wo\.(bias|lora_b\.weight)", None, None),
        (r"feed_forward\.gate\..*", None, None),
        (r"feed_forward\.experts\.\d+\.w[13]\.(weight|bias|lora_b\.weight)", None, 0),
        (r"feed_forward\.experts\.\d+\.w[13]\.lora_a\.weight", None, None),
        (r"feed_forward\.experts\.\d+\.w2\.(weight|lora_a\.weight)", None, 1),
        (r"feed_forward\.experts\.\d+\.w2\.(bias|lora_b\.weight)", None, None),
        (PROJECTION.pattern, None, None),
        (rf"({'|'.join(map(re.escape, ENCODER_PREFIXES))}).*", None, None),
    )
)
_EXPERT = re.compile(r"feed_forward\.experts\.(\d+)\.")
_LAYER = re.compile(r"layers\.\d+\.")


@dataclass(frozen=True)
class Slice:
    """One rank's part of a tensor: `length` entries of `dim` from `start` on. `dim` None: the whole tensor."""

    dim: int | None
    start: int = 0
    length: int = 0


WHOLE = Slice(None)


def cut_dim(name: str, implementation: Implementation) -> int | None:
    """The dimension of canonical tensor `name` that is cut between ranks; None where it is not cut.

    Every rank has the whole of an uncut tensor, except for base experts: see `expert_of`. KeyError for a name that the
    table lacks.
    """
    base, sparse = _row(_LAYER.sub("", name, count=1))
    return base if implementation == "base" else sparse


@lru_cache(maxsize=4096)
def _row(name: str) -> tuple[int | None, int | None]:
    for pattern, base, sparse in _TABLE:
        if pattern.fullmatch(name):
            return base, sparse
    raise KeyError(name)


def expert_of(name: str) -> int | None:
    """The number of the expert that canonical tensor `name` belongs to; None for all other tensors."""
    match = _EXPERT.search(name)
    return int(match[1]) if match else None


def is_replicated(name: str, implementation: Implementation) -> bool:
    """Whether every rank has the same whole tensor."""
    whole = cut_dim(name, implementation) is None
    return whole and not (implementation == "base" and expert_of(name) is not None)


def rank_slice(
    name: str, shape: Sequence[int], implementation: Implementation, rank: int, world: int, num_experts: int
) -> Slice | None:
    """The part of canonical tensor `name` that `rank` of `world` has; None for another rank's expert.

    shape: of the whole tensor. Raises ConfigError with the tensor and both numbers where sizes do not divide.
    """
    expert = expert_of(name)
    if implementation == "base" and expert is not None:
        if num_experts % world:
            raise ConfigError(_indivisible("moe.num_experts", num_experts, world))
        return WHOLE if expert // (num_experts // world) == rank else None
    dim = cut_dim(name, implementation)
    if dim is None:
        return WHOLE
    if shape[dim] % world:
        raise ConfigError(_indivisible(f"{name}: dimension {dim}", shape[dim], world))
    length = shape[dim] // world
    return Slice(dim, rank * length, length)


_STACKED = re.compile(r"(.*feed_forward\.experts)\.(w[123])(?:_(bias|lora_a|lora_b))?")


def expert_tensor(parameter: str, expert: int) -> str | None:
    """The name of one expert's canonical tensor in a network's stacked `parameter`; None for any other parameter.

    "….experts.w1" stacks "….experts.0.w1.weight", …; "….experts.w1_lora_a" stacks "….experts.0.w1.lora_a.weight", ….
    """
    match = _STACKED.fullmatch(parameter)
    if match is None:
        return None
    kind = {None: "weight", "bias": "bias"}.get(match[3], f"{match[3]}.weight")
    return f"{match[1]}.{expert}.{match[2]}.{kind}"


AttentionMode = Literal["cut", "kv replicated", "whole"]
_ATTENTION = re.compile(r"(?:layers\.\d+\.)?attention\.w([qkvo])\.(weight|bias|lora_[ab]\.weight)")


def attention_mode(args: ModelArgs, world: int) -> AttentionMode:
    """How attention runs on `world` ranks.

    "cut": each rank has a part of all heads. "kv replicated": query heads are cut, and neighbouring ranks share a
    key/value head, because `world` is a multiple of the key/value heads. "whole": heads cannot be cut, so every rank
    computes all of them.
    """
    if args.n_heads % world:
        return "whole"
    if args.n_kv_heads % world == 0:
        return "cut"
    return "kv replicated" if world % args.n_kv_heads == 0 else "whole"


def rank_part(
    name: str, shape: Sequence[int], args: ModelArgs, implementation: Implementation, rank: int, world: int
) -> Slice | None:
    """The part of canonical tensor `name` that a running rank has: `rank_slice`, except that no head is ever split."""
    match = _ATTENTION.fullmatch(name)
    mode = attention_mode(args, world)
    if match and mode == "whole":
        return WHOLE
    if match and match[1] in "kv" and match[2] != "lora_a.weight" and mode == "kv replicated":
        return Slice(0, rank * args.n_kv_heads // world * args.head_dim, args.head_dim)
    return rank_slice(name, shape, implementation, rank, world, args.moe.num_experts)


def gradient_sharers(name: str, args: ModelArgs, implementation: Implementation, world: int) -> int:
    """How many neighbouring ranks have the same part of canonical tensor `name`, each with a part of its gradient.

    1: a rank's gradient is complete. Otherwise the gradients of those ranks must be summed. That holds for the uncut
    LoRA matrix and the uncut bias of a linear that is cut, and for key/value heads that several ranks' query heads use.
    """
    match = _ATTENTION.fullmatch(name)
    mode = attention_mode(args, world)
    if world == 1 or (match and mode == "whole"):
        return 1
    if match and match[1] in "kv" and match[2] != "lora_a.weight" and mode == "kv replicated":
        return world // args.n_kv_heads
    if PROJECTION.fullmatch(name):
        return 1  # image tokens enter the residual stream, whose gradient is complete on every rank
    is_adapter = name.endswith((".bias", ".lora_a.weight", ".lora_b.weight")) and ".gate." not in name
    return world if is_adapter and is_replicated(name, implementation) else 1


def check_ranks(args: ModelArgs, implementation: Implementation, world: int) -> None:
    """ConfigError with the field and both numbers if a network of these sizes cannot run on `world` ranks."""
    for field, size in _sizes(args, implementation).items():
        if size % world and "head_dim" not in field:
            raise ConfigError(_indivisible(field, size, world))


def _sizes(args: ModelArgs, implementation: Implementation) -> dict[str, int]:
    last = {"moe.num_experts": args.moe.num_experts} if implementation == "base" else {"hidden_dim": args.hidden_dim}
    return {
        **last,
        "n_kv_heads × head_dim": args.n_kv_heads * args.head_dim,
        "n_heads × head_dim": args.n_heads * args.head_dim,
        "dim": args.dim,
        "vocab_size": args.vocab_size,
    }


def check_world(args: ModelArgs, implementation: Implementation, world: int) -> None:
    """ConfigError with the field and both numbers if a network of these sizes cannot be cut into `world` parts."""
    if world < 1:
        raise ConfigError(f"shards: got {world}, but it must be at least 1")
    for field, size in _sizes(args, implementation).items():
        if size % world:
            raise ConfigError(_indivisible(field, size, world))


def largest_world(args: ModelArgs, implementation: Implementation, at_most: int = 8) -> int:
    """The largest number of equal parts, up to `at_most`, that a network of these sizes can be cut into."""
    common = math.gcd(*_sizes(args, implementation).values())
    return next(n for n in range(at_most, 0, -1) if common % n == 0)


def _indivisible(what: str, size: int, world: int) -> str:
    return f"{what}: got {size}, but it must be a multiple of the number of shards or ranks, {world}"
