"""Prompts for steering: stretches of the split `score` on which a latent is silent (AUTOINTERP 5.6). Torch-free.

Longer than the windows of an exemplar table, so they are drawn from the latent cache itself; by document they are as
disjoint from what an explainer was shown as those windows are.
"""

from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from autointerp.negatives import documents_first, verify_silent
from autointerp.records import SCORE, Exemplar
from autointerp.windows import Windows, grid_windows
from sae.manifest import rng

if TYPE_CHECKING:
    from autointerp.latent_cache import LatentCache


def silent_prompts(folder: Path, latent: int, n: int, tokens: int, seed: int = 0) -> list[Exemplar]:
    """At most ``n`` distinct stretches of ``tokens`` tokens of one document each, uniformly, every document once before
    any comes twice; ascending by place.

    ``folder``: that of the latent cache; :class:`~sae.errors.ArtefactError` if it is not there. They depend on (seed,
    SAE, latent, tokens) alone, so that all explanations of a latent are judged on the same ones.
    """
    cache, grid = _opened(folder, tokens)
    active = cache.entries(latent, SCORE).flat_n
    silent = np.ones(len(grid), dtype=bool)
    silent[grid.containing(active)] = False
    candidates = np.flatnonzero(silent)
    order = rng(seed, cache.sae_id, latent, f"silent_prompts/{tokens}").permutation(candidates)
    chosen = np.sort(documents_first(order, grid.doc)[:n])
    verify_silent(grid, chosen, active)
    return [_prompt(cache, grid, int(w), latent) for w in chosen]


def _prompt(cache: "LatentCache", grid: Windows, window: int, latent: int) -> Exemplar:
    start, length, doc = int(grid.start[window]), int(grid.length[window]), int(grid.doc[window])
    row, column = divmod(start, grid.row_tokens)
    split = cache.tokens(SCORE)
    return Exemplar(
        exemplar_id=f"{cache.key[:8]}-{latent}-{SCORE}-prompt-{row}-{column}-{length}", latent=latent, kind="silent",
        split=SCORE, doc_id=f"{SCORE}/{doc}", source=str(split.sources[doc]), row=row, start=column,
        token_ids=tuple(np.asarray(split.tokens_BL).reshape(-1)[start : start + length].tolist()),
        acts=(0.0,) * length,
    )  # fmt: skip


@lru_cache(maxsize=2)
def _opened(folder: Path, tokens: int) -> tuple["LatentCache", Windows]:
    """The cache and its split `score` cut into stretches of ``tokens``, shorter rests dropped; kept for all latents."""
    from autointerp.latent_cache import LatentCache

    cache = LatentCache.open(folder)
    grid = grid_windows(cache.keep(SCORE), cache.doc_of(SCORE), cache.tokens(SCORE).L, tokens, tokens)
    return cache, grid
