"""How well simulated activations follow the true ones: calibration maps and correlation metrics. Torch-free.

Formulas: AUTOINTERP 4. a = true activation, s = simulated, a^ = calibrated, w = weight of a token (that of its window);
n windows, N = all their tokens concatenated. Calibration is fitted on the split `calibrate` alone.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from autointerp.rates import N_RESAMPLES, Interval, interval_of
from sae.errors import ConfigError, did_you_mean
from sae.manifest import rng

Map = Callable[[np.ndarray], np.ndarray]
"""From simulated values to calibrated activations, elementwise."""
CALIBRATIONS = ("linear", "scale", "percentile")
SIMULATION_METRICS = ("pearson", "pearson_bills", "r2_zero", "r2", "abs_dev")
RELATIVE_ZERO = 1e-12
"""A variance below this share of the mean square is a constant: what is left is rounding."""


def fit_linear(s: np.ndarray, a: np.ndarray, w: np.ndarray) -> Map:
    """a^ = alpha s + beta by weighted least squares; the weighted mean of a where s is constant."""
    total = w.sum()
    mean_s, mean_a = (w * s).sum() / total, (w * a).sum() / total
    spread = (w * (s - mean_s) ** 2).sum()
    alpha = (w * (s - mean_s) * (a - mean_a)).sum() / spread if spread > RELATIVE_ZERO * (w * s * s).sum() else 0.0
    beta = mean_a - alpha * mean_s
    return lambda x: alpha * x + beta


def fit_scale(s: np.ndarray, a: np.ndarray, w: np.ndarray) -> Map:
    """a^ = alpha s, alpha = sum w s a / sum w s^2 (Gao et al. 2406.04093, 4.4); zero where s is zero throughout."""
    square = (w * s * s).sum()
    alpha = (w * s * a).sum() / square if square > 0 else 0.0
    return lambda x: alpha * x


def fit_percentile(s: np.ndarray, a: np.ndarray, w: np.ndarray) -> Map:
    """Each distinct s goes to the mean of a over the same range of (weighted) ranks; linear between, clamped outside.

    With equal weights and no ties this sends the k-th smallest s to the k-th smallest a.
    """
    order_a, order_s = np.argsort(a, kind="stable"), np.argsort(s, kind="stable")
    # Integral of a's quantile function up to each cumulated weight: means over a range are differences of it.
    mass_a = np.concatenate(([0.0], np.cumsum(w[order_a])))
    integral = np.concatenate(([0.0], np.cumsum(w[order_a] * a[order_a])))
    distinct, first = np.unique(s[order_s], return_index=True)
    edges = np.concatenate(([0.0], np.cumsum(w[order_s])))[np.append(first, len(s))]
    edges[-1] = mass_a[-1]
    at_edges = np.interp(edges, mass_a, integral)
    means = np.diff(at_edges) / np.diff(edges)
    return lambda x: np.interp(x, distinct, means)


_FITS = {"linear": fit_linear, "scale": fit_scale, "percentile": fit_percentile}


def fit(kind: str, s: np.ndarray, a: np.ndarray, w: np.ndarray) -> Map:
    """The calibration ``kind`` of s onto a; float64 vectors of N. An unknown kind is a :class:`ConfigError`."""
    if kind not in _FITS:
        raise ConfigError(f"there is no calibration {kind!r}{did_you_mean(kind, _FITS)}")
    if len(s) == 0:
        raise ValueError("no calibration tokens to fit on")
    return _FITS[kind](s, a, w)


class WindowSums(NamedTuple):
    """Sums over the tokens of each window, float64 [n] each: all metrics and their bootstrap follow from them."""

    w: np.ndarray
    ws: np.ndarray
    wa: np.ndarray
    wss: np.ndarray
    waa: np.ndarray
    wsa: np.ndarray
    n: np.ndarray
    s: np.ndarray
    a: np.ndarray
    ss: np.ndarray
    aa: np.ndarray
    sa: np.ndarray
    w_square_error: np.ndarray
    """sum w (a - a^)^2"""
    w_abs_error: np.ndarray
    w_abs: np.ndarray
    """sum w |a|"""


def window_sums(
    true: Sequence[np.ndarray], simulated: Sequence[np.ndarray], weights: np.ndarray, calibrated: Map
) -> WindowSums:
    """``true`` and ``simulated``: one vector per window, equally long; ``weights``: one per window."""
    rows = []
    for a_raw, s_raw, w in zip(true, simulated, weights, strict=True):
        a, s = np.asarray(a_raw, dtype=np.float64), np.asarray(s_raw, dtype=np.float64)
        if a.shape != s.shape:
            raise ValueError(f"a window of {a.size} tokens was simulated as {s.size}")
        error = a - calibrated(s)
        plain = [float(len(a)), s.sum(), a.sum(), (s * s).sum(), (a * a).sum(), (s * a).sum()]
        rest = [(error**2).sum(), np.abs(error).sum(), np.abs(a).sum()]
        rows.append([w * v for v in plain] + plain + [w * v for v in rest])
    return WindowSums(*np.asarray(rows, dtype=np.float64).reshape(-1, 15).T)


def _correlation(
    n: np.ndarray, s: np.ndarray, a: np.ndarray, ss: np.ndarray, aa: np.ndarray, sa: np.ndarray
) -> np.ndarray:
    """corr from sums; NaN where either side is constant."""
    with np.errstate(invalid="ignore", divide="ignore"):
        var_s, var_a = ss / n - (s / n) ** 2, aa / n - (a / n) ** 2
        value = (sa / n - s * a / n**2) / np.sqrt(var_s * var_a)
    constant = (var_s <= RELATIVE_ZERO * ss / n) | (var_a <= RELATIVE_ZERO * aa / n)
    return np.where(constant, np.nan, np.clip(value, -1.0, 1.0))


def _metrics(t: WindowSums) -> dict[str, np.ndarray]:
    """All metrics from total sums (scalars or vectors over resamples); NaN where undefined."""
    with np.errstate(invalid="ignore", divide="ignore"):
        centred = t.waa - t.wa**2 / t.w
        r2 = np.where(centred > RELATIVE_ZERO * t.waa, 1 - t.w_square_error / centred, np.nan)
        r2_zero = np.where(t.waa > 0, 1 - t.w_square_error / t.waa, np.nan)
        abs_dev = np.where(t.w_abs > 0, 1 - t.w_abs_error / t.w_abs, np.nan)
    return {
        "pearson": _correlation(t.w, t.ws, t.wa, t.wss, t.waa, t.wsa),
        "pearson_bills": _correlation(t.n, t.s, t.a, t.ss, t.aa, t.sa),
        "r2_zero": r2_zero,
        "r2": r2,
        "abs_dev": abs_dev,
    }


class SimulationMetric(NamedTuple):
    """One metric, or why it is undefined."""

    value: float | None
    interval: Interval | None
    null_reason: str | None


def simulation_metrics(sums: WindowSums, positive: np.ndarray, *key: object) -> dict[str, SimulationMetric]:
    """The metrics of :data:`SIMULATION_METRICS` with 95 % bootstrap intervals over windows within sign.

    ``positive``: bool [n]; ``key`` seeds the bootstrap. Correlations use uncalibrated s, so a negative fit cannot flip
    them. A constant truth or prediction gives None with `constant_truth` or `constant_prediction`.
    """
    if len(positive) == 0:
        return {m: SimulationMetric(None, None, "one_class") for m in SIMULATION_METRICS}
    total = WindowSums(*(column.sum() for column in sums))
    values = _metrics(total)
    constant_truth = bool(total.aa - total.a**2 / total.n <= RELATIVE_ZERO * total.aa)
    resampled = _metrics(WindowSums(*(_multiplicities(positive, *key) @ np.stack(sums, axis=1)).T))
    out = {}
    for metric in SIMULATION_METRICS:
        value = float(values[metric])
        if constant_truth or not np.isfinite(value):
            reason = "constant_truth" if constant_truth else "constant_prediction"
            out[metric] = SimulationMetric(None, None, reason)
            continue
        draws = resampled[metric][np.isfinite(resampled[metric])]
        interval = interval_of(draws, value) if len(draws) >= N_RESAMPLES // 2 else None
        out[metric] = SimulationMetric(value, interval, None)
    return out


def _multiplicities(positive: np.ndarray, *key: object) -> np.ndarray:
    """[N_RESAMPLES, n]: how often each window is drawn, positives and negatives apart."""
    generator = rng("simulation_interval", *key)
    times = np.zeros((N_RESAMPLES, len(positive)))
    for sign in (True, False):
        members = np.flatnonzero(np.asarray(positive) == sign)
        if len(members):
            times[:, members] = generator.multinomial(
                len(members), np.full(len(members), 1 / len(members)), size=N_RESAMPLES
            )
    return times


def window_weights(positive: np.ndarray, pi: float | None) -> np.ndarray:
    """float64 [n]: pi/n_pos for a positive window, (1 - pi)/n_neg for a negative one; equal weights without ``pi``.

    So that the drawn windows stand for all grid windows of the split (AUTOINTERP 4). With one sign only, equal weights.
    """
    positive = np.asarray(positive, dtype=bool)
    n_pos, n_neg = int(positive.sum()), int((~positive).sum())
    if pi is None or not 0 < pi < 1 or n_pos == 0 or n_neg == 0:
        return np.ones(len(positive))
    return np.where(positive, pi / n_pos, (1 - pi) / n_neg)
