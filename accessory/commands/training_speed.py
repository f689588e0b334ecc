"""The tokens per second of a planned finetune: as given, from an earlier run, or estimated from the GPU."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from accessory.config import ModelArgs
from accessory.errors import AccessoryError
from accessory.train.metrics import iterate_metrics

# Finetuning is assumed to reach this share of the speed of large matrix products, where nothing better is known.
EFFICIENCY = 0.35
_RECENT = 50  # records at the end of an earlier run; their median is its speed


@dataclass(frozen=True)
class Speed:
    """Tokens per second of all GPUs together, and the source of that number."""

    tokens_per_second: float
    source: str


def expected_speed(
    given: float | None, earlier_run: Path | None, args: ModelArgs | None, *, gpus: int, checkpointing: bool
) -> Speed | None:
    """The best known speed, in this order: `given`, the metrics of `earlier_run`, a measurement of this GPU.

    args: the network's sizes. gpus: the number of GPUs that would train. None where none of the three is known.
    """
    if given is not None:
        return Speed(given, "as given")
    measured = None if earlier_run is None else _speed_of_run(earlier_run)
    if measured is not None:
        return Speed(measured, f"the speed of the run in {earlier_run}")
    if args is not None and torch.cuda.is_available():
        return _speed_of_gpu(args, gpus, checkpointing)
    return None


def _speed_of_run(folder: Path) -> float | None:
    try:
        speeds = [r["tokens_per_s"] for r in iterate_metrics(folder) if r["kind"] == "train"][-_RECENT:]
    except (OSError, AccessoryError, KeyError):
        return None
    return float(statistics.median(speeds)) if speeds and statistics.median(speeds) > 0 else None


def _speed_of_gpu(args: ModelArgs, gpus: int, checkpointing: bool) -> Speed:
    """Estimate the speed: the rate of this GPU's matrix products, divided by the operations of a token."""
    rate = _matrix_rate("cuda", 8192)
    # Operations for each parameter that a token uses: forward 2, backward 4, and 2 more where activations are
    # recomputed.
    per_token = (8 if checkpointing else 6) * args.parameter_counts()[1]
    return Speed(
        EFFICIENCY * rate * gpus / per_token,
        f"supposing that {gpus} GPUs like this one, which multiplies at {rate / 1e12:.0f} TFLOP/s, keep "
        f"{EFFICIENCY:.0%} of that in a full finetune",
    )


def _matrix_rate(device: str, size: int) -> float:
    """Floating-point operations per second of bf16 matrix products."""
    a = torch.randn(size, size, dtype=torch.bfloat16, device=device)

    def run(times: int) -> float:
        begin = time.perf_counter()
        for _ in range(times):
            a @ a
        if device != "cpu":
            torch.cuda.synchronize()
        return time.perf_counter() - begin

    run(3)
    return 10 * 2 * size**3 / run(10)
