"""Odd latents and broken judges: every scorer answers with numbers or typed reasons, never with NaN or an exception."""

import math
from dataclasses import replace

import numpy as np
import pytest
from judges import ORACLE, TOKENIZER, TOPICS, Words, job

from autointerp.client import CachedClient, LogprobReply
from autointerp.clients.scripted import ScriptedClient
from autointerp.interfaces import ScoreContext, ScoreJob, ScoreResult
from autointerp.records import FAILURE_CODES
from autointerp.scorers.simulation import PLUGIN as Simulation
from sae import plugins
from sae.manifest import hash64

ROOM = "autointerp.scorers"
NAMES = [n for n in plugins.names(ROOM) if "sae" not in plugins.find(ROOM, n)().needs] + ["simulation/all_at_once"]


def score(name: str, one: ScoreJob, answer=ORACLE, embedder=None) -> ScoreResult:
    scorer = Simulation("all_at_once") if name == "simulation/all_at_once" else plugins.find(ROOM, name)()
    client = CachedClient(ScriptedClient(answer, tokenizer=TOKENIZER))
    ctx = ScoreContext(client=client, embedder=embedder or Words(), tokenizer=TOKENIZER)
    [result] = scorer.score_many([one], ctx)
    assert result.scores
    for s in result.scores:
        for number in (s.value, s.ci_low, s.ci_high, s.value_worst):
            assert number is None or math.isfinite(number), s
        assert (s.value is None) == (s.null_reason in FAILURE_CODES), s
    assert all(i.value is None or math.isfinite(i.value) for i in result.items)
    return result


def totals(result: ScoreResult) -> dict[str, float | None]:
    return {s.metric: s.value for s in result.scores if not s.group}


def cut(exemplar, n: int):
    if not exemplar.positive:
        return replace(exemplar, token_ids=exemplar.token_ids[:n], acts=exemplar.acts[:n])
    at = slice(exemplar.peak, exemplar.peak + n)
    return replace(exemplar, token_ids=exemplar.token_ids[at], acts=exemplar.acts[at], peak=0)


@pytest.mark.parametrize("name", NAMES)
def test_a_latent_that_is_always_on_has_no_false_positives_to_count(name: str) -> None:
    one = job()
    sides = {f: tuple(e for e in getattr(one, f) if e.positive) for f in ("exemplars", "calibrate")}
    found = totals(score(name, replace(one, pi=1.0, **sides)))
    if name == "fuzzing":  # wrong marks in active windows are there all the same
        assert found["balanced_accuracy"] == 1.0
        return
    for metric in ("auc", "balanced_accuracy", "precision", "phi", "fpr_silent", "accuracy"):
        assert found.get(metric) is None
    assert found.get("recall") in (None, 1.0) or name in ("embedding", "late_interaction", "surprisal")


@pytest.mark.parametrize("name", NAMES)
def test_windows_of_one_token(name: str) -> None:
    one = job()
    sides = {f: tuple(cut(e, 1) for e in getattr(one, f)) for f in ("exemplars", "calibrate")}
    score(name, replace(one, **sides))


@pytest.mark.parametrize("pi", [None, 0.0, 1.0])
@pytest.mark.parametrize("name", NAMES)
def test_a_base_rate_that_is_none(name: str, pi: float | None) -> None:
    found = totals(score(name, replace(job(), pi=pi)))
    if "balanced_accuracy" in found:
        assert found["balanced_accuracy"] == pytest.approx(1.0, abs=0.02)
    assert found.get("average_precision") is None


class Broken(Words):
    """NaN for every text (``share`` = 1) or for some."""

    def __init__(self, share: float) -> None:
        self.share = share

    def _one(self, text: str) -> np.ndarray:
        out = super()._one(text)
        spared = self.share < 1 and text in TOPICS  # the explanation itself
        return out * np.nan if hash64(text) % 10 < 10 * self.share and not spared else out


@pytest.mark.parametrize("share", [1.0, 0.2])
@pytest.mark.parametrize("name", ["embedding", "late_interaction", "simulation"])
def test_an_embedder_that_gives_nan_is_not_a_judge_that_says_no(name: str, share: float) -> None:
    result = score(name, job(), embedder=Broken(share))
    if share == 1.0:
        assert {s.value for s in result.scores} == {None} and not any(i.verdict is not None for i in result.items)
    else:
        failed = [i for i in result.items if i.failure is not None]
        assert failed and {i.failure.code for i in failed} == {"non_finite"}
        assert all(s.value is None for s in result.scores if s.n_failed > 0.1 * len(result.items) and not s.group)


@pytest.mark.parametrize("bad", [math.nan, -math.inf])
@pytest.mark.parametrize("name", ["surprisal", "detection", "fuzzing", "intruder", "simulation/all_at_once"])
def test_log_probabilities_that_are_no_numbers_are_failures(name: str, bad: float) -> None:
    def answer(request):
        if request.verb == "continuation":
            return LogprobReply(sums=(bad,) * len(request.continuations), counts=(1,) * len(request.continuations))
        if request.verb == "slots":
            return LogprobReply(rows=((bad,) * len(request.token_ids),) * len(request.positions))
        return LogprobReply(rows=((bad,) * len(request.choices),))

    result = score(name, job(), answer)
    assert {s.value for s in result.scores if not s.group} == {None}
    assert all(i.verdict is None and i.value is None for i in result.items)
