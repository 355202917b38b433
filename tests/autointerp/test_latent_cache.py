"""The latent cache against a dense encode, its statistics against loops, its neighbours against F x F matrices."""

import json

import numpy as np
import pytest
import torch
from held_out import L, documents, pack, random_sae, store, stores

from autointerp.config import ExemplarConfig
from autointerp.latent_cache import LatentCache, build_latents, build_latents_many, sae_hash, sample_latents
from autointerp.latent_sort import EntrySorter, from_half, to_half
from autointerp.neighbours import nearest_decoders
from autointerp.windows import expand, find_runs, grid_windows, peak_placed
from sae.activations import ActivationStore
from sae.errors import ArtefactError, ConfigError, LeakError

SPLITS = ("explain", "calibrate", "score")


@pytest.fixture(scope="module")
def held_out(tmp_path_factory):
    return stores(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module", params=["topk", "relu"])
def built(request, held_out, tmp_path_factory):
    sae = random_sae(request.param)
    cache = build_latents(tmp_path_factory.mktemp("root"), sae, held_out)
    return sae, cache


def dense(sae, one):
    z = sae.encode(one.read(slice(None)))
    z[~torch.from_numpy(one.keep_N)] = 0
    return z.numpy()


# -- windows -------------------------------------------------------------------------------------------------------


def test_windows_cross_no_border_and_hold_kept_tokens_only(held_out):
    one = held_out["explain"]
    windows = grid_windows(one.keep_N, one.doc_of_N, L)
    assert len(windows) > 100 and windows.length.max() <= 32 and windows.length.min() >= 8
    for i in range(len(windows)):
        at = windows.positions(i)
        assert one.keep_N[at].all() and len(set(one.doc_of_N[at])) == 1 and len(set(at // L)) == 1
        assert one.doc_of_N[at[0]] == windows.doc[i]
    assert np.all(windows.start[1:] >= windows.start[:-1] + windows.length[:-1])
    of = windows.of_flat
    assert all((of[windows.positions(i)] == i).all() for i in range(len(windows)))
    assert (of >= 0).sum() == windows.length.sum()


def test_grid_by_hand():
    keep = np.ones(40, dtype=bool)
    keep[[0, 20, 33]] = False
    doc = np.r_[np.zeros(27), np.ones(13)].astype(np.int32)
    runs = find_runs(keep, doc, 20)
    # Row 0: 1..19; row 1: 21..26 of document 0, 27..32 and 34..39 of document 1.
    assert list(zip(runs.start.tolist(), runs.length.tolist(), strict=True)) == [(1, 19), (21, 6), (27, 6), (34, 6)]
    windows = grid_windows(keep, doc, 20, window_tokens=8, min_window_tokens=3)
    assert windows.start.tolist() == [1, 9, 17, 21, 27, 34] and windows.length.tolist() == [8, 8, 3, 6, 6, 6]
    assert windows.containing(np.array([0, 2, 3, 33, 39])).tolist() == [0, 5]
    start, length = peak_placed(runs, np.array([2, 19, 24]), left_tokens=5, window_tokens=8)
    assert list(zip(start.tolist(), length.tolist(), strict=True)) == [(1, 4), (14, 6), (21, 6)]
    none = grid_windows(np.zeros(40, dtype=bool), doc, 20)
    assert len(none) == 0 and none.of_flat.max() == -1
    with pytest.raises(ConfigError, match="whole rows"):
        find_runs(keep, doc, 7)


def test_expand():
    assert expand(np.array([5, 0, 9]), np.array([2, 0, 3])).tolist() == [5, 6, 9, 10, 11]


# -- entries -------------------------------------------------------------------------------------------------------


def test_entries_equal_a_dense_encode(built, held_out):
    sae, cache = built
    for split in SPLITS:
        z = dense(sae, held_out[split])
        for latent in range(sae.d_sae):
            flat, value = cache.entries(latent, split)
            assert flat.dtype == np.uint32 and flat.tolist() == np.flatnonzero(z[:, latent]).tolist()
            assert np.all(value > 0)
            atol = 1e-6 * max(z[:, latent].max(), 1)
            np.testing.assert_allclose(value, z[flat, latent], rtol=2**-11 * 1.01, atol=atol)


def test_statistics_equal_plain_loops(built, held_out):
    sae, cache = built
    stats = cache.stats
    z = {s: dense(sae, held_out[s]).astype(np.float64) for s in SPLITS}
    for latent in range(0, sae.d_sae, 7):
        row = stats.loc[latent]
        for split in SPLITS:
            a, one, windows = z[split][:, latent], held_out[split], cache.windows(split)
            active = np.flatnonzero(a)
            assert row[f"n_active_{split}"] == active.size
            assert row[f"n_docs_{split}"] == len(set(one.doc_of_N[active]))
            positive = [i for i in range(len(windows)) if a[windows.positions(i)].any()]
            assert row[f"n_windows_{split}"] == len(positive)
            assert cache.positive_windows(latent, split).tolist() == positive
            assert row[f"pi_{split}"] == pytest.approx(len(positive) / len(windows))
        a = z["explain"][held_out["explain"].keep_N, latent]
        assert row["pi"] == row["pi_score"]
        assert row["density_explain"] == pytest.approx((a > 0).mean())
        if not a.any():
            assert np.isnan(row["skew"]) and np.isnan(row["mean_positive"]) and row["max_act"] == 0
            assert len(row["top_tokens"]) == 0
            continue
        assert row["max_act"] == pytest.approx(a.max(), rel=1e-6)
        assert row["mean_act"] == pytest.approx(a.mean(), rel=1e-6)
        assert row["mean_positive"] == pytest.approx(a[a > 0].mean(), rel=1e-6)
        assert row["skew"] == pytest.approx((a**3).mean() / (a**2).mean() ** 1.5, rel=1e-5)
        assert row["kurtosis"] == pytest.approx((a**4).mean() / (a**2).mean() ** 2, rel=1e-5)
        assert np.sum(row["histogram"]) == (a > 0).sum() and len(row["histogram"]) == 50 and row["histogram"][-1] >= 1


def test_top_tokens_by_mean_activation(built, held_out):
    sae, cache = built
    one = held_out["explain"]
    ids, z = one.tokens.tokens_BL.reshape(-1), dense(sae, one)
    for latent in range(0, sae.d_sae, 11):
        mean = {t: z[ids == t, latent].sum() / (((ids == t) & one.keep_N).sum() + 1) for t in set(ids.tolist())}
        best = sorted((t for t in mean if mean[t] > 0), key=lambda t: (-mean[t], t))[:20]
        found = cache.stats.loc[latent, "top_tokens"].tolist()
        assert [round(mean[t], 5) for t in found] == [round(mean[t], 5) for t in best]


def test_a_dead_latent_and_a_dropped_token_leave_no_trace(held_out, tmp_path):
    sae = random_sae("relu")
    cache = build_latents(tmp_path, sae, held_out)
    assert cache.stats.loc[sae.d_sae - 1, "n_active"] == 0
    assert cache.entries(sae.d_sae - 1, "score").flat_n.size == 0
    for latent in range(sae.d_sae):
        assert held_out["score"].keep_N[cache.entries(latent, "score").flat_n].all()
    assert cache.keep("score").tolist() == held_out["score"].keep_N.tolist()


def test_blocks_and_buffers_change_nothing(held_out, tmp_path, monkeypatch):
    sae = random_sae("relu")
    whole = build_latents(tmp_path / "a", sae, held_out)
    original = EntrySorter.__init__
    monkeypatch.setattr(EntrySorter, "__init__", lambda self, *a, **k: original(self, *a, buffer_entries=700))
    monkeypatch.setattr("autointerp.latent_sort.EntrySorter.chunks.__defaults__", (999,), raising=False)
    pieces = build_latents(tmp_path / "b", sae, held_out, block_tokens=97)
    for split in SPLITS:
        for latent in range(sae.d_sae):
            a, b = whole.entries(latent, split), pieces.entries(latent, split)
            assert a.flat_n.tolist() == b.flat_n.tolist()
            # A matrix product over another number of rows may differ in its last bit.
            np.testing.assert_allclose(a.value_n, b.value_n, rtol=1e-3)
    assert not list((tmp_path / "b").rglob("run*.npy")) and not list((tmp_path / "b").rglob("scratch*"))


@pytest.mark.parametrize("buffer_entries", [10, 1000, 10**6])
def test_sorter_in_runs_and_chunks(tmp_path, buffer_entries):
    rng = np.random.default_rng(0)
    sorter = EntrySorter(tmp_path / "scratch", 40, buffer_entries=buffer_entries)
    added = []
    for start in range(0, 3000, 100):
        latent = rng.integers(0, 40, size=50)
        latent[latent == 17] = 18
        flat = np.sort(rng.integers(start, start + 100, size=50))
        value = rng.random(50).astype(np.float32)
        sorter.add(flat, latent, value)
        added += list(zip(latent.tolist(), flat.tolist(), value.tolist(), strict=True))
    expected = sorted(added, key=lambda e: e[:2])
    found = []
    for chunk in sorter.chunks(chunk_entries=173):
        segment = chunk.segment + chunk.first
        found += list(zip(segment.tolist(), chunk.flat.tolist(), chunk.value.tolist(), strict=True))
    sorter.close()
    assert [e[:2] for e in found] == [e[:2] for e in expected] and sorted(found) == sorted(expected)
    assert not (tmp_path / "scratch").exists()


def test_half_precision_never_loses_an_activation():
    value = np.array([1.0, 1e-3, 1e-9, 0.5], dtype=np.float32)
    half = to_half(value, np.ones(4, dtype=np.float32))
    assert (half > 0).all() and from_half(half, 1.0)[3] == 0.5
    np.testing.assert_allclose(from_half(half, 2.0)[:2], 2 * value[:2], rtol=2**-11)


# -- several SAEs, keys, errors ------------------------------------------------------------------------------------


@pytest.fixture
def reads(monkeypatch):
    """Tokens per call of ``ActivationStore.read``, by split."""
    found = {s: [] for s in SPLITS}
    original = ActivationStore.read

    def read(self, flat):
        found[self.tokens.split].append(len(flat))
        return original(self, flat)

    monkeypatch.setattr(ActivationStore, "read", read)
    return found


def test_several_saes_share_one_read(tmp_path, held_out, reads):
    saes = [random_sae("topk", seed=1), random_sae("relu", seed=2)]
    caches = build_latents_many(tmp_path, saes, held_out, block_tokens=512)
    for split, one in held_out.items():
        assert sum(reads[split]) == one.n_kept and max(reads[split]) <= 512  # every kept token was read once
    alone = build_latents(tmp_path / "alone", saes[1], held_out, block_tokens=512)
    assert caches[1].key == alone.key and caches[0].key != alone.key
    for name in ("latents.parquet", "score.flat.u32.npy", "score.value.f16.npy"):
        assert (caches[1].folder / name).read_bytes() == (alone.folder / name).read_bytes()
    for found in reads.values():
        found.clear()
    build_latents_many(tmp_path, saes, held_out)
    assert not any(reads.values())  # complete: nothing is read again
    build_latents_many(tmp_path, saes[:1], held_out, force=True)
    assert all(reads.values())


def test_the_key_covers_weights_and_windows(tmp_path, held_out):
    sae = random_sae()
    first = build_latents(tmp_path, sae, held_out).key
    assert build_latents(tmp_path, sae, held_out, window_tokens=16).key != first
    before = sae_hash(sae)
    sae.W_dec_FD[0, 0] += 1e-3
    assert sae_hash(sae) != before and build_latents(tmp_path, sae, held_out).key != first


def test_refusals(tmp_path, held_out):
    sae = random_sae()
    with pytest.raises(ConfigError, match="explain"):
        build_latents(tmp_path, sae, {"score": held_out["score"]})
    with pytest.raises(ConfigError, match="train"):
        build_latents(tmp_path, sae, held_out | {"train": held_out["score"]})
    with pytest.raises(ConfigError, match="width"):
        build_latents(tmp_path, random_sae(d_in=8), held_out)
    from dataclasses import replace

    from sae.config import SubjectMeta

    meta = SubjectMeta(lm="x", lm_revision="y", hookpoint="layers.1", lm_dtype="float32", context_length_tokens=L,
                       tokens_key=held_out["score"].tokens.key)
    sae.cfg = replace(sae.cfg, meta=meta)
    with pytest.raises(LeakError, match="score"):
        build_latents(tmp_path, sae, held_out)
    assert build_latents(tmp_path, sae, held_out, allow_train_tokens=True).d_sae == 64
    cache = build_latents(tmp_path, random_sae(), held_out)
    with pytest.raises(ConfigError, match="not 64"):
        cache.entries(64, "score")
    with pytest.raises(ConfigError, match="'test'"):
        cache.entries(0, "test")


def test_a_killed_build_leaves_nothing(tmp_path, held_out, monkeypatch):
    original = ActivationStore.read

    def read(self, flat):
        if self.tokens.split == "score":
            raise OSError("gone")
        return original(self, flat)

    monkeypatch.setattr(ActivationStore, "read", read)
    with pytest.raises(OSError, match="gone"):
        build_latents(tmp_path, random_sae(), held_out)
    assert list((tmp_path / "latents").iterdir()) == []
    monkeypatch.undo()
    folder = build_latents(tmp_path, random_sae(), held_out).folder
    (folder / "manifest.json").unlink()
    with pytest.raises(ArtefactError, match="not a complete artefact"):
        LatentCache.open(folder)


def test_equal_input_equal_bytes(tmp_path, held_out):
    a, b = (build_latents(tmp_path / n, random_sae(), held_out).folder for n in "ab")
    files = json.loads((a / "manifest.json").read_text())["files"]
    other = json.loads((b / "manifest.json").read_text())["files"]
    assert files.keys() == other.keys() and len(files) >= 17
    assert all(files[n]["sha256"] == other[n]["sha256"] for n in files if n != "cache.json")


# -- neighbours and samples ----------------------------------------------------------------------------------------


def test_neighbours_equal_dense_references(built):
    sae, cache = built
    unit = torch.nn.functional.normalize(sae.W_dec_FD, dim=1)
    cosine = (unit @ unit.T).numpy()
    np.fill_diagonal(cosine, -np.inf)
    near, values = nearest_decoders(sae, np.arange(sae.d_sae))
    np.testing.assert_allclose(values, -np.sort(-cosine, axis=1)[:, :10], atol=1e-5)
    assert cache.nearest(3) == near[3].tolist() and 3 not in near[3]
    windows = cache.windows("explain")
    x = np.zeros((sae.d_sae, len(windows)))
    for latent in range(sae.d_sae):
        x[latent, cache.positive_windows(latent, "explain")] = 1
    shared = x @ x.T
    size = x.sum(1)
    jaccard = shared / np.maximum(size[:, None] + size - shared, 1)
    np.fill_diagonal(jaccard, 0)
    found = cache.co_occurring(range(sae.d_sae))
    for latent in range(sae.d_sae):
        best = sorted((i for i in range(sae.d_sae) if jaccard[latent, i] > 0), key=lambda i: (-jaccard[latent, i], i))
        np.testing.assert_allclose(jaccard[latent, found[latent]], jaccard[latent, best[:10]], atol=1e-6)


def test_sample_is_uniform_over_the_eligible(built):
    _, cache = built
    cfg = ExemplarConfig(min_windows=(5, 3, 8))
    eligible = cache.eligible(cfg)
    counts = [cache.stats[f"n_windows_{s}"].to_numpy() for s in SPLITS]
    assert eligible.tolist() == [i for i in range(64) if all(c[i] >= m for c, m in zip(counts, (5, 3, 8), strict=True))]
    sample = sample_latents(cache, 5, 0, cfg)
    assert sample.latents.tolist() == sorted(set(sample.latents.tolist())) and set(sample.latents) <= set(eligible)
    assert (sample.requested, sample.eligible) == (5, eligible.size)
    assert sample.alive == int((cache.stats["n_active"] > 0).sum())
    assert sample_latents(cache, 5, 0, cfg).latents.tolist() == sample.latents.tolist()
    assert sample_latents(cache, 5, 1, cfg).latents.tolist() != sample.latents.tolist()
    assert sample_latents(cache, 10**6, 0, cfg).latents.tolist() == eligible.tolist()
    hits = np.bincount(np.concatenate([sample_latents(cache, 5, s, cfg).latents for s in range(400)]), minlength=64)
    assert hits[eligible].min() > 0 and hits.sum() == 2000


def test_the_cache_finds_its_tokens_again(tmp_path, built, held_out):
    _, cache = built
    assert cache.tokens("score").key == held_out["score"].tokens.key and cache.splits == SPLITS
    root = tmp_path / "moved"
    sae = random_sae()
    folder = build_latents(tmp_path / "root", sae, stores(tmp_path / "root", 30)).folder
    (tmp_path / "root").rename(root)
    assert LatentCache.open(root / "latents" / folder.name).tokens("explain").n_docs > 10


def test_one_document_and_no_windows(tmp_path):
    held = {s: store(pack([documents(s, 1)[0] * 9], s, tmp_path), tmp_path) for s in SPLITS}
    cache = build_latents(tmp_path, random_sae(), held)
    assert cache.stats["n_docs_explain"].max() == 1
    held["score"] = store(held["score"].tokens, tmp_path, keep="none")
    cache = build_latents(tmp_path, random_sae(), held)
    assert cache.stats["n_active_score"].sum() == 0 and cache.stats["pi"].max() == 0 and cache.eligible().size == 0
    assert cache.entries(0, "score").flat_n.size == 0
