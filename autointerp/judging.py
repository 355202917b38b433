"""Prompted yes/no answers about lines of text under an explanation, for the scorers that ask a language model.

Two modes that are never pooled (AUTOINTERP 5.1), so a judge's name begins with its mode. ``logprob``: one line per
request, p = P(yes) / (P(yes) + P(no)) over spelling variants, no decoding, no order effects. ``list``: numbered lines,
reply ``{"match": [...]}``. Every answer is a number, a yes or no, or a typed failure. Torch-free.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

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
from autointerp.prompts import Prompt, escaped, numbered
from autointerp.records import Exemplar, Explanation, Failure, ScoreItem
from autointerp.replies import ask, json_object

Mode = Literal["auto", "logprob", "list"]
MODES = ("auto", "logprob", "list")
YES, NO = ("Yes", " Yes", "yes", " yes", "YES"), ("No", " No", "no", " no", "NO")
MIN_YES_NO_MASS = 0.05
"""Less probability on all spellings of yes and no: the model did not answer the question."""
REPLY_TOKENS, TOKENS_PER_NUMBER = 100, 8
"""Room for a list-mode reply: so much, and more where a request holds many lines."""
YES_ABOVE = 0.5
DECIMALS = 6
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"match": {"type": "array", "items": {"type": "integer"}}},
    "required": ["match"],
    "additionalProperties": False,
}
Verdict = float | bool | Failure
"""logprob mode: p(yes); list mode: yes or no; or why there is no answer."""


@dataclass(frozen=True)
class Question:
    """Does this explanation fit each of these lines?"""

    explanation: str
    lines: tuple[str, ...]
    """Rendered windows, one visible line each."""
    origin: Origin
    order: np.random.Generator
    """Shuffles the lines in list mode; the same under the true and a shuffled explanation."""


@dataclass(frozen=True)
class YesNoJudge:
    """How a scorer asks: its mode, its two prompts, lines per request in list mode."""

    logprob_prompt: Prompt
    list_prompt: Prompt
    mode: Mode = "auto"
    per_request: int = 10

    def mode_for(self, client: Client) -> Mode:
        """The mode in which this client is asked: never auto."""
        if self.mode != "auto":
            return self.mode
        return "logprob" if client.capabilities.next_token else "list"

    def name(self, client: Client) -> str:
        """Who judges and how: answers of different modes are never averaged or compared as if they were one judge's."""
        return f"{self.mode_for(client)}/{client.identity.model}"

    def ask(self, questions: Sequence[Question], client: Client, user: str) -> list[list[Verdict]]:
        """One verdict per line, in the order of the lines. :class:`Unsupported` where the client lacks the mode's
        verb; ``user`` is the plug-in that asks."""
        mode = self.mode_for(client)
        check_capability(client, "next_token" if mode == "logprob" else "generate", f"{user} ({mode} mode)")
        return self._by_logprob(questions, client) if mode == "logprob" else self._by_list(questions, client)

    def _by_logprob(self, questions: Sequence[Question], client: Client) -> list[list[Verdict]]:
        requests = [
            NextTokenRequest(
                messages=self.logprob_prompt.messages(explanation=escaped(q.explanation), window=line),
                choices=YES + NO,
                origin=q.origin,
            )
            for q in questions
            for line in q.lines
        ]
        values = iter([_p_yes(reply) for reply in client.logprobs(requests)])
        return [[next(values) for _ in q.lines] for q in questions]

    def _by_list(self, questions: Sequence[Question], client: Client) -> list[list[Verdict]]:
        requests: list[GenerateRequest] = []
        shown: list[tuple[int, list[int]]] = []
        for k, question in enumerate(questions):
            mixed = list(range(len(question.lines)))
            question.order.shuffle(mixed)  # type: ignore[arg-type]
            for start in range(0, len(mixed), self.per_request):
                part = mixed[start : start + self.per_request]
                messages = self.list_prompt.messages(
                    explanation=escaped(question.explanation), windows=numbered([question.lines[i] for i in part])
                )
                requests.append(_list_request(messages, question.origin, len(part)))
                shown.append((k, part))
        reminder = self.list_prompt.section("reminder")
        answers = ask(client, requests, lambda i, reply: matches(reply, len(shown[i][1])), reminder)
        verdicts: list[list[Verdict]] = [[False] * len(q.lines) for q in questions]
        for (k, part), answer in zip(shown, answers, strict=True):
            for number, line in enumerate(part, 1):
                value = answer.value
                verdicts[k][line] = value if isinstance(value, Failure) else number in value
        return verdicts


def _list_request(messages: tuple[Message, ...], origin: Origin, n_lines: int) -> GenerateRequest:
    room = max(REPLY_TOKENS, TOKENS_PER_NUMBER * n_lines)
    return GenerateRequest(messages=messages, max_tokens=room, schema=SCHEMA, origin=origin)


def matches(reply: Reply, n_lines: int) -> frozenset[int] | Failure:
    """The numbers of a list-mode reply; anything but distinct numbers in 1..n is a failure of the whole request."""
    value = json_object(reply.text, SCHEMA)
    if isinstance(value, Failure):
        return value
    numbers: list[int] = value["match"]
    outside = [n for n in numbers if not 1 <= n <= n_lines]
    if outside:
        return Failure(code="out_of_range", stage="score", detail=f"number {outside[0]} of {n_lines} windows")
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


def ordered(exemplars: Sequence[Exemplar]) -> list[Exemplar]:
    """By id: answers do not depend on the order in which windows are handed over."""
    return sorted(exemplars, key=lambda e: e.exemplar_id)


def verdict_item(explanation: Explanation, exemplar: Exemplar, verdict: Verdict, scorer: str) -> ScoreItem:
    """A verdict on one window as a record; a p(yes) above one half is a yes."""
    failed = isinstance(verdict, Failure)
    real = isinstance(verdict, float)
    return ScoreItem(
        explanation_id=explanation.explanation_id,
        exemplar_id=exemplar.exemplar_id,
        scorer=scorer,
        positive=exemplar.positive,
        value=verdict if real else None,  # type: ignore[arg-type]
        verdict=None if failed else verdict > YES_ABOVE if real else bool(verdict),  # type: ignore[operator]
        failure=verdict if failed else None,  # type: ignore[arg-type]
    )
