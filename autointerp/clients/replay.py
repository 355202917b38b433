"""A client that only repeats what a reply cache holds, so a published run repeats with no key and no model.

It takes the identity of the model whose replies it repeats; a request that the cache lacks is an error, not a call.
"""

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from autointerp.client import (
    Capabilities,
    GenerateRequest,
    Identity,
    LogprobReply,
    LogprobRequest,
    OnReply,
    Reply,
    recalled,
    request_key,
)
from autointerp.records import Failure
from autointerp.reply_cache import ReplyCache
from sae.config import from_dict
from sae.errors import ArtefactError, ConfigError


class ReplayClient:
    """``ReplayClient(replies="results/replies.sqlite")``; ``model`` chooses among several models in one file."""

    def __init__(
        self,
        *,
        replies: str | Path,
        model: str | None = None,
        endpoint: str | None = None,
        revision: str | None = None,
        next_token: bool = False,
        tokenizer: Any = None,
        capabilities: Capabilities | None = None,
    ) -> None:
        """``tokenizer``: of the model, for simulators that build token ids; ``next_token``: as the recorded run's
        (openai), since what a judge asks hangs on it. Raises :class:`ConfigError` unless exactly one model of the file
        fits."""
        self.replies = ReplyCache(Path(replies), must_exist=True)
        wanted = {"model": model, "endpoint": endpoint, "revision": revision}
        known = [from_dict(Identity, i) for i in self.replies.identities()]
        fitting = [i for i in known if all(v is None or getattr(i, f) == v for f, v in wanted.items())]
        if len(fitting) != 1:
            listing = "; ".join(" ".join(str(getattr(i, f.name)) for f in fields(i)).strip() for i in known)
            raise ConfigError(
                f"{replies}: {len(fitting)} models fit, expected one (the file holds: {listing or 'none'}); "
                "name it with --llm"
            )
        self.identity, self.tokenizer = fitting[0], tokenizer
        local = self.identity.endpoint != "openai"
        self.capabilities = capabilities or Capabilities(
            next_token=next_token or local, continuation=local, slots=local, structured="json_schema"
        )

    def generate(self, requests: Sequence[GenerateRequest], on_reply: OnReply | None = None) -> list[Reply | Failure]:
        """Stored replies; :class:`ArtefactError` for the first request without one."""
        return self._repeat(requests, Reply, on_reply)

    def logprobs(
        self, requests: Sequence[LogprobRequest], on_reply: OnReply | None = None
    ) -> list[LogprobReply | Failure]:
        """Stored replies; :class:`ArtefactError` for the first request without one."""
        return self._repeat(requests, LogprobReply, on_reply)

    def _repeat(self, requests: Sequence[Any], kind: Any, on_reply: OnReply | None) -> list[Any]:
        keys = [request_key(self.identity, r) for r in requests]
        found = self.replies.get_many(keys)
        missing = [i for i, key in enumerate(keys) if key not in found]
        if missing:
            raise ArtefactError(
                f"{self.replies.path} holds no reply to {len(missing)} of {len(keys)} requests (the first is "
                f"{keys[missing[0]][:16]}..., stage {requests[missing[0]].origin.stage!r}); the prompts or the data "
                "differ from the recorded run: use the same commit and options, or a live client"
            )
        answers = [recalled(kind, found[key]) for key in keys]
        for i, answer in enumerate(answers):
            if on_reply is not None:
                on_reply(i, answer)
        return answers


PLUGIN = ReplayClient
