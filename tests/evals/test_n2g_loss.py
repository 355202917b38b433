"""Explanation reconstruction: scales, arms and shares against known answers; a planted SAE end to end (METRICS D)."""

from typing import Any

import numpy as np
import pytest
import torch
from memory_cache import MemoryCache
from memory_store import MemoryStore, context, memory_store, topk_subject
from spoken import Planted

from autointerp.n2g_patterns import Pattern, PatternSet
from evals import patterns
from evals.base import SAESubject
from evals.measure import select
from evals.n2g_scores import Firing
from evals.passes import Passes
from evals.results import write_rows
from evals.simulated import Simulation, best_scale, codes_at, mask_of, without
from evals.suite import n2g_loss
from evals.units import UnitSums
from sae.base import SparseLatents

EVAL = n2g_loss.PLUGIN


def fired(dense: np.ndarray) -> Firing:
    return Firing(np.flatnonzero(dense), dense[dense != 0].astype(np.float64))


@pytest.fixture(scope="module")
def planted(tiny_lm, tmp_path_factory) -> Planted:
    return Planted(tiny_lm, tmp_path_factory.mktemp("planted"))


def values(result: Any) -> dict[str, Any]:
    return {row.metric: row for row in result.rows}


# -- scale and codes --------------------------------------------------------------------------------------------------


def test_the_scale_is_that_of_least_squares() -> None:
    r = np.random.default_rng(0)
    a = r.random(4000) * (r.random(4000) < 0.1)
    s = np.where(r.random(4000) < 0.7, a, 0) * 3 + r.random(4000) * (r.random(4000) < 0.02)
    assert best_scale(fired(a), fired(a)) == pytest.approx(1)
    assert best_scale(fired(2.5 * a), fired(a)) == pytest.approx(1 / 2.5)
    assert best_scale(fired(0 * a), fired(a)) == 0 and best_scale(fired(s), fired(0 * a)) == 0
    assert best_scale(fired(s), fired(a)) == pytest.approx(np.linalg.lstsq(s[:, None], a, rcond=None)[0][0])


def test_codes_at_tokens_and_without_latents() -> None:
    simulation = Simulation(np.array([2, 2, 5]), np.array([1, 3, 0]), np.array([0.5, 2.0, 4.0], np.float32))
    codes = codes_at(simulation, np.array([1, 2, 5, 9]))
    dense = torch.zeros(4, 4).scatter_add(1, codes.indices_NK, codes.values_NK)
    assert dense.tolist() == [[0] * 4, [0, 0.5, 0, 2], [4, 0, 0, 0], [0] * 4]
    nothing = codes_at(simulation, np.array([7]))
    assert nothing.values_NK.tolist() == [[0.0]]
    own = SparseLatents(torch.tensor([[1.0, 2.0, 0.0]]), torch.tensor([[3, 1, 99]]))  # the last slot names no latent
    assert without(own, mask_of([1], 4)).values_NK.tolist() == [[1.0, 0.0, 0.0]]


# -- arms -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tiny_lm) -> tuple[Any, Any, Any]:
    hookpoint = tiny_lm.default_hookpoint()
    store = memory_store(tiny_lm, hookpoint, rows=8)
    return hookpoint, store, topk_subject(tiny_lm, hookpoint, store, steps=60)


def simulation_of(subject: SAESubject, store: MemoryStore, latents: Any, factor: float = 1.0) -> Simulation:
    """s = factor * a, from the true codes of the whole store."""
    z = subject.sae.encode(store.x_ND).numpy() * mask_of(latents, subject.info.d_sae).numpy()
    flat, latent = np.nonzero(z * store.keep_N[:, None])
    return Simulation(flat, latent, (factor * z[flat, latent]).astype(np.float32))


def arms_of(lm: Any, trained: Any, mode: Any, simulation: Simulation, latents: Any) -> tuple[Any, Any]:
    hookpoint, store, subject = trained
    rows = np.arange(8)
    plan = n2g_loss.Plan(mode, simulation, simulation, tuple(latents), {i: 1.0 for i in latents})
    splicer = n2g_loss.Splicer(subject, plan, rows, store.tokens.L)
    (batch,) = Passes(lm.upper(hookpoint), store, rows, (0, 1, 2)).batches("arms")
    return batch, splicer.arms(batch)


