"""Line charts as SVG text: axes with round numbers, bands, reference lines, tooltips; no network, script or package.

Colours are classes; the page that holds a chart gives them values, for light and dark.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 220, 54, 14, 12, 26
UNITS = ((1e9, "B"), (1e6, "M"), (1e3, "k"))
DRAWN = 400  # buckets that a long line is drawn as; each keeps its lowest and highest value
DOTS = 100  # marks that get a dot
TIPS = 100  # columns with a tooltip
LOG_SPREAD = 30  # a highest value so many times the median is drawn on a logarithmic axis


@dataclass(frozen=True)
class Line:
    """Values `y` (N,) at steps `x` (N,), NaN for a gap. `look`: raw, main, or marks (few values, each with a dot)."""

    name: str
    x: Floats
    y: Floats
    look: str = "main"


@dataclass(frozen=True)
class Band:
    """The area between `low` and `high`, both (N,)."""

    name: str
    x: Floats
    low: Floats
    high: Floats


@dataclass(frozen=True)
class Axis:
    """Maps values onto pixels; `ticks` are (value, label)."""

    low: float
    high: float
    start: float
    end: float
    ticks: tuple[tuple[float, str], ...]
    log: bool = False

    def __call__(self, values: Floats) -> Floats:
        low, high, values = self.low, self.high, np.asarray(values, float)
        if self.log:
            low, high = math.log10(low), math.log10(high)
            with np.errstate(divide="ignore", invalid="ignore"):
                values = np.log10(values)
        return self.start + (values - low) / (high - low) * (self.end - self.start)

    def at(self, value: float) -> float:
        """The pixel of one value."""
        return float(self(np.array([value]))[0])


def chart(
    title: str,
    lines: Sequence[Line],
    *,
    bands: Sequence[Band] = (),
    reference: tuple[float, str] | None = None,
    from_zero: bool = False,
    span: tuple[float, float] | None = None,
    width: int = 560,
    note: str = "",
) -> str:
    """A <figure> with its title and legend; `reference` is a level worth comparing with, and its name.

    `span`: the first and the last step of the axis, by default of `lines`.
    """
    every = [line.y for line in lines] + [side for band in bands for side in (band.low, band.high)]
    finite = np.concatenate(every)
    finite = finite[np.isfinite(finite)]
    steps = np.concatenate([line.x for line in lines])
    x = step_axis(*(span or (float(steps.min()), float(steps.max()))), LEFT, width - RIGHT)
    y = value_axis(finite, reference, from_zero)
    if reference is not None and not y.low <= reference[0] <= y.high:
        reference = None
    body = [
        _grid(x, y, width),
        *(f'<path class="area" d="{_area(band, x, y)}"/>' for band in bands),
        f'<path class="reference" d="M{LEFT} {y.at(reference[0]):.1f}H{width - RIGHT}"/>' if reference else "",
        *(_drawn(line, x, y) for line in lines),
        _tips(title, lines, x),
    ]
    summary = "; ".join(_described(line) for line in lines if line.look != "raw" or len(lines) == 1)
    log = " (logarithmic)" if y.log else ""
    keys = [(line.look, line.name) for line in lines] + [("band", band.name) for band in bands]
    keys += [("reference", reference[1])] if reference else []
    legend = "".join(f'<span class="key {look}">{escape(name)}</span>' for look, name in keys if name)
    return (
        f'<figure class="chart{" wide" if width > 800 else ""}"><figcaption><h3>{escape(title)}'
        f'<small>{log}{escape(note)}</small></h3><p class="legend">{legend}</p></figcaption>'
        f'<svg viewBox="0 0 {width} {HEIGHT}" role="img" aria-label="{escape(title)}: {escape(summary)}">'
        f"{''.join(body)}</svg></figure>"
    )


# --------------------------------------------------------------------------- axes


def step_axis(first: float, last: float, start: float, end: float) -> Axis:
    """Of whole steps; a single one stands in the middle."""
    if first == last:
        return Axis(first - 1, last + 1, start, end, ((first, f"{first:.0f}"),))
    ticks = [t for t in round_numbers(first, last, max(2, int((end - start) / 90))) if t == int(t)]
    named = [f"{t:,.0f}" for t in ticks] if last < 1e5 else labels(ticks)
    return Axis(first, last, start, end, tuple(zip(ticks, named, strict=True)))


def value_axis(values: Floats, reference: tuple[float, str] | None, from_zero: bool) -> Axis:
    """From finite values, which may be none; logarithmic where a few are far above the others."""
    start, end = float(HEIGHT - BOTTOM), float(TOP)
    low, high = (float(values.min()), float(values.max())) if len(values) else (0.0, 1.0)
    if low > 0 and high > LOG_SPREAD * float(np.median(values)):
        low, high = low / 1.1, high * 1.1
        return Axis(low, high, start, end, tuple((t, labels([t])[0]) for t in log_numbers(low, high)), log=True)
    if reference is not None and abs(reference[0] - (low + high) / 2) < 4 * (high - low) + 0.1 * abs(reference[0]):
        low, high = min(low, reference[0]), max(high, reference[0])
    if from_zero:
        low, high = min(low, 0.0), max(high, 0.0)
    # A flat line gets room in proportion to its height, so that noise in the last digit is not blown up.
    room = max(0.06 * (high - low), 0.01 * max(abs(low), abs(high))) or 1.0
    low, high = (low if from_zero and low == 0 else low - room), high + room
    ticks = round_numbers(low, high, 5)
    return Axis(low, high, start, end, tuple(zip(ticks, labels(ticks), strict=True)))


def round_numbers(low: float, high: float, about: int) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten within [low, high], about so many."""
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    size = next(m * power for m in (1, 2, 5, 10) if m * power >= 0.999 * rough)
    return [n * size for n in range(math.ceil(low / size - 1e-9), math.floor(high / size + 1e-9) + 1)]


