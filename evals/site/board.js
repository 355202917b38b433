// The leaderboard: filters, sorting, the plot of any metric against any other; all of it kept in the address.
"use strict";

(function () {
  const { el, svg, data, digits, sortable, state, remember } = window.saescope;
  const board = data("board-data");
  const table = document.getElementById("board");
  if (!board || !table) return;

  // -- filters: floors have no width of their own choosing, so they follow model and hookpoint alone
  const form = document.getElementById("filters");
  const fields = [...form.querySelectorAll("[name]")];
  const shown = new Set();

  function fits(subject, row) {
    const want = Object.fromEntries(fields.map((f) => [f.name, f.value.trim()]));
    const is = (name) => !want[name] || String(subject[name]) === want[name];
    if (!is("lm") || !is("hookpoint")) return false;
    if (subject.floor) return true;
    if (!is("architecture") || !is("d_sae")) return false;
    if (want.l0min !== "" && !(subject.l0 !== null && subject.l0 >= Number(want.l0min))) return false;
    if (want.l0max !== "" && !(subject.l0 !== null && subject.l0 <= Number(want.l0max))) return false;
    const text = row.textContent.toLowerCase();
    return want.q.toLowerCase().split(/\s+/).every((word) => text.includes(word));
  }

  const rows = [...table.querySelectorAll("tr[data-i]")];
  const count = document.getElementById("count");
  function filter() {
    shown.clear();
    for (const row of rows) {
      const i = Number(row.dataset.i), keep = fits(board.subjects[i], row);
      row.hidden = !keep;
      if (keep) shown.add(i);
    }
    const total = board.subjects.filter((s) => !s.floor).length;
    count.textContent = `${[...shown].filter((i) => !board.subjects[i].floor).length} of ${total} SAEs`;
    draw();
  }
  for (const field of fields) field.addEventListener("input", () => { remember({ [field.name]: field.value.trim() }); filter(); });
  form.addEventListener("submit", (event) => event.preventDefault());
  document.getElementById("reset").addEventListener("click", () => {
    for (const field of fields) { field.value = ""; remember({ [field.name]: "" }); }
    filter();
  });

  const heads = [...table.tHead.rows[0].cells];
  const sort = sortable(table, (column, next) => remember({ sort: `${heads[column].dataset.id}:${next}` }));

  // -- the plot
  const axes = [...board.columns.map((c, i) => ({ ...c, of: (s) => s.cells[i] })),
    ...board.facts.map((f) => ({ ...f, unit: "", digits: 0, better: "neither", of: (s) => [s[f.id] === null ? "none" : s[f.id]] }))];
  const choice = { x: document.getElementById("axis-x"), y: document.getElementById("axis-y") };
  for (const select of Object.values(choice)) {
    for (const axis of axes) select.append(el("option", { value: axis.id }, axis.title));
  }
  const names = [...new Set(board.subjects.filter((s) => !s.floor).map((s) => s.architecture))].sort();
  const place = document.getElementById("explore");
  const W = Math.max(320, Math.min(900, place.clientWidth || 720)), H = W < 500 ? 330 : 420, L = 64, R = 20, T = 16, B = 50;

  function ticks(low, high, log) {
    if (log) {
      const found = [], steps = Math.log10(high / low) < 2.2 ? [1, 2, 5] : [1];
      for (let d = Math.floor(Math.log10(low)); d <= Math.log10(high); d++) {
        for (const s of steps) if (s * 10 ** d >= low && s * 10 ** d <= high) found.push(s * 10 ** d);
      }
      return found;
    }
    let step = 10 ** Math.floor(Math.log10((high - low) / 4));
    step *= [1, 2, 2.5, 5, 10].find((m) => (high - low) / (step * m) <= 5.5);
    const found = [];
    for (let i = Math.ceil(low / step - 1e-9); i * step <= high + 1e-9 * step; i++) found.push(i * step);
    return found;
  }

  function scale(values, start, end) {
    let low = Math.min(...values), high = Math.max(...values);
    const log = low > 0 && high / low > 8;
    if (log) { low /= 1.35; high *= 1.35; } else {
      const pad = 0.08 * (high - low || Math.abs(high) || 1);
      low -= pad; high += pad;
    }
    const f = log ? Math.log : (v) => v;
    return { low, high, log, at: (v) => start + ((f(v) - f(low)) / (f(high) - f(low))) * (end - start) };
  }

  function mark(kind, x, y) {
    if (kind < 0) return svg("circle", { class: "floor", cx: x, cy: y, r: 4.5 });
    const shape = [() => svg("circle", { cx: x, cy: y, r: 5.5 }), () => svg("rect", { x: x - 5, y: y - 5, width: 10, height: 10 }),
      () => svg("path", { d: `M${x} ${y - 6.5}l6.5 11.5h-13z` }), () => svg("path", { d: `M${x} ${y - 6.5}l6.5 6.5-6.5 6.5-6.5-6.5z` })];
    return svg("g", { class: `s${kind % 6}` }, shape[kind % 4]());
  }

  const known = (list) => list !== undefined && typeof list[0] === "number";
  const ends = (list) => known(list) ? [list[0], ...[list[1], list[2]].filter((v) => typeof v === "number")] : [];
  const say = (axis, list) => `${axis.title} ${digits(list[0], axis.digits)}` +
    (typeof list[1] === "number" ? ` [${digits(list[1], axis.digits)}, ${digits(list[2], axis.digits)}]` : "");

  function grid(x, y, nameX, nameY) {
    const parts = [], text = (v) => Math.abs(v) >= 1e5 ? v.toExponential(0) : String(Number(v.toPrecision(6)));
    for (const v of ticks(y.low, y.high, y.log)) {
      parts.push(svg("line", { class: "grid", x1: L, x2: W - R, y1: y.at(v), y2: y.at(v) }),
        svg("text", { class: "tick", x: L - 7, y: y.at(v) + 3.5, "text-anchor": "end" }, text(v)));
    }
    for (const v of ticks(x.low, x.high, x.log)) {
      parts.push(svg("line", { class: "grid", x1: x.at(v), x2: x.at(v), y1: T, y2: H - B }),
        svg("text", { class: "tick", x: x.at(v), y: H - B + 16, "text-anchor": "middle" }, text(v)));
    }
    parts.push(svg("text", { class: "axis", x: (L + W - R) / 2, y: H - 10, "text-anchor": "middle" }, nameX),
      svg("text", { class: "axis", transform: `translate(14 ${(T + H - B) / 2}) rotate(-90)`, "text-anchor": "middle" }, nameY));
    return parts;
  }

  const label = (s) => (s.floor ? s.id.split(".")[1] : s.id.split(".").find((part) => part.startsWith(s.architecture))) || s.short;

  function point(s, px, py, x, y, axisX, axisY) {
    const cx = x.at(px[0]), cy = y.at(py[0]), parts = [];
    if (typeof py[1] === "number") parts.push(svg("path", { class: "bar", d: `M${cx} ${y.at(py[1])}V${y.at(py[2])}m-4 0h8M${cx - 4} ${y.at(py[1])}h8` }));
    if (typeof px[1] === "number") parts.push(svg("path", { class: "bar", d: `M${x.at(px[1])} ${cy}H${x.at(px[2])}m0-4v8M${x.at(px[1])} ${cy - 4}v8` }));
    const kind = s.floor ? -1 : names.indexOf(s.architecture);
    const right = cx > (L + W) / 2;
    parts.push(mark(kind, cx, cy), svg("text", { class: "label", x: cx + (right ? -10 : 10), y: cy - 7, "text-anchor": right ? "end" : "start" }, label(s)));
    const note = `${s.short}: ${say(axisX, px)}, ${say(axisY, py)}`;
    return svg("a", { href: s.href, "aria-label": note },
      svg("g", { class: `point ${kind < 0 ? "floor" : `s${kind % 6}`}` }, svg("title", {}, note), ...parts));
  }

  function draw() {
    const [axisX, axisY] = ["x", "y"].map((side) => axes.find((a) => a.id === choice[side].value));
    const found = [...shown].sort((a, b) => a - b).map((i) => board.subjects[i])
      .map((s) => [s, axisX.of(s), axisY.of(s)]).filter(([, px, py]) => known(px) && known(py));
    if (!found.length) {
      place.replaceChildren(el("p", { class: "note" }, "None of the SAEs shown has both numbers."));
      return;
    }
    const x = scale(found.flatMap(([, px]) => ends(px)), L, W - R), y = scale(found.flatMap(([, , py]) => ends(py)), H - B, T);
    const name = (axis, s) => axis.title + (axis.unit ? ` (${axis.unit})` : "") + (s.log ? " (log)" : "") +
      ({ higher: " – higher is better", lower: " – lower is better" }[axis.better] || "");
    const title = `${axisY.title} against ${axisX.title}, ${found.length} subjects`;
    place.replaceChildren(svg("svg", { class: "chart wide", viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": title },
      ...grid(x, y, name(axisX, x), name(axisY, y)), ...found.map(([s, px, py]) => point(s, px, py, x, y, axisX, axisY))));
  }
  for (const [side, select] of Object.entries(choice)) {
    select.addEventListener("change", () => { remember({ [side]: select.value }); draw(); });
  }

  // -- the address: read at the start and when somebody edits it
  function restore() {
    const now = state();
    for (const field of fields) field.value = now.get(field.name) || "";
    choice.x.value = axes.some((a) => a.id === now.get("x")) ? now.get("x") : place.dataset.x;
    choice.y.value = axes.some((a) => a.id === now.get("y")) ? now.get("y") : place.dataset.y;
    const [id, next] = (now.get("sort") || "").split(/:(?=[^:]*$)/);
    const column = heads.findIndex((head) => head.dataset.id === id);
    if (column >= 0 && ["ascending", "descending"].includes(next)) sort(column, next);
    filter();
  }
  addEventListener("hashchange", restore);
  restore();
})();
