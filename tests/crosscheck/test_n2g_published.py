"""N2G on the self-test of the released builder (openai/sparse_autoencoder, explanations.py), its cases stated anew.

Four rules over the tokens a, b, c, d: the pairs that the builder is given, and what the explanation must predict. Their
code pads with GPT-2's " _" (4808) and puts nothing before a row; ours has the row's prefix at position 0, unscored.
"""

import numpy as np
import pytest

from autointerp.n2g import Pair, TokenIndex, build_many, predict

A, B, C, D, E, PREFIX, PAD = 0, 1, 2, 3, 4, 9, 4808
MATCHERS = ("released", "longest")


def explain(rule, pairs, matcher):
    """``rule``: row without prefix -> whether its last token fires (1.0)."""

    def last_acts(probes):
        return np.array([float(rule(tokens[1:])) for _, tokens in probes], dtype=np.float32)

    return build_many({0: pairs}, last_acts, pad_id=PAD, prefix=(PREFIX,), matcher=matcher)[0]


def predicted(result, row):
    found = predict(result.patterns, TokenIndex(np.array([[PREFIX, *row]], dtype=np.uint16)))
    out = np.zeros(len(row) + 1)
    out[found.flat_n] = found.value_n
    return out[1:].tolist()


@pytest.mark.parametrize("matcher", MATCHERS)
def test_the_first_position_of_a_row(matcher):
    """Any token, if nothing is before it."""
    result = explain(lambda row: len(row) == 1, [Pair((A,), 1.0), Pair((B,), 1.0)], matcher)
    assert [(p.ids, p.anchored) for p in result.patterns.patterns] == [((None,), True)]
    assert predicted(result, [A, B, C]) == [1.0, 0.0, 0.0]
    assert predicted(result, [C, B, A]) == [1.0, 0.0, 0.0]


@pytest.mark.parametrize("matcher", MATCHERS)
def test_one_token(matcher):
    result = explain(lambda row: row[-1] == C, [Pair((A, B, C), 1.0), Pair((B, C), 1.0)], matcher)
    assert predicted(result, [B, C]) == [0.0, 1.0]
    assert predicted(result, [A, A, A]) == [0.0, 0.0, 0.0]
    assert predicted(result, [C, B, C]) == [1.0, 0.0, 1.0]


@pytest.mark.parametrize("matcher", MATCHERS)
def test_c_somewhere_after_a(matcher):
    def rule(row):
        return row[-1] == C and A in row[:-1]

    result = explain(rule, [Pair((A, B, C), 1.0), Pair((B, A, C), 1.0), Pair((A, C), 1.0)], matcher)
    assert {p.ids for p in result.patterns.patterns} == {(A, None, C), (A, C)}
    assert predicted(result, [B, C]) == [0.0, 0.0]
    assert predicted(result, [A, C]) == [0.0, 1.0]
    assert predicted(result, [A, E, C, A, C]) == [0.0, 0.0, 1.0, 0.0, 1.0]
    # "should be 0, 0, 0, 1 but we're not smart enough": wildcards stand for one token each, in both
    assert predicted(result, [A, B, B, C]) == [0.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize("matcher", MATCHERS)
def test_nothing_to_explain_predicts_nothing(matcher):
    result = explain(lambda row: False, [], matcher)
    assert result.patterns.patterns == () and result.failure is not None
    for row in ([B, C], [A, C], [A, E, C, A, C]):
        assert predicted(result, row) == [0.0] * len(row)
