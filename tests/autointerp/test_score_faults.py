"""No score is written whose numbers cannot be right."""

import math

import pytest

from autointerp.records import LatentScore
from autointerp.score_faults import SPANS, check_scores, faults
from sae import plugins
from sae.errors import DataError


def score(metric: str = "recall", **fields) -> LatentScore:
    return LatentScore(
        sae_id="s", latent=7, explanation_id="e", explainer="x", scorer="toy", scorer_version=1, judge="j",
        metric=metric, **fields,
    )  # fmt: skip


@pytest.mark.parametrize(("fields", "says"), [
    ({"value": 0.95, "ci_low": 0.67, "ci_high": 0.91}, "outside its interval"),  # what recalls of twenty windows had
    ({"value": 1.0, "ci_low": 1.0, "ci_high": 1.0}, "without width"),
    ({"value": 1.2}, "value is 1.2"), ({"value": 0.5, "value_worst": -0.1}, "value_worst is -0.1"),
    ({"value": 0.9, "ci_low": 0.8, "ci_high": 1.1}, "ci_high is 1.1"), ({"value": math.nan}, "value is nan"),
    ({"metric": "pearson", "value": -1.5}, "value is -1.5"), ({"metric": "r2", "value": 1.5}, "value is 1.5"),
    ({"value": None}, "value None with the reason None"),
    ({"value": 0.5, "null_reason": "one_class"}, "with the reason one_class"),
    ({"value": 0.5, "ci_low": 0.4}, "half an interval"),
    ({"value": None, "null_reason": "one_class", "ci_low": 0.4, "ci_high": 0.5}, "one of nothing"),
    ({"value": 0.5, "n_pos": -1}, "negative count"),
])
def test_what_cannot_be_right_is_named(fields: dict, says: str) -> None:
    assert any(says in text for text in faults(score(**fields)))
    with pytest.raises(DataError, match=r"toy \(version 1\) scored latent 7 wrongly"):
        check_scores([score(value=0.5), score(**fields)])


def test_what_may_look_odd_is_left() -> None:
    check_scores([
        score(value=0.0, ci_low=0.0, ci_high=0.1), score("r2", value=-40.0, ci_low=-90.0, ci_high=-3.0),
        score("of_an_outside_scorer", value=17.0), score(value=None, null_reason="no_candidate"),
        score("phi", value=1.0 + 1e-15, ci_low=0.8, ci_high=1.0),
    ])  # fmt: skip


def test_every_metric_of_a_shipped_scorer_has_a_range() -> None:
    scorers = [plugins.find("autointerp.scorers", name) for name in plugins.names("autointerp.scorers")]
    known = {metric for scorer in scorers for metric in scorer.metrics}
    assert known - SPANS.keys() <= {"surprisal_gain"}  # nats, without bounds
