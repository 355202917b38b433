"""Which latents carry a letter, and where others stand in for them (METRICS I, steps 2 to 4). Numpy.

N words, D channels, F latents, C letters that are kept, M main latents of one letter.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from evals.sparse_probes import MIN_ACTIVE, SparseFeatures, fit_logistic

if TYPE_CHECKING:
    from scipy.sparse import csc_matrix

CANDIDATES = 32
"""Latents of least one-latent probe loss among which the main ones are sought."""
MAX_MAIN = 10
MIN_RISE = 0.03
"""Of train F1, below which no further latent is added."""
RIDGE = 1.0
MIN_LETTER_F1 = 0.6
"""A letter whose probe is poorer is left out: the model does not spell it there."""
MIN_COSINE, MIN_COSINE_FULL = 0.1, 0.025
MIN_SHARE = 0.4
"""Of the word's projection on the letter's direction, that other latents must bring to count."""
TOP_OTHERS = 3


class LetterProbe(NamedTuple):
    """Logistic probe of one letter against the rest."""

    letter: int
    direction_D: np.ndarray
    """Unit vector in the space of the activations."""
    f1: float
    """On test."""
    right_N: np.ndarray
    """bool: words of this letter that it calls so."""


class Absorption(NamedTuple):
    """One test word of one letter."""

    fraction: float
    full: float


@dataclass(frozen=True)
class LetterScore:
    """What one letter contributes."""

    letter: int
    main: np.ndarray
    """[M] latents, in the order they were added."""
    main_f1: float
    """Test F1 of the balanced probe on the main latents."""
    rows: np.ndarray
    """Test words that are scored."""
    fraction: np.ndarray
    """Per scored word."""
    full: np.ndarray
    n_no_projection: int
    """Words left out because their activation does not point along the letter's direction."""


def f1_score(true_N: np.ndarray, said_N: np.ndarray) -> float:
    """F1 of the positive class; 0 without a hit."""
    hits = int((true_N & said_N).sum())
    return 2 * hits / (int(true_N.sum()) + int(said_N.sum())) if hits else 0.0


def letter_probes(x_ND: np.ndarray, letter_N: np.ndarray, test_N: np.ndarray) -> list[LetterProbe]:
    """L2 logistic regression per letter on channels standardised by train words (scikit-learn's C = 1 / RIDGE); every
    letter with words on both sides."""
    from sklearn.linear_model import LogisticRegression

    if test_N.all():
        return []
    x = x_ND.astype(np.float64)
    mean, std = x[~test_N].mean(axis=0), x[~test_N].std(axis=0)
    std = np.where(std <= 1e-6 * np.abs(mean), np.inf, std)
    s = (x - mean) / std
    found = []
    for letter in np.unique(letter_N):
        y = letter_N == letter
        if y[~test_N].all() or not y[~test_N].any() or not y[test_N].any():
            continue
        model = LogisticRegression(C=1 / RIDGE, max_iter=1000, tol=1e-5).fit(s[~test_N], y[~test_N])
        said = model.decision_function(s) > 0
        raw = model.coef_[0] / std
        found.append(LetterProbe(int(letter), raw / np.linalg.norm(raw), f1_score(y[test_N], said[test_N]), y & said))
    return found


def candidates(z: "csc_matrix", y_N: np.ndarray, train_N: np.ndarray) -> np.ndarray:
    """Up to CANDIDATES latents of least one-latent probe loss (METRICS C.3) on train with a positive weight."""
    import torch

    from evals.probes import fit_probes

    part = z[train_N]
    alive = np.flatnonzero(np.diff(part.indptr) >= MIN_ACTIVE)
    y = torch.from_numpy(y_N[train_N].astype(np.float32))
    losses, weights = [], []
    for start in range(0, len(alive), 1024):
        fits = fit_probes(torch.from_numpy(part[:, alive[start : start + 1024]].toarray().T).float(), y)
        losses.append(fits.ce_F.numpy())
        weights.append(fits.w_F.numpy())
    if not losses:
        return alive
    loss, weight = np.concatenate(losses), np.concatenate(weights)
    order = np.argsort(np.where(weight > 0, loss, np.inf), kind="stable")[:CANDIDATES]
    return np.asarray(alive[order[weight[order] > 0]])


