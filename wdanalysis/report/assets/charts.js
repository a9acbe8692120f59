// The charts: ΔM against ΔD, a panel a method, and both by layer. All draw one source of points, so that what is selected
// in one is selected in all. Colours follow the page's light or dark scheme.
"use strict";

const MARKERS = [["circle", "●"], ["square", "■"], ["triangle", "▲"], ["diamond", "◆"], ["inverted_triangle", "▼"], ["hex", "⬢"], ["star", "★"]];
const { squashed: SQUASHED, least_share: LEAST_SHARE, null_room: NULL_ROOM } = report.rules; // as on the figures
const dark = matchMedia("(prefers-color-scheme: dark)");

const metrics = report.tables.metrics;
const shown = []; // the rows of the metrics table that have both values: the points
const [allM, allD] = [values(metrics, "delta_m"), values(metrics, "delta_d")];
for (let row = 0; row < metrics.rows; row++) if (allM[row] !== null && allD[row] !== null) shown.push(row);
const column = (name) => {
  const all = values(metrics, name);
  return shown.map((row) => all?.[row] ?? null);
};
const point = Object.fromEntries(["method", "module", "name", "step", "layer", "delta_m", "delta_d"].map((name) => [name, column(name)]));
point.marked = shown.map((row) => report.marked.rows[row] === 1); // rounding decides its ΔD
const rowsOf = (table) => {
  const columns = (table?.columns ?? []).map(({ name }) => [name, values(table, name)]);
  return [...Array(table?.rows ?? 0).keys()].map((row) => Object.fromEntries(columns.map(([name, all]) => [name, all[row]])));
};
const nulls = rowsOf(report.tables.null); // where updates without structure would lie
const pooled = rowsOf(report.tables.correlations).filter(({ scope }) => scope === "pooled");
const predictions = rowsOf(report.tables.predictions).filter(({ predicted, observed }) => predicted !== null && observed !== null);
const distinct = (list) => [...new Set(list)];
const inOrder = (list) => distinct(list).sort((a, b) => (a === null) - (b === null) || a - b); // not known: last
const methods = distinct(values(metrics, "method"));
const modules = distinct(values(metrics, "module"));
const steps = inOrder(point.step);
const layers = inOrder(point.layer);
const places = new Map(layers.map((layer) => [layer, layer ?? (layers.at(-2) ?? -1) + 1])); // no layer: right of the last

function methodColour(method) {
  const colours = report.colours.methods;
  const colour = colours[methods.indexOf(method) % colours.length];
  return dark.matches && colour === "#000000" ? "#ffffff" : colour;
}

/** Markers of steps: a range of steps shares one where there are more than markers. */
const perMarker = Math.ceil(steps.length / MARKERS.length);
const markerOf = (step) => MARKERS[Math.floor(steps.indexOf(step) / perMarker)];

// Controls

