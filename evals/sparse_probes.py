"""Probes on k features: which features, and the L2 logistic regression on them (METRICS F). Torch only to encode.

N prompts of the store, F features, n rows of one task, k chosen features, S task splits, P problems fitted at once.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

from evals.probe_activations import TaskSplit

if TYPE_CHECKING:
    import torch

    from evals.base import Subject

MIN_ACTIVE = 5
"""A feature active on fewer train rows is not ranked."""
CS = (1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)
FOLDS = 3
MAX_ITERATIONS = 100
MAX_HALVINGS = 20
TOLERANCE = 1e-9
"""Newton decrement ½ gᵀH⁻¹g, in summed nats, below which a fit is done."""
ENCODE_ROWS = 8_192
_BLOCK_NUMBERS = 1 << 23


class Features(Protocol):
    """Feature values of all prompts, read by columns."""

    n_features: int

    def scores(self, y_N: np.ndarray, splits: Sequence[TaskSplit]) -> np.ndarray:
        """[S, F] how far apart the classes are on the train rows of each split; -inf = not ranked."""
        ...

    def take(self, columns: np.ndarray) -> np.ndarray:
        """[N, k] float64."""
        ...


class SparseFeatures:
    """Post-activations, held as a compressed sparse matrix."""

    def __init__(self, values_NK: np.ndarray, indices_NK: np.ndarray, n_features: int) -> None:
        """A slot of value 0 is empty whatever its index."""
        from scipy.sparse import csc_matrix

        active = values_NK != 0
        rows = np.broadcast_to(np.arange(len(values_NK))[:, None], values_NK.shape)[active]
        shape = (len(values_NK), n_features)
        self.n_features = n_features
        self.matrix = csc_matrix((values_NK[active].astype(np.float64), (rows, indices_NK[active])), shape=shape)

    @property
    def l0(self) -> float:
        """Mean active features per prompt."""
        return float(self.matrix.nnz / max(self.matrix.shape[0], 1))

    def scores(self, y_N: np.ndarray, splits: Sequence[TaskSplit]) -> np.ndarray:
        by_row = self.matrix.tocsr()
        found = []
        for split in splits:
            part = by_row[split.train]
            positive = y_N[split.train] > 0
            sums = [np.asarray(part[side].sum(axis=0)).ravel() for side in (positive, ~positive)]
            active = np.bincount(part.indices, minlength=self.n_features)
            magnitude = np.bincount(part.indices, weights=np.abs(part.data), minlength=self.n_features)
            found.append(_score(sums[0], sums[1], int(positive.sum()), int((~positive).sum()), active, magnitude))
        return np.stack(found)

    def take(self, columns: np.ndarray) -> np.ndarray:
        return np.asarray(self.matrix[:, columns].toarray())


class DenseFeatures:
    """Real-valued features computed on demand, a block of columns at a time."""

    def __init__(self, compute: "Callable[[torch.Tensor], torch.Tensor]", n_rows: int, n_features: int) -> None:
        """``compute``: column numbers [M] -> float32 [N, M]."""
        self.compute, self.n_rows, self.n_features = compute, n_rows, n_features

    def scores(self, y_N: np.ndarray, splits: Sequence[TaskSplit]) -> np.ndarray:
        width = max(16, _BLOCK_NUMBERS // max(self.n_rows, 1))
        sides = np.zeros((2, len(splits), self.n_rows))  # rows of the positives, of the negatives
        for s, split in enumerate(splits):
            positive = y_N[split.train] > 0
            sides[0, s, split.train[positive]] = 1
            sides[1, s, split.train[~positive]] = 1
        n_pos, n_neg = sides.sum(axis=2)[:, :, None]
        train = sides.sum(axis=0)
        blocks = []
        for start in range(0, self.n_features, width):
            x = self.take(np.arange(start, min(start + width, self.n_features)))
            active = train @ (x != 0).astype(np.float64)  # a product with booleans has no fast path
            blocks.append(_score(sides[0] @ x, sides[1] @ x, n_pos, n_neg, active, train @ np.abs(x)))
        return np.concatenate(blocks, axis=1)

    def take(self, columns: np.ndarray) -> np.ndarray:
        import torch

        with torch.inference_mode():
            return np.asarray(self.compute(torch.from_numpy(columns)).double().cpu().numpy())


def _score(
    pos_F: np.ndarray, neg_F: np.ndarray, n_pos: Any, n_neg: Any, active_F: np.ndarray, magnitude_F: np.ndarray
) -> np.ndarray:
    """|mean z(pos) - mean z(neg)| over the mean of non-zero |z|: no feature wins by being loud. Sums of the two sides,
    and over both; [F] or [S, F]."""
    with np.errstate(invalid="ignore", divide="ignore"):
        score = np.abs(pos_F / n_pos - neg_F / n_neg) / (magnitude_F / active_F)
    return np.where((active_F >= MIN_ACTIVE) & np.isfinite(score), score, -np.inf)


def codes_of(subject: "Subject", x_ND: "torch.Tensor") -> SparseFeatures:
    """Post-activations of all prompts, encoded in blocks of rows."""
    import torch

    parts = []
    for start in range(0, len(x_ND), ENCODE_ROWS):
        with torch.inference_mode():
            codes = subject.encode_sparse(x_ND[start : start + ENCODE_ROWS])
        parts.append((codes.values_NK.float().cpu().numpy(), codes.indices_NK.long().cpu().numpy()))
    width = max(values.shape[1] for values, _ in parts)  # the width of free codes varies from block to block
    values, indices = (
        np.concatenate([np.pad(part[i], ((0, 0), (0, width - part[i].shape[1]))) for part in parts]) for i in (0, 1)
    )
    return SparseFeatures(values, indices, subject.info.d_sae)


def random_topk(x_ND: "torch.Tensor", train_rows: np.ndarray, n_features: int, k: int, seed: int) -> SparseFeatures:
    """Floor: the k largest of ``n_features`` random directions on channel-standardised prompts, others 0."""
    import torch

    from sae.manifest import seed_of

    x = x_ND.double()
    std, mean = torch.std_mean(x[torch.from_numpy(train_rows)], dim=0, correction=0)
    s_ND = ((x - mean) / std.clamp_min(1e-12)).float()
    generator = torch.Generator().manual_seed(seed_of(seed, "sparse_probing_random", x.shape[1], n_features))
    directions = torch.randn(n_features, x.shape[1], generator=generator)
    directions /= directions.norm(dim=1, keepdim=True)
    rows = max(1, _BLOCK_NUMBERS // n_features)
    k = min(max(k, 1), n_features)
    parts = [(s_ND[i : i + rows] @ directions.T).clamp_min(0).topk(k, dim=1) for i in range(0, len(s_ND), rows)]
    values, indices = (np.concatenate([p[i].numpy() for p in parts]) for i in (0, 1))
    return SparseFeatures(values, indices, n_features)


class KProbe(NamedTuple):
    """The probe of one (task, seed, k) on its test rows."""

    columns: np.ndarray
    """Chosen features, best first; fewer than k where fewer are ranked."""
    logit_N: np.ndarray
    c: float


def best_columns(score_F: np.ndarray, k: int) -> np.ndarray:
    """The k ranked features of highest score, lower index first on ties."""
    order = np.argsort(-score_F, kind="stable")[:k]
    return order[np.isfinite(score_F[order])]


def probe_k(
    x_train: np.ndarray, y_train: np.ndarray, fold_N: np.ndarray, x_test: np.ndarray
) -> tuple[np.ndarray, float]:
    """(test logits, C): columns standardised on train, C from CS by cross-entropy on held-out folds, then refitted."""
    mean, std = x_train.mean(axis=0), x_train.std(axis=0)
    std = np.where(std <= 1e-6 * np.abs(mean), np.inf, std)
    x, x_test = (x_train - mean) / std, (x_test - mean) / std
    y = (np.asarray(y_train) > 0).astype(np.float64)
    folds = [f for f in range(FOLDS) if (fold_N == f).any() and len(set(y[fold_N != f])) == 2]
    best = CS[len(CS) // 2]
    if folds:
        weight_PN = np.stack([(fold_N != f).astype(np.float64) for f in folds for _ in CS])
        w, b = fit_logistic(x, y, weight_PN, np.array([1 / c for _ in folds for c in CS]))
        loss_PN = _losses(w @ x.T + b[:, None], y)
        held = (loss_PN * (1 - weight_PN)).sum(axis=1).reshape(len(folds), len(CS)).sum(axis=0)
        best = CS[int(np.argmin(held))]
    w, b = fit_logistic(x, y, np.ones((1, len(y))), np.array([1 / best]))
    return x_test @ w[0] + b[0], best


def _losses(logit_PN: np.ndarray, y_N: np.ndarray) -> np.ndarray:
    return np.logaddexp(0.0, np.where(y_N > 0, -logit_PN, logit_PN))


def fit_logistic(
    x_NK: np.ndarray, y_N: np.ndarray, weight_PN: np.ndarray, ridge_P: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(w [P, k], b [P]) of P problems ``Σ_n weight [softplus(t) - y t] + ½ ridge |w|²`` on the same rows.

    The minimiser of scikit-learn's LogisticRegression with C = 1 / ridge, by damped Newton steps; the intercept is
    free. RuntimeError if a problem does not converge (the loss is convex: it should not happen).
    """
    n, k = x_NK.shape
    x = np.concatenate([x_NK, np.ones((n, 1))], axis=1)
    ridge = np.concatenate([np.repeat(ridge_P[:, None], k, axis=1), np.zeros((len(ridge_P), 1))], axis=1)
    theta = np.zeros((len(ridge_P), k + 1))
    rate = (weight_PN @ y_N) / weight_PN.sum(axis=1)
    theta[:, k] = np.log(rate / (1 - rate))

    def loss(t: np.ndarray) -> np.ndarray:
        return np.asarray((weight_PN * _losses(t @ x.T, y_N)).sum(axis=1) + 0.5 * (ridge * t * t).sum(axis=1))

    value = loss(theta)
    for _ in range(MAX_ITERATIONS):
        q = 1 / (1 + np.exp(-np.clip(theta @ x.T, -500, 500)))
        gradient = (weight_PN * (q - y_N)) @ x + ridge * theta
        curvature = weight_PN * q * (1 - q)
        hessian = (x.T[None] * curvature[:, None, :]) @ x
        # the floor keeps a separated problem, whose curvature vanishes in the intercept, solvable
        hessian[:, range(k + 1), range(k + 1)] += np.maximum(ridge, 1e-10)
        step = np.linalg.solve(hessian, gradient[:, :, None])[:, :, 0]
        if float((gradient * step).sum(axis=1).max()) / 2 < TOLERANCE:
            theta = theta - step
            return theta[:, :k], theta[:, k]
        size = np.ones(len(theta))
        for _ in range(MAX_HALVINGS):
            new = theta - size[:, None] * step
            rises = loss(new) > value + 1e-12 * (1 + value)
            if not rises.any():
                break
            size = np.where(rises, size / 2, size)
        theta = np.where(rises[:, None], theta, new)
        value = loss(theta)
    raise RuntimeError(f"a logistic regression on {n} rows and {k} features did not converge")
