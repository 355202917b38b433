"""N2G against planted latents whose rule is known, and matching against brute force."""

import json

import numpy as np
import pytest

from autointerp.n2g import (
    Pair,
    PatternSet,
    TokenIndex,
    build,
    build_many,
    pad_token,
    predict,
    suffix_groups,
    token_patterns,
)
from autointerp.n2g_patterns import Pattern, _trie, _walk
from sae.errors import ConfigError, Unsupported

A, B, C, T, NOT, PAD, BOS = 10, 11, 12, 13, 14, 99, 0
PREFIX = (BOS,)


def tokens_BL(rows=60, length=40, vocabulary=8, seed=0):
    rng = np.random.default_rng(seed)
    body = rng.choice([A, B, C, T, NOT, 20, 21, 22][:vocabulary], size=(rows, length)).astype(np.uint16)
    body[:, 0] = BOS
    return body


def oracle(rule):
    """last_acts of a latent that fires with 4.0 where ``rule(context)`` holds; the context has its prefix removed."""

    def last_acts(probes):
        return np.array([4.0 if rule(tokens[1:]) else 0.0 for _, tokens in probes], dtype=np.float32)

    return last_acts


def pairs_and_truth(rule, rows, n=16):
    """Every row is one document: pairs from the first half, truth on the second."""
    half = len(rows) // 2
    pairs = []
    for row in rows[:half]:
        found = [t for t in range(1, len(row)) if rule(tuple(row[1 : t + 1].tolist()))]
        pairs += [Pair(tuple(row[1 : t + 1].tolist()), 4.0) for t in found[:1]]
    score = rows[half:]
    truth = np.array([[t > 0 and rule(tuple(r[1 : t + 1].tolist())) for t in range(len(r))] for r in score])
    return pairs[:n], score, truth.reshape(-1)


def precision_recall(rule, rows=None):
    pairs, score, truth = pairs_and_truth(rule, tokens_BL() if rows is None else rows)
    result = build(pairs, oracle(rule), pad_id=PAD, prefix=PREFIX)
    fired = np.zeros(truth.size, dtype=bool)
    fired[predict(result.patterns, TokenIndex(score)).flat_n] = True
    hits = (fired & truth).sum()
    return result, hits / max(fired.sum(), 1), hits / truth.sum()


def test_single_token():
    result, precision, recall = precision_recall(lambda c: c[-1:] == (T,))
    assert [(p.ids, p.anchored, p.value) for p in result.patterns.patterns] == [((T,), False, 4.0)]
    assert result.patterns.patterns[0].n_docs == result.n_pairs == 16
    assert (precision, recall) == (1.0, 1.0)


def test_bigram():
    result, precision, recall = precision_recall(lambda c: c[-2:] == (A, B))
    assert [p.ids for p in result.patterns.patterns] == [(A, B)]
    assert (precision, recall) == (1.0, 1.0)


def test_wildcard_in_the_middle():
    result, precision, recall = precision_recall(lambda c: len(c) >= 3 and c[-3] == A and c[-1] == B)
    assert {p.ids for p in result.patterns.patterns} == {(A, None, B)}
    assert (precision, recall) == (1.0, 1.0)


def test_last_token_may_be_the_wildcard():
    result, precision, recall = precision_recall(lambda c: len(c) >= 2 and c[-2] == A)
    assert {p.ids for p in result.patterns.patterns} == {(A, None)}
    assert (precision, recall) == (1.0, 1.0)


def test_anchored_at_the_row_start():
    rows = tokens_BL()
    rows[::2, 1] = T
    result, precision, recall = precision_recall(lambda c: c == (T,), rows)
    assert [(p.ids, p.anchored) for p in result.patterns.patterns] == [((T,), True)]
    assert (precision, recall) == (1.0, 1.0)


def test_a_negated_context_costs_precision_not_recall():
    """What recall alone hides: "t unless preceded by not" is explained as "t"."""
    _, precision, recall = precision_recall(lambda c: c[-1] == T and c[-2:-1] != (NOT,))
    assert recall == 1.0 and 0.5 < precision < 1.0


