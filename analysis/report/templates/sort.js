// Tables of two or more rows are sorted by a click on a heading, or by Enter on it: numbers by size, intervals by their lower end, the rest by name.
for (const table of document.querySelectorAll("table")) {
  const body = table.tBodies[0], headings = [...table.tHead.rows[0].cells];
  if (body.rows.length < 2) continue;
  const text = (row, column) => (row.cells[column].querySelector("span") ?? row.cells[column]).textContent.trim();
  const number = (shown) => parseFloat(shown.replace(/[[,]/g, "").replace("−", "-").replace("∞", "Infinity"));
  const sort = (column) => {
    const up = headings[column].getAttribute("aria-sort") !== "ascending";
    headings.forEach((each, place) => each.setAttribute("aria-sort", place !== column ? "none" : up ? "ascending" : "descending"));
    const missing = (row) => ["", "–"].includes(text(row, column));
    const rows = [...body.rows], known = rows.filter((row) => !missing(row));
    const numeric = known.every((row) => !Number.isNaN(number(text(row, column))));
    known.sort((one, other) => {
      const [a, b] = [text(one, column), text(other, column)];
      return (up ? 1 : -1) * (numeric ? number(a) - number(b) : a.localeCompare(b));
    });
    body.append(...known, ...rows.filter(missing));
  };
  headings.forEach((heading, column) => {
    Object.assign(heading, { tabIndex: 0, title: "sort", onclick: () => sort(column) });
    heading.setAttribute("aria-sort", "none");
    heading.onkeydown = (event) => { if (event.key === "Enter") sort(column); };
  });
}
