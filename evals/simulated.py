"""Latents as their patterns say they are: predicted activations, their scale, and codes to decode (METRICS D).

s = predicted and a = true activation of one latent, N tokens, K slots per token, F = d_sae, E (token, latent) entries.
"""

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from evals.n2g_scores import Firing

if TYPE_CHECKING:
    import torch

    from autointerp.latent_cache import LatentCache
    from autointerp.n2g_patterns import PatternSet, TokenIndex
    from sae.base import SparseLatents

Ints = npt.NDArray[np.int64]


class Simulation(NamedTuple):
    """a_hat = scale * s wherever it is not 0, by ascending token, then latent."""

    flat_E: Ints
    latent_E: Ints
    value_E: npt.NDArray[np.float32]


def best_scale(predicted: Firing, active: Firing) -> float:
    """E[s a] / E[s^2] over one set of tokens: the factor that makes scale * s nearest to a; 0 where s is 0."""
    _, i, j = np.intersect1d(predicted.flat_n, active.flat_n, assume_unique=True, return_indices=True)
    squares = float((predicted.value_n**2).sum())
    return float((predicted.value_n[i] * active.value_n[j]).sum()) / squares if squares > 0 else 0.0


def fitted_scales(
    cache: "LatentCache", patterns: "Mapping[int, PatternSet]", index: "TokenIndex", split: str = "explain"
) -> dict[int, float]:
    """Scale of each latent's patterns on the kept tokens of ``split``, whose ``index`` is given."""
    from autointerp.n2g_patterns import predict

    keep_N = np.asarray(cache.keep(split), dtype=bool)
    scales = {}
    for latent in sorted(patterns):
        flat, value = predict(patterns[latent], index, keep_N)
        active = cache.entries(latent, split)
        scales[latent] = best_scale(
            Firing(flat, value.astype(np.float64)),
            Firing(active[0].astype(np.int64), active[1].astype(np.float64)),
        )
    return scales


def simulate(
    patterns: "Mapping[int, PatternSet]", scales: Mapping[int, float], index: "TokenIndex", keep_N: np.ndarray
) -> Simulation:
    """Predicted activations of every latent on the kept tokens of the set that ``index`` indexes."""
    from autointerp.n2g_patterns import predict

    flats, latents, values = [np.zeros(0, np.int64)], [np.zeros(0, np.int32)], [np.zeros(0, np.float32)]
    for latent in sorted(patterns):
        if scales[latent] == 0:
            continue
        flat, value = predict(patterns[latent], index, keep_N)
        flats.append(flat)
        latents.append(np.full(len(flat), latent, dtype=np.int32))
        values.append((value * np.float32(scales[latent])).astype(np.float32))
    flat_E, latent_E, value_E = np.concatenate(flats), np.concatenate(latents), np.concatenate(values)
    order = np.argsort(flat_E, kind="stable")
    return Simulation(flat_E[order], latent_E[order].astype(np.int64), value_E[order])


def codes_at(simulation: Simulation, flat_N: Ints) -> "SparseLatents":
    """Codes [N, K] of the tokens ``flat_N``, padded with empty slots; K = the most latents that any of them has."""
    import torch

    from sae.base import SparseLatents

    low = np.searchsorted(simulation.flat_E, flat_N, side="left")
    counts = np.searchsorted(simulation.flat_E, flat_N, side="right") - low
    width = max(1, int(counts.max(initial=0)))
    values, indices = np.zeros((len(flat_N), width), np.float32), np.zeros((len(flat_N), width), np.int64)
    token = np.repeat(np.arange(len(flat_N)), counts)
    slot = np.arange(len(token)) - np.repeat(np.cumsum(counts) - counts, counts)
    entry = low[token] + slot
    values[token, slot], indices[token, slot] = simulation.value_E[entry], simulation.latent_E[entry]
    return SparseLatents(torch.from_numpy(values), torch.from_numpy(indices))


def without(codes: "SparseLatents", chosen_F: "torch.Tensor") -> "SparseLatents":
    """The same codes with the latents of the mask ``chosen_F`` [F] at 0."""
    # an empty slot may name no latent at all
    gone = chosen_F[codes.indices_NK.long().clamp(0, len(chosen_F) - 1)]
    return type(codes)(codes.values_NK.masked_fill(gone, 0.0), codes.indices_NK)


def joined(first: "SparseLatents", second: "SparseLatents") -> "SparseLatents":
    """Slots of both, side by side."""
    import torch

    return type(first)(
        torch.cat([first.values_NK, second.values_NK.to(first.values_NK)], dim=1),
        torch.cat([first.indices_NK, second.indices_NK.to(first.indices_NK)], dim=1),
    )


def mask_of(latents: Collection[int], d_sae: int) -> "torch.Tensor":
    """bool [F]: True at ``latents``."""
    import torch

    mask = torch.zeros(d_sae, dtype=torch.bool)
    mask[torch.tensor(sorted(latents), dtype=torch.long)] = True
    return mask