const form = document.getElementById("filters");
const control = (label, ...inputs) => element("div", { class: "control" }, ...inputs.map((input, place) => {
  if (!place) return element("label", {}, element("span", { class: "quiet" }, label), element("br"), input);
  input.setAttribute("aria-label", label);
  return input;
}));
const options = (list, name, chosen) => list.map((value, place) => element("option", { value: place, selected: place === chosen }, name(value)));
const range = (label, list, name) => {
  const ends = [["from", 0], ["to", list.length - 1]].map(([end, chosen]) => ({ end, select: element("select", { id: `${label}-${end}` }, ...options(list, name, chosen)) }));
  const box = element("fieldset", {}, element("legend", {}, label[0].toUpperCase() + label.slice(1) + "s"),
    element("div", { class: "options" }, ...ends.map(({ end, select }) => element("label", {}, end, select))));
  const [from, to] = ends.map(({ select }) => select);
  return { box, holds: (value) => list.indexOf(value) >= +from.value && list.indexOf(value) <= +to.value };
};
const moduleChoice = element("select", { id: "module" }, ...options(modules, String, 0), ...(modules.length > 1 ? [element("option", { value: -1 }, "all")] : []));
const methodBoxes = methods.map((method) => element("input", { type: "checkbox", checked: true }));
const stepRange = range("step", steps, (step) => (step === null ? "not known" : String(step)));
const layerRange = range("layer", layers, (layer) => (layer === null ? "none" : String(layer)));
const logBox = element("input", { type: "checkbox", id: "log" });
const sharedBox = element("input", { type: "checkbox", id: "shared" });
form.append(
  control("Module", moduleChoice),
  element("fieldset", {}, element("legend", {}, "Methods"), element("div", { class: "options" }, ...methods.map((method, place) =>
    element("label", {}, methodBoxes[place], element("span", { class: "swatch", "data-method": place, "aria-hidden": "true" }), method)))),
  ...(steps.length > 1 ? [stepRange.box] : []),
  ...(layers.length > 1 ? [layerRange.box] : []),
  element("fieldset", {}, element("legend", {}, "Axes"), element("div", { class: "options" },
    ...(methods.length > 1 ? [element("label", {}, sharedBox, "same for all methods")] : []), element("label", {}, logBox, "logarithmic by layer"))),
  element("button", { type: "button", id: "clear" }, "Clear selection"),
  element("button", { type: "reset" }, "Reset"));

const isShown = ({ method, module, step, layer }) =>
  (+moduleChoice.value < 0 || module === modules[+moduleChoice.value]) &&
  methodBoxes[methods.indexOf(method)].checked && stepRange.holds(step) && layerRange.holds(layer);
const isVisible = (i) => isShown({ method: point.method[i], module: point.module[i], step: point.step[i], layer: point.layer[i] });

// Numbers

const extent = (list) => list.reduce(([low, high], value) => [Math.min(low, value), Math.max(high, value)], [Infinity, -Infinity]);
const mean = (list) => list.reduce((sum, value) => sum + value, 0) / list.length;
/** The middle value, or the mean of the two in the middle (as pandas has it on the figures). */
const median = (list) => {
  const sorted = [...list].sort((a, b) => a - b);
  return (sorted[Math.floor((sorted.length - 1) / 2)] + sorted[Math.floor(sorted.length / 2)]) / 2;
};

/** Pearson's r and the least-squares line of y on x; null where there is none (as in regression.py). */
function fit(x, y) {
  if (x.length < 3) return null;
  const [x0, y0] = [mean(x), mean(y)];
  const sum = (f) => x.reduce((total, _, i) => total + f(x[i] - x0, y[i] - y0), 0);
  const [xx, yy, xy] = [sum((u) => u * u), sum((_, v) => v * v), sum((u, v) => u * v)];
  const flat = [x, y].some((list) => { const [low, high] = extent(list); return high - low <= 1e-12 * Math.max(Math.abs(low), Math.abs(high)); });
  return flat ? null : { r: Math.max(-1, Math.min(1, xy / Math.sqrt(xx * yy))), slope: xy / xx, at: (value) => y0 + (xy / xx) * (value - x0) };
}

const LABELS = { delta_m: "ΔM", delta_d: "ΔD" };
const NULL_COLOUR = "#a9a9a9";

/** The panels that predictions have: a method, a law and what it predicts. */
const panelsOf = (rows) => [...new Map(rows.map((row) => [JSON.stringify([row.method, row.law, row.quantity]), row])).values()];

/** R² of predictions themselves, without a line through the points: of several runs the least and the largest. */
function rSquaredOfRuns(rows) {
  const found = distinct(rows.map(({ run }) => run)).map((run) => rSquared(rows.filter((row) => row.run === run))).sort((a, b) => a - b);
  return distinct([found[0], found.at(-1)]).map((r2) => (Number.isFinite(r2) ? r2.toFixed(2).replace("-", "−") : "–")).join(" … ");
}

