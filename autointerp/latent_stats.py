"""What the latent cache says of each latent (columns of ``latents.parquet``, AUTOINTERP 1). Torch-free.

F latents, N kept tokens of the split, a_nf >= 0 activations. Moments are raw moments over all N tokens, as the OpenAI
viewer has them, summed in float64. The strengths, histogram and top tokens an explainer may see come from the split
``explain`` alone.
"""

from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from autointerp.latent_sort import Chunk
from autointerp.windows import Windows

HISTOGRAM_BINS = 50
TOP_TOKENS = 20


class SplitText:
    """What the statistics of all SAEs on one split share: its filter, documents, grid and token types."""

    def __init__(self, tokens_BL: NDArray[np.integer], keep_N: NDArray[np.bool_], doc_of_N: NDArray[np.int32],
                 n_docs: int, windows: Windows) -> None:
        self.keep_N, self.doc_of_N, self.n_docs, self.windows = keep_N, doc_of_N, n_docs, windows
        self.n_kept, self.row_tokens = int(keep_N.sum()), int(tokens_BL.shape[1])
        self._tokens_N = np.asarray(tokens_BL).reshape(-1)

    @cached_property
    def _types(self) -> tuple[NDArray[Any], NDArray[np.int32]]:
        ids, compact = np.unique(self._tokens_N, return_inverse=True)
        return ids, compact.reshape(-1).astype(np.int32)

    @property
    def token_ids(self) -> NDArray[Any]:
        """Ids that occur, ascending."""
        return self._types[0]

    @property
    def type_of_N(self) -> NDArray[np.int32]:
        """Index into :attr:`token_ids` of each flat token."""
        return self._types[1]

    @cached_property
    def occurrences(self) -> NDArray[np.int64]:
        """Kept tokens of each type."""
        return np.bincount(self.type_of_N[self.keep_N], minlength=self.token_ids.size)


class SplitStats:
    """Sums per latent over one split, fed chunk by chunk."""

    def __init__(self, d_sae: int, text: SplitText, *, shapes: bool) -> None:
        """``shapes``: also histogram and top tokens (split explain)."""
        self.text: SplitText | None = text
        self.shapes = shapes
        self.n_kept, self.n_all_docs, self.n_all_windows = text.n_kept, text.n_docs, len(text.windows)
        self.n_active, self.n_docs, self.n_windows = (np.zeros(d_sae, dtype=np.int64) for _ in range(3))
        self.n_at_2F = np.zeros((2, d_sae), dtype=np.int64)
        """Activations at positions 0 and 1 of a row."""
        self.max_act = np.zeros(d_sae, dtype=np.float32)
        self.sums_4F = np.zeros((4, d_sae))
        self.histogram = np.zeros((d_sae if shapes else 0, HISTOGRAM_BINS), dtype=np.int64)
        self.top_ids: list[list[int]] = [[] for _ in range(d_sae if shapes else 0)]
        self.top_acts: list[list[float]] = [[] for _ in range(d_sae if shapes else 0)]

    def done(self) -> None:
        """Nothing follows: let go of the text, which is as long as the split."""
        self.text = None

    def add(self, chunk: Chunk) -> NDArray[np.float32]:
        """Take in a chunk; returns the maximum of each of its latents (0 where it never fires)."""
        assert self.text is not None
        n = chunk.ptr.size - 1
        here = slice(chunk.first, chunk.first + n)
        segment, value = chunk.segment, chunk.value
        counts = np.diff(chunk.ptr)
        largest = np.zeros(n, dtype=np.float32)
        filled = counts > 0
        if filled.any():
            # Empty segments have no elements of their own, so the starts of the others tile the chunk.
            largest[filled] = np.maximum.reduceat(value, chunk.ptr[:-1][filled])
        self.n_active[here], self.max_act[here] = counts, largest
        power = value.astype(np.float64)
        for i in range(4):
            self.sums_4F[i, here] = np.bincount(segment, weights=power, minlength=n)
            power *= value
        self.n_docs[here] = _count_distinct(segment, self.text.doc_of_N[chunk.flat], n)
        position = chunk.flat % self.text.row_tokens
        for p in range(2):
            self.n_at_2F[p, here] = np.bincount(segment[position == p], minlength=n)
        window = self.text.windows.of_flat[chunk.flat]
        inside = window >= 0
        self.n_windows[here] = _count_distinct(segment[inside], window[inside], n)
        if self.shapes and value.size:
            bins = np.ceil(value / largest[segment] * HISTOGRAM_BINS).astype(np.int64).clip(1, HISTOGRAM_BINS) - 1
            flat_bins = np.bincount(segment * HISTOGRAM_BINS + bins, minlength=n * HISTOGRAM_BINS)
            self.histogram[here] = flat_bins.reshape(n, HISTOGRAM_BINS)
            self._top_tokens(chunk, self.text)
        return largest

    def _top_tokens(self, chunk: Chunk, text: SplitText) -> None:
        """Token ids by mean activation over their occurrences; one silent occurrence is added to each, so that a
        token seen once does not come first by luck."""
        from scipy.sparse import csr_array

        n, n_types = chunk.ptr.size - 1, text.token_ids.size
        matrix = csr_array((chunk.value, text.type_of_N[chunk.flat], chunk.ptr), shape=(n, n_types))
        matrix = matrix.tocsc().tocsr()  # two linear passes sort the columns, so that duplicates can be summed
        matrix.sum_duplicates()
        mean = matrix.data / (text.occurrences[matrix.indices] + 1)
        for i in range(n):
            low, high = int(matrix.indptr[i]), int(matrix.indptr[i + 1])
            if low == high:
                continue
            column, strength = matrix.indices[low:high], mean[low:high]
            best = np.lexsort((column, -strength))[:TOP_TOKENS]
            self.top_ids[chunk.first + i] = text.token_ids[column[best]].tolist()
            self.top_acts[chunk.first + i] = [round(float(v), 6) for v in strength[best]]


