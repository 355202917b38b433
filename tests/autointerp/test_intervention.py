"""Intervention: the push is as strong as asked, the true text of a planted direction comes first, a coin is at chance.

The tiny model's last residual stream is pushed along its own unembedding rows: what each latent makes it write is known
(its byte). An SAE of six such rows; two of them are steered besides the one that is judged.
"""

import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from held_out import random_sae
from judges import TOKENIZER, refuse

from autointerp.client import CachedClient, Capabilities, LogprobReply
from autointerp.clients.scripted import ScriptedClient
from autointerp.interfaces import NEEDS, ScoreContext, ScoreJob, Scorer, check_needs
from autointerp.judge_check import check_judge, known_features
from autointerp.records import Exemplar, Explanation, Failure
from autointerp.scorers.intervention import PLUGIN as Intervention
from autointerp.steering import Steering
from sae.base import SAE
from sae.errors import Unsupported
from sae.manifest import rng

LETTERS = "axqkz7"
HOOKPOINT = "layers.2"
WIDTH = 14
NATS = 2.0


@pytest.fixture(scope="module")
def planted(tiny_lm) -> SAE:
    """Latent i writes LETTERS[i]; its decoder row has any length."""
    sae = random_sae(d_in=32, d_sae=len(LETTERS), k=2)
    unembed = tiny_lm.model.get_output_embeddings().weight
    rows = [unembed[TOKENIZER.encode(c, add_special_tokens=False)[0]] * (1 + i) for i, c in enumerate(LETTERS)]
    with torch.no_grad():
        sae.W_dec_FD.copy_(torch.stack(rows))
    return sae


def silent(latent: int, n: int = 20) -> tuple[Exemplar, ...]:
    draw = rng("silent", latent)
    texts = ["".join(draw.choice(list("the crowd men wolf"), WIDTH)) for _ in range(n)]
    return tuple(
        Exemplar(exemplar_id=f"{latent}/score/silent/{i:03d}", latent=latent, kind="silent", split="score",
                 token_ids=tuple(TOKENIZER.encode(t, add_special_tokens=False)), acts=(0.0,) * WIDTH)
        for i, t in enumerate(texts)
    )  # fmt: skip


def job(sae: SAE, latent: int = 0, text: str | None = "", **fields) -> ScoreJob:
    said = f"writes {LETTERS[latent]}" if text == "" else text
    explanation = Explanation(
        explanation_id=f"s/{latent}/t/{said}", sae_id=sae.sae_id, latent=latent, explainer="t", text=said, **fields
    )
    return ScoreJob(explanation=explanation, sae_id=sae.sae_id, latent=latent, exemplars=silent(latent), pi=0.1)


def share(explanation: str, piece: str) -> float:
    wanted = explanation.strip().rpartition(" ")[2]
    return piece.count(wanted) / max(len(piece), 1)


def oracle(request):
    """Reads how often a piece holds the letter that the explanation names."""
    if request.verb == "continuation":
        piece = request.prompt.rpartition("\n\n")[0]
        sums = tuple(-5 + 4 * share(c, piece) for c in request.continuations)
        return LogprobReply(sums=sums, counts=(1,) * len(sums))
    explanation, *groups = request.messages[-1].content.splitlines()
    p = np.array([1e-3 + share(explanation, g[4:]) for g in groups])
    if request.verb == "generate":
        return f'{{"group": {int(p.argmax()) + 1}}}'
    return LogprobReply(rows=((*np.log(p / p.sum()).tolist(), None, None, None),))


def coin(request):
    draw = rng("coin", repr(request))
    if request.verb == "continuation":
        return LogprobReply(
            sums=tuple(draw.normal(size=len(request.continuations)).tolist()), counts=(1,) * len(request.continuations)
        )
    return LogprobReply(rows=((*np.log(draw.dirichlet([1.0] * 3)).tolist(), None, None, None),))


def score(tiny_lm, sae, jobs, answer=oracle, *, capabilities=None, nats: float = NATS, **options):
    backend = ScriptedClient(answer, tokenizer=TOKENIZER, **({"capabilities": capabilities} if capabilities else {}))
    ctx = ScoreContext(
        client=CachedClient(backend), lm=tiny_lm, sae=sae, hookpoint=HOOKPOINT, tokenizer=TOKENIZER,
        latents=tuple(range(sae.d_sae)),
    )  # fmt: skip
    options = {"prompts": 20, "prompt_tokens": None} | options
    return Intervention(target_nats=nats, **options).score_many(jobs, ctx), backend


def totals(result) -> dict[str, float | None]:
    return {s.metric: s.value for s in result.scores}


