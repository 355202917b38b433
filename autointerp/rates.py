"""Pure statistics of yes/no and real-valued judgements. Torch-free; formulas AUTOINTERP 5.2 and 5.3.

An undefined value is None, never NaN.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from sae.manifest import rng

Values = Sequence[float] | np.ndarray
N_RESAMPLES = 2_000
"""Bootstrap resamples of windows."""
MAX_FAILED_SHARE = 0.1
"""Above this share of failed items a metric is null (AUTOINTERP 5.5)."""


def too_many_failed(n_failed: int, n_asked: int) -> bool:
    """More than a tenth."""
    return n_asked > 0 and n_failed / n_asked > MAX_FAILED_SHARE


class Interval(NamedTuple):
    """A 95 % interval."""

    low: float
    high: float


def wilson(hits: int, n: int, z: float = 1.959964) -> Interval | None:
    """Wilson's 95 % interval of a proportion; None without observations."""
    if n == 0:
        return None
    centre = (hits + z * z / 2) / (n + z * z)
    half = z / (n + z * z) * np.sqrt(hits * (n - hits) / n + z * z / 4)
    return Interval(float(max(0.0, centre - half)), float(min(1.0, centre + half)))


def auc(positive: Values, negative: Values) -> float | None:
    """Mann-Whitney: P(positive above negative) + P(tie)/2. None where a class is empty."""
    if len(positive) == 0 or len(negative) == 0:
        return None
    return float(_wins(positive, negative).mean())


def _wins(positive: Values, negative: Values) -> np.ndarray:
    """[n_pos, n_neg]: 1 where the positive is larger, 1/2 at a tie."""
    difference = np.asarray(positive, dtype=np.float64)[:, None] - np.asarray(negative, dtype=np.float64)[None, :]
    return (np.sign(difference) + 1) / 2


def auc_interval(positive: Values, negative: Values, *key: object) -> Interval | None:
    """95 % bootstrap over windows within sign; ``key`` seeds it."""
    if len(positive) < 2 or len(negative) < 2:
        return None
    wins = _wins(positive, negative)
    n_pos, n_neg = wins.shape
    estimate = float(wins.mean())
    if estimate in (0.0, 1.0):  # no pair (or every pair) is out of order, and so in every resample
        return auc_score_interval(estimate, n_pos, n_neg)
    if np.ptp(wins) == 0:  # all are ties, and so in every resample
        return None
    times_pos, times_neg = _times("auc_interval", key, n_pos, n_neg)
    # Two matrix products replace 2,000 rank computations.
    return interval_of(((times_pos @ wins) * times_neg).sum(1) / (n_pos * n_neg), estimate)


def _times(purpose: str, key: Sequence[object], *sizes: int) -> list[np.ndarray]:
    """How often each of n windows is in a resample of n, [R, n] for each of ``sizes``. Nine tenths of the time of an
    interval: each number is drawn by itself."""
    generator = rng(purpose, *key)
    return [generator.multinomial(n, np.full(n, 1 / n), size=N_RESAMPLES) for n in sizes]


def auc_score_interval(value: float, n_pos: int, n_neg: int, z: float = 1.959964) -> Interval:
    """Score interval of an AUC, defined at 0 and 1 too: the AUCs that lie within ``z`` of their own standard errors of
    ``value`` (Newcombe 2006, Statistics in Medicine 25:559, method 5: Hanley and McNeil's variance with both sizes
    replaced by their mean). Both sizes at least 1."""
    mean_n = (n_pos + n_neg) / 2

    def away(theta: float) -> float:
        shape = 1 + (mean_n - 1) * ((1 - theta) / (2 - theta) + theta / (1 + theta))
        return abs(theta - value) - z * float(np.sqrt(theta * (1 - theta) * shape / (n_pos * n_neg)))

    def bound(outside: float) -> float:
        inside = value
        if away(outside) <= 0:
            return outside
        for _ in range(60):  # halving: past the precision of a float
            middle = (inside + outside) / 2
            inside, outside = (inside, middle) if away(middle) > 0 else (middle, outside)
        return inside

    return Interval(bound(0.0), bound(1.0))


def average_precision(positive: Values, negative: Values, negative_weights: Values, pi: float) -> float | None:
    """Area under precision over recall at the population's rates (AUTOINTERP 5.2): sum over cuts of the rise of recall
    times the precision there. Windows of equal value are called together, so a constant judge has ``pi``.

    A positive window weighs pi / n_pos; ``negative_weights`` are (1 - pi) W_h / n_h, one per negative. None where a
    class is empty or ``pi`` is not inside (0, 1).
    """
    if len(positive) == 0 or len(negative) == 0 or not 0 < pi < 1:
        return None
    times = [np.ones((1, len(side))) for side in (positive, negative)]
    return float(_average_precisions(positive, negative, negative_weights, pi, *times)[0])