function rSquared(rows) {
  const mean = rows.reduce((total, { observed }) => total + observed, 0) / rows.length;
  const sum = (f) => rows.reduce((total, row) => total + f(row) ** 2, 0);
  const spread = sum(({ observed }) => observed - mean);
  return spread > 0 ? 1 - sum(({ observed, predicted }) => observed - predicted) / spread : NaN;
}

/** What the table of correlations says of a method in the chosen module, over all layers and steps. */
function beforeFilters(method) {
  const row = pooled.find((candidate) => candidate.method === method && candidate.module === modules[+moduleChoice.value]);
  const shown = (...names) => names.every((name) => Number.isFinite(row?.[name])) && names.map((name) => row[name].toFixed(2).replace("-", "−"));
  const [r, interval, out, nullR, band] = [shown("pearson_r"), shown("r_low", "r_high"), shown("leave_out_low", "leave_out_high"), shown("r_null"), shown("r_null_low", "r_null_high")];
  if (!r) return [];
  const inBrackets = (ends) => (ends ? ` [${ends.join(", ")}]` : "");
  return [
    `all: r = ${r}${inBrackets(interval)}`,
    ...(out ? [`one layer out: ${out.join(" … ")}`] : []),
    ...(nullR ? [`null: ${nullR}${inBrackets(band)}`] : []),
  ];
}

/** Limits that reach out for updates without structure, as far as the figures do. */
function withRoom([low, high], others) {
  if (!others.length || !(high >= low)) return [low, high];
  const room = NULL_ROOM * (high - low);
  const [least, most] = extent(others);
  return [Math.max(low - room, Math.min(low, least)), Math.min(high + room, Math.max(high, most))];
}

/** The power of ten in which a linear axis counts: 0 for numbers that are short as they are. */
function unit([low, high]) {
  const largest = Math.max(Math.abs(low), Math.abs(high));
  const exponent = largest > 0 && Number.isFinite(largest) ? Math.floor(Math.log10(largest)) : 0;
  return exponent >= -2 && exponent <= 3 ? 0 : exponent;
}
const axisName = (name, exponent) => (exponent ? `${name}  (${powerOfTen(exponent)})` : name);

/** Limits with a margin, so that the points and not the line decide what is seen. */
function limits([low, high]) {
  if (!Number.isFinite(low)) return [0, 1];
  const margin = 0.07 * (high - low) || 0.1 * Math.abs(high) || 1;
  return [low - margin, high + margin];
}
const fillShared = () => {
  const all = ["delta_d", "delta_m"].map((name) => extent(point[name]));
  return methods.every((method) => ["delta_d", "delta_m"].every((name, axis) => {
    const [low, high] = extent(point[name].filter((_, i) => point.method[i] === method));
    return !(high > low) || high - low >= LEAST_SHARE * (all[axis][1] - all[axis][0]);
  }));
};
const squashes = (name) => {
  const medians = methods.map((method) => median(point[name].filter((_, i) => point.method[i] === method))).filter((value) => value > 0);
  return medians.length > 1 && Math.max(...medians) > SQUASHED * Math.min(...medians);
};

// Charts

/** What a point says; Bokeh escapes the values. */
const TOOLTIP = [
  ["method", "method"], ["module", "module"], ["layer", "layer_text"], ["step", "step_text"], ["ΔM", "m_text"], ["ΔD", "d_text"], ["matrix", "name"],
].map(([label, field]) => `<div style="color: #1b1d1f"><span style="color: #575c61">${label}</span> @${field}</div>`).join("");

let source = null; // of all points
let drawn = null; // the document that holds the charts
let charts = null;
let showSelected = null;

