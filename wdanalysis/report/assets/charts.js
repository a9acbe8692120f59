// The linked charts: ΔM against ΔD, a panel a method; both by layer and by step; heat maps; predictions. All draw one source
// of points, so that what is selected in one is selected in all. Colours follow the page's light or dark scheme.
"use strict";

const SIZE = 8; // of every marker

/** What a point says; Bokeh escapes the values. */
const TOOLTIP = [
  ["method", "method"], ["module", "row"], ["layer", "layer_text"], ["step", "step_text"], ["ΔM", "m_text"], ["ΔD", "d_text"], ["matrix", "name"],
].map(([label, field]) => `<div style="color: #1b1d1f"><span style="color: #575c61">${label}</span> @${field}</div>`).join("");

let source = null; // of all points
let fixedColumns = null;
let drawn = null; // the document that holds the charts
let charts = null;
let selectedTable = null;

const axisOf = (axes) => (Array.isArray(axes) ? axes[0] : axes);
const ink = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const emptySource = (...names) => new Bokeh.ColumnDataSource({ data: Object.fromEntries(names.map((name) => [name, []])) });

function setRange(range, [start, end]) {
  Object.assign(range, { start, end, reset_start: start, reset_end: end });
}

/** An empty chart with its tools, in the page's colours. */
function chart(height, { y_axis_type = "auto", y_range = new Bokeh.Range1d() } = {}) {
  const [colour, quiet, rule, panel] = ["--ink", "--quiet", "--rule", "--panel"].map(ink);
  const plot = Bokeh.Plotting.figure({
    sizing_mode: "stretch_width", height, min_width: 200, y_axis_type, tools: [], toolbar_location: "above",
    x_range: new Bokeh.Range1d(), y_range,
    background_fill_color: panel, border_fill_color: null, outline_line_color: null, min_border_right: 12,
  });
  plot.toolbar.logo = null;
  const select = new Bokeh.BoxSelectTool();
  plot.add_tools(select, new Bokeh.BoxZoomTool(), new Bokeh.PanTool(), new Bokeh.ResetTool());
  plot.toolbar.active_drag = matchMedia("(pointer: coarse)").matches ? null : select; // a finger scrolls the page
  for (const axis of [plot.xaxis, plot.yaxis].flat()) {
    Object.assign(axis, {
      axis_label_text_color: colour, major_label_text_color: quiet, axis_line_color: quiet, major_tick_line_color: quiet, minor_tick_line_color: null,
      axis_label_text_font_style: "normal", axis_label_text_font_size: "14px", major_label_text_font_size: "12px",
    });
  }
  if (y_axis_type === "log") axisOf(plot.yaxis).ticker = new Bokeh.LogTicker({ mantissas: [1, 2, 5], desired_num_ticks: 5 });
  for (const grid of [plot.xgrid, plot.ygrid].flat()) grid.grid_line_color = rule;
  return plot;
}

/** Let a glyph of the common source say what it is of, and fade where others are selected. */
const FADED = { nonselection_fill_alpha: 0.04, nonselection_line_alpha: 0.12 };
const linked = (filter) => ({ source, view: new Bokeh.CDSView({ filter }), ...FADED });
const nothing = () => new Bokeh.BooleanFilter({ booleans: [] });
const hover = (plot, glyph) => plot.add_tools(new Bokeh.HoverTool({ renderers: [glyph], tooltips: TOOLTIP }));

/** Points of the common source, of which `filter` chooses. */
function points(plot, x, y, filter, colour) {
  hover(plot, plot.scatter({ field: x }, { field: y }, {
    ...linked(filter), size: SIZE, marker: { field: "marker" },
    line_color: colour, fill_color: colour, fill_alpha: { field: "filled" }, line_width: 1.2,
  }));
}

/** Put a chart into its place on the page. */
function added(place, plot, label) {
  const caption = element("figcaption");
  const target = element("div");
  document.getElementById(place).append(element("figure", { "aria-label": label }, caption, target));
  drawn.add_root(plot);
  return { plot, caption, target };
}

