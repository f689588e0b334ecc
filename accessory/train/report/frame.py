"""What all charts of a report have in common: the axis of steps, what the pointer does, and the words around them.

Bokeh draws. Colours that differ in light and dark mode are CSS variables of the page: `--bk-grid-line-color` and the
like, which Bokeh reads.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bokeh.models import Range1d
    from bokeh.plotting import figure

ONE, TWO, ALARM, GREY = "#3380f0", "#d9581a", "#dc2626", "#84909b"  # seen on light and dark alike
LEFT, RIGHT = 52, 22  # pixels beside the frame, so that the frames of charts in a column begin and end alike


@dataclass(frozen=True)
class Chart:
    """A figure and the words around it. `legend` holds (look, name); `description` is for who cannot see it."""

    title: str
    figure: figure
    description: str
    note: str = ""
    legend: tuple[tuple[str, str], ...] = ()
    wide: bool = False


def step_range(first: float, last: float) -> Range1d:
    """The steps that all charts of a page show, with room for half a step, or a dot, at both ends.

    The charts share this one range, so that they zoom together.
    """
    from bokeh.models import Range1d

    room = max(0.5, 0.005 * (last - first))
    start, end = first - room, last + room
    return Range1d(start, end, bounds=(start, end), min_interval=2)


def frame(x_range: Range1d, y_range: tuple[float, float], height: int, **options: Any) -> figure:
    """A figure with its axes and nothing in it. A dragged mouse zooms, a double click goes back."""
    from bokeh.models import BasicTicker, BoxZoomTool, NoOverlap, NumeralTickFormatter
    from bokeh.plotting import figure

    made = figure(
        height=height,
        sizing_mode="stretch_width",
        x_range=x_range,
        y_range=y_range,
        x_axis_label="step",
        toolbar_location=None,
        tools=[BoxZoomTool(dimensions="width")],
        output_backend="svg",  # texts stay texts: sharp on paper, and where a telephone zooms
        min_border_left=LEFT,
        min_border_right=RIGHT,
        min_border_top=8,
        outline_line_color=None,
        background_fill_color=None,
        border_fill_color=None,
        **options,
    )
    made.xaxis.formatter = NumeralTickFormatter(format="0,0")
    made.xaxis.ticker = BasicTicker(min_interval=1, num_minor_ticks=0)
    made.xaxis.major_label_policy = NoOverlap(min_distance=8)
    made.xaxis.axis_label_text_font_style = "normal"
    made.xaxis.axis_label_standoff = 0
    made.axis.minor_tick_line_color = None
    made.axis.major_tick_in = 0
    made.xaxis.major_tick_out = 4
    made.yaxis.major_tick_out = 0
    made.yaxis.axis_line_alpha = 0  # the page sets the colour, which would win over None
    made.xgrid.visible = False
    return made


def tooltip(rows: Mapping[str, str]) -> str:
    """What stands beside the pointer: names, and Bokeh's fields (`@column{format}`) that they show."""
    shown = "".join(
        f'<span style="color:var(--soft)">{escape(name)}</span><span>{field}</span>' for name, field in rows.items()
    )
    return f'<div style="display:grid;grid-template-columns:auto auto;gap:1px 10px">{shown}</div>'
