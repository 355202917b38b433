"""The reading side of autointerp.latent_cache.LatentCache, of an SAE on stores in memory."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from memory_store import MemoryStore

from autointerp.latent_cache import Entries


class MemoryCache:
    """What evaluations of patterns read; every latent that fires often enough in both splits is eligible."""

    def __init__(self, sae: Any, stores: Mapping[str, MemoryStore], *, min_active: int = 8, key: str = "cache") -> None:
        self.key, self.sae_id, self.d_sae, self.min_active = key, sae.sae_id, sae.d_sae, min_active
        self.stores = dict(stores)
        self._entries = {split: self._encoded(sae, store) for split, store in stores.items()}
        counts = {f"n_active_{s}": [len(flat) for flat, _ in found] for s, found in self._entries.items()}
        self.stats = pd.DataFrame(counts)
        self.stats["n_active"] = self.stats["n_active_explain"]

    @staticmethod
    def _encoded(sae: Any, store: MemoryStore) -> list[tuple[np.ndarray, np.ndarray]]:
        z = np.zeros((store.n_tokens, sae.d_sae), dtype=np.float32)
        z[store.kept_N] = sae.encode(store.read(store.kept_N)).numpy()
        return [(np.flatnonzero(z[:, f] > 0), z[z[:, f] > 0, f]) for f in range(sae.d_sae)]

    def entries(self, latent: int, split: str) -> Entries:
        flat, value = self._entries[split][latent]
        return Entries(flat.astype(np.uint32), value)

    def tokens(self, split: str) -> Any:
        return self.stores[split].tokens

    def keep(self, split: str) -> np.ndarray:
        return self.stores[split].keep_N

    def doc_of(self, split: str) -> np.ndarray:
        return self.stores[split].doc_of_N

    def eligible(self, cfg: Any = None) -> np.ndarray:
        enough = [np.array([len(flat) for flat, _ in found]) >= self.min_active for found in self._entries.values()]
        return np.flatnonzero(np.all(enough, axis=0))
