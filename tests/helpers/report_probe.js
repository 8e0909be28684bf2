// Appended to a copy of the report page: works its controls and tells in a <pre> what they did.
const told = {};
const cells = (key) => {
  const table = document.getElementById("table-figures");
  const heads = [...table.querySelectorAll("thead th")].map((th) => th.textContent);
  return [...table.querySelectorAll("tbody tr")].map((tr) => tr.children[heads.indexOf(key)].textContent);
};
const press = (key) => [...document.querySelectorAll("#table-figures thead button")].find((b) => b.textContent === key).click();
const set = (name, value) => {
  const field = document.getElementById("filters").elements[name];
  field.value = value;
  field.dispatchEvent(new Event("input", { bubbles: true }));
};
const saved = [];
URL.createObjectURL = (blob) => (saved.push(blob), "#");
const shown = (id) => document.querySelectorAll(`#${id} .figures svg[role=img]`).length;
const published = () => {
  const rows = [...document.querySelectorAll("#table-published-losses tr")];
  return rows.map((tr) => [...tr.children].map((cell) => cell.textContent));
};
told.published = published();
told.op = document.getElementById("filters").elements.op.value;
told.figures = ["speed", "floors", "memory", "accuracy", "scaling", "steps"].map(shown);
press("ms");
told.ascending = cells("ms");
press("ms");
told.descending = cells("ms");
press("Case");
told.cases = cells("Case");
press("Over ours");
told.ratios = cells("Over ours");
set("op", "");
told.every = cells("ms").length;
told.allPublished = published().length - 1;
set("contender", "eager");
set("folder", "one/cpu");
set("text", "024X");
told.filtered = [cells("Case"), cells("Contender"), cells("MiB")];
document.querySelector("#rows .csv").click();
document.querySelector("#speed figcaption button").click();
set("text", "nothing has this name");
told.none = [cells("Case").length, shown("speed"), document.querySelector("#speed .note").textContent];
document.getElementById("filters").reset();
setTimeout(async () => {
  told.reset = cells("ms").length;
  told.csv = await saved[0].text();
  told.svg = await saved[1].text();
  told.missing = [document.getElementById("cards").textContent, document.getElementById("matrix").textContent];
  told.reason = document.getElementById("skipped").textContent;
  told.wide = document.documentElement.scrollWidth <= window.innerWidth;
  told.parts = document.querySelectorAll("#steps rect title").length;
  document.body.append(make("pre", { id: "told" }, encodeURIComponent(JSON.stringify(told))));
}, 50);