/** An empty chart with its tools, in the page's colours. */
function chart(height, y_axis_type = "linear") {
  const style = getComputedStyle(document.documentElement);
  const [ink, quiet, rule, panel] = ["--ink", "--quiet", "--rule", "--panel"].map((name) => style.getPropertyValue(name).trim());
  const plot = Bokeh.Plotting.figure({
    sizing_mode: "stretch_width", height, min_width: 200, y_axis_type, tools: [], toolbar_location: "above",
    x_range: new Bokeh.Range1d(), y_range: new Bokeh.Range1d(),
    background_fill_color: panel, border_fill_color: null, outline_line_color: null, min_border_right: 12,
  });
  plot.toolbar.logo = null;
  const select = new Bokeh.BoxSelectTool();
  plot.add_tools(select, new Bokeh.BoxZoomTool(), new Bokeh.PanTool(), new Bokeh.ResetTool());
  plot.toolbar.active_drag = matchMedia("(pointer: coarse)").matches ? null : select; // a finger scrolls the page
  for (const axis of [plot.xaxis, plot.yaxis].flat()) {
    Object.assign(axis, {
      axis_label_text_color: ink, major_label_text_color: quiet, axis_line_color: quiet, major_tick_line_color: quiet, minor_tick_line_color: null,
      axis_label_text_font_style: "normal", axis_label_text_font_size: "14px", major_label_text_font_size: "12px",
    });
  }
  if (y_axis_type === "log") axisOf(plot.yaxis).ticker = new Bokeh.LogTicker({ mantissas: [1, 2, 5], desired_num_ticks: 5 });
  for (const grid of [plot.xgrid, plot.ygrid].flat()) grid.grid_line_color = rule;
  return plot;
}

/** Points of the common source, of which `filter` chooses. */
function points(plot, x, y, filter, colour) {
  const glyph = plot.scatter({ field: x }, { field: y }, {
    source, view: new Bokeh.CDSView({ filter }), size: 9, marker: { field: "marker" },
    line_color: colour, fill_color: colour, fill_alpha: { field: "filled" }, line_width: 1.2,
    nonselection_fill_alpha: 0.04, nonselection_line_alpha: 0.12,
  });
  plot.add_tools(new Bokeh.HoverTool({ renderers: [glyph], tooltips: TOOLTIP }));
}

