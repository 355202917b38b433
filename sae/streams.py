"""Activations on the fly: one pass of the language model feeds the SAEs of several hookpoints, nothing is stored.

Rows of a token set are read in **chunks** of ``batch_rows``, always the same ones together, so that a token has the
same activation bit for bit whenever it is computed, and that of the disk store. The order of chunks is a permutation
per pass (decision 015). Shapes: N flat tokens, flat index n = row * L + position; D channels; C chunks.
"""

import os
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sae import buffer
from sae.activations import BATCH_ROWS, BY_NORM, KEPT, REASONS, filter_codes
from sae.buffer import INDEX_BYTES, Batch, Block, Feed, Order, Slots, Tick
from sae.config import FilterConfig, StreamConfig, to_dict
from sae.console import progress
from sae.errors import ConfigError, DataError
from sae.manifest import key_of, rng
from sae.tokens import TokenSet, drop_ids

if TYPE_CHECKING:
    from sae.language_model import LanguageModel

STREAM_VERSION = 1
SAMPLE_TOKENS = 65_536
"""Tokens that are computed once and held: start sample, median norm, calibration, reference sample."""
FEWEST_BATCHES = 4
"""Batches that a buffer must hold at least."""
PREFETCH_CORES = 4
"""With so many cores or fewer, model and SAEs would only take them from each other."""


