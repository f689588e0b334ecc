"""How the router spread tokens over experts, as pictures: a strip a layer (experts × time), and a table of the end.

Colours are see-through and say how far a share is from fair (1 / experts): blue below, orange above, none where fair.
So they read on light and dark alike. A strip is an indexed PNG of a pixel a value, made here and put into the page.
"""

from __future__ import annotations

import base64
import struct
import zlib
from collections.abc import Sequence
from html import escape

import numpy as np

from accessory.train.report_svg import Axis, Floats, step_axis, step_labels

COLUMNS = 200
BELOW, ABOVE, MISSING = (37, 99, 235), (217, 83, 9), (128, 128, 128, 110)
REACH = 2.0  # powers of two from fair to the full colour: a quarter, four times
SHADES = 64  # to either side
WIDTH, LEFT, RIGHT = 560, 62, 34
LEVELS = ((-2, "¼"), (-1, "½"), (0, "1"), (1, "2"), (2, "4"))


class LayerBins:
    """Means of per-layer values over time, at most `columns` of them, however many steps come.

    Each holds `width` steps, which doubles when they become too many. Arrays are (layers, values).
    """

    def __init__(self, columns: int = COLUMNS) -> None:
        self.columns, self.width = columns, 1
        self._sums: list[Floats] = []
        self._counts: list[int] = []
        self._first: list[int] = []

    def add(self, step: int, values: Floats) -> None:
        """A step's values; those of another shape than the first ones are passed over."""
        if self._sums and self._sums[0].shape != values.shape:
            return
        if self._sums and self._counts[-1] < self.width:
            self._sums[-1] = self._sums[-1] + values
            self._counts[-1] += 1
            return
        if len(self._sums) == self.columns:
            self._merge()
            return self.add(step, values)
        self._sums.append(values)
        self._counts.append(1)
        self._first.append(step)

    def _merge(self) -> None:
        self.width *= 2
        pairs = range(0, len(self._sums), 2)
        self._sums = [sum(self._sums[i + 1 : i + 2], self._sums[i]) for i in pairs]
        self._counts = [sum(self._counts[i : i + 2]) for i in pairs]
        self._first = self._first[::2]

    def __len__(self) -> int:
        return len(self._sums)

    def means(self) -> Floats:
        """(columns, layers, values)"""
        return np.stack([total / count for total, count in zip(self._sums, self._counts, strict=True)])

    def steps(self) -> Floats:
        """The first step of each column."""
        return np.array(self._first, float)


