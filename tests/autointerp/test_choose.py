"""Best of n: the candidate that finds the calibrate windows, wherever it stands; the score split is not looked at."""

import json
from dataclasses import replace

import pytest
from judges import COIN, ORACLE, TOKENIZER, TOPICS, Words, explanation, refuse, windows

from autointerp.choose import asks_a_judge, best_candidates, select
from autointerp.client import CachedClient, Capabilities
from autointerp.clients.scripted import ScriptedClient
from autointerp.config import InterpConfig
from autointerp.explainers.highlighted import PLUGIN as Highlighted
from autointerp.interfaces import ExplainContext, ScoreContext
from autointerp.pipeline import load_plugins, make_jobs
from autointerp.records import CALIBRATE, Explanation, Failure
from sae.errors import ConfigError, NoAnswer

LISTED = Capabilities(generate=True)


class Table:
    """Exemplars of the small world; remembers what was asked of it."""

    sae_id = "s"

    def __init__(self) -> None:
        self.asked: set[str] = set()

    def scored(self, latent: int, split: str = "score"):
        self.asked.add(split)
        return windows(latent, split, 10)

    def pi(self, latent: int) -> float:
        return 0.1


def candidates(latent: int, *texts: str | None, explainer: str = "t") -> list[Explanation]:
    return [
        replace(
            explanation(latent, text, failure=None if text else Failure(code="no_json", stage="explain")),
            explanation_id=f"s/{latent}/{explainer}/{c}", candidate=c, selected=c == 0, explainer=explainer,
        )
        for c, text in enumerate(texts)
    ]  # fmt: skip


def choose(found, answer=ORACLE, prompted: bool = True, embedder=None, capabilities=None):
    backend = ScriptedClient(answer, tokenizer=TOKENIZER, capabilities=capabilities)
    ctx = ExplainContext(client=CachedClient(backend), embedder=embedder, tokenizer=TOKENIZER)
    table = Table()
    return select(found, table, ctx, prompted=prompted).explanations, backend, table


def chosen(records) -> dict[int, str | None]:
    picked = {e.latent: e.text for e in records if e.selected}
    assert sum(e.selected for e in records) == len(picked) == len({e.latent for e in records})
    return picked


@pytest.mark.parametrize("place", range(3))
def test_the_judge_picks_the_true_text_wherever_it_stands(place: int) -> None:
    texts = ["music", "money", "nothing at all"]
    texts[place] = "river"
    records, backend, table = choose({0: candidates(0, *texts)})
    assert chosen(records) == {0: "river"} and table.asked == {CALIBRATE}
    assert [e.calibrate_score for e in records] == [1.0 if i == place else 0.5 for i in range(3)]
    assert {r.origin.stage for r in backend.sent} == {"explain.choose"} and len(backend.sent) == 3 * 20


def test_ties_go_to_the_shorter_text_then_to_the_earlier_one() -> None:
    records, *_ = choose({0: candidates(0, "the river, at length", "river", "a river")})
    assert chosen(records) == {0: "river"}
    records, *_ = choose({0: candidates(0, "river a", "river b")})
    assert chosen(records) == {0: "river a"}


def test_all_explainers_of_a_latent_are_compared_by_the_one_measure() -> None:
    found = {0: [*candidates(0, "money", "music", explainer="a"), *candidates(0, "river", explainer="b")]}
    records, *_ = choose(found, embedder=Words())
    assert chosen(records) == {0: "river"} and all(e.calibrate_score is not None for e in records)


def test_a_text_without_a_rival_costs_nothing() -> None:
    records, backend, _ = choose({0: candidates(0, "river", None), 1: candidates(1, None, None)})
    assert chosen(records) == {0: "river", 1: None} and not backend.sent


def test_a_judge_that_refuses_chooses_nothing() -> None:
    records, *_ = choose({0: candidates(0, "the music", "river")}, refuse)
    assert chosen(records) == {0: "river"}  # the shorter one: no score was made up
    assert {e.calibrate_score for e in records} == {None}


def test_a_judge_that_is_not_reached_decides_nothing() -> None:
    found, asked = {0: candidates(0, "music", "river"), 1: candidates(1, "music", "river")}, []

    def lost(request):
        asked.append(request)
        return Failure(code="timeout", stage="x") if len(asked) <= 3 else ORACLE(request)

    with pytest.raises(NoAnswer, match="timeout"):
        choose(found, lambda r: Failure(code="timeout", stage="x"))
    client = CachedClient(ScriptedClient(lost, tokenizer=TOKENIZER))
    choice = select(found, Table(), ExplainContext(client=client, tokenizer=TOKENIZER), prompted=True)
    assert choice.unanswered == 3 and len(choice.explanations) == 4


def test_equal_texts_are_judged_once_and_lists_work() -> None:
    def answer(request):
        _, *lines = request.messages[-1].content.splitlines()
        return json.dumps({"match": [i for i, x in enumerate(lines, 1) if TOPICS[0] in x]})

    records, backend, _ = choose({0: candidates(0, "river", "river")}, answer, capabilities=LISTED)
    assert len(backend.sent) == 2 and {e.calibrate_score for e in records} == {1.0}
    assert chosen(records) == {0: "river"}


def test_without_several_candidates_the_embedder_chooses() -> None:
    records, backend, table = choose({0: candidates(0, "music", "river")}, prompted=False, embedder=Words())
    assert chosen(records) == {0: "river"} and not backend.sent and table.asked == {CALIBRATE}


def test_when_a_judge_is_asked() -> None:
    client = CachedClient(ScriptedClient(COIN, tokenizer=TOKENIZER))
    ctx = ExplainContext(client=client, embedder=Words(), tokenizer=TOKENIZER)
    assert asks_a_judge([Highlighted(candidates=3)], ctx) and not asks_a_judge([Highlighted()], ctx)
    assert asks_a_judge([Highlighted()], replace(ctx, embedder=None))
    assert not asks_a_judge([Highlighted(candidates=3)], replace(ctx, client=None))


def test_of_each_explainer_the_best_candidate_is_scored_and_gives_the_floor() -> None:
    found = {i: [*candidates(i, "stone", TOPICS[i], None), *candidates(i, None, None, explainer="b")] for i in range(3)}
    records, *_ = choose(found)
    kept = best_candidates(records)
    assert [(e.latent, e.explainer, e.text) for e in kept] == [
        (i, x, t) for i in range(3) for x, t in (("t", TOPICS[i]), ("b", None))
    ]
    jobs = make_jobs(records, Table(), 0)
    assert sorted((j.latent, j.explanation.text or "", j.floor_kind) for j in jobs if not j.floor_kind) == sorted(
        (e.latent, e.text or "", "") for e in kept
    )
    floor = [j for j in jobs if j.floor_kind]
    assert len(floor) == 3
    assert all(j.explanation.text in TOPICS and TOPICS[j.latent] != j.explanation.text for j in floor)


def test_the_number_of_candidates_reaches_those_who_make_any() -> None:
    client = CachedClient(ScriptedClient(COIN, tokenizer=TOKENIZER))
    ctx = ExplainContext(client=client, embedder=Words(), tokenizer=TOKENIZER)
    scoring = ScoreContext(client=client, embedder=Words(), tokenizer=TOKENIZER)
    cfg = InterpConfig(explainers=("token_list", "highlighted"), scorers=(), candidates=4)
    explainers, _ = load_plugins(cfg, ctx, scoring)
    assert [getattr(e, "candidates", None) for e in explainers] == [None, 4]
    with pytest.raises(ConfigError, match="candidates"):
        InterpConfig(candidates=0)