# --- the push --------------------------------------------------------------------------------------------------------


def prompts(n: int = 4) -> list[list[int]]:
    return [[0, *e.token_ids] for e in silent(1, n)]


@pytest.mark.parametrize("hookpoint", ["layers.0", "layers.2"])
@pytest.mark.parametrize("nats", [0.1, 0.5, 2.0])
def test_the_push_has_the_effect_that_was_asked_for(tiny_lm, planted, hookpoint: str, nats: float) -> None:
    """The KL found is that of a full pass with the pushed activations put in place, positions but the first."""
    steering = Steering(tiny_lm, hookpoint, prompts(), target_nats=nats)
    push = steering.matched(planted.W_dec_FD[1])
    assert not isinstance(push, Failure) and push.kl_nats == pytest.approx(nats, rel=0.1)
    ids = torch.tensor(prompts())
    resid = tiny_lm.capture(ids, [hookpoint])[hookpoint].clone()
    clean = torch.log_softmax(tiny_lm.logits(ids)[:, -1], -1)
    resid[:, 1:] += push.vector_D
    pushed = torch.log_softmax(tiny_lm.replace(ids, hookpoint, resid)[:, -1], -1)
    assert float((clean.exp() * (clean - pushed)).sum(-1).mean()) == pytest.approx(push.kl_nats, rel=1e-3)
    cosine = torch.nn.functional.cosine_similarity(push.vector_D, planted.W_dec_FD[1], dim=0)
    assert float(cosine) == pytest.approx(1.0, abs=1e-5)
    again = steering.matched(planted.W_dec_FD[1] * 7)  # the row's length says nothing
    assert again.norms == pytest.approx(push.norms, rel=1e-4)


def test_continuations_equal_plain_passes(tiny_lm, planted) -> None:
    """Token by token without a cache, pushed activations put in place: the same greedy texts."""
    steering = Steering(tiny_lm, "layers.0", prompts(), target_nats=NATS, new_tokens=5)
    push = steering.matched(planted.W_dec_FD[2])
    for vector in (None, push.vector_D):
        ids = torch.tensor(prompts())
        for _ in range(5):
            resid = tiny_lm.capture(ids, ["layers.0"])["layers.0"].clone()
            if vector is not None:
                resid[:, 1:] += vector
            logits = tiny_lm.replace(ids, "layers.0", resid)[:, -1]
            logits[:, list(TOKENIZER.all_special_ids)] = -math.inf
            ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], dim=1)
        assert steering.continuations(vector) == [TOKENIZER.decode(row) for row in ids[:, WIDTH + 1 :].tolist()]
    assert steering.continuations(None) != steering.continuations(push.vector_D)
    assert steering.continuations(None) == Steering(tiny_lm, "layers.0", prompts(), new_tokens=5).continuations(None)


def test_what_cannot_be_pushed_is_said(tiny_lm, planted) -> None:
    steering = Steering(tiny_lm, HOOKPOINT, prompts(), target_nats=1e4)
    assert steering.matched(planted.W_dec_FD[0]).code == "kl_unreachable"
    assert steering.matched(torch.zeros(32)).code == "kl_unreachable"
    assert steering.matched(torch.full((32,), float("nan"))).code == "kl_unreachable"
    with pytest.raises(Unsupported, match="layers.1.mlp"):
        Steering(tiny_lm, "layers.1.mlp", prompts())


# --- the scorer ------------------------------------------------------------------------------------------------------


def test_declarations() -> None:
    plugin = Intervention()
    assert isinstance(plugin, Scorer) and plugin.needs <= NEEDS and plugin.metrics
    with pytest.raises(Unsupported, match="intervention.*lm, sae"):
        check_needs(plugin, ScoreContext(client=CachedClient(ScriptedClient(oracle))))


def test_the_true_explanation_comes_first(tiny_lm, planted) -> None:
    """With a judge that knows, right choices throughout and a large gain; under any other latent's text less."""
    for latent in range(3):
        texts = [f"writes {c}" for c in LETTERS]
        found, _ = score(tiny_lm, planted, [job(planted, latent, t) for t in texts])
        values = [totals(r) for r in found]
        true = values.pop(latent)
        assert true["choice"] == true["choice_likelihood"] == 1.0 and true["surprisal_gain"] > 2
        for other in values:
            assert other["surprisal_gain"] < 0.5 and other["choice"] < 0.7 and other["choice_likelihood"] < 0.7


