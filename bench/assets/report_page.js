"use strict";
// The sections of the page, drawn anew when a filter or the width changes.

const byId = (id) => document.getElementById(id);
const latest = DATA.rows.filter((row) => row.latest);
const several = DATA.folders.length > 1;
/** What tells the folders of the rows apart: nothing where there is one. */
function suffixOf(rows) {
  const one = unique(rows.map((row) => row.folder)).length < 2;
  return (row) => (one ? "" : ` \u00b7 ${LETTERS.get(row.folder)}`);
}
const hasGpu = DATA.rows.some((row) => row.device_type === "cuda");
/** A remark in the place of a figure; what stands between backticks is code. */
const note = (text) => make("p", { class: "note" }, ...text.split("`").map((part, i) => (i % 2 ? make("code", {}, part) : part)));
const oursOf = new Map();
for (const row of latest) if (row.contender === "ours") oursOf.set(keyOf(row), row);

function keyOf(row) {
  return [row.folder, row.op, row.case, row.dtype].join("\u0000");
}

const unique = (values) => [...new Set(values.filter((value) => value !== null && value !== undefined))];
const missingGpu = () => (hasGpu ? [] : [make("p", { class: "missing" }, "GPU: not measured yet")]);

/** The first and the last of some dates. */
function span(dates) {
  const ordered = [...dates].sort();
  return unique([ordered[0], ordered[ordered.length - 1]]).join(" to ");
}

function overview() {
  byId("lead").textContent =
    `${latest.length} figures of ${DATA.ops.length} ops in ${DATA.folders.length} ` +
    `${several ? "folders" : "folder"}, measured ${span(DATA.runs.map((run) => run.date.slice(0, 10)))}.`;
  const cards = DATA.folders.map((folder) => {
    const runs = DATA.runs.filter((run) => run.folder === folder.name);
    const listed = (name) => unique(runs.map((run) => run[name])).join(", ");
    const facts = [
      ["Device", listed("device")],
      ["Threads", listed("threads")],
      ["torch", listed("torch")],
      ["CUDA", listed("cuda")],
      ["Triton", listed("triton")],
      ["Library", listed("vicreg_kernels")],
      ["Python", listed("python")],
      ["Commits", listed("commit")],
      ["Measured", span(runs.map((run) => run.date.slice(0, 10)))],
    ];
    const list = facts.flatMap(([name, text]) => [
      make("dt", {}, name),
      text ? make("dd", {}, text) : make("dd", { class: "missing" }, "\u2013"),
    ]);
    const badge = make("span", { class: "badge" }, LETTERS.get(folder.name));
    return make("div", { class: "card" }, make("h3", {}, badge, folder.name), make("dl", {}, ...list));
  });
  if (!hasGpu) {
    cards.push(make("div", { class: "card" }, make("h3", {}, "GPU"), make("p", { class: "missing" }, "not measured yet")));
  }
  byId("cards").replaceChildren(...cards);
  byId("matrix").replaceChildren(matrix());
}

function range(values) {
  const [low, high] = [times(least(values)), times(most(values))];
  return low === high ? low : `${low} to ${high}`;
}

/** What a folder says of an op: the span of the nearest and of the slowest alternative over its cases. */
function summary(folder, op) {
  const gone = make("td", { class: "missing" }, "not measured");
  const rows = latest.filter((row) => row.folder === folder && row.op === op);
  if (!rows.length) return gone;
  const cases = [...grouped(rows.filter((row) => !isOurs(row.contender) && isNumber(row.ratio)), keyOf).values()];
  const ratios = cases.map((members) => members.map((row) => row.ratio));
  const targets = rows.filter((row) => !isOurs(row.contender) && isNumber(row.target) && isNumber(row.ratio));
  const met = targets.filter((row) => row.ratio >= row.target).length;
  const count = unique(rows.map(keyOf)).length;
  const parts = [`${count} ${count === 1 ? "case" : "cases"}`, unique(rows.map((row) => shortType(row.dtype))).join(", ")];
  if (targets.length) parts.push(`${met} of ${targets.length} targets`);
  const text = ratios.length
    ? [make("div", {}, `nearest ${range(ratios.map(least))}`), make("div", {}, `slowest ${range(ratios.map(most))}`)]
    : [make("div", {}, "no alternative was measured")];
  return make("td", {}, ...text, make("small", {}, parts.join(" \u00b7 ")));
}

