// Sorting, filtering and switches. Works from file://, asks nothing of any network, inserts no markup.
"use strict";

(function () {
  const root = document.documentElement;
  const remember = {
    get() { try { return localStorage.getItem("saescope-theme"); } catch { return null; } },
    set(value) { try { localStorage.setItem("saescope-theme", value); } catch { /* private mode */ } },
  };
  if (remember.get()) root.dataset.theme = remember.get();
  const theme = document.getElementById("theme");
  if (theme) theme.addEventListener("click", () => {
    const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = dark ? "light" : "dark";
    remember.set(root.dataset.theme);
  });

  // A gap stays last in both directions: it is no rank.
  function compare(a, b, kind, sign) {
    if (a === "" || b === "") return (a === "") - (b === "");
    return sign * (kind === "number" ? Number(a) - Number(b) : a.localeCompare(b, "en", { numeric: true }));
  }

  for (const table of document.querySelectorAll("table.sortable")) {
    const heads = [...table.tHead.rows[0].cells];
    heads.forEach((head, column) => {
      const button = head.querySelector("button.sort");
      if (!button) return;
      button.addEventListener("click", () => {
        const now = head.getAttribute("aria-sort");
        const next = now === "none" ? button.dataset.first : now === "ascending" ? "descending" : "ascending";
        for (const other of heads) if (other.hasAttribute("aria-sort")) other.setAttribute("aria-sort", "none");
        head.setAttribute("aria-sort", next);
        const sign = next === "ascending" ? 1 : -1;
        for (const body of table.tBodies) {
          if (body.hasAttribute("data-fixed")) continue;
          const value = (row) => (row.cells[column] && (row.cells[column].dataset.v ?? row.cells[column].textContent.trim())) || "";
          const rows = [...body.rows].map((row, i) => ({ row, i, v: value(row) }));
          rows.sort((x, y) => compare(x.v, y.v, button.dataset.kind, sign) || x.i - y.i);
          for (const { row } of rows) body.append(row);
        }
      });
    });
  }

  for (const input of document.querySelectorAll("input[data-filter]")) {
    const table = document.getElementById(input.dataset.filter);
    input.addEventListener("input", () => {
      const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
      for (const body of table.tBodies) {
        if (body.hasAttribute("data-fixed")) continue;
        for (const row of body.rows) {
          const text = row.textContent.toLowerCase();
          row.hidden = !words.every((word) => text.includes(word));
        }
      }
    });
  }

  for (const box of document.querySelectorAll("input[data-toggle]")) {
    const apply = () => document.body.classList.toggle(box.dataset.toggle, box.checked);
    box.addEventListener("change", apply);
    apply();
  }

  const lucky = document.getElementById("lucky");
  if (lucky) lucky.addEventListener("click", () => {
    const links = document.getElementById(lucky.dataset.links).querySelectorAll("tbody a");
    if (links.length) location.href = links[Math.floor(Math.random() * links.length)].href;
  });
})();