def test_the_truth_leaves_the_reconstruction_as_it_is(tiny_lm, trained) -> None:
    hookpoint, store, subject = trained
    for mode, latents in (("subset", range(0, 64, 2)), ("full", range(64))):
        batch, arms = arms_of(tiny_lm, trained, mode, simulation_of(subject, store, latents), latents)
        keep = torch.from_numpy(batch.block.keep_BL)
        expected = batch.block.x_BLD.clone()
        expected[keep] = subject.reconstruct(batch.block.x_BLD[keep])
        torch.testing.assert_close(arms["sim"], expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(arms["sim"][~keep], batch.block.x_BLD[~keep])
        if mode == "subset":
            assert torch.equal(arms["own"], expected)
            assert (arms["zero"] - expected).abs().max() > 0.01


def test_a_simulation_of_nothing_is_the_arm_without_the_latents(tiny_lm, trained) -> None:
    nothing = Simulation(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.float32))
    latents = range(0, 64, 2)
    batch, arms = arms_of(tiny_lm, trained, "subset", nothing, latents)
    assert torch.equal(arms["sim"], arms["zero"])
    _, store, subject = trained
    keep = batch.block.keep_BL
    z = subject.sae.encode(batch.block.x_BLD[keep])
    z[:, ::2] = 0
    torch.testing.assert_close(
        arms["zero"][keep], subject.sae.decode(z, batch.block.x_BLD[keep]), rtol=1e-5, atol=1e-5)


def test_losses_equal_a_float64_brute_force(tiny_lm, trained, tmp_path, monkeypatch) -> None:
    """Half-true activations of half the latents, spliced by a full hooked pass."""
    hookpoint, store, subject = trained
    latents = list(range(0, 64, 2))
    half = simulation_of(subject, store, latents, factor=0.5)
    cache = MemoryCache(subject.sae, {"explain": store, "score": store})
    some = {i: PatternSet((Pattern((5,), False, 1.0),), 4) for i in latents}
    known = patterns.Patterns(some, {1: "n2g_degenerate"})
    monkeypatch.setattr(n2g_loss.patterns, "patterns_of", lambda ctx, asked: known)
    monkeypatch.setattr(n2g_loss, "simulations", lambda *a: (half, half, {i: 1.0 for i in latents}))
    result = EVAL.run(context(tiny_lm, hookpoint, store, subject, tmp_path, latents=cache))
    found, L = values(result), store.tokens.L
    ids, keep = torch.from_numpy(store.tokens.tokens_BL.astype(np.int64)), torch.from_numpy(store.keep_N.reshape(8, L))
    x = store.x_ND.reshape(8, L, -1)
    arms = {"clean": x}
    for name, factor in (("own", 1.0), ("sim", 0.5), ("zero", 0.0)):
        z = subject.sae.encode(x[keep])
        z[:, ::2] *= factor
        arms[name] = x.clone()
        arms[name][keep] = subject.sae.decode(z, x[keep])
    log_p = {name: tiny_lm.replace(ids, hookpoint, acts).double().log_softmax(-1) for name, acts in arms.items()}
    total, n, kl = dict.fromkeys(arms, 0.0), 0, 0.0
    for b in range(8):
        for t in range(L - 1):
            same = store.tokens.docs_BL[b, t] == store.tokens.docs_BL[b, t + 1]
            if keep[b, t] and same and int(ids[b, t + 1]) > 2:
                n += 1
                for name in arms:
                    total[name] -= float(log_p[name][b, t, ids[b, t + 1]])
                kl += float((log_p["clean"][b, t].exp() * (log_p["clean"][b, t] - log_p["sim"][b, t])).sum())
    assert result.counts["scored_tokens"] == n > 200
    assert found["delta_ce_subset"].value == pytest.approx((total["sim"] - total["clean"]) / n, abs=5e-6)
    assert found["kl_subset"].value == pytest.approx(kl / n, rel=1e-5)
    assert found["loss_of_subset"].value == pytest.approx((total["zero"] - total["own"]) / n, abs=5e-6)
    details = result.details
    saved = (total["zero"] - total["sim"]) / (total["zero"] - total["own"])
    assert details["loss_recovered_subset.num"].sum() / details["loss_recovered_subset.den"].sum() == pytest.approx(
        saved, rel=1e-3)
    for name in ("delta_ce_subset", "kl_subset", "loss_of_subset"):
        share = details[f"{name}.num"].sum() / details[f"{name}.den"].sum()
        assert share == pytest.approx(found[name].value, rel=1e-6), name
    assert found["loss_recovered_subset"].n_failed == 1 and result.counts["n_failed_builds"] == 1


