"""Coverage of an SAE's explanations, and its scores beside those of shuffled explanations. Torch-free."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from evals import charts
from evals.board import plain
from evals.latent_page import ScoreColumn, floor_of, selected
from evals.page_data import LatentData, SaeData
from evals.page_text import number, visible


def floors_of(latent: LatentData) -> dict[str, float]:
    """Scores of another latent's explanation on this one's windows, by the keys of ``score_columns``."""
    chosen = selected(latent.explanations)
    shuffled = [s for s in latent.scores if s.floor_kind]
    found = {}
    for s in latent.scores:
        if chosen is None or s.group or s.floor_kind or s.explanation_id != chosen.explanation_id:
            continue
        floor = floor_of(s, shuffled)
        if floor is not None and floor.value is not None:
            found[f"{s.scorer}|{s.judge}|{s.metric}"] = float(floor.value)
    return found


def coverage(sae: SaeData) -> list[tuple[str, str]]:
    """How many latents are alive, have windows, an explanation, a score; and why the others have not."""
    if not sae.latents:
        return []
    facts: list[tuple[str, str]] = []
    if sae.stats is not None and "density" in sae.stats:
        alive = int((sae.stats["density"].to_numpy(dtype=float) > 0).sum())
        facts.append(("Alive", f"{alive:,} of {len(sae.stats):,} ({100 * alive / max(1, len(sae.stats)):.1f} %)"))
    chosen = [selected(x.explanations) for x in sae.latents]
    texts = sum(e is not None and e.failure is None and bool(e.text or e.pattern) for e in chosen)
    facts += [
        ("Chosen for explanation", f"{len(sae.latents):,}"),
        ("With windows", f"{sum(bool(x.exemplars) for x in sae.latents):,}"),
        ("With an explanation", f"{texts:,}"),
        ("Scored", f"{sum(any(not s.floor_kind for s in x.scores) for x in sae.latents):,}"),
    ]
    codes = Counter(e.failure.code for x in sae.latents for e in x.explanations if e.failure is not None)
    missing = Counter(f.code for x in sae.latents for f in x.failures)
    facts += [
        (title, ", ".join(f"{visible(code)} {n:,}" for code, n in sorted(found.items())))
        for title, found in (("Failed explanations", codes), ("Missing windows", missing))
    ]
    used = sum(e.prompt_tokens + e.output_tokens for x in sae.latents for e in x.explanations)
    facts.append(("Tokens used to explain", f"{used:,}" if used else ""))
    return facts


def _quartiles(values: Sequence[float]) -> str:
    import numpy as np

    low, middle, high = (number(float(q), 2) for q in np.quantile(np.asarray(values), (0.25, 0.5, 0.75)))
    return f"{middle} ({low} to {high})"


def distributions(sae: SaeData, columns: Sequence[ScoreColumn]) -> list[dict[str, Any]]:
    """Per score column: medians with quartiles, floors, latents above their own floor, and nulls by reason."""
    out = []
    pairs: dict[str, list[tuple[float, float | None]]] = {c.key: [] for c in columns}
    nulls: dict[str, Counter[str]] = {c.key: Counter() for c in columns}
    for latent in sae.latents:
        chosen, floors = selected(latent.explanations), floors_of(latent)
        for s in latent.scores:
            key = f"{s.scorer}|{s.judge}|{s.metric}"
            if chosen is None or key not in pairs or s.group or s.floor_kind:
                continue
            if s.explanation_id != chosen.explanation_id:
                continue
            value = plain(s.value)
            if value is None:
                nulls[key][s.null_reason or "no reason recorded"] += 1
            else:
                pairs[key].append((value, floors.get(key)))
    for column in columns:
        values = [v for v, _ in pairs[column.key]]
        known = [(v, f) for v, f in pairs[column.key] if f is not None]
        floors_known = [f for _, f in known]
        out.append({
            "title": column.title,
            "weak": column.weak,
            "n": len(values),
            "value": _quartiles(values) if values else "",
            "floor": _quartiles(floors_known) if known else "",
            "above": f"{sum(v > f for v, f in known):,} of {len(known):,}" if known else "",
            "nulls": ", ".join(f"{visible(code)} {n:,}" for code, n in sorted(nulls[column.key].items())),
            "svg": charts.overlaid(values, floors_known, f"{column.title}: latents, and floors as an outline"),
        })  # fmt: skip
    return out
