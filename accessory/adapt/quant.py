"""Replace dense weights of a network by packed ones, as its `Quant` says."""

from __future__ import annotations

from torch import nn

from accessory.errors import ConfigError
from accessory.formats import Format, Quant, check_rows
from accessory.nn.decoder import Decoder
from accessory.nn.experts import StackedExperts
from accessory.nn.linear import Linear, PackedWeight


def quantize_skeleton(decoder: Decoder, quant: Quant) -> None:
    """Replace the weights that `quant` names by packed ones, in a network on the meta device that is already sharded.

    ConfigError if a row, or a rank's part of it, is not whole groups.
    """
    for name, module in decoder.named_modules():
        kinds = ("weight",) if isinstance(module, Linear) else ("w1", "w2", "w3")
        if not isinstance(module, Linear | StackedExperts):
            continue
        for kind in kinds:
            format = quant.format_of(f"{name}.{kind}")
            if format is not None:
                whole, _ = decoder.local_shards.get(f"{name}.{kind}", (getattr(module, kind).shape, ()))
                check_rows(f"{name}.{kind}", format, whole[-1])
                _replace(module, kind, format, f"{name}.{kind}")


def _replace(module: nn.Module, kind: str, format: Format, name: str) -> None:
    weight = getattr(module, kind)
    try:
        packed = PackedWeight(format, tuple(weight.shape), weight.device)
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from error
    delattr(module, kind)
    setattr(module, kind, packed)