def test_always_on_is_degenerate_and_dropped():
    result, _, _ = precision_recall(lambda c: True)
    assert result.patterns.patterns == () and result.n_degenerate == result.n_pairs
    assert result.failure is not None and result.failure.code == "n2g_degenerate"


def test_unreproducible_is_a_counted_failure():
    pairs = [Pair((A, B), 4.0)]
    result = build(pairs, lambda probes: np.zeros(len(probes)), pad_id=PAD, prefix=PREFIX)
    assert result.failure is not None and result.failure.code == "n2g_unreproducible" and result.n_unreproducible == 1
    nan = build(pairs, lambda probes: np.full(len(probes), np.nan), pad_id=PAD, prefix=PREFIX)
    assert nan.failure is not None and nan.failure.code == "n2g_unreproducible"
    assert build([], oracle(bool), pad_id=PAD).failure.code == "too_few_positive"


def test_released_keeps_what_longest_drops():
    keep = build_many({0: [Pair((A, B), 4.0)]}, lambda p: np.zeros(len(p)), pad_id=PAD, matcher="released")[0]
    # Nothing reproduces it: the whole context stays, with the original activation; every token matters.
    assert [(p.ids, p.value) for p in keep.patterns.patterns] == [((A, B), 4.0)]
    everywhere = build_many({0: [Pair((A,), 4.0)]}, lambda p: np.full(len(p), 4.0), pad_id=PAD, matcher="released")[0]
    assert everywhere.patterns.patterns[0].fires_everywhere and everywhere.failure is None
    index = TokenIndex(tokens_BL(rows=2))
    assert predict(everywhere.patterns, index).flat_n.size == 2 * 39  # every position but the prefix


def test_value_is_the_mean_of_the_documents_or_the_last_one():
    strength = {A: 3.0, B: 5.0}

    def last_acts(probes):  # T with any token before it; that token only sets the strength
        return np.array([strength.get(t[-2], 3.0) if t[-1] == T and len(t) > 2 else 0.0 for _, t in probes])

    pairs = [Pair((A, T), 3.0), Pair((B, T), 5.0)]
    for matcher, expected in (("longest", 4.0), ("released", 5.0)):
        result = build_many({7: pairs}, last_acts, pad_id=PAD, prefix=PREFIX, matcher=matcher)[7]
        assert [(p.ids, p.n_docs, p.value) for p in result.patterns.patterns] == [((None, T), 2, expected)]


def test_suffix_groups_cover_every_length_once():
    for length in (1, 2, 3, 8, 9, 17, 25, 40):
        groups = suffix_groups(length)
        assert [n for g in groups for n in g] == list(range(1, length + 1))
        assert all(len(g) <= 8 for g in groups)


def test_grouped_search_equals_the_sequential_one():
    """The first suffix that qualifies counts, also when a longer one of the same group qualifies too."""
    rng = np.random.default_rng(1)
    for _ in range(50):
        length = int(rng.integers(1, 30))
        tokens = tuple(rng.integers(100, 200, size=length).tolist())
        strength = {n: float(rng.random() * 4) for n in range(1, length + 1)}

        def last_acts(probes, tokens=tokens, strength=strength):
            return np.array([strength[len(t)] if t == tokens[-len(t) :] else 0.0 for _, t in probes])

        result = build([Pair(tokens, 4.0)], last_acts, pad_id=PAD, max_suffix=None)
        first = next((n for n in range(1, length + 1) if strength[n] >= 2.0), None)
        if first is None:
            assert result.n_unreproducible == 1
        else:
            assert result.patterns.patterns[0].ids == tokens[-first:]
            assert result.patterns.patterns[0].value == strength[first]


def test_a_longer_suffix_than_allowed_is_unreproducible():
    tokens = tuple(range(100, 120))
    asked = []

    def last_acts(probes):
        asked.extend(len(t) for _, t in probes)
        return np.array([4.0 if len(t) >= 9 and t == tokens[-len(t) :] else 0.0 for _, t in probes])

    assert build([Pair(tokens, 4.0)], last_acts, pad_id=PAD, max_suffix=8).failure.code == "n2g_unreproducible"
    assert sorted(asked) == list(range(1, 9))
    assert len(build([Pair(tokens, 4.0)], last_acts, pad_id=PAD, max_suffix=9).patterns.patterns[0].ids) == 9
    with pytest.raises(ConfigError, match="max_suffix"):
        build([Pair(tokens, 4.0)], last_acts, pad_id=PAD, max_suffix=0)


