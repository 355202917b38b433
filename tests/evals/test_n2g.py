"""N2G as an evaluation: exact counts against brute force, planted latents, floors, rows."""

import math

import numpy as np
import pandas as pd
import pytest

from autointerp.n2g_patterns import Pattern, PatternSet
from evals import n2g_scores
from evals.base import EvalContext
from evals.n2g_scores import Firing, confusion, pearson
from evals.results import SubjectInfo, write_rows
from evals.suite import n2g
from evals.suite.n2g import PLUGIN, latent_rows

L, ROWS, V, PAD = 32, 60, 50, 49


class Tokens:
    def __init__(self, tokens_BL):
        self.tokens_BL, self.L, self.n_docs = tokens_BL, L, len(tokens_BL)


class PlantedCache:
    """Latents with a rule over random tokens; every row is a document. What the evaluation reads of a LatentCache."""

    key, sae_id = "cachekey", "planted"
    TOKEN, BIGRAM, ANY, NOT_AFTER, ALWAYS = range(5)

    def __init__(self, seed=0):
        self.texts = {}
        for i, split in enumerate(("explain", "score")):
            tokens = np.random.default_rng(seed + i).integers(2, 12, size=(ROWS, L)).astype(np.uint16)
            tokens[:, 0] = 0
            self.texts[split] = tokens
        self.stats = pd.DataFrame({"n_active": [len(self.entries(i, "score")[0]) for i in range(5)]})

    def active(self, latent, split):
        t = self.texts[split]
        before = np.roll(t, 1, axis=1)
        two = np.roll(t, 2, axis=1)
        column = np.arange(L)
        rule = {
            self.TOKEN: t == 5,
            self.BIGRAM: (t == 7) & (before == 6) & (column >= 2),
            self.ANY: (t == 8) & (two == 9) & (column >= 3),
            self.NOT_AFTER: (t == 5) & (before != 3),
            self.ALWAYS: np.ones_like(t, dtype=bool),
        }[latent]
        return rule & (column >= 1)

    def entries(self, latent, split):
        flat = np.flatnonzero(self.active(latent, split).reshape(-1)).astype(np.uint32)
        return flat, (1 + flat % 3).astype(np.float32)

    def tokens(self, split):
        return Tokens(self.texts[split])

    def keep(self, split):
        return np.tile(np.arange(L) > 0, ROWS)

    def doc_of(self, split):
        return np.repeat(np.arange(ROWS), L).astype(np.int32)

    def eligible(self, cfg=None):
        return np.arange(5)


def patterns(*ids, anchored=False, value=2.0):
    return PatternSet(tuple(Pattern(tuple(i), anchored, value) for i in ids), PAD)


TRUTH = {
    PlantedCache.TOKEN: patterns((5,)), PlantedCache.BIGRAM: patterns((6, 7)),
    PlantedCache.ANY: patterns((9, None, 8)), PlantedCache.NOT_AFTER: patterns((5,)),
}  # fmt: skip


@pytest.fixture(scope="module")
def cache():
    return PlantedCache()


@pytest.fixture(scope="module")
def rows(cache):
    return {r["latent"]: r for r in latent_rows(cache, TRUTH, seed=0)}


@pytest.mark.parametrize("latent", [PlantedCache.TOKEN, PlantedCache.BIGRAM, PlantedCache.ANY])
def test_true_patterns_score_one(rows, latent):
    row = rows[latent]
    assert row["n2g_precision"] == row["n2g_recall"] == row["n2g_f1"] == row["n2g_recall_16"] == 1
    assert row["n2g_precision_lift"] == 1
    assert row["precision_low"] < 1 and row["precision_high"] == 1


def test_a_token_that_is_silent_after_another(rows, cache):
    row = rows[PlantedCache.NOT_AFTER]
    active, fires = cache.active(PlantedCache.NOT_AFTER, "score").sum(), cache.active(PlantedCache.TOKEN, "score").sum()
    assert row["n2g_recall"] == 1
    assert row["n2g_precision"] == pytest.approx(active / fires) and row["n2g_precision"] < 1


def test_floors(rows, cache):
    row = rows[PlantedCache.BIGRAM]
    tokens, n = cache.texts["score"], ROWS * (L - 1)
    active = cache.active(PlantedCache.BIGRAM, "score").sum()
    sevens = (tokens[:, 1:] == 7).sum()  # what the token floor fires on
    assert row["floor_token_recall"] == 1 and row["floor_token_precision"] == pytest.approx(active / sevens)
    d = active / n
    assert row["floor_always_f1"] == pytest.approx(2 * d / (1 + d)) and row["density"] == pytest.approx(d)
    assert row["floor_shuffled_f1"] < 0.2


