"""The bigram floor against a count by hand."""

import math
from collections import Counter

import numpy as np
import pytest

from evals import bigram

V = 12


class Text:
    def __init__(self, rows=40, L=16, seed=0):
        r = np.random.default_rng(seed)
        self.tokens_BL = r.integers(2, V - 2, size=(rows, L)).astype(np.uint16)  # the last two are never seen
        self.tokens_BL[:, 0] = 0
        self.tokens_BL[r.random((rows, L)) < 0.05] = 1  # special
        self.docs = np.cumsum(r.random(rows * L) < 0.1).reshape(rows, L)

    def doc_ids_BL(self):
        return self.docs


@pytest.fixture(scope="module")
def text() -> Text:
    return Text()


def by_hand(text: Text) -> tuple[Counter, Counter, Counter]:
    pairs, rows, words = Counter(), Counter(), Counter()
    for ids, docs in zip(text.tokens_BL.tolist(), text.docs.tolist(), strict=True):
        for t in range(1, len(ids) - 1):
            if docs[t] == docs[t + 1] and ids[t] > 1 and ids[t + 1] > 1:
                pairs[ids[t], ids[t + 1]] += 1
                rows[ids[t]] += 1
                words[ids[t + 1]] += 1
    return pairs, rows, words


def test_every_pair_equals_the_count_by_hand(text, monkeypatch) -> None:
    pairs, rows, words = by_hand(text)
    total = sum(words.values())
    first, following = (a.ravel() for a in np.meshgrid(np.arange(2, V), np.arange(2, V)))
    expected = []
    for v, w in zip(first.tolist(), following.tolist(), strict=True):
        unigram = (words[w] + 0.1) / (total + 0.1 * V)
        expected.append(-math.log((pairs[v, w] + 0.1 * V * unigram) / (rows[v] + 0.1 * V)))
    assert len(pairs) > 30
    found = bigram.losses(text, first, following, (0, 1), V)
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    monkeypatch.setattr(bigram, "CHUNK_TOKENS", 40)  # rows in chunks give the same counts
    np.testing.assert_array_equal(bigram.losses(text, first, following, (0, 1), V), found)


def test_a_distribution_that_backs_off_to_the_unigram(text) -> None:
    _, _, words = by_hand(text)
    every = np.arange(V)
    for v in (2, 5, V - 1):
        p = np.exp(-bigram.losses(text, np.full(V, v), every, (0, 1), V))
        assert p.sum() == pytest.approx(1, abs=1e-12)
    unigram = np.array([words[w] + 0.1 for w in every.tolist()]) / (sum(words.values()) + 0.1 * V)
    np.testing.assert_allclose(p, unigram, rtol=1e-12)  # V - 1 was never seen: nothing but the unigram is left


def test_no_text_is_uniform() -> None:
    empty = Text(rows=1, L=2)
    np.testing.assert_allclose(bigram.losses(empty, np.array([2, 3]), np.array([4, 5]), (0, 1), V), math.log(V))
