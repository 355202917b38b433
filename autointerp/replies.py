"""From replies to values: strict reading of JSON answers, one second try, typed failures. Torch-free.

A reply that cannot be read is never guessed at: it becomes a :class:`Failure` whose code says why.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

from autointerp.client import Client, GenerateRequest, Message, Reply, Usage, request_key
from autointerp.records import Failure

T = TypeVar("T")
Parse = Callable[[int, Reply], T | Failure]
"""(index of the request, reply) -> value or failure."""

_FENCE = re.compile(r"```(?:json)?\s*\n(.*?)```", re.S)
_TYPES: dict[str, type | tuple[type, ...]] = {
    "object": dict, "array": list, "string": str, "integer": int, "number": (int, float), "boolean": bool,
}  # fmt: skip
SHOWN_CHARS = 120


@dataclass(frozen=True)
class Answer(Generic[T]):
    """What became of one request."""

    value: T | Failure
    usage: Usage
    """Tokens of all tries."""
    request_key: str
    """Of the last try."""


def ask(client: Client, requests: Sequence[GenerateRequest], parse: Parse[T], reminder: str) -> list[Answer[T]]:
    """Send, read, and send those that could not be read once more, with ``reminder`` appended and ``attempt = 1``.

    Transport failures are not repeated here (the client has done so). One answer per request, in order.
    """
    asked = list(requests)
    replies = client.generate(asked)
    values = [_read(i, r, parse) for i, r in enumerate(replies)]
    usages = [_usage(r) for r in replies]
    again = [i for i, r in enumerate(replies) if isinstance(r, Reply) and isinstance(values[i], Failure)]
    for i in again:
        asked[i] = _reminded(asked[i], reminder)
    for i, reply in zip(again, client.generate([asked[i] for i in again]) if again else [], strict=True):
        values[i] = _read(i, reply, parse)
        usages[i] = _added(usages[i], _usage(reply))
    keys = [request_key(client.identity, r) for r in asked]
    return [
        Answer(replace(v, request_key=k) if isinstance(v, Failure) else v, u, k)
        for v, u, k in zip(values, usages, keys, strict=True)
    ]


def _read(index: int, reply: Reply | Failure, parse: Parse[T]) -> T | Failure:
    if isinstance(reply, Failure):
        return reply
    if reply.finish_reason == "length":
        return Failure(code="truncated", stage="reply", detail=_shown(reply.text))
    return parse(index, reply)


def _reminded(request: GenerateRequest, reminder: str) -> GenerateRequest:
    *before, last = request.messages
    return replace(
        request,
        messages=(*before, Message(role=last.role, content=f"{last.content}\n\n{reminder}")),
        attempt=request.attempt + 1,
    )


def _usage(reply: Reply | Failure) -> Usage:
    return reply.usage if isinstance(reply, Reply) else Usage()


def _added(a: Usage, b: Usage) -> Usage:
    return Usage(
        prompt_tokens=a.prompt_tokens + b.prompt_tokens,
        cached_tokens=a.cached_tokens + b.cached_tokens,
        output_tokens=a.output_tokens + b.output_tokens,
    )


def json_object(text: str, schema: Mapping[str, Any]) -> dict[str, Any] | Failure:
    """The JSON object of a reply, checked against ``schema``.

    The whole text is read, else the last fenced block, else what lies between the first opening and the last closing
    brace; thoughts that a model writes before its answer (``<think>...</think>``) are left out. Failures: ``no_json``,
    ``schema``.
    """
    text = text.rpartition("</think>")[2]
    fenced = _FENCE.findall(text)
    first, last = text.find("{"), text.rfind("}")
    for candidate in (text, fenced[-1] if fenced else "", text[first : last + 1] if 0 <= first < last else ""):
        try:
            value = json.loads(candidate, object_pairs_hook=_no_duplicates)
        except (ValueError, RecursionError):
            continue
        problem = schema_problem(value, schema)
        if problem:
            return Failure(code="schema", stage="reply", detail=f"{problem}: {_shown(text)}")
        return dict(value)
    return Failure(code="no_json", stage="reply", detail=_shown(text))


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({name for name, _ in pairs}) < len(pairs):
        raise ValueError("a name occurs twice")
    return dict(pairs)


def schema_problem(value: Any, schema: Mapping[str, Any], where: str = "reply") -> str | None:
    """Why ``value`` breaks ``schema`` (the subset of :class:`GenerateRequest`), or None."""
    kind = schema.get("type")
    if kind is not None:
        right = isinstance(value, _TYPES[kind])
        if isinstance(value, bool) and kind != "boolean":  # Python's bool is an int, JSON's is not
            right = False
        if not right:
            return f"{where} is {type(value).__name__}, expected {kind}"
    if "enum" in schema and value not in schema["enum"]:
        return f"{where} is {value!r}, expected one of {schema['enum']}"
    if isinstance(value, dict):
        properties = schema.get("properties", {})
        for name in schema.get("required", ()):
            if name not in value:
                return f"{where} lacks {name!r}"
        if schema.get("additionalProperties") is False and (extra := sorted(set(value) - set(properties))):
            return f"{where} has unexpected {extra[0]!r}"
        problems = (schema_problem(v, properties[n], f"{where}.{n}") for n, v in value.items() if n in properties)
        return next((p for p in problems if p), None)
    if isinstance(value, list) and "items" in schema:
        problems = (schema_problem(v, schema["items"], f"{where}[{i}]") for i, v in enumerate(value))
        return next((p for p in problems if p), None)
    return None


def _shown(text: str) -> str:
    one_line = " ".join(text.split())
    return one_line if len(one_line) <= SHOWN_CHARS else one_line[:SHOWN_CHARS] + "..."
