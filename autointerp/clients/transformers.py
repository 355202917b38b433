"""A Hugging Face model in this process: the embedded default, no key, no server.

Log-probabilities are exact, over any ids, with shared beginnings read once (``autointerp/lm_scoring.py``).
Importing this file loads nothing; torch and the model come with construction.
"""

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

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
from sae.errors import Unsupported

if TYPE_CHECKING:
    from autointerp.lm_scoring import Query
    from sae.language_model import LanguageModel

GENERATE_BATCH_TOKENS = 16_384
"""Prompt + new tokens whose keys are held at a time."""
GENERATE_BATCH_ROWS = 32


class TransformersClient:
    """``TransformersClient(lm=...)`` around a loaded model, or ``TransformersClient(model="path or hub id")``."""

    def __init__(
        self,
        *,
        lm: "LanguageModel | None" = None,
        model: str | None = None,
        revision: str | None = None,
        dtype: str = "auto",
        device: str = "cpu",
        batch_tokens: int = 1024,
        pack_tokens: int = 256,
    ) -> None:
        from autointerp.lm_scoring import LocalScorer

        if lm is None:
            from sae.language_model import LanguageModel

            lm = LanguageModel.load(model or "default", revision=revision, dtype=dtype, device=device)
        self.lm, self.tokenizer = lm, lm.tokenizer
        self.scorer = LocalScorer(lm.model, batch_tokens=batch_tokens, pack_tokens=pack_tokens)
        limit = getattr(lm.model.config.get_text_config(), "max_position_embeddings", None)
        self.context_tokens = limit if isinstance(limit, int) and limit > 0 else None
        self.identity = Identity(
            endpoint=f"transformers/{str(lm.dtype).removeprefix('torch.')}", model=lm.name, revision=lm.revision or ""
        )
        self.capabilities = Capabilities(
            next_token=True, continuation=True, slots=True, local=True, context_tokens=self.context_tokens
        )

    def generate(self, requests: Sequence[GenerateRequest], on_reply: OnReply | None = None) -> list[Reply | Failure]:
        """Batches sorted by length; every request keeps its own sampling, length limit and stop texts."""
        from autointerp.lm_generation import Row, generate

        answers: dict[int, Reply | Failure] = {}
        rows: dict[int, Row] = {}
        for i, r in enumerate(requests):
            ids = self._chat_ids(r.messages)
            if failure := self._too_long(len(ids) + r.max_tokens, "generate"):
                answers[i] = failure
            else:
                rows[i] = Row(ids, r.max_tokens, r.temperature, r.top_p, r.seed, r.stop)
        _report(answers, on_reply)
        for batch in _generation_batches(rows):
            started = time.perf_counter()
            generate(self.lm.model, self.tokenizer, [rows[i] for i in batch])
            elapsed_ms = 1000 * (time.perf_counter() - started) / len(batch)
            new = {i: _reply(rows[i], elapsed_ms) for i in batch}
            _report(new, on_reply)
            answers |= new
        return [answers[i] for i in range(len(requests))]

    def logprobs(
        self, requests: Sequence[LogprobRequest], on_reply: OnReply | None = None
    ) -> list[LogprobReply | Failure]:
        """All requests are scored together, so that they share what they begin with."""
        answers: dict[int, LogprobReply | Failure] = {}
        jobs: list[tuple[list[int], list[Query]]] = []
        finish: list[tuple[int, Callable[[list[list[list[float]]]], LogprobReply]]] = []
        parts: list[list[int]] = []  # sequences of each planned request
        owner: list[int] = []  # planned request of each sequence
        for i, request in enumerate(requests):
            sequences, reply_of = self._plan(request)
            longest = max((len(ids) for ids, _ in sequences), default=0)
            if failure := self._too_long(longest, "logprobs"):
                answers[i] = failure
                continue
            parts.append(list(range(len(jobs), len(jobs) + len(sequences))))
            owner += [len(finish)] * len(sequences)
            finish.append((i, reply_of))
            jobs += sequences
        _report(answers, on_reply)
        done: dict[int, list[list[float]]] = {}
        left = [len(p) for p in parts]

        def on_done(sequence: int, values: list[list[float]]) -> None:
            done[sequence] = values
            planned = owner[sequence]
            left[planned] -= 1
            if left[planned] == 0:
                i, reply_of = finish[planned]
                answers[i] = reply_of([done.pop(s) for s in parts[planned]])
                _report({i: answers[i]}, on_reply)

        self.scorer.score(jobs, on_done)
        return [answers[i] for i in range(len(requests))]

    def _plan(
        self, request: LogprobRequest
    ) -> tuple[list[tuple[list[int], list["Query"]]], Callable[[list[list[list[float]]]], LogprobReply]]:
        """The token sequences of a request with what is asked along them, and how their answers become its reply."""
        from autointerp.lm_scoring import Query

        match request:
            case SlotRequest():
                ids = list(request.ids)
                queries = [Query(p, request.token_ids) for p in request.positions]
                usage = Usage(prompt_tokens=len(ids))
                return [(ids, queries)], lambda done: LogprobReply(rows=_rounded(done[0]), usage=usage)
            case NextTokenRequest():
                return self._plan_next_token(request)
            case ContinuationRequest():
                return self._plan_continuation(request)
        raise Unsupported(f"the transformers client cannot answer a {type(request).__name__}")

    def _plan_next_token(self, request: NextTokenRequest) -> Any:
        from autointerp.lm_scoring import Query

        ids = self._chat_ids(request.messages)
        spelled = [self.tokenizer.encode(c, add_special_tokens=False) for c in request.choices]
        single = tuple(s[0] for s in spelled if len(s) == 1)

        def reply_of(done: list[list[list[float]]]) -> LogprobReply:
            values = iter(_rounded(done[0])[0] if single else ())
            row = tuple(next(values) if len(s) == 1 else None for s in spelled)
            return LogprobReply(rows=(row,), usage=Usage(prompt_tokens=len(ids)))

        return [(ids, [Query(len(ids) - 1, single)] if single else [])], reply_of

    def _plan_continuation(self, request: ContinuationRequest) -> Any:
        from autointerp.lm_scoring import Query

        prompt = self._text_ids(request.prompt)
        ends = [
            list(c) if not isinstance(c, str) else self.tokenizer.encode(c, add_special_tokens=False)
            for c in request.continuations
        ]
        sequences = [
            (prompt + end, [Query(len(prompt) - 1 + k, (token,)) for k, token in enumerate(end)]) for end in ends
        ]

        def reply_of(done: list[list[list[float]]]) -> LogprobReply:
            sums = tuple(round(sum(v for row in rows for v in row), LOGPROB_DECIMALS) for rows in done)
            usage = Usage(prompt_tokens=len(prompt) + sum(map(len, ends)))
            return LogprobReply(sums=sums, counts=tuple(len(e) for e in ends), usage=usage)

        return sequences, reply_of

    def _text_ids(self, text: str | tuple[int, ...]) -> list[int]:
        """Ids of a plain prompt: text gets the model's usual first token, ids are taken as they are."""
        if not isinstance(text, str):
            return list(text) or [self._first_id()]
        return [self._first_id(), *self.tokenizer.encode(text, add_special_tokens=False)]

    def _first_id(self) -> int:
        from sae.tokens import prefix_id

        return int(prefix_id(self.tokenizer))

    def _chat_ids(self, messages: Sequence[Message]) -> list[int]:
        """The chat template with the opening of the answer; without a template, the contents as paragraphs."""
        if getattr(self.tokenizer, "chat_template", None):
            chat = [{"role": m.role, "content": m.content} for m in messages]
            text = self.tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
            return list(self.tokenizer.encode(text, add_special_tokens=False))
        return self._text_ids("\n\n".join(m.content for m in messages) + "\n\n")

    def _too_long(self, n_tokens: int, stage: str) -> Failure | None:
        if self.context_tokens is None or n_tokens <= self.context_tokens:
            return None
        detail = f"{n_tokens} tokens, the context of {self.identity.model} holds {self.context_tokens}"
        return Failure(code="prompt_too_long", stage=stage, detail=detail)


