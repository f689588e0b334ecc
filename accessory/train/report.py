"""`report.html`: what a training run did, as one page without network or script, from `metrics.jsonl` alone."""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from accessory.errors import InputError, listed
from accessory.train.metrics import METRICS_FILE, iterate_metrics, write_whole
from accessory.train.progress import IDLE, duration, short
from accessory.train.report_page import page
from accessory.train.report_shares import LayerBins, strips, table
from accessory.train.report_svg import Band, Floats, Line, chart

REPORT_FILE, CONFIG_FILE = "report.html", "config.yaml"
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
WIDE = 1140


@dataclass(frozen=True)
class Run:
    """What a report shows: `step` (N,) and `values[name]` (N,) of training, `evals` (M, 2) of step and loss."""

    step: Floats
    values: dict[str, Floats]
    evals: Floats
    layers: LayerBins
    end: Floats | None  # (layers, experts + 3): mean over the last steps
    end_steps: int


def write_report(
    folder: str | os.PathLike[str], title: str | None = None, config: Mapping[str, Any] | None = None
) -> Path:
    """Make `report.html` of the run in `folder`, finished, running or dead; returns its path.

    `title` defaults to the folder's name, `config` to its `config.yaml`. The file is replaced as a whole.
    Raises InputError where there are no metrics, or no training step among them.
    """
    folder = Path(folder)
    run = read_run(folder)
    config = _config_of(folder) if config is None else config
    title = title or f"Finetuning {folder.resolve().name}"
    text = page(title, _subtitle(run), _summary(run), _sections(run), config)
    with write_whole(folder / REPORT_FILE) as file:
        file.write(text.encode())
    return folder / REPORT_FILE


def _config_of(folder: Path) -> Mapping[str, Any]:
    path = folder / CONFIG_FILE
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8")) if path.exists() else {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: is not YAML ({str(error).splitlines()[0]}); mend or remove it") from error
    return config if isinstance(config, Mapping) else {}


