"""N2G with the real thing on the tiny model: probes, patterns in words, and the simulator that reads them."""

import numpy as np
import pytest
import torch
from held_out import random_sae

from autointerp.explainers.n2g import N2G
from autointerp.explainers.n2g_released import ReleasedN2G
from autointerp.interfaces import ExplainContext, ScoreContext
from autointerp.last_acts import make_last_acts
from autointerp.n2g import build_many
from autointerp.n2g_patterns import Pattern, PatternSet, TokenIndex, predict
from autointerp.pattern_explainer import pairs_of
from autointerp.records import ActivationScale, Exemplar, Explanation, Failure, LatentView
from autointerp.simulators.pattern import PatternSimulator
from sae.errors import ConfigError
from sae.token_tree import batches
from sae.tokens import prefix_id


@pytest.fixture(scope="module")
def hookpoint(tiny_lm):
    return tiny_lm.default_hookpoint()


@pytest.fixture(scope="module", params=["topk", "relu"])
def sae(request):
    return random_sae(request.param, d_in=32)


def lists_of(n=60, seed=0):
    rng = np.random.default_rng(seed)
    return [tuple(rng.integers(3, 259, size=rng.integers(1, 20)).tolist()) for _ in range(n)]


def one_by_one(lm, sae, hookpoint, tokens):
    acts = lm.capture(torch.tensor([tokens]), [hookpoint])[hookpoint]
    return sae.encode(acts[0].float())[-1].numpy()


def test_probes_equal_a_forward_of_each_alone(tiny_lm, sae, hookpoint):
    lists = lists_of()
    codes = [one_by_one(tiny_lm, sae, hookpoint, t) for t in lists]
    latents = [int(np.argmax(c)) if i % 3 else i % sae.d_sae for i, c in enumerate(codes)]
    ask = make_last_acts(tiny_lm, sae, hookpoint, batch_tokens=64)
    found = ask(list(zip(latents, lists, strict=True)))
    expected = [c[latent] for c, latent in zip(codes, latents, strict=True)]
    assert found.dtype == np.float32 and (found > 0).sum() > 20 and (found == 0).sum() > 5
    np.testing.assert_allclose(found, expected, atol=2e-4)


def test_a_token_list_is_forwarded_once_for_all_latents(tiny_lm, sae, hookpoint):
    ask = make_last_acts(tiny_lm, sae, hookpoint)
    lists = lists_of(20)
    first = ask([(latent, t) for latent in range(sae.d_sae) for t in lists])
    assert ask.n_forwarded == len(set(lists))
    assert ask.n_tokens == len({t[:n] for t in lists for n in range(1, len(t) + 1)}) < sum(map(len, set(lists)))
    again = ask([(latent, t) for latent in reversed(range(sae.d_sae)) for t in reversed(lists)])
    assert ask.n_forwarded == len(set(lists)) and again.tolist() == first[::-1].tolist()
    assert ask([]).size == 0


def test_batches_waste_little():
    lists = sorted(lists_of(500), key=lambda t: (len(t), t))
    found = batches(lists, 128)
    assert [t for b in found for t in b] == lists
    assert all(len(b) * len(b[-1]) <= 128 for b in found)
    assert sum(len(b) * len(b[-1]) for b in found) < 1.2 * sum(map(len, lists))
    assert [len(b) for b in batches([(1,) * 500], 128)] == [1]


def test_refusals(tiny_lm, hookpoint):
    with pytest.raises(ConfigError, match="width 16"):
        make_last_acts(tiny_lm, random_sae(d_in=16), hookpoint)
    with pytest.raises(ConfigError, match="without tokens"):
        make_last_acts(tiny_lm, random_sae(d_in=32), hookpoint)([(0, ())])


# -- explainer -----------------------------------------------------------------------------------------------------


def views(lm, sae, hookpoint, n_latents=4, n_pairs=5):
    """Views whose random positives are true activations of the tiny model at full context."""
    rng = np.random.default_rng(1)
    prefix = prefix_id(lm.tokenizer)
    rows = rng.integers(3, 40, size=(30, 24))
    ids = torch.from_numpy(np.concatenate([np.full((30, 1), prefix), rows], axis=1))
    acts = lm.capture(ids, [hookpoint])[hookpoint][:, 1:].float()
    z = sae.encode(acts.reshape(-1, acts.shape[-1])).numpy().reshape(30, 24, -1)
    out = []
    for latent in np.argsort(-(z > 0).sum((0, 1)))[5 : 5 + n_latents].tolist():
        exemplars = []
        for row, at in np.argwhere(z[:, :, latent] > 0)[:n_pairs].tolist():
            exemplars.append(Exemplar(
                exemplar_id=f"{latent}-{row}-{at}", latent=latent, kind="random_positive", split="explain", row=row,
                start=1, token_ids=tuple(rows[row].tolist()), acts=tuple(z[row, :, latent].tolist()), peak=at,
            ))
        out.append(LatentView(sae_id=sae.sae_id, latent=latent, exemplars=tuple(exemplars), density=0.1,
                              max_act=float(z[:, :, latent].max())))
    return out


