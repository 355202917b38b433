"""Numbers that describe a reconstruction or a code, as pure functions (METRICS A). Sums are float64.

Shapes: N tokens, D = d_in, F = d_sae. Everything is in the units of the language model. A value that is not defined
(no token, a constant target) is None, never 0 and never NaN. Streaming sums per document are the evaluations' business.
"""

import torch
from torch import Tensor

from sae.ops import SparseLatents

Tensors = tuple[Tensor, Tensor]


def _float(value: Tensor) -> float | None:
    return float(value) if bool(torch.isfinite(value)) else None


def _ratio(numerator: Tensor, denominator: Tensor) -> float | None:
    return _float(numerator / denominator) if float(denominator) > 0 else None


def fvu(x_ND: Tensor, x_hat_ND: Tensor, mean_D: Tensor | None = None) -> float | None:
    """Fraction of variance unexplained, ``sum |x - x_hat|^2 / sum |x - mean|^2``: one ratio of sums.

    ``mean_D`` is the mean of the whole evaluation set; by default that of ``x_ND``. Gao et al. (arXiv 2406.04093)
    section 2.1; never a mean of ratios per batch (SAEBench #76).
    """
    if len(x_ND) == 0:
        return None
    x, x_hat = x_ND.double(), x_hat_ND.double()
    mean = x.mean(0) if mean_D is None else mean_D.double()
    return _ratio((x - x_hat).square().sum(), (x - mean).square().sum())


def explained_variance(x_ND: Tensor, x_hat_ND: Tensor, mean_D: Tensor | None = None) -> float | None:
    """1 - :func:`fvu`."""
    value = fvu(x_ND, x_hat_ND, mean_D)
    return None if value is None else 1.0 - value


def nmse_zero(x_ND: Tensor, x_hat_ND: Tensor) -> float | None:
    """``mean of |x - x_hat|^2 / |x|^2``: the README of openai/sparse_autoencoder (#8); for old figures only."""
    x, x_hat = x_ND.double(), x_hat_ND.double()
    norms_N = x.square().sum(1)
    if len(x) == 0 or float(norms_N.min()) == 0:
        return None
    return _float(((x - x_hat).square().sum(1) / norms_N).mean())


def cosine(x_ND: Tensor, x_hat_ND: Tensor) -> float | None:
    """Mean cosine of x and x_hat; a token of zero length makes it undefined."""
    x, x_hat = x_ND.double(), x_hat_ND.double()
    norms_N = x.norm(dim=1) * x_hat.norm(dim=1)
    if len(x) == 0 or float(norms_N.min()) == 0:
        return None
    return _float(((x * x_hat).sum(1) / norms_N).mean())


def cosine_centred(x_ND: Tensor, x_hat_ND: Tensor, mean_D: Tensor) -> float | None:
    """Mean cosine of x - mean and x_hat - mean."""
    return cosine(x_ND.double() - mean_D.double(), x_hat_ND.double() - mean_D.double())


def shrinkage(x_ND: Tensor, x_hat_ND: Tensor, mean_D: Tensor) -> float | None:
    """``1 - sum |x_hat - mean|^2 / sum (x_hat - mean).(x - mean)``; x_hat = mean + s (x - mean) gives 1 - s."""
    x, x_hat = x_ND.double() - mean_D.double(), x_hat_ND.double() - mean_D.double()
    along = (x_hat * x).sum()
    return None if len(x_ND) == 0 or float(along) == 0 else _float(1.0 - x_hat.square().sum() / along)


def norm_ratio(x_ND: Tensor, x_hat_ND: Tensor) -> float | None:
    """``sqrt(sum |x_hat|^2 / sum |x|^2)``."""
    value = _ratio(x_hat_ND.double().square().sum(), x_ND.double().square().sum())
    return None if value is None else value**0.5


def bias_norm(x_ND: Tensor, x_hat_ND: Tensor, mean_D: Tensor | None = None) -> float | None:
    """Length of the mean residual, in root mean square distances of x from its mean."""
    if len(x_ND) == 0:
        return None
    x, x_hat = x_ND.double(), x_hat_ND.double()
    mean = x.mean(0) if mean_D is None else mean_D.double()
    return _ratio((x - x_hat).mean(0).norm(), (x - mean).square().sum(1).mean().sqrt())


def l0(latents: SparseLatents | Tensor) -> float | None:
    """Mean number of active latents (value above 0) per token, of slots or of dense codes z_NF."""
    values = latents.values_NK if isinstance(latents, SparseLatents) else latents
    return float((values > 0).sum()) / len(values) if len(values) else None


def active_counts(latents: SparseLatents, d_sae: int) -> Tensor:
    """int64 [F]: tokens on which each latent is active."""
    return torch.bincount(latents.indices_NK[latents.values_NK > 0], minlength=d_sae)


def density(counts_F: Tensor, n_tokens: int) -> Tensor | None:
    """float64 [F]: share of tokens on which each latent is active."""
    return counts_F.double() / n_tokens if n_tokens > 0 else None


def dead_fraction(counts_F: Tensor, n_tokens: int) -> float | None:
    """Share of latents that are active on none of ``n_tokens`` tokens: so their density is below 3 / n at 95 %."""
    return float((counts_F == 0).double().mean()) if n_tokens > 0 and len(counts_F) else None


def dense_fraction(counts_F: Tensor, n_tokens: int, above: float) -> float | None:
    """Share of latents whose density exceeds ``above``."""
    found = density(counts_F, n_tokens)
    return None if found is None or not len(counts_F) else float((found > above).double().mean())
