const THEMES = {{ themes | tojson }};
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