/** The colours of layers, or of a quantity, as a field of a source. */
function coloured(field, [low, high]) {
  return { field, transform: new Bokeh.LinearColorMapper({ palette: layerColours(), low, high, nan_color: "#9a9a9a" }) };
}
const byLayer = () => coloured("layer", [knownLayers[0] ?? 0, knownLayers.length > 1 ? knownLayers.at(-1) : (knownLayers[0] ?? 0) + 1]);

const inBrackets = (ends) => (ends ? ` [${ends.join(", ")}]` : "");

/** What the table of correlations says of a method in the chosen module, over all layers and steps. */
function beforeFilters(method) {
  const row = correlationOf("pooled", method, chosenModule());
  const told = (...names) => names.every((name) => Number.isFinite(row?.[name])) && names.map((name) => fixed(row[name]));
  const [r, interval, out, nullR, band] = [told("pearson_r"), told("r_low", "r_high"), told("leave_out_low", "leave_out_high"), told("r_null"), told("r_null_low", "r_null_high")];
  if (!r) return [];
  return [
    `all: r = ${r}${inBrackets(interval)}`,
    ...(out ? [`one layer out: ${out.join(" … ")}`] : []),
    ...(nullR ? [`null: ${nullR}${inBrackets(band)}`] : []),
  ];
}

/** ΔM against ΔD of one method. */
function scatterOf(method, place) {
  const plot = chart(300);
  const filter = nothing();
  const [grey, line, band] = [emptySource("x", "y", "low", "high"), emptySource("x", "y"), emptySource("x", "low", "high")];
  plot.segment({ field: "x" }, { field: "low" }, { field: "x" }, { field: "high" }, { source: grey, line_color: NULL_COLOUR, line_width: 3, line_alpha: 0.3 });
  plot.scatter({ field: "x" }, { field: "y" }, { source: grey, size: 4, line_color: null, fill_color: NULL_COLOUR, fill_alpha: 0.8 });
  plot.varea({ x: { field: "x" }, y1: { field: "low" }, y2: { field: "high" }, source: band, fill_color: ink("--ink"), fill_alpha: 0.12 });
  points(plot, "x", "y", filter, byLayer());
  plot.line({ field: "x" }, { field: "y" }, { source: line, line_color: ink("--ink"), line_width: 2 });
  const view = { ...added("scatters", plot, `ΔM against ΔD, ${method}`), method, filter, line, band, grey };

  view.update = ({ visible, indices }) => {
    const mine = indices.filter((i) => point.method[i] === method);
    view.caption.closest("figure").hidden = !methodBoxes[place].checked;
    const framed = sharedBox.checked ? indices : mine;
    const ghosts = nulls.filter((row) => isShown(row) && (sharedBox.checked || row.method === method));
    const [dx, dy] = ["delta_d", "delta_m"].map((name) => withRoom(extent(framed.map((i) => point[name][i])), ghosts.map((row) => row[name])));
    const [ux, uy] = [unit(dx), unit(dy)];
    const across = (list) => list.map((value) => value / 10 ** ux);
    const up = (list) => list.map((value) => value / 10 ** uy);
    axisOf(plot.xaxis).axis_label = axisName("ΔD", ux);
    axisOf(plot.yaxis).axis_label = axisName("ΔM", uy);
    setRange(plot.x_range, limits(across(dx)));
    setRange(plot.y_range, limits(up(dy)));
    const [x, y] = ["delta_d", "delta_m"].map((name) => mine.map((i) => point[name][i]));
    const found = fit(x, y);
    const ends = extent(x);
    line.data = found ? { x: across(ends), y: up(ends.map(found.at)) } : { x: [], y: [] };
    const whole = stepRange.isWhole() && layerRange.isWhole() && slopeBand(correlationOf("pooled", method, chosenModule()), x);
    band.data = whole ? { x: across(whole.x), low: up(whole.low), high: up(whole.high) } : { x: [], low: [], high: [] };
    const own = ghosts.filter((row) => row.method === method);
    const of = (name) => own.map((row) => row[name]);
    grey.data = { x: across(of("delta_d")), y: up(of("delta_m")), low: up(of("delta_m_low")), high: up(of("delta_m_high")) };
    filter.booleans = visible.map((is, i) => is && point.method[i] === method);
    const isBeyond = (value, range) => !(value >= range.start && value <= range.end);
    const beyond = own.filter((row) => isBeyond(row.delta_d / 10 ** ux, plot.x_range) || isBeyond(row.delta_m / 10 ** uy, plot.y_range)).length;
    view.caption.replaceChildren(element("strong", {}, method), ...beforeFilters(method).flatMap((text) => [text, element("br")]),
      ...(beyond ? [`${beyond} null ${beyond === 1 ? "dot lies" : "dots lie"} beyond the axes`, element("br")] : []),
      found ? `shown: r = ${number(found.r, 3)}, slope = ${number(found.slope)}, n = ${x.length}` : `n = ${x.length}: no line`);
    view.units = [10 ** ux, 10 ** uy];
  };
  return view;
}

