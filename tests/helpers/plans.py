"""Setups for tests of the planner, each made in one line: a network that runs, or one that is finetuned."""

from __future__ import annotations

from typing import Any

from accessory.config import PRESETS, Implementation, ModelArgs
from accessory.formats import Quant
from accessory.planner.setup import Inference, Setup, Training
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
    parts = Quant.parse(quant) or Quant()
    return Setup(args=args, task=Inference(**task), quant=parts, implementation=implementation, tp=tp, views=views)


def finetuning(
    args: ModelArgs = BIG,
    quant: str | None = None,
    *,
    implementation: Implementation = "sparse",
    tp: int = 1,
    dp: int = 1,
    cp: int = 1,
    ep: int = 1,
    views: int = 0,
    **task: Any,
) -> Setup:
    parts = Quant.parse(quant) or Quant()
    return Setup(
        args=args,
        task=Training(**task),
        quant=parts,
        implementation=implementation,
        tp=tp,
        dp=dp,
        cp=cp,
        ep=ep,
        views=views,
    )
