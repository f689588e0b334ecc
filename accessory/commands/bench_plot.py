"""The page of `accessory bench --plot`: of each kind of time, which part took no longer. Bokeh draws."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from html import escape
from pathlib import Path

from accessory.commands.bench_figures import PERCENTILES, TIMES, times_of
from accessory.commands.bench_load import Record
from accessory.errors import MissingExtraError
from accessory.train.metrics import write_whole

WIDTH, HEIGHT = 520, 280
COLOUR = "#3380f0"


def require_bokeh() -> None:
    """MissingExtraError where Bokeh is not installed."""
    spec = importlib.util.find_spec("bokeh")
    if spec is None or spec.origin is None:
        raise MissingExtraError("--plot: it needs Bokeh: pip install 'mixtral-accessory[report]'")


def write_plot(path: Path, title: str, records: Sequence[Record]) -> None:
    """The file, whole. It needs no network."""
    from bokeh.embed import file_html
    from bokeh.layouts import column, gridplot
    from bokeh.models import Div, NumeralTickFormatter, Span
    from bokeh.plotting import figure
    from bokeh.resources import INLINE

    times, charts = times_of(records), []
    for key, name in TIMES:
        values = sorted(times[key])
        if not values:
            continue
        chart = figure(
            title=f"{name}, milliseconds",
            width=WIDTH,
            height=HEIGHT,
            y_range=(0, 1.02),
            x_axis_type="log" if values[0] > 0 and values[-1] > 30 * values[0] else "linear",
            toolbar_location=None,
            output_backend="svg",
        )
        parts = [number / len(values) for number in range(1, len(values) + 1)]
        chart.step([1000 * value for value in values], parts, mode="after", color=COLOUR, line_width=2)
        for q in PERCENTILES:
            chart.add_layout(Span(location=q / 100, dimension="width", line_dash="dotted", line_color="grey"))
        chart.yaxis.formatter = NumeralTickFormatter(format="0%")
        charts.append(chart)
    marked = ", ".join(f"{q}%" for q in PERCENTILES)
    heading = Div(
        text=f"<h1>{escape(title)}</h1><p>Which part took no longer. Dotted: {marked}.</p>", disable_math=True
    )
    page = file_html(column(heading, gridplot(charts, ncols=2, toolbar_location=None)), INLINE, title=title)
    with write_whole(path) as file:
        file.write(page.encode())