/** The panels that predictions have: a method, a law and what it predicts. */
const predictionPanels = () => [...new Map(predictions.map((row) => [JSON.stringify([row.method, row.law, row.quantity]), row])).values()];

/** R² of predictions themselves, without a line through the points: of several runs the least and the largest. */
function rSquaredOfRuns(rows) {
  const found = distinct(rows.map(({ run }) => run)).map((run) => rSquared(rows.filter((row) => row.run === run))).sort((a, b) => a - b);
  return distinct([found[0], found.at(-1)]).map((r2) => (Number.isFinite(r2) ? fixed(r2) : "–")).join(" … ");
}

function rSquared(rows) {
  const centre = mean(rows.map(({ observed }) => observed));
  const sum = (f) => rows.reduce((total, row) => total + f(row) ** 2, 0);
  const spread = sum(({ observed }) => observed - centre);
  return spread > 0 ? 1 - sum(({ observed, predicted }) => observed - predicted) / spread : NaN;
}

/** What a law predicts of a method, and what was observed. */
function predictionOf({ method, law, quantity }) {
  const plot = chart(300);
  const [data, equal] = [emptySource("x", "y", "layer"), emptySource("x", "y")];
  plot.line({ field: "x" }, { field: "y" }, { source: equal, line_color: NULL_COLOUR, line_width: 1.5 });
  plot.scatter({ field: "x" }, { field: "y" }, { source: data, size: SIZE, line_color: byLayer(), fill_color: byLayer(), fill_alpha: 0.85 });
  const view = { ...added("predictions", plot, `predicted and observed, ${method}`), data };

  view.update = () => {
    const mine = predictions.filter((row) => row.method === method && row.law === law && row.quantity === quantity && isShown(row));
    view.caption.closest("figure").hidden = !mine.length;
    const ends = extent(mine.flatMap(({ predicted, observed }) => [predicted, observed]));
    const exponent = unit(ends);
    const scaled = (name) => mine.map((row) => row[name] / 10 ** exponent);
    const label = LABELS[quantity] ?? quantity;
    axisOf(plot.xaxis).axis_label = axisName(`predicted ${label}`, exponent);
    axisOf(plot.yaxis).axis_label = axisName(`observed ${label}`, exponent);
    const both = limits(ends.map((value) => value / 10 ** exponent));
    setRange(plot.x_range, both);
    setRange(plot.y_range, both);
    equal.data = { x: both, y: both };
    data.data = { x: scaled("predicted"), y: scaled("observed"), layer: mine.map(({ layer }) => layer ?? NaN) };
    view.caption.replaceChildren(element("strong", {}, method), element("span", {}, `${law.replaceAll("_", " ")}: R² = ${rSquaredOfRuns(mine)}, n = ${mine.length}`));
  };
  return view;
}

/** A quantity over layers or steps, a colour a method. `lines` gives from the points shown
 * each line, and the ends of its band where it has one. */
