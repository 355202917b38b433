"""Scaling laws of sparse autoencoders: their forms, the paper's constants, and fits with intervals (TRAINING 12).

n latents, k active ones, C compute; L is the normalised squared error. Gao et al., arXiv 2406.04093, section 3:

    L(n, k) = exp(alpha + beta_k ln k + beta_n ln n + gamma ln k ln n) + exp(zeta + eta ln k)
    L(n), L(C) = irreducible + scale * x^-power

Free of torch. Fits are least squares on ln L; intervals come from a bootstrap of the residuals over runs, since
resampling the runs themselves leaves small grids with fewer different runs than constants.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from sae.errors import DataError
from sae.manifest import rng

CONFIDENCE = 0.95
RESAMPLES = 200
MIN_SPARE_RUNS = 1
"""Runs beyond the number of constants."""


@dataclass(frozen=True)
class WidthSparsityLaw:
    """L(n, k); the second term is what no width removes."""

    alpha: float
    beta_k: float
    beta_n: float
    gamma: float
    """Interaction of width and sparsity."""
    zeta: float
    eta: float

    def __call__(self, n: ArrayLike, k: ArrayLike) -> np.ndarray:
        """Predicted L for broadcastable n and k."""
        log_n, log_k = np.log(np.asarray(n, dtype=float)), np.log(np.asarray(k, dtype=float))
        reducible = np.exp(self.alpha + self.beta_k * log_k + self.beta_n * log_n + self.gamma * log_k * log_n)
        return np.asarray(reducible + np.exp(self.zeta + self.eta * log_k))


@dataclass(frozen=True)
class PowerLaw:
    """``irreducible + scale * x^-power``: L(n) at one k, or L(C)."""

    irreducible: float
    scale: float
    power: float

    def __call__(self, x: ArrayLike) -> np.ndarray:
        """Predicted L."""
        return np.asarray(self.irreducible + self.scale * np.asarray(x, dtype=float) ** -self.power)


PAPER_NK = WidthSparsityLaw(alpha=-0.50, beta_k=0.26, beta_n=-0.017, gamma=-0.042, zeta=-1.32, eta=-0.085)
"""Their constants for GPT-4 activations."""
PAPER_C = PowerLaw(irreducible=0.09, scale=0.056, power=0.084)
"""Likewise; C is the share of GPT-4's own training compute."""


@dataclass(frozen=True)
class Fit:
    """A fitted law."""

    law: WidthSparsityLaw | PowerLaw
    constants: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    """95 % intervals of the constants."""
    n_runs: int
    error: float
    """Root mean square of ln(measured / fitted)."""

    def row(self) -> dict[str, Any]:
        """Plain values for a file."""
        return {
            "law": type(self.law).__name__, "constants": self.constants, "n_runs": self.n_runs, "error": self.error,
            "intervals": {name: list(pair) for name, pair in self.intervals.items()},
        }  # fmt: skip


def _checked(columns: Mapping[str, ArrayLike], n_constants: int) -> list[np.ndarray]:
    """Equally long, positive, finite float columns with enough rows and enough different values."""
    found = [np.asarray(values, dtype=float).ravel() for values in columns.values()]
    lengths = {len(values) for values in found}
    if len(lengths) != 1:
        raise DataError(f"columns of different length: { {n: len(v) for n, v in zip(columns, found, strict=True)} }")
    for name, values in zip(columns, found, strict=True):
        if not (np.isfinite(values).all() and (values > 0).all()):
            raise DataError(f"a scaling law needs finite numbers above 0 in {name}, got {values[:5]}")
    needed = n_constants + MIN_SPARE_RUNS
    if lengths.pop() < needed:
        raise DataError(f"a law of {n_constants} constants needs at least {needed} runs, got {len(found[0])}")
    return found


