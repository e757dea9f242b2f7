"use strict";
const table = document.getElementById("summary"), headings = [...table.tHead.rows[0].cells];
table.tHead.addEventListener("click", (event) => {
  const heading = event.target.closest("button")?.parentElement;
  if (!heading) return;
  const fall = heading.getAttribute("aria-sort") === "ascending";
  headings.forEach((other) => other.removeAttribute("aria-sort"));
  heading.setAttribute("aria-sort", fall ? "descending" : "ascending");
  const value = (row) => row.cells[heading.cellIndex].dataset.value;
  const compare = (a, b) => isNaN(a) || isNaN(b) ? a.localeCompare(b, "en", { numeric: true }) : a - b;
  const rows = [...table.tBodies[0].rows].sort((one, two) => {
    const [a, b] = [value(one), value(two)];
    if (!a || !b) return !a - !b;
    return fall ? compare(b, a) : compare(a, b);
  });
  table.tBodies[0].append(...rows);
});
