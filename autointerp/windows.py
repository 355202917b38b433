"""Grid windows: one fixed cut of a token set, made before anybody looks at an activation (AUTOINTERP 2).

N flat tokens (n = row * L + position), W tokens per window. Because the grid ignores activations, positive and
negative windows come from one population, on which the firing rate pi is defined.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sae.errors import ConfigError

Ints = NDArray[np.int64]


class Runs(NamedTuple):
    """Maximal stretches of kept tokens of one document within one row."""

    start: Ints
    """Flat index of the first token."""
    length: Ints
    """Tokens."""


def find_runs(keep_N: NDArray[np.bool_], doc_of_N: NDArray[np.int32], row_tokens: int) -> Runs:
    """Cut at every dropped token, document border and row border, so that nothing later can cross one.

    The row prefix and separators are dropped tokens, hence no window ever holds one.
    """
    keep = np.asarray(keep_N, dtype=bool)
    doc = np.asarray(doc_of_N)
    if keep.shape != doc.shape or keep.ndim != 1 or row_tokens < 1 or keep.size % row_tokens:
        raise ConfigError(
            f"keep {keep.shape} and doc {doc.shape} must be flat, equal and hold whole rows of {row_tokens} tokens"
        )
    opens = np.ones(keep.size, dtype=bool)
    opens[1:] = ~keep[:-1] | (doc[1:] != doc[:-1])
    opens[::row_tokens] = True
    opens &= keep
    run_of = np.cumsum(opens) - 1
    start = np.flatnonzero(opens).astype(np.int64)
    length = np.bincount(run_of[keep], minlength=start.size).astype(np.int64)
    return Runs(start, length)


@dataclass(frozen=True)
class Windows:
    """All grid windows of one split, ascending by start."""

    start: Ints
    """Flat index of the first token, [n]."""
    length: Ints
    """Tokens, [n]; W except for the last window of a run."""
    doc: NDArray[np.int32]
    """Document index, [n]."""
    row_tokens: int
    """L."""
    n_flat: int
    """N = B * L."""

    def __len__(self) -> int:
        return int(self.start.size)

    @cached_property
    def of_flat(self) -> NDArray[np.int32]:
        """Window of each flat token, [N]; -1 where a token lies in none."""
        out = np.full(self.n_flat, -1, dtype=np.int32)
        out[self.token_positions] = np.repeat(np.arange(len(self), dtype=np.int32), self.length)
        return out

    @cached_property
    def token_positions(self) -> Ints:
        """Flat index of every token of every window, window after window."""
        return expand(self.start, self.length)

    @cached_property
    def ptr(self) -> Ints:
        """Offsets of the windows in ``token_positions``, [n + 1]."""
        return np.concatenate([[0], np.cumsum(self.length)]).astype(np.int64)

    def positions(self, window: int) -> Ints:
        """Flat indices of one window's tokens."""
        return np.arange(self.start[window], self.start[window] + self.length[window], dtype=np.int64)

    def containing(self, flat_n: NDArray[np.integer]) -> Ints:
        """Ascending distinct windows that hold any of the flat tokens."""
        found = np.unique(self.of_flat[np.asarray(flat_n, dtype=np.int64)])
        return found[found >= 0].astype(np.int64)

    def holding_tokens(self, tokens_N: NDArray[np.integer], token_ids: Iterable[int]) -> Ints:
        """Ascending windows that hold any of the token ids."""
        wanted = np.fromiter(token_ids, dtype=np.int64)
        hit = np.isin(tokens_N[self.token_positions], wanted)
        return np.unique(self.of_flat[self.token_positions[hit]]).astype(np.int64)


def expand(start: Ints, length: Ints) -> Ints:
    """``concatenate([arange(s, s + n) for s, n in zip(start, length)])`` without the loop."""
    total = int(length.sum())
    before = np.cumsum(length) - length
    return np.arange(total, dtype=np.int64) - np.repeat(before - start, length)


def grid_windows(
    keep_N: NDArray[np.bool_],
    doc_of_N: NDArray[np.int32],
    row_tokens: int,
    window_tokens: int = 32,
    min_window_tokens: int = 8,
) -> Windows:
    """Cut each run into windows of W tokens; a remainder shorter than ``min_window_tokens`` is left out."""
    if not 1 <= min_window_tokens <= window_tokens:
        raise ConfigError(f"min_window_tokens must lie in 1..{window_tokens}, got {min_window_tokens}")
    runs = find_runs(keep_N, doc_of_N, row_tokens)
    full, rest = np.divmod(runs.length, window_tokens)
    n_windows = full + (rest >= min_window_tokens)
    ordinal = expand(np.zeros_like(n_windows), n_windows)
    run_start = np.repeat(runs.start, n_windows)
    run_length = np.repeat(runs.length, n_windows)
    start = run_start + ordinal * window_tokens
    length = np.minimum(window_tokens, run_start + run_length - start)
    doc = np.asarray(doc_of_N)[start].astype(np.int32)
    return Windows(start, length, doc, row_tokens, int(np.asarray(keep_N).size))


def entry_bounds(
    flat_e: NDArray[np.integer], start: int | Ints, length: int | Ints
) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """(first, one past last) place in a latent's ascending flat indices of those inside each window; equal: none is."""
    return np.searchsorted(flat_e, start), np.searchsorted(flat_e, start + length)


def run_bounds(runs: Runs, flat_n: Ints) -> tuple[Ints, Ints]:
    """(first, one past last) flat index of the run around each flat token; the token must lie in a run."""
    at = np.searchsorted(runs.start, flat_n, side="right") - 1
    return runs.start[at], runs.start[at] + runs.length[at]


def peak_placed(
    runs: Runs, peak_n: Ints, left_tokens: int, window_tokens: int
) -> tuple[Ints, Ints]:
    """(start, length) of the explainer's window around each peak: up to ``left_tokens`` before it, the rest of W after.

    Inside the run, never refilled on the other side: the peak stands at min(left_tokens, distance to the run's start).
    """
    first, end = run_bounds(runs, peak_n)
    start = np.maximum(first, peak_n - left_tokens)
    stop = np.minimum(end, peak_n + window_tokens - left_tokens)
    return start, stop - start
