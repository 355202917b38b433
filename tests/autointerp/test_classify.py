import math

import numpy as np
import pytest

from autointerp.classify import (
    DETECTION_METRICS,
    Counts,
    count_cells,
    detection_scores,
    drawn_rate,
    make_items,
    null_scores,
    positives_of,
)
from autointerp.interfaces import ScoreJob
from autointerp.rates import (
    auc,
    auc_interval,
    choose_threshold,
    effective_counts,
    f1_of,
    interval_of,
    pooled_precision,
    precision_at,
    wilson,
)
from autointerp.records import Exemplar, Explanation, Failure
from sae.errors import LeakError

SHARES = {"same_token": 0.1, "co_occurring": 0.2, "rest": 0.7}


def windows(split="score", n_groups=10, per_group=2, n_silent=20, n_hard=10):
    out = []
    for g in range(n_groups):
        for i in range(per_group):
            out.append(Exemplar(exemplar_id=f"{split}-p{g}-{i}", latent=3, kind="quantile", split=split, group=g))
    strata = ["rest", "rest", "rest", "same_token", "co_occurring"]
    for i in range(n_silent):
        h = strata[i % 5]
        out.append(
            Exemplar(
                exemplar_id=f"{split}-s{i}", latent=3, kind="silent", split=split, stratum=h, stratum_share=SHARES[h]
            )
        )
    for kind in ("same_token", "co_occurring"):
        for i in range(n_hard):
            out.append(
                Exemplar(
                    exemplar_id=f"{split}-{kind}{i}", latent=3, kind=kind, split=split, stratum=kind,
                    stratum_share=SHARES[kind],
                )
            )  # fmt: skip
    return out


def job(exemplars=None, pi=0.005):
    explanation = Explanation(explanation_id="x", sae_id="sae", latent=3, explainer="token_list", text="cats")
    return ScoreJob(
        explanation=explanation, sae_id="sae", latent=3, exemplars=tuple(exemplars or windows()), pi=pi
    )


def rows_of(the_job, values, threshold=0.5):
    items = make_items(the_job, the_job.exemplars, values, threshold, "toy")
    rows = detection_scores(the_job, items, scorer="toy", version=1, judge="toy")
    return {(r.metric, r.group): r for r in rows}


def test_worked_example_of_the_design():
    # AUTOINTERP 5.2: R = .9, phi = .05, pi = .005.
    assert precision_at(0.9, 0.05, 0.005) == pytest.approx(0.0045 / (0.0045 + 0.04975))
    assert round(precision_at(0.9, 0.05, 0.005), 3) == 0.083
    assert round(precision_at(0.9, 0.05, 0.5), 3) == 0.947


def test_worked_example_from_counts():
    # 18 of 20 positives found (spread over groups), 1 of 20 silent called active, no strata known.
    exemplars = [
        Exemplar(exemplar_id=f"p{g}{i}", latent=3, kind="quantile", split="score", group=g)
        for g in range(10) for i in range(2)
    ] + [Exemplar(exemplar_id=f"s{i}", latent=3, kind="silent", split="score") for i in range(20)]  # fmt: skip
    values = [0.0 if i in (0, 5) else 1.0 for i in range(20)] + [1.0] + [0.0] * 19
    rows = rows_of(job(exemplars), values)
    assert rows["recall", ""].value == pytest.approx(0.9)
    assert rows["phi", ""].value == pytest.approx(0.05)
    assert rows["precision", ""].value == pytest.approx(0.083, abs=5e-4)
    assert rows["precision_at_half", ""].value == pytest.approx(0.947, abs=5e-4)
    assert rows["balanced_accuracy", ""].value == pytest.approx((0.9 + 0.95) / 2)
    assert rows["recall", "decile=0"].value == 0.5
    p = rows["precision", ""]
    assert p.ci_low < p.value < p.ci_high < 1
    assert p.base_rate == 0.005 and (p.n_pos, p.n_neg) == (20, 20)


