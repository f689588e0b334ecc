"""The formats of quantised weights: their names, bytes and groups, and the format of each part of a network.

`ops.quantized` rounds numbers to them. This file imports only the standard library, because the planner and
`accessory --help` use it without torch.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple, get_args

from accessory.config import ModelArgs
from accessory.errors import ConfigError
from accessory.limits import PAGE_SIZE

Format = Literal["int8", "fp8", "int4", "nf4", "nf4-dq"]
FORMATS: tuple[Format, ...] = get_args(Format)
# The key/value cache's numbers, where they are not those of the products.
CacheDtype = Literal["fp8"]
CACHE_DTYPES: tuple[CacheDtype, ...] = get_args(CacheDtype)
DEFAULT: Format = "nf4"  # what `quant=True` means, as in the original
PARTS = ("experts", "attention", "output")
DOUBLE_QUANTIZATION_BLOCK = 256  # how many of its scales nf4-dq scales together


class Storage(NamedTuple):
    """How many bytes a format takes in memory."""

    number: float  # bytes of one number
    group: int | None  # neighbouring numbers of a row that share a scale; None: the whole row shares one
    shared: int  # bytes of the scale and zero point of a group, or of the row


STORAGE: dict[Format, Storage] = {
    "int8": Storage(1, None, 4),
    "fp8": Storage(1, None, 4),
    "int4": Storage(0.5, 128, 3),
    "nf4": Storage(0.5, 64, 4),
    "nf4-dq": Storage(0.5, 64, 1),  # and the `nested_scales` of each row
}
# Formats that scale groups of a row, and how many numbers a group has; the others scale whole rows.
GROUP: dict[str, int] = {name: s.group for name, s in STORAGE.items() if s.group is not None}

# The tensors that may hold a quantised weight; each format has some of them.
PIECES = ("data", "scale", "zero", "nested", "offset")


def check_rows(name: str, format: str, columns: int) -> None:
    """Raise ConfigError if whole rows of `columns` numbers of the weight `name` cannot be quantised so."""
    group = GROUP.get(format, 1)
    if columns % group:
        raise ConfigError(
            f"{name}: its rows of {columns} numbers are no whole groups of {group}, which {format} scales together; "
            "int8 and fp8 scale rows"
        )


def check_cut(format: str, start: int, length: int) -> None:
    """Raise ConfigError if a cut of `length` numbers of a row, from `start` on, begins or ends inside a group."""
    group = GROUP.get(format)
    if group is not None and (start % group or length % group):
        raise ConfigError(
            f"quant: {format} scales {group} numbers together, so {length} of a row, from {start} on, cannot be held "
            "alone; use fewer ranks, or int8"
        )


def nested_scales(groups: int) -> int:
    """The number of fp32 scales of scales that nf4-dq stores for a row of `groups` groups.

    There is one for each run of groups that always lies inside one block, so that a part of a row has all it needs.
    """
    return groups // math.gcd(groups, DOUBLE_QUANTIZATION_BLOCK)


def packed_bytes(format: Format, rows: int, columns: int) -> int:
    """Bytes of a quantised weight (rows, columns). ConfigError if a row is not whole groups."""
    number, group, shared = STORAGE[format]
    if group and columns % group:
        raise ConfigError(
            f"quant: {format} scales {group} numbers together, but a row, or what a rank holds of it, has {columns}; "
            "use fewer ranks, or int8"
        )
    groups = columns // group if group else 1
    nested = 4 * (nested_scales(groups) + 1) if format == "nf4-dq" else 0  # plus the row's offset
    return int(rows * columns * number) + rows * (groups * shared + nested)


def page_bytes(layers: int, kv_heads: int, head_dim: int, number: int = 2, fp8: bool = False) -> int:
    """Bytes of a page of the key/value cache, of `kv_heads` heads in all layers. number: bytes of a number.

    In fp8, a number is one byte, and each key and each value has an fp32 scale.
    """
    vector = head_dim + 4 if fp8 else head_dim * number
    return 2 * layers * PAGE_SIZE * kv_heads * vector


@dataclass(frozen=True)
class Quant:
    """The format of each part of a network; None: 16 bits.

    Router, norms, embedding and adapters are never quantised: they are small, and rounding them changes the results.
    """

    experts: Format | None = None
    attention: Format | None = None
    output: Format | None = None

    @classmethod
    def parse(cls, quant: object, attention: object = None, output: object = None) -> Quant | None:
        """Parse `quant=`: False, None or "none" is None; True is nf4; a format applies to experts and attention.

        The output head is int8 if `quant` is int8; otherwise it stays in 16 bits. `attention` and `output` override the
        format of their part: a format, or "none". ConfigError for an unknown format.
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
        """For messages: "experts int4, attention int8"."""
        return ", ".join(f"{part} {format}" for part, format in self.to_dict().items() if format is not None)

    def format_of(self, name: str) -> Format | None:
        """The format of the canonical tensor or network parameter `name`; None if it is not quantised."""
        parts = name.split(".")
        if "experts" in parts and parts[-1] in ("weight", "w1", "w2", "w3") and "lora" not in name:
            return self.experts
        if "attention" in parts and parts[-1] == "weight" and parts[-2] in ("wq", "wk", "wv", "wo"):
            return self.attention
        return self.output if name == "output.weight" else None

    def nbytes(self, args: ModelArgs, bytes_16: int = 2) -> int:
        """Bytes of a network's weights: norms and routers in fp32, other dense numbers of `bytes_16` bytes each."""

        def size(format: Format | None, rows: int, columns: int) -> int:
            if format is None:
                return rows * columns * bytes_16
            check_rows("quant", format, columns)
            return packed_bytes(format, rows, columns)

        q, kv, D = args.n_heads * args.head_dim, args.n_kv_heads * args.head_dim, args.dim
        attention = size(self.attention, q + 2 * kv, D) + size(self.attention, D, q)
        expert = 2 * size(self.experts, args.hidden_dim, D) + size(self.experts, D, args.hidden_dim)
        fp32 = 4 * (D * args.moe.num_experts + 2 * D)
        layer = attention + args.moe.num_experts * expert + fp32
        return args.n_layers * layer + size(self.output, args.vocab_size, D) + args.vocab_size * D * bytes_16 + 4 * D


def _format(field: str, value: object) -> Format | None:
    if value is None or value is False or value == "none":
        return None
    if not isinstance(value, str) or value not in STORAGE:
        raise ConfigError(f"{field}: got {value!r}, but it must be one of {', '.join(STORAGE)}, or none")
    return value