function matrix() {
  const head = ["Op", ...DATA.folders.map((folder) => (several ? `${LETTERS.get(folder.name)} \u00b7 ` : "") + folder.name)];
  if (!hasGpu) head.push("GPU");
  const known = DATA.ops.map((each) => each.op);
  const rows = unique([...DATA.everyOp, ...known]).map((op) => {
    const title = DATA.ops.find((each) => each.op === op)?.title;
    const cells = DATA.folders.map((folder) => summary(folder.name, op));
    if (!hasGpu) cells.push(make("td", { class: "missing" }, "not measured yet"));
    const what = title ? make("small", {}, title.split(/,| by |:/)[0]) : null;
    return make("tr", {}, make("th", { scope: "row" }, named(op), what), ...cells);
  });
  const heading = make("tr", {}, ...head.map((text) => make("th", { scope: "col" }, text)));
  return make("div", { class: "scroll whole", tabindex: "0" }, make("table", {}, make("thead", {}, heading), make("tbody", {}, ...rows)));
}

// --------------------------------------------------------------------------------------- figures

const label = (row) => `${row.case} \u00b7 ${shortType(row.dtype)}`;

/** Draw one figure for each op of the rows that pass the filters; what to say where there is none. */
function perOp(id, rows, names, draw, empty) {
  const host = byId(id).querySelector(".figures");
  const shown = rows.filter((row) => passes(row, names));
  const groups = grouped(shown, (row) => row.op);
  const ops = DATA.ops.map((each) => each.op).filter((op) => groups.has(op));
  const figures = ops.map((op) => draw(host.clientWidth, op, groups.get(op)));
  host.replaceChildren(...(figures.length ? figures : [note(empty)]), ...missingGpu());
}

const titleOf = (op) => DATA.ops.find((each) => each.op === op).title;

/** A row as what is timed: the step, and where there is one the replay of its CUDA graph. */
function timed(row) {
  const own = { ...row, shown: row.ratio, ms: row.p50_ms, graph: "" };
  if (!isNumber(row.graph_p50_ms)) return [own];
  return [own, { ...row, shown: row.graph_ratio, ms: row.graph_p50_ms, graph: ", graph" }];
}

function drawSpeed(width, op, rows) {
  const entries = rows.flatMap(timed);
  const suffix = suffixOf(rows);
  const groups = [...grouped(entries, (row) => label(row) + row.graph).entries()].map(([heading, members]) => {
    const ours = unique(members.map((row) => row.folder)).map((folder) => {
      const mine = oursOf.get(keyOf({ ...members[0], folder }));
      const ms = mine && (members[0].graph ? mine.graph_p50_ms : mine.p50_ms);
      return `${isNumber(ms) ? `${digits(ms)} ms` : "\u2013"}${suffix({ folder })}`;
    });
    const bars = members.map((row) => {
      const judged = isNumber(row.target) && isNumber(row.shown) && !isOurs(row.contender);
      const missed = judged && row.shown < row.target;
      const verdict = !judged ? "" : missed ? ` < ${row.target}` : " \u2713";
      return {
        label: named(row.contender) + suffix(row),
        value: row.shown,
        text: isNumber(row.shown) ? times(row.shown) + verdict : `${digits(row.ms)} ms, no ratio`,
        fill: colour(op, row.contender),
        missed,
        title: `${row.contender}: ${digits(row.ms)} ms, ${row.rounds} rounds`,
      };
    });
    return { heading, note: `ours ${ours.join(", ")}`, bars };
  });
  const chart = bars(width, groups, {
    label: `Speed-up, ${op}`, log: true, from: 1, one: 1, mark: (value) => `${value}\u00d7`, room: 92,
  });
  return figure(titleOf(op), describe(op, rows), `speed-up-${op}`, chart);
}

const describe = (op, rows) => {
  const known = DATA.ops.find((each) => each.op === op).contenders;
  const names = unique(rows.map((row) => row.contender)).filter((name) => known[name]);
  return names.map((name) => `${named(name)}: ${known[name]}`).join("; ");
};

