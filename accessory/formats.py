"""The formats of quantised weights: their names, bytes and groups, and which parts of a network have which.

`ops.quantized` says how numbers are rounded to them. Only the standard library is imported here: the planner and
`accessory --help` read this file without torch.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple, get_args

from accessory.config import ModelArgs
from accessory.errors import ConfigError

Format = Literal["int8", "fp8", "int4", "nf4", "nf4-dq"]
FORMATS: tuple[Format, ...] = get_args(Format)
DEFAULT: Format = "nf4"  # what `quant=True` means, as in the original
PARTS = ("experts", "attention", "output")
DOUBLE_QUANTIZATION_BLOCK = 256  # nf4-dq scales so many of its scales together


class Storage(NamedTuple):
    """How a format lies in memory, in bytes."""

    number: float  # of a number
    group: int | None  # neighbouring numbers of a row that share a scale; None: the whole row shares one
    shared: int  # of what a group, or the row, shares: its scale and its zero point


STORAGE: dict[Format, Storage] = {
    "int8": Storage(1, None, 4),
    "fp8": Storage(1, None, 4),
    "int4": Storage(0.5, 128, 3),
    "nf4": Storage(0.5, 64, 4),
    "nf4-dq": Storage(0.5, 64, 1),  # and what `nested_scales` of a row take
}
# Formats that scale groups of a row, and how many numbers a group has; the others scale whole rows.
GROUP: dict[str, int] = {name: s.group for name, s in STORAGE.items() if s.group is not None}


def check_cut(format: str, start: int, length: int) -> None:
    """ConfigError where `length` numbers of a row, from `start` on, begin or end inside a group."""
    group = GROUP.get(format)
    if group is not None and (start % group or length % group):
        raise ConfigError(
            f"quant: {format} scales {group} numbers together, so {length} of a row, from {start} on, cannot be held "
            "alone; use fewer ranks, or int8"
        )


def nested_scales(groups: int) -> int:
    """How many fp32 scales of scales nf4-dq keeps for a row of `groups` groups.

    One for each run of groups that is sure to lie inside one block, so that a cut row still has all that it needs.
    """
    return groups // math.gcd(groups, DOUBLE_QUANTIZATION_BLOCK)


def packed_bytes(format: Format, rows: int, columns: int) -> int:
    """Bytes of a quantised weight (rows, columns). ConfigError where a row has no whole groups."""
    number, group, shared = STORAGE[format]
    if group and columns % group:
        raise ConfigError(
            f"quant: {format} scales {group} numbers together, but a row, or what a rank holds of it, has {columns}; "
            "use fewer ranks, or int8"
        )
    groups = columns // group if group else 1
    nested = 4 * (nested_scales(groups) + 1) if format == "nf4-dq" else 0  # and the row's offset
    return int(rows * columns * number) + rows * (groups * shared + nested)


@dataclass(frozen=True)
class Quant:
    """The format of each part of a network; None: 16 bits.

    Never the router, the norms, the embedding or adapters: they are few, and rounding them shows.
    """

    experts: Format | None = None
    attention: Format | None = None
    output: Format | None = None

    @classmethod
    def parse(cls, quant: object, attention: object = None, output: object = None) -> Quant | None:
        """What `quant=` says: False, None or "none" is none; True is nf4; else a format, of experts and attention.

        The output head is int8 with int8 and else stays in 16 bits. `attention` and `output` choose apart: a format, or
        "none". ConfigError for an unknown format.
        """
        main = _format("quant", DEFAULT if quant is True else quant)
        if main is None and attention is None and output is None:
            return None
        chosen = cls(
            experts=main,
            attention=main if attention is None else _format("quant_attention", attention),
            output=("int8" if main == "int8" else None) if output is None else _format("quant_output", output),
        )
        return chosen if chosen != cls() else None

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Quant:
        unknown = set(values) - set(PARTS)
        if unknown:
            raise ConfigError(f"quantization: unknown key {sorted(unknown)[0]!r}; known are {', '.join(PARTS)}")
        return cls(**{part: _format(f"quantization.{part}", values.get(part)) for part in PARTS})

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        """For people: "experts int4, attention int8"."""
        return ", ".join(f"{part} {format}" for part, format in self.to_dict().items() if format is not None)

    def format_of(self, name: str) -> Format | None:
        """The format of the canonical tensor or network parameter `name`; None where it is not quantised."""
        parts = name.split(".")
        if "experts" in parts and parts[-1] in ("weight", "w1", "w2", "w3") and "lora" not in name:
            return self.experts
        if "attention" in parts and parts[-1] == "weight" and parts[-2] in ("wq", "wk", "wv", "wo"):
            return self.attention
        return self.output if name == "output.weight" else None

    def nbytes(self, args: ModelArgs, bytes_16: int = 2) -> int:
        """Bytes that the weights of a network of these sizes take, norms and routers in fp32."""

        def size(format: Format | None, rows: int, columns: int) -> int:
            return rows * columns * bytes_16 if format is None else packed_bytes(format, rows, columns)

        q, kv, D = args.n_heads * args.head_dim, args.n_kv_heads * args.head_dim, args.dim
        attention = size(self.attention, q + 2 * kv, D) + size(self.attention, D, q)
        expert = 2 * size(self.experts, args.hidden_dim, D) + size(self.experts, D, args.hidden_dim)
        fp32 = 4 * (D * args.moe.num_experts + 2 * D)
        layer = attention + args.moe.num_experts * expert + fp32
        return args.n_layers * layer + size(self.output, args.vocab_size, D) + args.vocab_size * D * bytes_16 + 4 * D


def _format(field: str, value: object) -> Format | None:
    if value is None or value is False or value == "none":
        return None
    if value not in STORAGE:
        raise ConfigError(f"{field}: got {value!r}, but it must be one of {', '.join(STORAGE)}, or none")
    return value