def _least_squares(
    model: Callable[[np.ndarray], np.ndarray], log_loss: np.ndarray, starts: Sequence[np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """(parameters, residuals of ln L) of the best start. ``model`` gives ln L for internal parameters."""
    from scipy.optimize import least_squares

    results = [least_squares(lambda p: model(p) - log_loss, start, method="trf", max_nfev=2_000) for start in starts]
    best = min(results, key=lambda result: float(result.cost))
    return best.x, log_loss - model(best.x)


def _bootstrap(
    model: Callable[[np.ndarray], np.ndarray], found: np.ndarray, residuals: np.ndarray,
    constants: Callable[[np.ndarray], dict[str, float]], seed: int, resamples: int,
) -> dict[str, tuple[float, float]]:  # fmt: skip
    """Percentile intervals: residuals are drawn over runs, scaled for the constants they were fitted with."""
    generator = rng("scaling", seed)
    fitted, n = model(found), len(residuals)
    scaled = (residuals - residuals.mean()) * (n / max(1, n - len(found))) ** 0.5
    drawn: dict[str, list[float]] = {}
    for _ in range(resamples):
        again, _ = _least_squares(model, fitted + generator.choice(scaled, n), [found])
        for name, value in constants(again).items():
            drawn.setdefault(name, []).append(value)
    tails = [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2]
    return {name: (float(low), float(high)) for name, v in drawn.items() for low, high in [np.quantile(v, tails)]}


def fit_power(x: ArrayLike, loss: ArrayLike, *, seed: int = 0, resamples: int = RESAMPLES) -> Fit:
    """L(n) at one k, or L(C), from at least four runs. ``DataError`` for fewer, or for values that are not positive."""
    x_R, loss_R = _checked({"x": x, "loss": loss}, 3)
    if len(np.unique(x_R)) < 3:
        raise DataError(f"a power law with an irreducible term needs three different x, got {np.unique(x_R)}")
    middle = float(np.exp(np.log(x_R).mean()))
    ratio_R = x_R / middle  # about 1, so that scale and power do not compensate each other

    def model(p: np.ndarray) -> np.ndarray:
        return np.asarray(np.logaddexp(p[0], p[1] - np.exp(p[2]) * np.log(ratio_R)))

    def constants(p: np.ndarray) -> dict[str, float]:
        power = float(np.exp(p[2]))
        return {"irreducible": float(np.exp(p[0])), "scale": float(np.exp(p[1]) * middle**power), "power": power}

    least, middling = float(loss_R.min()), float(np.median(loss_R))
    starts = [
        np.log([share * least, max(middling - share * least, 1e-3 * least), power])
        for share in (0.1, 0.5, 0.9)
        for power in (0.1, 0.3, 1.0)
    ]
    found, residuals = _least_squares(model, np.log(loss_R), starts)
    values = constants(found)
    intervals = _bootstrap(model, found, residuals, constants, seed, resamples)
    return Fit(PowerLaw(**values), values, intervals, len(x_R), float(np.sqrt(np.mean(residuals**2))))


def fit_width_sparsity(
    n: ArrayLike, k: ArrayLike, loss: ArrayLike, *, seed: int = 0, resamples: int = RESAMPLES
) -> Fit:
    """L(n, k) from at least seven runs over three widths and two k or more; ``DataError`` otherwise."""
    n_R, k_R, loss_R = _checked({"n": n, "k": k, "loss": loss}, 6)
    if len(np.unique(n_R)) < 3 or len(np.unique(k_R)) < 2:
        raise DataError("L(n, k) needs at least three widths and two k, or its two terms cannot be told apart")
    at_n, at_k = float(np.log(n_R).mean()), float(np.log(k_R).mean())
    log_n, log_k = np.log(n_R) - at_n, np.log(k_R) - at_k  # centred, or the constants compensate each other

    def model(p: np.ndarray) -> np.ndarray:
        return np.asarray(np.logaddexp(p[0] + p[1] * log_k + p[2] * log_n + p[3] * log_k * log_n, p[4] + p[5] * log_k))

    def constants(p: np.ndarray) -> dict[str, float]:
        return {
            "alpha": float(p[0] - p[1] * at_k - p[2] * at_n + p[3] * at_k * at_n),
            "beta_k": float(p[1] - p[3] * at_n), "beta_n": float(p[2] - p[3] * at_k), "gamma": float(p[3]),
            "zeta": float(p[4] - p[5] * at_k), "eta": float(p[5]),
        }  # fmt: skip

    middle = float(np.median(loss_R))
    starts = [
        np.array([np.log((1 - share) * middle), slope, -0.2, 0.0, np.log(share * middle), -0.1])
        for share in (0.2, 0.5, 0.8)
        for slope in (-0.3, 0.0)
    ]
    found, residuals = _least_squares(model, np.log(loss_R), starts)
    values = constants(found)
    intervals = _bootstrap(model, found, residuals, constants, seed, resamples)
    return Fit(WidthSparsityLaw(**values), values, intervals, len(n_R), float(np.sqrt(np.mean(residuals**2))))


def frontier(compute: ArrayLike, loss: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """(C, L) of the runs, or points of training curves, that no cheaper one beats, by rising C."""
    c_R, loss_R = _checked({"compute": compute, "loss": loss}, 0)
    order = np.lexsort((loss_R, c_R))
    c_R, loss_R = c_R[order], loss_R[order]
    best_before = np.concatenate([[np.inf], np.minimum.accumulate(loss_R)[:-1]])
    kept = loss_R < best_before
    return c_R[kept], loss_R[kept]


def step_flops(d_in: int, d_sae: int) -> float:
    """Compute of training per token, as the paper counts it: five dense products, whatever is skipped in practice."""
    return 10.0 * d_in * d_sae
