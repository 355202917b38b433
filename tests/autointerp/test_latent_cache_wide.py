"""The latent cache of wide SAEs and of many: neighbours without F x F, memory, open files, disk; the columns beside."""

import json
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from dataclasses import replace

import numpy as np
import pytest
import torch
from held_out import L, random_sae, stores

from autointerp import latent_cache
from autointerp.config import ExemplarConfig
from autointerp.exemplars import build_exemplars
from autointerp.latent_cache import build_latents, build_latents_many, sae_hash
from autointerp.latent_sort import EntrySorter
from autointerp.neighbours import nearest_decoders
from sae.config import SubjectMeta
from sae.errors import ConfigError
from sae.manifest import key_of

SPLITS = ("explain", "calibrate", "score")


@pytest.fixture(scope="module")
def held_out(tmp_path_factory):
    return stores(tmp_path_factory.mktemp("text"), 60)


# -- neighbours ----------------------------------------------------------------------------------------------------


def test_nearest_decoders_equal_a_dense_reference():
    sae = random_sae(d_sae=256, d_in=8)
    unit = torch.nn.functional.normalize(sae.W_dec_FD.double(), dim=1)
    cosine = (unit @ unit.T).numpy()
    np.fill_diagonal(cosine, -np.inf)
    near, values = nearest_decoders(sae, np.arange(256))
    assert near.tolist() == np.argsort(-cosine, axis=1)[:, :10].tolist()
    np.testing.assert_allclose(values, -np.sort(-cosine, axis=1)[:, :10], atol=1e-6)
    some, _ = nearest_decoders(sae, [200, 3])
    assert some.tolist() == near[[200, 3]].tolist()


MEASURED = """
import resource, sys
import numpy as np, torch
from scipy.sparse import random_array
from held_out import random_sae
from autointerp.neighbours import most_overlapping, nearest_decoders
torch.set_num_threads(1)
sae = random_sae(d_sae=16_384, d_in=4)
nearest_decoders(sae, [0])
matrix = random_array((16_384, 200), density=0.01, format="csr", rng=np.random.default_rng(0))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
near, _ = nearest_decoders(sae, np.arange(0, 16_384, 8))
most_overlapping(matrix, range(200))
assert near.shape == (2048, 10)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_neighbours_need_no_square_matrix():
    """At F = 16,384 a dense F x F float32 matrix would be 1.07 GB. In a process of its own: the peak of this one may
    have been higher before."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", MEASURED], capture_output=True, text=True, env=environment, check=True, timeout=300
    )
    assert int(done.stdout) < 150_000  # KiB


def test_a_wide_sae_has_neighbours_where_it_fires(tmp_path, held_out, monkeypatch):
    """Before, an SAE of more than 16,384 latents had none, and no hard negative of the kind decoder_near."""
    sae = random_sae("relu")
    sae.b_enc_F.sub_(1.5)  # rare enough that not every window has a neighbour of the first kind
    config = {"window_tokens": 6, "min_window_tokens": 4}
    cfg = ExemplarConfig(**config, left_tokens=4, min_windows=(3, 2, 3))
    narrow = build_latents(tmp_path / "narrow", sae, held_out, **config)
    inputs = {"sae": sae_hash(sae)} | {f"activations.{s}": held_out[s].key for s in sorted(SPLITS)}
    assert narrow.key == key_of("latents", 1, config, inputs)  # caches from before still hold
    monkeypatch.setattr(latent_cache, "EAGER_NEIGHBOURS_D_SAE", 32)
    wide = build_latents(tmp_path / "wide", sae, held_out, **config)
    assert wide.key != narrow.key and wide.nearest(sae.d_sae - 1) == [] and narrow.nearest(sae.d_sae - 1) != []
    alive = np.flatnonzero(wide.stats["n_active"] > 0).tolist()
    assert alive and all(wide.nearest(i) == narrow.nearest(i) and len(wide.nearest(i)) == 10 for i in alive)
    latents = wide.eligible(cfg)[:5]
    tables = [build_exemplars(tmp_path / str(i), c, latents, cfg) for i, c in enumerate((narrow, wide))]
    kinds = [[(e.kind, e.row, e.start, e.stratum) for i in t.latents for e in t.scored(i)] for t in tables]
    assert kinds[0] == kinds[1] and any(kind == "decoder_near" for kind, *_ in kinds[1])


# -- many SAEs, many runs ------------------------------------------------------------------------------------------


