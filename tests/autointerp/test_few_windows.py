"""Judges that read few of a latent's windows (`surprisal`, `simulation`): of every strength, from the whole text."""

import math

import numpy as np
import pytest
from judges import TOKENIZER, Words

from autointerp.client import CachedClient, LogprobReply
from autointerp.clients.scripted import ScriptedClient
from autointerp.interfaces import ScoreContext, ScoreJob
from autointerp.records import Exemplar, Explanation, Failure
from autointerp.records import Simulation as Simulated
from autointerp.scorers.simulation import PLUGIN as Simulation
from autointerp.scorers.surprisal import PLUGIN as Surprisal
from autointerp.texts import PMI_NO_TEXT
from sae.manifest import rng

N_GROUPS = 10


def window(latent: int, split: str, kind: str, row: int, text: str, group: int = -1) -> Exemplar:
    ids = tuple(TOKENIZER.encode(text, add_special_tokens=False))
    acts = [1.0 + group if c == "!" else 0.0 for c in text]
    return Exemplar(
        exemplar_id=f"key-{latent}-{split}-{kind}-{row}", latent=latent, kind=kind, split=split, group=group, row=row,
        token_ids=ids, acts=tuple(acts), peak=text.find("!"),
    )  # fmt: skip


def job(latent: int, shown, says: str = "shouting") -> ScoreJob:
    """``shown(split, kind, row, group)`` -> text; windows in the order of a table: by kind, group and row."""
    sides = []
    for split, n in (("score", 20), ("calibrate", 10)):
        draw = rng("rows", latent, split)
        rows = np.sort(draw.choice(1_000, (2, n), replace=False), axis=1).tolist()
        groups = draw.permutation([i % N_GROUPS for i in range(n)]).tolist()
        found = [
            window(latent, split, "quantile", r, shown(split, "quantile", r, g) + "!", g)
            for g, r in sorted(zip(groups, rows[0], strict=True))
        ]
        found += [window(latent, split, "silent", r, shown(split, "silent", r, -1)) for r in rows[1]]
        sides.append(tuple(found))
    explanation = Explanation(explanation_id=f"x{latent}", sae_id="s", latent=latent, explainer="t", text=says)
    return ScoreJob(
        explanation=explanation, sae_id="s", latent=latent, exemplars=sides[0], calibrate=sides[1], pi=0.1
    )


def likely(p_of) -> ScoreContext:
    def answer(request):
        if request.prompt == PMI_NO_TEXT:
            return LogprobReply(sums=(-3.0,) * len(request.continuations), counts=(1,) * len(request.continuations))
        p = p_of(request.prompt.rpartition("\n\n")[0])
        return LogprobReply(sums=(math.log(p),) * len(request.continuations), counts=(1,) * len(request.continuations))

    client = CachedClient(ScriptedClient(answer, tokenizer=TOKENIZER))
    return ScoreContext(client=client, embedder=Words(), tokenizer=TOKENIZER)


def aucs(results) -> list[float]:
    return [s.value for r in results for s in r.scores if (s.metric, s.group) == ("auc", "") and s.value is not None]


