"""The released N2G against its description read once more, plainly and one document at a time, with dictionaries.

openai/sparse_autoencoder, explanations.py at 4965b94: shortest suffix by a loop, one token replaced at a time, a trie
of reversed documents in which the last one overwrites, a greedy walk from each token. Written anew, nothing is copied.
"""

import hashlib

import numpy as np
import pytest

from autointerp.n2g import Pair, TokenIndex, build_many, predict

PAD, ANY, START, LEAF = 99, "any", "start", "leaf"
VOCABULARY = 5


def act_of(tokens, seed):
    """Some activation that hangs on the last three tokens and on how many there are; often 0."""
    digest = hashlib.blake2b(repr((seed, tokens[-3:], min(len(tokens), 4))).encode(), digest_size=2).digest()
    return max(0.0, int.from_bytes(digest, "little") / 65535 * 3 - 1)


def plain_trie(pairs, act):
    trie = {}
    for tokens, target in pairs:
        suffix, value = tokens, target
        for n in range(1, len(tokens) + 1):
            if act(tokens[-n:]) / target >= 0.5:
                suffix, value = tokens[-n:], act(tokens[-n:])
                break
        anchored = act((PAD, *suffix)) / target < 0.5
        place = trie
        for p in range(len(suffix) - 1, -1, -1):
            without = act((*suffix[:p], PAD, *suffix[p + 1 :]))
            step = ANY if 1 - without / value < 0.5 else suffix[p]
            place = place.setdefault(step, {})
        if anchored:
            place[START] = {}
            place = place[START]
        place[LEAF] = value
    return trie


def plain_walk(trie, row, end):
    place = trie
    for at in range(end, -1, -1):
        if row[at] in place:
            place = place[row[at]]
        elif ANY in place:
            place = place[ANY]
        else:
            return None
        if LEAF in place:
            return place[LEAF]
        if at == 0 and START in place:
            return place[START][LEAF]
    return None


@pytest.mark.parametrize("seed", range(40))
def test_building_and_walking_equal_a_plain_reading(seed):
    rng = np.random.default_rng(seed)
    pairs = []
    while len(pairs) < 6:
        tokens = tuple(rng.integers(0, VOCABULARY, rng.integers(1, 9)).tolist())
        # The full document may say less than half of what was stored: then no suffix reproduces it.
        pairs.append(Pair(tokens, act_of(tokens, seed) or 1.0))
    last_acts = lambda probes: np.array([act_of(t, seed) for _, t in probes])  # noqa: E731
    built = build_many({0: pairs}, last_acts, pad_id=PAD, matcher="released", max_suffix=None)[0]
    rows = rng.integers(0, VOCABULARY, size=(30, 12))
    found = predict(built.patterns, TokenIndex(rows.astype(np.uint16), first_position=0))
    trie = plain_trie(pairs, lambda t: act_of(t, seed))
    expected = {}
    for r, row in enumerate(rows.tolist()):
        for end in range(12):
            value = plain_walk(trie, row, end)
            if value is not None:
                expected[12 * r + end] = np.float32(value)
    assert dict(zip(found.flat_n.tolist(), found.value_n, strict=True)) == expected and expected
