"""Transcoders on the fly, and one iterator for the batches of several stores.

Shapes: N tokens of one batch, D = width of the inputs; targets have a width of their own.
"""

from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from sae.buffer import Batch, Tick
from sae.manifest import key_of
from sae.paired import TwoStores
from sae.streams import LiveStore, LiveStream

if TYPE_CHECKING:
    from sae.train_run import Store


class LivePair(TwoStores):
    """Two hookpoints of one pass for transcoders, with what training reads of a :class:`sae.paired.PairedStore`.

    Targets are known of the tokens of the sample, and of the batch that came last.
    """

    def __init__(self, stream: LiveStream) -> None:
        self.stream = replace(stream, paired=True)
        self.inputs, self.targets = self.stream.stores
        self._last: tuple[np.ndarray, Tensor] | None = None

    @property
    def key(self) -> str:
        return key_of("stream-pair", 1, {}, {"inputs": self.inputs.key, "targets": self.targets.key})

    @property
    def n_kept(self) -> int:
        """Tokens of one pass of the stream."""
        return self.stream.n_kept

    def read(self, flat: Any) -> Tensor:
        """Inputs of tokens of the sample, float32 [n, D]."""
        return self.inputs.read(flat)

    def read_target(self, flat: Any) -> Tensor:
        """Targets, float32 [n, d_out]: of the last batch, asked for by the very array that came with it, or of tokens
        of the sample."""
        if self._last is not None and flat is self._last[0]:
            return self._last[1]
        return self.targets.read(flat)

    def of_batch(self, batch: Batch) -> tuple[Tensor, np.ndarray]:
        """(inputs, flat indices); the targets can be read until the next batch."""
        (x_ND, flat), (target_NO, _) = batch
        self._last = flat, target_NO
        return x_ND, flat

    def batches(
        self, batch_tokens: int, *, seed: int, epochs: int, first: int = 0
    ) -> Iterator[tuple[Tensor, np.ndarray]]:
        """As those of a :class:`LiveStore`."""
        last = epochs * (self.n_kept // batch_tokens)
        with closing(self.stream.batches(batch_tokens, seed=seed, first=first, last=last)) as found:
            for batch in found:
                yield self.of_batch(batch)


def together(
    stores: Sequence["Store"], batch_tokens: int, *, seed: int, first: int, last: int, tick: Tick | None = None
) -> Generator[list[tuple[Tensor, Any]], None, None]:
    """Batches ``first`` to ``last`` (excluded) of all stores, one of each at a time. Hookpoints of one
    :class:`LiveStream` share its passes; ``tick``: called while its buffer fills, with the share that is there."""
    live = [store for store in stores if isinstance(store, (LiveStore, LivePair))]
    if len(live) == len(stores) and len({id(store.stream) for store in live}) == 1:
        stream = live[0].stream
        with closing(stream.batches(batch_tokens, seed=seed, first=first, last=last, tick=tick)) as found:
            for batch in found:
                yield [store.of_batch(batch) for store in live]
        return
    each = []
    for store in stores:
        epochs = -(-last // max(1, store.n_kept // batch_tokens))
        each.append(store.batches(batch_tokens, seed=seed, epochs=epochs, first=first))
    for index, parts in enumerate(zip(*each, strict=False), first):
        if index == last:
            return
        yield list(parts)
