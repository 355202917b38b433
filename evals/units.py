"""Sums per resampling unit, and which rows and tokens of a store an evaluation reads.

N tokens of a block, B rows, L tokens per row, D = d_in, U units (documents), S named sums.

The details table of an evaluation has one row per unit: a column `unit`, and for each metric that is a ratio of sums
the columns `<metric>.num` and `<metric>.den`. From these `evals.compare` computes paired differences of two subjects.
"""

import hashlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from sae.console import progress
from sae.manifest import rng

if TYPE_CHECKING:
    import pandas as pd
    import torch

    from evals.base import EvalContext
    from sae.activations import ActivationStore

BLOCK_TOKENS = 8_192
Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


class UnitSums:
    """Float64 sums per unit, filled in any order and in any block size."""

    def __init__(self) -> None:
        self._index: dict[int, int] = {}
        self._sums: dict[str, Floats] = {}

    def add(self, unit_N: npt.ArrayLike, values: Mapping[str, npt.ArrayLike]) -> None:
        """Add per-item values [N] to their units; a name seen for the first time starts at 0."""
        names, inverse = np.unique(np.asarray(unit_N, dtype=np.int64), return_inverse=True)
        slots = np.array([self._index.setdefault(int(u), len(self._index)) for u in names], dtype=np.int64)
        for name, item in values.items():
            total = self._grown(name)
            total[slots] += np.bincount(inverse, weights=np.asarray(item, dtype=np.float64), minlength=len(names))

    def _grown(self, name: str) -> Floats:
        old = self._sums.get(name, np.zeros(0))
        if len(old) < len(self._index):
            old = np.concatenate([old, np.zeros(len(self._index) - len(old))])
            self._sums[name] = old
        return old

    @property
    def units(self) -> Ints:
        """Unit numbers in rising order; all arrays handed out follow it."""
        return np.array(sorted(self._index), dtype=np.int64)

    def get(self, name: str) -> Floats:
        """Sums [U] of one name; 0 for units that never met it."""
        order = [self._index[int(u)] for u in self.units]
        return self._grown(name)[order] if name in self._sums else np.zeros(len(order))

    def stack(self, *names: str) -> Floats:
        """[U, S] in the order of ``names``."""
        return np.stack([self.get(name) for name in names], axis=1)

    def total(self, name: str) -> float:
        return float(self.get(name).sum())


class UnitVectors:
    """Float64 vector sums per unit, in the same manner."""

    def __init__(self, width: int) -> None:
        self._index: dict[int, int] = {}
        self._sums: Floats = np.zeros((0, width))

    def add(self, unit_N: npt.ArrayLike, vectors_ND: npt.ArrayLike) -> None:
        vectors = np.asarray(vectors_ND, dtype=np.float64)
        names, inverse = np.unique(np.asarray(unit_N, dtype=np.int64), return_inverse=True)
        slots = np.array([self._index.setdefault(int(u), len(self._index)) for u in names], dtype=np.int64)
        missing = len(self._index) - len(self._sums)
        if missing:
            self._sums = np.concatenate([self._sums, np.zeros((missing, self._sums.shape[1]))])
        order = np.argsort(inverse, kind="stable")
        starts = np.searchsorted(inverse[order], np.arange(len(names)))
        self._sums[slots] += np.add.reduceat(vectors[order], starts, axis=0)

    def get(self) -> Floats:
        """[U, D], units in rising order."""
        return self._sums[[self._index[u] for u in sorted(self._index)]]


def ratio_table(units: npt.ArrayLike, ratios: Mapping[str, tuple[Floats, Floats]]) -> "pd.DataFrame":
    """The details table: `unit`, and numerator and denominator of each metric."""
    import pandas as pd

    columns: dict[str, Any] = {"unit": np.asarray(units, dtype=np.int64)}
    for metric, (num, den) in ratios.items():
        columns[f"{metric}.num"], columns[f"{metric}.den"] = num, den
    return pd.DataFrame(columns)


def choose_rows(store: "ActivationStore", n_rows: int, seed: int, purpose: str) -> Ints:
    """``n_rows`` rows of the store (all, if it has fewer), in rising order; the same for every subject."""
    available = store.n_tokens // store.tokens.L
    if n_rows >= available:
        return np.arange(available, dtype=np.int64)
    return np.sort(rng(seed, purpose, "rows").permutation(available)[:n_rows]).astype(np.int64)


class Block(NamedTuple):
    """Consecutive part of the chosen rows."""

    rows_B: Ints
    x_BLD: "torch.Tensor"
    """float32."""
    flat_BL: Ints
    """Flat index into the store."""
    keep_BL: npt.NDArray[np.bool_]
    """Passes the token filter."""
    doc_BL: Ints


def blocks(store: "ActivationStore", rows: Ints, block_tokens: int, title: str) -> Iterator[Block]:
    """The chosen rows in blocks of about ``block_tokens`` tokens, behind a progress bar of tokens."""
    L = store.tokens.L
    per_block = max(1, block_tokens // L)
    with progress(title, total=len(rows) * L, unit="tokens") as bar:
        for start in range(0, len(rows), per_block):
            chosen = rows[start : start + per_block]
            flat = chosen[:, None] * L + np.arange(L)
            x = store.read(flat.ravel()).float().reshape(len(chosen), L, -1)
            yield Block(chosen, x, flat, np.asarray(store.keep_N[flat], dtype=bool),
                        np.asarray(store.doc_of_N[flat], dtype=np.int64))
            bar.advance(flat.size)


class SetMeans(NamedTuple):
    """Mean activations [D] of a set of rows, float64."""

    filtered_D: "torch.Tensor"
    """Over the tokens that pass the filter: the mean predictor and the mean ablation."""
    all_D: "torch.Tensor"


def set_means(ctx: "EvalContext", store: "ActivationStore", rows: Ints) -> SetMeans:
    """Means over the chosen rows; computed once per run.

    They depend on no subject, and are of the whole set, never of a batch.
    """
    import torch

    def build() -> SetMeans:
        kept, rest = (torch.zeros(store.d_in, dtype=torch.float64) for _ in range(2))
        n_kept = n_rest = 0
        for block in blocks(store, rows, BLOCK_TOKENS, "mean activation"):
            keep = torch.from_numpy(block.keep_BL)
            kept += block.x_BLD[keep].double().sum(dim=0)
            rest += block.x_BLD[~keep].double().sum(dim=0)
            n_kept, n_rest = n_kept + int(keep.sum()), n_rest + int((~keep).sum())
        return SetMeans(kept / max(n_kept, 1), (kept + rest) / max(n_kept + n_rest, 1))

    digest = hashlib.blake2b(rows.tobytes(), digest_size=8).hexdigest()
    means: SetMeans = ctx.memo(f"means.{store.key}.{digest}", build)
    return means
