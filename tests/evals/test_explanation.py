"""Explanation scores as rows: pooled precision, paired gains over the shuffled floor, selection, failures, judges."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from autointerp.records import Explanation, Failure, JudgeCheck, LatentScore
from evals.base import EvalContext
from evals.explained import Explained, explanations_folder
from evals.results import SubjectInfo, write_rows
from evals.suite import explanation
from evals.suite.explanation import PLUGIN, chosen_explanations, group_scores
from sae.errors import ArtefactError
from sae.manifest import writing

INFO = SubjectInfo(
    sae_id="s", kind="sae", lm="toy", lm_revision="0", hookpoint="layers.1", architecture="topk", d_in=4, d_sae=9, k=1,
    train_tokens=0, sae_sha256="0",
)  # fmt: skip
BEST = "explainer=selected,scorer=embedding,judge=minilm"


class Cache:
    """What the evaluation reads of a LatentCache."""

    stats = pd.DataFrame({"n_active_score": np.arange(20) + 1.0})


def score(latent, metric, value, *, of="a", group="", floor="", base_rate=0.01, **more):
    return LatentScore(
        sae_id="s", latent=latent, explanation_id=f"{of}{latent}", explainer=of, scorer="embedding", scorer_version=1,
        judge="minilm", metric=metric, group=group, value=value, floor_kind=floor, base_rate=base_rate,
        null_reason=None if value is not None else "one_class", **more,
    )  # fmt: skip


def text(latent, of="a", *, selected=True, **more):
    return Explanation(
        explanation_id=f"{of}{latent}", sae_id="s", latent=latent, explainer=of, text="t", selected=selected, **more
    )


def evaluate(scores, explanations, monkeypatch, checks=(), latents=Cache):
    subject = type("Subject", (), {"info": INFO, "provides": frozenset({"sparse"})})()
    found = Explained(list(scores), list(explanations), list(checks))
    monkeypatch.setattr(explanation, "read_explained", lambda folder: found)
    return PLUGIN.run(EvalContext(
        root=Path("."), subject=subject, preset="tiny", seed=0, hookpoint="layers.1", run_key="r",
        latents=latents() if latents else None, scores=Path("scores/key"),
    ))  # fmt: skip


def rows_of(result, slice=BEST):
    return {r.metric: r for r in result.rows if r.slice == slice}


def test_means_floors_and_paired_gains(monkeypatch, tmp_path):
    draw = np.random.default_rng(0)
    base = draw.uniform(0.4, 0.6, 12)  # what latents have in common is taken out by pairing
    scores = [score(i, "auc", float(base[i] + 0.2 + 0.01 * (i % 2))) for i in range(12)]
    scores += [score(i, "auc", float(base[i]), floor="shuffled") for i in range(12)]
    result = evaluate(scores, [text(i) for i in range(12)], monkeypatch)
    rows = rows_of(result)
    assert rows["auc"].value == pytest.approx(base.mean() + 0.205) and rows["auc"].n == 12
    assert rows["floor_auc"].value == pytest.approx(base.mean())
    assert rows["gain_auc"].value == pytest.approx(0.205) and rows["gain_auc"].ci_low > 0.19
    assert rows["gain_auc"].ci_high - rows["gain_auc"].ci_low < (rows["auc"].ci_high - rows["auc"].ci_low) / 2
    weight = np.arange(12) + 1.0
    values = base + 0.2 + 0.01 * (np.arange(12) % 2)
    assert rows["auc_weighted"].value == pytest.approx((values * weight).sum() / weight.sum())
    assert rows_of(result, BEST.replace("selected", "a"))["auc"].value == rows["auc"].value
    assert write_rows(tmp_path, result.rows, PLUGIN.metrics) == len(result.rows)
    assert len(result.details) == 24 and result.details.floor.notna().all()


def test_precision_is_pooled_at_the_true_rate(monkeypatch):
    """The worked example of AUTOINTERP 5.2, twice: R .9, phi .05, pi .005 gives .083, not the mean of ratios."""
    scores = []
    for i, (recall, phi, pi) in enumerate([(0.9, 0.05, 0.005), (0.5, 0.0, 0.2)]):
        scores += [score(i, m, v, base_rate=pi) for m, v in (("recall", recall), ("phi", phi), ("precision", 0.9))]
    one = rows_of(evaluate(scores[:3], [text(0)], monkeypatch))
    assert one["precision"].value == pytest.approx(0.0829, abs=1e-3) and one["precision"].ci_low is None
    both = rows_of(evaluate(scores, [text(0), text(1)], monkeypatch))
    right, wrong = 0.0045 + 0.1, 0.995 * 0.05
    assert both["precision"].value == pytest.approx(right / (right + wrong))
    assert both["recall"].value == pytest.approx(0.7)


def test_precision_gain_is_paired(monkeypatch):
    scores = []
    for i in range(8):
        for metric, value, chance in (("recall", 0.9, 0.5), ("phi", 0.1, 0.5), ("precision", 0.5, 0.5)):
            scores += [score(i, metric, value), score(i, metric, chance, floor="shuffled")]
    rows = rows_of(evaluate(scores, [text(i) for i in range(8)], monkeypatch))
    assert rows["floor_precision"].value == pytest.approx(0.01)  # a coin is right as often as the latent is active
    assert rows["gain_precision"].value == pytest.approx(rows["precision"].value - 0.01)
    gone = {"value": None, "null_reason": "one_class"}
    lost = [replace(s, **gone) if (s.latent, s.metric) == (7, "phi") else s for s in scores]
    rows = rows_of(evaluate(lost, [text(i) for i in range(8)], monkeypatch))
    for metric in ("precision", "floor_precision", "gain_precision"):  # it had counted the gain's loss as none
        assert (rows[metric].n, rows[metric].n_failed) == (7, 1), metric


def test_failures_are_counted_and_never_zero(monkeypatch):
    scores = [score(0, "auc", 0.8), score(1, "auc", None), score(2, "pearson", None), score(0, "pearson", None)]
    result = evaluate(scores, [text(i) for i in range(3)], monkeypatch)
    rows = rows_of(result)
    assert rows["auc"].value == 0.8 and rows["auc"].n_failed == 2
    assert rows["pearson"].value is None and rows["pearson"].failure == "one_class"
    assert "floor_auc" not in rows  # no floor was scored: no row
    assert result.counts["null_reasons"] == {"one_class": 3} and result.counts["scorers"] == {"embedding": 1}


def test_the_selected_explanation_is_one_per_latent(monkeypatch):
    texts = [
        text(0, "a", selected=False), text(0, "b", calibrate_score=0.9), text(1, "a", calibrate_score=0.7),
        text(1, "b", selected=False),
    ]  # fmt: skip
    scores = [score(i, "auc", v, of=o) for i, o, v in ((0, "a", 0.1), (0, "b", 0.9), (1, "a", 0.7), (1, "b", 0.2))]
    scores += [score(i, "auc", 0.5, of=o, floor="shuffled") for i in (0, 1) for o in "ab"]
    rows = rows_of(evaluate(scores, texts, monkeypatch))
    assert rows["auc"].value == pytest.approx(0.8) and rows["gain_auc"].value == pytest.approx(0.3)
    for name, value in (("a", 0.4), ("b", 0.55)):
        slice = BEST.replace("selected", name)
        assert rows_of(evaluate(scores, texts, monkeypatch), slice)["auc"].value == pytest.approx(value)


def test_candidates_of_one_explainer():
    texts = [
        Explanation(explanation_id=f"c{n}", sae_id="s", latent=3, explainer="a", text="t", candidate=n, selected=n == 2)
        for n in range(4)
    ]
    assert chosen_explanations(texts) == {("a", 3): "c2", ("selected", 3): "c2"}
    failed = Explanation(
        explanation_id="f", sae_id="s", latent=3, explainer="b", selected=True,
        failure=Failure(code="empty", stage="explain"),
    )  # fmt: skip
    assert chosen_explanations([failed, *texts])["selected", 3] == "c2"


def test_floor_of_another_explainers_text(monkeypatch):
    """Where only the selected texts are exchanged, the foreign text may come from another explainer."""
    scores = [score(0, "auc", 0.9), score(0, "auc", 0.4, of="b", floor="shuffled")]
    rows = rows_of(evaluate(scores, [text(0)], monkeypatch))
    assert rows["gain_auc"].value == pytest.approx(0.5)


def test_groups_have_their_own_metrics(monkeypatch):
    scores = [
        score(0, "recall", 0.9), score(0, "recall", 0.6, group="decile=3"), score(1, "recall", 0.8, group="decile=3"),
        score(0, "fpr", 0.1, group="kind=same_token"), score(1, "fpr", None, group="kind=same_token"),
        score(0, "auc", 0.6, group="kind=silent"),
    ]  # fmt: skip
    result = evaluate(scores, [text(0), text(1)], monkeypatch)
    assert rows_of(result, f"{BEST},decile=3")["recall_group"].value == pytest.approx(0.7)
    fpr = rows_of(result, f"{BEST},kind=same_token")["fpr_group"]
    assert fpr.value == 0.1 and fpr.n_failed == 1
    assert "auc" not in rows_of(result)


def test_judges_are_rows_of_their_own(monkeypatch):
    checks = [
        JudgeCheck(
            judge="minilm", scorer="embedding", auc=0.84, ci_low=0.8, ci_high=0.88, wrong_auc=0.46, n=24, weak=False
        ),
        JudgeCheck(judge="a,b=c", scorer="detection", auc=None, ci_low=None, ci_high=None, wrong_auc=0.5, n=24),
    ]  # fmt: skip
    result = evaluate([score(0, "auc", 0.8)], [text(0)], monkeypatch, checks)
    good = rows_of(result, "scorer=embedding,judge=minilm")
    assert good["judge_auc"].value == 0.84 and good["judge_weak"].value == 0
    weak = rows_of(result, "scorer=detection,judge=a_b_c")
    assert weak["judge_weak"].value == 1 and weak["judge_auc"].value is None
    assert result.counts["judge_weak"] == ["detection/a,b=c"]
    assert not result.details.judge_weak.any()


def test_unknown_metrics_and_floors_do_not_enter(monkeypatch):
    scores = [score(0, "auc", 0.8), score(0, "novelty", 3.0), score(0, "auc", 0.1, floor="random_lm")]
    result = evaluate(scores, [text(0)], monkeypatch)
    assert result.counts["metrics_ignored"] == ["novelty"]
    assert rows_of(result)["auc"].value == 0.8 and "floor_auc" not in rows_of(result)


def test_order_does_not_matter(monkeypatch):
    scores = [score(i, "auc", 0.5 + i / 40, floor=f) for i in range(8) for f in ("", "shuffled")]
    texts = [text(i) for i in range(8)]
    forward, backward = group_scores(scores, texts), group_scores(scores[::-1], texts[::-1])
    assert list(forward) == list(backward)
    one, two = evaluate(scores, texts, monkeypatch), evaluate(scores[::-1], texts[::-1], monkeypatch)
    assert sorted(one.rows, key=lambda r: r.sort_key()) == sorted(two.rows, key=lambda r: r.sort_key())


def test_without_scores_it_says_so():
    subject = type("Subject", (), {"info": INFO, "provides": frozenset({"sparse"})})()
    result = PLUGIN.run(EvalContext(root=Path("."), subject=subject, preset="tiny", seed=0, hookpoint="layers.1"))
    (row,) = result.rows
    assert row.value is None and row.failure == "too_few_positive"


def test_gain_metrics_allow_their_whole_range():
    declared = {m.name: m for m in PLUGIN.metrics}
    assert declared["gain_auc"].low == -1 and declared["gain_pearson"].high == 2
    assert declared["gain_r2"].low == -math.inf
    assert len(declared) == len(PLUGIN.metrics)


def test_scores_lead_to_their_explanations(tmp_path):
    for key, inputs in (("good", {"explanations": "e1"}), ("bad", {})):
        folder = tmp_path / "scores" / key
        with writing(folder, kind="scores", key=key, stage_version=1, config={}, inputs=inputs):
            pass
    assert explanations_folder(tmp_path / "scores" / "good") == tmp_path / "explanations" / "e1"
    with pytest.raises(ArtefactError, match="names no explanations"):
        explanations_folder(tmp_path / "scores" / "bad")


def test_modes_of_a_judge_are_never_averaged(monkeypatch):
    """One model that judged by log-probabilities in one artefact and by lists in another: two slices, two checks."""
    found = []
    for judge, value in (("logprob/m", 0.9), ("list/m", 0.6)):
        rows = [score(i, "balanced_accuracy", value).to_dict() for i in range(3)]
        found += [LatentScore.from_dict(row | {"judge": judge, "scorer": "d"}) for row in rows]
    checks = [
        JudgeCheck(judge=j, scorer="d", auc=a, ci_low=None, ci_high=None, wrong_auc=0.5, n=24, weak=a < 0.75)
        for j, a in (("logprob/m", 0.9), ("list/m", 0.6))
    ]
    result = evaluate(found, [text(i) for i in range(3)], monkeypatch, checks)
    values = {j: rows_of(result, f"explainer=selected,scorer=d,judge={j}/m")["balanced_accuracy"].value
              for j in ("logprob", "list")}  # fmt: skip
    assert values == {"logprob": pytest.approx(0.9), "list": pytest.approx(0.6)}
    weak = result.details.set_index("slice").judge_weak
    assert weak["explainer=selected,scorer=d,judge=list/m"].all()
    assert not weak["explainer=selected,scorer=d,judge=logprob/m"].any()
