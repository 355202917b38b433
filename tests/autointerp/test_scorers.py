"""What every scorer promises, whoever wrote it: oracles reach the maximum, coins chance, refusals only count."""

from dataclasses import replace

import pytest
from judges import COIN, ORACLE, TOKENIZER, TOPICS, Coin, Words, explanation, job, refuse, windows

from autointerp.client import CachedClient
from autointerp.clients.scripted import ScriptedClient
from autointerp.interfaces import NEEDS, ScoreContext, ScoreJob, Scorer, ScoreResult, check_needs
from autointerp.records import FAILURE_CODES, Failure, LatentScore
from sae import plugins
from sae.errors import LeakError, Unsupported

ROOM = "autointerp.scorers"
CHANCE = {"auc": 0.5, "balanced_accuracy": 0.5, "pearson": 0.0, "accuracy": 0.2}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "name" in metafunc.fixturenames:
        # Without a model and an SAE to steer there is nothing to score: test_intervention holds these promises itself.
        here = [n for n in plugins.names(ROOM) if "sae" not in plugins.find(ROOM, n)().needs]
        metafunc.parametrize("name", here + list(metafunc.config.getoption("--plugin", default=[])))


def score(name: str, jobs: list[ScoreJob], answer=ORACLE, embedder=None) -> tuple[list[ScoreResult], ScriptedClient]:
    backend = ScriptedClient(answer, tokenizer=TOKENIZER)
    ctx = ScoreContext(client=CachedClient(backend), embedder=embedder or Words(), tokenizer=TOKENIZER)
    plugin = plugins.find(ROOM, name)()
    check_needs(plugin, ctx)
    return plugin.score_many(jobs, ctx), backend


def asks(name: str) -> bool:
    return any(n.startswith("client:") for n in plugins.find(ROOM, name)().needs)


def reads_texts(name: str) -> bool:
    return getattr(plugins.find(ROOM, name), "uses_explanation", True)


def totals(result: ScoreResult) -> dict[str, LatentScore]:
    return {s.metric: s for s in result.scores if s.group == ""}


def jobs() -> list[ScoreJob]:
    return [job(latent) for latent in range(len(TOPICS))]


def test_declarations(name: str) -> None:
    plugin = plugins.find(ROOM, name)()
    assert isinstance(plugin, Scorer) and plugin.needs <= NEEDS and plugin.version >= 1 and plugin.metrics
    assert plugin.name == name or ":" in name


def test_rows_name_what_they_are(name: str) -> None:
    plugin = plugins.find(ROOM, name)()
    found, _ = score(name, jobs())
    for one, result in zip(jobs(), found, strict=True):
        keys = [(s.metric, s.group) for s in result.scores]
        assert len(set(keys)) == len(keys)
        for s in result.scores:
            assert (s.sae_id, s.latent, s.explanation_id) == ("s", one.latent, one.explanation.explanation_id)
            assert (s.scorer, s.scorer_version) == (plugin.name, plugin.version) and s.judge and s.floor_kind == ""
            assert (s.value is None) == (s.null_reason is not None) and (s.null_reason or "dead") in FAILURE_CODES
            if s.value is None:
                assert s.ci_low is None and s.ci_high is None
            elif s.ci_low is not None and s.ci_high is not None:
                assert s.ci_low <= s.ci_high
        assert set(totals(result)) <= set(plugin.metrics)
        assert {i.exemplar_id for i in result.items} <= {e.exemplar_id for e in one.exemplars}
        assert all((i.failure is None) or (i.verdict is None and i.value is None) for i in result.items)


def test_an_oracle_reaches_the_maximum(name: str) -> None:
    found, _ = score(name, jobs())
    for result in found:
        best = {m: s.value for m, s in totals(result).items() if m in (*CHANCE, "recall", "precision", "f1")}
        assert best and all(v == pytest.approx(1.0, abs=0.02) for v in best.values()), best
        assert all(s.n_failed == 0 for s in result.scores)


