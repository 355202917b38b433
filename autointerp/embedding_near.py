"""Silent windows that read like a latent's own: nearest, by cosine, to the mean embedding of its explain positives.

The kind `embedding_near` of AUTOINTERP 2. Does an explanation name more than the topic of its windows? It is a
diagnostic: near windows are no uniform draw of anything, so they never enter an estimate for the population. The pool
they come from is embedded once per (grid, embedder) and shared by all SAEs. n windows, E numbers per embedding.
Torch-free.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from autointerp.interfaces import EmbedderLike
from autointerp.records import SCORE, Exemplar
from autointerp.texts import Decoder
from sae.manifest import artefact_dir, is_complete, key_of, read_manifest, rng, writing

if TYPE_CHECKING:
    from autointerp.latent_cache import LatentCache
    from autointerp.windows import Windows

KIND, STAGE_VERSION = "window_embeddings", 1
POOL_WINDOWS = 20_000
DECIMALS = 5
"""Cosines are rounded: the last bits hang on the machine. Equal ones are ordered by window."""

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class EmbeddingNear:
    """The pool of one grid and what is asked of it."""

    key: str
    """Of the pool's artefact: tokens, grid and embedder."""
    windows_n: Ints
    """Ascending windows of the split score."""
    vectors_nE: NDArray[np.float32]
    """Unit rows."""
    embedder: EmbedderLike
    decoder: Decoder

    def order(self, positives: Sequence[Exemplar]) -> Ints:
        """All windows of the pool, the nearest to the mean of the positives' texts first; each text counts once."""
        texts = sorted({self.decoder.window(e) for e in positives})
        mean_E = self.embedder.embed(texts).astype(np.float64).mean(0)
        cosine_n = np.round(self.vectors_nE @ (mean_E / max(float(np.linalg.norm(mean_E)), 1e-12)), DECIMALS)
        return self.windows_n[np.lexsort((self.windows_n, -cosine_n))]


def open_pool(
    root: Path, cache: "LatentCache", embedder: EmbedderLike, tokenizer: Any, *, size: int = POOL_WINDOWS
) -> EmbeddingNear:
    """At most ``size`` windows of the split score, drawn uniformly, with their embeddings.

    Written to ``window_embeddings/<key>/`` once; the draw hangs on the tokens alone, so SAEs on one grid share it.
    """
    tokens, windows = cache.tokens(SCORE), cache.windows(SCORE)
    config = {"model_sha256": embedder.model_hash, "grid": _grid_hash(windows), "size": size}
    inputs = {"tokens": tokens.key}
    key = key_of(KIND, STAGE_VERSION, config, inputs)
    folder, decoder = artefact_dir(root, KIND, key), Decoder(tokenizer)
    if not is_complete(folder):
        drawn = np.sort(rng(KIND, tokens.key).permutation(len(windows))[:size]).astype(np.int64)
        tokens_N = np.asarray(tokens.tokens_BL).reshape(-1)
        texts = [decoder.text(tokens_N[windows.positions(w)].tolist()).strip() for w in drawn.tolist()]
        vectors = embedder.embed(texts)
        with writing(folder, kind=KIND, key=key, stage_version=STAGE_VERSION, config=config, inputs=inputs) as out:
            np.save(out.path / "windows_n.npy", drawn)
            np.save(out.path / "vectors_nE.npy", vectors)
            out.counts |= {"windows": len(drawn), "of": len(windows), "embedder": embedder.name}
    read_manifest(folder)
    drawn, vectors = np.load(folder / "windows_n.npy"), np.load(folder / "vectors_nE.npy")
    return EmbeddingNear(key, drawn, vectors, embedder, decoder)


def _grid_hash(windows: "Windows") -> str:
    """The filter of activations takes tokens out of the grid, so one token set has several grids."""
    return hashlib.sha256(windows.start.tobytes() + windows.length.tobytes()).hexdigest()[:16]
