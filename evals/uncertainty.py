"""Intervals: bootstrap over resampling units on stored sums, paired differences, multiple comparisons. Torch-free.

U resampling units (documents, probe groups, latents, positions), S stored sums per unit, R resamples.
A metric is a function of sums over units, so a resample is a reweighting of the units (multinomial weights) and nothing
is ever run again; a ratio is always a ratio of resampled sums, never a mean of ratios (METRICS 3).
"""

import math
import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from evals.results import Estimate
from sae.errors import ConfigError

RESAMPLES = 1_000
"""Of the presets `quick` and `tiny`; `paper` uses PAPER_RESAMPLES."""
PAPER_RESAMPLES = 10_000
LEVEL = 0.95
MIN_UNITS = 6
"""Of fewer units no 95 % interval is made: even the whole range of five holds their median in 93.8 % of samples only,
and the percentile bootstrap holds the mean in 51 % (two units) to 84 % (five); of 6 in 81 to 86, 12 in 88 to 91, 36 in
92 to 94 % (exponential to normal)."""
MIN_FINITE_SHARE = 0.95
"""An interval needs this share of resamples in which the metric exists."""
_CHUNK_NUMBERS = 4_000_000

Array = npt.NDArray[np.float64]
SumsFunction = Callable[[Array], Array]
"""[..., S] sums to [...] values; it must broadcast over leading axes, and gives NaN where the metric is undefined."""


def resamples_of(preset: str) -> int:
    """Number of bootstrap resamples of a preset (METRICS 3.1)."""
    return PAPER_RESAMPLES if preset == "paper" else RESAMPLES


def unit_weights(n_units: int, rng: np.random.Generator, resamples: int) -> Array:
    """Multinomial weights [R, U]: how often each unit occurs in each resample. Rows sum to U."""
    drawn = rng.integers(0, n_units, size=(resamples, n_units))
    drawn += np.arange(resamples)[:, None] * n_units
    return np.bincount(drawn.ravel(), minlength=resamples * n_units).reshape(resamples, n_units).astype(np.float64)


