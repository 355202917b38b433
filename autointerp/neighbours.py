"""Which latents resemble each other: by decoder direction, and by the windows on which they are active.

F latents, D = d_in. Nothing here forms an F x F matrix.
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from autointerp.latent_sort import CHUNK_ENTRIES
from autointerp.windows import Windows

if TYPE_CHECKING:
    from sae.base import SAE

NEIGHBOURS = 10


def nearest_decoders(
    sae: "SAE", latents: Sequence[int] | NDArray[np.integer], n: int = NEIGHBOURS
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The ``n`` latents with the largest decoder cosine, [len(latents), n], and the cosines; never the latent itself.

    In blocks of 256 against all F, so that no F x F matrix exists.
    """
    import torch

    unit = torch.nn.functional.normalize(sae.W_dec_FD.detach().float(), dim=1)
    rows = torch.as_tensor(np.asarray(latents, dtype=np.int64), device=unit.device)
    n = min(n, unit.shape[0] - 1)
    indices, cosines = [], []
    for block in rows.split(256):
        cosine = unit[block] @ unit.T
        cosine[torch.arange(block.numel()), block] = -torch.inf
        best = cosine.topk(n, dim=1)
        indices.append(best.indices.cpu().numpy())
        cosines.append(best.values.cpu().numpy().astype(np.float64).round(6))
    empty: list[Any] = [np.zeros((0, n))]
    return np.concatenate(indices or empty).astype(np.int64), np.concatenate(cosines or empty)


def _latent_blocks(ptr: NDArray[np.int64], entries: int = CHUNK_ENTRIES) -> Iterator[tuple[int, int]]:
    """Consecutive ranges of latents of about ``entries`` entries each."""
    first, n = 0, ptr.size - 1
    while first < n:
        last = min(max(int(np.searchsorted(ptr, ptr[first] + entries, side="right")) - 1, first + 1), n)
        yield first, last
        first = last


def incidence(ptr: NDArray[np.int64], flat: NDArray[np.uint32], windows: Windows) -> Any:
    """CSR [F, windows]: 1 where the latent is active on the window. ``ptr`` and ``flat`` as in the latent cache."""
    from scipy.sparse import csr_array

    rows, columns = [], []
    for first, last in _latent_blocks(ptr):
        segment = np.repeat(np.arange(first, last, dtype=np.int32), np.diff(ptr[first : last + 1]))
        window = windows.of_flat[np.asarray(flat[ptr[first] : ptr[last]], dtype=np.int64)]
        inside = window >= 0
        segment, window = segment[inside], window[inside]
        new = np.ones(segment.size, dtype=bool)
        new[1:] = (segment[1:] != segment[:-1]) | (window[1:] != window[:-1])
        rows.append(segment[new])
        columns.append(window[new])
    row, column = np.concatenate(rows), np.concatenate(columns)
    ones = np.ones(row.size, dtype=np.float32)
    return csr_array((ones, (row, column)), shape=(ptr.size - 1, len(windows)))


def most_overlapping(matrix: Any, latents: Sequence[int], n: int = NEIGHBOURS) -> dict[int, list[int]]:
    """Per asked latent the ``n`` others with the largest Jaccard overlap of the rows of ``matrix`` (0/1 CSR)."""
    size = np.asarray(matrix.sum(axis=1)).reshape(-1)
    wanted = np.asarray(sorted(set(latents)), dtype=np.int64)
    out: dict[int, list[int]] = {}
    for low in range(0, wanted.size, 64):
        block = wanted[low : low + 64]
        shared = (matrix @ matrix[block].toarray().T).T
        jaccard = shared / np.maximum(size[block][:, None] + size - shared, 1)
        jaccard[np.arange(block.size), block] = 0
        for latent, row in zip(block.tolist(), jaccard, strict=True):
            order = np.lexsort((np.arange(row.size), -row))[:n]
            out[latent] = [int(i) for i in order if row[i] > 0]
    return out
