"""Language models behind one protocol: requests, replies, request keys, and the client that caches, counts and stops.

A back-end (``autointerp/clients/<name>.py``) answers lists of requests, synchronously and in order, with one reply or
one :class:`Failure` each. :class:`CachedClient` wraps a back-end: it looks every request up by its key, sends only
what is missing, stores each reply as it arrives and keeps the ledger. All log-probabilities are natural (nats).

Torch-free; importing it opens no socket, reads no key and loads no model.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

from autointerp.ledger import Ledger
from autointerp.llm_requests import (
    AnyReply,
    ContinuationRequest,
    GenerateRequest,
    Identity,
    LogprobReply,
    LogprobRequest,
    Message,
    NextTokenRequest,
    Origin,
    PaidFailure,
    Reply,
    Request,
    SlotRequest,
    Usage,
    Verb,
    request_dict,
    request_key,
    rough_tokens,
)
from autointerp.records import ANSWER_CODES, Failure
from autointerp.reply_cache import ReplyCache
from sae.config import from_dict, require, to_dict
from sae.console import progress
from sae.errors import BudgetExceeded, ConfigError, Unsupported

__all__ = [
    "AnyReply", "CachedClient", "Capabilities", "Client", "ContinuationRequest", "GenerateRequest", "Identity",
    "LogprobReply", "LogprobRequest", "Message", "NextTokenRequest", "OnReply", "Origin", "Reply", "Request",
    "SlotRequest", "Usage", "Verb", "check_capability", "count_tokens", "expected_tokens", "expected_usage",
    "open_client", "recalled", "request_key",
]  # fmt: skip

LOCAL_BLOCK_REQUESTS = 128
"""A local model computes requests in blocks of the caller's order, and a block is stored whole or not at all: the last
bits of a float32 product depend on what else is in the batch, so a resumed run must see the same batches."""

R = TypeVar("R", Reply, LogprobReply)
OnReply = Callable[[int, Any], None]
"""Called with (index of the request, reply or failure) as soon as an answer is there, in any order, from one thread."""


@dataclass(frozen=True, kw_only=True)
class Capabilities:
    """What a back-end can do; a missing one is refused when the plan is made, not in the middle of a run."""

    generate: bool = True
    next_token: bool = False
    continuation: bool = False
    slots: bool = False
    structured: Literal["json_schema", "json_object", "parse"] = "parse"
    """parse: nothing constrains the reply, it is only parsed."""
    local: bool = False
    context_tokens: int | None = None

    @property
    def logprobs(self) -> bool:
        """Any of the three log-probability verbs."""
        return self.next_token or self.continuation or self.slots


class Client(Protocol):
    """What explainers, simulators and scorers talk to."""

    identity: Identity
    capabilities: Capabilities
    tokenizer: Any
    """The model's own tokenizer, or None where it is out of reach (a server)."""

    def generate(self, requests: Sequence[GenerateRequest], on_reply: OnReply | None = None) -> list[Reply | Failure]:
        """One reply or failure per request, in order. Raises :class:`SaescopeError` only where going on is pointless:
        a refused key, an unknown model, a spent budget."""
        ...

    def logprobs(
        self, requests: Sequence[LogprobRequest], on_reply: OnReply | None = None
    ) -> list[LogprobReply | Failure]:
        """As :meth:`generate`; :class:`Unsupported` for a verb that the capabilities deny."""
        ...


def check_capability(client: Client, verb: Verb, user: str) -> None:
    """:class:`Unsupported`, naming ``user`` (a plug-in), if the client lacks the verb."""
    if getattr(client.capabilities, verb):
        return
    able = [f.name for f in fields(Capabilities) if getattr(client.capabilities, f.name) is True]
    raise Unsupported(
        f"{user} needs {verb!r} from its language model, which {client.identity.endpoint} ({client.identity.model}) "
        f"does not offer (it offers: {', '.join(able) or 'nothing'}); choose another client or leave {user} out"
    )


def count_tokens(client: Client, text: str) -> int:
    """Tokens of ``text``; without a tokenizer, :func:`rough_tokens`."""
    if client.tokenizer is None:
        return rough_tokens(text)
    return len(client.tokenizer.encode(text, add_special_tokens=False))


def expected_usage(client: Client, request: Request) -> Usage:
    """Upper estimate of what a request will use, for budgets and estimates."""
    size = lambda text: count_tokens(client, text) if isinstance(text, str) else len(text)  # noqa: E731
    match request:
        case GenerateRequest():
            prompt, output = sum(size(m.content) + 4 for m in request.messages), request.max_tokens
        case NextTokenRequest():
            prompt, output = sum(size(m.content) + 4 for m in request.messages), 1
        case ContinuationRequest():
            prompt, output = size(request.prompt) + sum(size(c) for c in request.continuations), 0
        case SlotRequest():
            prompt, output = len(request.ids), 0
    return Usage(prompt_tokens=prompt, output_tokens=output)


