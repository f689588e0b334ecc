"""Line charts over a run's steps, with points, a band, a level to compare with, and marks of failed steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from accessory.train.report.curves import one_a_bucket, thinned
from accessory.train.report.frame import ALARM, GREY, ONE, TWO, Chart, frame, tooltip
from accessory.train.report.layer_bins import Floats

if TYPE_CHECKING:
    from bokeh.models import Range1d
    from bokeh.plotting import figure

HEIGHT = 236
DOTS = 100  # points that get a dot each
LOG_SPREAD = 30  # a highest value so many times the median is drawn on a logarithmic axis


@dataclass(frozen=True)
class Line:
    """Values (N,) at the chart's steps, NaN for a gap. `look`: "main", or "raw" for the paler one behind it."""

    name: str
    values: Floats
    look: str = "main"


@dataclass(frozen=True)
class Points:
    """A few values `y` at steps `x` of their own, both (M,), joined by a line."""

    name: str
    x: Floats
    y: Floats


@dataclass(frozen=True)
class Band:
    """The area between `low` and `high` at steps `x` of its own, all (M,)."""

    name: str
    x: Floats
    low: Floats
    high: Floats


def line_chart(
    title: str,
    x_range: Range1d,
    steps: Floats,
    lines: Sequence[Line],
    *,
    points: Points | None = None,
    band: Band | None = None,
    reference: tuple[float, str] | None = None,
    failed: Floats | None = None,
    from_zero: bool = False,
    note: str = "",
    wide: bool = False,
) -> Chart:
    """Draw `lines` at `steps` (N,); the first of them decides which steps of a long run are drawn.

    `reference` is a level worth comparing with, and its name; `failed` (M,) are steps to be marked.
    """
    every = [line.values for line in lines]
    every += [points.y] if points else []
    every += [band.low, band.high] if band else []
    axis = ValueAxis.of(np.concatenate(every), None if reference is None else reference[0], from_zero)
    drawn = frame(x_range, (axis.low, axis.high), HEIGHT, y_axis_type="log" if axis.log else "linear")
    axis.label(drawn)

    picks = thinned(lines[0].values)
    columns: dict[str, Any] = {"step": steps[picks].astype(np.float32)}
    said, legend = {"step": "@step{0,0}"}, []
    for number, line in enumerate(lines):
        columns[f"line{number}"] = axis.scaled(line.values[picks]).astype(np.float32)
        said[line.name or title] = f"@line{number}{{%.5g}}"
        legend.append((line.look, line.name))
    if points:
        columns["points"] = _last_of(points, steps[picks])
        said[points.name] = "@points"
        legend.append(("points", points.name))
    if band:
        columns["band"] = _width_of(band, steps[picks])
        said[band.name] = "@band"
        legend.append(("band", band.name))
        drawn.varea(x=band.x, y1=axis.scaled(band.low), y2=axis.scaled(band.high), color=ONE, alpha=0.17)
    if reference is not None and axis.shows(reference[0]):
        legend.append(("reference", reference[1]))
        drawn.hspan(y=[axis.scaled(reference[0])], line_color=GREY, line_dash=[4, 4])
    if failed is not None and len(failed):
        legend.append(("failed", "no finite loss"))
        drawn.vspan(x=one_a_bucket(failed), line_color=ALARM, line_alpha=0.6)
    _draw_lines(drawn, lines, columns, said)
    if points:
        _draw_points(drawn, points.x, axis.scaled(points.y))

    described = [_described(line.name, line.values) for line in lines if line.look == "main"]
    described += [_described(points.name, points.y)] if points else []
    return Chart(
        title,
        drawn,
        f"{title}: {'; '.join(described)}",
        " ".join(filter(None, (note, axis.note))),
        tuple((look, name) for look, name in legend if name),
        wide,
    )