def test_a_wrong_explanation_is_no_better_than_chance(name: str) -> None:
    crossed = [replace(job(i), explanation=explanation((i + 1) % 3), floor_kind="shuffled") for i in range(3)]
    if not reads_texts(name):  # nothing but the floor's name may change
        plain, floor = (score(name, asked)[0] for asked in (jobs(), crossed))
        assert [[s.value for s in r.scores] for r in plain] == [[s.value for s in r.scores] for r in floor]
        return
    for result in score(name, crossed)[0]:
        found = {m: s.value for m, s in totals(result).items() if m in CHANCE}
        assert found and all(v is None or v == pytest.approx(CHANCE[m], abs=0.26) for m, v in found.items()), found
        assert {s.floor_kind for s in result.scores} == {"shuffled"}


def test_a_coin_is_chance(name: str) -> None:
    """Mean over 24 jobs whose texts differ; 4 standard errors of the coarsest scorer (20 windows per job) are 0.11."""
    many = [
        replace(job(0), explanation=replace(explanation(0, f"text {i}"), explanation_id=f"s/0/t/{i}"))
        for i in range(24)
    ]
    found, _ = score(name, many, COIN, Coin())
    for metric in {s.metric for r in found for s in r.scores} & set(CHANCE):
        values = [v for r in found if (v := totals(r)[metric].value) is not None]
        assert len(values) > 12 and sum(values) / len(values) == pytest.approx(CHANCE[metric], abs=0.11), metric


def test_order_of_jobs_changes_nothing(name: str) -> None:
    forward, backward = score(name, jobs())[0], score(name, jobs()[::-1])[0]
    assert forward == backward[::-1] == [score(name, [j])[0][0] for j in jobs()]
    assert score(name, [])[0] == []


@pytest.mark.parametrize("code", ["dead", "no_candidate"])
def test_a_failed_explanation_has_null_rows_with_its_reason_and_costs_nothing(name: str, code: str) -> None:
    failed = replace(job(), explanation=explanation(0, None, failure=Failure(code=code, stage="explain")))
    [result], backend = score(name, [failed])
    if not reads_texts(name):  # the latent's windows are there all the same
        assert {s.value for s in result.scores} == {1.0} and backend.sent
        return
    assert result.scores and not result.items and not backend.sent
    assert {(s.value, s.null_reason) for s in result.scores} == {(None, code)}
    [alone, _], _ = score(name, [failed, job()])
    assert alone == result


def test_no_windows_at_all_is_null(name: str) -> None:
    [result], backend = score(name, [replace(job(), exemplars=())])
    assert {(s.value, s.null_reason) for s in result.scores} == {(None, "too_few_positive")} and not backend.sent


def test_a_few_refusals_only_raise_the_failures(name: str) -> None:
    if not asks(name):
        pytest.skip("asks no model")
    answered = 0

    def answer(request):
        nonlocal answered
        answered += 1
        return refuse(request) if answered == 3 else ORACLE(request)

    [whole], _ = score(name, [job()])
    [result], backend = score(name, [job()], answer)
    assert len(backend.sent) >= 3
    failed = [i for i in result.items if i.failure]
    assert len(failed) <= 1 and all(i.verdict is None and i.failure.code == "refusal" for i in failed if i.failure)
    for metric in set(CHANCE) & set(totals(result)):
        row = totals(result)[metric]
        assert row.value == totals(whole)[metric].value == 1.0 and row.n_failed == len(failed)
        assert row.value_worst is None or not failed or row.value_worst < 1


def test_a_model_that_refuses_everything_is_null_not_zero(name: str) -> None:
    [result], backend = score(name, [job()], refuse)
    assert bool(backend.sent) == asks(name)
    if asks(name):
        assert {(s.value, s.null_reason) for s in totals(result).values()} == {(None, "too_many_failures")}


def test_what_is_missing_is_said_before_any_work(name: str) -> None:
    plugin = plugins.find(ROOM, name)()
    with pytest.raises(Unsupported, match=plugin.name):
        check_needs(plugin, ScoreContext(tokenizer=TOKENIZER))


LEAKS = [("exemplars", "explain"), ("calibrate", "score"), ("exemplars", "calibrate")]


@pytest.mark.parametrize(("field", "split"), LEAKS)
def test_no_scorer_can_be_given_what_was_shown(field: str, split: str) -> None:
    with pytest.raises(LeakError, match=split):
        replace(job(), **{field: windows(0, split, 2)})
