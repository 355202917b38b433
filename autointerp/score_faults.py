"""Per-latent scores whose numbers cannot be right are not written. Torch-free."""

import math
from collections.abc import Iterable

from autointerp.records import LatentScore
from sae.errors import DataError

SPANS: dict[str, tuple[float, float]] = {
    **dict.fromkeys(
        ("recall", "fpr", "fpr_silent", "phi", "balanced_accuracy", "precision", "precision_at_half", "f1", "auc",
         "average_precision", "accuracy", "choice", "choice_likelihood"), (0.0, 1.0)),
    **dict.fromkeys(("pearson", "pearson_bills"), (-1.0, 1.0)),
    **dict.fromkeys(("r2", "r2_zero", "abs_dev"), (-math.inf, 1.0)),
}  # fmt: skip
"""Ranges of the metrics of the shipped scorers; those of others are not known here."""
TOLERANCE = 1e-9


def faults(s: LatentScore) -> list[str]:
    """What cannot be right about one score, in words: a number that is none, a value or a bound out of the metric's
    range, a value out of its own interval, an interval without width, numbers beside a null."""
    low, high = SPANS.get(s.metric, (-math.inf, math.inf))
    numbers = {name: getattr(s, name) for name in ("value", "value_worst", "ci_low", "ci_high")}
    found = [
        f"{name} is {v}" for name, v in numbers.items()
        if v is not None and not (math.isfinite(v) and low - TOLERANCE <= v <= high + TOLERANCE)
    ]  # fmt: skip
    if (s.value is None) != (s.null_reason is not None):
        found.append(f"value {s.value} with the reason {s.null_reason}")
    if (s.ci_low is None) != (s.ci_high is None) or (s.value is None and s.ci_low is not None):
        found.append("half an interval, or one of nothing")
    if min(s.n_pos, s.n_neg, s.n_failed) < 0:
        found.append("a negative count")
    if s.value is None or s.ci_low is None or s.ci_high is None:
        return found
    if not s.ci_low - TOLERANCE <= s.value <= s.ci_high + TOLERANCE:
        found.append(f"value {s.value} outside its interval [{s.ci_low}, {s.ci_high}]")
    if s.ci_low >= s.ci_high:
        found.append(f"an interval [{s.ci_low}, {s.ci_high}] without width")
    return found


def check_scores(scores: Iterable[LatentScore]) -> None:
    """:class:`DataError` naming the first score that has a fault: a scorer computes wrongly."""
    for s in scores:
        if found := faults(s):
            raise DataError(
                f"{s.scorer} (version {s.scorer_version}) scored latent {s.latent} wrongly: {s.metric} {s.group}: "
                f"{'; '.join(found)}. This is a defect of the scorer; nothing was written"
            )
