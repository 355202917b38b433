"""Synthetic activations with planted features (METRICS J): for tests only, never part of a package.

G planted directions, D dimensions, N tokens.
"""

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

if TYPE_CHECKING:
    from evals.truth import Truth


class Planted(NamedTuple):
    x_ND: torch.Tensor
    """Activations, float32."""
    codes_NG: torch.Tensor
    """True, non-negative codes."""
    directions_GD: torch.Tensor
    """Unit rows."""
    bias_D: torch.Tensor


def planted(
    *, n: int = 20_000, d: int = 32, g: int = 64, l0: float = 4.0, sigma: float = 0.01, seed: int = 0
) -> Planted:
    """x = sum_j a_j g_j + b + sigma * noise, a_j = Bernoulli(p_j) * |N(1, 1/4^2)|, p_j proportional to 1/(j + 10)."""
    rng = np.random.default_rng(seed)
    directions = rng.standard_normal((g, d))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    p = 1 / (np.arange(g) + 10)
    p = np.minimum(p * l0 / p.sum(), 1)
    codes = (rng.random((n, g)) < p) * np.abs(rng.normal(1, 0.25, (n, g)))
    bias = rng.standard_normal(d) * 0.1
    x = codes @ directions + bias + sigma * rng.standard_normal((n, d))
    as_tensor = lambda a: torch.tensor(a, dtype=torch.float32)  # noqa: E731
    return Planted(as_tensor(x), as_tensor(codes), as_tensor(directions), as_tensor(bias))


def truth_of(data: Planted, key: str = "planted") -> "Truth":
    """Planted data as the known dictionary that evals.suite.ground_truth reads."""
    from evals.truth import Truth

    return Truth(directions_GD=data.directions_GD, bias_D=data.bias_D, x_ND=data.x_ND, codes_NG=data.codes_NG, key=key)
