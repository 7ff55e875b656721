// What all parts of the page share: its data, what is chosen to be seen, and the tables.
"use strict";

const report = JSON.parse(document.getElementById("report-data").textContent);
const filters = document.getElementById("filters");
const darkMode = window.matchMedia("(prefers-color-scheme: dark)");

// Elements are made with text, never with markup: names may hold anything.
function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === true) made.setAttribute(name, "");
    else if (value !== false && value !== null) made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
}

function chosen(key) {
  return filters.elements[key].value;
}

// Whether the drop-downs leave something that has a data set, a model or a plug-in.
function isChosen(item) {
  return ["data", "model", "plugin"].every(
    (key) => !chosen(key) || item[key] === undefined || item[key] === chosen(key),
  );
}

// Calls now, and whenever something else is chosen.
function onChoice(draw) {
  document.addEventListener("choice", draw);
  draw();
}

function labelled(text, control) {
  return element("label", {}, `${text} `, control);
}

function select(options) {
  const made = element("select");
  for (const [value, text] of options) made.append(new Option(text, value));
  return made;
}

function sortRows(table, column) {
  const head = table.tHead.rows[0].cells[column];
  const descending = head.getAttribute("aria-sort") === "ascending";
  for (const other of table.tHead.rows[0].cells) other.setAttribute("aria-sort", "none");
  head.setAttribute("aria-sort", descending ? "descending" : "ascending");
  const isNumber = head.classList.contains("number");
  const key = (row) => {
    const cell = row.cells[column];
    if (!isNumber) return cell.textContent;
    return cell.dataset.value === undefined ? null : Number(cell.dataset.value);
  };
  const compare = (a, b) => (isNumber ? a - b : a.localeCompare(b, "en", { numeric: true }));
  const rows = [...table.tBodies[0].rows].sort((one, other) => {
    const [a, b] = [key(one), key(other)];
    // What has no number comes last, whatever the direction.
    if (a === null || b === null) return (a === null) - (b === null);
    return descending ? compare(b, a) : compare(a, b);
  });
  table.tBodies[0].append(...rows);
}

function filterRows() {
  const words = chosen("text").toLowerCase().split(/\s+/).filter(Boolean);
  let [nRows, nHidden] = [0, 0];
  for (const section of document.querySelectorAll("details.table")) {
    let nShown = 0;
    for (const row of section.querySelectorAll("tbody tr")) {
      const text = row.textContent.toLowerCase();
      row.hidden = !isChosen(row.dataset) || !words.every((word) => text.includes(word));
      nRows += 1;
      nHidden += row.hidden;
      nShown += !row.hidden;
    }
    section.querySelector(".none").hidden = nShown > 0 || !section.querySelector("tbody tr");
  }
  const runs = [...document.querySelectorAll("details.run")];
  for (const run of runs) run.hidden = !isChosen(run.dataset);
  document.querySelector("#runs > .none").hidden = runs.some((run) => !run.hidden);
  document.getElementById("hidden-rows").value = nHidden
    ? `${nHidden} of ${nRows} table rows are hidden`
    : "";
}

for (const table of document.querySelectorAll("details.table table")) {
  [...table.tHead.rows[0].cells].forEach((head, column) => {
    head.firstElementChild.addEventListener("click", () => sortRows(table, column));
  });
}
const announceChoice = () => document.dispatchEvent(new Event("choice"));
filters.addEventListener("submit", (event) => event.preventDefault());
filters.addEventListener("change", announceChoice);
filters.elements.text.addEventListener("input", filterRows);
filters.querySelector("button").addEventListener("click", () => {
  filters.reset();
  announceChoice();
});
onChoice(filterRows);