def expected_tokens(client: Client, request: Request) -> int:
    """Prompt and output together of :func:`expected_usage`."""
    return expected_usage(client, request).total_tokens


def recalled(kind: type[R], stored: Mapping[str, Any]) -> R | Failure:
    """What the reply cache holds as the answer it was."""
    if "failure" not in stored:
        return from_dict(kind, stored)
    usage = from_dict(Usage, stored["usage"]) if "usage" in stored else Usage()
    return PaidFailure(**stored["failure"], usage=usage)


def stored_form(answer: AnyReply | Failure) -> dict[str, Any]:
    """What the reply cache is to hold of an answer; :func:`recalled` undoes it."""
    if not isinstance(answer, Failure):
        return to_dict(answer)
    if not isinstance(answer, PaidFailure):
        return {"failure": to_dict(answer)}
    return {"failure": to_dict(answer.plain()), "usage": to_dict(answer.usage)}


def _checked(answer: Any) -> Any:
    """A log-probability that is no number (a broken model, half precision) is a failure: no file can hold it."""
    if isinstance(answer, LogprobReply):
        values = [v for row in (*answer.rows, answer.sums) for v in row if v is not None]
        if not all(map(math.isfinite, values)):
            return Failure(code="schema", stage="logprobs", detail="log-probabilities that are not finite")
    return answer


def _shifted(on_reply: OnReply, start: int) -> OnReply:
    return lambda i, answer: on_reply(start + i, answer)


