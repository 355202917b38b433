// The list of an SAE's explained latents: search, order, a page of rows at a time; the view is kept in the address.
"use strict";

(function () {
  const { el, data, digits, interval, compare, state, remember } = window.saescope;
  const listed = data("listed");
  if (!listed) return;
  const STEP = 200; // rows drawn at once: ten thousand would take seconds
  const table = document.getElementById("latents"), body = table.tBodies[0];
  const search = document.getElementById("search"), further = document.getElementById("further");
  const count = document.getElementById("count");
  const href = (row) => `${listed.folder}${row[0]}.html`;

  // "I'm feeling lucky" of other pages ends here and goes on at once.
  const anyPage = () => href(listed.rows[Math.floor(Math.random() * listed.rows.length)]);
  if (location.hash === "#lucky") { location.replace(anyPage()); return; }
  document.getElementById("any").addEventListener("click", () => { location.href = anyPage(); });

  const cell = (list) => list.length === 1 ? { value: null, reason: list[0] } : { value: list[0], low: list[1], high: list[2] };
  const floor = (list) => list.length > 3 ? el("span", { class: "dim", title: "another latent’s explanation on the same windows" }, ` floor ${digits(list[3], 2)}`) : null;
  const percent = (v) => v === null ? "" : `${(100 * v).toPrecision(v < 0.1 ? 2 : 3)} %`;
  function drawRow(row) {
    const [latent, text, failure, explainer, density, ...scores] = row;
    return el("tr", {}, el("th", { scope: "row" }, el("a", { href: href(row) }, String(latent))),
      el("td", { class: "expl", dir: "auto" }, failure ? el("span", { class: "fail" }, failure) : text),
      el("td", {}, explainer), el("td", { class: "n" }, percent(density)),
      ...scores.map((list) => el("td", { class: "n" }, ...interval(cell(list), 2), floor(list))));
  }

  const heads = [...table.tHead.rows[0].cells];
  let order = null, found = [], drawn = 0;
  const key = (row, column) => {
    const value = column === 2 ? row[3] : column === 3 ? row[4] : column > 3 ? (row[column + 1].length > 1 ? row[column + 1][0] : null) : row[column];
    return value === null ? "" : String(value);
  };

  function more() {
    body.append(...found.slice(drawn, drawn + STEP).map(drawRow));
    drawn = Math.min(found.length, drawn + STEP);
    further.hidden = drawn >= found.length;
    further.textContent = `Show ${Math.min(STEP, found.length - drawn)} more of ${digits(found.length, 0)}`;
  }
  further.addEventListener("click", more);

  function refresh() {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    found = listed.rows.filter((row) => {
      const text = `${row[0]} ${row[1]} ${row[2]} ${row[3]}`.toLowerCase();
      return words.every((word) => text.includes(word));
    });
    if (order) {
      const kind = heads[order.column].querySelector("button").dataset.kind, sign = order.next === "ascending" ? 1 : -1;
      found = found.map((row, i) => ({ row, i, v: key(row, order.column) }))
        .sort((x, y) => compare(x.v, y.v, kind, sign) || x.i - y.i).map(({ row }) => row);
    }
    heads.forEach((head, i) => head.setAttribute("aria-sort", order && order.column === i ? order.next : "none"));
    count.textContent = `${found.length} of ${listed.rows.length}`;
    body.replaceChildren();
    drawn = 0;
    more();
  }

  heads.forEach((head, column) => {
    const button = head.querySelector("button.sort");
    button.addEventListener("click", () => {
      const now = head.getAttribute("aria-sort");
      order = { column, next: now === "none" ? button.dataset.first : now === "ascending" ? "descending" : "ascending" };
      remember({ sort: `${head.dataset.id}:${order.next}` });
      refresh();
    });
  });
  search.addEventListener("input", () => { remember({ q: search.value }); refresh(); });

  function restore() {
    const now = state(), [id, next] = (now.get("sort") || "").split(/:(?=[^:]*$)/);
    const column = heads.findIndex((head) => head.dataset.id === id);
    order = column >= 0 && ["ascending", "descending"].includes(next) ? { column, next } : null;
    search.value = now.get("q") || "";
    refresh();
  }
  addEventListener("hashchange", restore);
  restore();
})();