def test_explainer_finds_patterns_that_fire_where_they_came_from(tiny_lm, sae, hookpoint):
    asked = views(tiny_lm, sae, hookpoint)
    dead = LatentView(sae_id=sae.sae_id, latent=sae.d_sae - 1, exemplars=(), density=0.0, max_act=0.0)
    ctx = ExplainContext(tokenizer=tiny_lm.tokenizer, last_acts=make_last_acts(tiny_lm, sae, hookpoint))
    found = [e for (e,) in N2G().explain_many([*asked, dead], ctx)]
    assert found[-1].failure is not None and found[-1].failure.code == "too_few_positive" and found[-1].text is None
    explained = [(v, e) for v, e in zip(asked, found, strict=False) if e.failure is None]
    assert len(explained) >= 2
    n_free = 0
    for view, explanation in explained:
        assert explanation.text and explanation.exemplar_ids == tuple(e.exemplar_id for e in view.exemplars)
        patterns = PatternSet.load(explanation.pattern)
        assert patterns.tokenizer_hash and patterns.pad_id == tiny_lm.tokenizer.encode("_", add_special_tokens=False)[0]
        hits = 0
        for tokens, _ in pairs_of(view):
            fires = predict(patterns, TokenIndex(np.array([tokens]), first_position=0)).flat_n
            hits += len(tokens) - 1 in fires
        # A pattern matches the token it was made from, unless it is anchored and was cut from further right.
        free = sum(p.n_docs for p in patterns.patterns if not p.anchored)
        assert free <= hits <= len(view.exemplars)
        n_free += free
    assert n_free >= 3
    backwards = [e for (e,) in N2G().explain_many(asked[::-1], ctx)]
    assert backwards[::-1] == found[:-1]


def test_the_released_recipe_is_an_explainer_too(tiny_lm, sae, hookpoint):
    """The same activations: nothing in front of the probes, suffixes of any length, whole documents kept."""
    asked = views(tiny_lm, sae, hookpoint)
    ask, probes = make_last_acts(tiny_lm, sae, hookpoint), []

    def last_acts(these):
        probes.extend(tokens for _, tokens in these)
        return ask(these)

    ctx = ExplainContext(tokenizer=tiny_lm.tokenizer, last_acts=last_acts)
    found = [e for (e,) in ReleasedN2G().explain_many(asked, ctx)]
    pad = tiny_lm.tokenizer.encode("_", add_special_tokens=False)[0]
    begins = {pad} | {t for view in asked for tokens, _ in pairs_of(view) for t in tokens}
    assert prefix_id(tiny_lm.tokenizer) not in {t for tokens in probes for t in tokens} and probes
    assert {tokens[0] for tokens in probes} <= begins and max(map(len, probes)) > 9
    for view, explanation in zip(asked, found, strict=True):
        built = build_many({view.latent: pairs_of(view)}, ask, pad_id=pad, matcher="released", max_suffix=None)
        patterns = PatternSet.load(explanation.pattern)
        assert patterns.matcher == "released" and patterns.patterns == built[view.latent].patterns.patterns
        assert explanation.failure is None and explanation.explainer == "n2g_released" and explanation.text
    ours = [e for (e,) in N2G().explain_many(asked, ctx)]
    assert any(a.pattern != b.pattern for a, b in zip(ours, found, strict=True))


# -- simulator -----------------------------------------------------------------------------------------------------


def explanation(patterns=None, failure=None, name="x"):
    dumped = None if patterns is None else PatternSet(patterns, 9).dump()
    return Explanation(explanation_id=name, sae_id="s", latent=0, explainer="n2g", pattern=dumped, failure=failure)


def window(tokens, start=5):
    name = f"w{tokens}{start}"
    return Exemplar(exemplar_id=name, latent=0, kind="silent", split="score", start=start, token_ids=tokens)


def test_simulator_gives_the_longest_match_at_each_token():
    patterns = (Pattern((7,), False, 1.0), Pattern((6, None, 7), False, 3.0), Pattern((7, 8), True, 5.0))
    pairs = [
        (explanation(patterns), window((6, 5, 7, 8))),
        (explanation(patterns), window((7, 8), start=1)),
        (explanation(patterns), window((7, 8), start=2)),
        (explanation(patterns), window((6, 1))),
        (explanation(name="bare"), window((7,))),
        (explanation(failure=Failure(code="n2g_degenerate", stage="explain"), name="bad"), window((7,))),
    ]
    found = PatternSimulator().simulate_many(pairs, ScoreContext())
    assert [s.values for s in found] == [(0.0, 0.0, 3.0, 0.0), (1.0, 5.0), (1.0, 0.0), (0.0, 0.0), None, None]
    assert [s.failure.code for s in found[4:]] == ["unsupported", "n2g_degenerate"]
    assert all(s.scale == ActivationScale.ACTIVATION for s in found)
    assert PatternSimulator().simulate_many(pairs[::-1], ScoreContext()) == found[::-1]
    assert PatternSimulator().simulate_many([], ScoreContext()) == []
