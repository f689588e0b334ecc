"""Packed weights in place of a network's dense ones, where its `Quant` wants them."""

from __future__ import annotations

from torch import nn

from accessory.errors import ConfigError
from accessory.formats import Format, Quant
from accessory.nn.decoder import Decoder
from accessory.nn.experts import StackedExperts
from accessory.nn.linear import Linear, PackedWeight


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