def _report(answers: Any, on_reply: OnReply | None) -> None:
    if on_reply is not None:
        for i, answer in answers.items():
            on_reply(i, answer)


def _rounded(rows: Sequence[Sequence[float]]) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(round(v, LOGPROB_DECIMALS) for v in row) for row in rows)


def _generation_batches(rows: Any) -> list[list[int]]:
    """Indices of neighbours in length, as many as the key-value memory holds."""
    order = sorted(rows, key=lambda i: (len(rows[i].prompt), rows[i].max_tokens, i))
    batches: list[list[int]] = []
    for i in order:
        longest = len(rows[i].prompt) + max(rows[j].max_tokens for j in [*(batches[-1] if batches else []), i])
        full = not batches or len(batches[-1]) >= GENERATE_BATCH_ROWS
        if full or (len(batches[-1]) + 1) * longest > GENERATE_BATCH_TOKENS:
            batches.append([])
        batches[-1].append(i)
    return batches


def _reply(row: Any, elapsed_ms: float) -> Reply | Failure:
    usage = Usage(prompt_tokens=len(row.prompt), output_tokens=len(row.new), latency_ms=round(elapsed_ms, 1))
    if not row.text.strip():
        return PaidFailure(code="empty", stage="generate", detail=f"{len(row.new)} tokens, no text", usage=usage)
    return Reply(text=row.text, finish_reason=row.finish_reason, usage=usage)


PLUGIN = TransformersClient