def test_oracle_reaches_the_maximum_and_coin_the_chance_level():
    oracle = rows_of(job(), [float(e.positive) for e in job().exemplars])
    for metric in ("recall", "balanced_accuracy", "precision", "precision_at_half", "f1", "auc"):
        assert oracle[metric, ""].value == 1.0
    assert oracle["phi", ""].value == 0.0 and oracle["fpr_silent", ""].value == 0.0
    # No false positive among few windows does not prove precision 1.
    assert oracle["precision", ""].ci_low < 0.3
    constant = rows_of(job(), [1.0] * len(job().exemplars))
    assert constant["balanced_accuracy", ""].value == 0.5
    assert constant["precision", ""].value == pytest.approx(0.005)  # "always yes" has precision pi
    assert constant["auc", ""].value == 0.5


def test_never_yes_has_no_precision_but_recall_zero():
    rows = rows_of(job(), [0.0] * len(job().exemplars))
    assert rows["precision", ""].value is None and rows["precision", ""].null_reason == "undefined"
    assert rows["f1", ""].value is None
    assert rows["recall", ""].value == 0.0


def test_phi_is_post_stratified():
    the_job = job(windows(n_silent=20, n_hard=10))
    # Everything of stratum same_token is called active, nothing else among the negatives.
    values = [1.0 if e.positive or e.stratum == "same_token" else 0.0 for e in the_job.exemplars]
    rows = rows_of(the_job, values)
    assert rows["phi", ""].value == pytest.approx(0.1)
    assert rows["fpr", "kind=same_token"].value == 1.0
    assert rows["fpr_silent", ""].value == pytest.approx(4 / 20)
    assert rows["fpr", "kind=co_occurring"].value == 0.0


def test_recall_weighs_groups_equally():
    exemplars = windows(n_groups=2, per_group=1) + [
        Exemplar(exemplar_id=f"more{i}", latent=3, kind="quantile", split="score", group=1) for i in range(8)
    ]
    the_job = job(exemplars)
    rows = rows_of(the_job, [1.0 if e.group == 0 else 0.0 for e in exemplars])
    assert rows["recall", ""].value == 0.5  # 1 of 10 windows, one group of two


def test_random_positives_do_not_enter_recall():
    extra = [Exemplar(exemplar_id=f"r{i}", latent=3, kind="random_positive", split="score") for i in range(9)]
    assert len(positives_of(windows() + extra)) == 20
    assert len(positives_of(extra)) == 9


def test_failures_leave_numerator_and_denominator():
    exemplars = windows()
    values = [float(e.positive) for e in exemplars]
    clean = rows_of(job(exemplars), values)
    failed = list(values)
    failed[0] = Failure(code="refusal", stage="score")
    rows = rows_of(job(exemplars), failed)
    assert rows["recall", ""].value == clean["recall", ""].value == 1.0
    assert rows["recall", ""].n_failed == 1
    assert rows["recall", ""].value_worst == pytest.approx(1 - 0.5 / 10)
    assert rows["auc", ""].value == 1.0 and rows["auc", ""].value_worst == pytest.approx(19 / 20)
    assert rows["recall", "decile=0"].n_pos == 1


def test_too_many_failures_make_the_metrics_null():
    exemplars = windows()
    values = [float(e.positive) for e in exemplars]
    for i in range(7):  # 7 of 60 = 11.7 %
        values[i] = Failure(code="timeout", stage="score")
    rows = rows_of(job(exemplars), values)
    for metric in DETECTION_METRICS:
        row = rows[metric, ""]
        assert row.value is None and row.null_reason == "too_many_failures" and row.value_worst is not None
        assert row.ci_low is None


def test_one_class_and_no_windows_are_typed():
    only_positive = [e for e in windows() if e.positive]
    rows = rows_of(job(only_positive), [1.0] * len(only_positive))
    assert rows["recall", ""].value == 1.0
    for metric in ("phi", "precision", "auc"):
        assert rows[metric, ""].null_reason == "one_class"
    assert rows["fpr", "kind=same_token"].null_reason == "no_hard_negative"
    only_negative = [e for e in windows() if not e.positive]
    rows = rows_of(job(only_negative), [0.0] * len(only_negative))
    assert rows["recall", ""].null_reason == "one_class" and rows["phi", ""].value == 0.0
    assert all(r.value is None for r in null_scores(job(), "no_candidate", ("auc",), scorer="s", version=1, judge="j"))