/** Build every chart anew: at the start, and when the scheme or the kind of an axis changes. */
async function build() {
  const palette = dark.matches ? report.colours.layers_dark : report.colours.layers;
  const known = layers.filter((layer) => layer !== null);
  const byLayer = { field: "layer", transform: new Bokeh.LinearColorMapper({ palette, low: known[0] ?? 0, high: known.at(-1) ?? 1, nan_color: "#9a9a9a" }) };
  const ink = getComputedStyle(document.documentElement).getPropertyValue("--ink").trim();
  const chosen = source?.selected.indices ?? [];
  source = new Bokeh.ColumnDataSource({ data: {} });
  drawn?.clear(); // takes its views away
  const current = (drawn = new Bokeh.Document());
  const add = (parent, plot, label) => {
    const caption = element("figcaption");
    const target = element("div");
    parent.append(element("figure", { "aria-label": label }, caption, target));
    current.add_root(plot);
    return { plot, caption, target };
  };
  const [scatters, profiles] = ["scatters", "profiles"].map((id) => document.getElementById(id));
  scatters.replaceChildren();
  profiles.replaceChildren();
  document.getElementById("predictions")?.replaceChildren();
  charts = {
    scatters: methods.map((method, place) => {
      const plot = chart(300);
      const filter = new Bokeh.BooleanFilter({ booleans: [] });
      const grey = new Bokeh.ColumnDataSource({ data: { x: [], y: [], low: [], high: [] } });
      plot.segment({ field: "x" }, { field: "low" }, { field: "x" }, { field: "high" }, { source: grey, line_color: NULL_COLOUR, line_width: 3, line_alpha: 0.3 });
      plot.scatter({ field: "x" }, { field: "y" }, { source: grey, size: 4, line_color: null, fill_color: NULL_COLOUR, fill_alpha: 0.8 });
      points(plot, "x", "y", filter, byLayer);
      const line = new Bokeh.ColumnDataSource({ data: { x: [], y: [] } });
      plot.line({ field: "x" }, { field: "y" }, { source: line, line_color: ink, line_width: 2 });
      return { ...add(scatters, plot, `ΔM against ΔD, ${method}`), method, place, filter, line, grey };
    }),
    predictions: panelsOf(predictions).map(({ method, law, quantity }) => {
      const plot = chart(300);
      const [data, equal] = [{ x: [], y: [], layer: [] }, { x: [], y: [] }].map((empty) => new Bokeh.ColumnDataSource({ data: empty }));
      plot.line({ field: "x" }, { field: "y" }, { source: equal, line_color: NULL_COLOUR, line_width: 1.5 });
      plot.scatter({ field: "x" }, { field: "y" }, { source: data, size: 8, line_color: byLayer, fill_color: byLayer, fill_alpha: 0.85 });
      return { ...add(document.getElementById("predictions"), plot, `predicted and observed, ${method}`), method, law, quantity, data, equal };
    }),
    profiles: [["delta_m", "ΔM"], ["delta_d", "ΔD"]].map(([name, label]) => {
      const plot = chart(320, logBox.checked ? "log" : "linear");
      const filter = new Bokeh.BooleanFilter({ booleans: [] });
      points(plot, "place", `profile_${name}`, filter, { field: "colour" });
      const lines = new Bokeh.ColumnDataSource({ data: { x: [], y: [], colour: [] } });
      plot.multi_line({ field: "x" }, { field: "y" }, { source: lines, line_color: { field: "colour" }, line_width: 1.5, line_alpha: 0.8 });
      axisOf(plot.xaxis).axis_label = "layer";
      return { ...add(profiles, plot, `${label} by layer`), name, label, filter, lines };
    }),
  };
  for (const swatch of document.querySelectorAll(".swatch")) swatch.style.background = methodColour(methods[swatch.dataset.method]);
  legends(palette, known);
  source.selected.indices = chosen;
  source.selected.connect(source.selected.properties.indices.change, () => tell());
  update();
  const all = [...charts.scatters, ...charts.predictions, ...charts.profiles];
  await Bokeh.embed.add_document_standalone(current, document.body, all.map(({ target }) => target));
}

const axisOf = (axes) => (Array.isArray(axes) ? axes[0] : axes);

function setRange(range, [start, end]) {
  Object.assign(range, { start, end, reset_start: start, reset_end: end });
}

