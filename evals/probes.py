"""Probes: one latent at a time by a batched Newton iteration, and all channels at once (METRICS C.3). Torch.

N rows (prompts), F features, M features of one block, n rows of one task. Losses are natural logs (nats).
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import softplus

RIDGE = 1e-3
"""lambda of ½ lambda w², on standardised columns; scikit-learn's C = 1 / lambda. The intercept is free."""
MAX_ITERATIONS = 30
MAX_HALVINGS = 8
TOLERANCE = 1e-4
"""Newton decrement ½ gᵀH⁻¹g, in summed nats, below which a feature is done."""
CONSTANT_STD = 1e-6
"""A feature whose standard deviation is below this share of |mean| tells nothing."""
_BLOCK_NUMBERS = 32_768
"""Numbers per block: four float32 arrays of this size stay in the L2 cache."""
DENSE_CS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
DENSE_FOLDS = 3


class ProbeFits(NamedTuple):
    """One logistic probe per feature: logit = b + w (h - mean) / std."""

    w_F: Tensor
    """float64; 0 for a constant feature."""
    b_F: Tensor
    mean_F: Tensor
    std_F: Tensor
    """1 for a constant feature."""
    ce_F: Tensor
    """Mean train cross-entropy without the ridge term, nats; inf for a feature with NaN or infinite values."""
    n_constant: int
    n_nonfinite: int
    n_unconverged: int

    def best(self) -> int:
        """Feature of least train loss, lowest index on ties; -1 if there is none."""
        if not len(self.ce_F) or not bool(torch.isfinite(self.ce_F).any()):
            return -1
        # torch.argmin promises no order among equal values; numpy returns the first.
        return int(np.argmin(self.ce_F.numpy()))


def entropy(rate: float) -> float:
    """Cross-entropy of always answering the base rate, nats: ln 2 for balanced classes."""
    return -sum(p * math.log(p) for p in (rate, 1 - rate) if p > 0)