def test_many_saes_share_one_buffer_and_one_text(tmp_path, held_out, monkeypatch):
    buffers, grids = [], []
    original, cut = EntrySorter.__init__, latent_cache.grid_windows

    def sorter(self, *args, buffer_entries):
        buffers.append(buffer_entries)
        original(self, *args, buffer_entries=buffer_entries)

    monkeypatch.setattr(EntrySorter, "__init__", sorter)
    monkeypatch.setattr(latent_cache, "grid_windows", lambda *a, **k: grids.append(1) or cut(*a, **k))
    monkeypatch.setattr(latent_cache, "MIN_BUFFER_ENTRIES", 100)
    monkeypatch.setattr(latent_cache, "BUFFER_ENTRIES", 1500)
    saes = [random_sae("topk", seed=i) for i in range(5)]
    caches = build_latents_many(tmp_path / "many", saes, held_out, block_tokens=64)
    assert set(buffers) == {300} and len(buffers) == 15 and len(grids) == 3
    monkeypatch.undo()
    alone = build_latents(tmp_path / "alone", saes[2], held_out, block_tokens=64)
    for name in sorted(p.name for p in alone.folder.glob("*.npy")) + ["latents.parquet"]:
        assert (alone.folder / name).read_bytes() == (caches[2].folder / name).read_bytes()


def test_runs_stay_closed_until_they_are_joined(tmp_path):
    """As many open files as runs would end a long text at the system's limit."""
    sorter = EntrySorter(tmp_path / "scratch", 50, buffer_entries=8)
    rng, n = np.random.default_rng(0), 400
    for start in range(n):
        sorter.add(np.arange(8) + 8 * start, rng.integers(0, 50, 8), rng.random(8).astype(np.float32))
    before, most, entries = len(os.listdir("/proc/self/fd")), 0, 0
    for chunk in sorter.chunks(chunk_entries=500):
        most = max(most, len(os.listdir("/proc/self/fd")) - before)
        entries += chunk.flat.size
        for i in range(chunk.ptr.size - 1):
            assert np.all(np.diff(chunk.flat[chunk.ptr[i] : chunk.ptr[i + 1]].astype(np.int64)) > 0)
    assert len(list((tmp_path / "scratch").glob("*.value.npy"))) == n and most < 10 and entries == 8 * n
    sorter.close()
    assert not (tmp_path / "scratch").exists()


def test_too_much_disk_is_refused_after_the_first_block(tmp_path, held_out, monkeypatch):
    """Four activations a token, kept in 6 bytes, of the longest split also in 8 for a while; two SAEs."""
    saes = [random_sae("topk", seed=i) for i in range(2)]
    n = [held_out[s].n_kept for s in SPLITS]
    needed = 2 * 4 * (6 * sum(n) + 8 * max(n)) / 1e9
    reads = []
    original = type(held_out["explain"]).read
    monkeypatch.setattr(type(held_out["explain"]), "read", lambda self, at: reads.append(1) or original(self, at))
    with pytest.raises(ConfigError, match="8 activations a token"):
        build_latents_many(tmp_path, saes, held_out, block_tokens=256, max_disk_gb=0.98 * needed)
    assert len(reads) == 1 and list((tmp_path / "latents").iterdir()) == []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: namedtuple("Usage", "free")(int(needed * 0.98e9)))
    with pytest.raises(ConfigError, match="free"):
        build_latents_many(tmp_path, saes, held_out)
    monkeypatch.undo()
    caches = build_latents_many(tmp_path, saes, held_out, max_disk_gb=1.02 * needed)
    entries = sum(c.counts[s]["n_entries"] for c in caches for s in SPLITS)
    assert 0.95 < entries / (8 * sum(n)) <= 1.0
    sizes = [f.stat().st_size for c in caches for f in c.folder.iterdir() if ".flat." in f.name or ".value." in f.name]
    assert sum(sizes) - 128 * len(sizes) == latent_cache.ENTRY_BYTES * entries  # 6 bytes and a header a file



# -- columns -------------------------------------------------------------------------------------------------------


def test_positions_documents_and_origin(tmp_path, held_out):
    sae = random_sae("relu")
    cache = build_latents(tmp_path / "a", sae, held_out)
    one = held_out["explain"]
    z = sae.encode(one.read(slice(None))).numpy()
    z[~one.keep_N] = 0
    for latent in range(sae.d_sae):
        row, active = cache.stats.loc[latent], np.flatnonzero(z[:, latent])
        if not active.size:
            assert np.isnan(row["share_position_1"]) and row["density_doc_explain"] == 0
            continue
        assert row["share_position_0"] == 0  # the prefix is never encoded
        assert row["share_position_1"] == pytest.approx(np.mean(active % L == 1))
        assert row["density_doc_explain"] == pytest.approx(len(set(one.doc_of_N[active])) / one.tokens.n_docs)
    assert "n_non_finite" not in cache.stats and cache.stats["share_position_1"].max() > 0
    assert json.loads((cache.folder / "cache.json").read_text())["trained_on"] == "unknown"
    meta = SubjectMeta(lm="x", lm_revision="y", hookpoint="layers.1", lm_dtype="float32", context_length_tokens=L,
                       tokens_key="0123456789abcdef")  # fmt: skip
    sae.cfg = replace(sae.cfg, meta=meta)
    known = build_latents(tmp_path / "b", sae, held_out)
    assert json.loads((known.folder / "cache.json").read_text())["trained_on"] == "0123456789abcdef"