def test_the_strongest_windows_are_judged_too() -> None:
    """The explanation fits the upper half of the strengths and nothing else. Without the two strongest groups a judge
    that knows would find 3 of 8; a cut from the four weakest would be one between nothing and nothing."""
    jobs = [job(i, lambda split, kind, row, g: "loud" if g >= N_GROUPS // 2 else "calm") for i in range(6)]
    results = Surprisal().score_many(jobs, likely(lambda text: 0.9 if "loud" in text else 0.1))
    for one, result in zip(jobs, results, strict=True):
        rows = {(s.metric, s.group): s.value for s in result.scores}
        assert rows["recall", ""] == 0.5 and rows["fpr_silent", ""] == 0.0 and rows["auc", ""] == 0.75
        group = {e.exemplar_id: e.group for e in one.exemplars}
        judged = sorted(group[i.exemplar_id] for i in result.items if i.positive)
        assert judged == [0, 1, 3, 4, 5, 6, 8, 9]
        gains = {True: math.log(0.9) + 3, False: math.log(0.1) + 3}  # over the text's own -3 nats
        loud = {e.exemplar_id: e.group >= N_GROUPS // 2 for e in one.exemplars}
        assert all(i.value == pytest.approx(gains[loud[i.exemplar_id]]) for i in result.items)


def test_half_of_the_windows_that_set_the_threshold_are_active() -> None:
    ctx = likely(lambda text: 0.9 if "loud" in text else 0.1)
    one = job(0, lambda split, kind, row, g: f"{split} {row} {'loud' if g >= 0 else 'calm'}")
    Surprisal(calibrate=6).score_many([one], ctx)
    assert ctx.client is not None
    read = [r.prompt.rpartition("\n\n")[0] for r in ctx.client.backend.sent if "calibrate" in r.prompt]
    assert (sum("loud" in text for text in read), sum("calm" in text for text in read)) == (3, 3)


@pytest.mark.parametrize("scorer", ["surprisal", "simulation"])
def test_where_in_the_text_a_window_stands_tells_nothing(scorer: str) -> None:
    """A folder whose first half is code: a judge that knows code from prose, and nothing of the latent, is at chance.
    Had the silent windows come from the beginning, it would have been better than chance: see the last lines."""

    def shown(split: str, kind: str, row: int, group: int) -> str:
        return "code" if row < 500 else "prose"

    jobs = [job(i, shown, says="prose") for i in range(60)]
    ctx = likely(lambda text: 0.9 if "prose" in text else 0.1)
    if scorer == "surprisal":
        found = aucs(Surprisal().score_many(jobs, ctx))
    else:
        results = Simulation("word_embedding").score_many(jobs, ctx)
        found = []
        for result in results:
            value = {True: [], False: []}
            for item in result.items:
                value[item.positive].append(item.value)
            found.append(np.mean([(p > q) + (p == q) / 2 for p in value[True] for q in value[False]]))
    assert len(found) == 60 and np.mean(found) == pytest.approx(0.5, abs=0.05)
    first = []
    for one in jobs:  # the first eight of each class in the order of the table, as version 1 took them
        silent = ["prose" in TOKENIZER.decode(list(e.token_ids)) for e in one.exemplars if e.kind == "silent"][:8]
        active = [e for e in one.exemplars if e.positive]
        turn = [next(e for e in active if e.group == g) for g in range(8)]
        strong = ["prose" in TOKENIZER.decode(list(e.token_ids)) for e in turn]
        first.append(np.mean([(p > q) + (p == q) / 2 for p in strong for q in silent]))
    assert np.mean(first) > 0.6


def test_windows_of_one_sign_that_fail_leave_no_correlation() -> None:
    """2 of 10 active windows cannot be simulated: a tenth of all, a fifth of those that matter."""
    one = job(0, lambda split, kind, row, g: "words")

    class Lossy:
        name, version, needs = "lossy", 1, frozenset()

        def __init__(self, sign: bool) -> None:
            self.sign = sign

        def simulate_many(self, pairs, ctx):
            lost = [e.exemplar_id for _, e in pairs if e.split == "score" and e.positive == self.sign][:2]
            failure = Failure(code="low_mass", stage="simulate")
            return [
                Simulated(
                    explanation_id=x.explanation_id, exemplar_id=e.exemplar_id, simulator="lossy",
                    values=None if e.exemplar_id in lost else e.acts,
                    failure=failure if e.exemplar_id in lost else None,
                )  # fmt: skip
                for x, e in pairs
            ]

    for sign in (True, False):
        scorer = Simulation("word_embedding")
        scorer.simulator = Lossy(sign)
        [result] = scorer.score_many([one], ScoreContext(tokenizer=TOKENIZER))
        assert {(s.value, s.null_reason, s.n_failed) for s in result.scores} == {(None, "too_many_failures", 2)}
