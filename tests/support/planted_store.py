"""Planted activations with the reading side of a store, as sae.train wants it; and a subject to name in an SAE."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from planted import planted
from torch import Tensor

from sae.config import SubjectMeta
from sae.manifest import rng

META = SubjectMeta(
    lm="tiny", lm_revision="0", hookpoint="blocks.1", lm_dtype="float32", context_length_tokens=16, lm_slug="tiny"
)


@dataclass
class PlantedStore:
    """All tokens are kept; flat index = row of ``x_ND``."""

    x_ND: Tensor
    key: str = "planted"

    @property
    def d_in(self) -> int:
        return self.x_ND.shape[1]

    @property
    def n_kept(self) -> int:
        return len(self.x_ND)

    @property
    def kept_N(self) -> np.ndarray:
        return np.arange(len(self.x_ND))

    def read(self, flat: Any) -> Tensor:
        return self.x_ND[torch.as_tensor(np.asarray(flat))]

    def batches(self, batch_tokens: int, *, seed: int, epochs: int, first: int = 0) -> Iterator[tuple[Tensor, Any]]:
        per_epoch = len(self.x_ND) // batch_tokens
        for epoch in range(first // per_epoch, epochs):
            order = rng("planted-store", seed, epoch).permutation(len(self.x_ND))
            for batch in range(max(0, first - epoch * per_epoch), per_epoch):
                flat = order[batch * batch_tokens : (batch + 1) * batch_tokens]
                yield self.read(flat), flat


def planted_store(*, n: int = 2_048, d: int = 16, g: int = 24, seed: int = 0) -> PlantedStore:
    """About three of ``g`` planted features active per token of width ``d``."""
    return PlantedStore(planted(n=n, d=d, g=g, l0=3.0, seed=seed).x_ND, key=f"planted-{n}-{d}-{g}-{seed}")
