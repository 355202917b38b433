"""The concept bank: short labels of our own making that the `pmi` explainer chooses from.

The bank is a data file made by ``scripts/build_concepts.py``; its embeddings are an artefact in the cache directory,
keyed by the hashes of the file and of the embedding model. E numbers per embedding. Torch-free.
"""

from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from autointerp.interfaces import EmbedderLike
from sae.assets import cache_dir
from sae.errors import DataError
from sae.manifest import artefact_dir, is_complete, key_of, sha256_file, writing

BANK = Path(__file__).with_name("concepts.txt")
STAGE_VERSION = 2
KIND = "concepts"


class Bank(NamedTuple):
    """Labels with their embeddings."""

    labels: list[str]
    vectors_nE: np.ndarray
    """float32, unit rows."""


@lru_cache(maxsize=4)
def read_labels(path: Path = BANK) -> tuple[str, ...]:
    """The labels of a bank file: one per line, ``#`` begins a comment line.

    :class:`DataError` where there is none, or one twice.
    """
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    labels = [line for line in lines if line and not line.startswith("#")]
    twice = sorted({label for label in labels if labels.count(label) > 1}) if len(set(labels)) < len(labels) else []
    if not labels or twice:
        raise DataError(f"{path} must hold distinct labels, one per line; found {len(labels)}, twice: {twice[:3]}")
    return tuple(labels)


def load_bank(embedder: EmbedderLike, *, path: Path = BANK, cache: Path | None = None) -> Bank:
    """The labels and their embeddings, computed once per (file, model) and then read from the cache directory."""
    labels = list(read_labels(path))
    config = {"labels_sha256": sha256_file(path), "model_sha256": embedder.model_hash}
    key = key_of(KIND, STAGE_VERSION, config)
    folder = artefact_dir(cache or cache_dir(), KIND, key)
    if not is_complete(folder):
        vectors = embedder.embed(labels)
        with writing(folder, kind=KIND, key=key, stage_version=STAGE_VERSION, config=config) as out:
            np.save(out.path / "vectors_nE.npy", vectors)
            out.counts["labels"] = len(labels)
    return Bank(labels, np.load(folder / "vectors_nE.npy"))