def test_patterns_that_never_fire(cache):
    (row,) = latent_rows(cache, {PlantedCache.TOKEN: patterns((40, 41))}, seed=0)
    assert row["n2g_f1"] == 0 and row["n2g_recall"] == 0 and math.isnan(row["n2g_precision"])
    assert row["n_fires"] == 0
    assert "floor_shuffled_f1" not in row  # no partner


def test_counts_and_correlation_equal_brute_force():
    draw = np.random.default_rng(0)
    n = 5000
    s, a = draw.random(n) * (draw.random(n) < 0.1), draw.random(n) * (draw.random(n) < 0.2)
    a[s > 0.5] += 1
    predicted, active = (Firing(np.flatnonzero(v), v[v > 0]) for v in (s, a))
    assert pearson(predicted, active, n) == pytest.approx(np.corrcoef(s, a)[0, 1], abs=1e-12)
    found = confusion(predicted, active, n)
    assert found.precision == ((s > 0) & (a > 0)).sum() / (s > 0).sum()
    assert found.recall == ((s > 0) & (a > 0)).sum() / (a > 0).sum()
    assert found.f1 == pytest.approx(2 * found.precision * found.recall / (found.precision + found.recall))
    assert found.lift == pytest.approx((found.precision - found.density) / (1 - found.density))


def test_constant_predictions_have_no_correlation():
    everywhere = Firing(np.arange(10), np.full(10, 2.0))
    some = Firing(np.arange(3), np.ones(3))
    assert math.isnan(pearson(everywhere, some, 10)) and math.isnan(pearson(some, everywhere, 10))
    assert math.isnan(pearson(Firing(np.zeros(0, dtype=np.int64), np.zeros(0)), some, 10))


def test_an_always_on_latent():
    everywhere = Firing(np.arange(10), np.full(10, 2.0))
    found = confusion(Firing(np.arange(4), np.ones(4)), everywhere, 10)
    assert found.density == 1 and found.precision == 1 and math.isnan(found.lift)
    assert n2g_scores.always_f1(1.0) == 1


@pytest.mark.parametrize("n", [0, 1, 2, 3, 7, 24, 100])
def test_partners_have_like_density_and_no_fixed_point(n):
    draw = np.random.default_rng(n)
    latents, densities = [i * 3 for i in range(n)], draw.random(n)
    partner = n2g_scores.partners_of_like_density(latents, densities)
    if n < 2:
        assert partner == {}
        return
    assert sorted(partner) == sorted(partner.values()) == latents
    assert all(k != v for k, v in partner.items())
    rank = {latents[i]: r for r, i in enumerate(np.argsort(densities))}
    assert max(abs(rank[k] - rank[v]) for k, v in partner.items()) <= max(2, math.ceil(n / 10))


def evaluate(cache, found, monkeypatch, failures=None):
    info = SubjectInfo(
        sae_id="planted", kind="sae", lm="toy", lm_revision="0", hookpoint="layers.1", architecture="topk", d_in=4,
        d_sae=5, k=1, train_tokens=0, sae_sha256="0",
    )  # fmt: skip
    subject = type("Subject", (), {"info": info, "provides": frozenset({"sparse"})})()
    ctx = EvalContext(
        root=None, subject=subject, preset="tiny", seed=0, hookpoint="layers.1", run_key="r", latents=cache
    )
    monkeypatch.setattr(n2g, "read_patterns", lambda ctx: (found, failures or {}))
    return PLUGIN.run(ctx)


def test_rows_are_means_over_latents(cache, rows, monkeypatch, tmp_path):
    result = evaluate(cache, TRUTH, monkeypatch, failures={4: "n2g_degenerate"})
    values = {r.metric: r for r in result.rows}
    assert set(values) == {m.name for m in PLUGIN.metrics}
    f1 = np.array([rows[i]["n2g_f1"] for i in sorted(rows)])
    weight = np.array([rows[i]["n_active"] for i in sorted(rows)])
    assert values["n2g_f1"].value == pytest.approx(f1.mean()) and values["n2g_f1"].n == 4
    assert values["n2g_f1"].n_failed == 1  # the failed build is counted, not scored 0
    assert values["n2g_f1_weighted"].value == pytest.approx((f1 * weight).sum() / weight.sum())
    gain = f1.mean() - values["floor_token_f1"].value
    assert values["gain_over_token"].value == pytest.approx(gain) and gain > 0
    assert values["gain_over_shuffled"].value > 0.4
    assert values["n2g_wildcard_share"].value == pytest.approx(np.mean([0, 0, 1 / 3, 0]))
    assert values["n2g_length"].value == pytest.approx((1 + 2 + 2 + 1) / 4)
    assert write_rows(tmp_path, result.rows, PLUGIN.metrics) == len(result.rows)
    details = result.details
    assert details["n2g_f1.num"].sum() / details["n2g_f1.den"].sum() == pytest.approx(f1.mean())
    assert details[details.latent == 4].failure.item() == "n2g_degenerate"
    assert result.counts["n_silent"] == 0
    few = details.n_fires.between(1, n2g_scores.LOW_SUPPORT - 1)
    assert result.counts["n_low_support"] == few.sum()