def test_order_of_latents_changes_nothing():
    rules = {1: lambda c: c[-1:] == (T,), 2: lambda c: c[-2:] == (A, B), 3: lambda c: len(c) >= 2 and c[-2] == C}
    pairs = {latent: pairs_and_truth(rule, tokens_BL())[0] for latent, rule in rules.items()}

    def last_acts(probes):
        return np.array([4.0 if rules[latent](tokens[1:]) else 0.0 for latent, tokens in probes])

    together = build_many(pairs, last_acts, pad_id=PAD, prefix=PREFIX)
    for latent in reversed(list(rules)):
        alone = build_many({latent: pairs[latent]}, last_acts, pad_id=PAD, prefix=PREFIX)[latent]
        assert alone.patterns == together[latent].patterns


def random_set(rng, matcher="longest", n=6):
    patterns = {}
    for _ in range(n):
        m = int(rng.integers(1, 5))
        ids = tuple(None if rng.random() < 0.35 else int(rng.integers(5)) for _ in range(m))
        anchored = bool(rng.random() < 0.2)
        if matcher == "released" or any(i is not None for i in ids) or anchored:
            patterns[ids, anchored] = Pattern(ids, anchored, float(rng.random()), int(rng.integers(1, 5)))
    return PatternSet(tuple(patterns.values()), 3, matcher, "abc")


def brute_longest(patterns, tokens, first):
    out = {}
    for r, row in enumerate(tokens.tolist()):
        for t in range(first, len(row)):
            best = None
            for p in patterns.patterns:
                begin = t - len(p.ids) + 1
                if begin < first or (p.anchored and begin != first):
                    continue
                if all(i is None or i == row[begin + j] for j, i in enumerate(p.ids)):
                    best = max(best, p.rank()) if best else p.rank()
            if best:
                out[r * len(row) + t] = np.float32(best[-1])
    return out


def test_matching_equals_brute_force_on_1e5_tokens():
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 5, size=(1000, 100)).astype(np.uint16)
    index = TokenIndex(tokens, first_position=1)
    patterns = random_set(rng)
    found = predict(patterns, index)
    expected = brute_longest(patterns, tokens, 1)
    assert dict(zip(found.flat_n.tolist(), found.value_n, strict=True)) == expected and len(expected) > 1000
    assert np.all(np.diff(found.flat_n) > 0)


@pytest.mark.parametrize("first", [0, 1])
def test_matching_equals_brute_force_for_many_small_sets(first):
    rng = np.random.default_rng(2)
    tokens = rng.integers(0, 5, size=(20, 12)).astype(np.uint16)
    index = TokenIndex(tokens, first_position=first)
    for _ in range(100):
        patterns = random_set(rng)
        found = predict(patterns, index)
        assert dict(zip(found.flat_n.tolist(), found.value_n, strict=True)) == brute_longest(patterns, tokens, first)


def test_released_walk_equals_the_walk_at_every_token_and_stays_inside_longest():
    rng = np.random.default_rng(3)
    tokens = rng.integers(0, 5, size=(20, 12)).astype(np.uint16)
    index = TokenIndex(tokens, first_position=1)
    differ = 0
    for _ in range(100):
        released = random_set(rng, "released")
        found = predict(released, index)
        root = _trie(released.patterns)
        everywhere = {}
        for end in range(tokens.size):
            first = end - end % 12 + 1
            if end >= first and (value := _walk(root, index.tokens_N, first, end)) is not None:
                everywhere[end] = np.float32(value)
        assert dict(zip(found.flat_n.tolist(), found.value_n, strict=True)) == everywhere
        longest = predict(PatternSet(released.patterns, 3), index)
        assert set(found.flat_n) <= set(longest.flat_n)
        differ += not (np.array_equal(found.flat_n, longest.flat_n) and np.array_equal(found.value_n, longest.value_n))
    assert differ > 10  # the pinned defects of the released walk do occur