/** Show what the filters leave. */
function update() {
  const visible = shown.map((_, i) => isVisible(i));
  const indices = visible.flatMap((is, i) => (is ? [i] : []));
  const of = (name, subset) => subset.map((i) => point[name][i]);
  const units = { x: new Map(), y: new Map() };
  for (const { plot, caption, method, filter, line, grey, place } of charts.scatters) {
    const mine = indices.filter((i) => point.method[i] === method);
    caption.closest("figure").hidden = !methodBoxes[place].checked;
    const framed = sharedBox.checked ? indices : mine;
    const ghosts = nulls.filter((row) => isShown(row) && (sharedBox.checked || row.method === method));
    const [dx, dy] = ["delta_d", "delta_m"].map((name) => withRoom(extent(of(name, framed)), ghosts.map((row) => row[name])));
    const [ux, uy] = [unit(dx), unit(dy)];
    units.x.set(method, 10 ** ux);
    units.y.set(method, 10 ** uy);
    axisOf(plot.xaxis).axis_label = axisName("ΔD", ux);
    axisOf(plot.yaxis).axis_label = axisName("ΔM", uy);
    setRange(plot.x_range, limits(dx.map((value) => value / 10 ** ux)));
    setRange(plot.y_range, limits(dy.map((value) => value / 10 ** uy)));
    const [x, y] = [of("delta_d", mine), of("delta_m", mine)];
    const found = fit(x, y);
    const ends = found ? extent(x) : [];
    line.data = { x: ends.map((value) => value / 10 ** ux), y: ends.map((value) => found.at(value) / 10 ** uy) };
    const own = ghosts.filter((row) => row.method === method);
    const scaledOf = (name, unit) => own.map((row) => row[name] / 10 ** unit);
    grey.data = { x: scaledOf("delta_d", ux), y: scaledOf("delta_m", uy), low: scaledOf("delta_m_low", uy), high: scaledOf("delta_m_high", uy) };
    filter.booleans = visible.map((is, i) => is && point.method[i] === method);
    const beyond = own.filter((row) => [[row.delta_d, ux, plot.x_range], [row.delta_m, uy, plot.y_range]]
      .some(([value, unit, range]) => !(value / 10 ** unit >= range.start && value / 10 ** unit <= range.end))).length;
    caption.replaceChildren(element("strong", {}, method), ...beforeFilters(method).flatMap((text) => [text, element("br")]),
      ...(beyond ? [`${beyond} null ${beyond === 1 ? "dot lies" : "dots lie"} beyond the axes`, element("br")] : []),
      found ? `shown: r = ${number(found.r, 3)}, slope = ${number(found.slope)}, n = ${x.length}` : `n = ${x.length}: no line`);
  }
  for (const { plot, caption, method, law, quantity, data, equal } of charts.predictions) {
    const mine = predictions.filter((row) => row.method === method && row.law === law && row.quantity === quantity && isShown(row));
    caption.closest("figure").hidden = !mine.length;
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
    caption.replaceChildren(element("strong", {}, method), element("span", {}, `${law.replaceAll("_", " ")}: R² = ${rSquaredOfRuns(mine)}, n = ${mine.length}`));
  }
  const profileUnits = {};
  for (const { plot, caption, name, label, filter, lines } of charts.profiles) {
    const ends = extent(of(name, indices).filter((value) => !logBox.checked || value > 0));
    const exponent = logBox.checked ? 0 : unit(ends);
    profileUnits[name] = 10 ** exponent;
    axisOf(plot.yaxis).axis_label = logBox.checked ? `${label}  (logarithmic)` : axisName(label, exponent);
    const scaled = ends.map((value) => value / 10 ** exponent);
    setRange(plot.y_range, !Number.isFinite(scaled[0]) ? [0.1, 1] : logBox.checked ? [scaled[0] / 1.3, scaled[1] * 1.3] : [0, 1.06 * scaled[1] || 1]);
    const seen = extent(indices.map((i) => places.get(point.layer[i])));
    setRange(plot.x_range, Number.isFinite(seen[0]) ? [seen[0] - 0.5, seen[1] + 0.5] : [0, 1]);
    lines.data = profileLines(indices, name, 10 ** exponent);
    filter.booleans = visible;
    caption.replaceChildren(element("strong", {}, `${label} by layer`), "line: a method’s last step shown");
  }
  source.data = {
    x: point.delta_d.map((value, i) => value / (units.x.get(point.method[i]) ?? 1)),
    y: point.delta_m.map((value, i) => value / (units.y.get(point.method[i]) ?? 1)),
    place: point.layer.map((layer) => places.get(layer)),
    profile_delta_m: point.delta_m.map((value) => value / profileUnits.delta_m),
    profile_delta_d: point.delta_d.map((value) => value / profileUnits.delta_d),
    layer: point.layer.map((layer) => layer ?? NaN),
    marker: point.step.map((step) => markerOf(step)[0]),
    filled: point.marked.map((is) => (is ? 0 : 0.85)),
    colour: point.method.map(methodColour),
    method: point.method, module: point.module, name: point.name,
    layer_text: point.layer.map((layer) => layer ?? "none"), step_text: point.step.map((step) => step ?? "not known"),
    m_text: point.delta_m.map((value) => number(value, 4)), d_text: point.delta_d.map((value) => number(value, 4)),
  };
  source.selected.indices = source.selected.indices.filter((i) => visible[i]);
  tell(indices.length);
}

