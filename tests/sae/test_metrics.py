"""Known answers and edge cases of the metric functions (METRICS A)."""

import math

import pytest
import torch
from torch import Tensor

from sae import metrics
from sae.ops import SparseLatents


def data(n: int = 50, d: int = 6, seed: int = 0) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed)) + 3.0


def test_fvu_known_answers() -> None:
    x = data()
    mean = x.mean(0)
    assert metrics.fvu(x, x) == 0.0
    assert metrics.fvu(x, mean.expand_as(x)) == pytest.approx(1.0, rel=1e-6)
    for s in (0.0, 0.5, 0.9):  # x_hat = mean + s (x - mean)
        assert metrics.fvu(x, mean + s * (x - mean)) == pytest.approx((1 - s) ** 2, rel=1e-5)
        assert metrics.explained_variance(x, mean + s * (x - mean)) == pytest.approx(1 - (1 - s) ** 2, rel=1e-5)
    assert metrics.fvu(x, 2 * mean - x) == pytest.approx(4.0, rel=1e-5)


def test_fvu_is_one_ratio_of_sums_with_a_given_mean() -> None:
    x, x_hat, mean = torch.tensor([[1.0], [3.0]]), torch.tensor([[1.0], [2.0]]), torch.tensor([0.0])
    assert metrics.fvu(x, x_hat, mean) == pytest.approx(1 / 10)
    assert metrics.fvu(x, x_hat) == pytest.approx(1 / 2)


def test_fvu_survives_a_large_common_offset() -> None:
    x = (data().double() + 1e6).float()
    noise = torch.zeros_like(x)
    noise[0, 0] = 1.0
    expected = 1.0 / float((x.double() - x.double().mean(0)).square().sum())
    assert metrics.fvu(x, x + noise) == pytest.approx(expected, rel=1e-6)


def test_nmse_zero_and_norm_ratio() -> None:
    x = torch.tensor([[3.0, 4.0], [1.0, 0.0]])
    x_hat = torch.tensor([[3.0, 0.0], [0.0, 0.0]])
    assert metrics.nmse_zero(x, x_hat) == pytest.approx((16 / 25 + 1) / 2)
    assert metrics.norm_ratio(x, x_hat) == pytest.approx((9 / 26) ** 0.5)
    assert metrics.norm_ratio(x, 2 * x) == pytest.approx(2.0)


def test_cosines() -> None:
    x = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    assert metrics.cosine(x, 5 * x) == pytest.approx(1.0)
    assert metrics.cosine(x, torch.tensor([[0.0, 1.0], [0.0, 1.0]])) == pytest.approx(0.5)
    assert metrics.cosine(x, -x) == pytest.approx(-1.0)
    mean = torch.tensor([10.0, 10.0])
    assert metrics.cosine_centred(x + mean, 3 * x + mean, mean) == pytest.approx(1.0)


def test_shrinkage_gives_back_the_factor() -> None:
    x = data()
    mean = x.mean(0)
    for s in (0.25, 0.8, 1.0, 1.5):
        assert metrics.shrinkage(x, mean + s * (x - mean), mean) == pytest.approx(1 - s, abs=1e-5)


def test_bias_norm() -> None:
    x = data()
    rms = float((x - x.mean(0)).square().sum(1).mean().sqrt())
    assert metrics.bias_norm(x, x) == 0.0
    shift = torch.tensor([3.0, 4.0, 0.0, 0.0, 0.0, 0.0])
    assert metrics.bias_norm(x, x + shift) == pytest.approx(5 / rms, rel=1e-5)
    alternating = torch.where(torch.arange(50)[:, None] % 2 == 0, 1.0, -1.0)
    assert metrics.bias_norm(x, x + alternating) == pytest.approx(0.0, abs=1e-6)


def test_l0_density_dead_and_dense() -> None:
    latents = SparseLatents(
        torch.tensor([[1.0, 0.0], [2.0, 0.5], [3.0, 0.0], [1.0, 0.0]]), torch.tensor([[0, 3], [0, 1], [0, 3], [0, 3]])
    )
    assert metrics.l0(latents) == 5 / 4
    assert metrics.l0(torch.tensor([[1.0, 0.0, -2.0], [0.0, 0.0, 0.0]])) == 0.5
    counts = metrics.active_counts(latents, 4)
    assert counts.tolist() == [4, 1, 0, 0], "latent 0 is always on; a slot of value 0 counts for nothing"
    found = metrics.density(counts, 4)
    assert found is not None and found.tolist() == [1.0, 0.25, 0.0, 0.0] and found.dtype == torch.float64
    assert metrics.dead_fraction(counts, 4) == 0.5
    assert metrics.dense_fraction(counts, 4, 0.25) == 0.25 and metrics.dense_fraction(counts, 4, 0.2) == 0.5


def test_what_is_not_defined_is_none() -> None:
    none, one, constant = torch.zeros(0, 3), torch.ones(1, 3), torch.full((4, 3), 2.0)
    mean = torch.zeros(3)
    assert metrics.fvu(none, none) is None and metrics.explained_variance(none, none) is None
    assert metrics.fvu(one, one + 1) is None, "one token has no variance"
    assert metrics.fvu(constant, constant + 1) is None
    assert metrics.nmse_zero(none, none) is None and metrics.nmse_zero(0 * one, one) is None
    assert metrics.cosine(none, none) is None and metrics.cosine(one, 0 * one) is None
    assert metrics.cosine_centred(constant, constant, constant[0]) is None
    assert metrics.shrinkage(none, none, mean) is None and metrics.shrinkage(one, 0 * one, mean) is None
    assert metrics.norm_ratio(none, none) is None and metrics.norm_ratio(0 * one, one) is None
    assert metrics.bias_norm(none, none) is None and metrics.bias_norm(constant, constant) is None
    empty = SparseLatents(torch.zeros(0, 2), torch.zeros(0, 2, dtype=torch.int64))
    assert metrics.l0(empty) is None and metrics.active_counts(empty, 3).tolist() == [0, 0, 0]
    counts = torch.zeros(3, dtype=torch.int64)
    assert metrics.density(counts, 0) is None and metrics.dead_fraction(counts, 0) is None
    assert metrics.dead_fraction(counts[:0], 5) is None and metrics.dense_fraction(counts[:0], 5, 0.1) is None


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_numbers_that_are_not_finite_never_leave(bad: float) -> None:
    x = data()
    broken = x.clone()
    broken[3, 2] = bad
    mean = x.mean(0)
    for value in (
        metrics.fvu(x, broken), metrics.fvu(broken, x), metrics.nmse_zero(x, broken), metrics.cosine(x, broken),
        metrics.shrinkage(x, broken, mean), metrics.norm_ratio(x, broken), metrics.norm_ratio(broken, x),
        metrics.bias_norm(x, broken), metrics.explained_variance(x, broken),
    ):  # fmt: skip
        assert value is None or math.isfinite(value)
