"""Best activations for the latents that an encoder chose: how much of the error is shrinkage (TRAINING 12).

The support S of each token comes from the encoder, the decoder stays; minimise ``|t - b_dec - sum_{f in S} a_f w_f|^2``
over a >= 0 (Gao et al., arXiv 2406.04093, section 5.1, who use projected gradient descent). Shapes: N tokens, D
channels, K slots. Everything is in float64.

The design asks for projected FISTA, stopped at a relative change of 1e-6. Non-negative least squares of K variables has
an exact finite method instead, block principal pivoting (Kim and Park, SIAM J. Sci. Comput. 33(6), 2011), which takes a
few solves of K x K systems and is batched over tokens; FISTA serves the tokens for which it does not end.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sae.base import SAE, TokenSource
from sae.errors import DataError, Unsupported
from sae.ops import SparseLatents

GATHERED_NUMBERS = 2**23
"""Numbers of decoder rows gathered at once; fixes the tokens per chunk."""
TOLERANCE = 1e-10
"""Relative size below which a value or a gradient counts as 0."""
FISTA_STEPS = 2_000
FISTA_CHANGE = 1e-9
BACKUP_TRIES = 3
"""Full exchanges without progress before one variable at a time is exchanged (the paper's value)."""


class Refinement(NamedTuple):
    """What better activations are worth."""

    fvu_before: float
    """Fraction of variance unexplained in raw units with the encoder's activations,"""
    fvu_after: float
    """and with the best ones."""
    shrinkage: float
    """``mean (a - z) / mean z`` over active latents: above 0 where the encoder's values are too small."""
    l0_before: float
    l0_after: float
    """Mean active latents: a best activation may be 0."""
    tokens: int


# -- the solver -------------------------------------------------------------------------------------------------------
def nonnegative(gram_NKK: Tensor, b_NK: Tensor, allowed_NK: Tensor, start_NK: Tensor) -> Tensor:
    """``argmin a' G a / 2 - b' a`` over a >= 0 with a = 0 outside ``allowed_NK``, for each of N positive semi-definite
    G; float64. Where several a are best (equal decoder rows), one of them. Never worse than ``start_NK``."""
    a_NK, solved_N = _pivot(gram_NKK, b_NK, allowed_NK)
    if not bool(solved_N.all()):
        rest = ~solved_N
        a_NK[rest] = _fista(gram_NKK[rest], b_NK[rest], allowed_NK[rest], start_NK[rest])
    start_NK = start_NK.clamp_min(0) * allowed_NK
    worse_N = _objective(gram_NKK, b_NK, a_NK) > _objective(gram_NKK, b_NK, start_NK)
    return torch.where(worse_N[:, None], start_NK, a_NK)


def _objective(gram_NKK: Tensor, b_NK: Tensor, a_NK: Tensor) -> Tensor:
    return (a_NK * (0.5 * torch.einsum("nkj,nj->nk", gram_NKK, a_NK) - b_NK)).sum(1)


def _solve(gram_NKK: Tensor, b_NK: Tensor, passive_NK: Tensor) -> Tensor:
    """Least squares on the passive variables, 0 elsewhere; NaN where their Gram is singular."""
    both = passive_NK[:, :, None] & passive_NK[:, None, :]
    eye = torch.eye(gram_NKK.shape[1], dtype=gram_NKK.dtype, device=gram_NKK.device)
    factor, info = torch.linalg.cholesky_ex(torch.where(both, gram_NKK, eye))
    a_NK = torch.cholesky_solve((b_NK * passive_NK)[..., None], factor)[..., 0]
    return torch.where((info == 0)[:, None], a_NK, torch.nan)


def _pivot(gram_NKK: Tensor, b_NK: Tensor, allowed_NK: Tensor) -> tuple[Tensor, Tensor]:
    """(a_NK, solved_N) by block principal pivoting, from all allowed variables passive."""
    n, k = b_NK.shape
    passive = allowed_NK.clone()
    tries = torch.full((n,), BACKUP_TRIES, device=b_NK.device)
    least = torch.full((n,), k + 1, device=b_NK.device)
    position = torch.arange(k, device=b_NK.device)
    a_NK, solved = torch.zeros_like(b_NK), torch.zeros(n, dtype=torch.bool, device=b_NK.device)
    small_N = TOLERANCE * b_NK.abs().amax(1).clamp_min(torch.finfo(b_NK.dtype).tiny)
    for _ in range(4 * k + 4):
        open_n = (~solved).nonzero().flatten()
        if len(open_n) == 0:
            break
        gram, b, mine, allowed = gram_NKK[open_n], b_NK[open_n], passive[open_n], allowed_NK[open_n]
        value = _solve(gram, b, mine)
        slope = torch.einsum("nkj,nj->nk", gram, value) - b
        broken = ((value < 0) & mine) | ((slope < -small_N[open_n, None]) & ~mine & allowed)
        broken |= value.isnan() & mine  # a singular Gram: exchanged one by one below, until it is regular
        count = broken.sum(1)
        done = (count == 0) & ~value.isnan().any(1)
        a_NK[open_n[done]], solved[open_n[done]] = value[done], True
        better = count < least[open_n]
        full = better | (tries[open_n] >= 1)
        full &= ~value.isnan().any(1)
        tries[open_n] = torch.where(better, BACKUP_TRIES, tries[open_n] - 1)
        least[open_n] = torch.minimum(least[open_n], count)
        last = torch.where(broken, position, -1).amax(1)
        single = position[None, :] == last[:, None]
        passive[open_n] = mine ^ torch.where(full[:, None], broken, single)
    return a_NK, solved


def _fista(gram_NKK: Tensor, b_NK: Tensor, allowed_NK: Tensor, start_NK: Tensor) -> Tensor:
    """Projected gradient steps with momentum that restarts where it leads uphill."""
    step_N1 = 1.0 / torch.linalg.eigvalsh(gram_NKK)[:, -1:].clamp_min(1e-30)
    a_NK = start_NK.clamp_min(0) * allowed_NK
    ahead_NK, t_N1 = a_NK, torch.ones_like(step_N1)
    for _ in range(FISTA_STEPS):
        slope = torch.einsum("nkj,nj->nk", gram_NKK, ahead_NK) - b_NK
        new = (ahead_NK - step_N1 * slope).clamp_min(0) * allowed_NK
        uphill_N1 = ((ahead_NK - new) * (new - a_NK)).sum(1, keepdim=True) > 0
        t_N1 = torch.where(uphill_N1, 1.0, t_N1)
        t_new = (1 + (1 + 4 * t_N1**2).sqrt()) / 2
        ahead_NK = new + (t_N1 - 1) / t_new * (new - a_NK)
        change = float((new - a_NK).abs().max() / new.abs().max().clamp_min(1e-30))
        a_NK, t_N1 = new, t_new
        if change <= FISTA_CHANGE:
            break
    return a_NK


# -- an SAE's activations --------------------------------------------------------------------------------------------
@torch.no_grad()
def refine(sae: SAE, x_ND: Tensor) -> SparseLatents:
    """The encoder's latents of raw x with the best activations, float32, in the encoder's slots.

    ``Unsupported`` for transcoders, whose target is another activation than their input.
    """
    if sae.transcodes:
        raise Unsupported(f"{sae.sae_id} is a transcoder: refinement needs its target; only autoencoders are refined")
    n_ND, _ = sae.normalise(x_ND)
    latents = sae.encode_sparse(x_ND)
    width = latents.values_NK.shape[1]
    chunk = max(1, GATHERED_NUMBERS // max(1, width * (sae.d_in + width)))
    refined = [
        _refine_chunk(sae, n_ND[i : i + chunk], SparseLatents(*(part[i : i + chunk] for part in latents)))
        for i in range(0, len(n_ND), chunk)
    ]
    values_NK = torch.cat(refined) if refined else latents.values_NK
    return SparseLatents(values_NK.to(latents.values_NK.dtype), latents.indices_NK)


def _refine_chunk(sae: SAE, n_ND: Tensor, latents: SparseLatents) -> Tensor:
    rows_NKD = sae.W_dec_FD.double()[latents.indices_NK.long()]
    residual_ND = n_ND.double() - sae.b_dec_D.double()
    gram_NKK = rows_NKD @ rows_NKD.transpose(1, 2)
    b_NK = torch.einsum("nkd,nd->nk", rows_NKD, residual_ND)
    start_NK = latents.values_NK.double()
    return nonnegative(gram_NKK, b_NK, start_NK > 0, start_NK)


@torch.no_grad()
def measure(sae: SAE, source: TokenSource, *, tokens: int = 8_192, chunk: int = 2_048) -> Refinement:
    """Refine evenly spread kept tokens of ``source`` and compare; ``DataError`` for no token or no variance."""
    kept = np.asarray(source.kept_N)
    if len(kept) == 0:
        raise DataError(f"{sae.sae_id}: refinement needs at least one token")
    flat = kept[np.linspace(0, len(kept) - 1, min(tokens, len(kept))).astype(np.int64)]
    sums = dict.fromkeys(("before", "after", "square", "z", "a", "n_z", "n_a"), 0.0)
    total_D = torch.zeros(sae.d_in, dtype=torch.float64)
    for start in range(0, len(flat), chunk):
        x_ND = source.read(flat[start : start + chunk]).to(sae.W_dec_FD.device)
        before, after = sae.encode_sparse(x_ND), refine(sae, x_ND)
        for name, codes in (("before", before), ("after", after)):
            sums[name] += float((x_ND.double() - sae.decode(codes, x_ND).double()).square().sum())
        sums["square"] += float(x_ND.double().square().sum())
        total_D += x_ND.double().sum(0).cpu()
        for letter, codes in (("z", before), ("a", after)):
            sums[letter] += float(codes.values_NK.double().sum())
            sums[f"n_{letter}"] += float((codes.values_NK > 0).sum())
    variance = sums["square"] - float(total_D.square().sum()) / len(flat)
    if not variance > 0 or not sums["z"] > 0:
        raise DataError(f"{sae.sae_id}: the tokens have no variance, or no latent is active on them")
    return Refinement(
        sums["before"] / variance, sums["after"] / variance, (sums["a"] - sums["z"]) / sums["z"],
        sums["n_z"] / len(flat), sums["n_a"] / len(flat), len(flat),
    )  # fmt: skip