# -- shares and their edges -------------------------------------------------------------------------------------------


def sums_of(n: int, **columns: Any) -> UnitSums:
    sums = UnitSums()
    sums.add(np.arange(n), {"n": np.full(n, 50.0)} | {name.replace("_", "."): c for name, c in columns.items()})
    return sums


def test_shares_by_hand() -> None:
    r = np.random.default_rng(0)
    clean, worth = r.random(200) * 100, 5 + r.random(200)
    own = clean + 3
    sums = sums_of(200, ce=clean, ce_own=own, ce_zero=own + worth, ce_sim=own + 0.25 * worth, kl_sim=clean,
                   ce_shuffled=own + worth)
    found = n2g_loss.estimates("subset", sums, 0, 1000, n_failed=3)
    assert found["loss_recovered_subset"].value == pytest.approx(0.75) and found["loss_recovered_subset"].n_failed == 3
    assert found["floor_shuffled_recovered"].value == pytest.approx(0, abs=1e-12)
    assert found["gain_over_shuffled_recovered"].value == pytest.approx(0.75)
    assert found["loss_of_subset"].value == pytest.approx(worth.sum() / 10_000)
    assert found["delta_ce_subset"].value == pytest.approx((3 * 200 + 0.25 * worth.sum()) / 10_000)
    full = n2g_loss.estimates("full", sums, 0, 1000, n_failed=0)
    assert not {"floor_bigram_ce", "gain_over_bigram"} & full.keys()  # no training text
    sums.add(np.arange(200), {"ce.bigram": clean + 60})
    full = n2g_loss.estimates("full", sums, 0, 1000, n_failed=0)
    assert full["gain_over_bigram"].value == pytest.approx(full["floor_bigram_ce"].value - full["ce_simulated"].value)
    assert full["gain_over_shuffled"].value == pytest.approx(
        full["floor_shuffled_delta_ce"].value - full["delta_ce"].value)


@pytest.mark.parametrize("worth", ["noise", "none", "harm"])
def test_a_share_of_nothing_is_undefined(worth: str) -> None:
    r = np.random.default_rng(0)
    own = r.random(100) * 100
    more = {"noise": r.normal(size=100), "none": np.zeros(100), "harm": -1 - r.random(100)}[worth]
    sums = sums_of(100, ce=own, ce_own=own, ce_zero=own + more, ce_sim=own, kl_sim=own, ce_shuffled=own)
    found = n2g_loss.estimates("subset", sums, 0, 1000, n_failed=0)
    for metric in ("loss_recovered_subset", "floor_shuffled_recovered", "gain_over_shuffled_recovered"):
        assert found[metric].value is None and found[metric].failure == "no_effect" and found[metric].n == 100
    assert found["loss_of_subset"].value is not None and found["delta_ce_subset"].value == 0


def test_one_document_gives_no_share() -> None:
    sums = sums_of(1, ce=[1.0], ce_own=[1.0], ce_zero=[2.0], ce_sim=[1.5], kl_sim=[0.1], ce_shuffled=[2.0])
    assert n2g_loss.estimates("subset", sums, 0, 1000, 0)["loss_recovered_subset"].failure == "too_few_rows"


# -- planted, end to end ----------------------------------------------------------------------------------------------


