for (const table of document.querySelectorAll("table[data-sorts]")) {
  const body = table.tBodies[0], heads = [...table.tHead.rows[0].cells];
  const value = (row, at) => row.cells[at].dataset.value ?? row.cells[at].textContent;
  heads.forEach((head, at) => {
    const button = head.querySelector("button");
    if (!button) return;
    button.addEventListener("click", () => {
      const number = head.classList.contains("number");
      const first = number ? "descending" : "ascending", second = number ? "ascending" : "descending";
      const next = head.getAttribute("aria-sort") === first ? second : first;
      for (const other of heads) if (other.hasAttribute("aria-sort")) other.setAttribute("aria-sort", "none");
      head.setAttribute("aria-sort", next);
      const turned = next === "ascending" ? 1 : -1;
      const compare = (a, b) => number ? Number(a) - Number(b) : a.localeCompare(b, undefined, { numeric: true });
      [...body.rows]
        .map(row => [value(row, at), row])
        .sort(([a], [b]) => (a === "") - (b === "") || turned * compare(a, b)) // what has no value comes last
        .forEach(([, row]) => body.append(row));
    });
  });
  const find = document.getElementById(table.dataset.sorts);
  if (!find) continue;
  const status = document.getElementById(find.getAttribute("aria-describedby"));
  find.addEventListener("input", () => {
    const wanted = find.value.toLowerCase();
    let shown = 0;
    for (const row of body.rows) {
      row.hidden = !row.textContent.toLowerCase().includes(wanted);
      shown += !row.hidden;
    }
    status.textContent = `${shown} of ${body.rows.length} rows`;
  });
}
