"""Groups of prompts as the units of probe evaluations: sums, resampling weights, AUC of weighted rows. Torch-free.

N test rows of one task, U groups, R resamples.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from evals import uncertainty

BLOCK_NUMBERS = 1 << 19
"""Weights of one block (4 MiB): all of them at once are 1 GB at 10,000 resamples of 12,000 groups."""


def group_weights(units: Sequence[np.ndarray], generator: np.random.Generator, resamples: int) -> Iterator[np.ndarray]:
    """How often each group occurs: blocks of rows [b, U] of a matrix [1 + R, U].

    The first row, of ones, gives the value; the others are multinomial over the groups that occur in any of ``units``.
    """
    used = np.unique(np.concatenate(units))
    n_units = int(used.max()) + 1
    rows = max(1, BLOCK_NUMBERS // n_units)
    for start in range(0, resamples + 1, rows):
        n = min(rows, resamples + 1 - start)
        drawn = uncertainty.unit_weights(len(used), generator, n - (start == 0))
        block = np.zeros((n, n_units))
        block[n - len(drawn) :, used] = drawn
        if start == 0:
            block[0, used] = 1.0
        yield block


def by_block(
    blocks: Iterable[np.ndarray], values: Callable[[np.ndarray], dict[str, np.ndarray]]
) -> dict[str, np.ndarray]:
    """[1 + R] per metric from ``values`` of each block of weights."""
    parts = [values(block) for block in blocks]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def scored_set(task_set: str, asked: Sequence[str], scored: Sequence[str]) -> str:
    """``task_set``, or what is left of it where a subject has no value on some tasks: a mean over fewer tasks is never
    compared with one over all (METRICS C)."""
    missing = sorted(set(asked) - set(scored))
    return f"{task_set} without {', '.join(missing)}" if missing else task_set


def sums_by_unit(unit_N: np.ndarray, columns: Sequence[np.ndarray], n_units: int) -> np.ndarray:
    """[U, 1 + columns]: rows and sums per unit."""
    counted = (np.ones(len(unit_N)), *columns)
    return np.stack([np.bincount(unit_N, weights=c, minlength=n_units) for c in counted], axis=1)


def weighted_auc(logit_N: np.ndarray, label_N: np.ndarray, unit_N: np.ndarray, weight_RU: np.ndarray) -> np.ndarray:
    """[R]: share of (positive, negative) pairs in the right order, ties one half, a row counted as often as its unit;
    NaN where a class has no weight. Takes 40 bytes x R x N: give it a block of resamples."""
    order = np.argsort(logit_N, kind="stable")
    value, positive = logit_N[order], label_N[order] > 0
    first = np.flatnonzero(np.concatenate([[True], value[1:] != value[:-1]]))  # start of each run of equal logits
    w = np.take(weight_RU, unit_N[order], axis=1)
    pos = np.add.reduceat(w * positive, first, axis=1)
    neg = np.add.reduceat(w * ~positive, first, axis=1)
    below = np.cumsum(neg, axis=1) - neg
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray((pos * (below + neg / 2)).sum(axis=1) / (pos.sum(axis=1) * neg.sum(axis=1)))