def test_patterns_of_token_latents_recover_all(planted, monkeypatch, tmp_path) -> None:
    """Real pattern building: the last token alone says how active a latent is."""
    monkeypatch.setitem(patterns.LATENTS, "tiny", 40)
    result = EVAL.run(planted.context())
    found = values(result)
    assert result.counts["documents"] == 1024 // 48 < 24  # some of the rows: their tokens are counted anew
    assert result.counts["n_latents"] >= 30 and result.counts["median_scale"] == pytest.approx(1, abs=1e-5)
    assert found["loss_of_subset"].ci_low > 0.01
    assert found["loss_recovered_subset"].value == pytest.approx(1, abs=1e-3)
    # another token's latent is never active where this one is: its patterns get the scale 0
    assert found["floor_shuffled_recovered"].value == 0 and found["gain_over_shuffled_recovered"].value > 0.999
    assert abs(found["delta_ce_subset"].value) < 1e-4 and abs(found["kl_subset"].value) < 1e-4
    assert not {"delta_ce", "kl", "floor_bigram_ce"} & found.keys()
    assert write_rows(tmp_path, result.rows, EVAL.metrics) == len(result.rows)


def test_independent_activations_recover_nothing(planted, monkeypatch) -> None:
    """As often and as strong as the latent, at tokens that have nothing to do with it; scaled on such tokens too."""
    latents = patterns.stratified_latents(planted.cache, 40, 0)
    r, explain = np.random.default_rng(0), planted.stores["explain"]
    fitted: dict[int, float] = {}

    def anywhere(latent: int, keep_N: np.ndarray) -> Firing:
        flat, value = planted.cache.entries(latent, "explain")
        where = np.flatnonzero(keep_N & (r.random(len(keep_N)) < len(flat) / len(explain.kept_N)))
        return Firing(where, r.choice(value, size=len(where)).astype(np.float64))

    def independent(ctx: Any, found: Any, tokens_BL: Any, keep_N: Any) -> Any:
        parts = []
        for latent in latents:
            flat, value = planted.cache.entries(latent, "explain")
            true = Firing(flat.astype(np.int64), value.astype(np.float64))
            fitted[latent] = best_scale(anywhere(latent, explain.keep_N), true)
            s = anywhere(latent, keep_N)
            parts.append((s.flat_n, np.full(len(s.flat_n), latent), s.value_n * fitted[latent]))
        flat, latent, value = (np.concatenate(p) for p in zip(*parts, strict=True))
        order = np.argsort(flat, kind="stable")
        simulation = Simulation(flat[order], latent[order], value[order].astype(np.float32))
        return simulation, simulation, fitted

    some = {i: PatternSet((Pattern((5,), False, 1.0),), 4) for i in latents}
    monkeypatch.setattr(n2g_loss.patterns, "patterns_of", lambda ctx, asked: patterns.Patterns(some, {}))
    monkeypatch.setattr(n2g_loss, "simulations", independent)
    found = values(EVAL.run(planted.context()))
    assert len(fitted) == 40 and 0 < np.mean(list(fitted.values())) < 0.2
    assert found["loss_of_subset"].ci_low > 0.01 and found["loss_recovered_subset"].value <= 0.02


def test_full_mode_simulates_every_alive_latent_and_beats_the_bigram(planted, monkeypatch) -> None:
    monkeypatch.setitem(n2g_loss.FULL_UP_TO, "tiny", 259)
    result = EVAL.run(planted.context())
    found, counts = values(result), result.counts
    assert counts["mode"] == "full" and counts["n_alive"] == counts["n_latents"] + counts["n_failed_builds"] > 100
    assert "loss_recovered_subset" not in found and found["floor_shuffled_delta_ce"].value > 0.5
    # a token that explain never shows has no latent to stand for it
    assert found["delta_ce"].value < 0.1 * found["floor_shuffled_delta_ce"].value
    assert found["gain_over_bigram"].ci_low > 0
    bare = EVAL.run(_without_text(planted))
    assert "floor_bigram_ce" not in values(bare) and values(bare)["delta_ce"] == found["delta_ce"]
    assert EVAL.inputs(planted.context())["train_text"] and "train_text" not in EVAL.inputs(_without_text(planted))


def _without_text(planted: Planted) -> Any:
    ctx = planted.context()
    ctx.train_text = None
    return ctx


