"use strict";
// SVG: bars of speed-up and floor, dots of memory and accuracy, lines of scaling, parts of a step.

const SVG = "http://www.w3.org/2000/svg";
const LINE = 17;
const PALETTE = 10;

function svg(tag, attributes = {}, text = null, title = null) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  if (text !== null) element.textContent = text;
  if (title !== null) {
    const child = document.createElementNS(SVG, "title");
    child.textContent = title;
    element.append(child);
  }
  return element;
}

/** A mark of an axis: as few digits as it has. */
const short = (value) => (value >= 1e5 || value < 1e-3 ? value.toExponential(0) : String(Number(value.toPrecision(3))));
const contendersOf = (op) => Object.keys(DATA.ops.find((each) => each.op === op).contenders);
/** The colour of a contender: by its place among those of its op. */
function place(op, contender) {
  return Math.max(contendersOf(op).indexOf(contender), 0) % PALETTE;
}
const colour = (op, contender) => (contender === "ours" ? "var(--ours)" : `var(--c${place(op, contender)})`);

/** A logarithmic scale of [low, high] to [from, to], with marks about `gap` pixels apart. */
function logScale(low, high, from, to, gap = 54) {
  const span = Math.log(high / low) || 1;
  const at = (value) => from + ((to - from) * Math.log(value / low)) / span;
  const room = Math.max(2, Math.abs(to - from) / gap);
  const sets = [[1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8], [1, 1.5, 2, 3, 5, 7], [1, 2, 5], [1, 3], [1]];
  const marksOf = (steps, every) => {
    const marks = [];
    for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power++) {
      if (power % every) continue;
      for (const step of steps) {
        const value = Number((step * 10 ** power).toPrecision(3));
        if (value >= low * 0.999 && value <= high * 1.001) marks.push(value);
      }
    }
    return marks;
  };
  const choices = [...sets.map((steps) => marksOf(steps, 1)), ...[2, 3, 5].map((every) => marksOf([1], every))];
  return { at, marks: choices.find((marks) => marks.length <= room) || [] };
}

/** Eight marks that differ in shape as well as in colour. */
function mark(index, x, y, attributes, title) {
  const r = 5;
  const polygon = (sides, turn, size = r) =>
    Array.from({ length: sides }, (_, i) => {
      const angle = turn + (2 * Math.PI * i) / sides;
      return `${(x + size * Math.sin(angle)).toFixed(1)},${(y - size * Math.cos(angle)).toFixed(1)}`;
    }).join(" ");
  const shapes = [null, [4, Math.PI / 4], [4, 0], [3, 0], [3, Math.PI], [5, 0], [6, 0], [3, Math.PI / 2]];
  const shape = shapes[index % shapes.length];
  if (shape === null) return svg("circle", { cx: x, cy: y, r: r - 0.5, ...attributes }, null, title);
  return svg("polygon", { points: polygon(shape[0], shape[1], r + 0.7), ...attributes }, null, title);
}

/** The SVG of a figure as a file of its own: what style sheets say of each element is written into it. */
function saveSvg(chart, name) {
  const copy = chart.cloneNode(true);
  copy.setAttribute("xmlns", SVG);
  const own = [chart, ...chart.querySelectorAll("*")];
  const properties = ["fill", "stroke", "stroke-width", "stroke-dasharray", "font-family", "font-size", "font-weight"];
  [copy, ...copy.querySelectorAll("*")].forEach((element, i) => {
    const style = getComputedStyle(own[i]);
    element.setAttribute("style", properties.map((p) => `${p}:${style.getPropertyValue(p)}`).join(";"));
  });
  copy.style.background = getComputedStyle(document.body).backgroundColor;
  download(new XMLSerializer().serializeToString(copy), "image/svg+xml", `vicreg-kernels-${name}.svg`);
}

/** A figure: caption, a button that saves it, an optional legend of [index or "ours", label, colour]. */
function figure(title, note, name, chart, legend = []) {
  const items = legend.map(([index, label, fill]) => {
    const sign = svg("svg", { width: 14, height: 14, "aria-hidden": "true" });
    sign.append(mark(index, 7, 7, { fill }, null));
    return make("li", {}, sign, label);
  });
  const save = make("button", { type: "button", onclick: () => saveSvg(chart, name) }, "SVG");
  const caption = make("figcaption", {}, make("span", {}, title, make("small", {}, note)), save);
  return make("figure", {}, caption, items.length ? make("ul", { class: "legend" }, ...items) : null, chart);
}

