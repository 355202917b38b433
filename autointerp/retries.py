"""How to insist on requests to a server: waits, a limit on what is in flight, words without keys. Torch-free."""

import asyncio
import math
import os
import re
import threading
import time
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

from sae.connection import why_unreachable
from sae.errors import ConfigError

KEY_VARIABLE = "OPENAI_API_KEY"
MAX_DETAIL_CHARS = 300
CONNECTIONS_PER_LINE = 8
PACE_S = 0.0015
"""Between the starts of two requests: about the processor time of one."""
CONNECT_S = 5.0


@dataclass(frozen=True)
class Retries:
    """How long to insist on one request."""

    attempts: int = 6
    first_delay_s: float = 1.0
    """Doubles per attempt; the wait is uniform between 0 and it (full jitter)."""
    max_delay_s: float = 60.0
    total_s: float = 600.0
    """Of all attempts and waits of one request together."""


class Retry(Exception):
    """Try again: a transport trouble with its failure code."""

    def __init__(self, code: str, detail: str, after_s: float | None = None) -> None:
        super().__init__(detail)
        self.code, self.after_s, self.attempts = code, after_s, 1


class Gate:
    """At most ``limit`` requests in flight: halved when the server says 429, raised by one per round of successes."""

    def __init__(self, most: int, calm_s: float) -> None:
        self.most, self.limit, self.calm_s = most, float(most), calm_s
        self.running, self.last_cut = 0, -math.inf
        self.changed = asyncio.Condition()
        self.next_start_s = -math.inf

    async def __aenter__(self) -> None:
        async with self.changed:
            await self.changed.wait_for(lambda: self.running < int(self.limit))
            self.running += 1
        # Requests that start together go through the client in step: none is sent before all are built, their answers
        # come together, and meanwhile the server has nothing to do. So they start one after the other.
        now = asyncio.get_running_loop().time()
        wait_s = self.next_start_s - now
        self.next_start_s = max(now, self.next_start_s) + PACE_S
        if wait_s > 0:
            try:
                await asyncio.sleep(wait_s)
            except BaseException:  # cancelled: the place is given back
                await self.__aexit__()
                raise

    async def __aexit__(self, *_: object) -> None:
        async with self.changed:
            self.running -= 1
            # As many as there are places: waking all of thousands for each place is quadratic.
            self.changed.notify(max(0, int(self.limit) - self.running))

    def success(self) -> None:
        self.limit = min(float(self.most), self.limit + 1 / self.limit)

    def too_fast(self) -> None:
        now = time.monotonic()
        if now - self.last_cut >= self.calm_s:  # one burst of 429s is one signal
            self.limit, self.last_cut = max(1.0, self.limit / 2), now


class Lines:
    """Several SDK clients as one, each request to the least busy of them.

    A client looks through all its connections for each request that begins or ends: with 64 of them that takes a third
    of all its time, with eight a few per cent.
    """

    def __init__(self, sdks: Sequence[Any]) -> None:
        self.sdks, self.busy = list(sdks), [0] * len(sdks)

    @property
    def base_url(self) -> Any:
        return self.sdks[0].base_url

    async def post(self, path: str, **options: Any) -> Any:
        """As the SDK's."""
        line = self.busy.index(min(self.busy))
        self.busy[line] += 1
        try:
            return await self.sdks[line].post(path, **options)
        finally:
            self.busy[line] -= 1


def check_base_url(url: str | None) -> None:
    """:class:`ConfigError` for what is no URL, and for one that carries a secret: options are written into manifests,
    the environment is not."""
    if not url:
        return
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError("a base URL begins with http:// or https://, as in http://127.0.0.1:8000/v1")
    if parts.username or parts.password or parts.query:
        raise ConfigError(
            f"the base URL of {parts.hostname} holds a user, a password or a query; keys are read from {KEY_VARIABLE}, "
            "and a URL that needs more than that from OPENAI_BASE_URL"
        )


def why_silent(url: str | None) -> str | None:
    """Why no connection can be made now to the server of a base URL (default: that of OPENAI_BASE_URL), in words; None
    if one can, or if that cannot be tried: for OpenAI itself, and behind a proxy."""
    url = url or os.environ.get("OPENAI_BASE_URL")
    parts = urlsplit(url or "")
    if not parts.hostname or parts.scheme in getproxies():
        return None
    try:
        port = parts.port or (443 if parts.scheme == "https" else 80)
    except ValueError as error:  # no number, or one that no port has
        silence: str | None = str(error)
    else:
        silence = why_unreachable(parts.hostname, port, CONNECT_S)
    if silence is None:
        return None
    return (
        f"no server can be reached at {url} ({silence}): start it, or give another base URL; without it only what was "
        "asked before has an answer"
    )


def retry_after_s(headers: Any) -> float | None:
    """Seconds to wait by ``Retry-After`` (seconds or a date), if the server says."""
    value = headers.get("retry-after")
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(value).timestamp() - time.time()
        except (TypeError, ValueError):
            return None
    return max(0.0, seconds) if math.isfinite(seconds) else None


def scrub(said: object) -> str:
    """A server's words without anything that looks like a key, one line, cut."""
    text = str(said)
    key = os.environ.get(KEY_VARIABLE)
    if key:
        text = text.replace(key, "[key]")
    text = re.sub(r"\b(sk|pk|key)-[\w*.-]{6,}", "[key]", text)
    text = re.sub(r"(?i)bearer\s+\S+", "Bearer [key]", text)
    return " ".join(text.split())[:MAX_DETAIL_CHARS]


def run_to_end(work: Coroutine[Any, Any, list[Any]]) -> list[Any]:
    """Run to the end, also from inside a running event loop (a notebook)."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    result: dict[str, Any] = {}

    def inside() -> None:
        try:
            result["value"] = asyncio.run(work)
        except BaseException as error:  # handed to the caller's thread
            result["error"] = error

    thread = threading.Thread(target=inside)
    thread.start()
    thread.join()
    if "error" in result:
        raise result["error"]
    return list(result["value"])
