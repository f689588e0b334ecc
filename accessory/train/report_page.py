"""The page around a report's charts: header, tiles, sections, configuration, and the style for light and dark."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from accessory import __version__

# Nothing may be fetched or run: the browser itself is told to refuse it. Pictures are in the page, as data.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"

STYLE = """
:root { color-scheme: light dark; --paper: #fff; --card: #fff; --ink: #1b1f24; --soft: #5c6670; --hair: #e3e7eb;
  --edge: #cfd6dc; --one: #1f6feb; --two: #c2410c; --back: #f5f7f9; }
@media (prefers-color-scheme: dark) { :root { --paper: #14171a; --card: #1b1f23; --ink: #e6e9ec; --soft: #9aa5af;
  --hair: #2b3137; --edge: #414a52; --one: #6cabff; --two: #ff9a62; --back: #101215; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--ink); font: 15px/1.5 system-ui, -apple-system, "Segoe UI",
  Roboto, "Noto Sans", "Liberation Sans", sans-serif; font-variant-numeric: tabular-nums; }
main { max-width: 1240px; margin: 0 auto; padding: 36px 24px 56px; }
h1 { font-size: 27px; line-height: 1.2; letter-spacing: -.015em; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 18px; letter-spacing: -.01em; margin: 40px 0 12px; }
h3 { font-size: 14px; font-weight: 600; margin: 0; }
h3 small { font-size: 12px; font-weight: 400; color: var(--soft); }
p { margin: 0 0 12px; color: var(--soft); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(168px, 1fr)); gap: 12px; margin: 22px 0 0; }
.tile, .chart, .sheet, details { background: var(--card); border: 1px solid var(--hair); border-radius: 10px; }
.tile { padding: 12px 16px 13px; }
.tile dt { font-size: 12.5px; color: var(--soft); }
.tile dd { margin: 0; }
.tile .value { font-size: 19px; font-weight: 600; letter-spacing: -.01em; line-height: 1.35; white-space: nowrap; }
.tile .more { font-size: 12.5px; line-height: 1.4; color: var(--soft); }
.charts { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 12px; }
.chart { margin: 0; padding: 12px 14px 6px; display: flex; flex-direction: column; justify-content: space-between; }
.narrow { display: none; }
.chart.wide { grid-column: 1 / -1; }
figcaption { display: flex; flex-wrap: wrap; justify-content: space-between; gap: 0 16px; margin-bottom: 6px; }
.legend { margin: 0; font-size: 12px; display: flex; flex-wrap: wrap; gap: 0 14px; }
.key { display: inline-flex; align-items: center; gap: 6px; }
.key::before { content: ""; width: 16px; height: 2.5px; border-radius: 2px; background: var(--one); }
.key.raw::before { opacity: .4; }
.key.marks::before { background: var(--two); }
.key.reference::before { height: 0; border-radius: 0; border-top: 1.5px dashed var(--soft); background: none; }
.key.band::before { height: 10px; opacity: .2; }
svg { display: block; width: 100%; height: auto; overflow: visible; }
svg svg { overflow: hidden; }
text { font-family: inherit; fill: var(--soft); }
.tick { font-size: 11.5px; }
.small { font-size: 10px; }
.grid { stroke: var(--hair); }
.axis { stroke: var(--edge); }
.frame { fill: none; stroke: var(--edge); }
.line { fill: none; stroke: var(--one); stroke-width: 1.8; stroke-linejoin: round; }
.line.raw { stroke-width: 1; opacity: .38; }
.line.marks { stroke: var(--two); }
.dot { fill: var(--one); }
.dot.raw { opacity: .38; }
.dot.marks { fill: var(--two); stroke: var(--card); stroke-width: 1.2; }
.area { fill: var(--one); opacity: .17; }
.reference { stroke: var(--soft); stroke-dasharray: 4 4; fill: none; }
.tip { fill: var(--soft); fill-opacity: 0; }
.tip:hover { fill-opacity: .16; }
image { image-rendering: pixelated; }
.sheet { padding: 16px 18px 12px; }
.strips { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 8px 24px; }
.scale { display: flex; flex-wrap: wrap; align-items: center; gap: 2px 16px; margin-bottom: 14px; }
.scale svg { width: 340px; max-width: 100%; }
.scale p { margin: 0; font-size: 13px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13px; }
.shares { width: 100%; }
caption { text-align: left; color: var(--soft); padding-bottom: 6px; }
.shares td, .shares th { padding: 4px 9px; text-align: right; white-space: nowrap; }
.shares th { font-weight: 500; color: var(--soft); }
.shares [scope=colgroup] { text-align: center; border-bottom: 1px solid var(--hair); }
.shares tbody tr { border-top: 1px solid var(--hair); }
.shares .apart { padding-left: 24px; }
details { margin-top: 12px; padding: 0 16px; }
summary { cursor: pointer; padding: 10px 0; font-weight: 600; font-size: 14px; }
.config { columns: 3 300px; column-gap: 32px; margin: 0 0 14px; font-size: 13px; }
.config div { display: flex; gap: 12px; justify-content: space-between; break-inside: avoid; padding: 3px 0;
  border-bottom: 1px solid var(--hair); }
.config dt { color: var(--soft); flex: none; }
.config dd { margin: 0; text-align: right; overflow-wrap: anywhere; min-width: 0; }
footer { margin-top: 36px; font-size: 12.5px; color: var(--soft); }
@media (max-width: 820px) { main { padding: 22px 14px 40px; }
  .charts, .strips { grid-template-columns: minmax(0, 1fr); } }
@media (max-width: 620px) { .wide { display: none; } .narrow { display: block; } .tick { font-size: 14px; } }
@media print { body { background: none; } .chart, .tile { break-inside: avoid; } }
"""


def page(
    title: str,
    subtitle: str,
    tiles: Sequence[tuple[str, str, str]],
    sections: Sequence[tuple[str, str]],
    config: Mapping[str, Any],
) -> str:
    """HTML. `tiles` are (name, value, more) and plain text, as are title, subtitle, headings and configuration; the
    content of `sections` (heading, content) is HTML."""
    shown = "".join(
        f'<div class="tile"><dt>{escape(name)}</dt><dd class="value">{escape(value)}</dd>'
        f'<dd class="more">{escape(more)}</dd></div>'
        for name, value, more in tiles
    )
    body = "".join(f"<section><h2>{escape(heading)}</h2>{content}</section>\n" for heading, content in sections)
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{STYLE}</style></head>\n<body><main><header><h1>{escape(title)}</h1><p>{escape(subtitle)}</p>"
        f'<dl class="tiles">{shown}</dl>{_configuration(config)}</header>\n{body}'
        f"<footer>Made by accessory {escape(__version__)} from metrics.jsonl, which has every number of this page."
        "</footer></main></body></html>\n"
    )


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
