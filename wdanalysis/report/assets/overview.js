// The picture at the top: a small scatter for each method and module, and lines by layer beside each trend. Drawn once,
// and again where the width or the scheme changes; a panel leads to the charts of what it shows.
"use strict";

const MOST_POINTS = 1500; // in a small panel; of more, every n-th is drawn
const LEAST_WIDTH = 170; // of a panel with the room beside it
const OPEN_PANELS = 24; // modules beyond are folded up

/** An element of SVG. */
function svg(tag, attributes = {}, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

const addressOf = (method, module) => `#explore?module=${encodeURIComponent(module)}&methods=${encodeURIComponent(method)}`;
const everyNth = (list, most) => (list.length <= most ? list : list.filter((_, place) => place % Math.ceil(list.length / most) === 0));
const fixed = (value) => value.toFixed(2).replace("-", "−");

/** r of layers at the same step, as the badge has it: "r = −0.64". */
function ofLayers(method, module) {
  const r = correlationOf("within_step", method, module)?.pearson_r;
  return Number.isFinite(r) ? `r = ${fixed(r)}` : "no r";
}

/** What a panel shows: its points, the null's, and the limits of both axes. */
function panelOf(method, module, indices, framed) {
  const ghosts = nulls.filter((row) => row.method === method && row.module === module);
  const [x, y] = ["delta_d", "delta_m"].map((name) => limits(withRoom(extent(framed.map((i) => point[name][i])), ghosts.map((row) => row[name]))));
  return { method, module, indices, ghosts, x, y };
}

/** A small scatter, as wide as its place. */
function smallScatter({ method, module, indices, ghosts, x, y }, width) {
  const height = Math.round(Math.min(0.72 * width, 190));
  const [left, top, bottom] = [5, 14, 16];
  const across = (value) => left + ((value - x[0]) / (x[1] - x[0])) * (width - left - 3);
  const up = (value) => height - bottom - ((value - y[0]) / (y[1] - y[0])) * (height - top - bottom);
  const path = (points) => points.map(([px, py]) => `M${px.toFixed(1)} ${py.toFixed(1)}h0`).join("");
  const size = Math.max(3, Math.min(6, width / 40));
  const clip = `clip-${methods.indexOf(method)}-${modules.indexOf(module)}`;
  const inside = svg("g", { "clip-path": `url(#${clip})` });
  const few = everyNth(ghosts, MOST_POINTS);
  inside.append(
    svg("path", { class: "null-band", d: few.map((row) => `M${across(row.delta_d).toFixed(1)} ${up(row.delta_m_low).toFixed(1)}V${up(row.delta_m_high).toFixed(1)}`).join("") }),
    svg("path", { class: "null-dots", d: path(few.map((row) => [across(row.delta_d), up(row.delta_m)])) }));
  const row = correlationOf("pooled", method, module);
  const all = indices.map((i) => point.delta_d[i]);
  const band = slopeBand(row, all);
  if (band) {
    const edge = (ends, at) => ends.map((value, place) => `${across(at[place]).toFixed(1)} ${up(value).toFixed(1)}`);
    inside.append(svg("path", { class: "interval", d: `M${[...edge(band.low, band.x), ...edge([...band.high].reverse(), [...band.x].reverse())].join("L")}Z` }));
  }
  const colours = layerColours();
  const [first, last] = [knownLayers[0], knownLayers.at(-1)];
  const colour = (i) => (point.layer[i] === null ? "#9a9a9a" : colours[last > first ? Math.round(((point.layer[i] - first) / (last - first)) * (colours.length - 1)) : 0]);
  for (const hollow of [false, true]) {
    for (const [stroke, mine] of grouped(everyNth(indices, MOST_POINTS).filter((i) => point.marked[i] === hollow), colour)) {
      const d = path(mine.map((i) => [across(point.delta_d[i]), up(point.delta_m[i])]));
      inside.append(svg("path", { class: "dots", d, stroke, "stroke-width": size }));
      if (hollow) inside.append(svg("path", { class: "dots holes", d, "stroke-width": size - 2 }));
    }
  }
  if (Number.isFinite(row?.slope) && all.length) {
    const at = (value) => up(row.intercept + row.slope * value).toFixed(1);
    const [low, high] = extent(all);
    for (const kind of ["line halo", "line"]) inside.append(svg("path", { class: kind, d: `M${across(low).toFixed(1)} ${at(low)}L${across(high).toFixed(1)} ${at(high)}` }));
  }
  const ends = (name, wanted) => {
    const [low, high] = extent(indices.map((i) => point[wanted][i]));
    return `${name} ${low === high ? number(low, 2) : `${number(low, 2)} … ${number(high, 2)}`}`;
  };
  return svg("svg", { viewBox: `0 0 ${width} ${height}`, width, height, "aria-hidden": "true" },
    svg("clipPath", { id: clip }, svg("rect", { x: left, y: top, width: width - left, height: height - top - bottom })),
    svg("path", { class: "frame", d: `M${left} ${top}V${height - bottom}H${width}` }),
    inside,
    svg("text", { x: left, y: 10 }, `↑ ${ends("ΔM", "delta_m")}`),
    svg("text", { x: width - 2, y: height - 4, "text-anchor": "end" }, `→ ${ends("ΔD", "delta_d")}`));
}

/** One panel with its heading, a link to its charts. */
function smallMultiple(panel) {
  const { method, module } = panel;
  const badge = badgeOf.get(JSON.stringify([method, module])) ?? "";
  const place = element("div", { class: "small" });
  const figure = element("figure", {}, element("a", { href: addressOf(method, module) },
    element("figcaption", {}, element("strong", {}, method), element("span", { class: "badge", "data-badge": badge },
      element("span", { "aria-hidden": "true" }, report.badges[badge] ?? ""), ` ${badge}`), element("span", { class: "quiet" }, ofLayers(method, module))),
    place));
  return { figure, draw: () => place.replaceChildren(smallScatter(panel, Math.max(120, Math.floor(place.clientWidth)))) };
}

/** As many panels in a row as there is room for, and the rows as even as can be. */
function evenColumns(panels, width) {
  const rows = Math.ceil(panels / Math.max(1, Math.floor((width + 20) / LEAST_WIDTH)));
  return Math.max(1, Math.ceil(panels / rows));
}

/** The panels of all modules, a row a module; returns what draws them. */
function drawMultiples(place) {
  const byModule = grouped(point.module.keys(), (i) => point.module[i]);
  const open = Math.max(1, Math.floor(OPEN_PANELS / methods.length));
  const draws = [];
  const row = (module) => {
    const indices = byModule.get(module) ?? [];
    const byMethod = grouped(indices, (i) => point.method[i]);
    const panels = [...byMethod].map(([method, mine]) => smallMultiple(panelOf(method, module, mine, mine)));
    const grid = element("div", { class: "multiples" }, ...panels.map(({ figure }) => figure));
    draws.push(() => {
      grid.style.gridTemplateColumns = `repeat(${evenColumns(panels.length, grid.clientWidth)}, minmax(0, 1fr))`;
      panels.forEach(({ draw }) => draw());
    });
    return element("div", {}, element("h3", {}, module), grid);
  };
  place.append(...modules.slice(0, open).map(row));
  if (modules.length > open) {
    const more = element("details", {}, element("summary", {}, `${modules.length - open} more: ${modules.slice(open).join(", ")}`));
    more.addEventListener("toggle", () => {
      if (!more.open || more.children.length > 1) return;
      const before = draws.length;
      more.append(...modules.slice(open).map(row));
      draws.slice(before).forEach((draw) => draw());
    });
    place.append(more);
  }
  return () => draws.forEach((draw) => draw());
}

/** r and its interval on an axis from −1 to 1, over the band of chance. */
function interval(row) {
  const [width, height] = [110, 12];
  const at = (r) => (2 + ((Math.max(-1, Math.min(1, r)) + 1) / 2) * (width - 4)).toFixed(1);
  const parts = [svg("path", { class: "axis", d: `M2 ${height / 2}H${width - 2}M${at(0)} 0V${height}` })];
  if (Number.isFinite(row.r_null_low)) parts.push(svg("path", { class: "chance", d: `M${at(row.r_null_low)} ${height / 2}H${at(row.r_null_high)}` }));
  if (Number.isFinite(row.r_low)) parts.push(svg("path", { class: "ends", d: `M${at(row.r_low)} ${height / 2}H${at(row.r_high)}` }));
  if (Number.isFinite(row.pearson_r)) parts.push(svg("circle", { cx: at(row.pearson_r), cy: height / 2, r: 3.5 }));
  return svg("svg", { viewBox: `0 0 ${width} ${height}`, width, height, class: "interval-mark", "aria-hidden": "true" }, ...parts);
}

/** ΔM (solid) and ΔD (dashed) by layer at the last step, each from zero to its largest. */
function sparkline(indices) {
  const [width, height] = [110, 26];
  const [first, last] = extent(knownLayers);
  const across = (layer) => (last > first ? 2 + ((layer - first) / (last - first)) * (width - 4) : width / 2);
  const lines = QUANTITIES.flatMap(([name]) => {
    const known = indices.filter((i) => point.layer[i] !== null);
    const highest = extent(known.map((i) => point[name][i]))[1];
    if (!(highest > 0)) return [];
    return [...grouped(known, (i) => point.row[i]).values()].map((mine) => {
      const byLayer = grouped(mine, (i) => point.layer[i]);
      const at = inOrder([...byLayer.keys()]).map((layer) => [across(layer), height - 2 - (median(byLayer.get(layer).map((i) => point[name][i])) / highest) * (height - 4)]);
      return svg("path", { class: name, d: at.map(([x, y], place) => `${place ? "L" : "M"}${x.toFixed(1)} ${y.toFixed(1)}`).join("") });
    });
  });
  return svg("svg", { viewBox: `0 0 ${width} ${height}`, width, height, class: "sparkline", "aria-hidden": "true" }, svg("path", { class: "axis", d: `M2 ${height - 1}H${width - 2}` }), ...lines);
}

const drawOverview = drawMultiples(document.getElementById("multiples"));
if (shown.length) {
  const legend = document.getElementById("overview-legend");
  const scale = () => legend.replaceChildren(...layerLegend());
  scale();
  drawOverview();
  dark.addEventListener("change", () => { scale(); drawOverview(); });
  let width = innerWidth;
  addEventListener("resize", () => { if (innerWidth !== width) { width = innerWidth; drawOverview(); } });
  const lastStep = grouped(atLastStep([...point.method.keys()]), (i) => JSON.stringify([point.method[i], point.module[i]]));
  for (const link of document.querySelectorAll(".badges a.badge")) {
    const { method, module } = link.dataset;
    const row = correlationOf("within_step", method, module);
    if (row) link.parentElement.append(interval(row));
    const mine = lastStep.get(JSON.stringify([method, module])) ?? [];
    if (knownLayers.length > 1 && mine.length) link.parentElement.append(sparkline(mine));
  }
}

/** The colours of layers, from the first to the last. */
function layerLegend() {
  if (knownLayers.length < 2) return [];
  return [element("span", {}, `layer ${knownLayers[0]}`, element("span", { class: "scale", style: `background: linear-gradient(90deg, ${layerColours().join(",")})` }), String(knownLayers.at(-1)))];
}