def test_patterns_without_a_firing_are_counted_and_so_are_those_with_few(cache, monkeypatch):
    """Latent 0 by a pattern that is nowhere, 1 by one that is there less often than a precision needs."""
    threes = np.lib.stride_tricks.sliding_window_view(cache.texts["score"][:, 1:], 3, axis=1).reshape(-1, 3)
    kinds, times = np.unique(threes, axis=0, return_counts=True)
    rare = tuple(int(i) for i in kinds[(times < n2g_scores.LOW_SUPPORT).argmax()])
    result = evaluate(cache, {**TRUTH, 0: patterns((40,)), 1: patterns(rare)}, monkeypatch)
    assert (result.counts["n_silent"], result.counts["n_low_support"]) == (1, 1)




def test_no_pattern_at_all_is_undefined(cache, monkeypatch):
    result = evaluate(cache, {}, monkeypatch, failures={4: "n2g_degenerate"})
    assert {r.metric for r in result.rows} == {"n2g_f1", "n2g_precision", "n2g_recall"}
    assert all(r.value is None and r.failure == "n2g_degenerate" and r.n_failed == 1 for r in result.rows)


def test_explained_latents_are_completed_to_the_number_of_the_preset(cache, monkeypatch):
    """Patterns of two explained latents are read (one had failed); the others of the draw are built, with as many
    activations as those two had, and never an explained one again."""
    from autointerp.records import Explanation, Failure
    from evals.suite.n2g import pairs_used, read_patterns

    told = [
        Explanation(explanation_id="a", sae_id="planted", latent=0, explainer="n2g", exemplar_ids=("x", "y", "z"),
                    pattern=TRUTH[0].dump()),
        Explanation(explanation_id="b", sae_id="planted", latent=4, explainer="n2g", exemplar_ids=("x", "y"),
                    failure=Failure(code="n2g_degenerate", stage="explain", detail="")),
        Explanation(explanation_id="c", sae_id="planted", latent=1, explainer="pmi", text="six, seven"),
    ]  # fmt: skip
    asked = {}

    class Answers:
        def __init__(self, lm, sae, hookpoint):
            pass

        def __call__(self, probes):
            asked.update((latent, True) for latent, _ in probes)
            return np.array([float(tokens[-1] != PAD) for _, tokens in probes], dtype=np.float32)

    subject = type("Subject", (), {"sae": None})()
    lm = type("LM", (), {"tokenizer": None})()
    ctx = EvalContext(root=None, subject=subject, preset="tiny", seed=0, hookpoint="layers.1", latents=cache,
                      scores="folder", load_lm=lambda: lm)  # fmt: skip
    drawn = []
    monkeypatch.setattr("evals.patterns.read_explanations", lambda folder: told)
    monkeypatch.setattr("autointerp.last_acts.LastActs", Answers)
    monkeypatch.setattr("autointerp.n2g.pad_token", lambda tokenizer: PAD)
    monkeypatch.setattr("sae.tokens.prefix_id", lambda tokenizer: 0)
    from autointerp import exemplars

    real = exemplars.draw_pairs
    monkeypatch.setattr(exemplars, "draw_pairs", lambda *a, **k: drawn.append(real(*a, **k)) or drawn[-1])
    for wanted in (2, 5):
        monkeypatch.setitem(n2g.LATENTS, "tiny", wanted)
        found, failures = read_patterns(ctx)
        assert failures == {4: "n2g_degenerate"} and found[0].patterns == TRUTH[0].patterns
        assert set(found) == ({0} if wanted == 2 else {0, 1, 2, 3})
        assert set(asked) == (set() if wanted == 2 else {1, 2, 3})
    assert [len(pairs) for pairs in drawn] == [3, 3, 3] and pairs_used(ctx) == 3
    assert all(p.ids == (7,) for p in found[1].patterns), "the last token of a bigram suffices for this judge"