def _count_distinct(segment: NDArray[np.int64], label: NDArray[np.int32], n: int) -> NDArray[np.int64]:
    """Distinct labels per segment; labels ascend inside a segment, since documents and windows follow the text."""
    change = np.ones(segment.size, dtype=bool)
    change[1:] = (segment[1:] != segment[:-1]) | (label[1:] != label[:-1])
    return np.bincount(segment[change], minlength=n)


def frame(stats: dict[str, SplitStats]) -> pd.DataFrame:
    """One row per latent, indexed by latent; null where a quantity does not exist (a dead latent has no skew)."""
    columns: dict[str, Any] = {}
    total = np.sum([s.n_active for s in stats.values()], axis=0)
    columns["n_active"] = total
    columns["density"] = total / max(sum(s.n_kept for s in stats.values()), 1)
    for split, s in stats.items():
        columns[f"n_active_{split}"] = s.n_active
        columns[f"n_docs_{split}"] = s.n_docs
        columns[f"n_windows_{split}"] = s.n_windows
        columns[f"density_{split}"] = s.n_active / max(s.n_kept, 1)
        columns[f"density_doc_{split}"] = s.n_docs / max(s.n_all_docs, 1)
        columns[f"max_act_{split}"] = s.max_act
        columns[f"pi_{split}"] = s.n_windows / max(s.n_all_windows, 1)
    if "score" in stats:
        columns["pi"] = columns["pi_score"]
    shown = stats["explain"]
    first, second, third, fourth = shown.sums_4F / max(shown.n_kept, 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        columns["max_act"] = shown.max_act
        columns["mean_act"] = first
        columns["mean_act_squared"] = second
        columns["mean_positive"] = shown.sums_4F[0] / np.where(shown.n_active > 0, shown.n_active, np.nan)
        columns["skew"] = np.where(second > 0, third / second**1.5, np.nan)
        columns["kurtosis"] = np.where(second > 0, fourth / second**2, np.nan)
        share_2F = np.where(shown.n_active > 0, shown.n_at_2F / shown.n_active, np.nan)
        columns["share_position_0"], columns["share_position_1"] = share_2F
    columns["histogram"] = list(shown.histogram)
    columns["top_tokens"] = shown.top_ids
    columns["top_token_acts"] = shown.top_acts
    return pd.DataFrame(columns, index=pd.RangeIndex(total.size, name="latent"))
