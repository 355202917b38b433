"""What a language model is asked and what it answers: requests, replies and the key of a request. Torch-free.

All log-probabilities are natural (nats).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from autointerp.records import Failure
from sae.config import require, to_dict
from sae.manifest import canonical_json, sha256_text

REQUEST_SCHEMA_VERSION = 1
LOGPROB_DECIMALS = 6
"""Back-ends round log-probabilities to this many decimals: replies stay small, and a cached one equals a fresh one."""

Verb = Literal["generate", "next_token", "continuation", "slots"]
Text = str | tuple[int, ...]
"""A text, or the token ids of the client's own tokenizer."""


@dataclass(frozen=True, kw_only=True)
class Message:
    """One turn of a chat."""

    role: Literal["system", "user", "assistant"]
    content: str


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Whom a request is made for: a line of the ledger, never part of the request key."""

    stage: str = ""
    """explain, score.detection, judge_check, ..."""
    sae_id: str = ""
    latent: int | None = None


@dataclass(frozen=True, kw_only=True)
class GenerateRequest:
    """Write a reply to a chat."""

    messages: tuple[Message, ...]
    max_tokens: int
    """At most this many new tokens."""
    temperature: float = 0.0
    """0 = greedy."""
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    schema: Mapping[str, Any] | None = None
    """JSON schema of the reply: type, properties, required, items, enum, additionalProperties only; ranges and lengths
    are checked by the parser (AUTOINTERP 6)."""
    attempt: int = 0
    """Rises once after a reply that did not parse, so that a deterministic bad reply is not fetched for ever."""
    origin: Origin = field(default=Origin(), compare=False)

    def __post_init__(self) -> None:
        require(len(self.messages) > 0, "a GenerateRequest needs at least one message")
        require(self.max_tokens >= 1, f"max_tokens must be positive, got {self.max_tokens}")
        require(self.temperature >= 0, f"temperature must not be negative, got {self.temperature}")

    @property
    def verb(self) -> Verb:
        return "generate"


@dataclass(frozen=True, kw_only=True)
class NextTokenRequest:
    """Log-probability of each of ``choices`` as the first token of the assistant's reply."""

    messages: tuple[Message, ...]
    choices: tuple[str, ...]
    """Each must be one token for a local model; a choice the model cannot spell so, or that a server does not list,
    comes back as None."""
    origin: Origin = field(default=Origin(), compare=False)

    @property
    def verb(self) -> Verb:
        return "next_token"


@dataclass(frozen=True, kw_only=True)
class ContinuationRequest:
    """log P(continuation | prompt) of each continuation after one prompt; the two are tokenized apart.

    Cheap for many continuations of one prompt: the prompt is read once, continuations share their beginnings.
    """

    prompt: Text
    """Plain text or token ids; no chat template. An empty prompt is the tokenizer's BOS (or EOS) alone."""
    continuations: tuple[Text, ...]
    """A text normally starts with the space that joins it to the prompt."""
    origin: Origin = field(default=Origin(), compare=False)

    def __post_init__(self) -> None:
        require(len(self.continuations) > 0, "a ContinuationRequest needs at least one continuation")
        require(all(len(c) > 0 for c in self.continuations), "a ContinuationRequest holds an empty continuation")

    @property
    def verb(self) -> Verb:
        return "continuation"


@dataclass(frozen=True, kw_only=True)
class SlotRequest:
    """At each of some positions of a token sequence, the log-probabilities of some ids as the next token."""

    ids: tuple[int, ...]
    """The whole sequence, token ids of the client's tokenizer."""
    positions: tuple[int, ...]
    """Indices into ``ids``; the distribution read is that of the token after the position."""
    token_ids: tuple[int, ...]
    """The ids whose log-probabilities are wanted."""
    origin: Origin = field(default=Origin(), compare=False)

    def __post_init__(self) -> None:
        require(all(0 <= p < len(self.ids) for p in self.positions), "a SlotRequest has a position outside its ids")
        require(len(self.token_ids) > 0, "a SlotRequest needs at least one token id")

    @property
    def verb(self) -> Verb:
        return "slots"


LogprobRequest = NextTokenRequest | ContinuationRequest | SlotRequest
Request = GenerateRequest | LogprobRequest


@dataclass(frozen=True, kw_only=True)
class Usage:
    """Tokens that a reply cost."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    """Part of the prompt that the engine did not have to read again."""
    output_tokens: int = 0
    latency_ms: float | None = None

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.output_tokens


@dataclass(frozen=True, kw_only=True)
class Reply:
    """A written answer. Whether it makes sense is the parser's business (``autointerp/replies.py``)."""

    text: str
    finish_reason: Literal["stop", "length"] = "stop"
    usage: Usage = Usage()


@dataclass(frozen=True, kw_only=True)
class LogprobReply:
    """Log-probabilities in nats."""

    rows: tuple[tuple[float | None, ...], ...] = ()
    """next_token: one row, one value per choice. slots: one row per position, one value per id."""
    sums: tuple[float, ...] = ()
    """continuation: log P of each whole continuation."""
    counts: tuple[int, ...] = ()
    """continuation: tokens of each continuation."""
    usage: Usage = Usage()

    def __post_init__(self) -> None:
        # JSON gives lists; a reply read back equals the one that was stored.
        object.__setattr__(self, "rows", tuple(tuple(row) for row in self.rows))

    @property
    def means(self) -> tuple[float, ...]:
        """continuation: log P per token."""
        return tuple(s / n for s, n in zip(self.sums, self.counts, strict=True))


@dataclass(frozen=True, kw_only=True)
class PaidFailure(Failure):
    """An answer that was paid for and holds nothing to read. Between a back-end and the ledger; callers get the
    plain failure."""

    usage: Usage = Usage()

    def plain(self) -> Failure:
        """Without the price."""
        return Failure(code=self.code, stage=self.stage, detail=self.detail, request_key=self.request_key)


AnyReply = Reply | LogprobReply


@dataclass(frozen=True, kw_only=True)
class Identity:
    """Which model answers: part of every request key."""

    endpoint: str
    """Kind of engine, e.g. "openai" or "transformers/float32"; never a URL or a key."""
    model: str
    revision: str = ""


def rough_tokens(text: str) -> int:
    """UTF-8 bytes / 3, rounded up: above what tokenizers make of English, about what they make of other scripts."""
    return -(-len(text.encode("utf-8", "surrogatepass")) // 3)


def request_dict(request: Request) -> dict[str, Any]:
    """Everything that decides the answer; the origin stays out."""
    return {f.name: getattr(request, f.name) for f in fields(request) if f.name != "origin"}


def request_key(identity: Identity, request: Request) -> str:
    """SHA-256 (64 hex digits) of the canonical request: model, verb, content, sampling, seed, attempt. URL, key,
    retries, timeouts and concurrency stay out, so they may change without losing a reply."""
    content = [REQUEST_SCHEMA_VERSION, request.verb, to_dict(identity), request_dict(request)]
    return sha256_text(canonical_json(content))
