"""D. N2G: can a latent be told from the few tokens before it? (METRICS D)

Patterns are built on the split explain (autointerp.n2g) and judged on every filtered token of the split score, with
full left context. P = share of firings on which the latent is active, R = share of its activations on which a pattern
fires. The unit of every interval is the latent; the text inside is held fixed.
"""

import logging
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from evals import n2g_scores, uncertainty
from evals.base import EvalContext, EvalResult, RowMaker
from evals.n2g_scores import Confusion, Firing
from evals.patterns import LATENTS, PAIRS, latent_cache, pairs_used, read_patterns
from evals.results import Estimate, Metric
from sae.console import track
from sae.manifest import content_of, rng

if TYPE_CHECKING:
    import pandas as pd

    from autointerp.latent_cache import LatentCache
    from autointerp.n2g_patterns import PatternSet, TokenIndex

GAO = "Gao et al. 2024 (arXiv 2406.04093) 4.3"
BY_LATENT = "Interval: latents."

logger = logging.getLogger(__name__)


def _metric(
    name: str, title: str, description: str, *, better: Literal["higher", "lower", "neither"] = "higher",
    unit: str = "share", low: float = 0.0, high: float = 1.0, headline: bool = False, reference: str = GAO,
) -> Metric:
    return Metric(name=name, title=title, unit=unit, better=better, description=f"{description} {BY_LATENT}",
                  reference=reference, low=low, high=high, headline=headline)


FLOORS = {"floor_token": "the last tokens of the same activations as one-token patterns",
          "floor_shuffled": "the patterns of another latent of like density"}
METRICS = (
    _metric("n2g_f1", "N2G F1", "Mean of 2PR / (P + R); 0 for patterns that never fire.", headline=True),
    _metric("n2g_precision", "N2G precision", "Mean of P over latents whose patterns fire.", headline=True),
    _metric("n2g_recall", "N2G recall", "Mean of R.", headline=True),
    _metric("n2g_recall_16", "N2G recall, 16 activations", "Mean of R on 16 random activations: the paper's recall."),
    _metric("n2g_precision_lift", "N2G precision lift", "Mean of (P - d) / (1 - d), d the latent's density.",
            low=-math.inf, reference="METRICS D"),
    _metric("n2g_f1_weighted", "N2G F1, weighted", "F1 weighted by activations: that of a random active latent.",
            reference="METRICS D"),
    _metric("n2g_precision_weighted", "N2G precision, weighted", "P weighted by activations.", reference="METRICS D"),
    _metric("n2g_recall_weighted", "N2G recall, weighted", "R weighted by activations.", reference="METRICS D"),
    _metric("n2g_pearson", "N2G correlation", "Mean correlation of predicted and true activation over all tokens.",
            low=-1.0, unit="correlation", reference="METRICS D"),
    _metric("n2g_length", "N2G pattern length", "Mean number of literal tokens per pattern.", better="neither",
            unit="tokens", high=math.inf, reference="METRICS D"),
    _metric("n2g_wildcard_share", "N2G wildcards", "Share of wildcards among pattern positions.", better="neither",
            reference="METRICS D"),
    _metric("floor_always_f1", "Floor: always on", "Mean of 2d / (1 + d), the F1 of firing on every token.",
            better="neither", reference="METRICS D"),
    *(_metric(f"{floor}_{name}", f"Floor, {name}: {floor[6:]}", f"n2g_{name} of {text}.", better="neither",
              reference="METRICS D")
      for floor, text in FLOORS.items() for name in ("f1", "precision", "recall")),
    *(_metric(f"gain_over_{floor[6:]}", f"N2G F1 over the {floor[6:]} floor", f"Mean F1 minus that of {text}, paired.",
              low=-1.0, reference="METRICS D")
      for floor, text in FLOORS.items()),
)  # fmt: skip


class N2G:
    """The plug-in."""

    name = "n2g"
    title = "N2G explainability"
    version = 3
    metrics: tuple[Metric, ...] = METRICS
    needs = frozenset({"interp", "scores", "lm"})
    uses = frozenset({"sparse"})

    def config(self, preset: str) -> dict[str, Any]:
        """Sizes of the preset."""
        return {"pairs": PAIRS, "recall_sample": n2g_scores.RECALL_SAMPLE, "latents": LATENTS[preset],
                "resamples": uncertainty.resamples_of(preset)}

    def inputs(self, ctx: EvalContext) -> dict[str, str]:
        inputs = {"latents": latent_cache(ctx).key}
        if ctx.scores is not None:
            inputs["scores"] = content_of(ctx.scores)
        return inputs

    def run(self, ctx: EvalContext) -> EvalResult:
        """Rows over the explained latents; one line of details per latent, failed builds included."""
        import pandas as pd

        cache = latent_cache(ctx)
        patterns, failures = read_patterns(ctx)
        n_pairs = pairs_used(ctx)
        table = pd.DataFrame(latent_rows(cache, patterns, ctx.seed, n_pairs))
        rows = RowMaker(self, ctx)
        if table.empty:
            code = max(set(failures.values()), key=list(failures.values()).count) if failures else "too_few_positive"
            for metric in ("n2g_f1", "n2g_precision", "n2g_recall"):
                rows.add(metric, Estimate.undefined(code, n_failed=len(failures)), split="score")
        else:
            _add_rows(rows, table, ctx, n_failed=len(failures))
        failed = pd.DataFrame({"latent": sorted(failures), "failure": [failures[i] for i in sorted(failures)]})
        details = pd.concat([_details(table), failed], ignore_index=True)
        counts = {
            "n_pairs": n_pairs, "n_latents": len(table), "n_failed_builds": len(failures),
            "n_eligible": int(len(cache.eligible())),
            "n_silent": int((table.n_fires == 0).sum()) if len(table) else 0,
            "n_low_support": int(table.n_fires.between(1, n2g_scores.LOW_SUPPORT - 1).sum()) if len(table) else 0,
            "n_tokens": int(np.asarray(cache.keep("score")).sum()),
        }
        return EvalResult(rows=rows.rows, details=details, counts=counts)