def _balanced(x_NM: np.ndarray, y_N: np.ndarray, train_N: np.ndarray) -> np.ndarray:
    """bool [N]: what a logistic regression with classes of equal weight, fitted on train, says of every word."""
    mean, std = x_NM[train_N].mean(axis=0), x_NM[train_N].std(axis=0)
    s = (x_NM - mean) / np.where(std > 0, std, np.inf)
    y = y_N[train_N].astype(np.float64)
    weight = np.where(y > 0, 0.5 / y.mean(), 0.5 / (1 - y.mean()))
    w, b = fit_logistic(s[train_N], y, weight[None], np.array([RIDGE]))
    return np.asarray(s @ w[0] + b[0] > 0)


def main_latents(z: "csc_matrix", y_N: np.ndarray, train_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(latents in the order they were added, what their probe says of every word): greedy by train F1.

    The lower candidate keeps a tie. No candidate, no latents, and the probe says nothing is of this letter.
    """
    pool = candidates(z, y_N, train_N)
    columns = z[:, pool].toarray()
    chosen: list[int] = []
    said, best = np.zeros(len(y_N), dtype=bool), 0.0
    while len(chosen) < min(MAX_MAIN, len(pool)):
        tries = [(i, _balanced(columns[:, [*chosen, i]], y_N, train_N)) for i in range(len(pool)) if i not in chosen]
        scores = [f1_score(y_N[train_N], answer[train_N]) for _, answer in tries]
        top = int(np.argmax(scores))
        if scores[top] - best <= MIN_RISE:
            break
        best = scores[top]
        chosen.append(tries[top][0])
        said = tries[top][1]
    return pool[chosen].astype(np.int64), said


def absorption_of(
    latents_A: np.ndarray, effect_A: np.ndarray, cosine_A: np.ndarray, main: np.ndarray, projection: float
) -> Absorption:
    """Of one word: ``effect`` = z_i d_i·p of its active latents, ``cosine`` = cos(d_i, p), ``projection`` = x·p > 0.

    After SAEBench 0.6.0 (its thresholds), whose main latents are chosen in another way.
    """
    is_main = np.isin(latents_A, main)
    own = float(effect_A[is_main].sum())
    others = effect_A[~is_main & (cosine_A >= MIN_COSINE) & (effect_A > 0)]
    stand_in = float(np.sort(others)[::-1][:TOP_OTHERS].sum())
    if stand_in < MIN_SHARE * projection or own >= projection:
        fraction = 0.0
    elif own <= 0:
        fraction = 1.0
    else:
        used = min(stand_in, projection - own)
        fraction = used / (used + own)
    full = 0.0
    if not is_main.any() and len(effect_A):
        top = int(np.argmax(effect_A))
        full = float(cosine_A[top] >= MIN_COSINE_FULL and effect_A[top] >= MIN_SHARE * projection)
    return Absorption(fraction, full)


def score_letters(
    x_ND: np.ndarray, codes: SparseFeatures, scale_N: np.ndarray, dec_FD: np.ndarray,
    letter_N: np.ndarray, test_N: np.ndarray, probes: Sequence[LetterProbe],
) -> list[LetterScore]:
    """Main latents and absorption of every letter of ``probes``.

    ``codes``: post-activations of all words; ``scale_N``: per-token factor of the output, so that latent f adds
    z_nf scale_n dec_FD[f] (METRICS 1).
    """
    z, by_row = codes.matrix, codes.matrix.tocsr()
    norm_F = np.linalg.norm(dec_FD, axis=1)
    found = []
    for probe in probes:
        y = letter_N == probe.letter
        main, said = main_latents(z, y, ~test_N)
        along_F = dec_FD @ probe.direction_D
        rows = np.flatnonzero(probe.right_N & test_N)
        projection = x_ND[rows].astype(np.float64) @ probe.direction_D
        good = projection > 0
        scores = []
        for row, p in zip(rows[good], projection[good], strict=True):
            part = slice(by_row.indptr[row], by_row.indptr[row + 1])
            latents, values = by_row.indices[part], by_row.data[part]
            positive = values > 0
            latents, values = latents[positive], values[positive]
            effect = values * scale_N[row] * along_F[latents]
            scores.append(absorption_of(latents, effect, along_F[latents] / norm_F[latents], main, float(p)))
        found.append(LetterScore(
            probe.letter, main, f1_score(y[test_N], said[test_N]), rows[good],
            np.array([s.fraction for s in scores]), np.array([s.full for s in scores]), int((~good).sum()),
        ))  # fmt: skip
    return found
