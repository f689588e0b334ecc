"""What says that a folder is quantised: the formats in its config.json, and the names of its tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from accessory.config import read_json
from accessory.errors import ConfigError
from accessory.formats import PIECES, Quant

VERSION = 1


def declared_quant(folder: Path) -> Quant | None:
    """The formats of quantised weights in the folder's config.json; None if it has no "quantization" of our kind.

    ConfigError for an unknown version, and for unknown formats.
    """
    config = folder / "config.json"
    said = read_json(config).get("quantization") if config.is_file() else None
    if not isinstance(said, dict) or "format_version" not in said:
        return None
    values = dict(said)
    version = values.pop("format_version")
    if version != VERSION:
        raise ConfigError(
            f"config.json: quantization.format_version: got {version!r}, but only {VERSION} is known here"
        )
    try:
        return Quant.from_dict(values)
    except ConfigError as error:
        raise ConfigError(f"config.json: {error}") from error


def declaration(quant: Quant) -> dict[str, Any]:
    """The value of "quantization" in config.json."""
    return {"format_version": VERSION, **quant.to_dict()}


def is_quantized_piece(name: str) -> bool:
    """Whether a raw name belongs to a piece of a quantised weight."""
    weight, _, piece = name.rpartition(".")
    return piece in PIECES and weight.endswith(".weight") and weight.startswith(("layers.", "output."))
