"""Average precision at the true rate, sides that lost too many windows, values that are no numbers."""

import math

import numpy as np
import pytest

from autointerp.classify import detection_scores, make_items
from autointerp.interfaces import ScoreJob
from autointerp.rates import average_precision, average_precision_interval
from autointerp.records import Exemplar, Explanation, Failure

PI = 0.1
SHARES = {"same_token": 0.1, "co_occurring": 0.2, "rest": 0.7}
REFUSED = Failure(code="refusal", stage="score")


def windows(n_silent: int = 20) -> list[Exemplar]:
    """20 positive windows of ten groups, uniform silent ones, ten of each of two hard kinds."""
    out = [
        Exemplar(exemplar_id=f"p{i}", latent=3, kind="quantile", split="score", group=i // 2) for i in range(20)
    ]
    drawn = [("silent", ("rest", "rest", "rest", "same_token", "co_occurring")[i % 5]) for i in range(n_silent)]
    drawn += [(kind, kind) for kind in ("same_token", "co_occurring") for _ in range(10)]
    return out + [
        Exemplar(exemplar_id=f"n{i}", latent=3, kind=kind, split="score", stratum=h, stratum_share=SHARES[h])
        for i, (kind, h) in enumerate(drawn)
    ]


def job(exemplars, pi: float | None = 0.005) -> ScoreJob:
    explanation = Explanation(explanation_id="x", sae_id="sae", latent=3, explainer="t", text="cats")
    return ScoreJob(explanation=explanation, sae_id="sae", latent=3, exemplars=tuple(exemplars), pi=pi)


def rows_of(the_job, values, threshold=0.5):
    items = make_items(the_job, the_job.exemplars, values, threshold, "toy")
    rows = detection_scores(the_job, items, scorer="toy", version=1, judge="toy", rank=True)
    return {(r.metric, r.group): r for r in rows}


def slow(pos, neg, weights, pi):
    """The definition, cut by cut: all windows at or above a value are called active."""
    total, before = 0.0, 0.0
    for cut in sorted({*pos, *neg}, reverse=True):
        recall = sum(p >= cut for p in pos) / len(pos)
        wrong = sum(w for n, w in zip(neg, weights, strict=True) if n >= cut)
        total += (recall - before) * pi * recall / (pi * recall + wrong) if recall else 0.0
        before = recall
    return total


@pytest.mark.parametrize("seed", range(20))
def test_average_precision_is_the_slow_definition(seed: int) -> None:
    draw = np.random.default_rng(seed)
    pos, neg = draw.integers(2, 9, 12).astype(float), draw.integers(0, 7, 25).astype(float)  # many ties
    weights = draw.random(25)
    pi = float(draw.uniform(0.01, 0.5))
    weights *= (1 - pi) / weights.sum()
    assert average_precision(pos, neg, weights, pi) == pytest.approx(slow(pos, neg, weights, pi), abs=1e-12)


def test_average_precision_equals_sklearn_on_weighted_copies() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    draw = np.random.default_rng(0)
    pos, neg = draw.normal(1, 1, 30), draw.normal(0, 1, 40)
    weights = np.full(40, (1 - PI) / 40)
    theirs = metrics.average_precision_score(
        [1] * 30 + [0] * 40, [*pos, *neg], sample_weight=[PI / 30] * 30 + weights.tolist()
    )
    assert average_precision(pos, neg, weights, PI) == pytest.approx(theirs, abs=1e-9)


def test_a_constant_judge_has_the_base_rate_and_an_oracle_one() -> None:
    weights = [(1 - PI) / 5] * 5
    assert average_precision([0.5] * 4, [0.5] * 5, weights, PI) == pytest.approx(PI)
    assert average_precision([0.9] * 4, [0.5] * 5, weights, PI) == pytest.approx(1.0)
    assert average_precision([0.1] * 4, [0.5] * 5, weights, PI) == pytest.approx(PI)
    assert average_precision([], [0.5] * 5, weights, PI) is None
    assert average_precision([0.5], [0.5], [1.0], 1.0) is None


def test_the_interval_is_a_bootstrap_of_the_same_number() -> None:
    draw = np.random.default_rng(2)
    pos, neg, weights = draw.normal(1, 1, 40), draw.normal(0, 1, 40), np.full(40, (1 - PI) / 40)
    low, high = average_precision_interval(pos, neg, weights, PI, "k")
    assert low < average_precision(pos, neg, weights, PI) < high
    assert average_precision_interval(pos, neg, weights, PI, "k") == (low, high)
    again = []
    for _ in range(400):  # the plain bootstrap, one draw at a time
        i, j = draw.integers(40, size=40), draw.integers(40, size=40)
        again.append(average_precision(pos[i], neg[j], weights[j], PI))
    assert (low, high) == pytest.approx(np.percentile(again, [2.5, 97.5]), abs=0.06)


def test_rows_weigh_strata_by_their_share() -> None:
    """All of stratum same_token (share .1) is ranked above the positives, nothing else: at full recall 1 - phi ..."""
    the_job = job(windows(), pi=PI)
    values = [0.5 if e.positive else 1.0 if e.stratum == "same_token" else 0.0 for e in the_job.exemplars]
    row = rows_of(the_job, values)["average_precision", ""]
    assert row.value == pytest.approx(PI / (PI + (1 - PI) * 0.1))  # same_token is a tenth of the silent windows
    assert row.ci_low < row.value < row.ci_high and row.base_rate == PI
    assert (row.n_pos, row.n_neg) == (20, 40)


def test_windows_of_no_known_share_do_not_enter() -> None:
    near = [
        Exemplar(exemplar_id=f"near{i}", latent=3, kind="embedding_near", split="score", stratum="rest",
                 stratum_share=0.7) for i in range(5)
    ]  # fmt: skip
    plain, more = job(windows(), pi=PI), job(windows() + near, pi=PI)
    values = [math.sin(i) for i in range(len(plain.exemplars))]
    one, two = rows_of(plain, values), rows_of(more, values + [9.0] * 5)
    assert one["average_precision", ""] == two["average_precision", ""]


def test_without_strata_all_silent_windows_weigh_alike() -> None:
    bare = [Exemplar(exemplar_id=f"p{i}", latent=3, kind="quantile", split="score", group=0) for i in range(4)]
    bare += [Exemplar(exemplar_id=f"s{i}", latent=3, kind="silent", split="score") for i in range(8)]
    values = [0.9, 0.8, 0.3, 0.2, 0.85, *[0.1] * 7]
    found = rows_of(job(bare, pi=PI), values)["average_precision", ""].value
    assert found == pytest.approx(slow(values[:4], values[4:], [(1 - PI) / 8] * 8, PI))
    assert rows_of(job(bare, pi=None), values)["average_precision", ""].null_reason == "undefined"


def test_in_the_worst_case_what_failed_was_wrong() -> None:
    the_job = job(windows(), pi=PI)
    values = [float(e.positive) for e in the_job.exemplars]
    values[0] = REFUSED
    row = rows_of(the_job, values)["average_precision", ""]
    assert row.value == 1.0 and row.n_failed == 1
    assert row.value_worst == pytest.approx(19 / 20 + PI / 20)  # the lost one is found last, among all silent windows
    values = [float(e.positive) for e in the_job.exemplars]
    values[-1] = REFUSED
    assert rows_of(the_job, values)["average_precision", ""].value_worst < 1.0


# --- sides that lost too many ----------------------------------------------------------------------------------------


def lost(chosen, n: int):
    """Oracle values of 20 positive and 60 silent windows, the first n of those chosen refused."""
    the_job = job(windows(n_silent=40))
    values: list[object] = [float(e.positive) for e in the_job.exemplars]
    for i in [i for i, e in enumerate(the_job.exemplars) if chosen(e)][:n]:
        values[i] = REFUSED
    return rows_of(the_job, values)


def test_a_judge_silent_about_active_windows_has_no_recall() -> None:
    """5 of 80 failed, which is few, but they are 5 of the 20 active ones: what is left says nothing of recall."""
    rows = lost(lambda e: e.positive, 5)
    for metric in ("recall", "balanced_accuracy", "precision", "precision_at_half", "f1", "auc", "average_precision"):
        row = rows[metric, ""]
        assert row.value is None and row.null_reason == "too_many_failures" and row.ci_low is None, metric
        assert row.value_worst is not None
    assert rows["recall", "decile=9"].null_reason == "too_many_failures"
    assert rows["fpr_silent", ""].value == rows["phi", ""].value == 0.0  # the silent ones were all answered


def test_a_judge_silent_about_silent_windows_has_no_false_positive_rate() -> None:
    rows = lost(lambda e: e.kind == "silent", 6)
    assert rows["recall", ""].value == 1.0 and rows["phi", ""].value == 0.0  # 6 of the 60 of all strata: a tenth
    for metric in ("fpr_silent", "balanced_accuracy", "auc"):
        assert rows[metric, ""].value is None and rows[metric, ""].null_reason == "too_many_failures"
    assert rows["auc", "kind=same_token"].value == 1.0
    assert rows["fpr", "kind=silent"].value is None and rows["fpr", "kind=co_occurring"].value == 0.0


def test_a_hard_kind_fails_by_itself() -> None:
    rows = lost(lambda e: e.kind == "same_token", 2)
    assert rows["fpr", "kind=same_token"].null_reason == rows["auc", "kind=same_token"].null_reason
    assert rows["fpr", "kind=same_token"].null_reason == "too_many_failures"
    assert rows["recall", ""].value == rows["balanced_accuracy", ""].value == rows["precision", ""].value == 1.0


def test_one_failure_in_a_tenth_costs_nothing_but_the_count() -> None:
    rows = lost(lambda e: e.positive, 2)
    assert rows["recall", ""].value == rows["auc", ""].value == 1.0 and rows["recall", ""].n_failed == 2


# --- no numbers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_is_a_failure_and_no_answer(bad: float) -> None:
    the_job = job(windows())
    values = [float(e.positive) for e in the_job.exemplars]
    values[3] = bad
    items = make_items(the_job, the_job.exemplars, values, 0.5, "toy")
    assert items[3].verdict is None and items[3].value is None and items[3].failure.code == "non_finite"
    rows = rows_of(the_job, values)
    assert rows["auc", ""].value == 1.0 and rows["recall", ""].n_failed == 1
    everything = rows_of(the_job, [bad] * len(values))
    assert {r.value for r in everything.values()} == {None}


def test_kinds_that_were_not_asked_about_are_not_called_absent() -> None:
    """A judge that reads uniform silent windows alone says nothing of hard ones; where there are none, a null row."""
    the_job = job(windows())
    few = [e for e in the_job.exemplars if e.positive or e.kind == "silent"]
    items = make_items(the_job, few, [float(e.positive) for e in few], 0.5, "toy")
    rows = detection_scores(the_job, items, scorer="toy", version=1, judge="toy")
    assert not [r for r in rows if "same_token" in r.group]
    bare = job(few)
    rows = detection_scores(bare, items, scorer="toy", version=1, judge="toy")
    assert [r.null_reason for r in rows if r.group == "kind=same_token"] == ["no_hard_negative"]