@dataclass(frozen=True, eq=False)
class LiveStream:
    """Activations of a token set at some hookpoints, computed when they are asked for. :attr:`stores` has the reading
    side of each hookpoint, as :func:`sae.train.train_jobs` wants it.

    A token over the norm limit gives its place to another of its chunk (at that hookpoint), so that the position in the
    stream does not hang on an activation.
    """

    lm: "LanguageModel"
    tokens: TokenSet
    hookpoints: tuple[str, ...]
    filter_cfg: FilterConfig
    cfg: StreamConfig
    batch_rows: int = BATCH_ROWS
    dtype: torch.dtype = torch.bfloat16
    """In which activations are held, as in a disk store."""
    paired: bool = False
    """The hookpoints are the inputs and the targets of transcoders: a token over the limit of one is out at both."""

    @cached_property
    def stores(self) -> tuple["LiveStore", ...]:
        """One per hookpoint, in order."""
        return tuple(LiveStore(self, i) for i in range(len(self.hookpoints)))

    @cached_property
    def widths(self) -> tuple[int, ...]:
        """D of each hookpoint."""
        return tuple(self.lm.check_hookpoint(hookpoint) for hookpoint in self.hookpoints)

    @cached_property
    def codes_N(self) -> np.ndarray:
        """uint8 per token as in :class:`sae.activations.ActivationStore`, without the norm rule."""
        rows = np.asarray(self.tokens.tokens_BL)
        return filter_codes(self.tokens, np.zeros(rows.size), drop_ids(self.lm.tokenizer), self.filter_cfg, 1.0)[0]

    @cached_property
    def counts_C(self) -> np.ndarray:
        """int64: tokens of each chunk that pass the position and token rules."""
        per_row = (self.codes_N.reshape(-1, self.tokens.L) == KEPT).sum(1)
        return np.add.reduceat(per_row, np.arange(0, len(per_row), self.batch_rows)).astype(np.int64)

    @property
    def n_kept(self) -> int:
        """Tokens of one pass."""
        return int(self.counts_C.sum())

    @property
    def threaded(self) -> bool:
        """Whether the model runs in a thread of its own."""
        if self.cfg.prefetch == "auto":
            return self.lm.device.type == "cuda" or (os.cpu_count() or 1) > PREFETCH_CORES
        return self.cfg.prefetch == "on"

    def window(self, batch_tokens: int) -> int:
        """Tokens that are shuffled together: whole batches, no more than the buffer and than one pass has.

        ``ConfigError`` for a buffer below four batches, ``DataError`` for text below one batch.
        """
        if self.cfg.buffer_tokens < FEWEST_BATCHES * batch_tokens:
            raise ConfigError(
                f"a buffer of {self.cfg.buffer_tokens:,} tokens hardly shuffles batches of {batch_tokens:,}: give "
                f"--stream.buffer-tokens {FEWEST_BATCHES * batch_tokens} or more"
            )
        if self.n_kept < batch_tokens:
            raise DataError(
                f"the text gives {self.n_kept:,} tokens after the filter, a batch is {batch_tokens:,}: give more text "
                "(--texts, --tokens.train-tokens) or lower --train.batch-tokens"
            )
        return min(self.cfg.buffer_tokens, self.n_kept) // batch_tokens * batch_tokens

    def memory_bytes(self, batch_tokens: int) -> int:
        """Buffer with its lists of indices, the blocks that wait to enter it, and the sample; neither batches nor what
        the model itself takes."""
        chunk = self.batch_rows * self.tokens.L
        window, sample = self.window(batch_tokens), min(SAMPLE_TOKENS + chunk, self.n_kept)
        values = (window + 2 * chunk + sample) * sum(self.widths) * self.dtype.itemsize
        return values + window * INDEX_BYTES + (window + sample) * 8 * len(self.hookpoints)

    # -- computing ----------------------------------------------------------------------------------------------
    def chunk(self, number: int) -> tuple[list[Tensor], list[np.ndarray], np.ndarray]:
        """(x_nD in the stored type per hookpoint, norms float32 [n] per hookpoint, flat index [n]) of the tokens of one
        chunk that pass the position and token rules. ``DataError`` for values that are not finite."""
        first = number * self.batch_rows
        rows = np.asarray(self.tokens.tokens_BL[first : first + self.batch_rows])
        ids = torch.from_numpy(rows.astype(np.int64)).to(self.lm.device)
        begin = first * self.tokens.L
        kept_n = np.flatnonzero(self.codes_N[begin : begin + rows.size] == KEPT)
        index = torch.from_numpy(kept_n).to(self.lm.device)
        found, norms = [], []
        captured = self.lm.capture(ids, self.hookpoints)
        for hookpoint in self.hookpoints:
            acts = captured[hookpoint].float().reshape(rows.size, -1)
            norms_N = acts.norm(dim=1).cpu().numpy()
            if not np.isfinite(norms_N).all():
                raise DataError(
                    f"{self.lm.name} gives values that are not finite at {hookpoint} in row {first} or the next "
                    f"{len(rows) - 1}; try --dtype float32. Saved steps are kept"
                )
            found.append(acts.index_select(0, index).to(self.dtype))
            norms.append(norms_N[kept_n])
        return found, norms, begin + kept_n

    @cached_property
    def sample(self) -> "Sample":
        """Whole chunks, evenly spread over the token set, of about 65,536 tokens (or all)."""
        if not self.n_kept:
            raise DataError(f"split {self.tokens.split}: no token passes the position and token rules of the filter")
        n_chunks = min(len(self.counts_C), -(-SAMPLE_TOKENS * len(self.counts_C) // self.n_kept))
        numbers = np.linspace(0, len(self.counts_C) - 1, n_chunks).astype(np.int64).tolist()
        size = self.batch_rows * self.tokens.L
        codes_n = np.concatenate([self.codes_N[n * size : (n + 1) * size] for n in numbers])
        x_ND: list[Tensor] = []  # one preallocated tensor each: parts and their sum would be twice the sample
        parts: list[tuple[list[np.ndarray], np.ndarray]] = []
        begin = 0
        with progress("sample of the stream", total=len(codes_n), unit="tok") as bar:
            for number in numbers:
                found, norms, flat_n = self.chunk(number)
                x_ND = x_ND or [x_nD.new_empty(int((codes_n == KEPT).sum()), x_nD.shape[1]) for x_nD in found]
                for whole_ND, x_nD in zip(x_ND, found, strict=True):
                    whole_ND[begin : begin + len(flat_n)] = x_nD
                begin += len(flat_n)
                parts.append((norms, flat_n))
                bar.advance(min(size, self.tokens.n_tokens - number * size))
        norms_N = [np.concatenate([norms[i] for norms, _ in parts]) for i in range(len(self.hookpoints))]
        return Sample(np.concatenate([flat_n for _, flat_n in parts]), x_ND, norms_N, codes_n)

    def blocks(self, order: Order, first: int, last: int) -> Iterator[Block]:
        """The kept tokens ``first`` to ``last`` (excluded) of the stream, a chunk at a time."""
        limits = [store.norm_limit for store in self.stores]
        token = first
        for number, skip in order.since(first):
            if token >= last:
                return
            x_nD, norms, flat_n = self.chunk(number)
            flats = [flat_n] * len(limits)
            over = [norms_n > limit for norms_n, limit in zip(norms, limits, strict=True)]
            if self.paired:
                over = [np.logical_or.reduce(over)] * len(over)
            for i, over_n in enumerate(over):
                picks_n = self._substituted(number, over_n)
                if picks_n is not None:
                    x_nD[i] = x_nD[i].index_select(0, torch.from_numpy(picks_n).to(x_nD[i].device))
                    flats[i] = flat_n[picks_n]
            block = Block(x_nD, flats).cut(skip, skip + last - token)
            token += len(block)
            yield block

    def _substituted(self, number: int, over_n: np.ndarray) -> np.ndarray | None:
        """Which token stands at each place of a chunk, those over the norm limit replaced; None: each its own."""
        if not over_n.any():
            return None
        good = np.flatnonzero(~over_n)
        if not len(good):
            raise DataError(
                f"every token of rows {number * self.batch_rows} to {(number + 1) * self.batch_rows - 1} is over the "
                "norm limit of the filter: raise --filter.norm-multiple"
            )
        picks_n = np.arange(len(over_n))
        picks_n[over_n] = good[rng("stream-substitutes", number).integers(len(good), size=int(over_n.sum()))]
        return picks_n

    def batches(
        self, batch_tokens: int, *, seed: int, first: int, last: int, tick: Tick | None = None
    ) -> Generator[Batch, None, None]:
        """Batches ``first`` to ``last`` (excluded), each with its part at every hookpoint."""
        window = self.window(batch_tokens)
        begin = first // (window // batch_tokens) * window
        end = -(-last // (window // batch_tokens)) * window
        _ = self.sample  # in this thread: it fixes the norm limits, and the model's lean pass is made with it
        slots = Slots(window, self.widths, self.dtype, self.lm.device)
        feed = Feed(slots, self.blocks(Order(self.counts_C, seed), begin, end), threaded=self.threaded)
        return buffer.batches(feed, batch_tokens, seed=seed, first=first, last=last, tick=tick)


class Sample(NamedTuple):
    """Tokens of some chunks that pass the position and token rules."""

    flat_N: np.ndarray
    """int64, ascending."""
    x_ND: list[Tensor]
    """Per hookpoint."""
    norms_N: list[np.ndarray]
    """float32 per hookpoint."""
    codes_N: np.ndarray
    """uint8 of all tokens of those chunks, without the norm rule."""


@dataclass(frozen=True, eq=False)
class LiveStore:
    """One hookpoint of a stream, with what training reads of a :class:`sae.activations.ActivationStore`.

    :meth:`read` knows the tokens of the sample alone, which :attr:`kept_N` lists: all that training wants beside its
    batches (start, calibration, reference sample) is taken from them.
    """

    stream: LiveStream
    number: int

    @property
    def hookpoint(self) -> str:
        return self.stream.hookpoints[self.number]

    @property
    def tokens(self) -> TokenSet:
        return self.stream.tokens

    @cached_property
    def manifest(self) -> dict[str, Any]:
        """``config`` and ``key`` as of an artefact; the other hookpoints of the pass are no part of them."""
        stream = self.stream
        config = {
            "hookpoint": self.hookpoint, "lm": stream.lm.name, "lm_revision": stream.lm.revision,
            "lm_dtype": str(stream.lm.dtype).removeprefix("torch."), "filter": to_dict(stream.filter_cfg),
            "store_dtype": str(stream.dtype).removeprefix("torch."), "buffer_tokens": stream.cfg.buffer_tokens,
            "batch_rows": stream.batch_rows, "sample_tokens": SAMPLE_TOKENS,
        }  # fmt: skip
        return {"config": config, "key": key_of("stream", STREAM_VERSION, config, {"tokens": self.tokens.key})}

    @property
    def key(self) -> str:
        return str(self.manifest["key"])

    @property
    def d_in(self) -> int:
        return self.stream.widths[self.number]

    @property
    def n_kept(self) -> int:
        """Tokens of one pass of the stream."""
        return self.stream.n_kept

    @cached_property
    def norm_median(self) -> float:
        """Of the sample, in the LM's units."""
        return float(np.median(self.stream.sample.norms_N[self.number]))

    @property
    def norm_limit(self) -> float:
        """Norm above which a token is dropped."""
        multiple = self.stream.filter_cfg.norm_multiple
        return np.inf if multiple is None else multiple * self.norm_median

    @cached_property
    def _kept_places(self) -> np.ndarray:
        return np.flatnonzero(self.stream.sample.norms_N[self.number] <= self.norm_limit)

    @cached_property
    def kept_N(self) -> np.ndarray:
        """int64 flat indices of the sample that pass the whole filter, ascending."""
        return self.stream.sample.flat_N[self._kept_places]

    @property
    def n_tokens(self) -> int:
        """Tokens of the sample, dropped ones with them."""
        return len(self.stream.sample.codes_N)

    @property
    def n_dropped(self) -> dict[str, int]:
        """Tokens of the sample dropped by each rule of the filter."""
        codes = self.stream.sample.codes_N
        by_norm = len(self.stream.sample.flat_N) - len(self.kept_N)
        counted = {name: int((codes == code).sum()) for code, name in REASONS.items()}
        return counted | {REASONS[BY_NORM]: by_norm}

    def read(self, flat: Any) -> Tensor:
        """float32 [n, D] of tokens of the sample, in the order asked for; ``ValueError`` for any other token."""
        wanted = np.asarray(flat, dtype=np.int64)
        places = np.searchsorted(self.stream.sample.flat_N, wanted)
        places = np.minimum(places, len(self.stream.sample.flat_N) - 1)
        if (self.stream.sample.flat_N[places] != wanted).any():
            raise ValueError("a stream on the fly holds the tokens of its sample alone; ask for those of kept_N")
        x_ND = self.stream.sample.x_ND[self.number]
        return x_ND.index_select(0, torch.from_numpy(places).to(x_ND.device)).float()

    def of_batch(self, batch: Batch) -> tuple[Tensor, np.ndarray]:
        """The part of this hookpoint."""
        return batch[self.number]

    def batches(
        self, batch_tokens: int, *, seed: int, epochs: int, first: int = 0
    ) -> Iterator[tuple[Tensor, np.ndarray]]:
        """(x_ND float32, flat indices). Passes follow one another without a break: no token of one is left out."""
        last = epochs * (self.n_kept // batch_tokens)
        with closing(self.stream.batches(batch_tokens, seed=seed, first=first, last=last)) as found:
            for batch in found:
                yield self.of_batch(batch)