def test_a_coin_sits_at_the_floor(tiny_lm, planted) -> None:
    """36 jobs of 10 choices: a standard error of 0.025; the gain has mean 0 with one of sqrt(2 / 720) = 0.05."""
    jobs = [job(planted, latent, f"text {i}") for latent in range(6) for i in range(6)]
    found, _ = score(tiny_lm, planted, jobs, coin, trials=10)
    for metric, chance in (("choice", 1 / 3), ("choice_likelihood", 1 / 3), ("surprisal_gain", 0.0)):
        mean = np.mean([totals(r)[metric] for r in found])
        assert mean == pytest.approx(chance, abs=0.12 if chance else 0.25), (metric, mean)
    assert all(s.base_rate == pytest.approx(1 / 3) for r in found for s in r.scores if s.metric != "surprisal_gain")


def test_rows_and_items_say_what_was_asked(tiny_lm, planted) -> None:
    [result], backend = score(tiny_lm, planted, [job(planted, 1)], nats=0.5)
    assert [s.metric for s in result.scores] == list(Intervention.metrics)
    assert all(s.value is not None for s in result.scores)
    gain, likely, chosen = result.scores
    assert gain.n_pos == 20 and likely.n_pos == chosen.n_pos == 5 and gain.ci_low < gain.value < gain.ci_high
    assert [i.exemplar_id for i in result.items] == [e.exemplar_id for e in silent(1)]
    assert np.mean([i.value for i in result.items]) == pytest.approx(gain.value, abs=1e-6)
    assert all(i.verdict is not None for i in result.items) and not any(i.positive for i in result.items)
    asked = [r for r in backend.sent if r.verb == "next_token"]
    places = [re.findall(r"^\[(\d)\]", r.messages[-1].content, re.M) for r in asked]
    assert len(asked) == 5 and places == [["1", "2", "3"]] * 5
    own = [int(np.argmax([share("writes x", g) for g in r.messages[-1].content.splitlines()[1:]])) for r in asked]
    assert len(set(own)) > 1, "the latent's group stands in different places"


def test_order_and_company_change_nothing(tiny_lm, planted) -> None:
    jobs = [job(planted, i) for i in range(4)] + [replace(job(planted, 0, "writes x"), floor_kind="shuffled")]
    forward, _ = score(tiny_lm, planted, jobs)
    backward, _ = score(tiny_lm, planted, jobs[::-1])
    assert forward == backward[::-1] == [score(tiny_lm, planted, [j])[0][0] for j in jobs]
    assert {s.floor_kind for s in forward[-1].scores} == {"shuffled"} and score(tiny_lm, planted, [])[0] == []


def test_a_chat_server_can_choose_and_nothing_else(tiny_lm, planted) -> None:
    chat = Capabilities(structured="json_schema")
    [result], backend = score(tiny_lm, planted, [job(planted)], capabilities=chat, nats=1.0)
    assert totals(result) == {"surprisal_gain": None, "choice_likelihood": None, "choice": 1.0}
    assert {s.null_reason for s in result.scores if s.value is None} == {"unsupported"}
    assert {r.verb for r in backend.sent} == {"generate"} and len(backend.sent) == 5


def test_failures_are_counted_and_never_scored(tiny_lm, planted) -> None:
    [result], _ = score(tiny_lm, planted, [job(planted)], refuse)
    assert {(s.value, s.null_reason) for s in result.scores} == {(None, "too_many_failures")}
    assert all(i.failure.code == "refusal" and i.value is None and i.verdict is None for i in result.items)
    asked = 0

    def once(request):
        nonlocal asked
        asked += request.verb == "continuation"
        return refuse(request) if request.verb == "continuation" and asked == 3 else oracle(request)

    [whole], _ = score(tiny_lm, planted, [job(planted)])
    [result], _ = score(tiny_lm, planted, [job(planted)], once)
    gain = result.scores[0]
    assert gain.n_failed + gain.n_pos == 20 and gain.n_failed <= 2
    assert gain.value == pytest.approx(whole.scores[0].value, abs=0.4)


def test_what_cannot_be_scored_is_null_with_its_reason_and_costs_nothing(tiny_lm, planted) -> None:
    failed = job(planted, 0, None, failure=Failure(code="no_candidate", stage="explain"))
    bare = replace(job(planted), exemplars=silent(0)[:3])
    (one, two), backend = score(tiny_lm, planted, [failed, bare])
    assert {(s.value, s.null_reason) for s in one.scores} == {(None, "no_candidate")} and not one.items
    assert {(s.value, s.null_reason) for s in two.scores} == {(None, "too_few_rows")} and not backend.sent
    [three], backend = score(tiny_lm, planted, [job(planted)], prompts=20, new_tokens=1)
    assert three.items
    stiff = Intervention(prompt_tokens=None, target_nats=1e4).score_many(
        [job(planted)],
        ScoreContext(client=CachedClient(ScriptedClient(oracle)), lm=tiny_lm, sae=planted, hookpoint=HOOKPOINT,
                     tokenizer=TOKENIZER),
    )  # fmt: skip
    assert {s.null_reason for s in stiff[0].scores} == {"kl_unreachable"}


