"""The search for patterns by trees of probes, against one pass per probe and one pair after another (AUTOINTERP 3)."""

import numpy as np
import pytest
import torch
from held_out import random_sae

from autointerp import n2g
from autointerp.last_acts import make_last_acts
from autointerp.n2g import HALF, Pair, build_many
from sae.tokens import prefix_id

PAD = 95


def sequential(pair, act, matcher, longest):
    """(ids, anchored, value, code) by the definition: ``act`` is asked about one probe at a time."""
    top = min(len(pair.tokens), longest or len(pair.tokens))
    suffix = next((pair.tokens[-n:] for n in range(1, top + 1) if act(pair.tokens[-n:]) / pair.act >= HALF), None)
    code, value = None, pair.act
    if suffix is None:
        code = "n2g_unreproducible"
        if matcher == "longest":
            return None, None, None, code
        suffix = pair.tokens
    else:
        value = act(suffix)
    anchored = act((PAD, *suffix)) / pair.act < HALF
    ids = tuple(
        None if 1 - act((*suffix[:p], PAD, *suffix[p + 1 :])) / value < HALF else token
        for p, token in enumerate(suffix)
    )
    if not anchored and all(i is None for i in ids):
        code = "n2g_degenerate"
        if matcher == "longest":
            return None, None, None, code
    return ids, anchored, value, code


def pairs_of_text(lm, sae, hookpoint, n_latents=8, n_pairs=8):
    """Neighbouring positions of a few rows, so that suffixes begin alike; true activations at full context."""
    r = np.random.default_rng(2)
    rows = r.integers(3, 30, size=(12, 20))
    ids = torch.from_numpy(np.concatenate([np.full((12, 1), prefix_id(lm.tokenizer)), rows], axis=1))
    x = lm.capture_by_hooks(ids, [hookpoint])[hookpoint][:, 1:].float()
    z = sae.encode(x.reshape(-1, x.shape[-1])).numpy().reshape(12, 20, -1)
    chosen = np.argsort(-(z > 0).sum((0, 1)), kind="stable")[3 : 3 + n_latents].tolist()
    return {
        latent: [Pair(tuple(rows[b, : t + 1].tolist()), float(z[b, t, latent]))
                 for b, t in r.permutation(np.argwhere(z[:, :, latent] > 0))[:n_pairs].tolist()]
        for latent in chosen
    }  # fmt: skip


class World:
    """One SAE on the tiny model, its pairs, and its code of any probe by a pass of that probe alone."""

    def __init__(self, lm, kind):
        self.lm, self.hookpoint, self.sae = lm, lm.default_hookpoint(), random_sae(kind, d_in=32)
        self.prefix = (prefix_id(lm.tokenizer),)
        self.pairs = pairs_of_text(lm, self.sae, self.hookpoint)
        self.known = {}

    def act(self, latent, tokens):
        if tokens not in self.known:
            ids = torch.tensor([[*self.prefix, *tokens]])
            x = self.lm.capture_by_hooks(ids, [self.hookpoint])[self.hookpoint][0, -1:]
            self.known[tokens] = self.sae.encode(x.float())[0].numpy()
        return self.known[tokens][latent]


@pytest.fixture(scope="module", params=["topk", "relu"])
def world(request, tiny_lm):
    return World(tiny_lm, request.param)


@pytest.mark.parametrize(("matcher", "longest"), [("longest", 8), ("released", None)])
def test_patterns_are_those_of_one_pass_per_probe(world, monkeypatch, matcher, longest):
    """Asked in groups, as the default decides, and all at once."""
    expected = {
        latent: [sequential(pair, lambda t, i=latent: world.act(i, t), matcher, longest) for pair in asked]
        for latent, asked in world.pairs.items()
    }
    kept = {(len(ids), None in ids, anchored) for of in expected.values() for ids, anchored, _, _ in of if ids}
    assert len(kept) >= 5 and any(wild for _, wild, _ in kept) and max(n for n, _, _ in kept) >= 3
    for share in (0.0, n2g.AT_ONCE_SHARE, 100.0):
        monkeypatch.setattr(n2g, "AT_ONCE_SHARE", share)
        ask = make_last_acts(world.lm, world.sae, world.hookpoint)
        built = build_many(world.pairs, ask, pad_id=PAD, prefix=world.prefix, matcher=matcher, max_suffix=longest)
        for latent, asked in world.pairs.items():
            for outcome, (ids, anchored, value, code) in zip(built[latent].outcomes, expected[latent], strict=True):
                assert outcome.code == code and (outcome.pattern is None) == (ids is None)
                if outcome.pattern is not None:
                    assert (outcome.pattern.ids, outcome.pattern.anchored) == (ids, anchored)
                    assert outcome.pattern.value == pytest.approx(value, rel=1e-4)
            assert len(built[latent].outcomes) == len(asked)


def test_dense_pairs_are_asked_about_at_once(tiny_lm):
    """All positions of a text: one question for the suffixes, one for their variants; a single pair goes by groups."""
    hookpoint, sae = tiny_lm.default_hookpoint(), random_sae("topk", d_in=32)
    text = tuple(np.random.default_rng(0).integers(3, 200, size=60).tolist())
    ask, questions = make_last_acts(tiny_lm, sae, hookpoint), []

    def last_acts(probes):
        questions.append(len(probes))
        return ask(probes)

    def rounds(pairs):
        questions.clear()
        build_many({0: pairs}, last_acts, pad_id=PAD, prefix=(1,))
        return len(questions)

    everything = [Pair(text[: n + 1], 1e9) for n in range(len(text))]  # no suffix reaches half of it
    assert rounds(everything) == 1 and questions == [sum(min(n, 8) for n in range(1, 61))]
    assert rounds(everything[-1:]) == 6 and questions == [1, 1, 1, 1, 2, 2]
