"""From verdicts on windows to rows: recall per quantile group, false positives per kind, precision at the true rate.

Torch-free. Formulas: AUTOINTERP 5.2 (values) and 5.3 (intervals). A failed item leaves numerator and denominator and is
counted; ``value_worst`` counts it as a wrong answer. A metric is null where more than a tenth of the windows failed, of
all or of a side that it is made of: a judge that will not answer about active windows has no recall. Values never are
NaN: an undefined one is None with its reason. Rows from real values: :mod:`autointerp.ranked`.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from autointerp.cells import (
    SIDES,
    Cells,
    Counts,
    count_cells,
    count_items,
    failures_wrong,
    paired,
    positives_of,
    spoilt,
)
from autointerp.interfaces import ScoreJob, ScoreResult
from autointerp.ranked import value_rows
from autointerp.rates import (
    MAX_FAILED_SHARE,
    auc,
    choose_threshold,
    effective_counts,
    f1_of,
    interval_of,
    pooled_precision,
    precision_at,
    too_many_failed,
    wilson,
)
from autointerp.records import DIAGNOSTIC_KINDS, Exemplar, Failure, LatentScore, ScoreItem
from sae.manifest import rng

__all__ = [
    "MAX_FAILED_SHARE", "Counts", "auc", "base_score", "choose_threshold", "count_cells", "count_items",
    "detection_scores", "make_items", "null_scores", "pooled_precision", "positives_of",
]  # fmt: skip
N_DRAWS = 10_000
"""Draws of the Beta posteriors."""
HARD_KINDS = ("same_token", "co_occurring")
"""Negative kinds whose absence is reported as a null row."""
DETECTION_METRICS = (
    "recall", "fpr_silent", "phi", "balanced_accuracy", "precision", "precision_at_half", "f1", "auc",
)  # fmt: skip


def make_items(
    job: ScoreJob, exemplars: Sequence[Exemplar], values: Sequence[float | Failure], threshold: float, scorer: str
) -> list[ScoreItem]:
    """One item per window from a real-valued judge; the verdict is ``value > threshold``. A value that is no number is
    a failure."""
    items = []
    for exemplar, said in zip(exemplars, values, strict=True):
        value = said
        if not isinstance(said, Failure) and not math.isfinite(said):
            value = Failure(code="non_finite", stage="score", detail=f"the judge's value is {said}")
        failed = isinstance(value, Failure)
        items.append(
            ScoreItem(
                explanation_id=job.explanation.explanation_id,
                exemplar_id=exemplar.exemplar_id,
                scorer=scorer,
                positive=exemplar.positive,
                value=None if isinstance(value, Failure) else float(value),
                verdict=None if isinstance(value, Failure) else bool(value > threshold),
                failure=value if failed else None,  # type: ignore[arg-type]
            )
        )
    return items


@lru_cache(maxsize=512)
def beta_draws(slot: str, hit: float, miss: float) -> np.ndarray:
    """[N_DRAWS] of Beta(hit + 1/2, miss + 1/2). Shared by all latents (common random numbers): few distinct counts."""
    draws = rng("beta_draws", slot, hit, miss).beta(hit + 0.5, miss + 0.5, size=N_DRAWS)
    draws.flags.writeable = False
    return draws


class _Rates(NamedTuple):
    """Each a number, or a vector over draws."""

    recall: float | np.ndarray | None
    fpr_silent: float | np.ndarray | None
    phi: float | np.ndarray | None


def _strata(cells: Cells) -> list[tuple[float, Counts]]:
    """Share of the silent windows and counts, of the strata in which some window was answered."""
    return [(w, cells.strata[h]) for h, w in cells.shares.items() if cells.strata[h].n]


def _rates(cells: Cells) -> _Rates:
    groups = [c for c in cells.groups.values() if c.n]
    recall = sum(c.hit / c.n for c in groups) / len(groups) if groups else None
    silent, strata = cells.kinds.get("silent", Counts(0, 0)), _strata(cells)
    phi = min(1.0, sum(w * (c.hit / c.n) for w, c in strata)) if strata else None  # shares sum to 1 but for rounding
    return _Rates(recall, silent.hit / silent.n if silent.n else None, phi)


def drawn_rate(slot: str, cells: Sequence[tuple[float, Counts]]) -> np.ndarray | None:
    """[N_DRAWS] of the posterior of sum w hit/n over ``cells`` (weight, counts): Beta of the effective counts, so that
    the prior weighs half a window in all. Half a window per cell, with two windows in each of ten, pulled a recall of
    .95 below .91. None without cells. ``slot`` names the rate."""
    if not cells:
        return None
    weights, counts = zip(*cells, strict=True)
    found = effective_counts(weights, [c.hit for c in counts], [c.n for c in counts])
    return beta_draws(slot, round(found.hit, 9), round(found.miss, 9))


def _drawn_rates(cells: Cells) -> _Rates:
    groups = [c for c in cells.groups.values() if c.n]
    silent = cells.kinds.get("silent", Counts(0, 0))
    # The silent windows are part of the strata: their draws stand for fpr_silent alone.
    return _Rates(
        drawn_rate("recall", [(1 / len(groups), c) for c in groups]),
        drawn_rate("silent", [(1.0, silent)] if silent.n else []),
        drawn_rate("phi", _strata(cells)),
    )


def _metrics(rates: _Rates, pi: float | None) -> dict[str, float | np.ndarray | None]:
    """All values that follow from the three rates; vectors in, vectors out (NaN inside vectors where undefined)."""
    r, fpr, phi = rates

    def at(rate: float | None) -> float | np.ndarray | None:
        if r is None or phi is None or rate is None:
            return None
        if isinstance(r, np.ndarray) or isinstance(phi, np.ndarray):
            called = rate * r + (1 - rate) * phi
            return np.divide(rate * r, called, out=np.full(N_DRAWS, np.nan), where=called > 0)
        return precision_at(r, phi, rate)

    precision = at(pi)
    f1: float | np.ndarray | None
    if isinstance(precision, np.ndarray):
        f1 = 2 * precision * r / (precision + r)  # type: ignore[operator]
    else:
        f1 = None if r is None or isinstance(r, np.ndarray) else f1_of(precision, r)
    return {
        "recall": r,
        "fpr_silent": fpr,
        "phi": phi,
        "balanced_accuracy": None if r is None or fpr is None else (r + 1 - fpr) / 2,
        "precision": precision,
        "precision_at_half": at(0.5),
        "f1": f1,
    }


def base_score(job: ScoreJob, *, scorer: str, version: int, judge: str) -> dict:
    """The fields that all rows of one job share; ``LatentScore(metric=..., value=..., **base_score(...))``."""
    return {
        "sae_id": job.sae_id,
        "latent": job.latent,
        "explanation_id": job.explanation.explanation_id,
        "explainer": job.explanation.explainer,
        "scorer": scorer,
        "scorer_version": version,
        "judge": judge,
        "base_rate": job.pi,
        "floor_kind": job.floor_kind,
    }


def cut_scores(
    job: ScoreJob, values: Callable[[str, Sequence[Exemplar]], Sequence[float]], metrics: Sequence[str], **identity: Any
) -> ScoreResult:
    """Result of a judge that values every window and never fails; its cut is chosen on the calibrate windows.

    ``values(text, windows)`` gives one number per window; ``identity``: scorer, version, judge.
    """
    text = job.explanation.text
    if text is None or not job.exemplars or not job.calibrate:
        return unscored(job, metrics, **identity)
    known = [(v, e.positive) for v, e in zip(values(text, job.calibrate), job.calibrate, strict=True)]
    known = [(v, positive) for v, positive in known if math.isfinite(v)]
    if not known:
        return ScoreResult(scores=null_scores(job, "too_many_failures", metrics, **identity))
    threshold = choose_threshold([v for v, _ in known], [positive for _, positive in known])
    items = make_items(job, job.exemplars, values(text, job.exemplars), threshold, identity["scorer"])
    return ScoreResult(scores=detection_scores(job, items, **identity), items=tuple(items))


def unscored(job: ScoreJob, metrics: Sequence[str], **identity: Any) -> ScoreResult:
    """Null rows of a job that no judge can be asked about: for want of a text to judge by, else of windows."""
    code = "too_few_positive"
    if job.explanation.text is None:  # a bare pattern has none
        code = job.explanation.failure.code if job.explanation.failure else "unsupported"
    return ScoreResult(scores=null_scores(job, code, metrics, **identity))


def null_scores(
    job: ScoreJob, code: str, metrics: Sequence[str], *, scorer: str, version: int, judge: str
) -> tuple[LatentScore, ...]:
    """One null row per metric, for a latent that could not be scored at all (a failed explanation, no windows)."""
    base = base_score(job, scorer=scorer, version=version, judge=judge)
    return tuple(LatentScore(metric=m, null_reason=code, **base) for m in metrics)


def detection_scores(
    job: ScoreJob, items: Sequence[ScoreItem], *, scorer: str, version: int, judge: str, rank: bool = False
) -> tuple[LatentScore, ...]:
    """All detection metrics of one job: aggregates, recall per group, false-positive rate and AUC per negative kind.

    ``items`` hold one verdict (or failure) per judged window of ``job.exemplars``, in any order. AUC rows appear where
    the judge gave real values, average precision too with ``rank``. Metrics in [0, 1].
    """
    base = base_score(job, scorer=scorer, version=version, judge=judge)
    cells = count_cells(job.exemplars, items)
    drawn = [c for kind, c in cells.kinds.items() if kind not in DIAGNOSTIC_KINDS]
    n_pos, n_neg = sum(c.n for c in cells.groups.values()), sum(c.n for c in drawn)
    n_failed = sum(c.failed for c in (*cells.groups.values(), *drawn))
    lost = spoilt(cells, drawn)
    counted = {"n_pos": n_pos, "n_neg": n_neg, "n_failed": n_failed}
    rows = _rate_rows(job, cells, lost, {**base, **counted})
    judged = {e.kind for e, _ in paired(job.exemplars, items)}
    unasked = frozenset(e.kind for e in job.exemplars) - judged
    rows += _cell_rows(cells, lost, base, unasked)
    if any(item.value is not None for item in items):
        rows += value_rows(job, items, cells, lost[""], base, rank=rank)
    return tuple(rows)


def _null_reason(metric: str, job: ScoreJob, rates: _Rates, too_many: bool) -> str:
    if too_many:
        return "too_many_failures"
    missing = (rates.recall is None and metric not in ("fpr_silent", "phi")) or (
        rates.phi is None and metric != "recall"
    )
    return "one_class" if missing else "undefined"


def _rate_rows(job: ScoreJob, cells: Cells, lost: Mapping[str, bool], base: Mapping) -> list[LatentScore]:
    rates = _rates(cells)
    values = _metrics(rates, job.pi)
    worst = _metrics(_rates(failures_wrong(cells)), job.pi)
    draws = _metrics(_drawn_rates(cells), job.pi)
    rows = []
    for metric, value in values.items():
        drawn = draws[metric]
        interval = None
        too_many = any(lost[side] for side in SIDES.get(metric, ("positive", "strata")))
        if isinstance(drawn, np.ndarray) and value is not None and not too_many:
            interval = interval_of(drawn, float(value))
        null = value is None or too_many
        rows.append(
            LatentScore(
                metric=metric,
                value=None if null else float(value),  # type: ignore[arg-type]
                ci_low=interval.low if interval else None,
                ci_high=interval.high if interval else None,
                value_worst=None if worst[metric] is None else float(worst[metric]),  # type: ignore[arg-type]
                null_reason=_null_reason(metric, job, rates, too_many) if null else None,
                **base,
            )
        )
    return rows


def cell_row(metric: str, group: str, c: Counts, too_many: bool, base: Mapping, *, positive: bool) -> LatentScore:
    """Share of yes in one cell with its Wilson interval; in the worst case every failure is a wrong answer."""
    null = too_many or c.n == 0
    interval = None if null else wilson(c.hit, c.n)
    return LatentScore(
        metric=metric,
        group=group,
        value=None if null else c.hit / c.n,
        ci_low=interval.low if interval else None,
        ci_high=interval.high if interval else None,
        value_worst=(c.hit if positive else c.hit + c.failed) / (c.n + c.failed),
        n_pos=c.n if positive else 0,
        n_neg=0 if positive else c.n,
        n_failed=c.failed,
        null_reason="too_many_failures" if null else None,
        **base,
    )


def _cell_rows(
    cells: Cells, lost: Mapping[str, bool], base: Mapping, unasked: frozenset[str]
) -> list[LatentScore]:
    """Recall per quantile group and false-positive rate per kind, with Wilson intervals; absent hard kinds as nulls,
    but not those about which the judge was not asked."""
    rows = []
    for g, c in cells.groups.items():
        if g >= 0:
            rows.append(cell_row("recall", f"decile={g}", c, lost["positive"], base, positive=True))
    for kind, c in cells.kinds.items():
        null = lost[""] or too_many_failed(c.failed, c.n + c.failed)
        rows.append(cell_row("fpr", f"kind={kind}", c, null, base, positive=False))
    for kind in HARD_KINDS:
        if kind not in cells.kinds and kind not in unasked:
            rows.append(LatentScore(metric="fpr", group=f"kind={kind}", null_reason="no_hard_negative", **base))
    return rows
