"""Rows from real-valued answers: AUC per kind of silent window, average precision at the true rate. Torch-free.

Formulas: AUTOINTERP 5.2 and 5.3. What failed leaves the ranking and is counted; in the worst case every pair of a
failed window is lost.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from autointerp.cells import Cells, paired, positives_of, stratum_of
from autointerp.interfaces import ScoreJob
from autointerp.rates import auc, auc_interval, average_precision, average_precision_interval, too_many_failed
from autointerp.records import LatentScore, ScoreItem


def value_rows(
    job: ScoreJob, items: Sequence[ScoreItem], cells: Cells, too_many: bool, base: Mapping, *, rank: bool
) -> list[LatentScore]:
    """AUC, and with ``rank`` average precision."""
    judged = paired(job.exemplars, items)
    chosen = {e.exemplar_id for e in positives_of([e for e, _ in judged])}
    positive = [i for e, i in judged if e.exemplar_id in chosen]
    negative: dict[str, list[ScoreItem]] = {"silent": []}
    for e, item in judged:
        if not e.positive:
            negative.setdefault(e.kind, []).append(item)
    rows = _auc_rows(job, positive, negative, too_many, base)
    if rank:
        stratum = {e.exemplar_id: h for e, _ in judged if (h := stratum_of(e, cells)) is not None}
        by_stratum: dict[str, list[ScoreItem]] = {}
        for e, item in judged:
            if e.exemplar_id in stratum:
                by_stratum.setdefault(stratum[e.exemplar_id], []).append(item)
        rows.append(_average_precision_row(job, positive, by_stratum, cells.shares, too_many, base))
    return rows


def _auc_rows(
    job: ScoreJob,
    positive: Sequence[ScoreItem],
    negative: Mapping[str, Sequence[ScoreItem]],
    too_many: bool,
    base: Mapping,
) -> list[LatentScore]:
    """AUC of the positive windows against uniform silent ones (the aggregate) and against each other kind.

    ``too_many``: more than a tenth of all windows failed; a diagnostic kind fails by itself alone.
    """
    rows = []
    pos = _values(positive)
    for kind in sorted(negative):
        neg = _values(negative[kind])
        n_failed = len(positive) + len(negative[kind]) - len(pos) - len(neg)
        null = (
            too_many
            or too_many_failed(len(positive) - len(pos), len(positive))
            or too_many_failed(len(negative[kind]) - len(neg), len(negative[kind]))
        )
        value = None if null else auc(pos, neg)
        key = (job.sae_id, job.latent, job.explanation.explanation_id, base["scorer"], kind)
        interval = None if value is None else auc_interval(pos, neg, *key)
        rows.append(
            LatentScore(
                metric="auc",
                group="" if kind == "silent" else f"kind={kind}",
                value=value,
                ci_low=interval.low if interval else None,
                ci_high=interval.high if interval else None,
                n_pos=len(pos),
                n_neg=len(neg),
                n_failed=n_failed,
                value_worst=_worst_auc(pos, neg, len(positive) * len(negative[kind])),
                null_reason=("too_many_failures" if null else "one_class") if value is None else None,
                **base,
            )
        )
    return rows


def _average_precision_row(
    job: ScoreJob,
    positive: Sequence[ScoreItem],
    strata: Mapping[str, Sequence[ScoreItem]],
    shares: Mapping[str, float],
    too_many: bool,
    base: Mapping,
) -> LatentScore:
    """Average precision with weights pi / n_pos and (1 - pi) W_h / n_h of the silent windows of stratum h.

    In the worst case failed positive windows come last and failed silent ones first.
    """
    pos, neg, weights = _values(positive), [], []
    worst_neg, worst_weights = [], []
    pi = job.pi or 0.0
    asked = failed = 0
    for h, share in sorted(shares.items()):
        values = _values(strata.get(h, ()))
        neg += values
        weights += [(1 - pi) * share / len(values)] * len(values)
        n = len(strata.get(h, ()))
        asked, failed = asked + n, failed + n - len(values)
        worst_neg += [*values, *[np.inf] * (n - len(values))]
        worst_weights += [(1 - pi) * share / n] * n
    null = too_many or too_many_failed(len(positive) - len(pos), len(positive)) or too_many_failed(failed, asked)
    value = None if null else average_precision(pos, neg, weights, pi)
    key = (job.sae_id, job.latent, job.explanation.explanation_id, base["scorer"])
    interval = None if value is None else average_precision_interval(pos, neg, weights, pi, *key)
    worst_pos = [*pos, *[-np.inf] * (len(positive) - len(pos))]
    reason = "too_many_failures" if null else "one_class" if not pos or not neg else "undefined"
    return LatentScore(
        metric="average_precision",
        value=value,
        ci_low=interval.low if interval else None,
        ci_high=interval.high if interval else None,
        n_pos=len(pos),
        n_neg=len(neg),
        n_failed=len(positive) - len(pos) + failed,
        value_worst=average_precision(worst_pos, worst_neg, worst_weights, pi),
        null_reason=reason if value is None else None,
        **base,
    )


def _values(items: Sequence[ScoreItem]) -> list[float]:
    return [i.value for i in items if i.value is not None]


def _worst_auc(positive: Sequence[float], negative: Sequence[float], n_pairs: int) -> float | None:
    """AUC with every pair of a failed window lost."""
    if n_pairs == 0:
        return None
    value = auc(positive, negative)
    return 0.0 if value is None else value * len(positive) * len(negative) / n_pairs
