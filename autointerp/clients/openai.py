"""Any server with OpenAI's chat API: OpenAI itself, vLLM, llama.cpp, a gateway. The key comes from the environment.

Own retries (the SDK's are off): full jitter, ``Retry-After`` honoured, one adaptive limit on requests in flight. Every
request ends as a reply or as a typed failure; a refused key, an unknown model, an empty account and a dead server stop
the run with one error once the replies in flight have been handed over. Importing this file imports no SDK.
"""

import asyncio
import os
import re
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack, nullcontext
from typing import Any

from autointerp.client import (
    Capabilities,
    GenerateRequest,
    Identity,
    LogprobReply,
    LogprobRequest,
    Message,
    OnReply,
    Reply,
    check_capability,
)
from autointerp.openai_wire import Structured, chat_body, parse_chat
from autointerp.records import Failure
from autointerp.retries import (
    CONNECTIONS_PER_LINE,
    KEY_VARIABLE,
    Gate,
    Lines,
    Retries,
    Retry,
    check_base_url,
    retry_after_s,
    run_to_end,
    scrub,
)
from sae.config import require
from sae.errors import BudgetExceeded, ConfigError, MissingExtra, SaescopeError
from sae.manifest import rng

RETRIED_STATUS = frozenset({408, 409, 425, 429})
DEAD_AFTER_ATTEMPTS = 48
"""After so many attempts in a row without any answer, of whatever requests, the server is asked a trivial question."""
CANARY = GenerateRequest(messages=(Message(role="user", content="Answer with the word yes."),), max_tokens=8)
MAX_WARMUP_TEXTS = 8
TOO_LONG = re.compile(
    r"context.{0,3}(length|size|window)|maximum context|too long|longer than|too many tokens|"
    r"exceeds? the (maximum|available|limit)|must be (<=|less than)|greater than max_model_len",
    re.IGNORECASE,
)
"""How servers say that a prompt is too long: OpenAI, vLLM, llama.cpp, SGLang, TGI, gateways."""
_WEAKER: dict[Structured, Structured] = {"json_schema": "json_object", "json_object": "parse"}


