// The leaderboard: filters, sorting, the plot of any metric against any other; all of it kept in the address.
"use strict";

(function () {
  const { el, svg, data, digits, sortable, state, remember } = window.saescope;
  const board = data("board-data");
  const table = document.getElementById("board");
  if (!board || !board.columns || !table) return;

  // -- filters: floors have no width of their own choosing, so they follow model and hookpoint alone
  const form = document.getElementById("filters");
  const fields = [...form.querySelectorAll("[name]")];
  const shown = new Set();

  function fits(subject, text) {
    const want = Object.fromEntries(fields.map((f) => [f.name, f.value.trim()]));
    const is = (name) => !want[name] || String(subject[name]) === want[name];
    if (!is("lm") || !is("hookpoint")) return false;
    if (subject.floor) return true;
    if (!is("architecture") || !is("d_sae")) return false;
    if (want.l0min !== "" && !(subject.l0 !== null && subject.l0 >= Number(want.l0min))) return false;
    if (want.l0max !== "" && !(subject.l0 !== null && subject.l0 <= Number(want.l0max))) return false;
    return want.q.toLowerCase().split(/\s+/).every((word) => text.includes(word));
  }

  // -- recipes: SAEs that differ in the training seed alone, folded under one line unless somebody wants to see them
  const groups = [...table.querySelectorAll("tr[data-head]")].map((head) => {
    const title = head.cells[0].dataset.v;
    return { head, title, button: head.querySelector("button.fold"), open: false, unfolded: false,
      rows: [...head.parentNode.rows].filter((row) => row !== head), recipe: (board.recipes || []).find((r) => r.title === title) };
  });
  const every = document.getElementById("every");
  const headOf = new Map(groups.flatMap((group) => group.rows.map((row) => [row, group])));
  const keepFolds = () => remember({ seeds: every && every.checked ? "all" : groups.filter((g) => g.open).map((g) => g.title).join("|") });
  for (const group of groups) group.button.addEventListener("click", () => {
    group.open = !group.unfolded;
    if (every.checked && !group.open) { every.checked = false; for (const other of groups) other.open = other !== group; }
    keepFolds();
    filter();
  });
  if (every) every.addEventListener("change", () => { for (const group of groups) group.open = false; keepFolds(); filter(); });

  const rows = [...table.querySelectorAll("tr[data-i]")];
  const texts = new Map(rows.map((row) => [row, `${row.textContent} ${headOf.has(row) ? headOf.get(row).title : ""}`.toLowerCase()]));
  const count = document.getElementById("count");
  function filter() {
    shown.clear();
    for (const row of rows) {
      const i = Number(row.dataset.i), keep = fits(board.subjects[i], texts.get(row));
      row.hidden = !keep;
      if (keep) shown.add(i);
    }
    for (const group of groups) { // one that the filters split shows what is left of it
      const kept = group.rows.filter((row) => !row.hidden);
      group.unfolded = every.checked || group.open || (kept.length > 0 && kept.length < group.rows.length);
      group.head.hidden = !kept.length;
      group.button.setAttribute("aria-expanded", String(group.unfolded));
      if (!group.unfolded) for (const row of kept) row.hidden = true;
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

  // -- what the page leaves to this script, for its weight: keys to sort by, usual hints, and the little interval plots
  const heads = [...table.tHead.rows[0].cells];
  const first = heads.findIndex((head) => head.dataset.id === board.columns[0].id);
  function bar(bounds, [value, low, high], floor) {
    const x = (v) => (4 + 68 * Math.min(1, Math.max(0, (v - bounds.low) / (bounds.high - bounds.low)))).toFixed(1);
    const set = { v: x(value) };
    if (typeof low === "number" && typeof high === "number") { set.l = x(low); set.w = (x(high) - x(low)).toFixed(1); }
    if (typeof floor === "number") set.f = x(floor);
    const node = el("span", { class: "ib", "aria-hidden": "true" });
    for (const [name, number] of Object.entries(set)) node.style.setProperty(`--${name}`, number);
    return node;
  }
  function finish(row, cells, floorOf) {
    board.columns.forEach((column, c) => {
      const cell = row.cells[first + c], value = typeof cells[c][0] === "number" ? cells[c][0] : null;
      cell.dataset.v = value === null ? "" : String(value);
      if (value === null) return;
      if (!cell.title) cell.title = column.usual;
      if (board.bars[c]) cell.append(bar(board.bars[c], cells[c], floorOf(c)));
    });
  }
  // A column's own floor (shuffled explanations) of the same SAE, else the value of its random SAE.
  const floorOf = (s) => (c) => {
    const own = board.bars[c].own.map((other) => s.cells[other][0]).find((v) => typeof v === "number");
    return own !== undefined ? own : s.random >= 0 ? board.subjects[s.random].cells[c][0] : null;
  };
  for (const row of rows) finish(row, board.subjects[Number(row.dataset.i)].cells, floorOf(board.subjects[Number(row.dataset.i)]));
  for (const { head, recipe } of groups) finish(head, recipe.cells, (c) => {
    const found = recipe.members.map((i) => floorOf(board.subjects[i])(c)).filter((v) => typeof v === "number");
    return found.length ? found.reduce((a, b) => a + b) / found.length : null;
  });
  const sort = sortable(table, (column, next) => remember({ sort: `${heads[column].dataset.id}:${next}` }));

  // -- columns: at first those without any value are off, and on a phone what the name says anyway
  const narrow = matchMedia("(max-width: 640px)").matches;
  const usual = heads.filter((head) => head.hasAttribute("data-off") || (narrow && ["architecture", "d_sae", "k"].includes(head.dataset.id)))
    .map((head) => head.dataset.id);
  const boxes = heads.slice(1).map((head) => el("input", { type: "checkbox", value: head.dataset.id }));
  const columns = document.getElementById("columns");
  columns.querySelector(".checks").append(...heads.slice(1).map((head, i) =>
    el("label", { class: "check" }, boxes[i], ` ${head.querySelector("button").firstChild.textContent}`)));
  function hide(ids) {
    heads.forEach((head, c) => {
      const off = ids.includes(head.dataset.id);
      for (const row of table.rows) if (row.cells.length === heads.length) row.cells[c].hidden = off;
    });
    for (const box of boxes) box.checked = !ids.includes(box.value);
    columns.querySelector("summary").textContent = `Columns (${boxes.filter((box) => box.checked).length} of ${boxes.length})`;
  }
  for (const box of boxes) box.addEventListener("change", () => {
    const off = boxes.filter((b) => !b.checked).map((b) => b.value);
    remember({ hide: off.join() === usual.join() ? "" : off.join() || "none" });
    hide(off);
  });

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

  const label = (s) => s.label || (s.floor ? s.id.split(".")[1] : s.id.split(".").find((part) => part.startsWith(s.architecture))) || s.short;

  // The first of eight spots that hits nothing; with many marks a label without one is left out.
  function spot(text, x, y, taken, crowded) {
    const width = 6.4 * text.length;
    const spots = [[10, -7, "start"], [-10, -7, "end"], [10, 14, "start"], [-10, 14, "end"], [0, -13, "middle"], [0, 21, "middle"], [10, -21, "start"], [10, 28, "start"]];
    const boxes = spots.map(([dx, dy, anchor]) => {
      const left = x + dx - { start: 0, end: width, middle: width / 2 }[anchor];
      return { x: x + dx, y: y + dy, anchor, box: [left, y + dy - 11, left + width, y + dy + 3] };
    });
    const inside = ({ box }) => box[0] >= L && box[2] <= W && box[1] >= 0 && box[3] <= H - B + 2;
    const free = ({ box }) => taken.every((t) => box[2] < t[0] || box[0] > t[2] || box[3] < t[1] || box[1] > t[3]);
    const found = boxes.find((b) => inside(b) && free(b)) || (crowded ? null : boxes.find(inside) || boxes[0]);
    if (found) taken.push(found.box);
    return found;
  }

  function point([s, px, py], x, y, axisX, axisY, taken, crowded) {
    const cx = x.at(px[0]), cy = y.at(py[0]), parts = [];
    if (typeof py[1] === "number") parts.push(svg("path", { class: "bar", d: `M${cx} ${y.at(py[1])}V${y.at(py[2])}m-4 0h8M${cx - 4} ${y.at(py[1])}h8` }));
    if (typeof px[1] === "number") parts.push(svg("path", { class: "bar", d: `M${x.at(px[1])} ${cy}H${x.at(px[2])}m0-4v8M${x.at(px[1])} ${cy - 4}v8` }));
    const kind = s.floor ? -1 : names.indexOf(s.architecture), name = label(s), place = spot(name, cx, cy, taken, crowded);
    parts.push(mark(kind, cx, cy));
    if (place) parts.push(svg("text", { class: "label", x: place.x, y: place.y, "text-anchor": place.anchor }, name));
    const note = `${s.short}: ${say(axisX, px)}, ${say(axisY, py)}`;
    const drawn = svg("g", { class: `point ${kind < 0 ? "floor" : `s${kind % 6}`}` }, svg("title", {}, note), ...parts);
    return s.href ? svg("a", { href: s.href, "aria-label": note }, drawn)
      : svg("g", { tabindex: 0, role: "img", "aria-label": note }, drawn);
  }

  // What is folded in the table is one mark: its mean, and bars over the range of its seeds.
  function subjects() {
    const inside = new Set(), found = [];
    for (const { recipe, unfolded } of groups) {
      if (unfolded || !recipe || !recipe.members.every((i) => shown.has(i))) continue;
      for (const i of recipe.members) inside.add(i);
      const first = board.subjects[recipe.members[0]];
      found.push({ ...first, short: `${recipe.title}, mean of ${recipe.members.length} seeds`, label: recipe.title, href: "", cells: recipe.cells });
    }
    return [...[...shown].filter((i) => !inside.has(i)).sort((a, b) => a - b).map((i) => board.subjects[i]), ...found];
  }

  function draw() {
    const [axisX, axisY] = ["x", "y"].map((side) => axes.find((a) => a.id === choice[side].value));
    if (!axisX || !axisY) return;
    const found = subjects().map((s) => [s, axisX.of(s), axisY.of(s)]).filter(([, px, py]) => known(px) && known(py));
    if (!found.length) {
      place.replaceChildren(el("p", { class: "note" }, "None of the SAEs shown has both numbers."));
      return;
    }
    const x = scale(found.flatMap(([, px]) => ends(px)), L, W - R), y = scale(found.flatMap(([, , py]) => ends(py)), H - B, T);
    const name = (axis, s) => axis.title + (axis.unit ? ` (${axis.unit})` : "") + (s.log ? " (log)" : "") +
      ({ higher: " – higher is better", lower: " – lower is better" }[axis.better] || "");
    const title = `${axisY.title} against ${axisX.title}, ${found.length} marks`;
    const taken = found.map(([, px, py]) => [x.at(px[0]) - 6, y.at(py[0]) - 6, x.at(px[0]) + 6, y.at(py[0]) + 6]);
    place.replaceChildren(svg("svg", { class: "chart wide", viewBox: `0 0 ${W} ${H}`, role: "group", "aria-label": title },
      ...grid(x, y, name(axisX, x), name(axisY, y)), ...found.map((p) => point(p, x, y, axisX, axisY, taken, found.length > 8))));
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
    const folds = (now.get("seeds") || "").split("|");
    if (every) every.checked = folds[0] === "all";
    for (const group of groups) group.open = folds.includes(group.title);
    hide(now.has("hide") ? now.get("hide").split(",") : usual);
    filter();
  }
  addEventListener("hashchange", restore);
  restore();
})();