def average_precision_interval(
    positive: Values, negative: Values, negative_weights: Values, pi: float, *key: object
) -> Interval | None:
    """95 % bootstrap over windows within sign; ``key`` seeds it."""
    if len(positive) < 2 or len(negative) < 2 or not 0 < pi < 1:
        return None
    times = _times("average_precision_interval", key, len(positive), len(negative))
    estimate = average_precision(positive, negative, negative_weights, pi)
    return interval_of(_average_precisions(positive, negative, negative_weights, pi, *times), estimate)


def _average_precisions(
    positive: Values, negative: Values, negative_weights: Values, pi: float, times_pos: np.ndarray,
    times_neg: np.ndarray,
) -> np.ndarray:  # fmt: skip
    """[R] from how often each window is drawn, [R, n_pos] and [R, n_neg]."""
    cuts, place = np.unique(-np.concatenate([positive, negative]).astype(np.float64), return_inverse=True)
    at = np.eye(len(cuts))[place.ravel()]  # [n, cuts], the highest value first
    n_pos = len(positive)
    recall = np.cumsum(times_pos @ at[:n_pos], axis=1) / n_pos
    wrong = np.cumsum((times_neg * np.asarray(negative_weights, dtype=np.float64)) @ at[n_pos:], axis=1)
    called = pi * recall + wrong
    precision = np.divide(pi * recall, called, out=np.zeros_like(called), where=called > 0)
    return (np.diff(recall, axis=1, prepend=0.0) * precision).sum(axis=1)


def interval_of(draws: np.ndarray, estimate: float | None) -> Interval | None:
    """2.5 and 97.5 percentiles of ``draws`` (those that are numbers), stretched to hold ``estimate`` where skewed draws
    pass it by. None where there are fewer than two, or all are alike: an interval without width claims a certainty
    that no sample gives."""
    found = draws[np.isfinite(draws)]
    if len(found) < 2 or np.ptp(found) <= 1e-12 * np.abs(found).max():
        return None
    low, high = np.percentile(found, [2.5, 97.5])
    if estimate is None:
        return Interval(float(low), float(high))
    return Interval(min(float(low), estimate), max(float(high), estimate))


class Effective(NamedTuple):
    """A weighted proportion as if from windows of equal weight: hits and misses, not whole numbers."""

    hit: float
    miss: float


def effective_counts(weights: Sequence[float], hits: Sequence[float], ns: Sequence[float]) -> Effective:
    """Counts of a simple sample that is as informative as cells of ``ns`` windows weighing ``weights`` (summing to 1):
    n = 1 / sum w^2/n, hits = n sum w h/n. Exact in variance where all cells have one rate, too wide where they differ
    (what separates cells is no sampling noise). Every n at least 1."""
    w, h, n = (np.asarray(v, dtype=np.float64) for v in (weights, hits, ns))
    size = 1 / float((w * w / n).sum())
    share = min(1.0, max(0.0, float((w * h / n).sum())))  # a sum of weights may pass 1 by rounding
    return Effective(size * share, size * (1 - share))


def choose_threshold(values: Sequence[float], positive: Sequence[bool]) -> float:
    """The cut of largest balanced accuracy (``value > threshold`` is yes), half-way between neighbouring values.

    Among equally good cuts the one in the middle of them. One class only: the median of the values.
    Raises ValueError on no values. Always finite.
    """
    v, y = np.asarray(values, dtype=np.float64), np.asarray(positive, dtype=bool)
    if len(v) == 0:
        raise ValueError("no calibration values to choose a threshold from")
    if y.all() or not y.any():
        return float(np.median(v))
    distinct = np.unique(v)
    margin = max(float(distinct[-1] - distinct[0]), 1e-6)
    cuts = np.concatenate(([distinct[0] - margin], (distinct[1:] + distinct[:-1]) / 2, [distinct[-1] + margin]))
    yes = v[None, :] > cuts[:, None]
    accuracy = (yes[:, y].mean(1) + (~yes[:, ~y]).mean(1)) / 2
    best = np.flatnonzero(accuracy >= accuracy.max() - 1e-12)
    return float(cuts[best[(len(best) - 1) // 2]])


def precision_at(recall: float, phi: float, pi: float) -> float | None:
    """pi R / (pi R + (1 - pi) phi): precision at base rate ``pi``; None where nothing is ever called active."""
    called = pi * recall + (1 - pi) * phi
    return pi * recall / called if called > 0 else None


def f1_of(precision: float | None, recall: float) -> float | None:
    """2 P R / (P + R); 0 where both are 0, None where the precision is undefined."""
    if precision is None:
        return None
    return 2 * precision * recall / (precision + recall) if precision + recall > 0 else 0.0


def pooled_precision(pi: Values, recall: Values, phi: Values) -> float | None:
    """Precision of an SAE: sum pi R / sum (pi R + (1 - pi) phi) over its latents (AUTOINTERP 5.2, headline).

    Vectors over latents; None where nothing is called active or there are no latents.
    """
    pi, recall, phi = (np.asarray(v, dtype=np.float64) for v in (pi, recall, phi))
    right = float((pi * recall).sum())
    called = right + float(((1 - pi) * phi).sum())
    return right / called if called > 0 else None