def latent_rows(
    cache: "LatentCache", patterns: "Mapping[int, PatternSet]", seed: int, n_pairs: int = PAIRS
) -> list[dict[str, Any]]:
    """What each latent's patterns, and the floors, reach on the split score; ascending by latent. ``n_pairs``:
    activations that the floor of single tokens is built from, as many as the patterns had."""
    from autointerp.exemplars import draw_pairs
    from autointerp.n2g import token_patterns
    from autointerp.n2g_patterns import TokenIndex

    tokens = cache.tokens("score")
    keep_N = np.asarray(cache.keep("score"), dtype=bool)
    index, n_tokens = TokenIndex(np.asarray(tokens.tokens_BL)), int(keep_N.sum())
    latents = sorted(patterns)
    active = {i: _active(cache, i) for i in latents}
    partner = n2g_scores.partners_of_like_density(latents, [len(active[i].flat_n) / n_tokens for i in latents])
    rows = []
    for latent in track(latents, "N2G on the split score", unit="latents"):
        found, predicted = _measure(patterns[latent], index, keep_N, active[latent])
        row: dict[str, Any] = {"latent": latent, **_columns("n2g", found), "n_fires": found.n_fires,
                               "n_active": found.n_active, "density": found.density}
        draw = rng(seed, cache.sae_id, latent, "n2g_recall_16")
        row["n2g_recall_16"] = n2g_scores.sampled_recall(predicted, active[latent], draw)
        row["n2g_precision_lift"] = found.lift
        row["n2g_pearson"] = n2g_scores.pearson(predicted, active[latent], n_tokens)
        row |= _shape(patterns[latent])
        row["floor_always_f1"] = n2g_scores.always_f1(found.density)
        one_token = token_patterns(draw_pairs(cache, latent, n_pairs, seed=seed), pad_id=patterns[latent].pad_id)
        row |= _columns("floor_token", _measure(one_token, index, keep_N, active[latent])[0])
        if latent in partner:
            other = _measure(patterns[partner[latent]], index, keep_N, active[latent])[0]
            row |= _columns("floor_shuffled", other)
        for name, hits, of in (("precision", found.n_both, found.n_fires), ("recall", found.n_both, found.n_active)):
            interval = uncertainty.wilson(hits, of)
            row[f"{name}_low"], row[f"{name}_high"] = interval or (math.nan, math.nan)
        rows.append(row)
    return rows


def _active(cache: "LatentCache", latent: int) -> Firing:
    flat, value = cache.entries(latent, "score")
    return Firing(flat.astype(np.int64), value.astype(np.float64))


def _measure(
    patterns: "PatternSet", index: "TokenIndex", keep_N: np.ndarray, active: Firing
) -> tuple[Confusion, Firing]:
    from autointerp.n2g_patterns import predict

    flat, value = predict(patterns, index, keep_N)
    predicted = Firing(flat, value.astype(np.float64))
    return n2g_scores.confusion(predicted, active, int(keep_N.sum())), predicted


def _columns(name: str, found: Confusion) -> dict[str, float]:
    return {f"{name}_f1": found.f1, f"{name}_precision": found.precision, f"{name}_recall": found.recall}


def _shape(patterns: "PatternSet") -> dict[str, float]:
    lengths = [len(p.ids) for p in patterns.patterns]
    literals = [p.n_literals for p in patterns.patterns]
    return {"n2g_length": float(np.mean(literals)), "n2g_wildcard_share": 1 - sum(literals) / sum(lengths),
            "n_patterns": len(lengths)}


def _add_rows(rows: RowMaker, table: "pd.DataFrame", ctx: EvalContext, *, n_failed: int) -> None:
    """Plain and activation-weighted means over latents; a latent where a value is undefined is counted as failed."""
    resamples = uncertainty.resamples_of(ctx.preset)
    for metric in METRICS:
        column = metric.name.removesuffix("_weighted")
        if metric.name.startswith("gain_over_"):
            values = table["n2g_f1"] - table.get(f"floor_{metric.name.removeprefix('gain_over_')}_f1", math.nan)
        elif column not in table:  # floor_shuffled of a single latent
            continue
        else:
            values = table[column]
        defined = values.notna()
        weights = table["n_active"] if metric.name.endswith("_weighted") else table["n_active"] * 0 + 1
        estimate = uncertainty.ratio(
            (values * weights)[defined].to_numpy(), weights[defined].to_numpy(), rng(ctx.seed, "n2g", "latents"),
            resamples=resamples, code="undefined", n_failed=n_failed + int((~defined).sum()),
        )
        rows.add(metric.name, estimate, split="score")


def _details(table: "pd.DataFrame") -> "pd.DataFrame":
    """Per latent; ``<metric>.num / <metric>.den`` over all latents is the row of that metric."""
    if table.empty:
        return table
    more: dict[str, Any] = {"unit": table["latent"]}
    for name in ("n2g_f1", "n2g_precision", "n2g_recall"):
        more[f"{name}.num"], more[f"{name}.den"] = table[name].fillna(0.0), table[name].notna().astype(float)
    return table.assign(**more)


PLUGIN = N2G()
