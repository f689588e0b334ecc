"""A small checkpoint, and a quantised folder of it in every format."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest

from accessory.convert.quantize import quantize_checkpoint
from accessory.formats import FORMATS, Quant
from helpers import checkpoints as make
from helpers.checkpoints import Tensors
from helpers.random_models import canonical_from_hf, hf_mixtral
from helpers.sizes import CUTTABLE
from helpers.small_tokenizers import byte_level_folder

ARGS = CUTTABLE.replace(n_layers=1, vocab_size=352)
# format of the experts → format of attention
CHOICES = {"int8": "int8", "fp8": "none", "int4": "int8", "nf4": "nf4", "nf4-dq": "nf4-dq"}
QUANTS = {format: Quant.parse(format, attention) for format, attention in CHOICES.items()}
EXPERT = "layers.0.feed_forward.experts.3.w1.weight"
# Parametrises a test. A format is hardly wrong in base alone, so that only one of them is quick.
FORMAT_AND_IMPLEMENTATION = pytest.mark.parametrize(
    ("format", "implementation"),
    [
        *((format, "sparse") for format in FORMATS),
        ("int4", "base"),
        *(pytest.param(format, "base", marks=pytest.mark.slow) for format in FORMATS if format != "int4"),
    ],
)


def half_tensors() -> Tensors:
    """Weights in bfloat16, norms and routers in float32, as in quantised folders."""
    found = {n: t.bfloat16() for n, t in canonical_from_hf(hf_mixtral(ARGS)).items()}
    return found | {n: t.float() for n, t in found.items() if n.endswith(("norm.weight", "gate.weight"))}


def write_source(folder: Path, tensors: Tensors) -> Path:
    make.write_accessory(folder, tensors, "sparse", ARGS, world=2)
    return byte_level_folder(folder)


def write_quantized(source: Path, root: Path, formats: Iterable[str] = CHOICES) -> Path:
    """Writes the quantised folder `root`/<format> for each format."""
    for format in formats:
        quantize_checkpoint(source, root / format, QUANTS[format], search=False, progress=False)
    return root