def shade(share: Floats, experts: int) -> Floats:
    """-1 … 1: how far shares are from fair, in powers of two, at most REACH; NaN stays."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.clip(np.log2(np.asarray(share, float) * experts) / REACH, -1, 1)


def colour(value: float) -> tuple[int, int, int, int]:
    """(red, green, blue, alpha) of a shade."""
    if np.isnan(value):
        return MISSING
    return (*(ABOVE if value > 0 else BELOW), round(235 * abs(value) ** 0.85))


def png(shades: Floats) -> bytes:
    """An indexed PNG of shades (rows, columns), a pixel each; portable network graphics specification, section 11."""
    steps = np.linspace(-1, 1, 2 * SHADES + 1)
    palette = [colour(v) for v in steps] + [MISSING]
    index = np.where(np.isnan(shades), len(steps), np.round((np.nan_to_num(shades) + 1) * SHADES)).astype(np.uint8)
    rows, columns = index.shape
    unfiltered = np.hstack([np.zeros((rows, 1), np.uint8), index]).tobytes()

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    return b"".join(
        (
            b"\x89PNG\r\n\x1a\n",
            chunk(b"IHDR", struct.pack(">IIBBBBB", columns, rows, 8, 3, 0, 0, 0)),
            chunk(b"PLTE", b"".join(bytes(c[:3]) for c in palette)),
            chunk(b"tRNS", bytes(c[3] for c in palette)),
            chunk(b"IDAT", zlib.compress(unfiltered, 9)),
            chunk(b"IEND", b""),
        )
    )


def strips(share: Floats, first: int, last: int, width: int) -> str:
    """Pictures of shares (columns, layers, experts), each column standing for `width` steps from `first` on."""
    _, layers, experts = share.shape
    height = max(2 * experts, 84 if layers <= 4 else 48 if layers <= 12 else 30)
    groups = np.array_split(np.arange(layers), min(2, layers))
    shades = shade(share, experts)
    pictures = "".join(_column(group, shades, height, first, last, width) for group in groups)
    return f'{_legend(experts)}<div class="strips">{pictures}</div>'


def _column(layers: Sequence[int] | Floats, shades: Floats, height: int, first: int, last: int, width: int) -> str:
    columns, _, experts = shades.shape
    # Steps are as wide as columns here, not points: the last step has a width, too.
    x = step_axis(first, last, LEFT, WIDTH - RIGHT)
    x = Axis(first - 0.5, last + 0.5, x.start, x.end, x.ticks)
    drawn = (x.end - x.start) * columns * width / (last - first + 1)
    parts, top = [], 6.0
    for layer in layers:
        data = base64.b64encode(png(shades[:, int(layer)].T)).decode()
        middle = top + height / 2
        parts.append(
            f'<text class="tick" x="{LEFT - 8}" y="{middle:.1f}" dy=".32em" text-anchor="end">layer {layer}</text>'
            f'<svg x="{LEFT}" y="{top:.1f}" width="{x.end - x.start:.0f}" height="{height}">'
            f'<image href="data:image/png;base64,{data}" width="{drawn:.1f}" height="{height}" '
            f'preserveAspectRatio="none"><title>Layer {layer}: share of each expert over time</title></image></svg>'
            f'<rect class="frame" x="{LEFT}" y="{top:.1f}" width="{x.end - x.start:.0f}" height="{height}"/>'
            f'<text class="tick small" x="{WIDTH - RIGHT + 5}" y="{top + 8:.1f}">0</text>'
            f'<text class="tick small" x="{WIDTH - RIGHT + 5}" y="{top + height - 1:.1f}">{experts - 1}</text>'
        )
        top += height + 7
    parts.append(step_labels(x, top - 3))
    names = f"layers {layers[0]} to {layers[-1]}" if len(layers) > 1 else f"layer {layers[0]}"
    return (
        f'<svg viewBox="0 0 {WIDTH} {top + 18:.0f}" role="img" aria-label="Share of each expert over time, {names}; '
        f'the table below has the shares at the end">{"".join(parts)}</svg>'
    )


def _legend(experts: int) -> str:
    width = 300
    stops = "".join(f'<stop offset="{(v + 1) / 2:.4f}" stop-color="{css(v)}"/>' for v in np.linspace(-1, 1, 25))
    texts = "".join(
        f'<text class="tick" x="{20 + width * (level / REACH + 1) / 2:.0f}" y="28" text-anchor="middle">{text}×</text>'
        for level, text in LEVELS
    )
    return (
        '<div class="scale"><svg viewBox="0 0 340 32" role="img" aria-label="Colours: blue below a fair share, orange '
        f'above"><linearGradient id="shares">{stops}</linearGradient><rect class="frame" x="20" y="2" width="{width}" '
        f'height="12" style="fill:url(#shares)"/>{texts}</svg><p>of a fair share, which is 1/{experts} = '
        f"{1 / experts:.1%}. Rows of a strip are experts, 0 on top.</p></div>"
    )


def css(value: float) -> str:
    """A shade as CSS spells a colour."""
    red, green, blue, alpha = colour(float(value))
    return f"rgba({red},{green},{blue},{alpha / 255:.2f})"


def table(layers: Floats, over: str) -> str:
    """The shares at the end: `layers` is (layers, experts + 3), shares and then balance, entropy, largest share."""
    experts = layers.shape[1] - 3
    shades = shade(layers[:, :experts], experts)
    head = "".join(f'<th scope="col">{expert}</th>' for expert in range(experts))
    rows = []
    for layer, (values, tints) in enumerate(zip(layers, shades, strict=True)):
        # Paler than in the strips, since there is text on it.
        cells = "".join(
            f'<td style="background:{_pale(tint)}">{_percent(value)}</td>'
            for value, tint in zip(values, tints, strict=False)
        )
        balance, entropy, largest = values[experts:]
        rows.append(
            f'<tr><th scope="row">{layer}</th>{cells}<td class="apart">{_percent(largest)}</td>'
            f"<td>{balance:.3f}</td><td>{entropy:.3f}</td></tr>"
        )
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="Shares at the end"><table class="shares">'
        f"<caption>Mean of {escape(over)}.</caption><thead><tr><td></td>"
        f'<th scope="colgroup" colspan="{experts}">share of expert</th><td colspan="3"></td></tr><tr>'
        f'<th scope="col">layer</th>{head}<th scope="col" class="apart">largest</th><th scope="col">balance</th>'
        f'<th scope="col">entropy</th></tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
    )


def _percent(value: float) -> str:
    return "–" if np.isnan(value) else f"{value:.1%}"


def _pale(value: float) -> str:
    red, green, blue, alpha = colour(float(value))
    return f"rgba({red},{green},{blue},{0.55 * alpha / 255:.2f})"
