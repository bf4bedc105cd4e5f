"""How the report's page looks: its style sheet, and the script that draws the charts in the reader's colours.

Colours are Okabe and Ito's, which colour-blind readers can tell apart, a little lighter on dark paper; whatever colour
says is said by a label, a marker or a pattern too. Knows nothing of figures.
"""

from __future__ import annotations

import json

SLOTS = {
    "light": ["#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#8a8a8a", "#7a5c00"],
    "dark": ["#4aa3df", "#f0b429", "#2cc295", "#e39cc4", "#f07f3c", "#8fd0f5", "#a9a9a9", "#c9a94a"],
}
"""Colour of the n-th contender."""

THEMES = {
    "light": {"ink": "#1b1f24", "muted": "#59636e", "grid": "#e3e7eb", "paper": "#ffffff", "slots": SLOTS["light"]},
    "dark": {"ink": "#e8eaed", "muted": "#a4adb8", "grid": "#343b44", "paper": "#1b2027", "slots": SLOTS["dark"]},
}

STYLE = """
:root { color-scheme: light dark; --ink:#1b1f24; --muted:#59636e; --paper:#ffffff; --ground:#f4f6f8; --line:#d7dde3;
  --accent:#0072b2; --hit:#cfe6f6; --hit-line:#0072b2; --own:#c65a00; --warn:#fff4dc; --warn-line:#e69f00; }
@media (prefers-color-scheme: dark) { :root { --ink:#e8eaed; --muted:#a4adb8; --paper:#1b2027; --ground:#12161b;
  --line:#343b44; --accent:#4aa3df; --hit:#123f5e; --hit-line:#4aa3df; --own:#f0b429; --warn:#352a10;
  --warn-line:#b98a1c; } }
* { box-sizing: border-box; }
body { margin:0; background:var(--ground); color:var(--ink);
  font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif; }
main { max-width:1120px; margin:0 auto; padding:28px 20px 60px; }
h1 { font-size:27px; margin:0 0 4px; letter-spacing:-.01em; } h2 { font-size:20px; margin:38px 0 10px; }
h3 { font-size:15.5px; margin:0 0 6px; } p { margin:6px 0; } .muted, caption { color:var(--muted); }
nav { margin:10px 0 18px; display:flex; gap:16px; flex-wrap:wrap; } nav a, a { color:var(--accent); }
.card { background:var(--paper); border:1px solid var(--line); border-radius:10px; padding:16px 18px; margin:14px 0; }
.heads { display:grid; grid-template-columns:repeat(auto-fit,minmax(210px,1fr)); gap:12px; margin:18px 0; }
.heads .card { margin:0; } .big { font-size:31px; font-weight:650; line-height:1.15; }
.heads .name { font-weight:600; } .heads .card:first-child { border-color:var(--accent); border-width:2px; }
.notes { background:var(--warn); border-left:4px solid var(--warn-line); border-radius:6px; padding:10px 16px; }
.notes ul { margin:4px 0; padding-left:20px; }
.wide { overflow-x:auto; } table { border-collapse:collapse; width:100%; font-variant-numeric:tabular-nums; }
caption { text-align:left; padding:0 0 8px; font-size:14px; }
th, td { padding:6px 10px; border-bottom:1px solid var(--line); text-align:right; vertical-align:top; }
thead th { font-size:13px; color:var(--muted); font-weight:600; border-bottom:2px solid var(--line); }
th:first-child, td:first-child, td.text, th.text { text-align:left; } tbody tr:last-child td { border-bottom:0; }
td:first-child { white-space:nowrap; } .facts td:first-child { white-space:normal; }
td .muted { white-space:nowrap; font-size:13px; } .facts td:first-child { color:var(--muted); width:28%; }
.facts td { text-align:left; overflow-wrap:anywhere; }
.chart { width:100%; min-width:600px; min-height:200px; } .chart .modebar { opacity:.6; }
details { margin:8px 0; } summary { cursor:pointer; font-weight:600; }
.tokens { white-space:pre-wrap; overflow-wrap:anywhere; line-height:1.95; margin:8px 0;
  font:14px/1.95 ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace; }
.tokens span { border-radius:3px; padding:2px 1px; margin:0 .5px; }
.tokens .hit { background:var(--hit); box-shadow:inset 0 -2px 0 var(--hit-line); }
.tokens .own { text-decoration:underline dotted 2px var(--own); text-underline-offset:4px; }
.question { white-space:pre-wrap; overflow-wrap:anywhere; border-left:3px solid var(--line); padding-left:12px;
  color:var(--muted); max-height:9.2em; overflow:auto; }
@media print { :root { --ink:#000; --muted:#444; --paper:#fff; --ground:#fff; --line:#bbb; --accent:#004f7c;
    --hit:#cfe6f6; --hit-line:#0072b2; --own:#a34a00; --warn:#fff; --warn-line:#e69f00; color-scheme:light; }
  * { print-color-adjust:exact; -webkit-print-color-adjust:exact; } body { font-size:11.5px; } main { padding:0; }
  nav, .modebar { display:none !important; } .card { border-color:#bbb; padding:10px; }
  .drawn, tr, table, details, .sample, .heads .card { break-inside:avoid; } h2, h3 { break-after:avoid; }
  .heads { grid-template-columns:repeat(4,1fr); } .big { font-size:24px; }
  .question { max-height:none; } .wide { overflow:visible; } th, td { padding:3px 5px; } }
"""

