import numpy as np
import pytest

from autointerp.calibration import (
    SIMULATION_METRICS,
    fit,
    simulation_metrics,
    window_sums,
    window_weights,
)
from sae.errors import ConfigError


def draw(n=12, tokens=8, seed=0):
    generator = np.random.default_rng(seed)
    positive = np.arange(n) < n // 2
    true = [generator.random(tokens) * p for p in positive]
    return positive, true, generator


def metrics(true, simulated, positive, pi=0.01, calibration="linear"):
    w = window_weights(positive, pi)
    flat_w = np.repeat(w, [len(t) for t in true])
    mapped = fit(calibration, np.concatenate(simulated), np.concatenate(true), flat_w)
    return simulation_metrics(window_sums(true, simulated, w, mapped), positive, "test")


def test_oracle_reaches_one_on_every_metric():
    positive, true, _ = draw()
    for calibration in ("linear", "scale", "percentile"):
        found = metrics(true, [3 * t for t in true], positive, calibration=calibration)
        for name in SIMULATION_METRICS:
            assert found[name].value == pytest.approx(1.0, abs=1e-9), (calibration, name)


def test_pearson_equals_numpy_and_weights_act_as_copies():
    positive, true, generator = draw()
    simulated = [t + 0.3 * generator.random(len(t)) for t in true]
    found = metrics(true, simulated, positive)
    a, s = np.concatenate(true), np.concatenate(simulated)
    assert found["pearson_bills"].value == pytest.approx(np.corrcoef(a, s)[0, 1])
    # 6 positive and 6 negative windows at pi = 1/4: as if each negative window were there three times.
    copies = np.repeat(np.arange(12), np.where(positive, 1, 3))
    a3, s3 = np.concatenate([true[i] for i in copies]), np.concatenate([simulated[i] for i in copies])
    weighted = metrics(true, simulated, positive, pi=0.25)
    assert weighted["pearson"].value == pytest.approx(np.corrcoef(a3, s3)[0, 1])
    low, high = weighted["pearson"].interval
    assert low < weighted["pearson"].value < high


def test_r2_and_deviation_by_hand():
    # One window a = (0, 2), simulated as is but wrong by one: no calibration (identity map).
    sums = window_sums([np.array([0.0, 2.0])], [np.array([1.0, 1.0])], np.ones(1), lambda x: x)
    found = simulation_metrics(sums, np.array([True]), "k")
    assert found["r2_zero"].value == pytest.approx(1 - 2 / 4)
    assert found["r2"].value == pytest.approx(1 - 2 / 2)
    assert found["abs_dev"].value == pytest.approx(1 - 2 / 2)
    assert found["pearson"].null_reason == "constant_prediction"


def test_negative_correlation_is_not_flipped_by_the_fit():
    positive, true, _ = draw()
    found = metrics(true, [-t for t in true], positive)
    assert found["pearson"].value == pytest.approx(-1.0)
    assert found["r2_zero"].value == pytest.approx(1.0)


def test_constants_are_null_not_zero():
    positive, true, _ = draw()
    found = metrics(true, [np.full(8, 0.7)] * 12, positive)
    assert found["pearson"].value is None and found["pearson"].null_reason == "constant_prediction"
    found = metrics([np.zeros(8)] * 12, true, positive)
    assert {found[m].null_reason for m in SIMULATION_METRICS} == {"constant_truth"}
    found = simulation_metrics(window_sums([], [], np.zeros(0), lambda x: x), np.zeros(0, dtype=bool), "k")
    assert {found[m].null_reason for m in SIMULATION_METRICS} == {"one_class"}


def test_least_squares_equals_lstsq():
    generator = np.random.default_rng(1)
    s, a, w = generator.random(50), generator.random(50), generator.random(50)
    root = np.sqrt(w)
    slope, offset = np.linalg.lstsq(np.stack([s, np.ones(50)], 1) * root[:, None], a * root, rcond=None)[0]
    x = np.array([0.0, 0.5, 2.0])
    assert fit("linear", s, a, w)(x) == pytest.approx(slope * x + offset)
    assert fit("scale", s, a, w)(x) == pytest.approx((w * s * a).sum() / (w * s * s).sum() * x)


def test_percentile_map():
    one = np.ones(4)
    mapped = fit("percentile", np.array([1.0, 2.0, 3.0, 4.0]), np.array([10.0, 40.0, 20.0, 30.0]), one)
    assert mapped(np.array([1.0, 2.0, 3.0, 4.0, 2.5, -5.0, 9.0])) == pytest.approx([10, 20, 30, 40, 25, 10, 40])
    tied = fit("percentile", np.array([0.0, 0.0, 1.0, 1.0]), np.array([0.0, 2.0, 6.0, 8.0]), one)
    assert tied(np.array([0.0, 1.0])) == pytest.approx([1.0, 7.0])
    doubled = fit("percentile", np.array([0.0, 1.0]), np.array([0.0, 6.0]), np.array([2.0, 1.0]))
    assert doubled(np.array([0.0, 1.0])) == pytest.approx([0.0, 6.0])


def test_bad_input_is_named():
    with pytest.raises(ConfigError, match="linea.*linear"):
        fit("linea", np.ones(2), np.ones(2), np.ones(2))
    with pytest.raises(ValueError, match="no calibration tokens"):
        fit("linear", np.ones(0), np.ones(0), np.ones(0))
    with pytest.raises(ValueError, match="3 tokens was simulated as 2"):
        window_sums([np.ones(3)], [np.ones(2)], np.ones(1), lambda x: x)


def test_weights():
    assert window_weights(np.array([True, False, False]), 0.1) == pytest.approx([0.1, 0.45, 0.45])
    assert window_weights(np.array([True, False]), None) == pytest.approx([1, 1])
    assert window_weights(np.array([True, True]), 0.1) == pytest.approx([1, 1])


def test_intervals_are_deterministic_and_cover():
    positive, true, generator = draw(n=40, seed=3)
    simulated = [t + generator.normal(0, 0.2, len(t)) for t in true]
    assert metrics(true, simulated, positive) == metrics(true, simulated, positive)
