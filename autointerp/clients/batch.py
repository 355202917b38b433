"""Writes requests to files for OpenAI's Batch API instead of sending them; see :mod:`autointerp.batch_files`.

Every request ends as the failure ``pending``, so that a run goes as far as it can and collects all that it can ask:
one round for the explanations, one for the scores. Its identity, hence its keys, are those of the ``openai`` client.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from autointerp.batch_files import write_requests
from autointerp.client import (
    Capabilities,
    GenerateRequest,
    Identity,
    LogprobReply,
    LogprobRequest,
    OnReply,
    Reply,
    check_capability,
    request_key,
)
from autointerp.openai_wire import Structured
from autointerp.records import Failure
from sae.errors import ConfigError


class BatchClient:
    """``BatchClient(model="...", folder="results/batch")``."""

    def __init__(
        self,
        *,
        folder: str | Path,
        model: str | None = None,
        revision: str = "",
        structured: Structured = "json_schema",
        reasoning: bool = False,
    ) -> None:
        """Options as for the ``openai`` client. :class:`ConfigError` without a model."""
        if not model:
            raise ConfigError("the batch client needs the name of a model; add --llm NAME (of run_all: --interp.llm)")
        self.folder, self.structured, self.reasoning = Path(folder), structured, reasoning
        self.tokenizer: Any = None
        self.identity = Identity(endpoint="openai", model=model, revision=revision)
        self.capabilities = Capabilities(structured=structured)
        self._pending: dict[str, GenerateRequest] = {}

    def generate(self, requests: Sequence[GenerateRequest], on_reply: OnReply | None = None) -> list[Reply | Failure]:
        """Adds the requests to the files; each is answered by the failure ``pending``."""
        if requests:
            self._pending |= {request_key(self.identity, r): r for r in requests}
            model, how = self.identity.model, (self.structured, self.reasoning)
            paths = write_requests(self.folder, self._pending, model, *how)
        said = f"in {self.folder}/*.jsonl" if not requests or len(paths) > 1 else f"in {paths[0]}"
        detail = f"waits {said}: send it as a batch, then python -m autointerp batch-read OUTPUT.jsonl"
        answers: list[Reply | Failure] = [
            Failure(code="pending", stage=request.verb, detail=detail) for request in requests
        ]
        for i, answer in enumerate(answers):
            if on_reply is not None:
                on_reply(i, answer)
        return answers

    def logprobs(
        self, requests: Sequence[LogprobRequest], on_reply: OnReply | None = None
    ) -> list[LogprobReply | Failure]:
        """:class:`Unsupported`: a batch carries texts only here."""
        for verb in sorted({r.verb for r in requests}):
            check_capability(self, verb, "this run")
        return []


PLUGIN = BatchClient
