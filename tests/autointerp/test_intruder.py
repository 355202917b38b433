"""Trials of the intruder scorer: what is shown, what counts as right, chance."""

import json
from dataclasses import replace

import pytest
from judges import COIN, ORACLE, TOKENIZER, TOPICS, explanation, job, topics_in

from autointerp.client import CachedClient, LogprobReply
from autointerp.clients.scripted import ScriptedClient
from autointerp.interfaces import ScoreContext
from autointerp.judge_check import check_judge
from autointerp.pipeline import jobs_for
from autointerp.records import Failure
from autointerp.scorers.intruder import PLUGIN as Intruder
from sae.errors import ConfigError


def score(answer, jobs=None, **options):
    backend = ScriptedClient(answer, tokenizer=TOKENIZER)
    ctx = ScoreContext(client=CachedClient(backend), tokenizer=TOKENIZER)
    return Intruder(**options).score_many([job()] if jobs is None else jobs, ctx), backend


def shown(request) -> list[str]:
    return [line.partition("] ")[2] for line in request.messages[-1].content.splitlines()]


def odd(request) -> int:
    return 1 + next(i for i, x in enumerate(shown(request)) if not topics_in(x))


def row(result, group: str = ""):
    return next(s for s in result.scores if s.group == group)


def test_each_trial_shows_four_active_windows_and_one_silent_one() -> None:
    [result], backend = score(lambda r: json.dumps({"odd": odd(r)}), mode="json")
    assert len(backend.sent) == 20 == len(result.items) == len({i.exemplar_id for i in result.items})
    places = set()
    for request in backend.sent:
        windows = shown(request)
        assert len(windows) == 5 == len(set(windows))
        assert sum(topics_in(w) == {TOPICS[0]} for w in windows) == 4
        assert not any("<<" in w for w in windows)
        places.add(odd(request))
    assert len(places) == 5  # in no fixed place
    assert row(result).value == 1.0 and {i.verdict for i in result.items} == {False}
    assert {s.group for s in result.scores} == {"", *(f"decile={g}" for g in range(5))}


@pytest.mark.parametrize(("n", "strata"), [(20, ["4", "3", "2", "1", "0"]), (10, ["3-4", "0-2"]), (3, [])])
def test_active_windows_are_of_about_one_strength(n: int, strata: list[str]) -> None:
    """Five groups: four windows each; two each, so neighbours are joined; too few for a single trial."""
    found = Intruder()._trials(job(n=n), 0)
    assert list(dict.fromkeys(t.stratum for t in found)) == strata
    for t in found:
        groups = {e.group for e in t.shown if e.positive}
        low, high = int(t.stratum.split("-")[0]), int(t.stratum.split("-")[-1])
        assert groups <= set(range(low, high + 1)) and not t.shown[t.place].positive


def test_logprobs_take_the_likeliest_number_in_either_spelling() -> None:
    def spaced(request):
        """Only the spellings with a blank are among the server's tokens."""
        return LogprobReply(rows=((*[None] * 5, *(-0.1 if i + 1 == odd(request) else -9.0 for i in range(5))),))

    [result], _ = score(spaced, mode="logprob")
    assert row(result).value == 1.0


def test_a_coin_is_at_one_in_five() -> None:
    many = [replace(job(i), latent=1_000 * k + i) for i in range(3) for k in range(20)]
    found, _ = score(COIN, many)
    values = [row(r).value for r in found]
    assert sum(values) / len(values) == pytest.approx(0.2, abs=0.05)


@pytest.mark.parametrize(
    ("reply", "code"),
    [('{"odd": 6}', "out_of_range"), ('{"odd": 0}', "out_of_range"), ('{"odd": "3"}', "schema"), ("3", "schema"),
     ('{"odd": true}', "schema"), ("the third", "no_json"), ('{"odd": 3', "no_json")],
)  # fmt: skip
def test_what_is_no_number_of_a_window_is_a_failure(reply: str, code: str) -> None:
    [result], backend = score(lambda r: reply, mode="json")
    assert {i.failure.code for i in result.items} == {code} and len(backend.sent) == 40  # each asked again once
    assert row(result).value is None and row(result).null_reason == "too_many_failures"


