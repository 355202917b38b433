"""What training seeds add to the error of a difference (METRICS 3.5). Torch-free.

S training seeds of a recipe, R resamples.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from evals.uncertainty import bootstrap_p
from sae.manifest import rng

if TYPE_CHECKING:
    from evals.results import Estimate

LEVEL = 0.05


class SeedSpread(NamedTuple):
    """What one group of training seeds adds to the variance of a difference."""

    sd: float
    """Standard deviation over the seeds."""
    n: int
    weight: float = 1.0
    """With which their mean enters the difference."""


@dataclass(frozen=True, kw_only=True)
class Spread:
    """A metric over the seeds of a recipe; no number unless every seed has one."""

    value: float | None = None
    """Mean."""
    sd: float | None = None
    """Standard deviation with S - 1."""
    low: float | None = None
    high: float | None = None
    """Smallest and largest."""
    reason: str = ""


def spread_of(values: Sequence[float | None], reason: str = "") -> Spread:
    """Mean, deviation and range of numbers; ``reason``: why one of them is missing."""
    known = [v for v in values if v is not None]
    if len(known) < len(values) or not known:
        short = f"{len(known)} of {len(values)} seeds have a value; else {reason}"
        return Spread(reason=short if known else reason)
    sd = statistics.stdev(known) if len(known) > 1 else None  # exact: seeds that are equal have a deviation of 0
    return Spread(value=statistics.fmean(known), sd=sd, low=min(known), high=max(known))


def p_value(delta_R: np.ndarray, estimate: "Estimate", n: int) -> float:
    """Two-sided bootstrap p; where no resample changes sign, Student's tail of Δ / stderr with n - 1 degrees.

    R = 1,000 resamples know no p below 0.002, which Holm's correction over 25 metrics turns into 0.05: without the tail
    nothing could ever be shown in a long table (decision 012).
    """
    from scipy.stats import t

    crosses = bool((delta_R <= 0).any() and (delta_R >= 0).any())
    if crosses or not estimate.stderr or estimate.value is None:
        return bootstrap_p(delta_R)
    return float(2 * t.sf(abs(estimate.value) / estimate.stderr, max(n - 1, 1)))


def over_seeds(draws: Sequence[np.ndarray], *purpose: str) -> np.ndarray:
    """[R] resampled means of a cell: units inside each draw, and seeds; equal ``purpose``, equal picks of seeds.

    A bootstrap over S seeds shows only (S - 1) / S of their variance; the deviation from the mean is widened by
    sqrt(S / (S - 1)) to make up for it.
    """
    stacked = np.stack(list(draws))
    count = len(stacked)
    if count == 1:
        return stacked[0]
    picks = rng("compare", *purpose, "seeds").integers(0, count, size=(count, stacked.shape[1]))
    mean = stacked.mean(axis=0)
    resampled = np.take_along_axis(stacked, picks, axis=0).mean(axis=0)
    return np.asarray(mean + math.sqrt(count / (count - 1)) * (resampled - mean))


def exceeds_seed_noise(delta: float, spreads: Sequence[SeedSpread]) -> bool:
    """Welch's test at 5 %: |Δ| > t · √(Σ w² sd²/n), degrees of freedom by Welch and Satterthwaite.

    METRICS 3.5 writes 2 for t; with two or three seeds Student's quantile is 2.8 to 12.7 (decision 012).
    """
    from scipy.stats import t

    parts = [(s.weight * s.sd) ** 2 / s.n for s in spreads]
    total = sum(parts)
    if total == 0:
        return delta != 0
    freedom = total**2 / sum(part**2 / (s.n - 1) for part, s in zip(parts, spreads, strict=True) if part)
    return abs(delta) > float(t.ppf(1 - LEVEL / 2, freedom)) * math.sqrt(total)
