"""The activation store: values, filter by rule, norm median, batches, reading order, reuse."""

from pathlib import Path

import numpy as np
import pytest
import torch

from sae.activations import BY_NORM, BY_POSITION, BY_TOKEN, KEPT, ActivationStore, capture_activations, filter_codes
from sae.config import FilterConfig, TokensConfig
from sae.errors import ArtefactError, ConfigError, DataError
from sae.language_model import LanguageModel
from sae.tokens import TokenSet, build_tokens

HOOKPOINT = "layers.1"


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory, tiny_lm: LanguageModel, tiny_texts: Path) -> TokenSet:
    cfg = TokensConfig(
        text=str(tiny_texts), context_tokens=32, train_tokens=32 * 21, explain_tokens=64, calibrate_tokens=64,
        score_tokens=64, test_tokens=64,
    )  # fmt: skip
    return build_tokens(tmp_path_factory.mktemp("tokens"), cfg, tiny_lm.name, tiny_lm.tokenizer)["train"]


@pytest.fixture(scope="module")
def reference(tokens: TokenSet, tiny_lm: LanguageModel) -> torch.Tensor:
    """[N, D] by hooks, one row at a time."""
    rows = [torch.from_numpy(r[None].astype(np.int64)) for r in tokens.tokens_BL]
    return torch.cat([tiny_lm.capture_by_hooks(r, [HOOKPOINT])[HOOKPOINT][0] for r in rows])


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, tiny_lm: LanguageModel, tokens: TokenSet) -> ActivationStore:
    return capture_activations(tmp_path_factory.mktemp("store"), tiny_lm, tokens, HOOKPOINT, store_dtype="float32")


def test_float32_holds_what_the_model_gives(store: ActivationStore, reference: torch.Tensor) -> None:
    assert (store.n_tokens, store.d_in) == (21 * 32, 32)
    torch.testing.assert_close(store.read(slice(None)), reference, rtol=1e-4, atol=1e-4)


def test_bfloat16_holds_it_rounded(tmp_path: Path, tiny_lm, tokens: TokenSet, reference: torch.Tensor) -> None:
    rounded = capture_activations(tmp_path, tiny_lm, tokens, HOOKPOINT)
    assert (rounded.folder / "acts_ND.bin").stat().st_size == 2 * reference.numel()
    found = rounded.read(slice(None))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, reference, rtol=2**-8 + 1e-4, atol=1e-3)
    assert not torch.equal(found, reference)


@pytest.mark.parametrize("batch_rows", [1, 4, 100])
def test_rows_per_batch_change_nothing(
    tmp_path: Path, tiny_lm, tokens, store: ActivationStore, batch_rows: int
) -> None:
    other = capture_activations(tmp_path, tiny_lm, tokens, HOOKPOINT, store_dtype="float32", batch_rows=batch_rows)
    assert other.key == store.key and np.array_equal(other.codes_N, store.codes_N)
    torch.testing.assert_close(other.read(slice(None)), store.read(slice(None)), rtol=1e-4, atol=1e-5)


def test_read_keeps_the_order_asked_for(store: ActivationStore) -> None:
    everything = store.read(slice(None))
    flat = np.array([9, 3, 3, store.n_tokens - 1, 0])
    for index in (flat, torch.from_numpy(flat), flat.tolist()):
        assert torch.equal(store.read(index), everything[flat])
    assert torch.equal(store.read(slice(5, 50, 3)), everything[5:50:3])
    assert store.read(np.array([], dtype=np.int64)).shape == (0, store.d_in)


def test_documents_follow_the_tokens(store: ActivationStore) -> None:
    assert np.array_equal(store.doc_of_N, store.tokens.doc_ids_BL().ravel()) and store.doc_of_N.dtype == np.int32


def test_codes_and_counts_by_rule(store: ActivationStore, reference: torch.Tensor) -> None:
    ids, position = np.asarray(store.tokens.tokens_BL).ravel(), np.arange(store.n_tokens) % 32
    codes = store.codes_N
    assert ((codes == BY_POSITION) == (position == 0)).all()
    assert ((codes == BY_TOKEN) == ((position > 0) & (ids <= 2))).all() and (codes == BY_TOKEN).any()
    plain = (position > 0) & (ids > 2)
    norms = reference.norm(dim=1).numpy()
    assert store.norm_median == pytest.approx(np.median(norms[plain]), rel=1e-5)
    assert ((codes == BY_NORM) == (plain & (norms > 5 * store.norm_median))).all()
    assert store.n_dropped == {
        "position": 21, "token": int((codes == BY_TOKEN).sum()), "norm": int((codes == BY_NORM).sum())
    }  # fmt: skip
    assert store.n_kept == store.n_tokens - sum(store.n_dropped.values()) == store.keep_N.sum()
    assert np.array_equal(store.kept_N, np.flatnonzero(codes == KEPT))