function profileOf(place, [name, label], over, x, { at, lines }) {
  const plot = chart(320, { y_axis_type: logBox.checked ? "log" : "linear" });
  const filter = nothing();
  const [half, line] = [emptySource("x", "y", "colour"), emptySource("x", "y", "colour")];
  plot.patches({ field: "x" }, { field: "y" }, { source: half, fill_color: { field: "colour" }, fill_alpha: 0.18, line_color: null });
  points(plot, x, `profile_${name}`, filter, { field: "colour" });
  plot.multi_line({ field: "x" }, { field: "y" }, { source: line, line_color: { field: "colour" }, line_width: 2, line_alpha: 0.85 });
  axisOf(plot.xaxis).axis_label = over;
  const view = { ...added(place, plot, `${label} by ${over}`), name, filter, line, half };

  view.update = ({ visible, indices, units }) => {
    const ends = extent(indices.map((i) => point[name][i]).filter((value) => !logBox.checked || value > 0));
    const scaled = ends.map((value) => value / units[name]);
    axisOf(plot.yaxis).axis_label = logBox.checked ? `${label}  (logarithmic)` : axisName(label, Math.round(Math.log10(units[name])));
    setRange(plot.y_range, !Number.isFinite(scaled[0]) ? [0.1, 1] : logBox.checked ? [scaled[0] / 1.3, scaled[1] * 1.3] : [0, 1.06 * scaled[1] || 1]);
    const known = indices.map(at).filter((value) => value !== null);
    const [low, high] = extent(known);
    const margin = over === "layer" ? 0.5 : 0.04 * (high - low) || 1;
    setRange(plot.x_range, known.length ? [low - margin, high + margin] : [0, 1]);
    const found = lines(indices, (i) => point[name][i] / units[name]);
    const drawnAs = (some, x, y) => ({ x: some.map(x), y: some.map(y), colour: some.map((one) => methodColour(one.method)) });
    line.data = drawnAs(found, (one) => one.x, (one) => one.y);
    half.data = drawnAs(found.filter((one) => one.low), (one) => [...one.x, ...[...one.x].reverse()], (one) => [...one.low, ...[...one.high].reverse()]);
    filter.booleans = visible;
  };
  return view;
}

/** A line a method and module: its last step that is shown, by layer. */
function linesByLayer(indices, value) {
  const known = atLastStep(indices.filter((i) => point.layer[i] !== null));
  return [...grouped(known, (i) => JSON.stringify([point.method[i], point.row[i]])).values()].map((mine) => {
    const of = grouped(mine, (i) => point.layer[i]);
    const x = inOrder([...of.keys()]);
    return { method: point.method[mine[0]], x, y: x.map((layer) => median(of.get(layer).map(value))) };
  });
}

/** A line a method: the median over layers at each step, and the middle half of them. */
function linesByStep(indices, value) {
  const known = indices.filter((i) => point.step[i] !== null);
  return [...grouped(known, (i) => point.method[i])].map(([method, mine]) => {
    const of = grouped(mine, (i) => point.step[i]);
    const x = inOrder([...of.keys()]);
    const quantiles = (share) => x.map((step) => quantile(of.get(step).map(value), share));
    return { method, x, y: quantiles(0.5), low: quantiles(0.25), high: quantiles(0.75) };
  });
}

/** ΔM or ΔD of one method by layer and module, at the last of its steps that are shown. */
function heatmapOf(method, rows, mapper) {
  const plot = chart(32 * rows.length + 90, { y_range: new Bokeh.FactorRange({ factors: [...rows].reverse() }) });
  const filter = nothing();
  hover(plot, plot.rect({ field: "place" }, { field: "row" }, 1, 0.96, {
    ...linked(filter), fill_color: mapper, line_color: null, nonselection_fill_alpha: 0.2,
  }));
  axisOf(plot.xaxis).axis_label = "layer";
  for (const grid of [plot.xgrid, plot.ygrid].flat()) grid.visible = false;
  const view = { ...added("heatmaps", plot, `heat map, ${method}`), filter };

  view.update = ({ heat }) => {
    const mine = heat.filter((i) => point.method[i] === method);
    view.caption.closest("figure").hidden = !mine.length;
    const [low, high] = extent(mine.map((i) => places.get(point.layer[i])));
    setRange(plot.x_range, [low - 0.5, high + 0.5]);
    const chosen = new Set(mine);
    filter.booleans = shown.map((_, i) => chosen.has(i));
    const step = mine.length && point.step[mine[0]];
    view.caption.replaceChildren(element("strong", {}, method), step === null ? "" : `step ${step}`);
  };
  return view;
}

