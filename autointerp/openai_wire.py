"""OpenAI's chat format: from requests to bodies, from bodies to replies. Torch-free, no SDK."""

import json
import math
from typing import Any, Literal

from autointerp.llm_requests import LogprobReply, NextTokenRequest, PaidFailure, Reply, Usage, rough_tokens
from autointerp.records import Failure
from autointerp.retries import MAX_DETAIL_CHARS, Retry, scrub

TOP_LOGPROBS = 20
Structured = Literal["json_schema", "json_object", "parse"]


def chat_body(request: Any, model: str, structured: Structured, reasoning: bool) -> dict[str, Any]:
    """The JSON of a request to /chat/completions, with the optional fields that the server is known to take."""
    messages = [{"role": m.role, "content": whole_characters(m.content)} for m in request.messages]
    body: dict[str, Any] = {"model": model, "messages": messages}
    if isinstance(request, NextTokenRequest):
        return {**body, "max_tokens": 1, "temperature": 0, "logprobs": True, "top_logprobs": TOP_LOGPROBS}
    if reasoning:
        body["max_completion_tokens"] = request.max_tokens
    else:
        body |= {"max_tokens": request.max_tokens, "temperature": request.temperature}
        if request.temperature > 0:
            body |= {"seed": request.seed, "top_p": request.top_p}
        if request.stop:
            body["stop"] = list(request.stop)
    if request.schema is not None and structured == "json_schema":
        schema = {"name": "reply", "strict": True, "schema": dict(request.schema)}
        body["response_format"] = {"type": "json_schema", "json_schema": schema}
    elif request.schema is not None and structured == "json_object":
        body["response_format"] = {"type": "json_object"}
    return body


def parse_chat(text: str, request: Any, latency_ms: float | None) -> Any:
    """The body of a 2xx answer. A body that is no JSON was cut on its way and is fetched again."""
    try:
        data = json.loads(text)
    except ValueError:
        raise Retry("server_error", f"the body is not JSON: {scrub(text)}") from None
    try:
        if not data["choices"]:
            return Failure(code="empty", stage=request.verb, detail="no choices")
        choice = data["choices"][0]
        message, finish = choice["message"], choice.get("finish_reason")
        content = message.get("content") or ""
        usage = _usage(data.get("usage"), request, content, latency_ms)
        if isinstance(request, NextTokenRequest):
            return _top_logprobs(choice, request, usage)
        if message.get("refusal") or finish == "content_filter":
            detail = scrub(message.get("refusal") or finish)
            return PaidFailure(code="refusal", stage=request.verb, detail=detail, usage=usage)
        if not isinstance(content, str):
            raise TypeError("content is no text")
        if not content.strip():
            code = "truncated" if finish == "length" else "empty"
            return PaidFailure(code=code, stage=request.verb, detail="no text", usage=usage)
        reason: Literal["stop", "length"] = "length" if finish == "length" else "stop"
        return Reply(text=whole_characters(content), finish_reason=reason, usage=usage)
    except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
        detail = f"not a chat completion ({type(error).__name__}: {error}): {scrub(text)}"
        return Failure(code="schema", stage=request.verb, detail=detail[:MAX_DETAIL_CHARS])


def whole_characters(text: str) -> str:
    """Halves of a character (a cut emoji, ``"\\ud83d"`` in JSON) as U+FFFD: no request and no file can hold them."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _usage(counted: Any, request: Any, content: Any, latency_ms: float | None) -> Usage:
    """As the server counted; where it did not, an estimate, since nobody else would notice a budget that is spent."""
    if not counted:
        prompt = sum(rough_tokens(m.content) + 4 for m in request.messages)
        output = rough_tokens(content) if isinstance(content, str) else 0
        return Usage(prompt_tokens=prompt, output_tokens=output, latency_ms=latency_ms)
    details = counted.get("prompt_tokens_details") or {}
    return Usage(
        prompt_tokens=int(counted.get("prompt_tokens") or 0),
        cached_tokens=int(details.get("cached_tokens") or 0),
        output_tokens=int(counted.get("completion_tokens") or 0),
        latency_ms=latency_ms,
    )


def _log_sum(a: float, b: float) -> float:
    high, low = max(a, b), min(a, b)
    return min(0.0, high + math.log1p(math.exp(low - high)))


def _top_logprobs(choice: Any, request: NextTokenRequest, usage: Usage) -> LogprobReply | Failure:
    listed = ((choice.get("logprobs") or {}).get("content") or [{}])[0].get("top_logprobs") or []
    found: dict[str, float] = {}
    for entry in listed:
        token, value = entry["token"], float("nan") if entry["logprob"] is None else float(entry["logprob"])
        if math.isfinite(value):  # tokens that read alike, with and without a space before them, are one answer
            found[token] = _log_sum(found[token], value) if token in found else value
    if not found:
        return Failure(code="unsupported", stage=request.verb, detail="the server listed no log-probabilities")
    return LogprobReply(rows=(tuple(found.get(c) for c in request.choices),), usage=usage)
