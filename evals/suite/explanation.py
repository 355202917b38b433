"""G. Explanations: the scores of autointerp joined to rows, each beside its shuffled floor (METRICS G, AUTOINTERP 5).

One slice per (explainer, scorer, judge); a prompted judge's name holds its mode, and judges are never averaged. The
slice `explainer=selected` takes for each latent the explanation that was chosen on the split calibrate. pi_l = share of
the score split's windows on which latent l is active, R_l = recall, phi_l = false-positive rate over all silent
windows. The unit is the latent.
"""

import logging
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from autointerp.records import Explanation, JudgeCheck, LatentScore
from evals import uncertainty
from evals.base import EvalContext, EvalResult, RowMaker
from evals.explained import read_explained
from evals.results import Estimate, Metric
from sae.manifest import content_of, rng

if TYPE_CHECKING:
    import pandas as pd

logger = logging.getLogger(__name__)
BY_LATENT = "Interval: latents."
SELECTED = "selected"
Better = Literal["higher", "lower", "neither"]


class Base(NamedTuple):
    """A per-latent metric of a scorer."""

    title: str
    description: str
    better: Better = "higher"
    unit: str = "share"
    low: float = 0.0
    high: float = 1.0


HEADLINE = ("auc", "pearson", "precision", "precision_at_half")
BILLS = "Bills et al. 2023; AUTOINTERP 4"
BASES: dict[str, Base] = {
    "auc": Base("AUC", "Mean share of (active, silent) window pairs in the right order; 0.5 is chance.", unit="AUC"),
    "balanced_accuracy": Base("Balanced accuracy", "Mean of (recall + 1 - fpr_silent) / 2; 0.5 is chance."),
    "precision": Base("Precision at the true rate", "sum pi R / sum (pi R + (1 - pi) phi): the share of windows called "
                      "active by the judge which are, at the rate at which the latents really fire; rises with that "
                      "rate under one and the same judge.", "neither"),
    "precision_at_half": Base("Precision at one half", "Mean of R / (R + phi), as if half of all windows were active."),
    "recall": Base("Recall", "Mean share of active windows that the judge finds, over quantile groups."),
    "f1": Base("F1", "Mean of 2PR / (P + R), P at the latent's true rate, with which it rises.", "neither"),
    "fpr_silent": Base("False positives", "Mean share of silent windows called active.", "lower"),
    "phi": Base("False positives, all strata", "Mean false-positive rate over all silent windows.", "lower"),
    "average_precision": Base("Average precision", "Mean average precision at the latent's true rate, with which it "
                              "rises.", "neither"),
    "accuracy": Base("Accuracy", "Mean share of trials answered right."),
    "pearson": Base("Simulation correlation", "Mean correlation of simulated and true activation at the true rate.",
                    unit="correlation", low=-1.0),
    "pearson_bills": Base("Simulation correlation, unweighted", "Mean correlation over the drawn windows.",
                          unit="correlation", low=-1.0),
    "r2_zero": Base("Simulation R2 against zero", "Mean of 1 - sum w(a - s)^2 / sum w a^2.", low=-math.inf),
    "r2": Base("Simulation R2", "Mean of 1 - sum w(a - s)^2 / sum w(a - mean)^2.", low=-math.inf),
    "abs_dev": Base("Simulation absolute deviation", "Mean of 1 - sum w|a - s| / sum w|a|.", low=-math.inf),
    "surprisal_gain": Base("Surprisal gain", "Mean rise of the explanation's log-probability under steering.",
                           unit="nats", low=-math.inf, high=math.inf),
    "choice": Base("Choice", "Mean share of right choices among three steered texts; 1/3 is chance."),
    "choice_likelihood": Base("Choice by likelihood", "The same where the explanation is likeliest; 1/3 is chance."),
}  # fmt: skip


