// Sorting, filtering, switches and what the other scripts share. Works from file://, asks nothing of any network, inserts no markup.
"use strict";

// -- making nodes: attributes and text only, never markup --------------------------------------------------------------
window.saescope = (function () {
  function fill(node, attributes, children) {
    for (const [name, value] of Object.entries(attributes || {})) {
      if (value !== undefined && value !== null && value !== "") node.setAttribute(name, value);
    }
    for (const child of children) if (child !== null && child !== undefined && child !== "") node.append(child);
    return node;
  }
  const SVG = ["http:", "", "www.w3.org", "2000", "svg"].join("/"); // a name, never asked for
  const el = (name, attributes, ...children) => fill(document.createElement(name), attributes, children);
  const svg = (name, attributes, ...children) =>
    fill(document.createElementNS(SVG, name), attributes, children);

  function data(id) {
    const block = document.getElementById(id);
    return block && JSON.parse(block.textContent);
  }

  // As the tables written beforehand show numbers: fixed digits, two significant ones where only zeros would show.
  function digits(value, n = 3) {
    const text = value !== 0 && Math.abs(value) < 0.5 * 10 ** -n ? value.toExponential(1) : value.toFixed(n);
    return text.replace(/^-/, "\u2212");
  }

  // {value, low, high, reason, n} as the macro `ci` writes it.
  function interval(cell, n = 3) {
    if (cell.value === null || cell.value === undefined) {
      const code = /^undefined: (\w+)$/.exec(cell.reason);
      const shown = code ? code[1].replaceAll("_", " ") : "–";
      return [el("span", { class: "gap", tabindex: 0, title: cell.reason, "aria-label": `no value: ${cell.reason}` }, shown)];
    }
    const known = cell.low !== null && cell.low !== undefined && cell.high !== null && cell.high !== undefined;
    return [el("span", { class: "val" }, digits(cell.value, n)),
      known ? el("span", { class: "ci" }, ` [${digits(cell.low, n)}, ${digits(cell.high, n)}]`) : null];
  }

  // A gap stays last in both directions: it is no rank.
  function compare(a, b, kind, sign) {
    if (a === "" || b === "") return (a === "") - (b === "");
    return sign * (kind === "number" ? Number(a) - Number(b) : a.localeCompare(b, "en", { numeric: true }));
  }

  // Buttons in the head sort the bodies that are not fixed. `tell(title, direction)` hears of every sort.
  function sortable(table, tell) {
    const heads = [...table.tHead.rows[0].cells];
    const sort = (column, next) => {
      const head = heads[column], button = head.querySelector("button.sort"), sign = next === "ascending" ? 1 : -1;
      for (const other of heads) if (other.hasAttribute("aria-sort")) other.setAttribute("aria-sort", "none");
      head.setAttribute("aria-sort", next);
      const value = (row) => (row.cells[column] && (row.cells[column].dataset.v ?? row.cells[column].textContent.trim())) || "";
      for (const body of table.tBodies) {
        if (body.hasAttribute("data-fixed")) continue;
        const rows = [...body.rows].filter((row) => !row.hasAttribute("data-head")).map((row, i) => ({ row, i, v: value(row) }));
        rows.sort((x, y) => compare(x.v, y.v, button.dataset.kind, sign) || x.i - y.i);
        for (const { row } of rows) body.append(row);
      }
      // Bodies that belong together are ordered by their first row.
      const groups = [...table.querySelectorAll("tbody[data-group]")].map((body, i) => ({ body, i, v: value(body.rows[0]) }));
      const end = groups.length ? groups[groups.length - 1].body.nextSibling : null;
      groups.sort((x, y) => compare(x.v, y.v, button.dataset.kind, sign) || x.i - y.i);
      for (const { body } of groups) table.insertBefore(body, end);
    };
    heads.forEach((head, column) => {
      const button = head.querySelector("button.sort");
      if (button) button.addEventListener("click", () => {
        const now = head.getAttribute("aria-sort");
        const next = now === "none" ? button.dataset.first : now === "ascending" ? "descending" : "ascending";
        sort(column, next);
        if (tell) tell(column, next);
      });
    });
    return sort;
  }

  // Rows of texts, of {value, low, high} and of {node}. A head "#Name" sorts by number, "" does not sort.
  function table(label, heads, rows) {
    const head = (name) => name ? el("th", { scope: "col", "aria-sort": "none" }, el("button", { type: "button", class: "sort",
      "data-kind": name[0] === "#" ? "number" : "text", "data-first": "ascending" }, name.replace(/^#/, ""))) : el("td");
    const cells = (row) => row.map((cell) => {
      if (cell === null || typeof cell !== "object") return el("td", {}, String(cell));
      if ("node" in cell) return el("td", {}, cell.node);
      const made = el("td", { class: "n" }, ...interval(cell));
      made.dataset.v = cell.value === null || cell.value === undefined ? "" : String(cell.value);
      return made;
    });
    const made = el("table", {}, el("thead", {}, el("tr", {}, ...heads.map(head))),
      el("tbody", {}, ...rows.map((row) => el("tr", {}, ...cells(row)))));
    sortable(made);
    return el("div", { class: "scroll", role: "region", tabindex: 0, "aria-label": label }, made);
  }

  // What belongs to pairs of SAEs lies in script files, read when a page asks: fetch is blocked on file://.
  const parts = new Map();
  const receive = (i, part) => parts.set(i, part);

  // The class of a shaded token: from which shade on its text needs another colour to be read (style.css).
  const shadeClass = (share) => share > 0.8 ? " hi top" : share > 0.55 ? " hi" : "";

  // Long folds are drawn when somebody looks.
  function onFirstOpen(details, draw) {
    details.addEventListener("toggle", draw, { once: true });
  }

  // The state of a page in its address, so that a link shows the same again: #sort=fvu&q=topk
  function state() { return new URLSearchParams(location.hash.slice(1)); }
  function remember(changes) {
    const next = state();
    for (const [name, value] of Object.entries(changes)) {
      if (value === null || value === "") next.delete(name); else next.set(name, value);
    }
    const hash = next.toString();
    history.replaceState(null, "", hash ? `#${hash}` : location.pathname + location.search);
  }
  return { el, svg, data, digits, interval, compare, sortable, table, onFirstOpen, state, remember, parts, receive, shadeClass };
})();

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

  // Links inside the page go where they say without touching the address, which holds the view.
  for (const link of document.querySelectorAll(".jump a, a.skip")) link.addEventListener("click", (event) => {
    const target = document.getElementById(link.hash.slice(1));
    if (!target) return;
    event.preventDefault();
    target.tabIndex = -1;
    target.focus();
    target.scrollIntoView();
  });

  // Behind `python -m evals.serve` the pages lead to the box for one's own text, a latent's page to pushing it.
  if (/^https?:$/.test(location.protocol) && location.pathname.startsWith("/site/")) {
    const latent = /^\/site\/latent\/([^/]+)\/(\d+)\.html$/.exec(location.pathname);
    const own = document.createElement("a");
    own.href = latent ? `/#page=${latent[1]}&latent=${latent[2]}` : "/";
    own.textContent = latent ? "Push this latent" : "Your own text";
    own.className = "own";
    document.querySelector("header.top").insertBefore(own, document.getElementById("theme"));
  }

  for (const table of document.querySelectorAll("table.sortable:not([data-own])")) window.saescope.sortable(table);

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

  // One of the SAEs at random; its page goes on to one of its latents.
  const lucky = document.getElementById("lucky");
  if (lucky) lucky.addEventListener("click", () => {
    const pages = lucky.dataset.saes.split(" ");
    lucky.href = `${pages[Math.floor(Math.random() * pages.length)]}#lucky`;
  });
})();