function canvas(width, height, label) {
  return svg("svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label });
}

function axisMarks(chart, scale, top, bottom, show, one = null) {
  for (const value of scale.marks) {
    const x = scale.at(value);
    chart.append(svg("line", { x1: x, x2: x, y1: top, y2: bottom, class: value === one ? "one" : "axis" }));
    chart.append(svg("text", { x, y: bottom + 14, class: "soft", "text-anchor": "middle" }, show(value)));
  }
}

/**
 * Bars under headings. groups: [{heading, note, bars: [{label, value, text, fill, title, missed}]}], where a
 * bar without a value is its text alone. options: {label, log, from, unit, one, room, compact}; compact: where
 * every group has one bar and there is room, the heading stands beside it.
 */
function bars(width, groups, options) {
  const values = groups.flatMap((group) => group.bars.map((bar) => bar.value)).filter(isNumber);
  if (!values.length) values.push(options.from);
  const compact = options.compact && width > 620 && groups.every((group) => group.bars.length === 1);
  const left = Math.round(compact ? Math.min(270, width * 0.36) : Math.min(150, width * 0.33));
  const right = width - (compact ? 250 : options.room || 78);
  const lowest = options.log ? Math.min(options.from, least(values)) : 0;
  const highest = Math.max(options.from, most(values)) * (options.log ? 1.02 : 1);
  const linear = (value) => left + ((right - left) * value) / highest;
  const step = [25, 50, 100, 200, 500, 1000].find((size) => highest / size <= Math.max(2, (right - left) / 55)) || highest;
  const scale = options.log
    ? logScale(lowest < 1 ? lowest / 1.02 : 1, Math.max(highest, 2), left, right, width < 560 ? 34 : 54)
    : { at: linear, marks: Array.from({ length: Math.floor(highest / step) + 1 }, (_, i) => i * step) };
  const count = groups.reduce((sum, group) => sum + group.bars.length, 0);
  const bottom = 8 + (compact ? count * (LINE + 3) : groups.length * (LINE + 10) + count * LINE);
  const chart = canvas(width, bottom + 22, options.label);
  axisMarks(chart, scale, 4, bottom, options.mark, options.one);
  const zero = scale.at(options.log ? 1 : 0);
  let y = 8;
  for (const group of groups) {
    if (!compact) {
      const long = 7.6 * group.heading.length + 6.6 * group.note.length + 14;
      chart.append(svg("rect", { x: 0, y: y - 3, width: Math.min(long, width), height: LINE + 1, fill: "var(--paper)" }));
      const heading = svg("text", { x: 0, y: y + 10, class: "case" }, group.heading);
      heading.append(svg("tspan", { "font-weight": 400, style: "fill: var(--soft); font-weight: 400" }, `  ${group.note}`));
      chart.append(heading);
      y += LINE + 2;
    }
    for (const bar of group.bars) {
      const text = compact ? group.heading : bar.label;
      chart.append(svg("text", { x: left - 8, y: y + 10, "text-anchor": "end" }, text));
      let end = zero;
      if (isNumber(bar.value)) {
        const x = scale.at(bar.value);
        end = Math.max(x, zero);
        const extent = Math.max(Math.abs(x - zero), 1.5);
        const shape = { x: Math.min(x, zero), y: y + 1, width: extent, height: LINE - 5, rx: 2, fill: bar.fill };
        chart.append(svg("rect", shape, null, bar.title));
      }
      const css = bar.missed ? "missed" : isNumber(bar.value) ? "" : "soft";
      const said = svg("text", { x: end + 5, y: y + 10, class: css }, bar.text);
      if (compact) said.append(svg("tspan", { style: "fill: var(--soft)" }, `  ${group.note}`));
      chart.append(said);
      y += LINE + (compact ? 3 : 0);
    }
    y += compact ? 0 : 8;
  }
  return chart;
}

/** A line for each of rows: [{label, points: [{value, fill, index, title}], text}], logarithmic. */
function dots(width, rows, options) {
  const values = rows.flatMap((row) => row.points.map((point) => point.value)).filter((value) => value > 0);
  const stacked = width < 620;
  const left = stacked ? 8 : Math.round(Math.min(280, width * 0.36));
  const right = width - 16;
  const low = least(values.length ? values : [1]) / 1.3;
  const high = most(values.length ? values : [2]) * 1.3;
  const scale = logScale(low, high, left + 14, right);
  const step = stacked ? 36 : 22;
  const bottom = 6 + rows.length * step;
  const chart = canvas(width, bottom + 22, options.label);
  axisMarks(chart, scale, 2, bottom, options.mark);
  rows.forEach((row, i) => {
    const y = 6 + i * step + (stacked ? 24 : 10);
    if (stacked) chart.append(svg("rect", { x: 0, y: y - 23, width, height: 15, fill: "var(--paper)" }));
    const at = stacked ? { x: 0, y: y - 11 } : { x: left - 8, y: y + 4, "text-anchor": "end" };
    chart.append(svg("text", at, row.label));
    const xs = row.points.map((point) => (point.value > 0 ? scale.at(point.value) : left));
    if (xs.length) chart.append(svg("line", { x1: least(xs), x2: most(xs), y1: y, y2: y, stroke: "var(--line)", "stroke-width": 2 }));
    row.points.forEach((point, j) => {
      const hollow = point.value > 0 ? {} : { fill: "var(--paper)", stroke: point.fill, "stroke-width": 2 };
      chart.append(mark(point.index, xs[j], y, { fill: point.fill, ...hollow }, point.title));
    });
    if (row.text) chart.append(svg("text", { x: left + 8, y: y + 4, class: "soft" }, row.text));
  });
  return chart;
}

/** Points and fitted lines of [{fit, fill, index, label}] on two logarithmic axes. */
function lines(width, series, options) {
  const height = Math.round(Math.min(300, width * 0.7));
  const all = series.flatMap((each) => each.fit.points);
  const sizes = all.map((point) => point[0]);
  const took = all.map((point) => point[1]);
  const x = logScale(least(sizes) / 1.15, most(sizes) * 1.15, 46, width - 8, 62);
  const y = logScale(least(took) / 1.25, most(took) * 1.25, height - 34, 8, 26);
  const chart = canvas(width, height, options.label);
  axisMarks(chart, x, 8, height - 34, options.mark);
  for (const value of y.marks) {
    const at = y.at(value);
    chart.append(svg("line", { x1: 46, x2: width - 8, y1: at, y2: at, class: "axis" }));
    chart.append(svg("text", { x: 40, y: at + 4, class: "soft", "text-anchor": "end" }, short(value)));
  }
  chart.append(svg("text", { x: width - 8, y: height - 3, class: "soft", "text-anchor": "end" }, options.axis));
  chart.append(svg("text", { x: 46, y: height - 3, class: "soft" }, "milliseconds"));
  for (const { fit, fill, index, label } of series) {
    const ends = [fit.points[0][0], fit.points[fit.points.length - 1][0]];
    const [from, to] = ends.map((size) => y.at(Math.exp(fit.intercept + fit.exponent * Math.log(size))));
    const dashed = { "stroke-width": label === "ours" ? 2.5 : 1.5, "stroke-dasharray": fit.count < 3 ? "4 3" : "none" };
    chart.append(svg("line", { x1: x.at(ends[0]), y1: from, x2: x.at(ends[1]), y2: to, stroke: fill, ...dashed }));
    for (const [size, ms, name] of fit.points) {
      chart.append(mark(index, x.at(size), y.at(ms), { fill }, `${label}, ${name}: ${digits(ms)} ms`));
    }
  }
  return chart;
}

/** Bars of [{heading, label, total, text, fill, parts: [[name, share, fill]] or null}], as long as their total. */
function stacks(width, entries, options) {
  const left = Math.round(Math.min(110, width * 0.22));
  const right = width - 78;
  const longest = most(entries.map((entry) => entry.total));
  const headings = unique(entries.map((entry) => entry.heading)).length;
  const chart = canvas(width, headings * 26 + entries.length * 22 + 6, options.label);
  let y = 0;
  let last = null;
  for (const entry of entries) {
    if (entry.heading !== last) {
      chart.append(svg("text", { x: 0, y: y + 16, class: "case" }, entry.heading));
      y += 24;
    }
    last = entry.heading;
    chart.append(svg("text", { x: left - 8, y: y + 13, "text-anchor": "end" }, entry.label));
    const extent = ((right - left) * entry.total) / longest;
    let from = left;
    for (const [name, share, fill] of entry.parts || [["", 1, entry.fill]]) {
      const title = entry.parts ? `${name}: ${(100 * share).toFixed(1)} %, ${digits(share * entry.total)} ms` : entry.text;
      chart.append(svg("rect", { x: from, y: y + 1, width: Math.max(share * extent, 0.5), height: 16, fill, stroke: "var(--paper)" }, null, title));
      if (entry.parts && share * extent > 34) {
        chart.append(svg("text", { x: from + (share * extent) / 2, y: y + 13, "text-anchor": "middle", style: "fill: var(--paper)" }, `${(100 * share).toFixed(0)} %`));
      }
      from += share * extent;
    }
    chart.append(svg("text", { x: left + extent + 6, y: y + 13 }, entry.text));
    y += 22;
  }
  return chart;
}
