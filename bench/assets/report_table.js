"use strict";
// The data, the filters, the tables and their CSV.

const DATA = JSON.parse(document.getElementById("data").textContent);
const LETTERS = new Map(DATA.folders.map((folder, i) => [folder.name, letterOf(i)]));
const FILTERS = ["op", "folder", "dtype", "contender"];
const filter = { op: "", folder: "", dtype: "", contender: "", text: "" };

/** A, B, ... Z, AA, AB, ... */
function letterOf(i) {
  return (i >= 26 ? letterOf(Math.floor(i / 26) - 1) : "") + String.fromCharCode(65 + (i % 26));
}

/** An element with properties or attributes, and its children: nodes or text. */
function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value !== null && value !== undefined) element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

const isNumber = (value) => typeof value === "number" && Number.isFinite(value);

/** Three significant digits, without an exponent where there are few. */
function digits(value) {
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size >= 1e6 || size < 1e-3) return value.toExponential(2);
  if (size >= 100) return value.toFixed(0);
  return value.toPrecision(3);
}
const times = (value) => `${value < 10 ? value.toFixed(2) : value < 100 ? value.toFixed(1) : value.toFixed(0)}\u00d7`;
const shortType = (dtype) => dtype.replace("bfloat", "bf").replace("float", "f");
const named = (contender) => contender.replaceAll("_", " ");
const isOurs = (contender) => contender === "ours" || contender.startsWith("ours_");
const most = (values) => values.reduce((a, b) => Math.max(a, b), -Infinity);
const least = (values) => values.reduce((a, b) => Math.min(a, b), Infinity);

/** Whether the filters let a row through; names: the filters that apply to it. */
function passes(row, names = FILTERS) {
  if (names.some((name) => filter[name] && name in row && row[name] !== filter[name])) return false;
  return !filter.text || !("case" in row) || row.case.toLowerCase().includes(filter.text);
}

/** Lists of the items that give the same key, in the order of the first of each. */
function grouped(items, keyOf) {
  const groups = new Map();
  for (const item of items) {
    const key = keyOf(item);
    if (!groups.has(key)) groups.set(key, []);
    groups.get(key).push(item);
  }
  return groups;
}

// ------------------------------------------------------------------------------------------- CSV

function csvCell(value) {
  const text = value === null || value === undefined ? "" : String(value);
  return /[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
}

/** A heading and a line for each row, by RFC 4180. */
function csvOf(fields, rows) {
  return [fields, ...rows.map((row) => fields.map((field) => row[field]))]
    .map((cells) => cells.map(csvCell).join(",") + "\r\n")
    .join("");
}

function download(text, type, name) {
  const link = make("a", { href: URL.createObjectURL(new Blob([text], { type })), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

// ---------------------------------------------------------------------------------------- tables

/** Numbers by size, the rest as text with numbers in it by value; what is missing comes last. */
function compare(a, b, direction) {
  const gone = [a, b].map((value) => value === null || value === undefined || value === "");
  if (gone[0] || gone[1]) return gone[0] - gone[1];
  if (isNumber(a) && isNumber(b)) return direction * (a - b);
  return direction * String(a).localeCompare(String(b), "en", { numeric: true });
}

/**
 * A table in `host` that is sorted by a click on a heading and that exports what it shows.
 * columns: {key, label, number, show(value, row)}; fields: those of the CSV, by default the columns'.
 * rows(): the rows to show now. Returns the function that draws it anew.
 */
function makeTable(host, name, columns, rows, fields = columns.map((column) => column.key)) {
  let order = { key: null, direction: 1 };
  const body = make("tbody");
  const count = make("span");
  const sorted = () => {
    const shown = rows();
    if (order.key === null) return shown;
    return [...shown].sort((a, b) => compare(a[order.key], b[order.key], order.direction));
  };
  const save = () => download(csvOf(fields, sorted()), "text/csv", `vicreg-kernels-${name}.csv`);
  const headings = columns.map((column) => {
    const turn = () => {
      const again = order.key === column.key;
      order = { key: column.key, direction: again ? -order.direction : 1 };
      draw();
    };
    const button = make("button", { type: "button", onclick: turn }, column.label);
    return make("th", { scope: "col", class: column.number ? "number" : null }, button);
  });
  const cell = (column, row) => {
    const value = row[column.key];
    if (value === null || value === undefined) return make("td", { class: column.number ? "number" : null }, "\u2013");
    const text = column.show ? column.show(value, row) : column.number ? digits(value) : String(value);
    const missed = column.missed && column.missed(row) ? " missed" : "";
    return make("td", { class: (column.number ? "number" : "") + missed || null }, text);
  };
  function draw() {
    headings.forEach((heading, i) => {
      const own = columns[i].key === order.key;
      if (own) heading.setAttribute("aria-sort", order.direction > 0 ? "ascending" : "descending");
      else heading.removeAttribute("aria-sort");
    });
    const shown = sorted();
    count.textContent = `${shown.length} ${shown.length === 1 ? "row" : "rows"}`;
    body.replaceChildren(...shown.map((row) => make("tr", {}, ...columns.map((column) => cell(column, row)))));
  }
  host.replaceChildren(
    make("div", { class: "tools" }, count, make("button", { type: "button", class: "csv", onclick: save }, "CSV of these rows")),
    make("div", { class: "scroll", tabindex: "0" }, make("table", { id: `table-${name}` }, make("thead", {}, make("tr", {}, ...headings)), body)),
  );
  return draw;
}
