for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    head.querySelector("button").addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      heads.forEach((each) => each.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const value = (row) => row.cells[column].dataset.value ?? row.cells[column].textContent;
      const order = (one, other) => {
        if (one === "" || other === "") return (one === "") - (other === ""); // what is unknown comes last
        const numbers = !Number.isNaN(Number(one) - Number(other));
        return (down ? -1 : 1) * (numbers ? one - other : one.localeCompare(other));
      };
      const rows = [...table.tBodies[0].rows].sort((one, other) => order(value(one), value(other)));
      table.tBodies[0].append(...rows);
    });
  });
}