/** A line a method: the last of its steps that are shown, by layer. */
function profileLines(indices, name, unit) {
  const data = { x: [], y: [], colour: [] };
  for (const method of methods) {
    const mine = indices.filter((i) => point.method[i] === method && point.layer[i] !== null);
    const last = inOrder(mine.map((i) => point.step[i])).at(-1);
    for (const module of distinct(mine.map((i) => point.module[i]))) {
      const line = mine.filter((i) => point.step[i] === last && point.module[i] === module);
      const x = inOrder(line.map((i) => point.layer[i]));
      data.x.push(x);
      data.y.push(x.map((layer) => median(line.filter((i) => point.layer[i] === layer).map((i) => point[name][i])) / unit));
      data.colour.push(methodColour(method));
    }
  }
  return data;
}

/** Say in words what is shown and what is selected, and list the latter. */
function tell(count = shown.map((_, i) => isVisible(i)).filter(Boolean).length) {
  const chosen = [...source.selected.indices].sort((a, b) => a - b);
  const where = (name) => {
    const known = inOrder(chosen.map((i) => point[name][i])).filter((value) => value !== null);
    return known.length ? `, ${name}${known.length > 1 ? `s ${known[0]}–${known.at(-1)}` : ` ${known[0]}`}` : "";
  };
  const selection = chosen.length ? `; ${chosen.length} selected${where("layer")}${where("step")}.` : ".";
  document.getElementById("status").textContent = `${count} of ${shown.length} points shown${selection}`;
  document.getElementById("clear").disabled = !chosen.length;
  document.getElementById("selected").hidden = !chosen.length;
  showSelected ??= drawTable(document.getElementById("selected-table"), metrics, { file: "selected.csv", caption: "The rows of the selected points", rows: [] });
  showSelected(chosen.map((i) => shown[i]));
}

function legends(palette, known) {
  const markers = [...new Map(steps.map((step) => [markerOf(step)[1], steps.filter((other) => markerOf(other) === markerOf(step))]))];
  const stepName = (list) => (list[0] === null ? "not known" : list.length > 1 ? `${list[0]}–${list.at(-1) ?? "not known"}` : String(list[0]));
  const noisy = point.marked.filter(Boolean).length;
  document.getElementById("scatter-legend").replaceChildren(
    ...(known.length > 1 ? [element("span", {}, `layer ${known[0]}`, element("span", { class: "scale", style: `background: linear-gradient(90deg, ${palette.join(",")})` }), String(known.at(-1)))] : []),
    ...(steps.length > 1 ? [element("span", {}, "step"), ...markers.map(([sign, list]) => element("span", {}, `${sign} ${stepName(list)}`))] : []),
    element("span", {}, "line: least squares over the points shown"),
    ...(nulls.length ? [element("span", {}, element("span", { class: "swatch", style: `background: ${NULL_COLOUR}` }), "null: updates without structure")] : []),
    ...(noisy ? [element("span", {}, `○ hollow: ${report.marked.why} (${noisy} of ${shown.length})`)] : []));
  document.getElementById("layer-legend").replaceChildren(...methods.map((method) =>
    element("span", {}, element("span", { class: "swatch", style: `background: ${methodColour(method)}` }), method)));
}

function defaults() {
  logBox.checked = squashes("delta_m") || squashes("delta_d");
  sharedBox.checked = methods.length > 1 && fillShared();
}

form.addEventListener("change", (event) => (event.target === logBox ? build() : update()));
form.addEventListener("reset", () => setTimeout(() => { defaults(); build(); }));
document.getElementById("clear").addEventListener("click", () => { source.selected.indices = []; });
dark.addEventListener("change", build);
if (shown.length) {
  defaults();
  build();
} else {
  document.getElementById("explore").querySelectorAll("h3, form, .legend").forEach((part) => part.remove());
  document.getElementById("status").textContent = "No matrix has both values: there is nothing to draw.";
}
