"""Detection by a prompted judge: a language model says which windows fit the explanation (AUTOINTERP 5.1).

Two modes that are never pooled. ``logprob``: one window per request, p = P(yes) / (P(yes) + P(no)) over spelling
variants, no decoding, no order effects. ``list``: ten numbered windows per request, reply ``{"match": [...]}``; every
answer is yes, no or a typed failure. Metrics: AUTOINTERP 5.2.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

from autointerp.classify import DETECTION_METRICS, detection_scores, make_items, null_scores
from autointerp.client import (
    Client,
    GenerateRequest,
    LogprobReply,
    Message,
    NextTokenRequest,
    Origin,
    Reply,
    check_capability,
)
from autointerp.interfaces import ScoreContext, ScoreJob, ScoreResult
from autointerp.prompts import escaped, load_prompt, numbered, window_text
from autointerp.records import Exemplar, Failure, ScoreItem
from autointerp.replies import ask, json_object
from sae.config import require
from sae.errors import Unsupported
from sae.manifest import rng

Mode = Literal["auto", "logprob", "list"]
YES, NO = ("Yes", " Yes", "yes", " yes", "YES"), ("No", " No", "no", " no", "NO")
MIN_YES_NO_MASS = 0.05
"""Less probability on all spellings of yes and no: the model did not answer the question."""
REPLY_TOKENS = 100
DECIMALS = 6
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"match": {"type": "array", "items": {"type": "integer"}}},
    "required": ["match"],
    "additionalProperties": False,
}


class Detection:
    """``Detection(mode="auto", per_request=10)``; auto = logprob where the client has next-token log-probabilities."""

    name: ClassVar[str] = "detection"
    version: ClassVar[int] = 1
    needs: ClassVar[frozenset[str]] = frozenset({"client:generate"})
    metrics: ClassVar[tuple[str, ...]] = DETECTION_METRICS

    def __init__(self, *, mode: Mode = "auto", per_request: int = 10) -> None:
        require(mode in ("auto", "logprob", "list"), f"mode must be auto, logprob or list, got {mode!r}")
        require(per_request >= 1, f"per_request must be positive, got {per_request}")
        self.mode, self.per_request = mode, per_request
        self.inputs = {name: load_prompt(name).sha256 for name in ("detection_logprob", "detection_list")}

    def score_many(self, jobs: list[ScoreJob], ctx: ScoreContext) -> list[ScoreResult]:
        """One result per job. :class:`Unsupported` where the client lacks the mode's verb."""
        if ctx.client is None:
            raise Unsupported("'detection' needs a language model; choose a client or another scorer")
        mode = self.mode
        if mode == "auto":
            mode = "logprob" if ctx.client.capabilities.next_token else "list"
        check_capability(ctx.client, "next_token" if mode == "logprob" else "generate", f"{self.name} ({mode} mode)")
        jobs = [replace(job, exemplars=tuple(_ordered(job))) for job in jobs]
        usable = [i for i, job in enumerate(jobs) if job.explanation.text is not None and job.exemplars]
        judge = self._by_logprob if mode == "logprob" else self._by_list
        found = dict(zip(usable, judge([jobs[i] for i in usable], ctx, ctx.client), strict=True))
        identity: dict[str, Any] = {
            "scorer": self.name, "version": self.version, "judge": ctx.client.identity.model,
        }  # fmt: skip
        results = []
        for i, job in enumerate(jobs):
            if i in found:
                items = sorted(found[i], key=lambda item: item.exemplar_id)
                results.append(ScoreResult(scores=detection_scores(job, items, **identity), items=tuple(items)))
                continue
            code = "too_few_positive"
            if job.explanation.text is None:  # a bare pattern has no text to judge by
                code = job.explanation.failure.code if job.explanation.failure else "unsupported"
            results.append(ScoreResult(scores=null_scores(job, code, self.metrics, **identity)))
        return results

    def _by_logprob(self, jobs: Sequence[ScoreJob], ctx: ScoreContext, client: Client) -> list[list[ScoreItem]]:
        prompt = load_prompt("detection_logprob")
        requests = []
        for job in jobs:
            for exemplar in job.exemplars:
                window = window_text(ctx.tokenizer, exemplar.token_ids)
                messages = prompt.messages(explanation=escaped(job.explanation.text or ""), window=window)
                requests.append(NextTokenRequest(messages=messages, choices=YES + NO, origin=_origin(job)))
        values = iter([_p_yes(reply) for reply in client.logprobs(requests)])
        return [make_items(job, job.exemplars, [next(values) for _ in job.exemplars], 0.5, self.name) for job in jobs]

    def _by_list(self, jobs: Sequence[ScoreJob], ctx: ScoreContext, client: Client) -> list[list[ScoreItem]]:
        prompt = load_prompt("detection_list")
        requests: list[GenerateRequest] = []
        shown: list[tuple[int, list[Exemplar]]] = []
        for j, job in enumerate(jobs):
            mixed = list(job.exemplars)
            # One order per latent, the same under the true and a shuffled explanation.
            rng(ctx.seed, job.sae_id, job.latent, "detection").shuffle(mixed)  # type: ignore[arg-type]
            for start in range(0, len(mixed), self.per_request):
                part = mixed[start : start + self.per_request]
                lines = numbered([window_text(ctx.tokenizer, e.token_ids) for e in part])
                messages = prompt.messages(explanation=escaped(job.explanation.text or ""), windows=lines)
                requests.append(_list_request(messages, job))
                shown.append((j, part))
        answers = ask(client, requests, lambda i, reply: _matches(reply, len(shown[i][1])), prompt.section("reminder"))
        items: list[list[ScoreItem]] = [[] for _ in jobs]
        for (j, part), answer in zip(shown, answers, strict=True):
            for number, exemplar in enumerate(part, 1):
                failure = answer.value if isinstance(answer.value, Failure) else None
                items[j].append(
                    ScoreItem(
                        explanation_id=jobs[j].explanation.explanation_id,
                        exemplar_id=exemplar.exemplar_id,
                        scorer=self.name,
                        positive=exemplar.positive,
                        verdict=None if isinstance(answer.value, Failure) else number in answer.value,
                        failure=failure,
                    )
                )
        return items


