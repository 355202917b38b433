"""Silent windows: verified to hold no activation of the latent, and sorted into strata (AUTOINTERP 2).

A window's stratum is the first of same_token, co_occurring, decoder_near, rest that it satisfies. Hard negatives are
drawn uniformly inside their own stratum, so pooled with the uniform draw they are an unbiased sample of each stratum,
whose share of the population is known exactly.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from autointerp.windows import Windows, entry_bounds

STRATA = ("same_token", "co_occurring", "decoder_near", "rest")
HARD_KINDS = STRATA[:3]
SAME_TOKEN_TOP = 10
"""How many of a latent's top tokens make a window same_token."""

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Silent:
    """The silent windows of one latent on one split."""

    windows: Ints
    """Ascending."""
    stratum: NDArray[np.int8]
    """Index into STRATA, per silent window."""
    neighbour: Ints
    """Latent that put the window into co_occurring or decoder_near; -1 elsewhere."""

    def share(self, stratum: int) -> float:
        """Population share of a stratum among the silent windows."""
        return float((self.stratum == stratum).mean()) if self.windows.size else 0.0


def find_silent(
    n_windows: int,
    positive: Ints,
    allowed: NDArray[np.bool_],
    same_token: Ints,
    neighbours: Mapping[str, Sequence[tuple[int, Ints]]],
) -> Silent:
    """Strata of all silent windows.

    ``positive``: windows where the latent is active; ``allowed``: windows that may be drawn at all; ``same_token``:
    windows holding one of its top tokens; ``neighbours``: for co_occurring and decoder_near the (latent, its positive
    windows) in order of nearness, the first that fits is named.
    """
    silent = allowed.copy()
    silent[positive] = False
    stratum = np.full(n_windows, STRATA.index("rest"), dtype=np.int8)
    neighbour = np.full(n_windows, -1, dtype=np.int64)
    # Written from the last stratum to the first, and from the farthest neighbour to the nearest: the first one wins.
    for name in reversed(HARD_KINDS[1:]):
        for latent, windows in reversed(neighbours.get(name, ())):
            stratum[windows] = STRATA.index(name)
            neighbour[windows] = latent
    stratum[same_token] = STRATA.index("same_token")
    neighbour[same_token] = -1
    windows = np.flatnonzero(silent)
    return Silent(windows, stratum[windows], neighbour[windows])


def draw(
    candidates: Ints, n: int, generator: np.random.Generator, *, doc_of: NDArray[np.int32] | None = None
) -> Ints:
    """At most ``n`` of ``candidates``, uniformly without replacement, as positions in ``candidates``.

    With ``doc_of`` (document per candidate) each document comes once before any comes twice.
    """
    order = generator.permutation(candidates.size)
    if doc_of is not None:
        order = documents_first(order, doc_of)
    return order[:n]


def documents_first(order: Ints, doc_of: NDArray[np.int32]) -> Ints:
    """Reorder: the first item of each document in the given order, then the others, both in the given order."""
    _, first = np.unique(doc_of[order], return_index=True)
    leading = np.zeros(order.size, dtype=bool)
    leading[first] = True
    return np.concatenate([order[leading], order[~leading]])


def verify_silent(windows: Windows, chosen: Ints, active_flat: NDArray[np.uint32]) -> None:
    """Binary search in the latent's sorted positions: no drawn window may hold one of them."""
    low, high = entry_bounds(active_flat, windows.start[chosen], windows.length[chosen])
    if np.any(low != high):
        wrong = chosen[low != high].tolist()
        raise AssertionError(f"windows {wrong} were drawn as silent but hold activations: the window index is wrong")
