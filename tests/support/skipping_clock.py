"""An event loop whose clock is the processor time of this process plus the waiting that it skips.

Timers fire in order and sockets are real, but nobody sleeps: where nothing is ready the clock jumps to the next timer.
So what a client does against a server of fixed latency can be measured on a busy machine, as if a core were its own.
"""

import asyncio
import selectors
import time
from typing import Any

from http_bodies import HttpBodies


class _Skipping(selectors.DefaultSelector):
    def __init__(self) -> None:
        super().__init__()
        self.skipped_s = 0.0

    def select(self, timeout: float | None = None) -> Any:
        ready = super().select(0)
        if ready or timeout == 0:
            return ready
        if timeout is None:  # no timer is set: a socket must be about to become ready
            return super().select(1.0)
        self.skipped_s += timeout
        return ready


class SkippingLoop(asyncio.SelectorEventLoop):
    """``asyncio.Runner(loop_factory=SkippingLoop)``."""

    def __init__(self) -> None:
        self._clock = _Skipping()
        super().__init__(self._clock)

    def time(self) -> float:
        """Seconds: processor time and skipped waiting."""
        return time.process_time() + self._clock.skipped_s


class FixedLatency(HttpBodies):
    """A server in the same loop: every request is answered ``latency_s`` after it has been read, however many come.
    Its own processor time counts against the client that is measured."""

    latency_s = 0.2
    body = b""

    def asked(self, body: bytes) -> None:
        asyncio.get_running_loop().call_later(self.latency_s, self.answer, self.body)
