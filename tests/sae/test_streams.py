"""Activations on the fly: their order, their values, the filter, the memory they take; with and without a thread."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from live_killable import HOOKPOINTS, stream

from sae.activations import KEPT, capture_many
from sae.buffer import Order, window_order
from sae.config import FilterConfig, StreamConfig, TokensConfig
from sae.language_model import LanguageModel
from sae.live_pair import LivePair, together
from sae.paired import PairedStore
from sae.streams import LiveStream
from sae.tokens import TokenSet, build_tokens

SUPPORT = Path(__file__).resolve().parent.parent / "support"
SEED = 0
BATCH = 64


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory, tiny_lm: LanguageModel, tiny_texts: Path) -> TokenSet:
    """50 rows of 32: 12 chunks of 4 rows and one of 2."""
    cfg = TokensConfig(
        text=str(tiny_texts), context_tokens=32, train_tokens=32 * 50, explain_tokens=64, calibrate_tokens=64,
        score_tokens=64, test_tokens=64,
    )  # fmt: skip
    return build_tokens(tmp_path_factory.mktemp("tokens"), cfg, tiny_lm.name, tiny_lm.tokenizer)["train"]


def flats(live: LiveStream, n: int, number: int = 0, first: int = 0) -> np.ndarray:
    return np.concatenate([parts[number][1] for parts in live.batches(BATCH, seed=SEED, first=first, last=n)])


# -- order and values -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("prefetch", ["off", "on"])
def test_the_order_is_that_of_one_thread_and_the_values_those_of_the_disk(
    prefetch: str, tiny_lm: LanguageModel, tokens: TokenSet, tmp_path: Path
) -> None:
    """Without the norm rule: chunks permuted per pass, tokens in line, cut into windows, each permuted."""
    cfg = StreamConfig(source="live", buffer_tokens=512, prefetch=prefetch)  # type: ignore[arg-type]
    live = LiveStream(tiny_lm, tokens, HOOKPOINTS, FilterConfig(norm_multiple=None), cfg, batch_rows=4)
    stores = capture_many(tmp_path, tiny_lm, tokens, HOOKPOINTS, filter_cfg=live.filter_cfg, batch_rows=4)
    kept, order, line = set(stores[0].kept_N.tolist()), Order(live.counts_C, SEED), []
    for number in range(3):
        for chunk in order.chunks(number):
            line += [n for n in range(chunk * 4 * 32, min((chunk + 1) * 4 * 32, tokens.n_tokens)) if n in kept]
    assert len(line) == 3 * live.n_kept == 3 * len(kept)
    found = list(live.batches(BATCH, seed=SEED, first=0, last=len(line) // 512 * 8))
    for i, parts in enumerate(found):
        window, at = divmod(i * BATCH, 512)
        wanted = np.array(line)[window * 512 + window_order(SEED, window, 512)[at : at + BATCH]]
        for (x_ND, flat), store in zip(parts, stores, strict=True):
            assert np.array_equal(flat, wanted)
            assert torch.equal(x_ND, store.read(flat)), "bit for bit what the disk store holds"


def test_a_window_is_mixed(tiny_lm: LanguageModel, tokens: TokenSet) -> None:
    """Neighbours share a row no more often than two tokens of their window do, and within a window the correlation of
    neighbouring row numbers is that of chance; in line nearly all neighbours share a row."""
    live = stream(tiny_lm, tokens)
    window = live.window(BATCH)
    windows = np.split(flats(live, 8 * window // BATCH) // 32, 8)
    same = float(np.mean([rows[:-1] == rows[1:] for rows in windows]))
    shares = [np.bincount(rows, minlength=50) / window for rows in windows]
    expected = float(np.mean([share @ share for share in shares]))
    assert abs(same - expected) < 4 * (expected / (8 * window)) ** 0.5 and expected < 0.05
    lag = [float(np.corrcoef(rows[:-1], rows[1:])[0, 1]) for rows in windows]
    assert abs(np.mean(lag)) < 4 / (8 * window) ** 0.5
    in_line = np.flatnonzero(live.codes_N == KEPT) // 32
    assert (in_line[:-1] == in_line[1:]).mean() > 0.9


def test_every_token_comes_once_a_pass(tiny_lm: LanguageModel, tokens: TokenSet) -> None:
    cfg = StreamConfig(source="live", buffer_tokens=4 * BATCH, prefetch="off")
    live = LiveStream(tiny_lm, tokens, HOOKPOINTS[:1], FilterConfig(norm_multiple=None), cfg, batch_rows=4)
    n_batches = 4 * (5 * live.n_kept // (4 * BATCH))
    counts = np.bincount(flats(live, n_batches), minlength=tokens.n_tokens)
    dropped = np.flatnonzero(counts == 0)
    assert np.array_equal(dropped, np.flatnonzero(live.codes_N)) and counts.max() == 5
    assert set(counts[counts > 0]) <= {4, 5}, "the last pass is cut off, none before"
    first = flats(live, live.n_kept // BATCH)
    assert len(np.unique(first)) > 0.95 * len(first)


def test_a_token_over_the_limit_gives_its_place_to_another(tiny_lm: LanguageModel, tokens: TokenSet) -> None:
    plain = LiveStream(
        tiny_lm, tokens, HOOKPOINTS, FilterConfig(norm_multiple=None), StreamConfig(source="live", buffer_tokens=1_024),
        batch_rows=4,
    )  # fmt: skip
    strict = stream(tiny_lm, tokens)
    whole = tiny_lm.capture(torch.from_numpy(np.asarray(tokens.tokens_BL).astype(np.int64)), HOOKPOINTS)
    for i, store in enumerate(strict.stores):
        norms = whole[store.hookpoint].reshape(tokens.n_tokens, -1).norm(dim=1).numpy()
        over = norms > store.norm_limit * (1 + 1e-5)
        every, found = flats(plain, 16, i), flats(strict, 16, i)
        assert over[every].mean() > 0.01 and not over[found].any()
        moved = every != found
        assert (norms[every[moved]] > store.norm_limit * (1 - 1e-5)).all(), "all others stay where they were"
        assert (every[moved] // 128 == found[moved] // 128).all(), "by one of its own chunk"
        n_over = over[strict.codes_N == KEPT].sum()
        assert store.n_dropped["norm"] == pytest.approx(n_over, abs=2) and n_over > 10


@pytest.mark.parametrize("first", [1, 15, 16, 17, 90])
def test_a_stream_may_begin_anywhere(first: int, tiny_lm: LanguageModel, tokens: TokenSet) -> None:
    whole = list(stream(tiny_lm, tokens).batches(BATCH, seed=SEED, first=0, last=100))
    fresh = list(stream(tiny_lm, tokens, prefetch="on").batches(BATCH, seed=SEED, first=first, last=100))
    assert len(fresh) == 100 - first
    for mine, theirs in zip(fresh, whole[first:], strict=True):
        for (x_ND, flat), (y_ND, other) in zip(mine, theirs, strict=True):
            assert torch.equal(x_ND, y_ND) and np.array_equal(flat, other)


def test_a_hookpoint_does_not_depend_on_its_neighbours(tiny_lm: LanguageModel, tokens: TokenSet) -> None:
    """A residual one takes the lean pass and an MLP the model's own, together or alone."""
    names = ("layers.0", "layers.1.mlp", "layers.1", "layers.2.mlp:in")
    both = stream(tiny_lm, tokens, names)
    for i, name in enumerate(names):
        alone = stream(tiny_lm, tokens, (name,))
        assert alone.stores[0].key == both.stores[i].key
        assert np.array_equal(alone.stores[0].kept_N, both.stores[i].kept_N)
        for (mine,), theirs in zip(
            alone.batches(BATCH, seed=SEED, first=0, last=20), both.batches(BATCH, seed=SEED, first=0, last=20),
            strict=True,
        ):  # fmt: skip
            assert torch.equal(mine[0], theirs[i][0]) and np.array_equal(mine[1], theirs[i][1])


