// The points that every chart shows, and the numbers that charts take from them: ranges, lines, medians.
"use strict";

const MARKERS = [["circle", "●"], ["square", "■"], ["triangle", "▲"], ["diamond", "◆"], ["inverted_triangle", "▼"], ["hex", "⬢"], ["star", "★"], ["plus", "✚"]];
const { squashed: SQUASHED, least_share: LEAST_SHARE, null_room: NULL_ROOM } = report.rules; // as on the figures
const LABELS = { delta_m: "ΔM", delta_d: "ΔD" };
const QUANTITIES = Object.entries(LABELS);
const dark = matchMedia("(prefers-color-scheme: dark)");

const metrics = report.tables.metrics;
const shown = []; // the rows of the metrics table that have both values: the points
const [allM, allD] = [values(metrics, "delta_m"), values(metrics, "delta_d")];
for (let row = 0; row < metrics.rows; row++) if (allM[row] !== null && allD[row] !== null) shown.push(row);
const column = (name) => {
  const all = values(metrics, name);
  return shown.map((row) => all?.[row] ?? null);
};
const point = Object.fromEntries(["method", "module", "stack", "name", "step", "layer", "delta_m", "delta_d"].map((name) => [name, column(name)]));
point.row = point.module.map((module, i) => (point.stack[i] ? `${point.stack[i]}.${module}` : module)); // where stacks are merged, each has its layers
point.marked = shown.map((row) => report.marked.rows[row] === 1); // rounding decides its ΔD
const rowsOf = (table) => {
  const columns = (table?.columns ?? []).map(({ name }) => [name, values(table, name)]);
  return [...Array(table?.rows ?? 0).keys()].map((row) => Object.fromEntries(columns.map(([name, all]) => [name, all[row]])));
};
const nulls = rowsOf(report.tables.null); // where updates without structure would lie
const correlations = rowsOf(report.tables.correlations);
const correlationOf = (scope, method, module) => correlations.find((row) => row.scope === scope && row.method === method && row.module === module);
const badgeOf = new Map(rowsOf(report.tables.summary).map(({ method, module, badge }) => [JSON.stringify([method, module]), badge]));
const predictions = rowsOf(report.tables.predictions).filter(({ predicted, observed }) => predicted !== null && observed !== null);
const distinct = (list) => [...new Set(list)];
const inOrder = (list) => distinct(list).sort((a, b) => (a === null) - (b === null) || a - b); // not known: last
const methods = distinct(values(metrics, "method"));
const modules = distinct(values(metrics, "module"));
const steps = inOrder(point.step);
const layers = inOrder(point.layer);
const knownLayers = layers.filter((layer) => layer !== null);
const knownSteps = steps.filter((step) => step !== null);
const places = new Map(layers.map((layer) => [layer, layer ?? (layers.at(-2) ?? -1) + 1])); // no layer: right of the last

function methodColour(method) {
  const colours = report.colours.methods;
  const colour = colours[methods.indexOf(method) % colours.length];
  return dark.matches && colour === "#000000" ? "#ffffff" : colour;
}
const layerColours = () => (dark.matches ? report.colours.layers_dark : report.colours.layers);
const NULL_COLOUR = "#a9a9a9";

/** Ranges of steps and their markers; a step that is not known has one of its own. */
const stepRanges = [...report.step_ranges, ...(steps.includes(null) ? [{ name: "not known", steps: [null] }] : [])]
  .map((range, place) => ({ ...range, marker: MARKERS[place][0], sign: MARKERS[place][1] }));
const markers = new Map(stepRanges.flatMap(({ steps, marker }) => steps.map((step) => [step, marker])));

// Numbers

const extent = (list) => list.reduce(([low, high], value) => [Math.min(low, value), Math.max(high, value)], [Infinity, -Infinity]);
const mean = (list) => list.reduce((sum, value) => sum + value, 0) / list.length;
/** The quantile at a share, linear between neighbours (as pandas has it on the figures). */
function quantile(list, share) {
  const sorted = [...list].sort((a, b) => a - b);
  const place = share * (sorted.length - 1);
  const below = Math.floor(place);
  return sorted[below] + (place - below) * ((sorted[below + 1] ?? sorted[below]) - sorted[below]);
}
const median = (list) => quantile(list, 0.5);
/** Lists of indices by what a function gives of each, in the order in which they come. */
function grouped(indices, of) {
  const groups = new Map();
  for (const i of indices) {
    const key = of(i);
    if (!groups.has(key)) groups.set(key, []);
    groups.get(key).push(i);
  }
  return groups;
}

/** Pearson's r and the least-squares line of y on x; null where there is none (as in regression.py). */
function fit(x, y) {
  if (x.length < 3) return null;
  const [x0, y0] = [mean(x), mean(y)];
  const sum = (f) => x.reduce((total, _, i) => total + f(x[i] - x0, y[i] - y0), 0);
  const [xx, yy, xy] = [sum((u) => u * u), sum((_, v) => v * v), sum((u, v) => u * v)];
  const flat = [x, y].some((list) => { const [low, high] = extent(list); return high - low <= 1e-12 * Math.max(Math.abs(low), Math.abs(high)); });
  return flat ? null : { r: Math.max(-1, Math.min(1, xy / Math.sqrt(xx * yy))), slope: xy / xx, at: (value) => y0 + (xy / xx) * (value - x0) };
}

/** The 95 % interval of the line of a row of the correlations, turned about the mean of its points; null where unknown. */
function slopeBand(row, x) {
  if (!x.length || ![row?.slope, row?.slope_low, row?.slope_high].every(Number.isFinite)) return null;
  const [centre, [low, high]] = [mean(x), extent(x)];
  const ends = (value) => [row.slope_low, row.slope_high].map((slope) => row.intercept + row.slope * centre + slope * (value - centre)).sort((a, b) => a - b);
  const at = [low, centre, high];
  return { x: at, low: at.map((value) => ends(value)[0]), high: at.map((value) => ends(value)[1]) };
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

/** Whether every method's points would spread over a fair part of axes that all share. */
function fillShared() {
  const of = grouped(point.method.keys(), (i) => point.method[i]);
  return QUANTITIES.every(([name]) => {
    const [least, most] = extent(point[name]);
    return [...of.values()].every((indices) => {
      const [low, high] = extent(indices.map((i) => point[name][i]));
      return !(high > low) || high - low >= LEAST_SHARE * (most - least);
    });
  });
}
function squashes(name) {
  const of = grouped(point.method.keys(), (i) => point.method[i]);
  const medians = [...of.values()].map((indices) => median(indices.map((i) => point[name][i]))).filter((value) => value > 0);
  return medians.length > 1 && Math.max(...medians) > SQUASHED * Math.min(...medians);
}

/** Of indices, those of each method's last step. */
function atLastStep(indices) {
  return [...grouped(indices, (i) => point.method[i]).values()].flatMap((mine) => {
    const last = inOrder(mine.map((i) => point.step[i])).at(-1);
    return mine.filter((i) => point.step[i] === last);
  });
}