def fit_probes(h_FN: Tensor, y_N: Tensor, ridge: float = RIDGE) -> ProbeFits:
    """Fit ``Σ_n [softplus(t) - y t] + ½ ridge w²``, t = b + w s, s the standardised feature, for each feature alone.

    ``h_FN`` is feature-major, ``y_N`` holds 0 and 1 with both present (ValueError otherwise). Damped Newton steps on
    2 x 2 systems, features in blocks that fit the cache; protocol after Gao et al., arXiv 2406.04093, section 4.2.
    """
    y = y_N.to(torch.float32)
    rate = float(y.double().mean()) if len(y) else math.nan
    if not 0 < rate < 1:
        raise ValueError(f"a probe needs rows of both classes, got {len(y)} rows with a positive share of {rate}")
    n_features, n = h_FN.shape
    out = {name: torch.zeros(n_features, dtype=torch.float64) for name in ("w", "b", "mean", "std", "ce")}
    counts = torch.zeros(3, dtype=torch.int64)
    block = max(16, _BLOCK_NUMBERS // n)
    for start in range(0, n_features, block):
        part = slice(start, start + block)
        fitted, found = _fit_block(h_FN[part], y, rate, ridge)
        for name, values in zip(("w", "b", "mean", "std", "ce"), fitted, strict=True):
            out[name][part] = values
        counts += found
    constant, nonfinite, unconverged = counts.tolist()
    return ProbeFits(out["w"], out["b"], out["mean"], out["std"], out["ce"], constant, nonfinite, unconverged)


def _fit_block(h_MN: Tensor, y: Tensor, rate: float, ridge: float) -> tuple[tuple[Tensor, ...], Tensor]:
    """(w, b, mean, std, ce) of a block, and the counts (constant, non-finite, unconverged)."""
    h = h_MN.to(torch.float64)  # the mean of a far-shifted float32 column is not exact in float32
    finite = torch.isfinite(h).all(dim=1)
    std, mean = torch.std_mean(h, dim=1, correction=0)
    constant = finite & (std <= CONSTANT_STD * mean.abs())
    usable = finite & ~constant
    w = torch.zeros(len(h), dtype=torch.float64)
    b = torch.full_like(w, math.log(rate / (1 - rate)))
    ce = torch.full_like(w, entropy(rate))
    ce[~finite] = math.inf
    unconverged = 0
    if bool(usable.any()):
        s = ((h[usable] - mean[usable, None]) / std[usable, None]).to(torch.float32)
        w_u, b_u, ce_u, unconverged = _newton(s, y, float(b[0]), ridge)
        w[usable], b[usable], ce[usable] = w_u.double(), b_u.double(), ce_u.double()
    mean, std = torch.where(usable, mean, 0.0), torch.where(usable, std, 1.0)
    counts = torch.tensor([int(constant.sum()), int((~finite).sum()), unconverged])
    return (w, b, mean, std, ce), counts


def _newton(s: Tensor, y: Tensor, b0: float, ridge: float) -> tuple[Tensor, Tensor, Tensor, int]:
    """(w, b, mean cross-entropy, number not converged) for standardised features ``s`` [M, n].

    With u = t for y = 0 and -t for y = 1 the loss of a row is softplus(u) and its gradient in t is ±sigmoid(u).
    """
    n = s.shape[1]
    sign = 1 - 2 * y
    signed, squared = s * sign, s * s
    rate = float(torch.sigmoid(torch.tensor(b0, dtype=torch.float64)))

    def at(w: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        u = torch.addcmul(b[:, None] * sign, w[:, None], signed)
        data = softplus(u).sum(dim=1)
        return u, data, data + 0.5 * ridge * w * w

    # At the start every row has the same q and the mean of s is 0, so the first step needs one product s @ y.
    b = torch.full((len(s),), b0)
    step_w = -(s @ y - rate * s.sum(dim=1)) / (n * rate * (1 - rate) + ridge)
    start = torch.full_like(b, n * entropy(rate))
    state = (b0 * sign.expand_as(s), start, start)
    w, b, state = _line_search(at, torch.zeros_like(b), b, step_w, torch.zeros_like(b), state)
    decrement = torch.full_like(w, math.inf)
    for _ in range(MAX_ITERATIONS):
        sigma = torch.sigmoid(state[0])
        q = sigma * (1 - sigma)
        g_b, g_w = sigma @ sign, (sigma * signed).sum(dim=1) + ridge * w
        h_bb, h_bw, h_ww = q.sum(dim=1), (q * s).sum(dim=1), (q * squared).sum(dim=1) + ridge
        det = (h_bb * h_ww - h_bw * h_bw).clamp_min(1e-9)
        step_b, step_w = (h_ww * g_b - h_bw * g_w) / det, (h_bb * g_w - h_bw * g_b) / det
        decrement = 0.5 * (g_b * step_b + g_w * step_w)
        if float(decrement.max()) < TOLERANCE:
            # the step is known: taking it leaves an error of the order of the decrement's square
            w, b, state = _line_search(at, w, b, step_w, step_b, state)
            break
        w, b, state = _line_search(at, w, b, step_w, step_b, state)
    return w, b, state[1] / n, int((decrement >= TOLERANCE).sum())


_State = tuple[Tensor, Tensor, Tensor]
"""u [M, n], the summed loss of the rows [M], the same with the ridge term [M]."""


def _line_search(
    at: Callable[[Tensor, Tensor], _State], w: Tensor, b: Tensor, step_w: Tensor, step_b: Tensor, old: _State
) -> tuple[Tensor, Tensor, _State]:
    """Take the step, halved per feature while its loss rises; a feature that never falls stays where it is."""
    size = torch.ones_like(w)
    for _ in range(MAX_HALVINGS + 1):
        new_w, new_b = w - size * step_w, b - size * step_b
        new = at(new_w, new_b)
        # A rise within float32 rounding of the sum is none.
        rises = ~(new[2] <= old[2] + 1e-6 * (1 + old[2]))
        if not bool(rises.any()):
            return new_w, new_b, new
        size = torch.where(rises, size / 2, size)
    kept = tuple(torch.where(rises[:, None] if x.ndim == 2 else rises, x, y) for x, y in zip(old, new, strict=True))
    return torch.where(rises, w, new_w), torch.where(rises, b, new_b), (kept[0], kept[1], kept[2])


class ProbeScores(NamedTuple):
    """A fitted probe on rows it was not fitted on."""

    logit_N: np.ndarray
    """float64."""
    loss_N: np.ndarray
    """Cross-entropy per row, nats; not clipped."""


def apply_probe(fits: ProbeFits, feature: int, h_N: Tensor, y_N: Tensor) -> ProbeScores:
    """Logits and losses of one feature's probe on other rows of that feature."""
    s = (h_N.to(torch.float64) - fits.mean_F[feature]) / fits.std_F[feature]
    return score_logits((fits.b_F[feature] + fits.w_F[feature] * s).numpy(), y_N.numpy())


def score_logits(logit_N: np.ndarray, y_N: np.ndarray) -> ProbeScores:
    """Cross-entropy of logits against labels 0 and 1."""
    logit = np.asarray(logit_N, dtype=np.float64)
    return ProbeScores(logit, np.logaddexp(0.0, np.where(np.asarray(y_N) > 0, -logit, logit)))


class DenseProbe(NamedTuple):
    """The ceiling: L2 logistic regression on all standardised channels."""

    scores: ProbeScores
    """On the test rows."""
    train_ce: float
    c: float
    """Inverse regularisation chosen by cross-validation."""


def dense_probe(
    x_train_ND: np.ndarray, y_train_N: np.ndarray, group_train_N: np.ndarray,
    x_test_ND: np.ndarray, y_test_N: np.ndarray,
) -> DenseProbe:
    """Channels standardised on train, C from DENSE_CS by 3-fold cross-validation whose folds keep groups whole."""
    from scipy.linalg import svd

    x = x_train_ND.astype(np.float64)
    mean, std = x.mean(axis=0), x.std(axis=0)
    std = np.where(std <= CONSTANT_STD * np.abs(mean), np.inf, std)
    x, x_test = (x - mean) / std, (x_test_ND.astype(np.float64) - mean) / std
    # The minimiser lies in the span of the rows, so with fewer rows than channels the fit is the same in a rotated
    # basis of that span, and much smaller.
    if x.shape[0] < x.shape[1]:
        _, _, basis = svd(x, full_matrices=False)
        x, x_test = x @ basis.T, x_test @ basis.T
    y = np.asarray(y_train_N)
    fold_N = grouped_folds(np.asarray(group_train_N), y)
    losses = [_cross_validated(x, y, fold_N, c) for c in DENSE_CS]
    best = DENSE_CS[int(np.argmin(losses))]
    model = _logistic(x, y, best)
    train = score_logits(model.decision_function(x), y)
    return DenseProbe(score_logits(model.decision_function(x_test), y_test_N), float(train.loss_N.mean()), best)


def grouped_folds(group_N: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Fold 0 ... 2 of each row; whole groups, classes as even as the groups allow."""
    from sklearn.model_selection import StratifiedGroupKFold

    fold_N = np.zeros(len(y), dtype=np.int64)
    for fold, (_, held_out) in enumerate(StratifiedGroupKFold(DENSE_FOLDS).split(y[:, None], y, group_N)):
        fold_N[held_out] = fold
    return fold_N


def _logistic(x: np.ndarray, y: np.ndarray, c: float):  # type: ignore[no-untyped-def]
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression(C=c, max_iter=1000, tol=1e-5).fit(x, y)


def _cross_validated(x: np.ndarray, y: np.ndarray, fold_N: np.ndarray, c: float) -> float:
    """Mean held-out cross-entropy over the rows; folds whose train part lacks a class are left out."""
    losses = []
    for fold in range(DENSE_FOLDS):
        held_out = fold_N == fold
        if held_out.any() and len(set(y[~held_out])) == 2:
            logits = _logistic(x[~held_out], y[~held_out], c).decision_function(x[held_out])
            losses.append(score_logits(logits, y[held_out]).loss_N)
    return float(np.concatenate(losses).mean()) if losses else math.inf
