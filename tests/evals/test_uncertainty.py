"""Intervals cover what they claim, pairs narrow them, degenerate input has none."""

import math

import numpy as np
import pytest

from evals import uncertainty as u
from sae.errors import ConfigError
from sae.manifest import rng


def _ratio_of_sums(sums):
    return sums[..., 0] / sums[..., 1]


def test_weights_are_multinomial() -> None:
    weights = u.unit_weights(50, rng("w"), 4000)
    assert weights.shape == (4000, 50)
    assert (weights.sum(axis=1) == 50).all()
    assert abs(weights.mean() - 1) < 1e-12
    assert abs(weights.var() - (1 - 1 / 50)) < 0.02


def test_same_seed_same_bytes_and_chunks_do_not_matter_in_size() -> None:
    sums = rng("data").normal(size=(30, 2)) + 5
    a = u.function_of_sums(sums, _ratio_of_sums, rng("x"))
    assert a == u.function_of_sums(sums, _ratio_of_sums, rng("x"))
    assert a != u.function_of_sums(sums, _ratio_of_sums, rng("y"))
    assert a.ci_low < a.value < a.ci_high and a.n == 30


def test_ratio_is_a_ratio_of_sums_not_a_mean_of_ratios() -> None:
    estimate = u.ratio([1.0, 9.0], [1.0, 3.0], rng(0))
    assert estimate.value == pytest.approx(10 / 4)


def test_mean_stderr_matches_theory() -> None:
    values = rng("v").normal(size=400)
    estimate = u.mean(values, rng("b"), resamples=4000)
    assert estimate.stderr == pytest.approx(values.std() / math.sqrt(400), rel=0.05)


def _covered(estimate, truth: float) -> bool:
    return estimate.ci_low <= truth <= estimate.ci_high


