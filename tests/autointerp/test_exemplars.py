"""Exemplars: what is drawn, what is verified, and that nothing shown is ever scored (AUTOINTERP 2 and 9)."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from held_out import PREFIX, L, documents, pack, random_sae, store, stores

from autointerp import negatives
from autointerp.config import ExemplarConfig
from autointerp.exemplar_draws import LatentDraw, quantile_groups, quotas, read_texts
from autointerp.exemplars import ExemplarTable, assert_no_leak, build_exemplars, draw_pairs
from autointerp.latent_cache import build_latents
from autointerp.negatives import STRATA, find_silent
from autointerp.pattern_explainer import pairs_of
from autointerp.records import NEGATIVE_KINDS, Exemplar
from autointerp.windows import run_bounds
from sae.errors import ConfigError, LeakError
from sae.manifest import rng

SPLITS = ("explain", "calibrate", "score")
CFG = ExemplarConfig(
    window_tokens=12, min_window_tokens=4, left_tokens=8, explain_top=6, explain_silent=5, explain_random=8,
    calibrate_positive=4, calibrate_silent=4, score_positive=12, score_silent=14, score_hard=6, min_windows=(6, 3, 8),
)


def cache_of(root, held_out, sae=None, cfg=CFG):
    options = {"window_tokens": cfg.window_tokens, "min_window_tokens": cfg.min_window_tokens}
    return build_latents(root, sae or random_sae(), held_out, **options)


@pytest.fixture(scope="module")
def held_out(tmp_path_factory):
    return stores(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def cache(held_out, tmp_path_factory):
    return cache_of(tmp_path_factory.mktemp("root"), held_out)


@pytest.fixture(scope="module")
def table(cache, tmp_path_factory):
    return build_exemplars(tmp_path_factory.mktemp("out"), cache, cache.eligible(CFG)[:20], CFG)


def every(table):
    return [e for i in table.latents for s in SPLITS for e in table.exemplars(i, s)]


def of_kind(table, latent, split, kind):
    return [e for e in table.exemplars(latent, split) if e.kind == kind]


def dense(sae, one):
    z = sae.encode(one.read(slice(None))).numpy()
    z[~one.keep_N] = 0
    return z


def test_every_window_shows_what_the_sae_does_there(table, held_out):
    """Tokens, activations and silence against a dense encode, the check peers leave out."""
    z = {s: dense(random_sae(), held_out[s]) for s in SPLITS}
    assert np.mean(z["score"][held_out["score"].keep_N] > 0) > 0.05  # unchecked, half the negatives would be active
    assert len(every(table)) > 500
    for e in every(table):
        one = held_out[e.split]
        at = e.row * L + e.start + np.arange(len(e.token_ids))
        assert e.token_ids == tuple(one.tokens.tokens_BL.reshape(-1)[at].tolist()) and PREFIX not in e.token_ids
        np.testing.assert_allclose(e.acts, z[e.split][at, e.latent], rtol=1e-3, atol=1e-5)
        assert one.keep_N[at].all() and len(set(one.doc_of_N[at])) == 1 and e.start + len(at) <= L
        assert one.tokens.sources[one.doc_of_N[at[0]]] == e.source
        if e.kind in NEGATIVE_KINDS:
            assert not any(e.acts) and e.peak == -1 and e.stratum in STRATA
        else:
            assert e.acts[e.peak] > 0 and e.stratum == "" and e.neighbour is None
            if e.kind != "random_positive":
                assert e.acts[e.peak] == max(e.acts) or e.split == "explain"


def test_grid_windows_for_scoring_and_peak_placed_ones_for_explaining(table, cache):
    for split in ("calibrate", "score"):
        windows = cache.windows(split)
        grid = set(zip(windows.start.tolist(), windows.length.tolist(), strict=True))
        for latent in table.latents:
            assert all((e.row * L + e.start, len(e.token_ids)) in grid for e in table.exemplars(latent, split))
    runs = read_texts(cache)[0]["explain"].runs
    bounds = {}
    for s, n in zip(runs.start.tolist(), runs.length.tolist(), strict=True):
        bounds.update(dict.fromkeys(range(s, s + n), (s, s + n)))
    for e in every(table):
        if e.split == "explain" and e.positive:
            peak = e.row * L + e.start + e.peak
            first, end = bounds[peak]
            assert e.peak == min(CFG.left_tokens, peak - first)  # the peak stands where it is said to stand
            assert len(e.token_ids) - e.peak == min(CFG.window_tokens - CFG.left_tokens, end - peak)


def test_counts_kinds_and_distinctness(table):
    for latent in table.latents:
        for split, kinds in (
            ("explain", {"top": 6, "random_positive": 8, "silent": 5}),
            ("calibrate", {"quantile": 4, "silent": 4}),
            ("score", {"quantile": 12, "silent": 14}),
        ):
            found = table.exemplars(latent, split)
            counts = Counter(e.kind for e in found)
            for kind, n in kinds.items():
                assert counts[kind] <= n and (counts[kind] == n or kind in ("top", "quantile", "random_positive"))
            silent = [(e.row, e.start) for e in found if e.kind in NEGATIVE_KINDS]
            assert len(silent) == len(set(silent))  # hard negatives repeat no uniform one
            for kind in kinds:
                places = [(e.row, e.start, e.peak) for e in found if e.kind == kind]
                assert len(places) == len(set(places))
        for kind in ("top", "quantile"):
            docs = [e.doc_id for e in of_kind(table, latent, "explain", kind)]
            assert len(docs) == len(set(docs))
        assert len({e.kind for e in table.exemplars(latent, "score")} - {"quantile", *NEGATIVE_KINDS}) == 0
    ids = [e.exemplar_id for e in every(table)]
    assert len(ids) == len(set(ids))


def test_top_is_the_largest_peak_of_each_document(table, cache):
    runs = read_texts(cache)[0]["explain"].runs
    for latent in table.latents[:5]:
        flat, value = cache.entries(latent, "explain")
        first, end = run_bounds(runs, flat.astype(np.int64))
        doc = np.where(end - first >= CFG.min_window_tokens, cache.doc_of("explain")[flat], -1)
        best = sorted((max(value[doc == d]) for d in set(doc.tolist()) - {-1}), reverse=True)[: CFG.explain_top]
        found = sorted((e.acts[e.peak] for e in of_kind(table, latent, "explain", "top")), reverse=True)
        assert found == pytest.approx(best)


def test_quantile_groups_have_equal_counts_and_ascend():
    peaks = np.random.default_rng(0).random(53).astype(np.float32)
    groups = quantile_groups(peaks, 10)
    assert set(groups) == set(range(10)) and np.ptp(np.bincount(groups)) <= 1
    for g in range(9):
        assert peaks[groups == g].max() <= peaks[groups == g + 1].min()
    assert set(quantile_groups(peaks[:23], 10)) == set(range(4)) and set(quantile_groups(peaks[:3], 10)) == {0}
    assert quantile_groups(peaks[:0], 10).size == 0
    shares = np.array([quotas(23, 10, rng(i)) for i in range(50)])
    assert (shares.sum(1) == 23).all() and set(shares.ravel()) == {2, 3}


def test_scored_positives_are_spread_over_the_groups(table):
    for latent in table.latents:
        counts = Counter(e.group for e in of_kind(table, latent, "score", "quantile"))
        assert min(counts) == 0 and len(counts) == max(counts) + 1 and max(counts.values()) - min(counts.values()) <= 1
        means = [np.mean([max(e.acts) for e in of_kind(table, latent, "score", "quantile") if e.group == g])
                 for g in sorted(counts)]
        assert means == sorted(means)


# -- strata --------------------------------------------------------------------------------------------------------


def strata_by_loop(cache, latent, split):
    """The population, window by window, from the definitions."""
    windows, tokens_N = cache.windows(split), cache.tokens(split).tokens_BL.reshape(-1)
    top = set(cache.stats.loc[latent, "top_tokens"][:10].tolist())
    near = {"co_occurring": cache.co_occurring([latent])[latent], "decoder_near": cache.nearest(latent)}
    involved = {latent, *near["co_occurring"], *near["decoder_near"]}
    active = {i: set(cache.entries(i, split).flat_n.tolist()) for i in involved}
    allowed = read_texts(cache)[0][split].allowed
    out = {}
    for w in range(len(windows)):
        at = set(windows.positions(w).tolist())
        if at & active[latent] or not allowed[w]:
            continue
        if top & set(tokens_N[sorted(at)].tolist()):
            out[w] = ("same_token", None)
            continue
        for kind in ("co_occurring", "decoder_near"):
            first = next((i for i in near[kind] if at & active[i]), None)
            if first is not None:
                out[w] = (kind, first)
                break
        else:
            out[w] = ("rest", None)
    return out


def test_strata_and_their_shares_are_exact(table, cache):
    for latent in table.latents[:6]:
        expected = strata_by_loop(cache, latent, "score")
        share = Counter(kind for kind, _ in expected.values())
        windows = cache.windows("score")
        at = {int(s): w for w, s in enumerate(windows.start)}
        drawn = [e for e in table.scored(latent) if not e.positive]
        for e in drawn:
            kind, neighbour = expected[at[e.row * L + e.start]]
            assert (e.stratum, e.neighbour) == (kind, neighbour)
            assert e.stratum_share == pytest.approx(share[kind] / len(expected))
            assert e.kind in ("silent", kind)
        for kind, wanted in (("same_token", 6), ("co_occurring", 6), ("decoder_near", 3)):
            uniform = sum(e.kind == "silent" and e.stratum == kind for e in drawn)
            assert sum(e.kind == kind for e in drawn) == min(wanted, share[kind] - uniform)


def test_find_silent_by_hand():
    silent = find_silent(
        8, positive=np.array([0]), allowed=np.array([1, 1, 1, 1, 1, 1, 1, 0], dtype=bool), same_token=np.array([0, 1]),
        neighbours={
            "co_occurring": [(5, np.array([1, 2])), (6, np.array([2, 3]))],
            "decoder_near": [(7, np.array([3, 4, 7]))],
        },
    )
    assert silent.windows.tolist() == [1, 2, 3, 4, 5, 6]
    names = ["same_token", "co_occurring", "co_occurring", "decoder_near", "rest", "rest"]
    assert [STRATA[i] for i in silent.stratum] == names
    assert silent.neighbour.tolist() == [-1, 5, 6, 7, -1, -1]
    assert [silent.share(i) for i in range(4)] == pytest.approx([1 / 6, 2 / 6, 1 / 6, 2 / 6])


def test_uniform_negatives_are_uniform(cache):
    """Every silent window comes up equally often over seeds."""
    latent = int(cache.eligible(CFG)[0])
    text = read_texts(cache)[0]["calibrate"]
    hits: Counter[int] = Counter()
    for seed in range(300):
        draw = LatentDraw(cache, text, latent, replace(CFG, seed=seed))
        silent = draw.silent({}, set())
        hits.update(e.row * L + e.start for e in draw.draw_silent(silent, 20, {}))
    n = len(silent.windows)
    expected = 300 * 20 / n
    assert len(hits) == n and max(abs(h - expected) for h in hits.values()) < 6 * np.sqrt(expected)


def test_a_window_that_is_not_silent_is_caught(cache):
    latent = int(cache.eligible(CFG)[0])
    windows, flat = cache.windows("score"), cache.entries(latent, "score").flat_n
    positive = cache.positive_windows(latent, "score")
    with pytest.raises(AssertionError, match="silent"):
        negatives.verify_silent(windows, positive[:1], flat)
    negatives.verify_silent(windows, np.setdiff1d(np.arange(len(windows)), positive), flat)


# -- leaks ---------------------------------------------------------------------------------------------------------


def test_splits_share_no_document_and_no_window(table):
    docs = {s: {e.doc_id for e in every(table) if e.split == s} for s in SPLITS}
    assert not docs["explain"] & docs["score"] and not docs["explain"] & docs["calibrate"]
    assert not docs["calibrate"] & docs["score"]
    assert_no_leak(every(table))


@pytest.mark.parametrize("keep", ["all", "most"])
def test_a_planted_duplicate_document_is_refused(tmp_path, monkeypatch, keep):
    """When the cache is made, so that no reader of it can leak, and again when exemplars are drawn; also where the
    token filter drops tokens of one copy only."""
    docs = {s: documents(s, 60) for s in SPLITS}
    docs["score"][7] = docs["explain"][3]
    held = {s: store(pack(docs[s], s, tmp_path), tmp_path, seed=i, keep=keep) for i, s in enumerate(SPLITS)}
    with pytest.raises(LeakError, match="explain and score"):
        cache_of(tmp_path, held)
    assert not (tmp_path / "latents").exists()
    with monkeypatch.context() as patch:
        patch.setattr("autointerp.latent_cache.assert_disjoint", lambda tokens: None)
        cache = cache_of(tmp_path, held)
    with pytest.raises(LeakError, match="explain and score"):
        build_exemplars(tmp_path, cache, [0], replace(CFG, min_windows=(1, 1, 1)))
    assert not (tmp_path / "exemplars").exists()


def test_planted_duplicate_windows_are_dropped_and_counted(tmp_path):
    """A licence header that opens documents of all splits is no duplicate document, but its windows would leak."""
    header = documents("header", 1)[0][:12]
    docs = {s: [header + d for d in documents(s, 40)] for s in SPLITS}
    held = {s: store(pack(docs[s], s, tmp_path), tmp_path, keep="all") for s in SPLITS}
    cfg = replace(CFG, min_windows=(1, 1, 1))
    cache = cache_of(tmp_path, held)
    texts, dropped = read_texts(cache)
    assert dropped["explain"] == 0 and dropped["score"] > 20 and dropped["calibrate"] > 20
    assert dropped["score"] == int((~texts["score"].allowed).sum())
    table = build_exemplars(tmp_path, cache, cache.eligible(cfg)[:10], cfg)
    assert table.counts["duplicate_windows"]["score"] == dropped["score"]
    for latent in table.latents:
        assert all(e.token_ids != tuple(header) for s in ("calibrate", "score") for e in table.exemplars(latent, s))


def test_leaks_are_found_again_on_opening(table, tmp_path):
    rows = every(table)
    shown = next(e for e in rows if e.split == "explain")
    with pytest.raises(LeakError, match="document"):
        assert_no_leak([*rows, replace(shown, split="score", exemplar_id="x")])
    with pytest.raises(LeakError, match="recurs from explain"):
        assert_no_leak([*rows, replace(shown, split="score", doc_id="other", exemplar_id="x")])
    import json
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(table.folder, copy)
    frame = pd.read_parquet(copy / "exemplars.parquet")
    score_doc = frame.loc[frame["split"] == "score", "doc_id"].iloc[0]
    frame.loc[frame["split"] == "explain", "doc_id"] = score_doc
    frame.to_parquet(copy / "exemplars.parquet", index=False)
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["files"]["exemplars.parquet"]["bytes"] = (copy / "exemplars.parquet").stat().st_size
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(LeakError):
        ExemplarTable.open(copy)


def test_explainers_and_scorers_see_their_splits_only(table):
    latent = table.latents[0]
    view = table.view(latent)
    assert {e.split for e in view.exemplars} == {"explain"} and view.top_tokens == ()
    assert {e.split for e in table.scored(latent)} == {"score"}
    assert {e.split for e in table.scored(latent, "calibrate")} == {"calibrate"}
    with pytest.raises(LeakError):
        table.scored(latent, "explain")
    with pytest.raises(LeakError):
        draw_pairs(None, 0, 1, split="calibrate")

    class Tokenizer:
        def decode(self, ids):
            return f"<{ids[0]}>"

    shown = table.view(latent, tokenizer=Tokenizer(), promoted=("a",))
    assert len(shown.top_tokens) > 0 and shown.top_tokens[0].startswith("<") and shown.promoted == ("a",)
    assert view.max_act >= max(max(e.acts) for e in view.exemplars) * 0.999
    assert table.pi(latent) == pytest.approx(float(table.stats.loc[latent, "pi"]))


# -- failures, keys, randomness ------------------------------------------------------------------------------------


def test_too_few_and_dead_are_counted_failures(held_out, tmp_path):
    sae = random_sae("relu")
    cache = cache_of(tmp_path, held_out, sae)
    strict = replace(CFG, min_windows=(6, 3, 10**6))
    table = build_exemplars(tmp_path, cache, [0, 1, sae.d_sae - 1], strict)
    assert table.latents == [] and len(table.table) == 0
    assert table.counts["failures"] == {"dead": 1, "too_few_positive": 2} and table.counts["n_requested"] == 3
    assert "of 1000000" in table.failures_of(0)[0].detail and table.failures_of(sae.d_sae - 1)[0].code == "dead"
    with pytest.raises(ConfigError, match="no latent 0"):
        table.view(0)


def test_a_hard_kind_that_yields_nothing_is_a_typed_absence(cache, tmp_path, monkeypatch):
    latent = int(cache.eligible(CFG)[0])
    monkeypatch.setattr(type(cache), "nearest", lambda self, i: [])
    table = build_exemplars(tmp_path, cache, [latent], CFG)
    found = [(f.code, f.detail) for f in table.failures_of(latent)]
    assert found[-1] == ("no_hard_negative", "decoder_near on split score")
    assert of_kind(table, latent, "score", "quantile")


def test_adding_removing_or_reordering_latents_changes_no_draw(cache, table, tmp_path):
    few = [table.latents[3], table.latents[1]]
    alone = build_exemplars(tmp_path, cache, few, CFG)
    for latent in few:
        assert [alone.exemplars(latent, s) for s in SPLITS] == [table.exemplars(latent, s) for s in SPLITS]


def test_same_input_same_bytes_other_seed_other_windows(cache, table, tmp_path):
    again = build_exemplars(tmp_path, cache, table.latents, CFG)
    assert (again.folder / "exemplars.parquet").read_bytes() == (table.folder / "exemplars.parquet").read_bytes()
    before = (again.folder / "manifest.json").stat().st_mtime_ns
    assert build_exemplars(tmp_path, cache, table.latents, CFG).key == again.key
    assert (again.folder / "manifest.json").stat().st_mtime_ns == before  # complete: left alone
    other = build_exemplars(tmp_path, cache, table.latents, replace(CFG, seed=1))
    assert other.key != again.key and not other.table["exemplar_id"].equals(again.table["exemplar_id"])


def test_pairs_of_any_latent_are_those_of_the_table(cache, table):
    for latent in table.latents[:4]:
        pairs = draw_pairs(cache, latent, CFG.explain_random, seed=CFG.seed, left_tokens=CFG.left_tokens)
        assert sorted(pairs_of(table.view(latent))) == sorted(pairs)
        assert all(act > 0 and 1 <= len(tokens) <= CFG.left_tokens + 1 for tokens, act in pairs)
        docs = [e.doc_id for e in table.view(latent).exemplars if e.kind == "random_positive"]
        n_docs = int(cache.stats.loc[latent, "n_docs_explain"])
        assert len(set(docs)) == min(len(docs), n_docs)  # one per document while documents last
        assert len(draw_pairs(cache, latent, 16, split="score")) == 16


def test_bad_requests(cache, tmp_path):
    with pytest.raises(ConfigError, match="windows of 8..32"):
        build_exemplars(tmp_path, cache, [0], ExemplarConfig())
    with pytest.raises(ConfigError, match="not \\[64"):
        build_exemplars(tmp_path, cache, [0, 64], CFG)
    with pytest.raises(ConfigError, match="left_tokens"):
        ExemplarConfig(left_tokens=32)
    with pytest.raises(ConfigError, match="min_windows"):
        ExemplarConfig(min_windows=(1, 2))


def test_records_round_trip(table):
    for e in every(table)[:20]:
        assert Exemplar.from_dict(e.to_dict()) == e