SCRIPT = """
const THEMES = __THEMES__;
const FIGURES = JSON.parse(document.getElementById("figures").textContent);
const dark = window.matchMedia("(prefers-color-scheme: dark)");
const PRINTED_WIDTH = 680;

function dim(colour) {
  const [red, green, blue] = [1, 3, 5].map(place => parseInt(colour.slice(place, place + 2), 16));
  return .299 * red + .587 * green + .114 * blue < 110;
}

function coloured(trace, theme) {
  const slot = trace.meta.slot, colour = theme.slots[slot % theme.slots.length];
  const made = {...trace, marker: {...trace.marker, color: colour}};
  if (trace.type === "bar") {
    made.marker.line = {color: theme.paper, width: 1};
    made.textfont = {...trace.textfont, color: dim(colour) ? "#ffffff" : "#16191d"};
    if (made.marker.pattern) made.marker.pattern = {...made.marker.pattern, fillmode: "replace", bgcolor: colour,
      fgcolor: theme.paper, fgopacity: .7};
  }
  if (trace.line) made.line = {...trace.line, color: colour};
  if (trace.error_y) made.error_y = {...trace.error_y, color: theme.ink};
  return made;
}

function laidOut(layout, theme) {
  const made = {...layout, paper_bgcolor: theme.paper, plot_bgcolor: theme.paper,
    font: {...layout.font, color: theme.ink},
    hoverlabel: {bgcolor: theme.paper, bordercolor: theme.muted, font: {color: theme.ink}}};
  for (const name of Object.keys(layout).filter(key => /^[xy]axis/.test(key)))
    made[name] = {...layout[name], gridcolor: theme.grid, linecolor: theme.muted, zerolinecolor: theme.muted,
      tickfont: {...layout[name].tickfont, color: theme.ink}};
  made.shapes = (layout.shapes || []).map(shape => ({...shape, line: {...shape.line, color: theme.ink}}));
  made.annotations = (layout.annotations || []).map(note => ({...note, font: {...note.font, color: theme.muted}}));
  return made;
}

function draw(name, width) {
  const theme = THEMES[name];
  for (const figure of FIGURES) {
    const layout = laidOut(figure.layout, theme);
    if (width) { layout.width = width; layout.autosize = false; }
    Plotly.react(figure.id, figure.data.map(trace => coloured(trace, theme)), layout,
      {responsive: !width, displaylogo: false, modeBarButtons: [["toImage", "resetScale2d"]]});
  }
}

const onScreen = () => draw(dark.matches ? "dark" : "light");
onScreen();
dark.addEventListener("change", onScreen);
let closed = [];
window.addEventListener("beforeprint", () => {
  closed = [...document.querySelectorAll("details:not([open])")];
  closed.forEach(part => { part.open = true; });
  draw("light", PRINTED_WIDTH);
});
window.addEventListener("afterprint", () => { closed.forEach(part => { part.open = false; }); onScreen(); });
"""


def script() -> str:
    """The script with its colours."""
    return SCRIPT.replace("__THEMES__", json.dumps(THEMES))
