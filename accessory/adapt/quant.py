"""Which weights of a network are quantised, and to what: all experts, attention, and by choice the output head.

Never the router, the norms, the embedding, or what finetuning puts beside weights: they are few, and what they lose
shows.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from accessory.config import ModelArgs
from accessory.errors import ConfigError
from accessory.nn.decoder import Decoder
from accessory.nn.experts import StackedExperts
from accessory.nn.linear import Linear, PackedWeight
from accessory.ops.quantized import FORMATS, Format

DEFAULT: Format = "nf4"  # what `quant=True` means, as in the original
PARTS = ("experts", "attention", "output")


@dataclass(frozen=True)
class Quant:
    """The format of each part of a network; None: 16 bits."""

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
        from accessory.ops.quantized import packed_shapes

        def size(format: Format | None, rows: int, columns: int) -> int:
            if format is None:
                return rows * columns * bytes_16
            total = 0
            for shape, dtype in packed_shapes(format, (rows, columns)).values():
                n = dtype.itemsize
                for extent in shape:
                    n *= extent
                total += n
            return total

        q, kv, D = args.n_heads * args.head_dim, args.n_kv_heads * args.head_dim, args.dim
        attention = size(self.attention, q + 2 * kv, D) + size(self.attention, D, q)
        expert = 2 * size(self.experts, args.hidden_dim, D) + size(self.experts, D, args.hidden_dim)
        fp32 = 4 * (D * args.moe.num_experts + 2 * D)
        layer = attention + args.moe.num_experts * expert + fp32
        return args.n_layers * layer + size(self.output, args.vocab_size, D) + args.vocab_size * D * bytes_16 + 4 * D


def _format(field: str, value: object) -> Format | None:
    if value is None or value is False or value == "none":
        return None
    if value not in FORMATS:
        raise ConfigError(f"{field}: got {value!r}, but it must be one of {', '.join(FORMATS)}, or none")
    return value


def quantize_skeleton(decoder: Decoder, quant: Quant) -> None:
    """Give an empty network (on the meta device, cut already) packed weights where `quant` wants them.

    ConfigError where a row, or what a rank holds of it, has no whole groups.
    """
    for name, module in decoder.named_modules():
        kinds = ("weight",) if isinstance(module, Linear) else ("w1", "w2", "w3")
        if not isinstance(module, Linear | StackedExperts):
            continue
        for kind in kinds:
            format = quant.format_of(f"{name}.{kind}")
            if format is not None:
                _replace(module, kind, format, f"{name}.{kind}")


def _replace(module: nn.Module, kind: str, format: Format, name: str) -> None:
    weight = getattr(module, kind)
    try:
        packed = PackedWeight(format, tuple(weight.shape), weight.device)
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from error
    delattr(module, kind)
    setattr(module, kind, packed)