const heatChoice = element("select", { id: "heat", "aria-label": "Heat map of" }, ...options(QUANTITIES, ([, label]) => label, 0));
heatChoice.addEventListener("change", () => update());

/** Columns of the common source that no filter changes. */
function columnsOfPoints() {
  return {
    place: point.layer.map((layer) => places.get(layer)),
    step: point.step.map((step) => step ?? NaN),
    layer: point.layer.map((layer) => layer ?? NaN),
    marker: point.step.map((step) => markers.get(step)),
    filled: point.marked.map((is) => (is ? 0 : 0.85)),
    colour: point.method.map(methodColour),
    method: point.method, row: point.row, name: point.name,
    layer_text: point.layer.map((layer) => layer ?? "none"), step_text: point.step.map((step) => step ?? "not known"),
    m_text: point.delta_m.map((value) => number(value, 4)), d_text: point.delta_d.map((value) => number(value, 4)),
  };
}

/** Build every chart anew: at the start, and when the scheme or the kind of an axis changes. */
async function build() {
  const chosen = source?.selected.indices ?? [];
  source = new Bokeh.ColumnDataSource({ data: {} });
  fixedColumns = columnsOfPoints();
  drawn?.clear(); // takes its views away
  const current = (drawn = new Bokeh.Document());
  for (const id of ["scatters", "profiles", "trajectories", "heatmaps", "predictions"]) document.getElementById(id)?.replaceChildren();
  const heatColours = coloured("heat", [0, 1]);
  const rows = distinct(point.row);
  charts = {
    heatColours,
    scatters: methods.map(scatterOf),
    predictions: predictionPanels().map(predictionOf),
    profiles: QUANTITIES.map((quantity) => profileOf("profiles", quantity, "layer", "place", { at: (i) => places.get(point.layer[i]), lines: linesByLayer })),
    trajectories: knownSteps.length > 1 ? QUANTITIES.map((quantity) => profileOf("trajectories", quantity, "step", "step", { at: (i) => point.step[i], lines: linesByStep })) : [],
    heatmaps: knownLayers.length > 1 ? methods.map((method) => heatmapOf(method, rows, heatColours)) : [],
  };
  legends();
  source.selected.indices = chosen;
  source.selected.connect(source.selected.properties.indices.change, () => tell());
  update();
  await Bokeh.embed.add_document_standalone(current, document.body, views().map(({ target }) => target));
}

const views = () => [charts.scatters, charts.predictions, charts.profiles, charts.trajectories, charts.heatmaps].flat();

/** Show what the filters leave. */
function update() {
  const rows = shown.map((_, i) => rowAt(i));
  const visible = rows.map(isShown);
  const indices = visible.flatMap((is, i) => (is ? [i] : []));
  const heat = atLastStep(rows.flatMap((row, i) => (isOfRows(row) ? [i] : []))).filter((i) => point.layer[i] !== null); // of every module
  const units = Object.fromEntries(QUANTITIES.map(([name]) => [name, logBox.checked ? 1 : 10 ** unit(extent(indices.map((i) => point[name][i])))]));
  for (const view of views()) view.update({ visible, indices, heat, units });
  const scales = new Map(charts.scatters.map((view) => [view.method, view.units]));
  const [quantity] = QUANTITIES[+heatChoice.value];
  showHeatScale(extent(heat.map((i) => point[quantity][i]).filter((value) => !logBox.checked || value > 0)));
  source.data = {
    ...fixedColumns,
    x: point.delta_d.map((value, i) => value / scales.get(point.method[i])[0]),
    y: point.delta_m.map((value, i) => value / scales.get(point.method[i])[1]),
    profile_delta_m: point.delta_m.map((value) => value / units.delta_m),
    profile_delta_d: point.delta_d.map((value) => value / units.delta_d),
    heat: point[quantity].map((value) => (logBox.checked ? Math.log10(value) : value)),
  };
  const seen = new Set([...indices, ...heat]);
  source.selected.indices = source.selected.indices.filter((i) => seen.has(i));
  tell(indices.length);
}

