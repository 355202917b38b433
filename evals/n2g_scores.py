"""How well a pattern set predicts where one latent is active: exact counts on a whole split (METRICS D). Torch-free.

N kept tokens of the split (those that pass the token filter), a the latent's activation, s the predicted one.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

RECALL_SAMPLE = 16
"""Positive activations of Gao et al.'s recall (their sample size)."""
LOW_SUPPORT = 5
"""A precision from fewer firings is kept, but counted."""


class Firing(NamedTuple):
    """Where something is nonzero, and how strongly."""

    flat_n: npt.NDArray[np.int64]
    """Ascending flat token indices."""
    value_n: npt.NDArray[np.float64]


class Confusion(NamedTuple):
    """Counts of one pattern set on one latent."""

    n_fires: int
    n_active: int
    n_both: int
    n_tokens: int

    @property
    def density(self) -> float:
        return self.n_active / self.n_tokens

    @property
    def precision(self) -> float:
        """NaN if the patterns never fire."""
        return self.n_both / self.n_fires if self.n_fires else math.nan

    @property
    def recall(self) -> float:
        """NaN if the latent is never active."""
        return self.n_both / self.n_active if self.n_active else math.nan

    @property
    def f1(self) -> float:
        """2PR / (P + R) = 2 both / (fires + active); 0 for patterns that never fire."""
        return 2 * self.n_both / (self.n_fires + self.n_active) if self.n_fires + self.n_active else math.nan

    @property
    def lift(self) -> float:
        """(P - d) / (1 - d), d the density: 0 for a pattern that knows nothing."""
        return (self.precision - self.density) / (1 - self.density) if self.density < 1 else math.nan


def confusion(predicted: Firing, active: Firing, n_tokens: int) -> Confusion:
    """Exact counts; both lists must lie on kept tokens."""
    both = np.intersect1d(predicted.flat_n, active.flat_n, assume_unique=True)
    return Confusion(len(predicted.flat_n), len(active.flat_n), len(both), n_tokens)


def always_f1(density: float) -> float:
    """F1 of firing on every token: P = d, R = 1 (a dense latent scores high for nothing)."""
    return 2 * density / (1 + density)


def pearson(predicted: Firing, active: Firing, n_tokens: int) -> float:
    """Correlation of s and a over all N tokens; NaN where one of them is constant."""
    s, a = predicted.value_n, active.value_n
    _, i, j = np.intersect1d(predicted.flat_n, active.flat_n, assume_unique=True, return_indices=True)
    mean_s, mean_a = s.sum() / n_tokens, a.sum() / n_tokens
    var_s, var_a = (s**2).sum() / n_tokens - mean_s**2, (a**2).sum() / n_tokens - mean_a**2
    if var_s <= 1e-12 * mean_s**2 or var_a <= 1e-12 * mean_a**2:
        return math.nan
    return float(((s[i] * a[j]).sum() / n_tokens - mean_s * mean_a) / math.sqrt(var_s * var_a))


def sampled_recall(predicted: Firing, active: Firing, rng: np.random.Generator) -> float:
    """Share of 16 uniformly drawn positive activations on which the patterns fire (arXiv 2406.04093, 4.3)."""
    if not len(active.flat_n):
        return math.nan
    drawn = rng.choice(active.flat_n, size=min(RECALL_SAMPLE, len(active.flat_n)), replace=False)
    return float(np.isin(drawn, predicted.flat_n).mean())


def partners_of_like_density(latents: Sequence[int], densities: Sequence[float]) -> dict[int, int]:
    """For each latent another one of about the same density, no fixed point; empty for fewer than two latents.

    The latents are ordered by density and cut into ten blocks (deciles) of at least two; each block is rotated by one.
    """
    order = sorted(range(len(latents)), key=lambda i: (densities[i], latents[i]))
    n = len(order)
    if n < 2:
        return {}
    n_blocks = max(1, min(10, n // 2))
    edges = [round(b * n / n_blocks) for b in range(n_blocks + 1)]
    partner: dict[int, int] = {}
    for low, high in zip(edges, edges[1:], strict=False):
        block = [latents[i] for i in order[low:high]]
        partner.update(zip(block, block[1:] + block[:1], strict=True))
    return partner
