"""A shuffle buffer of fixed size, fed by one producer, in the trainer's thread or in one of its own (TRAINING 8).

Tokens that arrive one after another are cut into **windows** of S tokens, and each window leaves in a random order of
its own. Which token is in which batch is therefore a function of (seed, position) and of nothing else: not of the
producer's speed, nor of whether it has a thread. While a window leaves, the next one enters its emptied slots in place,
so that S slots suffice for ever.

Shapes: S slots, D channels; a block is what the producer hands over at once.
"""

import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sae.manifest import rng

WAKE_S = 0.2
"""Longest time for which the trainer waits for its producer without looking at signals."""
INDEX_BYTES = 24
"""Bytes per slot beside its activations and its token index: two lists of slots and the order of a window."""


class Block(NamedTuple):
    """Activations of some tokens, at each of the hookpoints."""

    x_ND: Sequence[Tensor]
    """One [n, D] per hookpoint."""
    flat_N: Sequence[np.ndarray]
    """int64 token index per hookpoint."""

    def __len__(self) -> int:
        return len(self.flat_N[0])

    def cut(self, begin: int, end: int | None = None) -> "Block":
        """The tokens ``begin`` to ``end``."""
        part = slice(begin, end)
        return Block([x_ND[part] for x_ND in self.x_ND], [flat_N[part] for flat_N in self.flat_N])


Batch = list[tuple[Tensor, np.ndarray]]
"""(x_ND float32, int64 token index) per hookpoint."""
Tick = Callable[[float], None]
"""Called now and then while a window fills, with the share that is there; what it raises ends the stream."""


class Order:
    """Which token comes when: a function of the number of kept tokens in each chunk, and of a seed."""

    def __init__(self, counts_C: np.ndarray, seed: int) -> None:
        self.counts_C, self.seed = counts_C, seed
        self.per_pass = int(counts_C.sum())

    def chunks(self, number: int) -> np.ndarray:
        """Order of the chunks in pass ``number``."""
        return rng(self.seed, "stream-chunks", number).permutation(len(self.counts_C))

    def since(self, token: int) -> Iterator[tuple[int, int]]:
        """(chunk, number of its kept tokens that came before) from the kept token ``token`` of the stream on."""
        number, offset = divmod(token, self.per_pass)
        while True:
            order = self.chunks(number)
            ends = np.cumsum(self.counts_C[order])
            for i in range(int(np.searchsorted(ends, offset, side="right")), len(order)):
                yield int(order[i]), max(0, offset - int(ends[i] - self.counts_C[order[i]]))
            number, offset = number + 1, 0


class Slots:
    """The buffer itself, without any waiting: S slots of which each belongs to the window that leaves or to the next.

    Token j of a window lies in the slot that was the j-th to be emptied by the window before.
    """

    def __init__(self, window: int, widths: Sequence[int], dtype: torch.dtype, device: torch.device) -> None:
        self.window = window
        self.x_SD = [torch.empty(window, width, dtype=dtype, device=device) for width in widths]
        self.flat_S = [np.empty(window, dtype=np.int64) for _ in widths]
        self._here, self._next = np.arange(window), np.empty(window, dtype=np.int64)
        self.n_here = 0
        """Tokens of the leaving window that are there."""
        self.n_next, self.n_free = 0, 0
        """Tokens of the next window that are there, and slots that are empty or hold one."""

    @property
    def room(self) -> int:
        """Tokens that can enter now."""
        return self.window - self.n_here + self.n_free - self.n_next

    @property
    def ready(self) -> bool:
        """The leaving window is whole."""
        return self.n_here == self.window

    def put(self, block: Block) -> int:
        """Let as many tokens of a block enter as there is room for, in order; returns their number."""
        n_here = min(len(block), self.window - self.n_here)
        n_next = min(len(block) - n_here, self.n_free - self.n_next)
        self._copy(block.cut(0, n_here), self._here[self.n_here : self.n_here + n_here])
        self._copy(block.cut(n_here, n_here + n_next), self._next[self.n_next : self.n_next + n_next])
        self.n_here, self.n_next = self.n_here + n_here, self.n_next + n_next
        return n_here + n_next

    def _copy(self, block: Block, slots_n: np.ndarray) -> None:
        if not len(slots_n):
            return
        for x_SD, flat_S, x_nD, flat_n in zip(self.x_SD, self.flat_S, *block, strict=True):
            x_SD.index_copy_(0, torch.from_numpy(slots_n).to(x_SD.device), x_nD.to(x_SD.device, x_SD.dtype))
            flat_S[slots_n] = flat_n

    def take(self, picks_n: np.ndarray, *, read: bool = True) -> Batch:
        """The tokens of the leaving window with these numbers; their slots are empty from now on."""
        slots_n = self._here[picks_n]
        found: Batch = []
        if read:
            index = torch.from_numpy(slots_n)
            found = [
                (x_SD.index_select(0, index.to(x_SD.device)).float(), flat_S[slots_n])
                for x_SD, flat_S in zip(self.x_SD, self.flat_S, strict=True)
            ]
        self._next[self.n_free : self.n_free + len(slots_n)] = slots_n
        self.n_free += len(slots_n)
        return found

    def turn(self) -> None:
        """The window has left; the next one leaves now."""
        assert self.n_free == self.window
        self._here, self._next = self._next, self._here
        self.n_here, self.n_next, self.n_free = self.n_next, 0, 0