class OpenAIClient:
    """``OpenAIClient(model="...", base_url="http://127.0.0.1:8000/v1")``."""

    def __init__(
        self,
        *,
        model: str | None = None,
        base_url: str | None = None,
        revision: str = "",
        concurrency: int = 32,
        timeout_s: float = 120.0,
        retries: Retries | None = None,
        structured: Structured = "json_schema",
        next_token: bool = False,
        reasoning: bool = False,
        context_tokens: int | None = None,
    ) -> None:
        """``next_token``: the server returns top log-probabilities; ``reasoning``: the model takes
        ``max_completion_tokens`` and no temperature. ``structured`` is lowered by itself where the server refuses it.

        Raises :class:`MissingExtra` without the SDK and :class:`ConfigError` without a model, or without a key for
        OpenAI itself; a server of one's own (``base_url``) needs no key.
        """
        try:
            import openai
        except ImportError:
            raise MissingExtra("openai", "openai") from None
        if not model:
            raise ConfigError("the openai client needs the name of a model; add --llm NAME (of run_all: --interp.llm)")
        check_base_url(base_url)
        require(concurrency >= 1 and timeout_s > 0, "--concurrency and --timeout-s must be positive")
        if not base_url and not os.environ.get("OPENAI_BASE_URL") and not os.environ.get(KEY_VARIABLE):
            raise ConfigError(f"set {KEY_VARIABLE} to your key, or give --base-url of a server that needs none")
        self._sdk, self.base_url = openai, base_url
        self.concurrency, self.timeout_s, self.retries = concurrency, timeout_s, retries or Retries()
        self.structured, self.reasoning = structured, reasoning
        self.tokenizer: Any = None
        self.identity = Identity(endpoint="openai", model=model, revision=revision)
        self.capabilities = Capabilities(next_token=next_token, structured=structured, context_tokens=context_tokens)
        self._fatal: SaescopeError | None = None
        self._unanswered = 0
        self._deaf = False
        """Whether no connection could be made in the whole last call: then one attempt a request is enough."""
        self._probing, self._open = asyncio.Lock(), asyncio.Event()
        """Held while the server is asked whether it is alive; set while requests may go out."""

    def generate(self, requests: Sequence[GenerateRequest], on_reply: OnReply | None = None) -> list[Reply | Failure]:
        """See :class:`autointerp.client.Client`."""
        return run_to_end(self._all(requests, on_reply))

    def logprobs(
        self, requests: Sequence[LogprobRequest], on_reply: OnReply | None = None
    ) -> list[LogprobReply | Failure]:
        """First-token log-probabilities only, from the server's top 20; what is not among them is None."""
        for verb in sorted({r.verb for r in requests}):
            check_capability(self, verb, "this run")
        return run_to_end(self._all(requests, on_reply))

    async def _all(self, requests: Sequence[Any], on_reply: OnReply | None) -> list[Any]:
        self._fatal, self._unanswered = None, 0
        self._probing, self._open = asyncio.Lock(), asyncio.Event()
        self._open.set()
        answers: dict[int, Any] = {}
        gate = Gate(self.concurrency, self.retries.first_delay_s)
        key = os.environ.get(KEY_VARIABLE) or "none"
        options: dict[str, Any] = {"api_key": key, "base_url": self.base_url, "timeout": self.timeout_s}
        options["max_retries"] = 0
        async with AsyncExitStack() as stack:
            opened = [self._sdk.AsyncOpenAI(http_client=one, **options) for one in self._http_clients(len(requests))]
            sdk = Lines([await stack.enter_async_context(one) for one in opened])

            async def one(i: int) -> None:
                answer = await self._insist(sdk, gate, requests[i], i)
                if answer is not None:
                    answers[i] = answer
                    if on_reply is not None:
                        on_reply(i, answer)

            # The first request of each fixed text goes ahead, so that the server's prefix cache is warm for the rest.
            first = {r.messages[0].content: i for i, r in reversed(list(enumerate(requests)))}
            ahead = sorted(first.values()) if len(first) <= MAX_WARMUP_TEXTS < len(requests) else []
            await asyncio.gather(*(one(i) for i in ahead))
            await asyncio.gather(*(one(i) for i in range(len(requests)) if i not in answers))
        if self._fatal is not None:
            raise self._fatal
        self._deaf = bool(requests) and all(isinstance(a, Failure) and a.code == "connection" for a in answers.values())
        return [answers[i] for i in range(len(requests))]

    def _http_clients(self, n_requests: int) -> list[Any]:
        """One per line of a plain-text server, which needs no certificates (20 ms of loading them for each); None, the
        SDK's own, for an encrypted one."""
        url = self.base_url or os.environ.get("OPENAI_BASE_URL") or ""
        if not url.lower().startswith("http://"):
            return [None]
        n_lines = -(-min(self.concurrency, max(1, n_requests)) // CONNECTIONS_PER_LINE)
        return [self._sdk.DefaultAsyncHttpxClient(verify=False) for _ in range(n_lines)]

    async def _insist(self, sdk: Any, gate: Gate, request: Any, index: int) -> Any:
        """Reply or failure; None once the run is to stop."""
        try:
            return await self._tries(sdk, gate, request, index)
        except SaescopeError as error:
            self._fatal = self._fatal or error
            return None
        except Retry as error:
            return Failure(code=error.code, stage=request.verb, detail=f"{error.attempts} attempts: {error}")

    async def _tries(self, sdk: Any, gate: Gate, request: Any, index: int) -> Any:
        """Reply or failure; None once the run is to stop. Raises the last :class:`Retry` where all attempts failed,
        and :class:`SaescopeError` where going on is pointless."""
        insisted_s = 0.0  # waiting for a place not counted: all are there from the beginning, and most wait long
        for attempt in range(self.retries.attempts):
            try:
                # The canary needs no place: the others keep theirs while they wait for its answer.
                async with nullcontext() if request is CANARY else gate:
                    if request is not CANARY:
                        await self._open.wait()
                    if self._fatal is not None:
                        return None
                    began = time.monotonic()
                    try:
                        answer = await self._once(sdk, request)
                    finally:
                        insisted_s += time.monotonic() - began
                gate.success()
                self._unanswered, self._deaf = 0, False
                return answer
            except Retry as error:
                if error.code == "rate_limited":
                    gate.too_fast()
                if request is not CANARY:
                    self._unanswered += 1
                    if self._unanswered >= DEAD_AFTER_ATTEMPTS:
                        await self._see_whether_dead(sdk, gate, error)
                wait_s = self._wait_s(index, attempt, error.after_s)
                insisted_s += wait_s
                last = self._deaf or attempt == self.retries.attempts - 1
                if last or insisted_s > self.retries.total_s:
                    error.attempts = attempt + 1
                    raise
            await asyncio.sleep(wait_s)
        return None

    async def _see_whether_dead(self, sdk: Any, gate: Gate, trouble: Retry) -> None:
        """Stop the run if not even a trivial question gets an answer; else those requests were bad by themselves.

        A resumed run may hold nothing but such requests, and must come to its end.
        """
        async with self._probing:
            if self._unanswered < DEAD_AFTER_ATTEMPTS or self._fatal is not None:
                return  # another request has found out
            said, n = f"{trouble.code}, {trouble}", self._unanswered
            self._open.clear()
            try:
                await self._tries(sdk, gate, CANARY, -1)
            except SaescopeError as error:
                self._fatal = self._fatal or error
            except Retry:
                self._fatal = self._fatal or SaescopeError(
                    f"the server at {self._host(sdk)} gave no usable answer {n} times in a row "
                    f"(the last: {said}); see that it runs, then run the same command again"
                )
            finally:
                self._open.set()

    def _wait_s(self, index: int, attempt: int, after_s: float | None) -> float:
        ceiling = min(self.retries.max_delay_s, self.retries.first_delay_s * 2**attempt)
        jitter = float(rng("retry", os.getpid(), index, attempt).random()) * ceiling
        return jitter if after_s is None else after_s + min(jitter, self.retries.first_delay_s)

    async def _once(self, sdk: Any, request: Any) -> Any:
        """One HTTP request, repeated only where the server does not know an optional field."""
        while True:
            structured, reasoning = self.structured, self.reasoning
            body = chat_body(request, self.identity.model, self.structured, self.reasoning)
            started = time.perf_counter()
            try:
                # As text: the SDK's checks of types cost more than all else that the client does for a request.
                text = await sdk.post("/chat/completions", cast_to=str, body=body)
            except self._sdk.APITimeoutError:
                raise Retry("timeout", f"no answer within {self.timeout_s:g} s") from None
            except self._sdk.APIConnectionError as error:
                raise Retry("connection", scrub(error.__cause__ or error)) from None
            except self._sdk.APIStatusError as error:
                if self._adapt(error, request, structured, reasoning):
                    continue
                return self._refused(sdk, error, request)
            latency_ms = 1000 * (time.perf_counter() - started)
            return parse_chat(text, request, round(latency_ms, 1))

    def _adapt(self, error: Any, request: Any, structured: Structured, reasoning: bool) -> bool:
        """Drop an optional field that this server refuses; True if the request is to be sent again.

        ``structured`` and ``reasoning`` are what the refused body was made with; another request may have learnt since.
        """
        if error.status_code not in (400, 422):
            return False
        if (structured, reasoning) != (self.structured, self.reasoning):
            return True
        said = error.response.text.lower()
        if TOO_LONG.search(said):  # vLLM has named both limits when a prompt was too long for either
            return False
        if not self.reasoning and "max_completion_tokens" in said and "max_tokens" in said:
            self.reasoning = True
            return True
        names_format = any(word in said for word in ("response_format", "json_schema", "json_object", "schema"))
        if names_format and getattr(request, "schema", None) is not None and self.structured in _WEAKER:
            self.structured = _WEAKER[self.structured]
            return True
        return False

    def _refused(self, sdk: Any, error: Any, request: Any) -> Failure:
        """A status that is not 2xx: raises to retry or to stop, or is this request's own failure."""
        status, said = error.status_code, scrub(error.response.text)
        model, host = self.identity.model, self._host(sdk)
        if status == 402 or "insufficient_quota" in said:
            raise BudgetExceeded(
                f"the account at {host} has no credit left for {model} ({said}); add credit, run again"
            )
        if status in (401, 403):
            raise ConfigError(f"{host} refused the key for {model} (status {status}: {said}); check {KEY_VARIABLE}")
        if status == 404:
            raise ConfigError(
                f"{host} has no model {model!r}, or no chat API under this URL (status 404: {said}); "
                "check --llm and --base-url (it normally ends in /v1)"
            )
        if status in RETRIED_STATUS or status >= 500:
            code = "rate_limited" if status == 429 else "timeout" if status == 408 else "server_error"
            raise Retry(code, f"status {status}: {said}", retry_after_s(error.response.headers))
        code = "unsupported"
        if TOO_LONG.search(said) or status == 413:
            code = "prompt_too_long"
        elif "content_filter" in said or "content_policy" in said:
            code = "refusal"
        return Failure(code=code, stage=request.verb, detail=f"status {status}: {said}")

    @staticmethod
    def _host(sdk: Any) -> str:
        """The server's name without any credentials in its URL."""
        url = sdk.base_url
        return f"{url.scheme}://{url.host}" + (f":{url.port}" if url.port else "") + str(url.path)


PLUGIN = OpenAIClient
