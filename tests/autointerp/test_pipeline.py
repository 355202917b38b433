"""Explanations and scores as artefacts: round trip, one selected, the floor, failures, reuse, one question once."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from held_out import random_sae, stores
from judges import COIN, TOKENIZER, Coin, refuse

from autointerp.client import CachedClient
from autointerp.clients.scripted import ScriptedClient
from autointerp.config import ExemplarConfig, InterpConfig
from autointerp.exemplars import ExemplarTable, build_exemplars
from autointerp.interfaces import ExplainContext, ScoreContext
from autointerp.latent_cache import build_latents
from autointerp.pipeline import (
    explain,
    failures_of,
    jobs_for,
    load_plugins,
    make_jobs,
    open_checks,
    open_explanations,
    open_scores,
    score,
)
from autointerp.records import Explanation, Failure, LatentView
from autointerp.reply_cache import ReplyCache
from autointerp.scorers.detection import PLUGIN as Detection
from autointerp.scorers.embedding import PLUGIN as Embedding
from autointerp.tables import read_jsonl, read_parquet, write_jsonl, write_parquet
from sae.errors import DataError, NoAnswer, UnknownPlugin, Unsupported

CFG = ExemplarConfig(
    window_tokens=12, min_window_tokens=4, left_tokens=8, explain_top=6, explain_silent=5, explain_random=4,
    calibrate_positive=4, calibrate_silent=4, score_positive=8, score_silent=8, score_hard=2, min_windows=(6, 3, 8),
)  # fmt: skip
ODD = "a text\u2028with every\u0085kind\u000b of\u2029line\u001cend\r\n and {\"json\": 'quotes'} — ä 😀"


@pytest.fixture(scope="module")
def exemplars(tmp_path_factory: pytest.TempPathFactory) -> ExemplarTable:
    root = tmp_path_factory.mktemp("exemplars")
    held_out = stores(root)
    sizes = {"window_tokens": CFG.window_tokens, "min_window_tokens": CFG.min_window_tokens}
    cache = build_latents(root, random_sae(), held_out, **sizes)
    return build_exemplars(root, cache, cache.eligible(CFG)[:5], CFG)


class Says:
    """An explainer of fixed texts: ``text(latent, candidate)``; None or a Failure = a failure."""

    version, needs = 1, frozenset()

    def __init__(self, text, name: str = "says", candidates: int = 1, pattern: dict | None = None) -> None:
        self.text, self.name, self.candidates, self.pattern = text, name, candidates, pattern
        self.calls = 0

    def explain_many(self, views: list[LatentView], ctx: ExplainContext) -> list[list[Explanation]]:
        self.calls += 1
        return [[self._one(v, c) for c in range(self.candidates)] for v in views]

    def _one(self, view: LatentView, candidate: int) -> Explanation:
        said = self.text(view.latent, candidate)
        failure = Failure(code="no_candidate", stage="explain") if said is None else None
        if isinstance(said, Failure):
            said, failure = None, said
        return Explanation(
            explanation_id=f"{view.sae_id}/{view.latent}/{self.name}/{candidate}", sae_id=view.sae_id,
            latent=view.latent, explainer=self.name, candidate=candidate, text=said, failure=failure,
            pattern=self.pattern,
        )  # fmt: skip


def context(embedder=None) -> ExplainContext:
    return ExplainContext(tokenizer=TOKENIZER, embedder=embedder)


def judge(answer=COIN) -> tuple[ScoreContext, ScriptedClient]:
    backend = ScriptedClient(answer, tokenizer=TOKENIZER)
    return ScoreContext(tokenizer=TOKENIZER, embedder=Coin(), client=CachedClient(backend)), backend


def stamps(folder: Path) -> dict[Path, int]:
    return {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}


def test_odd_texts_come_back_as_they_were(tmp_path: Path, exemplars: ExemplarTable) -> None:
    folder = explain(tmp_path, exemplars, [Says(lambda i, c: f"{ODD} {i}")], context())
    found = open_explanations(folder)
    assert [e.text for e in found] == [f"{ODD} {i}" for i in exemplars.latents]
    assert read_parquet(folder / "explanations.parquet", Explanation) == found


def test_tables_keep_every_field(tmp_path: Path) -> None:
    base = Explanation(explanation_id="x", sae_id="s", latent=1, explainer="t")
    records = [
        base,
        replace(base, text=ODD, pattern={"ids": [1, None], "v": 0.5}, margin=0.25, exemplar_ids=("a", "b")),
        replace(base, failure=Failure(code="dead", stage="explain", detail=ODD)),
        replace(base, text='{"not": "nested"}'),
    ]
    write_jsonl(tmp_path / "t.jsonl", records)
    write_parquet(tmp_path / "t.parquet", records, Explanation)
    assert read_jsonl(tmp_path / "t.jsonl", Explanation) == records
    assert read_parquet(tmp_path / "t.parquet", Explanation) == records
    for none in ([], [base]):
        write_jsonl(tmp_path / "t.jsonl", none)
        write_parquet(tmp_path / "t.parquet", none, Explanation)
        assert read_jsonl(tmp_path / "t.jsonl", Explanation) == none
        assert read_parquet(tmp_path / "t.parquet", Explanation) == none


def test_exactly_one_is_selected_per_latent(tmp_path: Path, exemplars: ExemplarTable) -> None:
    """Of good texts, failures and patterns a text; a pattern where no text is left; a failure where nothing is."""
    first, second, *_ = exemplars.latents
    texts = Says(lambda i, c: None if i in (first, second) or c == 1 else f"text {i} {c}", candidates=3)
    patterns = Says(lambda i, c: None if i == first else "tokens", name="a_pattern", pattern={"p": 1})
    for ctx in (context(), context(Coin())):
        found = open_explanations(explain(tmp_path, exemplars, [texts, patterns], ctx))
        chosen = [e for e in found if e.selected]
        assert [e.latent for e in chosen] == exemplars.latents and len(found) == 4 * len(exemplars.latents)
        assert chosen[0].failure is not None and chosen[1].explainer == "a_pattern"
        assert all(e.explainer == "says" and e.failure is None for e in chosen[2:])
        if ctx.embedder is not None:
            for one in chosen[2:]:
                rivals = [e.calibrate_score for e in found if e.latent == one.latent and e.calibrate_score is not None]
                assert len(rivals) == 2 and one.calibrate_score == max(rivals)
        assert [(e.latent, e.explainer, e.candidate) for e in found] == sorted(
            (e.latent, e.explainer, e.candidate) for e in found
        )


def test_order_of_explainers_changes_no_byte(tmp_path: Path, exemplars: ExemplarTable) -> None:
    a, b = Says(lambda i, c: f"a {i}", name="a"), Says(lambda i, c: f"b {i}", name="b")
    one = explain(tmp_path / "1", exemplars, [a, b], context(Coin()))
    two = explain(tmp_path / "2", exemplars, [b, a], context(Coin()))
    assert one.name == two.name
    for name in ("explanations.jsonl", "explanations.parquet"):
        assert (one / name).read_bytes() == (two / name).read_bytes()


def test_an_explainer_that_says_nothing_is_an_error(tmp_path: Path, exemplars: ExemplarTable) -> None:
    with pytest.raises(DataError, match="says.*not even a failure"):
        explain(tmp_path, exemplars, [Says(lambda i, c: "x", candidates=0)], context())
    assert not list(tmp_path.glob("explanations/*"))


def test_finished_artefacts_are_skipped(tmp_path: Path, exemplars: ExemplarTable) -> None:
    says = Says(lambda i, c: f"text {i}")
    ctx, backend = judge()
    explanations = explain(tmp_path, exemplars, [says], context())
    scores = score(tmp_path, explanations, exemplars, [Detection(), Embedding()], ctx)
    before, n_sent = stamps(tmp_path), len(backend.sent)
    assert explain(tmp_path, exemplars, [says], context()) == explanations and says.calls == 1
    assert score(tmp_path, explanations, exemplars, [Detection(), Embedding()], ctx) == scores
    assert stamps(tmp_path) == before and len(backend.sent) == n_sent > 0
    raw = {p.name: p.read_bytes() for p in scores.iterdir() if p.name != "manifest.json"}
    again = score(tmp_path, explanations, exemplars, [Embedding(), Detection()], judge()[0], force=True)
    assert again == scores and {p.name: p.read_bytes() for p in again.iterdir() if p.name in raw} == raw
    other, _ = judge()
    assert score(tmp_path, explanations, exemplars, [Detection()], replace(other, seed=1)) != scores


@pytest.mark.parametrize("seed", range(5))
def test_the_shuffled_floor_has_no_fixed_point(tmp_path: Path, exemplars: ExemplarTable, seed: int) -> None:
    says = Says(lambda i, c: None if i == exemplars.latents[0] else f"text {i}")
    found = open_explanations(explain(tmp_path, exemplars, [says], context()))
    jobs = make_jobs(found, exemplars, seed)
    floor = [j for j in jobs if j.floor_kind == "shuffled"]
    assert len(jobs) - len(floor) == len(found) == 5 and len(floor) == 4
    assert all(j.latent != j.explanation.latent and j.explanation.failure is None for j in floor)
    assert sorted(j.latent for j in floor) == sorted(j.explanation.latent for j in floor) == exemplars.latents[1:]
    for j in jobs:
        assert {e.latent for e in j.exemplars} == {j.latent} and j.pi == exemplars.pi(j.latent)
        assert {e.split for e in j.exemplars} == {"score"} and {e.split for e in j.calibrate} == {"calibrate"}
    assert floor == [j for j in make_jobs(found, exemplars, seed) if j.floor_kind]


def test_a_single_explanation_has_no_floor(tmp_path: Path, exemplars: ExemplarTable) -> None:
    says = Says(lambda i, c: "text" if i == exemplars.latents[0] else None)
    jobs = make_jobs(open_explanations(explain(tmp_path, exemplars, [says], context())), exemplars, 0)
    assert not [j for j in jobs if j.floor_kind]


def test_failed_explanations_are_null_rows_without_requests(tmp_path: Path, exemplars: ExemplarTable) -> None:
    nothing = explain(tmp_path, exemplars, [Says(lambda i, c: None)], context())
    assert failures_of(open_explanations(nothing)) == {"no_candidate": 5}
    ctx, backend = judge()
    found = open_scores(score(tmp_path, nothing, exemplars, [Detection()], ctx))
    assert {(s.value, s.null_reason) for s in found.scores} == {(None, "no_candidate")}
    assert {s.latent for s in found.scores} == set(exemplars.latents) and not found.items
    assert {r.origin.sae_id for r in backend.sent} == {"judge_check"}  # asked of the check alone


def test_scores_come_back_sorted_with_the_judges_check(tmp_path: Path, exemplars: ExemplarTable) -> None:
    folder = explain(tmp_path, exemplars, [Says(lambda i, c: f"text {i}")], context())
    scored = score(tmp_path, folder, exemplars, [Embedding(), Detection()], judge()[0])
    found = open_scores(scored)
    assert open_checks(scored) == found.checks and len(found.checks) == 2
    assert [c.scorer for c in found.checks] == ["detection", "embedding"] and all(c.weak for c in found.checks)
    keys = [(s.latent, s.explainer, s.scorer, s.floor_kind, s.metric, s.group, s.explanation_id) for s in found.scores]
    assert keys == sorted(keys) and len(set(keys)) == len(keys)
    assert {s.floor_kind for s in found.scores} == {"", "shuffled"}
    aucs = [s.value for s in found.scores if s.metric == "auc" and s.group == "" and s.value is not None]
    assert np.mean(aucs) == pytest.approx(0.5, abs=0.15)
    assert len({(i.scorer, i.explanation_id, i.exemplar_id) for i in found.items}) == len(found.items)


def test_a_model_that_refuses_is_counted_not_scored(tmp_path: Path, exemplars: ExemplarTable) -> None:
    folder = explain(tmp_path, exemplars, [Says(lambda i, c: f"text {i}")], context())
    found = open_scores(score(tmp_path, folder, exemplars, [Detection()], judge(refuse)[0]))
    assert failures_of(found.items) == {"refusal": len(found.items)} and found.items
    assert not [s for s in found.scores if s.value is not None]
    [check] = found.checks
    assert check.auc is None and check.weak and check.n_failed > 0


def unreached(request):
    return Failure(code="connection", stage="test", detail="nobody listens")


def test_a_server_that_answers_nothing_leaves_no_artefact(tmp_path: Path, exemplars: ExemplarTable) -> None:
    """A complete artefact is never made again, so silence must not become one; one answer suffices."""
    silent = Says(lambda i, c: Failure(code="connection", stage="explain", detail="nobody listens"))
    with pytest.raises(NoAnswer, match="'says'.*none of 5 requests.*nobody listens"):
        explain(tmp_path, exemplars, [silent], context())
    assert not list(tmp_path.glob("explanations/*"))
    first = exemplars.latents[0]
    partly = Says(lambda i, c: "a text" if i == first else Failure(code="timeout", stage="explain"))
    folder = explain(tmp_path, exemplars, [partly], context())
    assert failures_of(open_explanations(folder)) == {"timeout": 4}
    # The judge check comes before scoring and is itself unanswered: it must not be believed either.
    with pytest.raises(NoAnswer, match="'detection'"):
        score(tmp_path, folder, exemplars, [Detection()], judge(unreached)[0])
    assert not list(tmp_path.glob("scores/*")) and not list(tmp_path.glob("judge_checks/*"))


def test_what_nobody_answered_is_asked_again_by_the_next_run(tmp_path: Path, exemplars: ExemplarTable) -> None:
    """Timeouts among answers are stored and counted; the same call later asks them, and only them, once more."""
    up = False
    first = exemplars.latents[0]
    says = Says(lambda i, c: f"text {i}" if up or i == first else Failure(code="timeout", stage="explain"))
    folder = explain(tmp_path, exemplars, [says], context())
    scored = score(tmp_path, folder, exemplars, [Embedding()], judge()[0])
    up = True
    assert explain(tmp_path, exemplars, [says], context()) == folder and says.calls == 2
    assert failures_of(open_explanations(folder)) == {}
    assert explain(tmp_path, exemplars, [says], context()) == folder and says.calls == 2
    rescored = score(tmp_path, folder, exemplars, [Embedding()], judge()[0])
    assert rescored != scored, "scores of the old explanations must not stand for the new ones"

    deaf = True

    def half_deaf(request):
        lost = deaf and len(backend.sent) % 3 == 0
        return Failure(code="timeout", stage="test") if lost else COIN(request)

    backend = ScriptedClient(half_deaf, tokenizer=TOKENIZER)
    ctx = ScoreContext(tokenizer=TOKENIZER, client=CachedClient(backend, ReplyCache(tmp_path / "replies.sqlite")))
    kept = score(tmp_path, folder, exemplars, [Detection()], ctx)
    assert failures_of(open_scores(kept).items)["timeout"] > 0
    deaf, lost, sent = False, len(backend.sent) // 3, len(backend.sent)
    assert score(tmp_path, folder, exemplars, [Detection()], ctx) == kept
    assert failures_of(open_scores(kept).items) == {} and len(backend.sent) == sent + lost
    assert score(tmp_path, folder, exemplars, [Detection()], ctx) == kept and len(backend.sent) == sent + lost


def test_a_wrong_choice_is_refused_before_any_work(exemplars: ExemplarTable) -> None:
    explaining, (scoring, _) = context(), judge()
    with pytest.raises(UnknownPlugin, match="did you mean 'n2g'"):
        load_plugins(InterpConfig(explainers=("n2gg",), scorers=()), explaining, scoring)
    with pytest.raises(Unsupported, match="'n2g' needs last_acts"):
        load_plugins(InterpConfig(explainers=("n2g",), scorers=()), explaining, scoring)
    explainers, scorers = load_plugins(
        InterpConfig(explainers=("token_list",), scorers=("embedding",)), explaining, scoring
    )
    assert [p.name for p in (*explainers, *scorers)] == ["token_list", "embedding"]


def test_a_dear_scorer_is_given_the_selected_texts_of_some_latents_and_their_floors(
    tmp_path: Path, exemplars: ExemplarTable
) -> None:
    says = [Says(lambda i, c, n=n: f"{n} {i}", name=n) for n in ("a", "b")]
    jobs = make_jobs(open_explanations(explain(tmp_path, exemplars, says, context(Coin()))), exemplars, 0)
    embedding, dear = Embedding(), Embedding()
    assert jobs_for(embedding, jobs) == jobs
    dear.max_latents, dear.selected_only = 2, True
    given = jobs_for(dear, jobs)
    assert {j.latent for j in given} == {exemplars.latents[0], exemplars.latents[-1]}
    true = {j.latent: j.explanation for j in given if not j.floor_kind}
    floor = {j.latent: j.explanation for j in given if j.floor_kind}
    assert len(given) == 4 and all(e.selected for e in true.values())
    assert {i: e.explainer for i, e in floor.items()} == {i: e.explainer for i, e in true.items()}
    assert all(floor[i].latent != i for i in floor)


def test_a_setting_of_a_plugin_makes_another_artefact(tmp_path: Path, exemplars: ExemplarTable) -> None:
    folder = explain(tmp_path, exemplars, [Says(lambda i, c: f"text {i}")], context())
    one, two = (score(tmp_path, folder, exemplars, [Detection(per_request=n)], judge()[0]) for n in (5, 10))
    assert one != two