def test_no_pattern_at_all_is_undefined(planted, monkeypatch) -> None:
    none = lambda ctx, asked: patterns.Patterns({}, dict.fromkeys(asked, "n2g_degenerate"))  # noqa: E731
    monkeypatch.setattr(n2g_loss.patterns, "patterns_of", none)
    for width, names in ((0, {"loss_recovered_subset"}), (259, {"delta_ce", "kl"})):
        monkeypatch.setitem(n2g_loss.FULL_UP_TO, "tiny", width)
        result = EVAL.run(planted.context())
        assert {r.metric for r in result.rows} == names
        assert all(r.value is None and r.failure == "n2g_degenerate" and r.n_failed >= 4 for r in result.rows)


# -- what it shares and when it runs ----------------------------------------------------------------------------------


def test_patterns_and_clean_passes_are_made_once(planted, monkeypatch) -> None:
    from autointerp import last_acts
    from evals.suite.n2g import PLUGIN as N2G

    asked, cleaned, shared = [], [], {}
    real, states = last_acts.LastActs.__call__, Passes.states

    def call(self: Any, probes: Any) -> Any:
        asked.append({latent for latent, _ in probes})
        return real(self, probes)

    def counted(self: Any, batch: Any, resid: Any) -> Any:
        cleaned.append(resid is batch.block.x_BLD)
        return states(self, batch, resid)

    monkeypatch.setattr(last_acts.LastActs, "__call__", call)
    monkeypatch.setattr(Passes, "states", counted)
    monkeypatch.setitem(patterns.LATENTS, "tiny", 20)
    N2G.run(planted.context(shared))
    first = set().union(*asked)
    asked.clear()
    one = EVAL.run(planted.context(shared))
    more = set().union(*asked) if asked else set()
    wanted = set(patterns.stratified_latents(planted.cache, 20, 0))
    assert len(first) == 20 and not more & first and more <= wanted and len(wanted & first) >= 10
    asked.clear()
    batches = sum(cleaned)
    assert batches > 0
    two = EVAL.run(planted.context(shared))
    assert not asked and sum(cleaned) == batches and two.rows == one.rows
    alone = EVAL.run(planted.context())
    assert alone.rows == one.rows


@pytest.mark.parametrize(("n", "expected"), [(10, 10), (37, 37), (500, 137)])
def test_the_subset_holds_each_density_alike(n: int, expected: int) -> None:
    import pandas as pd

    from autointerp.latent_cache import sample_latents

    class Cache:
        sae_id = "x"
        stats = pd.DataFrame({"n_active": np.random.default_rng(0).permutation(300) ** 2 + 16})

        def eligible(self, cfg: Any = None) -> np.ndarray:
            return np.arange(0, 274, 2)

    chosen = patterns.stratified_latents(Cache(), n, 0)
    assert chosen == sorted(set(chosen)) and len(chosen) == expected
    ranked = sorted(Cache().eligible().tolist(), key=lambda i: Cache.stats["n_active"][i])
    tenths = np.bincount([ranked.index(i) * 10 // 137 for i in chosen], minlength=10)
    assert tenths.min() >= min(n // 10, 13) and tenths.max() - tenths.min() <= 1
    drawn = set(sample_latents(Cache(), n, 0).latents.tolist())
    assert len(drawn & set(chosen)) >= 0.6 * len(chosen)  # most of what is explained anyhow is used
    assert chosen == patterns.stratified_latents(Cache(), n, 0)
    assert n > 137 or chosen != patterns.stratified_latents(Cache(), n, 1)


def test_documents_pair_where_latents_do_not() -> None:
    from evals.compare_units import is_per_latent

    assert not is_per_latent("n2g_loss") and is_per_latent("n2g")


def test_where_it_runs() -> None:
    from evals.study import every_evaluation

    names = {preset: {e.name for e in select((), preset)} for preset in ("quick", "paper", "tiny")}
    assert EVAL.name in names["paper"] and EVAL.name not in names["quick"] | names["tiny"]
    assert [e.name for e in select([EVAL.name], "quick")] == [EVAL.name] and EVAL.name in every_evaluation()
    below, above = EVAL.lm_tokens("quick", 3)
    assert below == 3 * 64 * n2g_loss.BUILD_TOKENS and above == 13 * EVAL.config("quick")["tokens"]
