"""Groups of prompts as the units of probe evaluations: sums, resampling weights, AUC of weighted rows. Torch-free.

N test rows of one task, U groups, R resamples.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from evals import uncertainty


class Weights(NamedTuple):
    """How often each group of a task occurs: once in the first row (the value), then by resamples."""

    matrix: np.ndarray
    """[1 + R, U]."""
    n_units: int


def group_weights(units: Sequence[np.ndarray], generator: np.random.Generator, resamples: int) -> Weights:
    """Multinomial over the groups that occur in any of ``units``."""
    used = np.unique(np.concatenate(units))
    n_units = int(used.max()) + 1
    drawn = uncertainty.unit_weights(len(used), generator, resamples)
    matrix = np.zeros((len(drawn) + 1, n_units))
    matrix[0, used] = 1.0
    matrix[1:, used] = drawn
    return Weights(matrix, n_units)


def scored_set(task_set: str, asked: Sequence[str], scored: Sequence[str]) -> str:
    """``task_set``, or what is left of it where a subject has no value on some tasks: a mean over fewer tasks is never
    compared with one over all (METRICS C)."""
    missing = sorted(set(asked) - set(scored))
    return f"{task_set} without {', '.join(missing)}" if missing else task_set


def sums_by_unit(unit_N: np.ndarray, columns: Sequence[np.ndarray], n_units: int) -> np.ndarray:
    """[U, 1 + columns]: rows and sums per unit."""
    counted = (np.ones(len(unit_N)), *columns)
    return np.stack([np.bincount(unit_N, weights=c, minlength=n_units) for c in counted], axis=1)


def weighted_auc(logit_N: np.ndarray, label_N: np.ndarray, weight_RN: np.ndarray) -> np.ndarray:
    """[R]: share of (positive, negative) pairs in the right order, ties one half, rows counted ``weight`` times; NaN
    where a class has no weight."""
    order = np.argsort(logit_N, kind="stable")
    value, positive = logit_N[order], label_N[order] > 0
    w = weight_RN[:, order].astype(np.float64)
    first = np.flatnonzero(np.concatenate([[True], value[1:] != value[:-1]]))  # start of each run of equal logits
    pos = np.add.reduceat(np.where(positive, w, 0.0), first, axis=1)
    neg = np.add.reduceat(np.where(positive, 0.0, w), first, axis=1)
    below = np.cumsum(neg, axis=1) - neg
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray((pos * (below + neg / 2)).sum(axis=1) / (pos.sum(axis=1) * neg.sum(axis=1)))
