"""Resampling of probe groups in blocks: the same numbers as all at once, in a bounded amount of memory."""

import tracemalloc

import numpy as np
import pytest

from evals import probe_units, uncertainty
from evals.probe_units import by_block, group_weights, weighted_auc
from evals.suite.probe_loss import Scored, task_values

LOSSES = ("probe_loss", "probe_loss_post", "floor_random_directions", "dense_loss")


def weights_at_once(units, generator, resamples):
    used = np.unique(np.concatenate(units))
    matrix = np.zeros((resamples + 1, used.max() + 1))
    matrix[0, used] = 1
    matrix[1:, used] = uncertainty.unit_weights(len(used), generator, resamples)
    return matrix


def planted(n, n_units, seed=0):
    draw = np.random.default_rng(seed)
    unit, train_unit = draw.integers(0, n_units, (2, n))
    loss = {name: draw.random(n) for name in LOSSES}
    return Scored(draw.integers(0, 2, n), unit, np.round(draw.normal(size=n), 2), loss, draw.random(n), train_unit, 3)


@pytest.mark.parametrize("numbers", [1, 999, 1 << 19])
def test_blocks_are_the_rows_of_one_draw(monkeypatch, numbers):
    monkeypatch.setattr(probe_units, "BLOCK_NUMBERS", numbers)
    units = [np.array([0, 2, 2, 7]), np.array([7, 40, 41])]
    blocks = list(group_weights(units, np.random.default_rng(3), 60))
    assert all(b.size <= max(numbers, 42) for b in blocks)
    assert np.array_equal(np.concatenate(blocks), weights_at_once(units, np.random.default_rng(3), 60))


def test_values_do_not_depend_on_the_blocks(monkeypatch):
    entries = [planted(120, 30, seed) for seed in (0, 1)]
    units = [u for e in entries for u in (e.unit, e.train_unit)]
    whole = task_values(entries, iter([weights_at_once(units, np.random.default_rng(1), 400)]))
    monkeypatch.setattr(probe_units, "BLOCK_NUMBERS", 30 * 7)
    found = task_values(entries, group_weights(units, np.random.default_rng(1), 400))
    assert found.keys() == whole.keys() and {*LOSSES, "probe_auc", "gain_vs_random"} <= found.keys()
    for name, values in whole.items():
        assert values.shape == (401,)
        assert np.allclose(found[name], values, rtol=0, atol=1e-12), name
    assert np.array_equal(found["probe_auc"], whole["probe_auc"])  # sums of whole and half numbers


def test_an_empty_class_is_nan_in_its_resample_alone():
    unit, label, logit = np.array([0, 1, 2]), np.array([1, 0, 0]), np.array([0.5, 0.1, 0.5])
    blocks = [np.array([[1.0, 1, 1], [0, 2, 1]]), np.array([[2.0, 0, 1]])]
    auc = by_block(blocks, lambda w: {"auc": weighted_auc(logit, label, unit, w)})["auc"]
    assert np.isnan(auc[1]) and auc[[0, 2]].tolist() == [0.75, 0.5]


def test_memory_does_not_grow_with_the_resamples():
    """All weights of a task of 2,000 rows and 2,500 groups at 3,000 resamples are 60 MB, rows and sorted rows as many
    again; 10,000 resamples, as preset paper has them, once took 1 GB."""
    entries = [planted(2_000, 2_500)]
    units = [entries[0].unit, entries[0].train_unit]
    tracemalloc.start()
    try:
        task_values(entries, group_weights(units, np.random.default_rng(0), 3_000))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 40e6, f"{peak / 1e6:.0f} MB"