def resampled_sums(sums_US: npt.ArrayLike, rng: np.random.Generator, resamples: int = RESAMPLES) -> Array:
    """Totals of every resample: [R, S]. Memory is bounded: the weights are made in chunks of resamples."""
    sums = _as_sums(sums_US)
    chunk = max(1, _CHUNK_NUMBERS // max(1, len(sums)))
    parts = [
        unit_weights(len(sums), rng, min(chunk, resamples - start)) @ sums for start in range(0, resamples, chunk)
    ]
    return np.concatenate(parts)


def _as_sums(sums_US: npt.ArrayLike) -> Array:
    sums = np.asarray(sums_US, dtype=np.float64)
    if sums.ndim == 1:
        sums = sums[:, None]
    if sums.ndim != 2:
        raise ConfigError(f"per-unit sums must be [units, sums], got an array of shape {sums.shape}")
    return sums


def _apply(f: SumsFunction, sums: Array) -> Array:
    """``f`` with numpy's warnings off: an undefined resample is a NaN, dealt with by the caller."""
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return np.asarray(f(sums), dtype=np.float64)


def summarise(value: float, resampled_R: Array, n: int, n_failed: int = 0, level: float = LEVEL) -> Estimate:
    """``value`` with the percentile interval of ``resampled_R``, stretched to hold a value that resamples pass by.

    No interval is given (ci None, stderr None) when there are fewer than MIN_UNITS units, when the metric is undefined
    in more than 5 % of the resamples, or when it is the same in all of them: a zero-width interval claims a certainty
    that the sample does not give.
    """
    finite = resampled_R[np.isfinite(resampled_R)]
    bare = Estimate(value=value, n=n, n_failed=n_failed)
    if n < MIN_UNITS or len(finite) < 2 or len(finite) < MIN_FINITE_SHARE * len(resampled_R):
        return bare
    stderr = float(np.std(finite, ddof=1))
    if stderr <= 1e-12 * max(abs(value), float(np.abs(finite).max())):
        return bare
    tail = 100 * (1 - level) / 2
    low, high = (float(bound) for bound in np.percentile(finite, [tail, 100 - tail]))
    return Estimate(value=value, ci_low=min(low, value), ci_high=max(high, value), stderr=stderr, n=n,
                    n_failed=n_failed, draws=resampled_R)  # fmt: skip


def function_of_sums(
    sums_US: npt.ArrayLike, f: SumsFunction, rng: np.random.Generator, *, resamples: int = RESAMPLES,
    code: str = "too_few_rows", n_failed: int = 0,
) -> Estimate:
    """Estimate of ``f(total sums)`` with a percentile bootstrap over the units (rows of ``sums_US``).

    ``code`` is the failure code when there is no unit or ``f`` of the totals is NaN or infinite; a non-finite number
    among the sums themselves gives `non_finite`.
    """
    sums = _as_sums(sums_US)
    n = len(sums)
    if not np.isfinite(sums).all():
        return Estimate.undefined("non_finite", n=n, n_failed=n_failed)
    value = float(_apply(f, sums.sum(axis=0))) if n else math.nan
    if not math.isfinite(value):
        return Estimate.undefined(code, n=n, n_failed=n_failed)
    if n < 2:
        return Estimate(value=value, n=n, n_failed=n_failed)
    return summarise(value, _apply(f, resampled_sums(sums, rng, resamples)), n, n_failed)


def _quotient(sums: Array) -> Array:
    return np.where(sums[..., 1] == 0, np.nan, sums[..., 0] / sums[..., 1])


def ratio(
    num_U: npt.ArrayLike, den_U: npt.ArrayLike, rng: np.random.Generator, *, resamples: int = RESAMPLES,
    code: str = "too_few_rows", n_failed: int = 0,
) -> Estimate:
    """Σ num / Σ den over units; undefined (``code``) if Σ den is 0."""
    sums = np.stack([np.asarray(num_U, dtype=np.float64), np.asarray(den_U, dtype=np.float64)], axis=-1)
    return function_of_sums(sums, _quotient, rng, resamples=resamples, code=code, n_failed=n_failed)


def mean(
    values_U: npt.ArrayLike, rng: np.random.Generator, *, resamples: int = RESAMPLES,
    code: str = "too_few_rows", n_failed: int = 0,
) -> Estimate:
    """Plain mean over units."""
    values = np.asarray(values_U, dtype=np.float64)
    return ratio(values, np.ones_like(values), rng, resamples=resamples, code=code, n_failed=n_failed)


def stratified(
    strata: Sequence[npt.ArrayLike], f: SumsFunction, rng: np.random.Generator, *, resamples: int = RESAMPLES,
    code: str = "too_few_rows", n_failed: int = 0,
) -> Estimate:
    """Mean over a fixed set of strata (tasks, latents) of ``f`` of the stratum's totals.

    Units are resampled inside each stratum and all strata are kept (METRICS 3.3). ``n`` is the number of units of all
    strata. A stratum where ``f`` is undefined makes the whole undefined: leave it out, counted, before the call.
    """
    arrays = [_as_sums(s) for s in strata]
    n = sum(len(a) for a in arrays)
    if any(not np.isfinite(a).all() for a in arrays):
        return Estimate.undefined("non_finite", n=n, n_failed=n_failed)
    values = np.array([float(_apply(f, a.sum(axis=0))) if len(a) else math.nan for a in arrays])
    if not len(values) or not np.isfinite(values).all():
        return Estimate.undefined(code, n=n, n_failed=n_failed)
    total = np.zeros(resamples)
    for a in arrays:
        total += _apply(f, resampled_sums(a, rng, resamples))
    return summarise(float(values.mean()), total / len(arrays), n, n_failed)


def mean_by_family(
    values_T: npt.ArrayLike, families: Sequence[str], rng: np.random.Generator, *, resamples: int = RESAMPLES,
    code: str = "too_few_rows", n_failed: int = 0,
) -> Estimate:
    """Plain mean over tasks whose interval resamples whole *families* of tasks (``ci_task`` of METRICS 3.3)."""
    values = np.asarray(values_T, dtype=np.float64)
    if len(values) != len(families):
        raise ConfigError(f"{len(values)} values but {len(families)} family names")
    ordered = sorted(set(families))
    member = np.array([ordered.index(name) for name in families], dtype=np.int64)
    num = np.bincount(member, weights=values, minlength=len(ordered))
    den = np.bincount(member, minlength=len(ordered))
    return ratio(num, den, rng, resamples=resamples, code=code, n_failed=n_failed)


class Difference(NamedTuple):
    """A − B of two subjects."""

    estimate: Estimate
    """The difference with its interval; `n` = shared units (paired) or the smaller number of units (unpaired)."""
    p: float | None
    """Two-sided bootstrap p-value (METRICS 3.2); None without an interval."""


def bootstrap_p(differences_R: npt.ArrayLike) -> float:
    """p = min(1, 2 (min(#{Δ* ≤ 0}, #{Δ* ≥ 0}) + 1) / (R + 1)) (METRICS 3.2). Never 0."""
    delta = np.asarray(differences_R, dtype=np.float64)
    smaller = min(int((delta <= 0).sum()), int((delta >= 0).sum()))
    return min(1.0, 2 * (smaller + 1) / (len(delta) + 1))


def _difference(value: float, resampled_R: Array, n: int) -> Difference:
    estimate = summarise(value, resampled_R, n)
    finite = resampled_R[np.isfinite(resampled_R)]
    return Difference(estimate, bootstrap_p(finite) if estimate.ci_low is not None else None)


def paired_difference(
    a_US: npt.ArrayLike, b_US: npt.ArrayLike, f: SumsFunction, rng: np.random.Generator, *,
    resamples: int = RESAMPLES, code: str = "too_few_rows",
) -> Difference:
    """f(A) − f(B) where both subjects were measured on the same units, in the same order: same weights for both."""
    a, b = _as_sums(a_US), _as_sums(b_US)
    if a.shape != b.shape:
        raise ConfigError(f"paired subjects need the same units: {a.shape} and {b.shape}; use unpaired_difference")
    n, width = a.shape
    both = np.concatenate([a, b], axis=1)
    if not np.isfinite(both).all():
        return Difference(Estimate.undefined("non_finite", n=n), None)

    def delta(sums: Array) -> Array:
        return np.asarray(f(sums[..., :width])) - np.asarray(f(sums[..., width:]))

    value = float(_apply(delta, both.sum(axis=0))) if n else math.nan
    if not math.isfinite(value):
        return Difference(Estimate.undefined(code, n=n), None)
    if n < 2:
        return Difference(Estimate(value=value, n=n), None)
    return _difference(value, _apply(delta, resampled_sums(both, rng, resamples)), n)


def unpaired_difference(
    a_US: npt.ArrayLike, b_US: npt.ArrayLike, f: SumsFunction, rng: np.random.Generator, *,
    resamples: int = RESAMPLES, code: str = "too_few_rows",
) -> Difference:
    """f(A) − f(B) with independent resampling of both: per-latent metrics of different SAEs have no pairs."""
    a, b = _as_sums(a_US), _as_sums(b_US)
    n = min(len(a), len(b))
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        return Difference(Estimate.undefined("non_finite", n=n), None)
    value = float(_apply(f, a.sum(axis=0)) - _apply(f, b.sum(axis=0))) if n else math.nan
    if not math.isfinite(value):
        return Difference(Estimate.undefined(code, n=n), None)
    if n < 2:
        return Difference(Estimate(value=value, n=n), None)
    drawn = _apply(f, resampled_sums(a, rng, resamples)) - _apply(f, resampled_sums(b, rng, resamples))
    return _difference(value, drawn, n)


def mean_of_sums(sums: Array) -> Array:
    """The function of (Σ value, number of units): give it to the difference functions for plain means."""
    return _quotient(sums)


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Holm's step-down adjustment (Holm 1979) over one comparison table; None stays None and is not counted."""
    known = sorted((p, i) for i, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    running = 0.0
    for rank, (p, i) in enumerate(known):
        running = max(running, min(1.0, (len(known) - rank) * p))
        adjusted[i] = running
    return adjusted


class Interval(NamedTuple):
    """Two-sided interval."""

    low: float
    high: float


def wilson(successes: float, n: float, z: float = 1.959963984540054) -> Interval | None:
    """Wilson score interval of a proportion (Wilson 1927), 95 % by default; None for n = 0."""
    if n <= 0:
        return None
    p = successes / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return Interval(max(0.0, centre - half), min(1.0, centre + half))