@dataclass(frozen=True)
class ValueAxis:
    """The axis of values from `low` to `high`, in units of 10 ** `power`."""

    low: float
    high: float
    log: bool = False
    power: int = 0

    @classmethod
    def of(cls, values: Floats, reference: float | None = None, from_zero: bool = False) -> ValueAxis:
        """For these values, of which the finite ones count; `reference` is included where it is near.

        Logarithmic where a few values are far above the others. Small values, such as learning rates, get a unit.
        """
        values = values[np.isfinite(values)]
        low, high = (float(values.min()), float(values.max())) if len(values) else (0.0, 1.0)
        if low > 0 and high > LOG_SPREAD * float(np.median(values)):
            return cls(low / 1.1, high * 1.1, log=True)
        if reference is not None and abs(reference - (low + high) / 2) < 4 * (high - low) + 0.1 * abs(reference):
            low, high = min(low, reference), max(high, reference)
        if from_zero:
            low, high = min(low, 0.0), max(high, 0.0)
        size = max(abs(low), abs(high))
        power = math.floor(math.log10(size)) if 0 < size < 1e-3 else 0
        # A flat line gets room in proportion to its height, so that noise in the last digit is not blown up.
        room = max(0.06 * (high - low), 0.01 * size) or 1.0
        low, high = (low if from_zero and low == 0 else low - room), high + room
        return cls(low / 10.0**power, high / 10.0**power, power=power)

    def scaled(self, values: Any) -> Any:
        """Values as they are drawn."""
        return values / 10.0**self.power

    def shows(self, value: float) -> bool:
        """Whether it lies on the axis."""
        return bool(self.low <= self.scaled(value) <= self.high)

    @property
    def note(self) -> str:
        """What a reader must know of it."""
        return "(logarithmic)" if self.log else f"× 1e{self.power}" if self.power else ""

    def label(self, drawn: figure) -> None:
        """Few ticks, with numbers such as 20k."""
        from bokeh.models import BasicTicker, BasicTickFormatter, NumeralTickFormatter

        large = max(abs(self.low), abs(self.high)) >= 1e4
        drawn.yaxis.formatter = NumeralTickFormatter(format="0.[0000]a") if large else BasicTickFormatter()
        if not self.log:
            drawn.yaxis.ticker = BasicTicker(desired_num_ticks=5)


def _draw_lines(drawn: figure, lines: Sequence[Line], columns: dict[str, Any], said: dict[str, str]) -> None:
    """Draw the columns `line0`, `line1`, …, and invisible bars around their steps.

    Over a bar the pointer says what is `said`. So it finds a step everywhere, even one without a value.
    """
    from bokeh.models import ColumnDataSource, CrosshairTool, HoverTool

    step = columns["step"]
    edges = np.r_[drawn.x_range.start, (step[1:] + step[:-1]) / 2, drawn.x_range.end].astype(np.float32)
    source = ColumnDataSource({**columns, "left": edges[:-1], "right": edges[1:]})
    for number, line in enumerate(lines):
        name, alpha, width = f"line{number}", *((0.4, 1.0) if line.look == "raw" else (1.0, 1.8))
        drawn.line("step", name, source=source, color=ONE, alpha=alpha, width=width, line_join="round")
        shown = np.isfinite(columns[name])
        alone = shown & ~np.r_[False, shown[:-1]] & ~np.r_[shown[1:], False]
        if alone.any():  # a line of one point would not be seen
            drawn.scatter(step[alone], columns[name][alone], size=5, color=ONE, alpha=alpha)
    low, high = drawn.y_range.start, drawn.y_range.end
    bars = drawn.quad("left", "right", high, low, source=source, fill_color=None, line_color=None)
    hover = HoverTool(renderers=[bars], tooltips=tooltip(said), point_policy="follow_mouse", show_arrow=False)
    hover.formatters = {f"@line{number}": "printf" for number in range(len(lines))}
    drawn.add_tools(hover, CrosshairTool(dimensions="height", line_color=GREY))


def _draw_points(drawn: figure, x: Floats, y: Floats) -> None:
    drawn.line(x, y, color=TWO, width=1.6)
    if len(x) <= DOTS:
        drawn.scatter(x, y, color=TWO, size=6)


def _last_of(points: Points, steps: Floats) -> list[str]:
    """The last value until each of `steps`, and of which step it is."""
    at = np.searchsorted(points.x, steps, side="right") - 1
    return [f"{points.y[i]:.5g} at step {points.x[i]:,.0f}" if i >= 0 else "–" for i in at]


def _width_of(band: Band, steps: Floats) -> list[str]:
    """The two sides of the band at each of `steps`."""
    at = np.searchsorted((band.x[:-1] + band.x[1:]) / 2, steps)
    return [f"{band.low[i]:.4g} to {band.high[i]:.4g}" for i in at]


def _described(name: str, values: Floats) -> str:
    shown = values[np.isfinite(values)]
    called = f"{name} " if name else ""
    if not len(shown):
        return f"{called}has no finite value"
    return f"{called}from {shown[0]:.4g} to {shown[-1]:.4g}, lowest {shown.min():.4g}, highest {shown.max():.4g}"