def _declared() -> tuple[Metric, ...]:
    """Each base metric, its activation-weighted mean, its shuffled floor and the paired gain; judges; groups."""
    out = []
    for name, base in BASES.items():
        pooled = name == "precision"
        reference = BILLS if name.startswith(("pearson", "r2", "abs_dev")) else "AUTOINTERP 5.2"
        span = base.high - base.low
        variants: list[tuple[str, str, str, Better, float, float]] = [
            (name, base.title, base.description, base.better, base.low, base.high),
            (f"floor_{name}", f"Floor: {base.title}", f"{name} of another latent's explanation on the same windows.",
             "neither", base.low, base.high),
            (f"gain_{name}", f"{base.title} over its floor", f"{name} minus floor_{name}, paired by latent.",
             base.better, -span, span),
        ]  # fmt: skip
        if not pooled:
            text = f"{name} weighted by the latent's activations instead of equally."
            variants.append((f"{name}_weighted", f"{base.title}, weighted", text, base.better, base.low, base.high))
        out += [
            Metric(name=n, title=t, unit=base.unit, better=b, description=f"{d} {BY_LATENT}", reference=reference,
                   low=low, high=high, headline=n in HEADLINE)
            for n, t, d, b, low, high in variants
        ]  # fmt: skip
    out += [
        Metric(name=n, title=t, unit=u, better="neither", description=d, reference="AUTOINTERP 5.4", low=0.0, high=1.0)
        for n, t, u, d in (
            ("judge_auc", "Judge check", "AUC", "AUC of the judge on invented features. Interval: features."),
            ("judge_wrong_auc", "Judge check, wrong texts", "AUC", "The same under wrong descriptions."),
            ("judge_weak", "Judge is weak", "yes = 1", "judge_auc below 0.75 or less than 0.15 above judge_wrong_auc."),
        )
    ]
    groups: tuple[tuple[str, Better], ...] = (("recall", "higher"), ("auc", "higher"))
    out += [
        Metric(name=f"{n}_group", title=f"{BASES[n].title} by group", unit=BASES[n].unit, better=b, low=0.0, high=1.0,
               description=f"Mean {n} in one quantile group or against one kind of silent window. {BY_LATENT}",
               reference="AUTOINTERP 5.2")
        for n, b in groups
    ]  # fmt: skip
    out.append(Metric(
        name="fpr_group", title="False positives by kind", unit="share", better="lower", low=0.0, high=1.0,
        description=f"Mean share of one kind of silent window called active. {BY_LATENT}", reference="AUTOINTERP 5.2",
    ))  # fmt: skip
    return tuple(out)


METRICS = _declared()
NAMES = frozenset(m.name for m in METRICS)


class Cell(NamedTuple):
    """What one latent has in one slice."""

    true: Mapping[tuple[str, str], LatentScore]
    """By (metric, group)."""
    floor: Mapping[tuple[str, str], LatentScore]


class ExplanationScores:
    """The plug-in."""

    name = "explanation"
    title = "Explanations"
    version = 2
    metrics: tuple[Metric, ...] = METRICS
    needs = frozenset({"scores", "interp"})
    uses = frozenset({"sparse"})

    def config(self, preset: str) -> dict[str, Any]:
        return {"resamples": uncertainty.resamples_of(preset)}

    def inputs(self, ctx: EvalContext) -> dict[str, str]:
        return {"scores": content_of(ctx.scores)} if ctx.scores is not None else {}

    def run(self, ctx: EvalContext) -> EvalResult:
        """Rows of every (explainer, scorer, judge) that was scored; `undefined` where there are no scores at all."""
        rows = RowMaker(self, ctx)
        if ctx.scores is None:
            rows.add("auc", Estimate.undefined("too_few_positive"), slice=f"explainer={SELECTED}", split="score")
            return EvalResult(rows=rows.rows)
        scores, explanations, checks = read_explained(ctx.scores)
        slices = group_scores(scores, explanations)
        weights = _activations(ctx)
        for name, cells in slices.items():
            _add_slice(rows, name, cells, weights, ctx)
        for check in checks:
            _add_check(rows, check)
        ignored = sorted({s.metric for s in scores if not s.group and s.metric not in BASES})
        if ignored:
            logger.warning("metrics without a declaration are not in the rows: %s", ", ".join(ignored))
        weak = sorted(f"{c.scorer}/{c.judge}" for c in checks if c.weak)
        counts = {"n_scores": len(scores), "n_latents": len({s.latent for s in scores}), "judge_weak": weak,
                  "metrics_ignored": ignored, "null_reasons": _reasons(scores), "scorers": _versions(scores)}
        return EvalResult(rows=rows.rows, details=_details(slices, checks), counts=counts)


def _activations(ctx: EvalContext) -> dict[int, float]:
    """Activations of each latent on the split score; empty without a latent cache."""
    if ctx.latents is None:
        return {}
    column = ctx.latents.stats["n_active_score"]
    return {int(latent): float(n) for latent, n in column.items()}


def _reasons(scores: Iterable[LatentScore]) -> dict[str, int]:
    found = Counter(s.null_reason for s in scores if s.null_reason and not s.group and not s.floor_kind)
    return dict(sorted((str(k), n) for k, n in found.items()))


def _versions(scores: Iterable[LatentScore]) -> dict[str, int]:
    """Version of each scorer: what this evaluation joins may be newer than it is itself."""
    found = {s.scorer: s.scorer_version for s in scores}
    return dict(sorted(found.items()))


def _rank(e: Explanation) -> tuple[bool, bool, float, int, str]:
    """Smallest = preferred: selected, not failed, best on calibrate, lowest candidate."""
    return (not e.selected, e.failure is not None, -(e.calibrate_score or 0.0), e.candidate, e.explanation_id)