def test_the_rules_come_in_order_and_can_be_switched_off(tokens: TokenSet) -> None:
    """A row prefix counts as `position` though it is special, a special token as `token` though its norm is large."""
    shape = tokens.tokens_BL.shape
    norms = np.ones(shape, dtype=np.float32)
    norms[0, 0] = norms[0, 5] = 1e4
    special = (int(tokens.tokens_BL[0, 5]),)
    column = int(np.flatnonzero(tokens.tokens_BL[1, 1:] != special[0])[0]) + 1
    norms[1, column] = 5.0  # the limit itself stays
    code = filter_codes(tokens, norms.ravel(), special, FilterConfig(), None)[0].reshape(shape)
    assert (code[0, 0], code[0, 5], code[1, column]) == (BY_POSITION, BY_TOKEN, KEPT)
    norms[1, column] = 5.01
    assert filter_codes(tokens, norms.ravel(), special, FilterConfig(), None)[0].reshape(shape)[1, column] == BY_NORM
    off = FilterConfig(drop_positions=(), drop_special=False, norm_multiple=None)
    assert not filter_codes(tokens, norms.ravel(), special, off, None)[0].any()
    far = FilterConfig(drop_positions=(0, 3, 999))
    assert (filter_codes(tokens, norms.ravel(), (), far, None)[0].reshape(shape) == BY_POSITION).sum() == 2 * shape[0]


def test_a_given_median_is_used(tmp_path: Path, tiny_lm, tokens: TokenSet, store: ActivationStore) -> None:
    low = capture_activations(
        tmp_path, tiny_lm, tokens, HOOKPOINT, store_dtype="float32", norm_median=store.norm_median / 5
    )
    norms = store.read(store.kept_N).norm(dim=1).numpy()
    assert low.norm_median == store.norm_median / 5 and low.key != store.key
    assert low.n_dropped["norm"] == (norms > store.norm_median).sum() + store.n_dropped["norm"]
    assert low.n_kept == pytest.approx(store.n_kept / 2, abs=2)


def test_nothing_left_is_an_error(tokens: TokenSet) -> None:
    with pytest.raises(DataError, match="no token passes"):
        filter_codes(tokens, np.ones(tokens.n_tokens), tuple(range(259)), FilterConfig(), None)


@pytest.mark.parametrize("size", [1, 64, 10_000])
def test_an_epoch_is_a_permutation_of_the_kept_tokens(store: ActivationStore, size: int) -> None:
    epochs = [list(store.batches(size, seed=3, epochs=2))]
    flat = [f for _, f in epochs[0]]
    per_epoch = store.n_kept // size
    assert len(flat) == 2 * per_epoch and all(len(f) == size for f in flat)
    for epoch in (flat[:per_epoch], flat[per_epoch:]):
        seen = np.concatenate([*epoch, np.empty(0, np.int64)])
        assert len(set(seen.tolist())) == len(seen) == per_epoch * size and set(seen) <= set(store.kept_N)
    if per_epoch:
        assert not np.array_equal(np.concatenate(flat[:per_epoch]), np.concatenate(flat[per_epoch:]))
        assert not np.array_equal(np.sort(np.concatenate(flat[:per_epoch])), np.concatenate(flat[:per_epoch]))


def test_batches_depend_on_the_seed_alone(store: ActivationStore) -> None:
    def run(seed: int, epochs: int = 1) -> list[np.ndarray]:
        return [f for _, f in store.batches(50, seed=seed, epochs=epochs)]

    assert all(map(np.array_equal, run(1), run(1))) and all(map(np.array_equal, run(1, 2), run(1)))
    assert not any(map(np.array_equal, run(1), run(2)))
    x, flat = next(store.batches(50, seed=1, epochs=1))
    assert x.dtype == torch.float32 and torch.equal(x, store.read(flat))


def test_second_capture_reuses(tmp_path: Path, tiny_lm: LanguageModel, tokens: TokenSet) -> None:
    first = capture_activations(tmp_path, tiny_lm, tokens, "layers.0")
    stamp, raw = (first.folder / "manifest.json").stat().st_mtime_ns, (first.folder / "acts_ND.bin").read_bytes()
    calls = []
    handle = tiny_lm.blocks[0].register_forward_hook(lambda *_: calls.append(1))
    embedded = tiny_lm.decoder.embed_tokens.register_forward_hook(lambda *_: calls.append(1))
    try:
        assert capture_activations(tmp_path, tiny_lm, tokens, "layers.0").key == first.key and not calls
        assert (first.folder / "manifest.json").stat().st_mtime_ns == stamp
        again = capture_activations(tmp_path, tiny_lm, tokens, "layers.0", force=True)
    finally:
        handle.remove()
        embedded.remove()
    assert calls and (again.folder / "acts_ND.bin").read_bytes() == raw
    (first.folder / "manifest.json").unlink()
    with pytest.raises(ArtefactError):
        ActivationStore.open(first.folder, tokens)


def test_values_that_are_not_finite_stop_it(tmp_path: Path, tiny_lm_dir: Path, tokens: TokenSet) -> None:
    lm = LanguageModel.load(str(tiny_lm_dir), dtype="float32")
    with torch.no_grad():
        lm.blocks[1].mlp.down_proj.weight[0, 0] = torch.inf
    with pytest.raises(DataError, match="not finite at layers.1"):
        capture_activations(tmp_path, lm, tokens, HOOKPOINT)
    assert not list(tmp_path.glob("activations/*"))


def test_an_unknown_hookpoint_leaves_nothing_behind(tmp_path: Path, tiny_lm, tokens: TokenSet) -> None:
    with pytest.raises(ConfigError, match=r"layers\.99"):
        capture_activations(tmp_path, tiny_lm, tokens, "layers.99")
    assert not list(tmp_path.glob("activations/*"))
