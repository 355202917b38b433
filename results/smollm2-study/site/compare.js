// Two subjects of the board side by side; which two is kept in the address: #a=…&b=…
"use strict";

(function () {
  const { el, svg, data, interval, table, state, remember, parts } = window.saescope;
  const all = data("compare-data");
  if (!all) return;
  const sides = { a: document.getElementById("side-a"), b: document.getElementById("side-b") };
  for (const select of Object.values(sides)) {
    for (const s of all.subjects) select.append(el("option", { value: s.id }, s.short + (s.floor ? " (floor)" : "")));
  }
  const index = (side) => all.subjects.findIndex((s) => s.id === sides[side].value);
  const cell = (list) => list.length === 1 ? { value: null, reason: list[0] } : { value: list[0], low: list[1], high: list[2] };
  const link = (s) => el("a", { href: s.href }, s.short);

  function verdict(column, [, low, high]) {
    if (column.better === "neither" || column.weak || low === null) return "";
    if (low <= 0 && high >= 0) return el("span", { class: "undecided" }, el("span", { class: "vd" }, "? undecided"));
    const good = (low > 0) === (column.better === "higher");
    return el("span", { class: good ? "better" : "worse" }, el("span", { class: "vd" }, good ? "✓ A better" : "✗ B better"));
  }

  // The difference around zero, over the largest of its ends.
  function bar([value, low, high]) {
    const top = Math.max(Math.abs(value), Math.abs(low ?? value), Math.abs(high ?? value)) || 1, x = (v) => 50 + (46 * v) / top;
    const parts = [svg("line", { class: "rail", x1: 2, x2: 98, y1: 6, y2: 6 }), svg("line", { class: "tickfloor", x1: 50, x2: 50, y1: 0, y2: 12 })];
    if (low !== null) parts.push(svg("line", { class: "ci", x1: x(low), x2: x(high), y1: 6, y2: 6 }));
    return svg("svg", { class: "mini diff", viewBox: "0 0 100 12", "aria-hidden": "true" }, ...parts, svg("circle", { class: "dot", cx: x(value), cy: 6, r: 3 }));
  }

  function differences(i, j) {
    const a = all.subjects[i], b = all.subjects[j], [low, high] = i < j ? [i, j] : [j, i];
    const known = parts.get(low).pairs[`${low}-${high}`];
    const turn = (d) => d === null ? null : i < j ? d : [-d[0], d[2] === null ? null : -d[2], d[1] === null ? null : -d[1], d[3]];
    const measured = all.columns.map((column, c) => [column, c]).filter(([, c]) => a.cells[c].length > 1 || b.cells[c].length > 1);
    const rows = measured.map(([column, c]) => {
      const d = known ? turn(known[c]) : null;
      const arrow = { higher: " ↑", lower: " ↓" }[column.better] || "";
      const name = el("span", { title: column.what }, column.title + arrow, column.weak ? el("span", { class: "tag warn", title: column.weak }, "weak judge") : null);
      const gap = { value: null, reason: known ? "one of the two has no value" : "other model or hookpoint" };
      const difference = d === null ? gap : { value: d[0], low: d[1], high: d[2] };
      return [{ node: name }, ...[a.cells[c], b.cells[c]].map((list) => ({ node: el("span", { class: "n" }, ...interval(cell(list), column.digits)) })),
        { node: el("span", { class: "n" }, ...interval(difference, column.digits)) }, { node: d === null ? "" : bar(d) },
        { node: d === null ? "" : verdict(column, d) }, d === null || d[1] === null ? "" : d[3] ? "paired" : "independent"];
    });
    const left = all.columns.length - measured.length;
    return el("div", {}, table("Measurements of both", ["Metric", "A", "B", "A − B", "", "Verdict", "Interval"], rows),
      left ? el("p", { class: "note" }, `${left} more column${left > 1 ? "s" : ""} of the leaderboard ha${left > 1 ? "ve" : "s"} a value for neither.`) : null);
  }

  function matched(i, j) {
    const pairs = parts.get(i).matched[`${i}-${j}`];
    if (!pairs) return el("p", { class: "note" }, "There is nothing to match: both need their weights, explained latents of A, and the same hookpoint.");
    const folder = (s) => `latent/${s.href.replace(/^sae\//, "").replace(/\.html$/, "")}/`;
    const latent = (side, number) => {
      const text = parts.get(side).texts[number];
      const label = text === undefined ? String(number) : el("a", { href: `${folder(all.subjects[side])}${number}.html` }, String(number));
      return { node: el("span", {}, label, text ? el("span", { dir: "auto" }, ` ${text}`) : null) };
    };
    const middle = pairs[Math.floor((pairs.length - 1) / 2)][2];
    const lead = el("p", { class: "note" }, `${pairs.length} explained latents of A; median cosine ${middle.toFixed(2)}.`);
    return el("div", {}, lead, table("Matched latents", ["Latent of A", "Nearest of B", "#Cosine"],
      pairs.map(([x, y, cosine]) => [latent(i, x), latent(j, y), { value: cosine }])));
  }

  // The file of one subject; when it is there the page is drawn again, whatever is chosen by then.
  const asked = new Set();
  function load(n) {
    if (asked.has(n)) return;
    asked.add(n);
    const script = el("script", { src: all.subjects[n].part });
    script.addEventListener("load", draw);
    script.addEventListener("error", () => {
      document.getElementById("differences").replaceChildren(el("p", { class: "fail" }, `${all.subjects[n].part} of this folder cannot be read; build the site again.`));
    });
    document.head.append(script);
  }

  function draw() {
    const i = index("a"), j = index("b");
    const places = { differences: document.getElementById("differences"), matched: document.getElementById("matched") };
    if (i < 0 || j < 0 || i === j) {
      for (const place of Object.values(places)) place.replaceChildren(el("p", { class: "note" }, "Choose two different SAEs."));
      return;
    }
    document.title = `${all.subjects[i].short} against ${all.subjects[j].short} · saescope`;
    const missing = [i, j].filter((n) => !parts.has(n));
    if (missing.length) {
      for (const place of Object.values(places)) place.replaceChildren(el("p", { class: "note" }, "…"));
      for (const n of missing) load(n);
      return;
    }
    places.differences.replaceChildren(el("p", {}, "A: ", link(all.subjects[i]), ", B: ", link(all.subjects[j])), differences(i, j));
    places.matched.replaceChildren(matched(i, j));
  }

  const keep = () => { remember({ a: sides.a.value, b: sides.b.value }); draw(); };
  for (const select of Object.values(sides)) select.addEventListener("change", keep);
  document.getElementById("swap").addEventListener("click", () => {
    [sides.a.value, sides.b.value] = [sides.b.value, sides.a.value];
    keep();
  });

  function restore() {
    const now = state(), ids = all.subjects.map((s) => s.id);
    sides.a.value = ids.includes(now.get("a")) ? now.get("a") : ids[0];
    sides.b.value = ids.includes(now.get("b")) ? now.get("b") : ids.find((id) => id !== sides.a.value) ?? ids[0];
    draw();
  }
  addEventListener("hashchange", restore);
  restore();
})();
