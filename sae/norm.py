"""The input norm of an SAE and what undoes it (FORMATS 1). Shapes: N tokens, D = d_in."""

from typing import NamedTuple

import torch
from torch import Tensor

from sae.config import InputNorm


class NormStats(NamedTuple):
    """Per-token constants of the input norm: ``n = (x - mean) / divisor``, ``x_hat = y * scale + mean``."""

    mean_N1: Tensor | None
    """None where nothing is subtracted."""
    scale_N: Tensor
    """Factor from normalised to raw units (for layer_norm the standard deviation, without eps: FORMATS 1)."""


def normalise(x_ND: Tensor, norm: InputNorm) -> tuple[Tensor, NormStats]:
    """Normalised input n_ND and the constants that undo it; kinds and formulas as in FORMATS 1."""
    if norm.kind in ("none", "dataset_rms"):
        scaled_ND = x_ND if norm.kind == "none" else x_ND * norm.scale_in
        undo = 1.0 if norm.kind == "none" else 1.0 / norm.scale_out
        return scaled_ND, NormStats(None, x_ND.new_full((len(x_ND),), undo))
    d_in = x_ND.shape[1]
    centred = norm.kind == "layer_norm" or norm.center
    mean_N1 = x_ND.mean(1, keepdim=True) if centred else None
    c_ND = x_ND if mean_N1 is None else x_ND - mean_N1
    length_N = torch.linalg.vector_norm(c_ND, dim=1)
    if norm.kind == "layer_norm":
        length_N = length_N / (d_in - norm.ddof) ** 0.5
    n_ND = c_ND / (length_N + norm.eps)[:, None]
    if norm.kind == "unit_norm" and norm.target == "sqrt_d":
        return n_ND * d_in**0.5, NormStats(mean_N1, length_N / d_in**0.5)
    return n_ND, NormStats(mean_N1, length_N)