def test_another_sae_than_the_jobs_is_an_error(tiny_lm, planted) -> None:
    with pytest.raises(Unsupported, match="other-sae"):
        score(tiny_lm, planted, [replace(job(planted), sae_id="other-sae")])


def test_its_judge_check_needs_no_model() -> None:
    """Fitting texts stand for pieces: a judge that knows them passes, a coin is weak."""
    fitting = {f.description: f.fitting for f in known_features()}

    def known(description: str, text: str) -> bool:
        return text in fitting[description]

    def knows(request):
        if request.verb == "continuation":
            piece = request.prompt.rpartition("\n\n")[0]
            fits = [known(c.strip(), piece) for c in request.continuations]
            return LogprobReply(sums=tuple(-1.0 if f else -3.0 for f in fits), counts=(1,) * len(fits))
        explanation, *groups = request.messages[-1].content.splitlines()
        text = explanation.partition(": ")[2]
        p = np.array([0.01 + sum(known(text, x) for x in g[4:].split(" | ")) for g in groups])
        return LogprobReply(rows=((*np.log(p / p.sum()).tolist(), None, None, None),))

    def ctx(answer) -> ScoreContext:
        return ScoreContext(client=CachedClient(ScriptedClient(answer, tokenizer=TOKENIZER)), tokenizer=TOKENIZER)

    good, bad = check_judge(Intervention(), ctx(knows)), check_judge(Intervention(), ctx(coin))
    assert good.auc > 0.95 and not good.weak and good.n_failed == 0
    assert bad.weak and bad.auc == pytest.approx(0.5, abs=0.2)


def test_it_is_part_of_the_estimate() -> None:
    from autointerp.config import ExemplarConfig
    from autointerp.estimate import estimate
    from autointerp.explainers.token_list import PLUGIN as TokenList

    stages = estimate(
        [TokenList()], [Intervention()], ExemplarConfig(), latents=10, tokenizer=TOKENIZER,
        capabilities=Capabilities(next_token=True, continuation=True),
    )  # fmt: skip
    by_name = {s.stage: s for s in stages}
    assert by_name["score.intervention"].requests > 10 and by_name["check.intervention"].requests > 10


def letters_of(explanation: str) -> set[str]:
    return set(explanation.strip().removeprefix("writes ").replace(" or ", ""))


def careful(request):
    """Knows what each text says of a piece: a letter that it names has the probability that the text leaves it."""
    if request.verb == "continuation":
        piece = request.prompt.rpartition("\n\n")[0]
        sums = tuple(-3.0 + 4 * _fit(c, piece) for c in request.continuations)
        return LogprobReply(sums=sums, counts=(1,) * len(sums))
    explanation, *groups = request.messages[-1].content.splitlines()
    p = np.array([1e-3 + _fit(explanation.partition(": ")[2], g[4:]) for g in groups])
    return LogprobReply(rows=((*np.log(p / p.sum()).tolist(), None, None, None),))


def _fit(explanation: str, piece: str) -> float:
    wanted = letters_of(explanation)
    return sum(piece.count(c) for c in wanted) / len(wanted) / max(len(piece), 1)


def test_near_misses_come_after_the_truth(tiny_lm, planted) -> None:
    """A text that names more than the latent writes, one that names only other letters, one that names nothing seen."""
    for latent in range(3):
        own, other, third = (LETTERS[(latent + k) % len(LETTERS)] for k in range(3))
        near = [f"writes {own} or {other}", f"writes {own} or {other} or {third}", f"writes {other} or {third}",
                f"writes {other}", "writes %"]  # fmt: skip
        found, _ = score(tiny_lm, planted, [job(planted, latent, t) for t in (f"writes {own}", *near)], careful)
        true, *rest = [totals(r) for r in found]
        assert true["choice"] == true["choice_likelihood"] == 1.0
        gains = [r["surprisal_gain"] for r in rest]
        assert all(true["surprisal_gain"] > g + 0.5 for g in gains)
        assert gains[0] > gains[1] > max(gains[2:]) + 0.1  # the wider, the less; what leaves the letter out, nothing