class Feed:
    """Slots with the producer's blocks flowing in; a context manager, so that a thread never outlives its trainer.

    With ``threaded`` the blocks are made in a thread (on a GPU: on a CUDA stream of its own), else by whoever waits for
    them. An exception of the producer is raised, as it is, in the thread that calls :meth:`wait`.
    """

    def __init__(self, slots: Slots, blocks: Iterator[Block], *, threaded: bool) -> None:
        self.slots, self.blocks = slots, blocks
        self._changed = threading.Condition()
        self._error: BaseException | None = None
        self._ended = self._closed = False
        self._rest: Block | None = None
        device = slots.x_SD[0].device
        self._cuda = device if threaded and device.type == "cuda" else None
        self._written: Any = None
        self._emptied: Any = None
        self._n_threads = torch.get_num_threads()
        self._thread = threading.Thread(target=self._work, name="prefetch", daemon=True) if threaded else None

    def __enter__(self) -> "Feed":
        if self._thread is not None:
            if self._cuda is not None:
                self._emptied = torch.cuda.current_stream(self._cuda).record_event()
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()

    # -- the producer's side ------------------------------------------------------------------------------------
    def _work(self) -> None:
        try:
            torch.set_num_threads(self._n_threads)  # a new thread would begin with all cores
            if self._cuda is None:
                self._produce()
            else:
                with torch.cuda.device(self._cuda), torch.cuda.stream(torch.cuda.Stream(self._cuda)):
                    torch.cuda.current_stream().wait_event(self._emptied)
                    self._produce()
        except BaseException as error:  # whatever it is, the trainer must hear of it instead of waiting
            self._error = error
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def _produce(self) -> None:
        for block in self.blocks:
            rest = block
            while len(rest):
                with self._changed:
                    self._changed.wait_for(lambda: self._closed or self.slots.room > 0)
                    if self._closed:
                        return
                    if self._cuda is not None:
                        torch.cuda.current_stream().wait_event(self._emptied)
                    rest = rest.cut(self.slots.put(rest))
                    if self._cuda is not None:
                        self._written = torch.cuda.current_stream().record_event()
                    self._changed.notify_all()
            if self._closed:
                return

    def _produce_one(self) -> bool:
        """Without a thread: let one block enter, or its beginning; False where no block is left."""
        if self._rest is None:
            self._rest = next(self.blocks, None)
            if self._rest is None:
                return False
        rest = self._rest.cut(self.slots.put(self._rest))
        self._rest = rest if len(rest) else None
        return True

    # -- the trainer's side -------------------------------------------------------------------------------------
    def wait(self, tick: Tick | None = None) -> bool:
        """Until the leaving window is whole; False where the producer ended before."""
        while True:
            with self._changed:
                if self._error is not None:
                    raise self._error
                if self.slots.ready:
                    return True
                if self._ended:
                    return False
                share = self.slots.n_here / self.slots.window
                if self._thread is not None:
                    self._changed.wait(WAKE_S)
            if tick is not None:
                tick(share)
            if self._thread is None and not self._produce_one():
                return False

    def take(self, picks_n: np.ndarray, *, read: bool = True) -> Batch:
        """See :meth:`Slots.take`. Without a thread the emptied slots are filled again as far as whole blocks go."""
        with self._changed:
            if self._cuda is not None and self._written is not None:
                torch.cuda.current_stream(self._cuda).wait_event(self._written)
            found = self.slots.take(picks_n, read=read)
            if self._cuda is not None:
                self._emptied = torch.cuda.current_stream(self._cuda).record_event()
            self._changed.notify_all()
        return found

    def refill(self) -> None:
        """Without a thread: let enter what there is room for, so that no step waits for a whole window."""
        while self._thread is None and self.slots.room > 0 and self._produce_one():
            pass

    def turn(self) -> None:
        """See :meth:`Slots.turn`."""
        with self._changed:
            self.slots.turn()
            self._changed.notify_all()


def batches(
    feed: Feed, batch_tokens: int, *, seed: int, first: int, last: int, tick: Tick | None = None
) -> Generator[Batch, None, None]:
    """Batches ``first`` to ``last`` (excluded) of a feed whose blocks begin with the window that holds ``first``.

    The window must be a whole number of batches. Ends early where the blocks do.
    """
    per_window = feed.slots.window // batch_tokens
    number = first
    with feed:
        while number < last:
            window, begin = divmod(number, per_window)
            if not feed.wait(tick):
                return
            order = window_order(seed, window, feed.slots.window)
            feed.take(order[: begin * batch_tokens], read=False)
            for batch in range(begin, min(per_window, last - window * per_window)):
                yield feed.take(order[batch * batch_tokens : (batch + 1) * batch_tokens])
                number += 1
                if number < last:
                    feed.refill()
            if number < last:
                feed.turn()


def window_order(seed: int, window: int, size: int) -> np.ndarray:
    """In which order the tokens of a window leave."""
    return rng(seed, "stream-window", window).permutation(size)