@pytest.mark.parametrize(
    ("values", "code"), [((-9.0,) * 10, "low_mass"), ((None,) * 10, "low_mass"), ((-1.0,) * 5, "schema")]
)
def test_a_model_that_does_not_answer_has_no_verdict(values, code: str) -> None:
    [result], _ = score(lambda r: LogprobReply(rows=(values,)), mode="logprob")
    assert {i.failure.code for i in result.items} == {code}


def test_one_job_per_latent_and_no_floor() -> None:
    """The text plays no part, so it is asked once per latent however many explanations there are."""
    jobs = [
        replace(job(i), floor_kind=floor, explanation=replace(explanation(i), candidate=c, selected=c == 1))
        for i in range(3)
        for c in range(3)
        for floor in ("", "shuffled")
    ]
    kept = jobs_for(Intruder(), jobs)
    assert [(j.latent, j.explanation.candidate, j.floor_kind) for j in kept] == [(i, 1, "") for i in range(3)]


def test_its_check_compares_with_texts_that_share_nothing() -> None:
    asked = []

    def answer(request):
        asked.append(shown(request))
        return '{"odd": 1}'

    ctx = ScoreContext(client=CachedClient(ScriptedClient(answer, tokenizer=TOKENIZER)), tokenizer=TOKENIZER)
    check = check_judge(Intruder(mode="json"), ctx, n_descriptions=6)
    assert check.weak and check.auc == pytest.approx(0.2, abs=0.25) and check.detail["measure"] == "accuracy"
    assert len(asked) == 2 * 6 * 5


def test_its_check_passes_a_judge_that_knows_the_texts() -> None:
    from autointerp.judge_check import known_features

    of = {t: f.description for f in known_features() for t in f.fitting}

    def answer(request):
        said = [of.get(w, "") for w in shown(request)]
        common = max(said, key=said.count)
        alone = [i for i, s in enumerate(said) if s != common] or [0]
        return json.dumps({"odd": alone[0] + 1})

    ctx = ScoreContext(client=CachedClient(ScriptedClient(answer, tokenizer=TOKENIZER)), tokenizer=TOKENIZER)
    check = check_judge(Intruder(mode="json"), ctx)
    assert check.auc == 1.0 and check.wrong_auc < 0.6 and not check.weak


def test_refusals_are_counted() -> None:
    def answer(request):
        return Failure(code="refusal", stage="x") if "river0" in request.messages[-1].content else ORACLE(request)

    [result], _ = score(answer, [job(n=60)], trials=60)
    failed = sum(i.failure is not None for i in result.items)
    assert 0 < failed and row(result).n_failed == failed
    assert row(result).value in (1.0, None) and row(result).value_worst == (60 - failed) / 60


def test_bad_settings() -> None:
    for wrong in ({"trials": 0}, {"mode": "list"}):
        with pytest.raises(ConfigError):
            Intruder(**wrong)


class NoDigits:
    """A tokenizer for which every number is two tokens."""

    bos_token_id = None

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        return [0, *map(ord, text)]


def test_a_model_that_cannot_write_a_number_as_one_token_is_asked_for_json() -> None:
    for tokenizer, verb in ((TOKENIZER, "next_token"), (NoDigits(), "generate"), (None, "next_token")):
        backend = ScriptedClient(
            lambda r: json.dumps({"odd": odd(r)}) if r.verb == "generate" else ORACLE(r), tokenizer=tokenizer
        )
        ctx = ScoreContext(client=CachedClient(backend), tokenizer=TOKENIZER)
        [result] = Intruder().score_many([job()], ctx)
        assert {r.verb for r in backend.sent} == {verb} and row(result).value == 1.0
        assert row(result).judge == ("json/scripted" if verb == "generate" else "logprob/scripted")
