"""Scaling laws: the paper's table, constants recovered from noisy grids, intervals that hold, inputs that cannot do."""

import numpy as np
import pytest

from sae import scaling
from sae.errors import DataError
from sae.scaling import PAPER_C, PAPER_NK

WIDTHS = 2.0 ** np.arange(11, 20, 2)
SPARSITIES = np.array([32, 64, 128, 256, 512])


def grid(seeds: int = 2) -> tuple[np.ndarray, np.ndarray]:
    n, k = (a.ravel() for a in np.meshgrid(WIDTHS, SPARSITIES))
    return np.tile(n, seeds), np.tile(k, seeds)


def noisy(values: np.ndarray, seed: int, size: float = 0.01) -> np.ndarray:
    return values * np.exp(np.random.default_rng(seed).normal(0, size, len(values)))


@pytest.mark.parametrize(
    "n, row",
    [
        (32_768, [0.474, 0.431, 0.393, 0.358, 0.326]),
        (131_072, [0.419, 0.374, 0.336, 0.302, 0.272]),
        (16_777_216, [0.299, 0.261, 0.231, 0.207, 0.187]),
    ],
)
def test_the_constants_of_the_paper_give_its_table(n: int, row: list[float]) -> None:
    assert PAPER_NK(n, SPARSITIES) == pytest.approx(row, abs=5.1e-4)


def test_the_compute_law_of_the_paper() -> None:
    assert PAPER_C(10.0 ** np.arange(-9, -4)) == pytest.approx([0.409, 0.353, 0.307, 0.269, 0.237], abs=5.1e-4)


def test_exact_values_give_back_the_constants() -> None:
    n, k = grid(1)
    fit = scaling.fit_width_sparsity(n, k, PAPER_NK(n, k), resamples=2)
    for name, value in fit.constants.items():
        assert value == pytest.approx(getattr(PAPER_NK, name), rel=1e-3), name
    assert fit.error < 1e-6
    x = np.geomspace(1e-9, 1e-3, 8)
    power = scaling.fit_power(x, PAPER_C(x), resamples=2)
    for name, value in power.constants.items():
        assert value == pytest.approx(getattr(PAPER_C, name), rel=1e-3), name


def test_a_noisy_grid_gives_back_the_law_and_its_interval() -> None:
    """1 % noise, six runs a cell (the law's error at a corner is then about half a per cent): L within 1 %, gamma
    within its interval."""
    n, k = grid(6)
    fit = scaling.fit_width_sparsity(n, k, noisy(PAPER_NK(n, k), 0))
    assert fit.law(n, k) == pytest.approx(PAPER_NK(n, k), rel=0.01)  # type: ignore[call-arg]
    low, high = fit.intervals["gamma"]
    assert low < PAPER_NK.gamma < high and high - low < 0.1
    assert fit.error == pytest.approx(0.01, rel=0.35)


@pytest.mark.slow
def test_intervals_hold_as_often_as_they_say() -> None:
    """Of 60 noisy grids 95 % should have gamma in its interval; 52 or fewer would have a chance below 1 in 100."""
    n, k = grid()
    held = 0
    for seed in range(60):
        fit = scaling.fit_width_sparsity(n, k, noisy(PAPER_NK(n, k), seed), seed=seed, resamples=100)
        low, high = fit.intervals["gamma"]
        held += low <= PAPER_NK.gamma <= high
    assert held >= 53


def test_a_power_law_with_noise() -> None:
    x = np.tile(np.geomspace(1e-9, 1e-3, 12), 3)
    fit = scaling.fit_power(x, noisy(PAPER_C(x), 3))
    assert fit.law(x) == pytest.approx(PAPER_C(x), rel=0.01)  # type: ignore[call-arg]
    for name in ("irreducible", "power"):
        low, high = fit.intervals[name]
        assert low < getattr(PAPER_C, name) < high


def test_scale_of_the_axis_does_not_matter() -> None:
    x = np.geomspace(1e-9, 1e-3, 8)
    loss = noisy(PAPER_C(x), 1, 0.003)
    a, b = (scaling.fit_power(factor * x, loss, resamples=2) for factor in (1.0, 1e20))
    assert a.law(x) == pytest.approx(b.law(1e20 * x), rel=1e-6)  # type: ignore[call-arg]
    assert a.constants["power"] == pytest.approx(b.constants["power"], rel=1e-4)


def test_the_same_seed_gives_the_same_interval() -> None:
    n, k = grid()
    loss = noisy(PAPER_NK(n, k), 0)
    first, again, other = (scaling.fit_width_sparsity(n, k, loss, seed=s, resamples=5).intervals for s in (0, 0, 1))
    assert first == again != other


def test_the_frontier_is_what_nothing_cheaper_beats() -> None:
    c, loss = scaling.frontier([4, 1, 2, 3, 2, 5], [0.5, 0.9, 0.7, 0.8, 0.75, 0.5])
    assert c.tolist() == [1, 2, 4] and loss.tolist() == [0.9, 0.7, 0.5]


def test_what_cannot_be_fitted_is_refused() -> None:
    with pytest.raises(DataError, match="at least 7 runs"):
        scaling.fit_width_sparsity([1, 2, 3, 4, 5, 6], [1, 2, 1, 2, 1, 2], np.full(6, 0.5))
    with pytest.raises(DataError, match="two k"):
        scaling.fit_width_sparsity(np.arange(1, 9), np.full(8, 32), np.full(8, 0.5))
    with pytest.raises(DataError, match="at least 4 runs"):
        scaling.fit_power([1, 2, 3], [0.5, 0.4, 0.3])
    with pytest.raises(DataError, match="three different x"):
        scaling.fit_power([1, 1, 2, 2], [0.5, 0.5, 0.3, 0.3])
    with pytest.raises(DataError, match="above 0 in loss"):
        scaling.fit_power([1, 2, 3, 4], [0.5, 0.4, float("nan"), 0.3])
    with pytest.raises(DataError, match="different length"):
        scaling.fit_power([1, 2, 3, 4], [0.5, 0.4, 0.3])