def chosen_explanations(explanations: Sequence[Explanation]) -> dict[tuple[str, int], str]:
    """(explainer, latent) -> explanation id, and ("selected", latent) -> that of the best of all explainers."""
    best: dict[tuple[str, int], Explanation] = {}
    for e in explanations:
        for key in ((e.explainer, e.latent), *(((SELECTED, e.latent),) if e.selected else ())):
            if key not in best or _rank(e) < _rank(best[key]):
                best[key] = e
    return {key: e.explanation_id for key, e in best.items()}


def group_scores(
    scores: Sequence[LatentScore], explanations: Sequence[Explanation]
) -> dict[str, dict[int, Cell]]:
    """Slice text -> latent -> its scores and those of its shuffled floor; sorted, so that order does not matter.

    A floor belongs to the explainer whose texts were exchanged; where only the selected ones were, the explainers of a
    latent's own and its foreign text may differ.
    """
    true: dict[tuple[str, str, int], dict[str, dict[tuple[str, str], LatentScore]]] = {}
    floor: dict[tuple[str, str, int], dict[str, dict[tuple[str, str], LatentScore]]] = {}
    ordered = sorted(scores, key=lambda s: (s.latent, s.scorer, s.judge, s.explainer, s.explanation_id))
    for s in ordered:
        where, by = (floor, s.explainer) if s.floor_kind == "shuffled" else (true, s.explanation_id)
        if not s.floor_kind or s.floor_kind == "shuffled":
            where.setdefault((s.scorer, s.judge, s.latent), {}).setdefault(by, {})[s.metric, s.group] = s
    chosen = chosen_explanations(explanations)
    explainer_of = {e.explanation_id: e.explainer for e in explanations}
    slices: dict[str, dict[int, Cell]] = {}
    for (scorer, judge, latent), by_explanation in true.items():
        floors = floor.get((scorer, judge, latent), {})
        for (explainer, of), explanation_id in chosen.items():
            if of != latent or explanation_id not in by_explanation:
                continue
            mine = floors.get(explainer_of[explanation_id])
            if mine is None and explainer == SELECTED and len(floors) == 1:
                mine = next(iter(floors.values()))
            name = f"explainer={_safe(explainer)},scorer={_safe(scorer)},judge={_safe(judge)}"
            slices.setdefault(name, {})[latent] = Cell(by_explanation[explanation_id], mine or {})
    return dict(sorted(slices.items()))


def _safe(name: str) -> str:
    """Commas and equals signs would break a slice apart."""
    return name.replace(",", "_").replace("=", "_")


def _add_slice(
    rows: RowMaker, name: str, cells: Mapping[int, Cell], weights: Mapping[int, float], ctx: EvalContext
) -> None:
    resamples = uncertainty.resamples_of(ctx.preset)

    def draw() -> np.random.Generator:
        return rng(ctx.seed, "explanation", "latents")

    for metric in sorted({m for c in cells.values() for m, group in c.true if not group and m in BASES}):
        if metric == "precision":
            _add_pooled(rows, name, cells, draw, resamples)
            continue
        value = {i: _value(c.true, metric) for i, c in cells.items()}
        floor = {i: _value(c.floor, metric) for i, c in cells.items()}
        reason = _reason(cells, metric)
        known = [i for i, v in value.items() if v is not None]
        missing = len(cells) - len(known)
        x = np.array([value[i] for i in known], dtype=np.float64)
        options: dict[str, Any] = {"resamples": resamples, "code": reason}
        rows.add(metric, uncertainty.mean(x, draw(), n_failed=missing, **options), slice=name, split="score")
        if weights:
            w = np.array([weights.get(i, 0.0) for i in known])
            estimate = uncertainty.ratio(x * w, w, draw(), n_failed=missing, **options)
            rows.add(f"{metric}_weighted", estimate, slice=name, split="score")
        if any(c.floor for c in cells.values()):
            f = np.array([v for v in floor.values() if v is not None], dtype=np.float64)
            estimate = uncertainty.mean(f, draw(), n_failed=len(cells) - len(f), **options)
            rows.add(f"floor_{metric}", estimate, slice=name, split="score")
            both = np.array([value[i] - floor[i] for i in known if floor[i] is not None], dtype=np.float64)  # type: ignore[operator]
            estimate = uncertainty.mean(both, draw(), n_failed=len(cells) - len(both), **options)
            rows.add(f"gain_{metric}", estimate, slice=name, split="score")
    _add_groups(rows, name, cells, draw, resamples)


def _value(scores: Mapping[tuple[str, str], LatentScore], metric: str, group: str = "") -> float | None:
    found = scores.get((metric, group))
    return None if found is None else found.value


