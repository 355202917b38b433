"""Two hookpoints of one forward pass as one store: inputs and targets of the same tokens, for transcoders.

Shapes: N tokens, D = width of the inputs; targets have a width of their own.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from torch import Tensor

from sae.activations import ActivationStore
from sae.errors import DataError
from sae.manifest import key_of, rng


class TwoStores:
    """What a store of inputs and one of targets say together; ``inputs`` and ``targets`` come from the subclass."""

    inputs: Any
    targets: Any

    @property
    def d_in(self) -> int:
        return self.inputs.d_in

    @property
    def d_out(self) -> int:
        return self.targets.d_in

    @cached_property
    def kept_N(self) -> np.ndarray:
        """int64 flat indices that pass both filters, ascending."""
        return np.intersect1d(self.inputs.kept_N, self.targets.kept_N, assume_unique=True)


@dataclass(frozen=True)
class PairedStore(TwoStores):
    """Reads like :class:`sae.activations.ActivationStore` of the inputs, and gives the targets of any token.

    A token counts where both stores keep it. ``DataError`` for stores of different tokens.
    """

    inputs: ActivationStore
    targets: ActivationStore

    def __post_init__(self) -> None:
        if self.inputs.tokens.key != self.targets.tokens.key:
            raise DataError(
                f"inputs ({self.inputs.key}) and targets ({self.targets.key}) were collected on different tokens "
                f"({self.inputs.tokens.key}, {self.targets.tokens.key}): collect both from one token set"
            )

    @cached_property
    def key(self) -> str:
        """16 hex digits of both stores."""
        return key_of("paired", 1, {}, {"inputs": self.inputs.key, "targets": self.targets.key})

    @property
    def n_kept(self) -> int:
        return len(self.kept_N)

    def read(self, flat: Any) -> Tensor:
        """Inputs, float32 [n, D]."""
        return self.inputs.read(flat)

    def read_target(self, flat: Any) -> Tensor:
        """Targets of the same tokens, float32 [n, d_out]."""
        return self.targets.read(flat)

    def batches(
        self, batch_tokens: int, *, seed: int, epochs: int, first: int = 0
    ) -> Iterator[tuple[Tensor, np.ndarray]]:
        """(inputs, flat indices), every kept token once per epoch in a permutation of (seed, epoch); ``first`` batches
        are passed over. The last, short batch of an epoch is left out."""
        kept, per_epoch = self.kept_N, self.n_kept // batch_tokens
        for epoch in range(first // max(per_epoch, 1), epochs):
            order = rng(seed, "batches", epoch).permutation(len(kept))
            for batch in range(per_epoch):
                if epoch * per_epoch + batch >= first:
                    flat = kept[order[batch * batch_tokens : (batch + 1) * batch_tokens]]
                    yield self.read(flat), flat