def test_verdicts_without_values_give_no_auc():
    the_job = job()
    items = [
        type(i)(**{**i.__dict__, "value": None})
        for i in make_items(the_job, the_job.exemplars, [1.0] * len(the_job.exemplars), 0.5, "toy")
    ]
    rows = detection_scores(the_job, items, scorer="toy", version=1, judge="toy")
    assert not any(r.metric == "auc" for r in rows) and any(r.metric == "recall" for r in rows)


def test_order_does_not_matter():
    the_job = job()
    values = [math.sin(i) for i in range(len(the_job.exemplars))]
    items = make_items(the_job, the_job.exemplars, values, 0.1, "toy")
    forward = detection_scores(the_job, items, scorer="toy", version=1, judge="toy")
    backward = detection_scores(the_job, items[::-1], scorer="toy", version=1, judge="toy")
    assert forward == backward


def test_a_job_with_windows_of_another_split_is_refused():
    with pytest.raises(LeakError, match="latent 3"):
        job(windows(split="explain"))


def test_auc_with_ties_equals_the_slow_definition():
    generator = np.random.default_rng(0)
    pos, neg = generator.integers(0, 5, 30), generator.integers(0, 4, 40)
    slow = np.mean([1.0 if p > n else 0.5 if p == n else 0.0 for p in pos for n in neg])
    assert auc(pos, neg) == pytest.approx(slow)
    assert auc([], [1.0]) is None
    low, high = auc_interval(pos, neg, "key")
    assert low < slow < high
    assert auc_interval(pos, neg, "key") == (low, high)  # deterministic


def test_wilson_known_values():
    # Newcombe 1998, Statistics in Medicine 17: 81 of 263 -> 0.2553 to 0.3662; 0 of 20 -> 0 to 0.1611.
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)
    assert wilson(0, 0) is None


def test_threshold():
    cut = choose_threshold([0.1, 0.2, 0.7, 0.9], [False, False, True, True])
    assert cut == pytest.approx(0.45)
    assert math.isfinite(choose_threshold([0.5, 0.5, 0.5], [True, False, True]))
    assert choose_threshold([1.0, 2.0, 9.0], [True, True, True]) == 2.0
    with pytest.raises(ValueError, match="calibration"):
        choose_threshold([], [])


def test_pooled_precision():
    # One rare perfect latent and one frequent useless one: the pool is not the mean.
    pooled = pooled_precision([0.01, 0.1], [1.0, 1.0], [0.0, 0.5])
    assert pooled == pytest.approx(0.11 / (0.11 + 0.45))
    assert pooled_precision([], [], []) is None
    assert f1_of(None, 1.0) is None and f1_of(0.0, 0.0) == 0.0 and f1_of(1.0, 0.5) == pytest.approx(2 / 3)


def test_strata_without_items_are_left_out():
    exemplars = [e for e in windows(n_hard=0) if e.positive or e.stratum != "co_occurring"]
    the_job = job(exemplars)
    cells = count_cells(exemplars, make_items(the_job, exemplars, [0.0] * len(exemplars), 0.5, "toy"))
    assert sum(cells.shares.values()) == pytest.approx(1.0)
    assert set(cells.shares) == {"same_token", "rest"}


def test_no_rate_lies_outside_its_own_interval():
    """19 of 20 found over ten groups of two: the prior of each group by itself had drawn the interval to [.67, .91]."""
    exemplars = windows()
    positive = [e.exemplar_id for e in exemplars if e.positive]
    silent = [e.exemplar_id for e in exemplars if not e.positive]
    for found in (0, 1, 10, 19, 20):
        for false in (0, 1, 5, len(silent) - 1, len(silent)):
            yes = {*positive[:found], *silent[:false]}
            rows = rows_of(job(exemplars, pi=0.1), [float(e.exemplar_id in yes) for e in exemplars])
            for (metric, group), r in rows.items():
                if r.value is not None and r.ci_low is not None:
                    assert 0 <= r.ci_low <= r.value <= r.ci_high <= 1, (metric, group, found, false, r)
                    assert r.ci_low < r.ci_high
    assert rows_of(job(exemplars), [float(e.positive) for e in exemplars])["recall", ""].ci_low > 0.8


