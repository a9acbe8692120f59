// The page's data, and its tables: searched, sorted by their headings, turned page by page, saved as CSV.
"use strict";

const report = JSON.parse(document.getElementById("data").textContent);
const PAGE = 25;

/** An element with attributes and children; a child that is a string becomes text, never markup. */
function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (value === true) made.setAttribute(name, "");
    else if (value !== false && value !== null) made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
}

/** The values of a table's column, null where a cell is empty; undefined where the table has no such column. */
function values(table, name) {
  const column = table.columns.find((candidate) => candidate.name === name);
  return column && (column.values ?? column.codes.map((code) => (code < 0 ? null : column.levels[code])));
}

/** A number as it is set in print: 0.0621, −1.20×10⁻⁴. */
function number(value, digits = 3) {
  if (value === null) return "–";
  if (Number.isInteger(value)) return String(value).replace("-", "−");
  const exponent = Math.floor(Math.log10(Math.abs(value)));
  const plain = exponent >= -3 && exponent <= 3;
  const mantissa = (plain ? value : value / 10 ** exponent).toFixed(plain ? Math.max(digits - 1 - exponent, 0) : digits - 1);
  return (plain ? mantissa : `${mantissa}×${powerOfTen(exponent)}`).replace("-", "−");
}

function powerOfTen(exponent) {
  return "10" + String(exponent).replace(/[-0-9]/g, (sign) => "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"["-0123456789".indexOf(sign)]);
}

/** The rows of a table as CSV (RFC 4180), with every digit. */
function csv(table, rows) {
  const cell = (value) => (value === null ? "" : /[",\r\n]/.test(value) ? `"${String(value).replaceAll('"', '""')}"` : value);
  const columns = table.columns.map((column) => values(table, column.name));
  const lines = [table.columns.map((column) => cell(column.name)), ...rows.map((row) => columns.map((column) => cell(column[row])))];
  return lines.map((line) => line.join(",")).join("\n") + "\n";
}

function download(file, text) {
  const link = element("a", { href: URL.createObjectURL(new Blob([text], { type: "text/csv" })), download: file });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

/** Whether a row has each of the words: in a text cell, or as one of its whole numbers. */
function hasWords(columns, row, words) {
  return words.every((word) => columns.some(({ number, all }) => (all[row] === null ? false
    : number ? Number.isInteger(all[row]) && String(all[row]) === word : all[row].toLowerCase().includes(word))));
}

/** Draw a table into an element; returns functions that show other rows of it, and those with the words of a text. */
function drawTable(place, table, { file, caption, rows = [...Array(table.rows).keys()], onfind = () => {} }) {
  const columns = table.columns.map((column) => ({ ...column, number: Boolean(column.values), all: values(table, column.name) }));
  let sorted = null; // [column, 1 ascending or -1 descending]
  let sought = [];
  let first = 0;

  const body = element("tbody");
  const headings = columns.map((column, place) =>
    element("th", { scope: "col", "aria-sort": "none", class: column.number ? "number" : null },
      element("button", { type: "button", "data-column": column.name, title: column.meaning || column.name, onclick: () => sortBy(place) }, column.label)));
  const count = element("span", { class: "quiet", role: "status" });
  const back = element("button", { type: "button", onclick: () => turn(-PAGE) }, "Previous");
  const on = element("button", { type: "button", onclick: () => turn(PAGE) }, "Next");
  const search = element("input", { type: "search", placeholder: "Find rows", "aria-label": `Find rows: ${caption}`, size: 20, oninput: () => { find(); onfind(search.value); } });
  const save = element("button", { type: "button", onclick: () => download(file, csv(table, ordered())) }, `Download ${file}`);
  const many = table.rows > PAGE;
  place.replaceChildren(
    element("div", { class: "tools" }, ...(many ? [search, back, on, count] : []), save),
    element("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": caption },
      element("table", {}, element("caption", {}, caption), element("thead", {}, element("tr", {}, ...headings)), body)));

  function ordered() {
    const found = rows.filter((row) => hasWords(columns, row, sought));
    if (!sorted) return found;
    const [by, direction] = sorted;
    const key = columns[by].all;
    const compare = columns[by].number ? (a, b) => a - b : (a, b) => a.localeCompare(b, "en", { numeric: true });
    return found.sort((a, b) => {
      if (key[a] === null || key[b] === null) return (key[a] === null) - (key[b] === null); // empty cells last, either way
      return direction * compare(key[a], key[b]);
    });
  }

  function fill() {
    const all = ordered();
    first = Math.min(first, Math.max(0, PAGE * Math.floor((all.length - 1) / PAGE)));
    body.replaceChildren(...all.slice(first, first + PAGE).map((row) => element("tr", {}, ...columns.map((column) =>
      element("td", { class: column.number ? "number" : column.all[row]?.length > 80 ? "long" : null, title: column.number ? column.all[row] : null },
        column.number ? number(column.all[row]) : (column.all[row] ?? "–"))))));
    count.textContent = all.length ? `${first + 1}–${Math.min(first + PAGE, all.length)} of ${all.length}` : "no rows";
    back.disabled = first === 0;
    on.disabled = first + PAGE >= all.length;
  }

  function sortBy(place) {
    sorted = [place, sorted?.[0] === place ? -sorted[1] : 1];
    headings.forEach((heading, other) =>
      heading.setAttribute("aria-sort", other !== place ? "none" : sorted[1] > 0 ? "ascending" : "descending"));
    first = 0;
    fill();
  }

  function find() {
    sought = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    first = 0;
    fill();
  }

  function turn(by) {
    first += by;
    fill();
  }

  fill();
  return {
    show(others) {
      rows = others;
      first = 0;
      fill();
    },
    find(text) {
      if (text === search.value) return;
      search.value = text;
      find();
    },
    sought: () => search.value.trim(),
  };
}

const drawnTables = new Map(); // by name; filters.js keeps what is sought in them in the page's address
for (const place of document.querySelectorAll("[data-table]")) {
  const name = place.dataset.table;
  drawnTables.set(name, drawTable(place, report.tables[name], { ...place.dataset, onfind: () => remember() }));
}
