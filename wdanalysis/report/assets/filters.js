// The filters, and the page's address, which keeps them: #explore?module=q&methods=FT,LoRA&steps=60,240. A link to a
// section keeps them too.
"use strict";

const form = document.getElementById("filters");
const control = (label, input) => element("div", { class: "control" },
  element("label", {}, element("span", { class: "quiet" }, label), element("br"), input));
const options = (list, name, chosen) => list.map((value, place) => element("option", { value: place, selected: place === chosen }, name(value)));
const choices = (title, ...labels) => element("fieldset", {}, element("legend", {}, title), element("div", { class: "options" }, ...labels));

/** A choice of a first and a last value of a list. */
function rangeControl(label, list, name) {
  const ends = [["from", 0], ["to", list.length - 1]].map(([end, chosen]) => ({ end, select: element("select", { id: `${label}-${end}` }, ...options(list, name, chosen)) }));
  const [from, to] = ends.map(({ select }) => select);
  const place = new Map(list.map((value, at) => [value, at]));
  const box = choices(label[0].toUpperCase() + label.slice(1) + "s", ...ends.map(({ end, select }) => element("label", {}, end, select)));
  return {
    box,
    holds: (value) => place.get(value) >= +from.value && place.get(value) <= +to.value,
    isWhole: () => +from.value === 0 && +to.value === list.length - 1,
    read: () => [list[+from.value], list[+to.value]].map(String),
    choose: (texts) => texts.slice(0, 2).forEach((text, end) => {
      const at = list.findIndex((value) => String(value) === text);
      if (at >= 0) [from, to][end].value = at;
    }),
  };
}

const moduleChoice = element("select", { id: "module" }, ...options(modules, String, 0), ...(modules.length > 1 ? [element("option", { value: -1 }, "all")] : []));
const methodBoxes = methods.map((method) => element("input", { type: "checkbox", checked: true }));
const stepRange = rangeControl("step", steps, (step) => (step === null ? "not known" : String(step)));
const layerRange = rangeControl("layer", layers, (layer) => (layer === null ? "none" : String(layer)));
const logBox = element("input", { type: "checkbox", id: "log" });
const sharedBox = element("input", { type: "checkbox", id: "shared" });
form.append(
  control("Module", moduleChoice),
  choices("Methods", ...methods.map((method, place) =>
    element("label", {}, methodBoxes[place], element("span", { class: "swatch", "data-method": place, "aria-hidden": "true" }), element("span", { class: "name", title: method }, method)))),
  ...(steps.length > 1 ? [stepRange.box] : []),
  ...(layers.length > 1 ? [layerRange.box] : []),
  choices("Axes", ...(methods.length > 1 ? [element("label", {}, sharedBox, "same for all methods")] : []), element("label", {}, logBox, "logarithmic")),
  element("button", { type: "button", id: "clear" }, "Clear selection"),
  element("button", { type: "reset" }, "Reset"));
document.getElementById("filter-box").open = innerWidth > 700 && innerHeight > 600; // else it would cover the charts

const chosenModule = () => modules[+moduleChoice.value]; // undefined: all
const methodPlace = new Map(methods.map((method, place) => [method, place]));
const isOfRows = ({ method, step, layer }) => methodBoxes[methodPlace.get(method)].checked && stepRange.holds(step) && layerRange.holds(layer);
const isShown = (row) => (+moduleChoice.value < 0 || row.module === chosenModule()) && isOfRows(row);
const rowAt = (i) => ({ method: point.method[i], module: point.module[i], step: point.step[i], layer: point.layer[i] });

const startsWith = shown.length ? { log: squashes("delta_m") || squashes("delta_d"), shared: methods.length > 1 && fillShared() } : {};
function defaults() {
  logBox.checked = startsWith.log;
  sharedBox.checked = startsWith.shared;
}

/** What differs from the page as it opens, by name: lists of texts. */
function readFilters() {
  const chosen = {};
  if (+moduleChoice.value) chosen.module = [chosenModule() ?? "*"];
  if (!methodBoxes.every((box) => box.checked)) chosen.methods = methods.filter((_, place) => methodBoxes[place].checked);
  if (!stepRange.isWhole()) chosen.steps = stepRange.read();
  if (!layerRange.isWhole()) chosen.layers = layerRange.read();
  if (logBox.checked !== startsWith.log) chosen.axis = [logBox.checked ? "log" : "linear"];
  if (sharedBox.checked !== startsWith.shared) chosen.axes = [sharedBox.checked ? "shared" : "own"];
  for (const [name, table] of drawnTables) if (table.sought()) chosen[`find.${name}`] = [table.sought()];
  return chosen;
}

/** Set the filters to what `readFilters` gave; what it does not name opens as ever, and what is not known is passed over. */
function chooseFilters(chosen) {
  const module = chosen.module?.[0] === "*" ? -1 : Math.max(0, modules.indexOf(chosen.module?.[0]));
  moduleChoice.value = modules.length > 1 ? module : 0;
  const wanted = chosen.methods?.filter((method) => methodPlace.has(method));
  methodBoxes.forEach((box, place) => { box.checked = !wanted?.length && !(chosen.methods && chosen.methods[0] === "") || Boolean(wanted?.includes(methods[place])); });
  stepRange.choose([steps[0], steps.at(-1)].map(String));
  layerRange.choose([layers[0], layers.at(-1)].map(String));
  stepRange.choose(chosen.steps ?? []);
  layerRange.choose(chosen.layers ?? []);
  defaults();
  if (chosen.axis) logBox.checked = chosen.axis[0] === "log";
  if (chosen.axes) sharedBox.checked = chosen.axes[0] === "shared";
  for (const [name, table] of drawnTables) table.find(chosen[`find.${name}`]?.[0] ?? "");
}

const written = (chosen) => Object.entries(chosen).map(([name, list]) => `${name}=${list.map(encodeURIComponent).join(",")}`).join("&");

/** The section and the filters that the address names; filters are null where it names none. */
function readAddress() {
  const [, section, query] = /^#?([^?]*)\??(.*)$/s.exec(location.hash);
  const plain = (text) => { try { return decodeURIComponent(text); } catch { return text; } };
  const chosen = query ? Object.fromEntries(query.split("&").map((part) => part.split("=")).map(([name, list = ""]) => [name, list.split(",").map(plain)])) : null;
  return { section, chosen };
}

/** Keep the filters in the address, beside its section. */
function remember(section = readAddress().section || "explore") {
  const query = written(readFilters());
  const address = query ? `#${section}?${query}` : location.hash.includes("?") ? `#${section}` : location.hash;
  try {
    if (address !== location.hash) history.replaceState(null, "", address);
  } catch { /* a frame without an address of its own, in a notebook */ }
}

/** Take up what the address says, and go to its section: a section alone keeps the filters, nothing at all resets them. */
function follow(redraw) {
  const { section, chosen } = readAddress();
  if (section && !chosen) return remember(section);
  chooseFilters(chosen ?? {});
  redraw();
  document.getElementById(section)?.scrollIntoView();
}

// Which section is read, in the list of sections
const links = new Map([...document.querySelectorAll("nav a")].map((link) => [link.hash.slice(1), link]));
const reading = new IntersectionObserver((entries) => {
  for (const { isIntersecting, target } of entries) if (isIntersecting) for (const [id, link] of links) {
    if (id === target.id) link.setAttribute("aria-current", "true"); else link.removeAttribute("aria-current");
  }
}, { rootMargin: "-15% 0px -75% 0px" });
for (const id of links.keys()) { const part = document.getElementById(id); if (part) reading.observe(part); }