@pytest.mark.parametrize("rate", [0.5, 0.8, 0.95])
def test_recall_over_ten_groups_of_two_windows_is_covered(rate):
    """95 % intervals hold the truth in 92 % of 400 samples at least; they held it in 0 % at .95 and 68 % at .8."""
    generator = np.random.default_rng(int(100 * rate))
    held = 0
    for _ in range(400):
        hits = generator.binomial(2, rate, size=10)
        draws = drawn_rate("recall", [(0.1, Counts(int(h), 2 - int(h))) for h in hits])
        found = interval_of(draws, hits.sum() / 20)
        held += found.low <= rate <= found.high
    assert held / 400 >= 0.92, held


def test_false_positives_over_strata_of_unequal_share_are_covered():
    generator = np.random.default_rng(7)
    shares, ns, rates = [0.02, 0.1, 0.05, 0.83], [6, 8, 5, 17], [0.9, 0.5, 0.6, 0.3]
    truth, held = float(np.dot(shares, rates)), 0
    for _ in range(400):
        hits = [int(generator.binomial(n, p)) for n, p in zip(ns, rates, strict=True)]
        cells = [(w, Counts(h, n - h)) for w, h, n in zip(shares, hits, ns, strict=True)]
        found = interval_of(drawn_rate("phi", cells), float(np.dot(shares, np.array(hits) / ns)))
        held += found.low <= truth <= found.high
    assert 0.92 <= held / 400 <= 0.99, held


def test_effective_counts():
    assert effective_counts([0.1] * 10, [2] * 9 + [1], [2] * 10) == pytest.approx((19, 1))
    assert effective_counts([1.0], [3], [20]) == pytest.approx((3, 17))
    # Half of the weight on one window: worth no more than its variance allows.
    assert sum(effective_counts([0.5, 0.5], [1, 50], [1, 100])) == pytest.approx(1 / (0.25 + 0.0025))


def test_a_perfect_order_is_not_certain():
    """Every resample of a perfect order is perfect; the interval was [1, 1]."""
    low, high = auc_interval([2.0] * 20, [1.0] * 20, "key")
    assert high == 1.0 and low == pytest.approx(0.8987, abs=1e-4)
    assert auc_interval([1.0] * 20, [2.0] * 20, "key") == pytest.approx((0.0, 1 - low))
    assert auc_interval([2.0] * 4, [1.0] * 4, "key").low < low
    assert auc_interval([1.0] * 20, [1.0] * 20, "key") is None  # a constant judge
    # Newcombe 2006, method 5: at the bound, |theta - value| = z standard errors.
    theta, n = low, 20
    shape = 1 + (n - 1) * ((1 - theta) / (2 - theta) + theta / (1 + theta))
    assert 1 - theta == pytest.approx(1.959964 * math.sqrt(theta * (1 - theta) * shape / n**2), rel=1e-6)


def test_a_perfect_order_of_few_windows_covers_the_truth():
    """P(positive above negative) = .97, 20 + 20 windows: in the samples of perfect order, too, the truth is held."""
    generator, shift = np.random.default_rng(3), 1.8807936081512509 * math.sqrt(2)
    held = perfect = 0
    for i in range(300):
        pos, neg = generator.normal(shift, 1, 20), generator.normal(0, 1, 20)
        found = auc_interval(pos, neg, i)
        held += found.low <= 0.97 <= found.high
        perfect += auc(pos, neg) == 1.0
    assert perfect >= 5 and held / 300 >= 0.88, (perfect, held)


def test_draws_that_are_all_alike_have_no_interval():
    assert interval_of(np.full(100, 0.3), 0.3) is None and interval_of(np.array([np.nan, 1.0]), 1.0) is None
    assert interval_of(np.arange(101.0), 200.0) == (2.5, 200.0)