def log_numbers(low: float, high: float) -> list[float]:
    """Powers of ten within [low, high], thinned out when many, with 2 and 5 times them when few."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    every = max(1, len(powers) // 6)
    factors = (1, 2, 5) if len(powers) <= 3 else (1,)
    return [t for p in powers if p % every == 0 for m in factors if low <= (t := m * 10.0**p) <= high]


def labels(ticks: Sequence[float]) -> list[str]:
    """Numbers of one axis, all with as many digits as their distance needs: 0.25 and 0.30, 20k, 4e-6."""
    size = max((abs(t) for t in ticks), default=0.0)
    gap = min((b - a for a, b in pairwise(ticks)), default=size) or 1.0
    if 0 < size < 1e-3:
        power = math.floor(math.log10(size) + 1e-9)
        return [f"{round(t / 10.0**power, 3):g}e{power}" if t else "0" for t in ticks]
    unit, name = next(((u, n) for u, n in UNITS if size >= 10 * u), (1.0, ""))
    decimals = max(0, -math.floor(math.log10(gap / unit) + 1e-9))
    return [f"{t / unit:.{decimals}f}{name}".replace("-", "−") if t else "0" for t in ticks]


# --------------------------------------------------------------------------- parts of a chart


def _grid(x: Axis, y: Axis, width: int) -> str:
    parts = []
    for value, text in y.ticks:
        at = f"{y.at(value):.1f}"
        parts.append(f'<path class="grid" d="M{LEFT} {at}H{width - RIGHT}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 8}" y="{at}" dy=".32em" text-anchor="end">{escape(text)}</text>')
    parts.append(step_labels(x, HEIGHT - BOTTOM))
    return "".join(parts)


def step_labels(x: Axis, baseline: float) -> str:
    """The line at `baseline`, small ticks and their numbers below it."""
    parts = [
        f'<path class="axis" d="M{x.start:.0f} {baseline:.0f}H{x.end:.0f}"/>'
        f'<text class="tick" x="{x.start:.0f}" y="{baseline + 16:.0f}">step</text>'
    ]
    for value, text in x.ticks:
        at = x.at(value)
        anchor = "end" if at > x.end - 12 else "middle"
        parts.append(f'<path class="axis" d="M{at:.1f} {baseline:.0f}v4"/>')
        if at < x.start + 44:  # "step" stands there
            continue
        parts.append(f'<text class="tick" x="{at:.1f}" y="{baseline + 16:.0f}" text-anchor="{anchor}">{text}</text>')
    return "".join(parts)


def _drawn(line: Line, x: Axis, y: Axis) -> str:
    px, py = _thinned(line, x(line.x), y(line.y))
    shown = np.isfinite(py)
    path = _path(px, py)
    parts = [f'<path class="line {line.look}" d="{path}"/>']
    # A dot where a line would not be seen: held-out values, and values without a neighbour.
    alone = shown & ~np.r_[False, shown[:-1]] & ~np.r_[shown[1:], False]
    for at, height in zip(px[shown], py[shown], strict=True) if line.look == "marks" and shown.sum() <= DOTS else ():
        parts.append(f'<circle class="dot {line.look}" cx="{at:.1f}" cy="{height:.1f}" r="3"/>')
    if line.look != "marks":
        for at, height in zip(px[alone], py[alone], strict=True):
            parts.append(f'<circle class="dot {line.look}" cx="{at:.1f}" cy="{height:.1f}" r="2.5"/>')
    return "".join(parts)


def _thinned(line: Line, px: Floats, py: Floats) -> tuple[Floats, Floats]:
    """At most two points a bucket: its lowest and its highest, in their order; for a main line, its mean."""
    if len(px) <= 2 * DRAWN:
        return px, py
    xs, ys = [], []
    for chunk_x, chunk_y in zip(np.array_split(px, DRAWN), np.array_split(py, DRAWN), strict=True):
        shown = np.flatnonzero(np.isfinite(chunk_y))
        if not len(shown):
            picks = np.array([0])
        elif line.look == "main":
            xs.append(chunk_x.mean())
            ys.append(chunk_y[shown].mean())
            continue
        else:
            picks = np.unique([shown[chunk_y[shown].argmin()], shown[chunk_y[shown].argmax()]])
        xs.extend(chunk_x[picks])
        ys.extend(chunk_y[picks])
    if line.look == "main":  # a mean stands in its bucket's middle; the line's ends stay where they are
        xs, ys = [px[0], *xs, px[-1]], [py[0], *ys, py[-1]]
    return np.array(xs), np.array(ys)


def _path(px: Floats, py: Floats) -> str:
    parts, pen = [], False
    for at, height in zip(px, py, strict=True):
        if math.isfinite(height):
            parts.append(f"{'L' if pen else 'M'}{at:.1f} {height:.1f}")
        pen = math.isfinite(height)
    return "".join(parts)


def _area(band: Band, x: Axis, y: Axis) -> str:
    shown = np.isfinite(band.low) & np.isfinite(band.high)
    px, low, high = x(band.x[shown]), y(band.low[shown]), y(band.high[shown])
    if not len(px):
        return ""
    return _path(np.r_[px, px[::-1]], np.r_[high, low[::-1]]) + "Z"


def _tips(title: str, lines: Sequence[Line], x: Axis) -> str:
    """Invisible columns that say, under the pointer, which values they hold."""
    steps = np.unique(np.concatenate([line.x for line in lines]))
    parts = []
    chunks = np.array_split(steps, min(TIPS, len(steps)))
    edges = [x.start, *(x.at((a[-1] + b[0]) / 2) for a, b in pairwise(chunks)), x.end]
    for chunk, left, right in zip(chunks, edges, edges[1:], strict=False):
        first, last = chunk[0], chunk[-1]
        said = [f"step {first:.0f}" + (f"–{last:.0f}" if last > first else "")]
        for line in lines:
            inside = line.y[(line.x >= first) & (line.x <= last)]
            inside = inside[np.isfinite(inside)]
            if len(inside):
                said.append(f"{line.name or title} {inside.mean():.5g}")
        parts.append(
            f'<rect class="tip" x="{left:.1f}" y="{TOP}" width="{right - left:.1f}" height="{HEIGHT - TOP - BOTTOM}">'
            f"<title>{escape(chr(10).join(said))}</title></rect>"
        )
    return "".join(parts)


def _described(line: Line) -> str:
    shown = line.y[np.isfinite(line.y)]
    if not len(shown):
        return f"{line.name}: no finite value"
    return f"{line.name} from {shown[0]:.4g} to {shown[-1]:.4g}, lowest {shown.min():.4g}, highest {shown.max():.4g}"
