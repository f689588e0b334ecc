"""How the router spread tokens over experts: heat maps of the shares over time, and a table of the shares at the end.

Colours are see-through and say how far a share is from fair (1 / experts): blue below, orange above, none where fair.
So they read on light and dark alike.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

import numpy as np

from accessory.errors import listed
from accessory.train.progress import IDLE
from accessory.train.report.frame import Chart, frame, tooltip
from accessory.train.report.layer_bins import Floats

if TYPE_CHECKING:
    from bokeh.models import Range1d

BELOW, ABOVE, MISSING = (37, 99, 235), (217, 83, 9), "#8080806e"
REACH = 2.0  # powers of two from fair to the full colour: a quarter, four times
SHADES = 64  # to either side
LEVELS = ("¼×", "½×", "1×", "2×", "4×")
GAP, AROUND = 10, 46  # pixels between two layers, and below and above all
FRAME = "#8490995a"


# --------------------------------------------------------------------------- colours


def shade(share: Floats, experts: int) -> Floats:
    """-1 … 1: how far shares are from fair, in powers of two, at most REACH; NaN stays."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.clip(np.log2(np.asarray(share, float) * experts) / REACH, -1, 1)


def colour(value: float, strength: float = 1.0) -> str:
    """The colour #rrggbbaa of a shade; `strength` makes it paler."""
    if np.isnan(value):
        return MISSING
    red, green, blue = ABOVE if value > 0 else BELOW
    return f"#{red:02x}{green:02x}{blue:02x}{round(strength * 235 * abs(value) ** 0.85):02x}"


def scale(experts: int) -> str:
    """The HTML that says which colour means what."""
    stops = ",".join(colour(value) for value in np.linspace(-1, 1, 25))
    levels = "".join(f"<span>{level}</span>" for level in LEVELS)
    return (
        '<div class="scale"><div role="img" aria-label="Colours: blue below a fair share, orange above">'
        f'<div class="ramp" style="background:linear-gradient(to right,{stops})"></div><div class="levels">{levels}'
        f"</div></div><p>of a fair share, which is 1/{experts} = {1 / experts:.1%}. Rows of a layer are experts, 0 on "
        "top.</p></div>"
    )


# --------------------------------------------------------------------------- over time


def heat_maps(share: Floats, first: float, width: int, x_range: Range1d) -> list[Chart]:
    """`share` (columns, layers, experts), a row for each expert, in one picture or two with half of the layers each.

    The columns begin at step `first` and are `width` steps wide.
    """
    half = math.ceil(share.shape[1] / 2)
    groups = [range(half), range(half, share.shape[1])]
    return [_heat_map(share, group, first - 0.5, width, x_range) for group in groups if group]


def _heat_map(share: Floats, layers: Sequence[int], left: float, width: int, x_range: Range1d) -> Chart:
    from bokeh.models import FixedTicker, HoverTool, LinearAxis, LogColorMapper

    columns, count, experts = share.shape
    height = max(2 * experts, 84 if count <= 4 else 48 if count <= 12 else 30)  # pixels of a layer
    gap = GAP * experts / height
    tops = [-n * (experts + gap) for n in range(len(layers))]
    rows = [(layer, expert, top - expert) for layer, top in zip(layers, tops, strict=True) for expert in range(experts)]
    ends = (tops[-1] - experts - gap / 2, gap / 2)
    drawn = frame(x_range, ends, AROUND + len(layers) * (height + GAP))
    colours = LogColorMapper(
        palette=[colour(value) for value in np.linspace(-1, 1, 2 * SHADES + 1)],
        low=2.0**-REACH / experts,
        high=2.0**REACH / experts,
        nan_color=MISSING,
    )
    source = {
        "share": [share[None, :, layer, expert].astype(np.float32) for layer, expert, _ in rows],
        "bottom": [top - 1 for _, _, top in rows],
        "layer": [layer for layer, _, _ in rows],
        "expert": [expert for _, expert, _ in rows],
    }
    image = drawn.image(
        image="share", x=left, y="bottom", dw=columns * width, dh=1, color_mapper=colours, source=source
    )
    bottoms, right = [top - experts for top in tops], left + columns * width
    drawn.quad(left=left, right=right, top=tops, bottom=bottoms, fill_color=None, line_color=FRAME)

    names = {top - experts / 2: f"layer {layer}" for layer, top in zip(layers, tops, strict=True)}
    drawn.yaxis.ticker = FixedTicker(ticks=list(names))
    drawn.yaxis.major_label_overrides = names
    numbers = {top - 0.5: str(expert) for _, expert, top in rows if expert in (0, experts - 1)}
    beside = LinearAxis(ticker=FixedTicker(ticks=list(numbers)), major_label_overrides=numbers)
    beside.update(major_label_text_font_size="9px", major_label_standoff=3, axis_line_alpha=0, major_tick_line_alpha=0)
    drawn.add_layout(beside, "right")
    drawn.ygrid.visible = False
    said = {"layer": "@layer", "expert": "@expert", "step": "$x{0,0}", "share": "@share{0.0%}"}
    drawn.add_tools(HoverTool(renderers=[image], tooltips=tooltip(said), show_arrow=False))
    which = f"layers {layers[0]} to {layers[-1]}" if len(layers) > 1 else f"layer {layers[0]}"
    text = f"Share of each expert over time, {which}; the table below has the shares at the end"
    return Chart("", drawn, text)


# --------------------------------------------------------------------------- at the end


def idle(share: Floats) -> str:
    """The sentence that names the idle experts by their `share` (layers, experts)."""
    layers, experts = np.nonzero(share * share.shape[1] <= IDLE)
    if not len(layers):
        return "No expert idles: each has more than a hundredth of a fair share."
    places = [f"{e} of layer {layer}" for layer, e in zip(layers, experts, strict=True)]
    return f"Idle, with less than a hundredth of a fair share: expert {listed(places, 12)}."


def table(layers: Floats, over: str) -> str:
    """The shares at the end: `layers` is (layers, experts + 3), shares and then balance, entropy, largest share."""
    experts = layers.shape[1] - 3
    head = "".join(f'<th scope="col">{expert}</th>' for expert in range(experts))
    rows = []
    for layer, values in enumerate(layers):
        cells = "".join(
            f'<td style="background:{colour(tint, 0.55)}">{_percent(value)}</td>'  # paler, since there is text on it
            for value, tint in zip(values[:experts], shade(values[:experts], experts), strict=True)
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