function drawFloors(width, op, rows) {
  const suffix = suffixOf(rows);
  const groups = [...grouped(rows.flatMap(timed), (row) => label(row) + row.graph).entries()].map(([heading, members]) => {
    const bars = members.map((row) => {
      const percent = isNumber(row.floor_ms) ? (100 * row.floor_ms) / row.ms : null;
      return {
        label: (row.contender === "ours" ? row.backend || "ours" : named(row.contender)) + suffix(row),
        value: percent,
        text: percent === null ? "the case counts no floor" : `${percent.toFixed(0)}\u202f%`,
        fill: row.bound === "bytes" ? "var(--c1)" : "var(--c4)",
        title: percent === null ? "" : `${digits(row.ms)} ms, floor ${digits(row.floor_ms)} ms, bound by ${row.bound}`,
      };
    });
    const shown = members.find((row) => row.contender === "ours") || members[0];
    const text = isNumber(shown.floor_ms) ? `${digits(shown.ms)} ms, floor ${digits(shown.floor_ms)} ms` : `${digits(shown.ms)} ms`;
    return { heading, note: members.length > 1 ? "" : text, bars };
  });
  const chart = bars(width, groups, { label: `Percent of the floor, ${op}`, from: 100, one: 100, compact: true, mark: (value) => `${value}\u202f%` });
  const legend = [[1, "bound by bytes", "var(--c1)"], [1, "bound by operations", "var(--c4)"]];
  return figure(titleOf(op), "", `floor-${op}`, chart, legend);
}

function legendOf(op, rows) {
  const names = ["ours", ...contendersOf(op)].filter((name) => rows.some((row) => row.contender === name));
  return names.map((name) => [name === "ours" ? 2 : place(op, name), named(name), colour(op, name)]);
}

function drawMemory(width, op, rows) {
  const suffix = suffixOf(rows);
  const lines = [...grouped(rows, (row) => label(row) + suffix(row)).entries()].map(([text, members]) => {
    const counted = members.filter((row) => isNumber(row.peak_mib));
    const points = counted.map((row) => ({
      value: row.peak_mib,
      fill: colour(op, row.contender),
      index: row.contender === "ours" ? 2 : place(op, row.contender),
      title: `${row.contender}: ${row.peak_mib} MiB`,
    }));
    // ours on top
    return { label: text, points: points.reverse(), text: counted.length ? "" : "not counted" };
  });
  const chart = dots(width, lines, { label: `Memory, ${op}`, mark: short });
  return figure(titleOf(op), "MiB; a hollow mark at the left edge is 0", `memory-${op}`, chart, legendOf(op, rows));
}

function drawAccuracy(width, op, rows) {
  const suffix = suffixOf(rows);
  const types = unique(rows.map((row) => row.dtype));
  const index = (dtype) => types.indexOf(dtype);
  const lines = [...grouped(rows, (row) => `${row.case} \u00b7 ${row.backend || row.contender}${suffix(row)}`).entries()].map(([text, members]) => ({
    label: text,
    points: members.map((row) => ({
      value: row.error, fill: `var(--c${index(row.dtype)})`, index: index(row.dtype), title: `${row.dtype}: ${row.error.toExponential(2)}`,
    })),
  }));
  const chart = dots(width, lines, { label: `Accuracy, ${op}`, mark: short });
  return figure(titleOf(op), "", `accuracy-${op}`, chart, types.map((dtype, i) => [i, dtype, `var(--c${i})`]));
}

function drawScaling(fits) {
  const host = byId("scaling").querySelector(".figures");
  const families = [...grouped(fits, (fit) => [fit.op, fit.folder, fit.dtype, fit.axis, fit.fixed].join("\u0000")).values()];
  const drawn = families.filter((members) => members.some((fit) => fit.count > 2));
  const grid = make("div", { class: "grid" });
  host.replaceChildren(drawn.length ? grid : note("No cases with three sizes are shown: the table has the fits through two."));
  const columns = Math.max(1, Math.floor((host.clientWidth + 25) / (460 + 25)));
  const width = Math.floor((host.clientWidth - 25.6 * (columns - 1)) / columns);
  for (const members of drawn) {
    const first = members[0];
    const series = members.map((fit) => ({
      fit, label: fit.contender, fill: colour(fit.op, fit.contender), index: fit.contender === "ours" ? 2 : place(fit.op, fit.contender),
    }));
    const legend = series.map(({ fit, fill, index }) => [index, `${named(fit.contender)} ${fit.exponent.toFixed(2)}`, fill]);
    const text = `${first.fixed}; ${shortType(first.dtype)}${suffixOf(DATA.folders.map((each) => ({ folder: each.name })))(first)}; legend: exponents`;
    const chart = lines(width, series, { label: `Scaling, ${first.op}`, axis: first.axis, mark: short });
    grid.append(figure(`${named(first.op)}: time by ${first.axis}`, text, `scaling-${first.op}-${first.axis.replaceAll(" ", "-")}`, chart, legend));
  }
}

