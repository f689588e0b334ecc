"""The style of a report's page, for light and dark mode, wide and narrow windows, and paper.

Names that begin with `--bk-` are Bokeh's: it draws axes and their texts in these colours. Lines have one colour in both
modes, which is made brighter in the dark.
"""

from accessory.train.report.frame import ALARM, GREY, ONE, TWO

STYLE = (
    f"""
:root {{ --one: {ONE}; --two: {TWO}; --alarm: {ALARM}; --grey: {GREY}; }}"""
    """
:root { color-scheme: light dark; --card: #fff; --ink: #1b1f24; --soft: #5c6670; --hair: #e3e7eb; --edge: #cfd6dc;
  --back: #f5f7f9;
  --bk-major-label-text-color: var(--soft); --bk-axis-label-text-color: var(--soft);
  --bk-axis-label-text-font-size: 11px; --bk-axis-line-color: var(--edge); --bk-major-tick-line-color: var(--edge);
  --bk-grid-line-color: var(--hair); --bk-major-label-text-font: var(--font); --bk-axis-label-text-font: var(--font);
  --font: system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "Liberation Sans", sans-serif; }
@media (prefers-color-scheme: dark) { :root { --card: #1b1f23; --ink: #e6e9ec; --soft: #9aa5af; --hair: #2b3137;
  --edge: #414a52; --back: #101215; }
  .chart .picture, .key::before { filter: brightness(1.2); } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--ink); font: 15px/1.5 var(--font);
  font-variant-numeric: tabular-nums; }
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
.chart.wide { grid-column: 1 / -1; }
figcaption { display: flex; flex-wrap: wrap; justify-content: space-between; gap: 0 16px; margin-bottom: 6px; }
.legend { margin: 0; font-size: 12px; display: flex; flex-wrap: wrap; gap: 0 14px; }
.key { display: inline-flex; align-items: center; gap: 6px; }
.key::before { content: ""; width: 16px; height: 2.5px; border-radius: 2px; background: var(--one); }
.key.raw::before { opacity: .4; }
.key.points::before { background: var(--two); }
.key.failed::before { background: var(--alarm); width: 2px; height: 11px; }
.key.reference::before { height: 0; border-radius: 0; border-top: 1.5px dashed var(--grey); background: none; }
.key.band::before { height: 10px; opacity: .2; }
.bk-Tooltip { --tooltip-color: var(--card); --tooltip-text: var(--ink); --tooltip-border: var(--edge);
  --icon-color: var(--soft); }
.sheet { padding: 16px 18px 12px; }
.pictures { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 8px 24px; }
.scale { display: flex; flex-wrap: wrap; align-items: flex-start; gap: 2px 16px; margin-bottom: 14px; }
.scale > div { width: 300px; max-width: 100%; }
.scale p { margin: 0; font-size: 13px; }
.ramp { height: 14px; border: 1px solid var(--edge); }
.levels { display: flex; justify-content: space-between; font-size: 11.5px; color: var(--soft); }
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
  .charts, .pictures { grid-template-columns: minmax(0, 1fr); } }
@media print { body { background: none; } .chart, .tile { break-inside: avoid; } }
"""
)