def _ordered(job: ScoreJob) -> list[Exemplar]:
    return sorted(job.exemplars, key=lambda e: e.exemplar_id)


def _origin(job: ScoreJob) -> Origin:
    return Origin(stage="score.detection", sae_id=job.sae_id, latent=job.latent)


def _list_request(messages: tuple[Message, ...], job: ScoreJob) -> GenerateRequest:
    return GenerateRequest(messages=messages, max_tokens=REPLY_TOKENS, schema=SCHEMA, origin=_origin(job))


def _matches(reply: Reply, n_windows: int) -> frozenset[int] | Failure:
    """The numbers of a list-mode reply; anything but distinct numbers in 1..n is a failure of the whole request."""
    value = json_object(reply.text, SCHEMA)
    if isinstance(value, Failure):
        return value
    numbers: list[int] = value["match"]
    outside = [n for n in numbers if not 1 <= n <= n_windows]
    if outside:
        return Failure(code="out_of_range", stage="score", detail=f"number {outside[0]} of {n_windows} windows")
    if len(set(numbers)) < len(numbers):
        return Failure(code="duplicate", stage="score", detail=f"a number occurs twice: {numbers}")
    return frozenset(numbers)


def _p_yes(reply: LogprobReply | Failure) -> float | Failure:
    """P(yes) / (P(yes) + P(no)), each summed over its spellings."""
    if isinstance(reply, Failure):
        return reply
    row = reply.rows[0]
    if len(row) != len(YES) + len(NO) or any(v is not None and not v <= 1e-3 for v in row):
        return Failure(code="schema", stage="score", detail="log-probabilities of yes and no are not as asked")
    p = [0.0 if v is None else math.exp(v) for v in row]
    yes, no = sum(p[: len(YES)]), sum(p[len(YES) :])
    if yes + no < MIN_YES_NO_MASS:
        return Failure(code="low_mass", stage="score", detail=f"mass {yes + no:.3g} on yes and no")
    return round(yes / (yes + no), DECIMALS)


PLUGIN = Detection
