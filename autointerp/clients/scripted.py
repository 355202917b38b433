"""A client that answers from a function or a queue: tests, oracles, rehearsals without a model.

``ScriptedClient(answer)``: ``answer(request)`` gives a :class:`Reply`, :class:`LogprobReply`, :class:`Failure`, a text
(a reply that stopped by itself) or an exception to raise. ``ScriptedClient(queue=[...])`` gives them in turn.
"""

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from autointerp.client import (
    Capabilities,
    GenerateRequest,
    Identity,
    LogprobReply,
    LogprobRequest,
    OnReply,
    Reply,
    Request,
    Usage,
    count_tokens,
)
from autointerp.records import Failure
from sae.config import require

Answer = Reply | LogprobReply | Failure | str | Exception


class ScriptedClient:
    """See the module's head. ``sent`` lists every request that reached it, in order."""

    def __init__(
        self,
        answer: Callable[[Request], Answer] | None = None,
        *,
        queue: Iterable[Answer] | None = None,
        model: str = "scripted",
        revision: str = "",
        tokenizer: Any = None,
        capabilities: Capabilities | None = None,
    ) -> None:
        """``tokenizer``: for callers that build token ids; ``capabilities`` default to everything."""
        require((answer is None) != (queue is None), "a scripted client needs either `answer` or `queue`")
        self._queue = deque(queue or ())
        self._answer = answer if answer is not None else self._next
        self.tokenizer = tokenizer
        self.identity = Identity(endpoint="scripted", model=model, revision=revision)
        self.capabilities = capabilities or Capabilities(
            next_token=True, continuation=True, slots=True, structured="json_schema"
        )
        self.sent: list[Request] = []

    def generate(self, requests: Sequence[GenerateRequest], on_reply: OnReply | None = None) -> list[Reply | Failure]:
        """See :class:`autointerp.client.Client`."""
        return self._run(requests, on_reply)

    def logprobs(
        self, requests: Sequence[LogprobRequest], on_reply: OnReply | None = None
    ) -> list[LogprobReply | Failure]:
        """See :class:`autointerp.client.Client`."""
        return self._run(requests, on_reply)

    def _run(self, requests: Sequence[Any], on_reply: OnReply | None) -> list[Any]:
        answers = []
        for i, request in enumerate(requests):
            self.sent.append(request)
            answer = self._answer(request)
            if isinstance(answer, Exception):
                raise answer
            if isinstance(answer, str):
                answer = self._written(request, answer)
            if on_reply is not None:
                on_reply(i, answer)
            answers.append(answer)
        return answers

    def _written(self, request: GenerateRequest, text: str) -> Reply | Failure:
        if not text.strip():
            return Failure(code="empty", stage="generate")
        prompt_tokens = sum(count_tokens(self, m.content) for m in request.messages)
        return Reply(text=text, usage=Usage(prompt_tokens=prompt_tokens, output_tokens=count_tokens(self, text)))

    def _next(self, request: Request) -> Answer:
        if not self._queue:
            return Failure(code="connection", stage=request.verb, detail="the script has no answer left")
        return self._queue.popleft()


PLUGIN = ScriptedClient
