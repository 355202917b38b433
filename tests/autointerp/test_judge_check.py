"""The judge check tells a judge from a coin, in every kind of scorer."""

import json
import math

import pytest
from tiny import byte_tokenizer

from autointerp.client import CachedClient, LogprobReply
from autointerp.clients.scripted import ScriptedClient
from autointerp.interfaces import ScoreContext
from autointerp.judge_check import check_judge, is_weak, known_features
from autointerp.records import Failure
from autointerp.scorers.detection import PLUGIN as Detection
from sae.errors import ConfigError, Unsupported
from sae.manifest import rng

TOKENIZER = byte_tokenizer()
FITS = {f.description: set(f.fitting) for f in known_features()}


def context(p_yes) -> ScoreContext:
    """A judge from ``p_yes(description, text)``, in both modes."""

    def answer(request):
        said = request.messages[-1].content
        description = said.splitlines()[0].removeprefix("Description: ")
        if request.verb == "next_token":
            p = p_yes(description, said.rpartition("Snippet: ")[2])
            return (
                p
                if isinstance(p, Failure)
                else LogprobReply(rows=((math.log(p), *[None] * 4, math.log(1 - p), *[None] * 4),))
            )
        numbered = [line.partition("] ")[2] for line in said.splitlines()[1:]]
        said = [p_yes(description, text) for text in numbered]
        lost = next((p for p in said if isinstance(p, Failure)), None)
        return lost or json.dumps({"match": [i for i, p in enumerate(said, 1) if p > 0.5]})

    return ScoreContext(client=CachedClient(ScriptedClient(answer, tokenizer=TOKENIZER)), tokenizer=TOKENIZER)


def knows(description: str, text: str) -> float:
    return 0.9 if text in FITS[description] else 0.1


def test_the_data_are_24_descriptions_with_five_texts_of_each_kind() -> None:
    features = known_features()
    assert len(features) == 24 == len({f.description for f in features})
    texts = [t for f in features for t in (*f.fitting, *f.unfitting)]
    assert all(len(f.fitting) == len(f.unfitting) == 5 for f in features)
    assert len(set(texts)) == 240 and all(15 <= len(t) <= 120 for t in texts)


@pytest.mark.parametrize("mode", ["logprob", "list"])
def test_a_judge_that_knows_passes(mode: str) -> None:
    check = check_judge(Detection(mode=mode), context(knows))
    assert check.auc == 1.0 and check.wrong_auc == 0.5 and not check.weak and check.n == 24 and check.n_failed == 0
    assert check.scorer == "detection" and check.judge == f"{mode}/scripted"
    assert check.detail["measure"] == ("auc" if mode == "logprob" else "balanced_accuracy")
    assert len(check.detail["per_description"]) == 24 and check.detail["n_items"] == 480


@pytest.mark.parametrize("mode", ["logprob", "list"])
def test_a_coin_and_a_constant_are_weak(mode: str) -> None:
    coin = check_judge(Detection(mode=mode), context(lambda d, t: 0.1 + 0.8 * rng(d, t).random()))
    assert coin.weak and abs(coin.auc - 0.5) < 0.15 and coin.ci_low < 0.5 < coin.ci_high
    constant = check_judge(Detection(mode=mode), context(lambda d, t: 0.9))
    assert constant.weak and constant.auc == 0.5


def test_a_judge_of_texts_that_ignores_the_description_is_weak() -> None:
    anything = {t for fits in FITS.values() for t in fits}
    check = check_judge(Detection(mode="logprob"), context(lambda d, t: 0.9 if t in anything else 0.1))
    assert check.auc == 1.0 and check.wrong_auc == 1.0 and check.weak


def test_failures_are_counted_and_left_out() -> None:
    lost = FITS["weather"]

    def judge(d: str, t: str):
        return Failure(code="timeout", stage="x") if t in lost else knows(d, t)

    check = check_judge(Detection(mode="logprob"), context(judge))
    assert check.n_failed == 10 and check.auc == 1.0
    assert check.detail["per_description"]["weather"] is None and check.detail["n_undefined"] == 1
    dead = check_judge(Detection(mode="logprob"), context(lambda d, t: Failure(code="timeout", stage="x")))
    assert dead.auc is None and dead.weak and dead.n_failed == 480


@pytest.mark.parametrize("mode", ["logprob", "list"])
def test_a_judge_that_seldom_answers_is_weak_however_right_it_is(mode: str) -> None:
    """Right where it answers at all, which is two fifths (one third) of the time: not AUC 1, but no AUC."""
    few = {t for f in known_features() for side in (f.fitting, f.unfitting) for t in side[:2]}
    silent = Failure(code="refusal", stage="x")
    answers = set(list(FITS)[::3])  # in list mode a request is answered as a whole or not at all

    def judge(d: str, t: str):
        return silent if (d not in answers if mode == "list" else t not in few) else knows(d, t)

    ctx = context(judge)
    check = check_judge(Detection(mode=mode), ctx)
    assert check.auc is None and check.ci_low is None and check.weak and check.n_failed > 0.1 * 480
    answered = [v for v in check.detail["per_description"].values() if v is not None]
    assert answered and set(answered) == {1.0}  # what it did say was right


def test_fewer_descriptions_cost_less_and_say_so() -> None:
    ctx = context(knows)
    check = check_judge("detection", ctx, n_descriptions=6)
    assert check.n == 6 and len(ctx.client.backend.sent) == 120
    with pytest.raises(ConfigError):
        check_judge("detection", ctx, n_descriptions=1)
    with pytest.raises(Unsupported):
        check_judge("detection", ScoreContext(tokenizer=TOKENIZER))


@pytest.mark.parametrize(
    ("value", "wrong", "weak"), [(0.9, 0.5, False), (0.74, 0.5, True), (0.8, 0.7, True), (None, 0.5, True)]
)
def test_the_rule(value, wrong, weak: bool) -> None:
    assert is_weak(value, wrong) is weak


def test_it_works_for_judges_that_need_no_prompt() -> None:
    """The likelihood contrast, with a script that knows: same data, another scorer."""

    def answer(request):
        text = request.prompt
        found = [any(t in text for t in FITS[d]) for d in FITS]
        said = [c.strip(" .") for c in request.continuations]
        sums = tuple(-1.0 if any(hit and d in s for hit, d in zip(found, FITS, strict=True)) else -9.0 for s in said)
        return LogprobReply(sums=sums, counts=tuple(3 for _ in sums))

    client = CachedClient(ScriptedClient(answer, tokenizer=TOKENIZER))
    check = check_judge("surprisal", ScoreContext(client=client, tokenizer=TOKENIZER), n_descriptions=8)
    assert check.auc == 1.0 and check.wrong_auc == 0.5 and check.scorer == "surprisal"