def _reason(cells: Mapping[int, Cell], metric: str) -> str:
    """The commonest null reason of a metric, for the case that no latent has a value."""
    found = Counter(s.null_reason for c in cells.values() if (s := c.true.get((metric, ""))) is not None)
    found.pop(None, None)
    return str(min(found, key=lambda r: (-found[r], str(r)))) if found else "undefined"


def _pooled_sums(scores: Mapping[tuple[str, str], LatentScore]) -> tuple[float, float] | None:
    """(pi R, (1 - pi) phi) of one latent: right and wrong calls per window at its true rate."""
    recall, phi = scores.get(("recall", "")), _value(scores, "phi")
    if recall is None or recall.value is None or phi is None or recall.base_rate is None:
        return None
    return recall.base_rate * recall.value, (1 - recall.base_rate) * phi


def _precision(sums: np.ndarray) -> np.ndarray:
    called = sums[..., 0] + sums[..., 1]
    return np.asarray(np.where(called > 0, sums[..., 0] / np.where(called > 0, called, 1.0), np.nan))


def _add_pooled(
    rows: RowMaker, name: str, cells: Mapping[int, Cell], draw: Callable[[], np.random.Generator], resamples: int
) -> None:
    true = {i: s for i, c in cells.items() if (s := _pooled_sums(c.true)) is not None}
    floor = {i: s for i, c in cells.items() if (s := _pooled_sums(c.floor)) is not None}
    reason = _reason(cells, "precision")
    for metric, sums in (("precision", true), ("floor_precision", floor)):
        if metric == "precision" or any(c.floor for c in cells.values()):
            table = np.array([sums[i] for i in sorted(sums)], dtype=np.float64).reshape(-1, 2)
            estimate = uncertainty.function_of_sums(
                table, _precision, draw(), resamples=resamples, code=reason, n_failed=len(cells) - len(sums)
            )
            rows.add(metric, estimate, slice=name, split="score")
    both = sorted(true.keys() & floor.keys())
    if both:
        a, b = (np.array([sums[i] for i in both], dtype=np.float64) for sums in (true, floor))
        found = uncertainty.paired_difference(a, b, _precision, draw(), resamples=resamples, code=reason)
        estimate = replace(found.estimate, n_failed=len(cells) - len(both))
        rows.add("gain_precision", estimate, slice=name, split="score")


def _add_groups(
    rows: RowMaker, name: str, cells: Mapping[int, Cell], draw: Callable[[], np.random.Generator], resamples: int
) -> None:
    """Recall per quantile group, false positives and AUC per kind of silent window."""
    keys = sorted({k for c in cells.values() for k in c.true if k[1] and f"{k[0]}_group" in NAMES})
    for metric, group in keys:
        values = [_value(c.true, metric, group) for c in cells.values()]
        known = np.array([v for v in values if v is not None], dtype=np.float64)
        estimate = uncertainty.mean(
            known, draw(), resamples=resamples, code="no_hard_negative", n_failed=len(values) - len(known)
        )
        rows.add(f"{metric}_group", estimate, slice=f"{name},{group}", split="score")


def _add_check(rows: RowMaker, check: JudgeCheck) -> None:
    name = f"scorer={_safe(check.scorer)},judge={_safe(check.judge)}"
    values: tuple[tuple[str, float | None, float | None, float | None], ...] = (
        ("judge_auc", check.auc, check.ci_low, check.ci_high), ("judge_wrong_auc", check.wrong_auc, None, None),
        ("judge_weak", float(check.weak), None, None),
    )  # fmt: skip
    for metric, value, low, high in values:
        estimate = Estimate(value=value, ci_low=low, ci_high=high, n=check.n, n_failed=check.n_failed,
                            failure=None if value is not None else "undefined")
        rows.add(metric, estimate, slice=name, split="judge_check")


def _details(slices: Mapping[str, Mapping[int, Cell]], checks: Sequence[JudgeCheck]) -> "pd.DataFrame":
    """One line per slice, latent and metric, with its floor."""
    import pandas as pd

    weak = {f"scorer={_safe(c.scorer)},judge={_safe(c.judge)}" for c in checks if c.weak}
    records = [
        {
            "slice": name, "unit": latent, "metric": metric, "value": s.value, "floor": _value(cell.floor, metric),
            "base_rate": s.base_rate, "n_pos": s.n_pos, "n_neg": s.n_neg, "n_failed": s.n_failed,
            "null_reason": s.null_reason, "explanation_id": s.explanation_id,
            "judge_weak": name.partition(",")[2] in weak,
        }
        for name, cells in slices.items() for latent, cell in sorted(cells.items())
        for (metric, group), s in sorted(cell.true.items()) if not group
    ]  # fmt: skip
    return pd.DataFrame(records)


PLUGIN = ExplanationScores()