class CachedClient:
    """A client with a memory, a ledger and a budget.

    ``max_tokens`` bounds prompt + output tokens that this object lets be sent, ``max_cost_usd`` what they cost. Every
    request is reserved at its upper estimate first; what does not fit is not sent, what was sent is stored, then
    :class:`BudgetExceeded` is raised, so the same command with a larger budget goes on from there. Of the failures
    those are stored that were an answer (a refusal, an empty one); what got no answer is asked again by the next run.
    """

    def __init__(
        self,
        backend: Client,
        cache: ReplyCache | None = None,
        *,
        ledger: Ledger | None = None,
        max_tokens: int | None = None,
        max_cost_usd: float | None = None,
    ) -> None:
        self.backend, self.cache = backend, cache
        self.ledger = ledger if ledger is not None else Ledger()
        self.price = self.ledger.prices.get(backend.identity.model)
        self.identity, self.capabilities, self.tokenizer = backend.identity, backend.capabilities, backend.tokenizer
        self.allow(max_tokens, max_cost_usd)
        if cache is not None:
            cache.remember(to_dict(backend.identity))

    def allow(self, max_tokens: int | None, max_cost_usd: float | None) -> None:
        """A new budget, of which nothing is spent."""
        if max_cost_usd is not None and self.price is None:
            raise ConfigError(
                f"a cost limit needs the price of {self.identity.model!r}: give a table (--prices FILE; in run_all "
                '--interp.prices FILE), {"model": {"prompt": 1.0, "cached": 0.5, "output": 4.0}} in US dollars per '
                "million tokens"
            )
        self.max_tokens, self.max_cost_usd = max_tokens, max_cost_usd
        self.spent_tokens, self.spent_usd = 0, 0.0

    def generate(self, requests: Sequence[GenerateRequest], on_reply: OnReply | None = None) -> list[Reply | Failure]:
        """See :class:`Client`; only what the cache lacks is sent."""
        check_capability(self, "generate", "this run") if requests else None
        return self._answer(requests, self.backend.generate, Reply, on_reply)

    def logprobs(
        self, requests: Sequence[LogprobRequest], on_reply: OnReply | None = None
    ) -> list[LogprobReply | Failure]:
        """See :class:`Client`; only what the cache lacks is sent."""
        for verb in sorted({r.verb for r in requests}):
            check_capability(self, verb, "this run")
        return self._answer(requests, self.backend.logprobs, LogprobReply, on_reply)

    def close(self) -> None:
        """Commit the cache."""
        if self.cache is not None:
            self.cache.close()

    def _answer(
        self, requests: Sequence[Any], send: Callable[..., Any], kind: type[R], on_reply: OnReply | None
    ) -> list[R | Failure]:
        if self.capabilities.local and len(requests) > LOCAL_BLOCK_REQUESTS:
            out: list[R | Failure] = []
            for start in range(0, len(requests), LOCAL_BLOCK_REQUESTS):
                offset = None if on_reply is None else _shifted(on_reply, start)
                out += self._answer(requests[start : start + LOCAL_BLOCK_REQUESTS], send, kind, offset)
            return out
        keys = [request_key(self.identity, r) for r in requests]
        answers: dict[str, Any] = {}
        stored = self.cache.get_many(keys) if self.cache is not None else {}
        for key, value in stored.items():
            answers[key] = recalled(kind, value)
        missing = {k: r for k, r in zip(keys, requests, strict=True) if k not in answers}  # equal requests: sent once
        try:
            if missing:
                self._send(missing, send, answers)
        finally:  # what was paid for is counted, whatever stopped the rest
            for key, request in zip(keys, requests, strict=True):
                if key in answers:
                    sent = key in missing and missing[key] is request
                    self.ledger.add(self.identity.model, request.origin, answers[key], sent=sent)
        out = []
        for i, key in enumerate(keys):
            answer = answers[key].plain() if isinstance(answers[key], PaidFailure) else answers[key]
            if on_reply is not None:
                on_reply(i, answer)
            out.append(answer)
        return out

    def _send(self, missing: dict[str, Any], send: Callable[..., Any], answers: dict[str, Any]) -> None:
        """Fill ``answers`` for all ``missing`` keys, in as many rounds as the budget makes of them."""
        waiting = list(missing)
        stage = missing[waiting[0]].origin.stage or missing[waiting[0]].verb
        with progress(f"LM: {stage}", total=len(waiting), unit="req") as bar:
            while waiting:
                round_keys = self._affordable(waiting, missing)
                if not round_keys:
                    raise BudgetExceeded(self._spent(len(waiting), stage))

                def keep(i: int, answer: Any, keys: list[str] = round_keys) -> None:
                    answers[keys[i]] = answer = _checked(answer)
                    bar.advance()
                    if isinstance(answer, Failure) and answer.code not in ANSWER_CODES:
                        if answer.code == "pending":  # written to a batch: it will be paid for
                            self._spend(expected_usage(self, missing[keys[i]]))
                        return
                    self._spend(getattr(answer, "usage", Usage()))
                    if self.cache is not None:
                        self.cache.put(keys[i], stored_form(answer), request=request_dict(missing[keys[i]]))

                with self.cache.batch(atomic=self.capabilities.local) if self.cache is not None else nullcontext():
                    replies = send([missing[k] for k in round_keys], on_reply=keep)
                    for i, answer in enumerate(replies):
                        if round_keys[i] not in answers:  # a back-end without on_reply
                            keep(i, answer)
                waiting = [k for k in waiting if k not in answers]

    def _spend(self, usage: Usage) -> None:
        self.spent_tokens += usage.total_tokens
        self.spent_usd += self.price.of(usage) if self.price else 0.0

    def _affordable(self, waiting: list[str], requests: Mapping[str, Any]) -> list[str]:
        if self.max_tokens is None and self.max_cost_usd is None:
            return waiting
        tokens = (math.inf if self.max_tokens is None else self.max_tokens) - self.spent_tokens
        usd = (math.inf if self.max_cost_usd is None else self.max_cost_usd) - self.spent_usd
        taken = []
        for key in waiting:
            expected = expected_usage(self, requests[key])
            tokens -= expected.total_tokens
            usd -= self.price.of(expected) if self.price else 0.0
            if tokens < 0 or usd < 0:
                break
            taken.append(key)
        return taken

    def _spent(self, n_waiting: int, stage: str) -> str:
        """What to say when nothing more is affordable."""
        limits = []
        if self.max_tokens is not None:
            limits.append((f"{self.max_tokens:,} LLM tokens", f"{self.spent_tokens:,} used", "--max-llm-tokens"))
        if self.max_cost_usd is not None:
            limits.append((f"{self.max_cost_usd:g} US dollars", f"{self.spent_usd:.4f} spent", "--max-cost-usd"))
        most, used, options = (" or ".join(part) for part in zip(*limits, strict=True))
        return (
            f"the budget of {most} is spent ({used}, {n_waiting:,} requests of {stage!r} not sent); replies so far "
            f"are stored: run the same command with a larger {options} to go on"
        )


def open_client(
    name: str,
    *,
    replies: Path | None = None,
    known: Path | None = None,
    max_tokens: int | None = None,
    max_cost_usd: float | None = None,
    ledger: Ledger | None = None,
    keep_requests: bool = False,
    backend: Client | None = None,
    **options: Any,
) -> CachedClient:
    """The client ``autointerp/clients/<name>.py`` with ``options``, or ``backend``, one that is open, behind the reply
    cache file ``replies`` (``results/replies.sqlite``; None = no cache); ``known``: see :class:`ReplyCache`."""
    from sae.plugins import find

    if backend is None:
        plugin = find("autointerp.clients", name)
        if name == "replay":
            require(replies is not None, "the replay client needs the file of replies to answer from")
            options["replies"] = replies
        backend = plugin(**options)
    cache = ReplyCache(replies, keep_requests=keep_requests, known=known) if replies is not None else None
    return CachedClient(backend, cache, ledger=ledger, max_tokens=max_tokens, max_cost_usd=max_cost_usd)