/** One scale for the heat maps of all methods, from the least to the largest. */
function showHeatScale([low, high]) {
  const scaled = (value) => (logBox.checked ? Math.log10(value) : value);
  Object.assign(charts.heatColours.transform, { low: scaled(low), high: scaled(high) });
  const legend = document.getElementById("heat-legend");
  legend.replaceChildren(heatChoice, element("span", {}, number(low), element("span", { class: "scale", style: `background: linear-gradient(90deg, ${layerColours().join(",")})` }), number(high)),
    element("span", {}, `one scale for all methods${logBox.checked ? ", logarithmic" : ""}; each method’s last step shown, every module`));
}

/** Say in words what is shown and what is selected, and list the latter. */
function tell(count = shown.filter((_, i) => isShown(rowAt(i))).length) {
  const chosen = [...source.selected.indices].sort((a, b) => a - b);
  const where = (name) => {
    const known = inOrder(chosen.map((i) => point[name][i])).filter((value) => value !== null);
    return known.length ? `, ${name}${known.length > 1 ? `s ${known[0]}–${known.at(-1)}` : ` ${known[0]}`}` : "";
  };
  const selection = chosen.length ? `; ${chosen.length} selected${where("layer")}${where("step")}.` : ".";
  document.getElementById("status").textContent = `${count} of ${shown.length} points shown${selection}`;
  document.getElementById("clear").disabled = !chosen.length;
  document.getElementById("selected").hidden = !chosen.length;
  selectedTable ??= drawTable(document.getElementById("selected-table"), metrics, { file: "selected.csv", caption: "The rows of the selected points", rows: [] });
  selectedTable.show(chosen.map((i) => shown[i]));
}

function legends() {
  const noisy = point.marked.filter(Boolean).length;
  document.getElementById("scatter-legend").replaceChildren(
    ...layerLegend(),
    ...(stepRanges.length > 1 ? [element("span", {}, "step"), ...stepRanges.map(({ sign, name }) => element("span", {}, `${sign} ${name}`))] : []),
    element("span", {}, "line: least squares over the points shown"),
    element("span", {}, "band: 95 % of its slope, where all steps and layers are shown"),
    ...(nulls.length ? [element("span", {}, element("span", { class: "swatch", style: `background: ${NULL_COLOUR}` }), "null: updates without structure")] : []),
    ...(noisy ? [element("span", {}, `○ hollow: ${report.marked.why} (${noisy} of ${shown.length})`)] : []));
  const said = { "layer-title": "line: a method’s last step shown", "step-title": "line: median over layers; band: the middle half of them" };
  for (const [title, meaning] of Object.entries(said)) {
    document.querySelector(`#${title} + .methods`).replaceChildren(...methods.map((method) =>
      element("span", {}, element("span", { class: "swatch", style: `background: ${methodColour(method)}` }), method)), element("span", {}, meaning));
  }
  for (const swatch of document.querySelectorAll("#filters .swatch")) swatch.style.background = methodColour(methods[swatch.dataset.method]);
  for (const [title, list] of [["step-title", charts.trajectories], ["heat-title", charts.heatmaps]]) {
    const heading = document.getElementById(title);
    heading.hidden = heading.nextElementSibling.hidden = !list.length;
    links.get(title).hidden = !list.length;
  }
}

form.addEventListener("submit", (event) => event.preventDefault());
form.addEventListener("change", (event) => { remember(); (event.target === logBox ? build : update)(); });
form.addEventListener("reset", () => setTimeout(() => { defaults(); remember(); build(); }));
document.getElementById("clear").addEventListener("click", () => { source.selected.indices = []; });
dark.addEventListener("change", () => build());
if (shown.length) {
  defaults();
  const { section, chosen } = readAddress();
  if (chosen) chooseFilters(chosen);
  build().then(() => { if (chosen) document.getElementById(section)?.scrollIntoView(); });
  addEventListener("hashchange", () => follow(build));
} else {
  document.getElementById("explore").querySelectorAll("h3, .legend, #filter-box").forEach((part) => part.remove());
  document.getElementById("status").textContent = "No matrix has both values: there is nothing to draw.";
}
