"""Which charts and tables a report has, in their order."""

from __future__ import annotations

import math
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np

from accessory.train.report.curves import smoothed
from accessory.train.report.expert_shares import heat_maps, idle, scale, table
from accessory.train.report.frame import Chart, step_range
from accessory.train.report.history import History
from accessory.train.report.line_chart import Band, Line, Points, line_chart

if TYPE_CHECKING:
    from bokeh.models import Range1d

SHORT = 60  # a run of fewer steps is drawn as it is, a longer one smoothed too
SMOOTH = ("lr", "memory_gb")  # smooth by themselves


@dataclass(frozen=True)
class Section:
    """`charts` lie in a grid, each on a card; or together on one `sheet`, below the HTML of `before`."""

    heading: str
    charts: tuple[Chart, ...] = ()
    before: str = ""
    sheet: bool = False


def sections(history: History) -> list[Section]:
    """Draw everything; what has no values is left out."""
    first = min([history.step[0], *history.evals[:1, 0]])
    x_range = step_range(float(first), float(max([history.step[-1], *history.evals[-1:, 0]])))
    training = [_loss(history, x_range), *_curve(history, x_range, "lr", "Learning rate", from_zero=True)]
    training += _curve(history, x_range, "grad_norm", "Gradient norm")
    machine = _curve(history, x_range, "tokens_per_s", "Throughput", from_zero=True, note="tokens/s")
    machine += _curve(history, x_range, "memory_gb", "Memory", from_zero=True, note="GB")
    found = [Section("Training", tuple(training)), *_routing(history, x_range), Section("Machine", tuple(machine))]
    return [section for section in found if section.charts or section.before]


def _loss(history: History, x_range: Range1d) -> Chart:
    evals = history.evals
    return line_chart(
        "Loss",
        x_range,
        history.step,
        _lines(history, "loss", "training", "training, smoothed"),
        points=Points("held out", evals[:, 0], evals[:, 1]) if len(evals) else None,
        failed=history.failed,
        note="cross-entropy per learnt token",
        wide=True,
    )


def _lines(history: History, name: str, called: str, long: str = "smoothed") -> list[Line]:
    """The steps of a short run, `called` so; of a longer one, its course is named `long`."""
    values = history.values[name]
    if len(values) < SHORT or name in SMOOTH:
        return [Line(called, values)]
    return [Line("each step", values, "raw"), Line(long, smoothed(values))]


def _curve(history: History, x_range: Range1d, name: str, title: str, **how: Any) -> list[Chart]:
    """A chart of one curve, or none where it has no value."""
    if not np.isfinite(history.values[name]).any():
        return []
    return [line_chart(title, x_range, history.step, _lines(history, name, ""), **how)]


def _routing(history: History, x_range: Range1d) -> list[Section]:
    z = _curve(history, x_range, "z", "Router z")
    if history.end is None:
        return [Section("Routing", (*_curve(history, x_range, "balance", "Load balance"), *z))]
    means = history.layers.means()
    experts = means.shape[2] - 3
    share, values = means[:, :, :experts], means[:, :, experts:]  # (columns, layers, …)
    steps = np.minimum(history.layers.steps() + (history.layers.width - 1) / 2, history.step[-1])

    def band(number: int) -> Band | None:
        column = values[:, :, number]
        if column.shape[1] == 1:
            return None
        return Band("range of layers", steps, column.min(axis=1), column.max(axis=1))

    def mean(number: int) -> list[Line]:
        return [Line("mean", values[:, :, number].mean(axis=1))]

    charts = (
        line_chart(
            "Load balance",
            x_range,
            history.step,
            _lines(history, "balance", "mean"),
            band=band(0),
            reference=(1.0, "balanced: 1"),
        ),
        line_chart(
            "Router entropy",
            x_range,
            steps,
            mean(1),
            band=band(1),
            reference=(math.log(experts), "uniform: ln E"),
            note="nats",
        ),
        line_chart(
            "Largest share",
            x_range,
            steps,
            mean(2),
            band=band(2),
            reference=(1 / experts, f"fair: {1 / experts:.1%}"),
        ),
        *z,
    )
    maps = heat_maps(share, float(history.step[0]), history.layers.width, x_range)
    over = f"the last {history.end_steps} steps" if history.end_steps > 1 else f"step {history.step[-1]:,.0f}"
    ending = f"<p>{escape(idle(history.end[:, :-3]))}</p>{table(history.end, over)}"
    return [
        Section("Routing", charts),
        Section("Expert shares over time", tuple(maps), scale(experts), sheet=True),
        Section("Expert shares at the end", before=ending, sheet=True),
    ]
