"""Rows, projection, schedules and starting points against known answers."""

import math

import pytest
import torch

from sae import optim
from sae.config import TrainConfig


def test_rows_become_unit_and_zero_rows_stay() -> None:
    W = torch.tensor([[3.0, 4.0], [0.0, 0.0], [1e-10, 0.0], [1e-30, 0.0]])  # the last one's square underflows
    assert optim.normalise_rows_(W) is W
    torch.testing.assert_close(W, torch.tensor([[0.6, 0.8], [0.0, 0.0], [1.0, 0.0], [1e-30, 0.0]]))


def test_projection_leaves_the_tangent() -> None:
    W = optim.unit_rows(7, 5, 1).double()
    optim.normalise_rows_(W)
    g = torch.randn(7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    before = g.clone()
    optim.project_gradient_(g, W)
    assert float((g * W).sum(1).abs().max()) < 1e-12
    torch.testing.assert_close(before - g, (before * W).sum(1, keepdim=True) * W)
    torch.testing.assert_close(optim.project_gradient_(g.clone(), W), g)


def test_a_projected_step_keeps_the_length_to_second_order() -> None:
    W = optim.unit_rows(3, 4, 2).double()
    optim.normalise_rows_(W)
    g = optim.project_gradient_(torch.ones(3, 4, dtype=torch.float64), W)
    assert float(((W - 1e-4 * g).norm(dim=1) - 1).abs().max()) < 1e-7


@pytest.mark.parametrize(
    ("step", "expected"),
    [(0, 0.25), (1, 0.5), (3, 1.0), (10, 1.0), (15, 5 / 6), (19, 1 / 6)],
)
def test_learning_rate_rises_stays_and_falls(step: int, expected: float) -> None:
    assert optim.lr_factor(step, 20, 4, 0.25) == pytest.approx(expected)


def test_learning_rate_without_warm_up_or_decay() -> None:
    assert [optim.lr_factor(s, 3, 0, 0.0) for s in range(3)] == [1.0] * 3
    found = [optim.lr_factor(s, 10, 20, 1.0) for s in range(10)]  # the run is shorter than its warm-up
    assert all(0 < f <= 1 for f in found)
    assert [optim.lr_factor(0, 1, 20, 0.25), optim.lr_factor(0, 1, 0, 1.0)] == [0.05, 0.5]


def test_ramp() -> None:
    assert [optim.ramp(s, 40, 0.05) for s in range(3)] == [0.5, 1.0, 1.0]
    assert optim.ramp(0, 5, 0.0) == 1.0


def test_adam_has_the_settings_of_the_design() -> None:
    group = optim.adam([torch.nn.Parameter(torch.zeros(2))], TrainConfig(lr=0.5)).param_groups[0]
    assert (group["lr"], group["betas"], group["eps"], group["weight_decay"]) == (0.5, (0.9, 0.999), 6.25e-10, 0)


def test_geometric_median_of_an_equilateral_triangle_and_of_an_outlier() -> None:
    angles = torch.arange(3, dtype=torch.float64) * 2 * math.pi / 3
    triangle = torch.stack([angles.cos(), angles.sin()], 1) + 5
    torch.testing.assert_close(optim.geometric_median(triangle), torch.full((2,), 5.0, dtype=torch.float64))
    line = torch.tensor([[0.0], [1.0], [2.0], [3.0], [1e6]], dtype=torch.float64)
    assert float(optim.geometric_median(line)) == pytest.approx(2.0, abs=1e-3)


def test_geometric_median_beats_its_neighbours() -> None:
    x = torch.randn(200, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).exp()
    median = optim.geometric_median(x)
    cost = lambda m: float((x - m).norm(dim=1).mean())  # noqa: E731
    assert cost(median) < cost(x.mean(0))
    assert all(cost(median) <= cost(median + 0.01 * d) for d in torch.cat([torch.eye(4), -torch.eye(4)]).double())


def test_geometric_median_of_equal_rows_of_one_and_of_none() -> None:
    x = torch.full((5, 3), 2.0)
    torch.testing.assert_close(optim.geometric_median(x), x[0])
    torch.testing.assert_close(optim.geometric_median(x[:1]), x[0])
    with pytest.raises(ValueError, match="at least one row"):
        optim.geometric_median(x[:0])


def test_unit_rows_are_a_function_of_the_seed() -> None:
    a, b, c = optim.unit_rows(8, 4, 1), optim.unit_rows(8, 4, 1), optim.unit_rows(8, 4, 2)
    assert torch.equal(a, b) and not torch.equal(a, c)
    torch.testing.assert_close(a.norm(dim=1), torch.ones(8))