function drawSteps() {
  const host = byId("steps").querySelector(".figures");
  const rows = latest.filter((row) => (row.op === "jepa_step" || row.shares) && passes(row, ["folder", "dtype"]));
  if (!rows.length) {
    host.replaceChildren(note("No training step is in these records."));
    return;
  }
  const suffix = suffixOf(rows);
  const figures = [...grouped(rows, (row) => row.op)].map(([op, members]) => {
    const names = unique(members.flatMap((row) => Object.keys(row.shares || {}))).sort((a, b) => (a === "rest") - (b === "rest"));
    const fill = (name) => (name === "rest" ? "var(--c3)" : `var(--c${[4, 1, 0, 5, 6, 7, 8, 9, 2][names.indexOf(name) % 9]})`);
    const entries = members.map((row) => ({
      heading: `${label(row)}${suffix(row)}`,
      label: named(row.contender),
      total: row.p50_ms,
      fill: colour(op, row.contender),
      text: `${digits(row.p50_ms)} ms`,
      parts: row.shares ? names.filter((name) => row.shares[name]).map((name) => [name, row.shares[name], fill(name)]) : null,
    }));
    const without = members.filter((row) => !row.shares).length;
    const text = without ? `${without} of ${members.length} bars: the shares of the ops are not recorded` : "";
    const chart = stacks(host.clientWidth, entries, { label: `Steps, ${op}` });
    return figure(titleOf(op), text, `steps-${op}`, chart, names.map((name) => [1, name, fill(name)]));
  });
  host.replaceChildren(...figures, ...missingGpu());
}

// ---------------------------------------------------------------------------------------- tables

const WHERE = [
  { key: "folder", label: "Folder", show: (value) => (several ? LETTERS.get(value) : value) },
  { key: "op", label: "Op", show: named },
  { key: "case", label: "Case" },
  { key: "dtype", label: "Dtype", show: shortType },
  { key: "contender", label: "Contender", show: named },
];
const number = (key, text, show) => ({ key, label: text, number: true, show });
const percent = (value) => value.toFixed(0);

const rowsTable = makeTable(
  document.querySelector("#rows .table"),
  "figures",
  [
    ...WHERE,
    { key: "backend", label: "Backend" },
    number("p50_ms", "ms"), number("p20_ms", "p20"), number("p80_ms", "p80"), number("rounds", "Rounds", String),
    { ...number("ratio", "Over ours", times), missed: (row) => isNumber(row.target) && row.ratio < row.target },
    number("target", "Target", String), number("graph_p50_ms", "Graph ms"), number("graph_ratio", "Graph over ours", times),
    number("peak_mib", "MiB"), number("floor_ms", "Floor ms"), number("percent_of_floor", "% of floor", percent),
    { key: "bound", label: "Bound" }, number("gbps", "GB/s"), number("tflops", "TFLOP/s"),
    number("launches", "Launches", String), number("error", "Error", (value) => value.toExponential(2)),
    { key: "commit", label: "Commit" }, { key: "date", label: "Date", show: (value) => value.slice(0, 10) },
  ],
  () => DATA.rows.filter((row) => passes(row)),
  DATA.fields,
);
const fitsTable = makeTable(
  document.querySelector("#scaling .table"),
  "scaling",
  [
    ...WHERE.filter((column) => column.key !== "case"),
    { key: "axis", label: "By" }, { key: "fixed", label: "Fixed" },
    number("exponent", "Exponent", (value) => value.toFixed(3)), number("error", "Standard error", (value) => value.toFixed(3)),
    number("residual", "Residual", (value) => `${Math.exp(value).toFixed(3)}\u00d7`), number("count", "Points", String),
  ],
  () => DATA.fits.filter((row) => passes(row)),
);
const accuracyTable = makeTable(
  document.querySelector("#accuracy .table"),
  "accuracy",
  [...WHERE, { key: "backend", label: "Backend" }, number("error", "Error", (value) => value.toExponential(2))],
  () => latest.filter((row) => isNumber(row.error) && passes(row)),
);
const part = (value) => (isNumber(value) ? value.toExponential(0) : value);
const errorsTable = makeTable(
  document.querySelector("#published .table"),
  "published-losses",
  [
    ...WHERE.slice(0, 2), { key: "name", label: "Loss" }, { key: "whose", label: "Whose" },
    ...DATA.precisions.flatMap((precision) =>
      ["loss", "gradient"].map((what) => number(`${precision} ${what}`, `${precision}: ${what}`, part)),
    ),
    number("scale", "Scale", (value) => String(value)), { key: "shapes", label: "Shapes" }, { key: "commit", label: "Commit" },
  ],
  () => DATA.errors.filter((row) => passes(row)),
);
const skippedTable = makeTable(
  byId("skipped"), "left-out", [...WHERE, { key: "reason", label: "Reason" }], () => DATA.skipped.filter((row) => passes(row)),
);
const runsTable = makeTable(
  document.querySelector("#runs .table"),
  "runs",
  [
    ...WHERE.slice(0, 2), { key: "device", label: "Device" }, number("threads", "Threads", String),
    { key: "torch", label: "torch" }, { key: "cuda", label: "CUDA" }, { key: "triton", label: "Triton" },
    { key: "vicreg_kernels", label: "Library" }, { key: "python", label: "Python" }, { key: "commit", label: "Commit" },
    { key: "date", label: "Date" }, number("rows", "Rows", String), number("seconds", "Seconds"),
    { key: "rates", label: "Rates" }, { key: "command", label: "Command" }, { key: "system", label: "System" },
  ],
  () => DATA.runs.filter((row) => passes(row)).map((run) => ({ ...run, rates: rates(run) })),
);

