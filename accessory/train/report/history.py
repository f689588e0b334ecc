"""What `metrics.jsonl` says of a run, as the columns that a report is made of."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from accessory.errors import InputError
from accessory.train.metrics import METRICS_FILE, iterate_metrics
from accessory.train.report.layer_bins import Floats, LayerBins

SCALARS = (
    "epoch",
    "samples",
    "tokens",
    "loss",
    "balance",
    "z",
    "lr",
    "grad_norm",
    "tokens_per_s",
    "step_s",
    "memory_gb",
)
END = 50  # steps that the table of shares is a mean of


@dataclass(frozen=True)
class History:
    """`step` (N,) and `values[name]` (N,) of training, NaN where there is none; `evals` (M, 2) of step and loss."""

    step: Floats
    values: dict[str, Floats]
    evals: Floats
    layers: LayerBins
    end: Floats | None  # (layers, experts + 3): shares, balance, entropy, largest share; mean over the last steps
    end_steps: int

    @property
    def failed(self) -> Floats:
        """The steps whose loss is not finite."""
        return self.step[~np.isfinite(self.values["loss"])]


def read_history(folder: Path) -> History:
    """Read a run's metrics in bounded memory, but for one number a step and curve.

    Raises InputError where there are no metrics, or no training step among them.
    """
    steps: list[int] = []
    values: dict[str, list[float]] = {name: [] for name in SCALARS}
    evals: dict[int, float] = {}
    bins, end = LayerBins(), deque[Floats](maxlen=END)
    for record in iterate_metrics(folder):
        if record["kind"] == "eval":
            evals[record["step"]] = float(record["loss"])
        elif record["kind"] == "train":
            steps.append(record["step"])
            for name, column in values.items():
                column.append(float(record.get(name, math.nan)))
            if "layers" in record:
                layers = _layers(record["layers"])
                bins.add(record["step"], layers)
                end.append(layers)
    if not steps:
        raise InputError(f"{folder / METRICS_FILE}: has no training step yet; wait for the first one")
    alike = [layers for layers in end if layers.shape == end[-1].shape]
    return History(
        np.array(steps, float),
        {name: np.array(column) for name, column in values.items()},
        np.array(sorted(evals.items()), float).reshape(-1, 2),
        bins,
        np.mean(alike, axis=0) if alike else None,
        len(alike),
    )


def _layers(record: Mapping[str, Any]) -> Floats:
    """(layers, experts + 3): shares, then balance, entropy, largest share."""
    share = np.array(record["share"], float)
    others = [np.array(record[name], float)[:, None] for name in ("balance", "entropy", "largest")]
    return np.hstack([share, *others])
