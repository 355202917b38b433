// Windows and scores of one latent, drawn from the data block "drawn". All text goes in as text nodes.
"use strict";

(function () {
  const { el, svg, data, table, digits, onFirstOpen, shadeClass } = window.saescope;
  const LEVELS = 20; // shades; rounded up, so that the weakest activation still shows
  const drawn = data("drawn");
  if (!drawn) return;

  function token(piece, simulated) {
    const active = Array.isArray(piece), text = active ? piece[0] : piece;
    const shade = active && drawn.max > 0 ? Math.min(1, Math.ceil((piece[1] / drawn.max) * LEVELS) / LEVELS) : 0;
    if (!shade && !simulated) return document.createTextNode(text);
    const span = el("span", { class: "t" + shadeClass(shade) + (active && piece[2] ? " pk" : "") }, text);
    span.style.setProperty("--a", shade.toFixed(2));
    if (simulated !== undefined) span.style.setProperty("--s", (simulated / 100).toFixed(2));
    if (active) {
      span.dataset.v = String(piece[1]);
      span.title = `activation ${piece[1]}` + (simulated !== undefined ? `, simulated ${simulated / 100}` : "");
    } else span.title = `silent, simulated ${simulated / 100}`;
    return span;
  }

  // True activations as bars, simulated ones as a stepped line; each over its own top.
  function spark(w) {
    const step = 6, height = 26, n = w.m.length;
    const bars = w.t.map((piece, i) => {
      if (!Array.isArray(piece)) return null;
      const tall = Math.min(1, piece[1] / drawn.max) * (height - 2);
      return svg("rect", { class: "true", x: i * step + 0.5, y: height - tall, width: step - 1, height: tall });
    }).filter(Boolean);
    const level = (v) => height - (v / 100) * (height - 2);
    const path = w.m.map((v, i) => `${i ? "V" : "M0 "}${level(v)}H${(i + 1) * step}`).join("");
    const label = "true activations (bars) and simulated activations (line), token by token";
    return svg("svg", { class: "spark", viewBox: `0 0 ${n * step} ${height}`, role: "img", "aria-label": label },
      ...bars, svg("path", { class: "sim", d: path }));
  }

  const STATES = { "✓": "right", "✗": "wrong", "⚠": "failed" };
  const stateOf = (text) => STATES[text[0]] || "neutral";

  function verdict(text, positive) {
    const state = stateOf(text);
    const marks = / fuzzing \((right|wrong) tokens marked\)/.exec(text);
    const wrong = marks ? (marks[1] === "right" ? "says the wrong tokens are marked" : "says the right tokens are marked")
      : positive ? "says silent; it is active" : "says active; it is silent";
    const hint = { failed: "the judge gave no answer; counted as failed, not as no", wrong }[state];
    return el("span", { class: `verdict ${state}`, title: hint }, text);
  }

  function windowItem(w) {
    const verdicts = w.v || [];
    const wrong = verdicts.some((text) => ["wrong", "failed"].includes(stateOf(text)));
    const peak = Math.max(0, ...w.t.filter(Array.isArray).map((piece) => piece[1]));
    const meta = el("div", { class: "meta" }, el("span", { class: "tag" + (w.p ? "" : " quiet") }, w.k),
      peak > 0 ? el("span", { class: "peak" }, digits(peak, 2)) : null,
      ...verdicts.map((v) => verdict(v, w.p)), w.s ? el("span", { class: "src" }, w.s) : null);
    const item = el("li", { class: "window" + (wrong ? " wrong" : "") }, meta,
      el("p", { class: "text", dir: "auto" }, ...w.t.map((piece, i) => token(piece, w.m ? w.m[i] : undefined))));
    if (w.m) item.append(spark(w));
    if (w.f) item.append(el("p", { class: "fail" }, `Simulation failed: ${w.f}`));
    return item;
  }

  const place = document.getElementById("windows");
  for (const group of drawn.groups) {
    const list = () => el("ul", { class: "windows" }, ...group.windows.map(windowItem));
    if (group.fold) {
      const fold = el("details", {}, el("summary", {}, `${group.title} (${group.windows.length})`));
      onFirstOpen(fold, () => fold.append(list()));
      place.append(fold);
    } else {
      const count = el("span", { class: "dim" }, `(${group.windows.length})`);
      place.append(el("h3", {}, `${group.title} `, count), list());
    }
  }

  // A share between 0 and 1 as a bar with its interval.
  function shareBar({ value, low, high }) {
    if (value === null || value < 0 || value > 1) return "";
    const parts = [svg("rect", { class: "hist", x: 0, y: 2, width: 100 * value, height: 7 })];
    if (low !== null && high !== null) {
      parts.push(svg("path", { class: "bar", d: `M${100 * low} 5.5H${100 * high}m0-3v6M${100 * low} 2.5v6` }));
    }
    return svg("svg", { class: "share-bar", viewBox: "-1 0 102 11", "aria-hidden": "true" }, ...parts);
  }

  // [value, low, high], or [reason] for a gap.
  const cell = (list) => list.length === 1 ? { value: null, reason: list[0] } : { value: list[0], low: list[1], high: list[2] };

  const byGroup = document.getElementById("by-group");
  if (byGroup) onFirstOpen(byGroup, () => {
    const rows = drawn.by_group.map(([explainer, scorer, metric, group, value, n]) =>
      [explainer, scorer, metric, group, cell(value), { node: shareBar(cell(value)) }, n]);
    byGroup.append(table("Scores by group", ["Explanation", "Scorer", "Metric", "Group", "#Value", "", "n (active + silent)"], rows));
  });

  const more = document.getElementById("more");
  if (more) onFirstOpen(more, () => {
    const judge = (name, auc, weak) => ({ node: el("span", {}, name, auc ? el("span", { class: "dim" }, ` check AUC ${auc}`) : null,
      weak ? el("span", { class: "tag warn", title: weak }, "weak judge") : null) });
    const rows = drawn.more.map(([, explainer, scorer, metric, value, floor, gain, n, failed, name, auc, weak]) =>
      [explainer, scorer, metric, cell(value), floor ? cell(floor) : "", gain === null ? "" : { value: gain }, n, failed, judge(name, auc, weak)]);
    const heads = ["Explanation", "Scorer", "Metric", "#Value", "#Floor", "#Value − floor", "n (active + silent)", "#Failed", "Judge"];
    const scroll = table("More metrics", heads, rows);
    [...scroll.querySelectorAll("tbody tr")].forEach((row, i) => row.classList.toggle("selected", Boolean(drawn.more[i][0])));
    more.append(scroll);
  });
})();