def test_the_reading_side(tiny_lm: LanguageModel, tokens: TokenSet, tmp_path: Path) -> None:
    live = stream(tiny_lm, tokens)
    stored = capture_many(tmp_path, tiny_lm, tokens, HOOKPOINTS, filter_cfg=live.filter_cfg, batch_rows=4)
    for store, disk in zip(live.stores, stored, strict=True):
        assert store.d_in == disk.d_in and store.n_dropped == disk.n_dropped and store.n_tokens == disk.n_tokens
        assert np.array_equal(store.kept_N, disk.kept_N), "a text below 65,536 tokens is its own sample"
        assert store.norm_median == pytest.approx(disk.norm_median)
        asked = store.kept_N[[5, 2, 2, 900]]
        assert torch.equal(store.read(asked), disk.read(asked))
        with pytest.raises(ValueError, match="sample alone"):
            store.read([0])
        assert store.key != disk.key
    assert live.stores[0].key != stream(tiny_lm, tokens, buffer_tokens=512).stores[0].key


def test_batches_of_one_store_and_of_several(tiny_lm: LanguageModel, tokens: TokenSet) -> None:
    live = stream(tiny_lm, tokens)
    alone = list(live.stores[1].batches(BATCH, seed=SEED, epochs=1, first=3))
    both = list(together(live.stores[::-1], BATCH, seed=SEED, first=3, last=live.n_kept // BATCH))
    assert len(alone) == len(both) == live.n_kept // BATCH - 3
    assert all(torch.equal(mine[0], parts[0][0]) for mine, parts in zip(alone, both, strict=True))


def test_memory_is_what_was_stated(tiny_lm: LanguageModel, tokens: TokenSet) -> None:
    live = stream(tiny_lm, tokens)
    window, sample = live.window(BATCH), live.sample
    held = sum(x_ND.numel() * x_ND.element_size() for x_ND in sample.x_ND) + window * sum(live.widths) * 2
    indices = window * (24 + 8 * 2) + sample.flat_N.nbytes * 2
    blocks = 2 * 4 * 32 * sum(live.widths) * 2
    assert live.memory_bytes(BATCH) == pytest.approx(held + indices + blocks, rel=0.01)
    assert window == 1_024 and live.window(100) == 1_000
    small = replace(live, cfg=StreamConfig(source="live", buffer_tokens=10**6))
    assert small.window(BATCH) == live.n_kept // BATCH * BATCH, "no more than the text has"


def pair(
    lm: LanguageModel, tokens: TokenSet, prefetch: str = "off", inputs: str = "layers.1.mlp:in"
) -> LivePair:
    return LivePair(stream(lm, tokens, (inputs, "layers.1.mlp"), prefetch=prefetch))


def test_inputs_and_targets_of_one_pass(tiny_lm: LanguageModel, tokens: TokenSet, tmp_path: Path) -> None:
    """Of the same tokens, also where one of the two is over its limit; and those of a stored pair."""
    live = pair(tiny_lm, tokens, inputs="layers.0.mlp")
    rules = live.stream.filter_cfg
    stores = capture_many(tmp_path, tiny_lm, tokens, live.stream.hookpoints, filter_cfg=rules, batch_rows=4)
    stored = PairedStore(*stores)
    assert (live.d_in, live.d_out) == (stored.d_in, stored.d_out) and np.array_equal(live.kept_N, stored.kept_N)
    assert len(live.kept_N) < min(len(live.inputs.kept_N), len(live.targets.kept_N))
    kept = set(live.kept_N.tolist())
    for (x_ND, flat), in together([live], BATCH, seed=SEED, first=2, last=30):
        assert torch.equal(x_ND, stored.read(flat)) and torch.equal(live.read_target(flat), stored.read_target(flat))
        assert set(flat.tolist()) <= kept
    asked = live.kept_N[[3, 1, 500]]
    assert torch.equal(live.read_target(asked), stored.read_target(asked))
    again = pair(tiny_lm, tokens, "on", "layers.0.mlp")
    assert again.key == live.key not in (live.inputs.key, live.targets.key, pair(tiny_lm, tokens).key)
