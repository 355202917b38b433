"""Progressive codes: how good an SAE is with fewer or more active latents than it was trained for (TRAINING 12).

Same weights, k' = 1, 2, 4, ... up to 4 K, once as TopK(k') and once with the threshold whose mean L0 is k' (Gao et al.,
arXiv 2406.04093, section 5.3). Shapes: N tokens, D = d_in, F = d_sae.
"""

from typing import NamedTuple

import numpy as np
import torch

from sae import calibrate, ops
from sae.base import SAE, TokenSource
from sae.errors import ConfigError, DataError, Unsupported

CHUNK_NUMBERS = 2**24
"""Pre-activations held at once."""


class Point(NamedTuple):
    """One code."""

    k: int
    code: str
    """topk or threshold."""
    fvu: float
    """Fraction of variance unexplained, raw units."""
    l0: float
    """Mean active latents: with topk fewer than k where pre-activations are negative."""
    threshold: float | None
    """Of the code threshold."""


def default_ks(sae: SAE) -> list[int]:
    """1, 2, 4, ... up to 4 K, with K and 4 K themselves; ``ConfigError`` where the SAE has no K."""
    if sae.cfg.k is None:
        raise ConfigError(f"{sae.sae_id} has no k of its own; say which k' to measure")
    top = min(4 * sae.cfg.k, sae.d_sae)
    powers = [2**i for i in range(top.bit_length()) if 2**i <= top]
    return sorted({*powers, min(sae.cfg.k, top), top})


@torch.no_grad()
def measure(sae: SAE, source: TokenSource, ks: list[int] | None = None, *, tokens: int = 8_192) -> list[Point]:
    """FVU and L0 of both codes for every k', on evenly spread kept tokens; thresholds are counted on the same tokens.

    ``Unsupported`` for architectures whose values are not their pre-activations (gated) and for transcoders;
    ``ConfigError`` for k' outside 1..F; ``DataError`` for no token or no variance.
    """
    if sae.transcodes or sae.activation == "gated":
        raise Unsupported(f"{sae.sae_id} ({sae.cfg.architecture}): progressive codes need values that are relu(h)")
    ks = default_ks(sae) if ks is None else sorted(set(ks))
    if not ks or not 1 <= ks[0] <= ks[-1] <= sae.d_sae:
        raise ConfigError(f"{sae.sae_id}: k' must lie in 1..{sae.d_sae}, got {ks}")
    kept = np.asarray(source.kept_N)
    if len(kept) == 0:
        raise DataError(f"{sae.sae_id}: progressive codes need at least one token")
    flat = kept[np.linspace(0, len(kept) - 1, min(tokens, len(kept))).astype(np.int64)]
    thresholds = [calibrate.threshold_for(sae, source, flat, k) for k in ks]
    errors = np.zeros((2, len(ks)))
    active = np.zeros((2, len(ks)))
    square, total_D = 0.0, torch.zeros(sae.d_in, dtype=torch.float64)
    chunk = max(1, CHUNK_NUMBERS // sae.d_sae)
    for start in range(0, len(flat), chunk):
        x_ND = source.read(flat[start : start + chunk]).to(sae.W_dec_FD.device)
        square += float(x_ND.double().square().sum())
        total_D += x_ND.double().sum(0).cpu()
        h_NF = sae.pre_activations(x_ND)
        top = torch.topk(h_NF, ks[-1], dim=1)
        for i, (k, threshold) in enumerate(zip(ks, thresholds, strict=True)):
            topk = ops.SparseLatents(top.values[:, :k].relu().contiguous(), top.indices[:, :k].contiguous())
            dense_NF = torch.where(h_NF > threshold, h_NF, 0.0)
            active[:, i] += float((topk.values_NK > 0).sum()), float((dense_NF > 0).sum())
            for row, x_hat_ND in enumerate((sae.decode(topk, x_ND), sae.decode(dense_NF, x_ND))):
                errors[row, i] += float((x_ND.double() - x_hat_ND.double()).square().sum())
    variance = square - float(total_D.square().sum()) / len(flat)
    if not variance > 0:
        raise DataError(f"{sae.sae_id}: the tokens have no variance")
    return [
        Point(k, code, errors[row, i] / variance, active[row, i] / len(flat), thresholds[i] if row else None)
        for row, code in enumerate(("topk", "threshold"))
        for i, k in enumerate(ks)
    ]
