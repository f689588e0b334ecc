"""Made-up runs to report on."""

from __future__ import annotations

import importlib.util
import math
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from accessory.train.metrics import MetricsLog

CONFIG = {
    "llama_type": "mixtral_sparse",
    "lr": 2e-5,
    "pretrained_path": ["base", "adapter"],
    "template": None,
    "output_dir": "out/<script>alert('no')</script>&amp;",
}


def records(steps: int, layers: int, experts: int, evals: int = 0, first: int = 1) -> Iterator[dict[str, Any]]:
    """The records of `steps` steps from step `first` on, with `evals` held-out evaluations among them."""
    random = np.random.default_rng(0)
    for step in range(first, first + steps):
        done = step / (first + steps)
        share = random.dirichlet(np.full(experts, 40.0), layers)
        yield {
            "kind": "train",
            "step": step,
            "epoch": done,
            "samples": 8 * step,
            "tokens": 1000 * step,
            "loss": 1 + math.exp(-4 * done) + 0.05 * random.normal(),
            "balance": float(experts * (share**2).sum(1).mean()),
            "z": 5 - done,
            "lr": 2e-5 * (1 - done),
            "grad_norm": float(random.lognormal()),
            "tokens_per_s": 1000 / 0.5,
            "step_s": 0.5,
            "memory_gb": 23.4,
            "layers": {
                "balance": (experts * (share**2).sum(1)).tolist(),
                "entropy": (-(share * np.log(share)).sum(1)).tolist(),
                "largest": share.max(1).tolist(),
                "share": share.tolist(),
            },
        }
        if evals and (step - first + 1) % (steps // evals) == 0:
            yield {"kind": "eval", "step": step, "loss": 1.1 + math.exp(-4 * done), "tokens": 99}


def written(folder: Path, items: Iterable[dict[str, Any]], config: dict[str, Any] = CONFIG) -> Path:
    """The folder of a run with these records."""
    with MetricsLog(folder) as log:
        for record in items:
            log.write(record)
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


def shown(page: Path) -> str:
    """A report's HTML without its scripts, whose text a test must not match."""
    return re.sub(r"<script.*?</script>", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)


def hide_bokeh(monkeypatch: Any) -> None:
    """Makes Bokeh look as if it were not installed."""
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "bokeh" else found(name, *rest)
    )
