"""Setups for tests of the planner, each in one line: a network that runs, or one that is finetuned."""

from __future__ import annotations

from typing import Any

from accessory.config import PRESETS, Implementation, ModelArgs
from accessory.planner.memory import Formats, Inference, Setup, Training
from helpers import sizes

BIG, TINY = PRESETS["8x7b"], PRESETS["tiny"]
BOTH: tuple[Implementation, ...] = ("base", "sparse")
CUTTABLE = sizes.CUTTABLE.replace(hidden_dim=1024, n_layers=3, vocab_size=320)


def running(
    args: ModelArgs = BIG,
    quant: str | None = None,
    *,
    implementation: Implementation = "sparse",
    tp: int = 1,
    views: int = 0,
    **task: Any,
) -> Setup:
    formats = Formats.of(quant)
    return Setup(args=args, task=Inference(**task), formats=formats, implementation=implementation, tp=tp, views=views)


def finetuning(
    args: ModelArgs = BIG,
    quant: str | None = None,
    *,
    implementation: Implementation = "sparse",
    tp: int = 1,
    dp: int = 1,
    views: int = 0,
    **task: Any,
) -> Setup:
    formats = Formats.of(quant)
    return Setup(
        args=args, task=Training(**task), formats=formats, implementation=implementation, tp=tp, dp=dp, views=views
    )