def read_run(folder: Path) -> Run:
    """Everything a report needs, in bounded memory but for one number a step and curve."""
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
    return Run(
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


def smoothed(values: Floats) -> Floats:
    """Means over a window of a thirtieth of the run around each step, without its NaN.

    At the beginning the window narrows to both sides, since curves are steep there; at the end it loses one side.
    """
    half = len(values) // 60
    if half == 0:
        return values
    shown = np.isfinite(values)
    sums = np.cumsum(np.r_[0.0, np.where(shown, values, 0.0)])
    counts = np.cumsum(np.r_[0, shown])
    at = np.arange(len(values))
    low, high = np.maximum(at - half, 0), np.minimum(np.minimum(at + half, 2 * at), len(values) - 1) + 1
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(counts[high] > counts[low], (sums[high] - sums[low]) / (counts[high] - counts[low]), np.nan)


# --------------------------------------------------------------------------- words


def _subtitle(run: Run) -> str:
    first, last = int(run.step[0]), int(run.step[-1])
    text = f"Step {first:,}" if first == last else f"Steps {first:,} to {last:,}"
    if run.end is not None:
        text += f" · {run.end.shape[0]} layers of {run.end.shape[1] - 3} experts"
    bad = int((~np.isfinite(run.values["loss"])).sum())
    return text + (
        f" · {bad} steps without a finite loss" if bad > 1 else " · 1 step without a finite loss" if bad else ""
    )


def _summary(run: Run) -> list[tuple[str, str, str]]:
    """(name, value, more) of the tiles."""
    get = run.values.get
    tiles = [
        ("Steps", f"{run.step[-1]:,.0f}", _join((get("epoch"), "{:.2f} epochs"), (get("samples"), "{:,.0f} samples")))
    ]
    loss = run.values["loss"]
    shown = np.flatnonzero(np.isfinite(loss))
    if len(shown):
        best = shown[loss[shown].argmin()]
        tiles.append(("Training loss", _from_to(loss[shown]), f"lowest {loss[best]:.4f} at step {run.step[best]:,.0f}"))
    held = run.evals[np.isfinite(run.evals[:, 1])]
    if len(held):
        best = held[:, 1].argmin()
        change = held[-1, 1] / held[0, 1] - 1 if held[0, 1] else 0.0
        more = f"lowest {held[best, 1]:.4f} at step {held[best, 0]:,.0f}" + (
            f", {change:+.1%} in all" if change else ""
        )
        tiles.append(("Held-out loss", _from_to(held[:, 1]), more.replace("-", "−", 1) if change < 0 else more))
    seconds = float(np.nansum(run.values["step_s"]))
    tiles.append(("Time in steps", duration(seconds), f"{_median(run.values['step_s']):.3g} s a step"))
    speed = f"{short(_median(run.values['tokens_per_s']))} tokens/s, the median"
    tiles.append(("Tokens", short(run.values["tokens"][-1]), speed))
    memory = run.values["memory_gb"]
    if np.isfinite(memory).any():
        tiles.append(("Peak memory", f"{np.nanmax(memory):.1f} GB", "of the first rank's device"))
    return tiles


def _join(*parts: tuple[Floats | None, str]) -> str:
    return ", ".join(text.format(v[-1]) for v, text in parts if v is not None and np.isfinite(v[-1]))


def _from_to(values: Floats) -> str:
    return f"{values[0]:.3f}" if len(values) == 1 else f"{values[0]:.3f} → {values[-1]:.3f}"


def _median(values: Floats) -> float:
    shown = values[np.isfinite(values)]
    return float(np.median(shown)) if len(shown) else math.nan


# --------------------------------------------------------------------------- pictures


def _sections(run: Run) -> list[tuple[str, str]]:
    """(heading, content)"""
    losses = [*_curve(run, "loss", "training", "training, smoothed")]
    if len(run.evals):
        losses.append(Line("held out", run.evals[:, 0], run.evals[:, 1], "marks"))
    note = " cross-entropy per learnt token"
    training = [
        chart("Loss", losses, width=WIDE, note=note),
        f'<div class="narrow">{chart("Loss", losses, note=note)}</div>',  # instead, on a telephone
        *_simple(run, "lr", "Learning rate", from_zero=True),
        *_simple(run, "grad_norm", "Gradient norm"),
    ]
    sections = [("Training", f'<div class="charts">{"".join(training)}</div>'), *_routing(run)]
    machine = [
        *_simple(run, "tokens_per_s", "Throughput", from_zero=True, note=" tokens/s"),
        *_simple(run, "memory_gb", "Memory", from_zero=True, note=" GB"),
    ]
    if machine:
        sections.append(("Machine", f'<div class="charts">{"".join(machine)}</div>'))
    return sections


def _curve(run: Run, name: str, called: str, long: str = "smoothed") -> list[Line]:
    """The steps of a short run, `called` so; of a longer one, its course is named `long`."""
    values = run.values[name]
    if len(values) < 60:
        return [Line(called, run.step, values)]
    return [Line("each step", run.step, values, "raw"), Line(long, run.step, smoothed(values))]


def _simple(run: Run, name: str, title: str, **how: Any) -> list[str]:
    """A chart of one curve, or none where it has no value; a learning rate is smooth by itself."""
    if not np.isfinite(run.values[name]).any():
        return []
    lines = [Line("", run.step, run.values[name])] if name in ("lr", "memory_gb") else _curve(run, name, "")
    return [chart(title, lines, **how)]


def _routing(run: Run) -> list[tuple[str, str]]:
    if run.end is None:
        pictures = [*_simple(run, "balance", "Load balance"), *_simple(run, "z", "Router z")]
        return [("Routing", f'<div class="charts">{"".join(pictures)}</div>')] if pictures else []
    means = run.layers.means()
    experts = means.shape[2] - 3
    fair = f"{1 / experts:.1%}"
    balance, entropy, largest = means[:, :, experts], means[:, :, experts + 1], means[:, :, experts + 2]
    charts = [
        _per_layer(run, "Load balance", balance, _curve(run, "balance", "mean"), (1.0, "balanced: 1")),
        _per_layer(run, "Router entropy", entropy, None, (math.log(experts), "uniform: ln E"), " nats"),
        _per_layer(run, "Largest share", largest, None, (1 / experts, f"fair: {fair}")),
        *_simple(run, "z", "Router z"),
    ]
    last = int(run.step[-1])
    over = f"the last {run.end_steps} steps" if run.end_steps > 1 else f"step {last:,}"
    first = int(run.layers.steps()[0])
    return [
        ("Routing", f'<div class="charts">{"".join(charts)}</div>'),
        ("Expert shares over time", _sheet(strips(means[:, :, :experts], first, last, run.layers.width))),
        ("Expert shares at the end", _sheet(f"<p>{_idle(run.end[:, :experts])}</p>{table(run.end, over)}")),
    ]


def _sheet(content: str) -> str:
    return f'<div class="sheet">{content}</div>'


def _per_layer(
    run: Run, title: str, values: Floats, lines: list[Line] | None, reference: tuple[float, str], note: str = ""
) -> str:
    """`values` (columns, layers): their range over layers as a band, and their mean unless there are better lines."""
    span = (float(run.step[0]), float(run.step[-1]))
    steps = np.minimum(run.layers.steps() + (run.layers.width - 1) / 2, span[1])
    band = Band("range of layers", steps, values.min(axis=1), values.max(axis=1))
    lines = [Line("mean", steps, values.mean(axis=1))] if lines is None else lines
    bands = [band] if values.shape[1] > 1 else []
    return chart(title, lines, bands=bands, reference=reference, span=span, note=note)


def _idle(share: Floats) -> str:
    layers, experts = np.nonzero(share * share.shape[1] <= IDLE)
    if not len(layers):
        return "No expert idles: each has more than a hundredth of a fair share."
    places = [f"{e} of layer {layer}" for layer, e in zip(layers, experts, strict=True)]
    return f"Idle, with less than a hundredth of a fair share: expert {escape(listed(places, 12))}."
