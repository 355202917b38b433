"""OpenAI's Batch API as files: requests out, replies in, at half the price and within a day. Torch-free, no SDK.

A request's ``custom_id`` is its key in the reply cache, so that an answered batch is nothing but hits for the ordinary
command, whoever made the file.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from autointerp.client import stored_form
from autointerp.llm_requests import GenerateRequest, Message
from autointerp.openai_wire import Structured, chat_body, parse_chat
from autointerp.records import ANSWER_CODES, Failure
from autointerp.reply_cache import ReplyCache
from autointerp.retries import Retry
from sae.errors import DataError

MAX_REQUESTS, MAX_BYTES = 50_000, 200_000_000
"""Of one file, by OpenAI's limits."""
URL = "/v1/chat/completions"
PREFIX = "requests-"
_KEY = re.compile(r"[0-9a-f]{64}")
_ANY = GenerateRequest(messages=(Message(role="user", content=""),), max_tokens=1)
"""Reading a reply takes no more of its request than that it asked for a text."""


def write_requests(
    folder: Path, requests: Mapping[str, GenerateRequest], model: str, structured: Structured, reasoning: bool
) -> list[Path]:
    """``requests-000.jsonl``, ... in ``folder`` in place of older ones; as many files as the limits ask for."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob(f"{PREFIX}*.jsonl"):
        old.unlink()
    paths = []
    for i, lines in enumerate(_parts(requests, model, structured, reasoning)):
        paths.append(folder / f"{PREFIX}{i:03d}.jsonl")
        paths[-1].write_bytes(b"".join(lines))
    return paths


def _parts(
    requests: Mapping[str, GenerateRequest], model: str, structured: Structured, reasoning: bool
) -> Iterator[list[bytes]]:
    part: list[bytes] = []
    size = 0
    for key in sorted(requests):
        body = chat_body(requests[key], model, structured, reasoning)
        entry = {"custom_id": key, "method": "POST", "url": URL, "body": body}
        line = (json.dumps(entry, ensure_ascii=True, sort_keys=True) + "\n").encode()
        if part and (len(part) == MAX_REQUESTS or size + len(line) > MAX_BYTES):
            yield part
            part, size = [], 0
        part.append(line)
        size += len(line)
    if part:
        yield part


class ReadResult(NamedTuple):
    """What became of the lines of output files."""

    stored: int
    known: int
    """Were in the cache already, and stay as they are."""
    failed: dict[str, int]
    """By code; the next run asks them again."""


def read_replies(paths: Iterable[Path], cache: ReplyCache) -> ReadResult:
    """Put the replies of output and error files into the cache. :class:`DataError` for a file that is none of these."""
    stored, known, failed = 0, 0, Counter[str]()
    for path in paths:
        for number, line in enumerate(_lines(path), 1):
            key, answer = _read_line(line, path, number)
            if cache.get_many([key]):
                known += 1
            elif isinstance(answer, Failure) and answer.code not in ANSWER_CODES:
                failed[answer.code] += 1
            else:
                cache.put(key, stored_form(answer))
                stored += 1
    return ReadResult(stored, known, dict(sorted(failed.items())))


def _lines(path: Path) -> list[str]:
    try:
        return [line for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read the batch file {path}: {error}") from error


def _read_line(line: str, path: Path, number: int) -> tuple[str, Any]:
    """(key, reply or failure) of one line."""
    try:
        entry = json.loads(line)
        key, response = str(entry["custom_id"]), entry.get("response") or {}
        if not _KEY.fullmatch(key):
            raise ValueError("custom_id is no request key of ours")
        if "body" in entry and "response" not in entry:
            raise ValueError("this is a file of requests: give the output file of the batch")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path}, line {number}: not a line of a batch's output ({error})") from error
    status = response.get("status_code")
    if status == 200:
        try:
            return key, parse_chat(json.dumps(response.get("body")), _ANY, None)
        except Retry as trouble:
            return key, Failure(code=trouble.code, stage="batch", detail=str(trouble))
    said = json.dumps(entry.get("error") or response.get("body"))[:300]
    code = "rate_limited" if status == 429 else "server_error"
    return key, Failure(code=code, stage="batch", detail=f"status {status}: {said}")