def test_coverage_of_means_ratios_and_grouped_data() -> None:
    """METRICS 3: between 92 and 97 % over 400 planted data sets of 200 units (allowing for the noise of 400 trials)."""
    hits = {"mean": 0, "ratio": 0, "grouped": 0}
    for trial in range(400):
        r = rng("coverage", trial)
        hits["mean"] += _covered(u.mean(r.normal(1, 2, 200), r, resamples=400), 1.0)
        den = r.integers(20, 200, 200).astype(float)
        num = den * 0.3 + r.normal(0, 1, 200) * np.sqrt(den)
        hits["ratio"] += _covered(u.ratio(num, den, r, resamples=400), 0.3)
        # 20 families of 10 tasks with a common offset: resampling tasks alone would cover far too rarely
        offsets = np.repeat(r.normal(0, 1, 200 // 5), 5)
        families = [str(i // 5) for i in range(200)]
        hits["grouped"] += _covered(u.mean_by_family(offsets + r.normal(0, 0.1, 200), families, r, resamples=400), 0.0)
    assert 0.92 <= hits["mean"] / 400 <= 0.97, hits
    assert 0.92 <= hits["ratio"] / 400 <= 0.97, hits
    assert 0.90 <= hits["grouped"] / 400 <= 0.975, hits  # 40 families only


def test_ignoring_families_is_overconfident() -> None:
    r = rng("families")
    values = np.repeat(r.normal(0, 1, 20), 10)
    families = [str(i // 10) for i in range(200)]
    assert u.mean_by_family(values, families, rng(1)).stderr > 2 * u.mean(values, rng(1)).stderr


def test_an_equal_pair_is_called_different_in_at_most_7_percent() -> None:
    called = 0
    for trial in range(300):
        r = rng("null", trial)
        common = r.normal(size=100)
        a, b = (np.stack([common + r.normal(size=100), np.ones(100)], axis=1) for _ in range(2))
        difference = u.paired_difference(a, b, u.mean_of_sums, r, resamples=400)
        assert difference.p is not None
        called += difference.p < 0.05
    assert called / 300 <= 0.07


def test_pairing_narrows_the_interval_of_correlated_subjects() -> None:
    r = rng("pairs")
    common = r.normal(0, 10, 200)
    a, b = (np.stack([common + r.normal(i, 1, 200), np.ones(200)], axis=1) for i in range(2))
    paired = u.paired_difference(a, b, u.mean_of_sums, rng(1))
    unpaired = u.unpaired_difference(a, b, u.mean_of_sums, rng(1))
    assert paired.estimate.value == pytest.approx(unpaired.estimate.value)
    assert paired.estimate.stderr < unpaired.estimate.stderr / 3
    assert paired.p < 0.01


def test_an_unpaired_interval_lies_around_the_difference() -> None:
    r = rng("apart")
    a, b = (np.stack([r.normal(m, 1, n), np.ones(n)], axis=1) for m, n in ((5, 300), (3, 100)))
    found = u.unpaired_difference(a, b, u.mean_of_sums, rng(1)).estimate
    se = math.hypot(a[:, 0].std() / 300**0.5, b[:, 0].std() / 10)
    assert found.stderr == pytest.approx(se, rel=0.15)
    assert (found.ci_low, found.ci_high) == pytest.approx((found.value - 1.96 * se, found.value + 1.96 * se), abs=0.05)


def test_the_same_subject_twice_differs_by_nothing() -> None:
    a = np.stack([rng(3).normal(size=50), np.ones(50)], axis=1)
    difference = u.paired_difference(a, a, u.mean_of_sums, rng(1))
    assert difference.estimate.value == 0 and difference.estimate.ci_low is None and difference.p is None


def test_p_formula() -> None:
    assert u.bootstrap_p([1.0] * 999) == pytest.approx(2 / 1000)
    assert u.bootstrap_p([-1.0, 1.0] * 50) == 1.0


def test_degenerate_input_has_no_interval() -> None:
    one = u.mean([3.0], rng(0))
    assert (one.value, one.ci_low, one.stderr, one.n) == (3.0, None, None, 1)
    constant = u.mean([3.0] * 20, rng(0))
    assert constant.value == pytest.approx(3.0) and constant.ci_low is None and constant.stderr is None
    assert u.mean([], rng(0)).failure == "too_few_rows"
    assert u.ratio([1.0, 2.0], [0.0, 0.0], rng(0), code="no_effect").failure == "no_effect"
    assert u.mean([1.0, math.nan], rng(0)).failure == "non_finite"
    assert u.mean([1.0, math.inf], rng(0)).value is None


def test_few_units_have_no_interval() -> None:
    """The percentile interval of two units is their range, which holds the truth in half of all samples."""
    for n in range(2, 9):
        estimate = u.mean(rng("few", n).normal(size=n), rng(0))
        assert (estimate.ci_low is not None) == (estimate.stderr is not None) == (n >= u.MIN_UNITS)
    held = sum(_covered(u.mean(r.normal(size=u.MIN_UNITS), r, resamples=400), 0.0)
               for r in (rng("few units", trial) for trial in range(400)))  # fmt: skip
    assert held / 400 >= 0.82
    a, b = (np.stack([rng(i).normal(size=4), np.ones(4)], axis=1) for i in range(2))
    for difference in (u.paired_difference, u.unpaired_difference):
        found = difference(a, b, u.mean_of_sums, rng(0))
        assert found.estimate.value is not None and found.estimate.ci_low is None and found.p is None


def test_an_interval_holds_its_value() -> None:
    """A biased statistic: the largest of the units is never passed by a resample."""
    resampled = np.linspace(0.0, 0.9, 1000)
    estimate = u.summarise(1.0, resampled, n=50)
    assert estimate.ci_high == 1.0 and estimate.ci_low == pytest.approx(0.0225, abs=1e-3)


def test_a_metric_undefined_in_many_resamples_has_no_interval() -> None:
    estimate = u.ratio([1.0] + [0.0] * 9, [1.0] + [0.0] * 9, rng(0))
    assert estimate.value == 1.0 and estimate.ci_low is None


def test_stratified_keeps_all_strata() -> None:
    r = rng("strata")
    strata = [np.stack([r.normal(m, 1, 60), np.ones(60)], axis=1) for m in (0, 100)]
    estimate = u.stratified(strata, u.mean_of_sums, rng(0))
    assert estimate.value == pytest.approx(50, abs=0.5)
    assert estimate.stderr < 0.2  # resampling the two strata themselves would give about 35
    assert estimate.n == 120
    assert u.stratified([strata[0], np.zeros((0, 2))], u.mean_of_sums, rng(0)).failure == "too_few_rows"


def test_holm_and_wilson() -> None:
    assert u.holm([0.01, 0.04, 0.03, None]) == pytest.approx([0.03, 0.06, 0.06, None])
    assert u.holm([0.9, 0.8]) == [1.0, 1.0]
    low, high = u.wilson(8, 10)
    assert (low, high) == pytest.approx((0.4901625, 0.9433178), abs=1e-6)
    assert u.wilson(0, 10).low == 0 and u.wilson(10, 10).high == pytest.approx(1)
    assert u.wilson(0, 0) is None


def test_wrong_shapes_are_named() -> None:
    with pytest.raises(ConfigError, match="same units"):
        u.paired_difference(np.ones((3, 2)), np.ones((4, 2)), u.mean_of_sums, rng(0))
    with pytest.raises(ConfigError, match="shape"):
        u.function_of_sums(np.ones((2, 2, 2)), u.mean_of_sums, rng(0))
    with pytest.raises(ConfigError, match="family"):
        u.mean_by_family([1.0], ["a", "b"], rng(0))
