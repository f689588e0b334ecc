"""The page around a report's charts: header, tiles, sections, configuration, and Bokeh's script, all in one file."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

from accessory import __version__
from accessory.train.report.frame import Chart
from accessory.train.report.sections import Section
from accessory.train.report.style import STYLE

# The browser itself refuses to fetch anything. Scripts are those in the page, and none of them is made from a text.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"

SCRIPT = """
const waiting = setInterval(() => {
  if (!window.Bokeh?.documents[0]?.is_idle) return;
  clearInterval(waiting);
  const figures = [...Bokeh.index.roots].filter(view => view.model.type === "Figure");
  // A finger that is drawn over a chart scrolls the page; a mouse zooms.
  if (matchMedia("(pointer: coarse)").matches)
    for (const {model} of figures) model.toolbar.gestures.pan.active.active = false;
  // Colours are read when a chart is drawn.
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
    for (const view of figures) view.request_repaint();
  });
}, 50);
"""


def page(
    title: str,
    subtitle: str,
    tiles: Sequence[tuple[str, str, str]],
    sections: Sequence[Section],
    config: Mapping[str, Any],
) -> str:
    """HTML. `tiles` are (name, value, more) and plain text, as are title, subtitle, headings and configuration; what
    stands before the charts of `sections` is HTML."""
    from bokeh.document import Document
    from bokeh.embed import components
    from bokeh.resources import Resources

    figures = [chart.figure for section in sections for chart in section.charts]
    document = Document()
    with document.models.freeze():  # or everything would be counted again with each figure
        for figure in figures:
            document.add_root(figure)
    script, places = components(figures)
    library = Resources(mode="inline", components=["bokeh"], log_level="error").render_js()
    shown = "".join(
        f'<div class="tile"><dt>{escape(name)}</dt><dd class="value">{escape(value)}</dd>'
        f'<dd class="more">{escape(more)}</dd></div>'
        for name, value, more in tiles
    )
    place = iter(places)
    body = "".join(_section(section, place) for section in sections)
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{STYLE}</style></head>\n<body><main><header><h1>{escape(title)}</h1><p>{escape(subtitle)}</p>"
        f'<dl class="tiles">{shown}</dl>{_configuration(config)}</header>\n'
        f"<noscript><p>The charts are drawn by a script in this page; let it run.</p></noscript>\n{body}"
        f"<footer>Made by accessory {escape(__version__)} from metrics.jsonl, which has every number of this page."
        f"</footer></main>\n{library}\n{script}\n<script>{SCRIPT}</script></body></html>\n"
    )


def _section(section: Section, place: Iterator[str]) -> str:
    if section.sheet:
        pictures = "".join(_picture(chart, next(place)) for chart in section.charts)
        content = f'<div class="sheet">{section.before}<div class="pictures">{pictures}</div></div>'
    else:
        cards = "".join(_card(chart, next(place)) for chart in section.charts)
        content = f'<div class="charts">{cards}</div>'
    return f"<section><h2>{escape(section.heading)}</h2>{content}</section>\n"


def _card(chart: Chart, place: str) -> str:
    legend = "".join(f'<span class="key {look}">{escape(name)}</span>' for look, name in chart.legend)
    return (
        f'<figure class="chart{" wide" if chart.wide else ""}"><figcaption><h3>{escape(chart.title)}'
        f' <small>{escape(chart.note)}</small></h3><p class="legend">{legend}</p></figcaption>'
        f"{_picture(chart, place)}</figure>"
    )


def _picture(chart: Chart, place: str) -> str:
    return f'<div class="picture" role="img" aria-label="{escape(chart.description)}">{place}</div>'


def _configuration(config: Mapping[str, Any]) -> str:
    if not config:
        return ""
    rows = "".join(
        f"<div><dt>{escape(str(key))}</dt><dd>{escape(_text(value))}</dd></div>" for key, value in config.items()
    )
    return f'<details><summary>Configuration</summary><dl class="config">{rows}</dl></details>'


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    return "–" if value is None else json.dumps(value, ensure_ascii=False, default=str)