def test_shadowing_and_backtracking():
    row = np.array([[BOS, A, B, C, B]], dtype=np.uint16)
    shadow = (Pattern((B,), False, 1.0), Pattern((A, B), False, 9.0))
    index = TokenIndex(row)
    assert predict(PatternSet(shadow, PAD), index).value_n.tolist() == [9.0, 1.0]
    assert predict(PatternSet(shadow, PAD, "released"), index).value_n.tolist() == [1.0, 1.0]
    # A B ends in a literal child [C, B] that leads nowhere; only the wildcard path matches.
    blocked = (Pattern((T, C, B), False, 5.0), Pattern((A, None, None, B), False, 7.0))
    assert predict(PatternSet(blocked, PAD), index).flat_n.tolist() == [4]
    assert predict(PatternSet(blocked, PAD, "released"), index).flat_n.tolist() == []


def test_no_match_crosses_a_row_or_uses_the_prefix():
    rows = np.array([[BOS, C, A], [BOS, B, C]], dtype=np.uint16)
    index = TokenIndex(rows)
    assert predict(PatternSet((Pattern((A, None, B), False, 1.0),), PAD), index).flat_n.size == 0
    assert predict(PatternSet((Pattern((None, C), False, 1.0),), PAD), index).flat_n.tolist() == [5]
    assert predict(PatternSet((Pattern((BOS, C), False, 1.0),), PAD), index).flat_n.size == 0


def test_keep_mask_and_unknown_ids():
    rows = tokens_BL(rows=3)
    keep = np.zeros(rows.size, dtype=bool)
    keep[5:50] = True
    index = TokenIndex(rows)
    all_ = predict(PatternSet((Pattern((T,), False, 1.0),), PAD), index)
    kept = predict(PatternSet((Pattern((T,), False, 1.0),), PAD), index, keep)
    assert kept.flat_n.tolist() == [f for f in all_.flat_n.tolist() if keep[f]]
    assert predict(PatternSet((Pattern((123_456,), False, 1.0),), PAD), index).flat_n.size == 0
    assert predict(PatternSet((), PAD), index).flat_n.size == 0


def test_round_trip_and_strictness():
    rng = np.random.default_rng(4)
    for matcher in ("longest", "released"):
        patterns = random_set(rng, matcher)
        assert PatternSet.load(json.loads(json.dumps(patterns.dump()))) == patterns
    with pytest.raises(ConfigError, match="version"):
        PatternSet.load(random_set(rng).dump() | {"version": 99})
    with pytest.raises(ConfigError, match="dumped pattern set"):
        PatternSet.load({"version": 1, "matcher": "longest"})


def test_words():
    names = {A: " court", B: " of", T: " law"}
    decode = lambda ids: "".join(names[i] for i in ids)  # noqa: E731
    patterns = PatternSet(
        (Pattern((A, B, None), False, 1.0, 3), Pattern((T,), True, 2.0, 1), Pattern((A, None, T), False, 1.0, 1)), PAD
    )
    assert patterns.words(decode) == '"... court of *"; "^ law"; "... court * law"'
    assert patterns.words(decode, limit=1) == '"... court of *"'


def test_unigram_floor():
    floor = token_patterns([Pair((A, T), 2.0), Pair((B, T), 4.0), Pair((C,), 1.0)], pad_id=PAD)
    assert [(p.ids, p.value, p.n_docs) for p in floor.patterns] == [((C,), 1.0, 1), ((T,), 3.0, 2)]


def test_pad_token_of_a_real_tokenizer():
    from tiny import byte_tokenizer

    tokenizer = byte_tokenizer()
    assert tokenizer.decode([pad_token(tokenizer)]) == "_"

    class Splitting:
        def encode(self, text, add_special_tokens):
            return [1, 2]

    with pytest.raises(Unsupported, match="pad_id"):
        pad_token(Splitting())


def test_bad_input_is_refused():
    with pytest.raises(ConfigError, match="activation 0"):
        build([Pair((A,), 0.0)], oracle(bool), pad_id=PAD)
    with pytest.raises(ConfigError, match="matcher"):
        build_many({}, oracle(bool), pad_id=PAD, matcher="best")
    with pytest.raises(ConfigError, match="last_acts returned"):
        build([Pair((A,), 1.0)], lambda probes: np.zeros(1 + len(probes)), pad_id=PAD)