function rates(run) {
  const each = Object.entries(run.ceilings).map(
    ([dtype, rate]) => `${shortType(dtype)}: copy ${digits(rate.copy_gbps)} GB/s, product ${digits(rate.matmul_tflops)} TFLOP/s`,
  );
  return each.join("; ") || null;
}

// --------------------------------------------------------------------------------------- drawing

function drawAll() {
  const others = latest.filter((row) => row.contender !== "ours");
  perOp("speed", others, FILTERS, drawSpeed, "No contender is left by the filters.");
  const ours = latest.filter((row) => isOurs(row.contender));
  perOp("floors", ours, ["op", "folder", "dtype"], drawFloors, "No row of ours is left by the filters.");
  perOp("memory", latest, FILTERS, drawMemory, "No row is left by the filters.");
  const exact = latest.filter((row) => isNumber(row.error));
  const why = exact.length ? "None of the shown rows holds its accuracy." : "Not recorded in these files: `python3 -m bench.run --accuracy` adds it to a record.";
  perOp("accuracy", exact, FILTERS, drawAccuracy, why);
  byId("accuracy").querySelector(".table").hidden = !exact.length;
  drawScaling(DATA.fits.filter((fit) => passes(fit)));
  drawSteps();
  byId("published").querySelector(".table").hidden = !DATA.errors.length;
  for (const draw of [rowsTable, fitsTable, accuracyTable, errorsTable, skippedTable, runsTable]) draw();
}

function setUp() {
  const none = "Not recorded in these files: `python3 -m bench.parity` writes such a record.";
  if (!DATA.errors.length) byId("published").append(note(none));
  const form = byId("filters");
  const values = {
    op: DATA.ops.map((each) => [each.op, named(each.op)]),
    folder: DATA.folders.map((each) => [each.name, `${LETTERS.get(each.name)} \u00b7 ${each.name}`]),
    dtype: unique(DATA.rows.map((row) => row.dtype)).map((each) => [each, each]),
    contender: unique(DATA.rows.map((row) => row.contender)).sort().map((each) => [each, named(each)]),
  };
  for (const [name, listed] of Object.entries(values)) {
    const options = [["", "all"], ...listed].map(([value, text]) => make("option", { value }, text));
    form.elements[name].replaceChildren(...options);
  }
  // one op at first: all of them make a long page
  const first = DATA.ops[0];
  const read = () => {
    for (const name of FILTERS) filter[name] = form.elements[name].value;
    filter.text = form.elements.text.value.trim().toLowerCase();
    drawAll();
  };
  form.addEventListener("input", read);
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("reset", () => setTimeout(read));
  if (first) form.elements.op.value = first.op;
  overview();
  read();
  let width = document.body.clientWidth;
  window.addEventListener("resize", () => {
    if (document.body.clientWidth === width) return;
    width = document.body.clientWidth;
    requestAnimationFrame(drawAll);
  });
}

setUp();
