// A person's text: tokens with their latents, and what a push does. Asks the server of this page only.
"use strict";

(function () {
  const { el, table, digits, state, shadeClass } = window.saescope;
  const at = (id) => document.getElementById(id);
  const status = at("status");

  async function ask(path, question) {
    status.textContent = "…";
    try {
      const reply = await fetch(path, { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(question) });
      const answer = await reply.json();
      status.textContent = answer.error || "";
      return reply.ok ? answer : null;
    } catch {
      status.textContent = "the server does not answer";
      return null;
    }
  }

  const link = (found) => found.href ? el("a", { href: found.href }, String(found.latent)) : String(found.latent);
  let answer = null, marked = null;

  // Shading: the chosen latent's activation over its largest in the run; none chosen: the strongest latent of each token.
  function drawTokens() {
    const found = marked === null ? null : answer.latents.find((l) => l.latent === marked);
    const top = Math.max(1e-9, ...answer.tokens.map((t) => t.latents.length ? t.latents[0][1] : 0));
    at("tokens").replaceChildren(...answer.tokens.map((token, n) => {
      const share = found ? found.acts[n] / found.max : (token.latents.length ? token.latents[0][1] / top : 0);
      const button = el("button", { type: "button", class: `t token${shadeClass(share)}`, title: `${token.latents.length} strongest latents` }, token.text);
      button.style.setProperty("--a", Math.min(1, share).toFixed(2));
      button.addEventListener("click", () => drawAt(n));
      return button;
    }));
  }

  function drawAt(n) {
    const token = answer.tokens[n];
    const rows = token.latents.map(([latent, act]) => {
      const known = answer.latents.find((l) => l.latent === latent) || { latent, text: "", href: "" };
      return [{ node: el("span", {}, link(known)) }, { value: act }, known.text];
    });
    at("at").replaceChildren(el("h3", {}, `At token ${n + 1}: “${token.text}”`), table("Latents at this token", ["#Latent", "#Activation", "Explanation"], rows));
  }

  function drawLatents() {
    const rows = answer.latents.map((found) => {
      const show = el("button", { type: "button", class: "ghost" }, "show");
      show.addEventListener("click", () => { marked = marked === found.latent ? null : found.latent; drawTokens(); });
      const push = el("button", { type: "button", class: "ghost" }, "push");
      push.addEventListener("click", () => { at("latent").value = found.latent; at("h-steer").scrollIntoView(); at("strength").focus(); });
      return [{ node: el("span", {}, link(found)) }, { value: Math.max(...found.acts) }, { value: found.max }, found.text, { node: el("span", {}, show, " ", push) }];
    });
    at("latents").replaceChildren(table("Strongest latents", ["#Latent", "#Largest here", "#Largest in the run", "Explanation", ""], rows));
  }

  at("ask").addEventListener("submit", async (event) => {
    event.preventDefault();
    const found = await ask("/api/tokens", { sae_id: at("sae").value, text: at("text").value });
    if (!found) return;
    answer = found;
    marked = null;
    at("at").replaceChildren();
    drawTokens();
    drawLatents();
  });

  at("push").addEventListener("submit", async (event) => {
    event.preventDefault();
    const found = await ask("/api/steer", { sae_id: at("sae").value, text: at("text").value,
      latent: Number(at("latent").value), strength: Number(at("strength").value) });
    if (!found) return;
    const side = (name, part) => el("figure", {}, el("h3", {}, name),
      el("ol", { class: "near" }, ...part.next.map(([text, p]) => el("li", {}, el("span", { class: "chip", dir: "auto" }, text), ` ${digits(p, 3)}`))),
      el("p", { class: "text", dir: "auto" }, part.continuation));
    at("steered").replaceChildren(el("div", { class: "plots" }, side("As it is", found.clean), side("Pushed", found.steered)));
  });

  // A latent's page leads here with its own number.
  const asked = state(), option = [...at("sae").options].find((o) => asked.get("page") && o.dataset.page === asked.get("page"));
  if (option) at("sae").value = option.value;
  if (/^\d+$/.test(asked.get("latent") || "")) { at("latent").value = asked.get("latent"); at("text").focus(); }
})();
