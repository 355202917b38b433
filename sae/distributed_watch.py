"""Who of the ranks is alive: a heartbeat through the store of the process group, so that no collective hangs.

Every rank has a thread that writes a beat and reads those of the others. A rank counts as lost when its process on this
machine is gone (seen within a second), when it says that it failed, or when it has been silent for ``silent_s``. What
then waits in a collective is ended: by the error of the collective where there is one, else by leaving the process.
"""

import json
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

from sae.errors import SaescopeError

T = TypeVar("T")
BEAT_S = 0.5
"""Seconds between beats."""
SILENT_S = 60.0
"""Silence after which a rank counts as lost where its process cannot be looked at."""
GRACE_S = 5.0
"""Time that the main thread has to end by itself once a rank is lost."""
LINGER_S = 3.0
"""Time that rank 0, which may keep the store, leaves the others to read from it whom to name."""
POLL_S = 0.05
logger = logging.getLogger(__name__)


class RankLost(SaescopeError):
    """A rank of a distributed run ended or went silent; the others end too. Saved steps are kept."""


class Told(SaescopeError):
    """An error of rank 0 as the other ranks hear it; rank 0 reports it."""

    def __init__(self, text: str, exit_status: int) -> None:
        super().__init__(text)
        self.exit_status = exit_status  # all ranks end with that of rank 0


@dataclass(frozen=True)
class Who:
    """A process, as others recognise it."""

    host: str
    space: str
    """Boot and process namespace: equal ones mean that a process number can be looked up here."""
    pid: int
    started: str
    """Start time of the process in its kernel's ticks; a number may be given again."""

    @staticmethod
    def me() -> "Who":
        return Who(socket.gethostname(), _space(), os.getpid(), _start_of(os.getpid()))

    def gone(self) -> bool:
        """Whether it lived in this space and does not any more; a zombie is gone."""
        return self.space == _space() and self.space != "" and _start_of(self.pid) != self.started

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


def _space() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _start_of(pid: int) -> str:
    """Start time of a process, "" where it is gone or a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]


class Watch:
    """Liveness of all ranks, and what rank 0 tells the others. Use it as a context manager."""

    def __init__(self, store: Any, rank: int, world: int, *, silent_s: float = SILENT_S, join_s: float = 300.0) -> None:
        """``store``: a torch store that all ranks reach (it is copied for the thread); None for one rank.

        :class:`RankLost` where a rank has not come within ``join_s``.
        """
        self.rank, self.world, self.silent_s = rank, world, silent_s
        self.step = 0
        """What the beat says this rank has reached."""
        self.lost = ""
        self._said = 0
        self._reported = False
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._who: list[Who] = []
        self._beats: list[tuple[str, float]] = []
        if world == 1:
            return
        self._main, self._own = store.clone(), store.clone()
        for copy in (self._main, self._own):
            copy.set_timeout(timedelta(seconds=30))
        me = Who.me()
        self._main.set(f"who/{rank}", json.dumps([me.host, me.space, me.pid, me.started]))
        self._beat(self._main, 0)
        self._join(join_s)
        self._who = [Who(*json.loads(self._main.get(f"who/{r}"))) for r in range(world)]
        self._beats = [("", time.monotonic())] * world
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()

    def _join(self, join_s: float) -> None:
        begun = time.monotonic()
        while absent := [r for r in range(self.world) if not self._main.check([f"alive/{r}"])]:
            if time.monotonic() - begun > join_s:
                names = ", ".join(map(str, absent))
                raise RankLost(
                    f"rank(s) {names} of {self.world} did not come within {join_s:g} s; look at their own output, "
                    "and start all ranks again"
                )
            time.sleep(POLL_S)

    # -- the thread ---------------------------------------------------------------------------------------------------
    def _beat(self, store: Any, number: int) -> None:
        store.set(f"alive/{self.rank}", f"{number} {self.step}")

    def _run(self) -> None:
        number = 0
        while not self._stop.wait(BEAT_S):
            number += 1
            try:
                self._beat(self._own, number)
                self.lost = self._look()
                if self.lost and not self._own.check(["lost"]):  # so that all ranks name the same one
                    self._own.set("lost", self.lost)
            except RuntimeError as error:  # torch's DistError is one
                self.lost = self._without_store(error)
            if self.lost and not self._stop.is_set():
                break
        if self.lost and not self._stop.wait(GRACE_S):  # the main thread waits in a collective
            self.report()
            os._exit(RankLost.exit_status)

    def _without_store(self, error: RuntimeError) -> str:
        """Whom to name once the store is gone, which torchrun or rank 0 keeps."""
        if self.rank and self._who[0].gone():  # had another gone first, rank 0 would have let it be read (LINGER_S)
            return f"rank 0 ({self._who[0]}) is gone, and with it the store of the process group"
        keeper = f"torchrun or rank 0 ({self._who[0]})"
        return f"the store of the process group, kept by {keeper}, does not answer ({str(error).splitlines()[0]})"

    def _look(self) -> str:
        """What is wrong with another rank, "" where all is well."""
        if self._own.check(["lost"]):
            return bytes(self._own.get("lost")).decode()
        others = [r for r in range(self.world) if r != self.rank]
        beats = [bytes(b).decode() for b in self._own.multi_get([f"alive/{r}" for r in others])]
        now = time.monotonic()
        for r, beat in zip(others, beats, strict=True):
            if beat == "done":
                continue
            if self._own.check([f"failed/{r}"]):
                return f"rank {r} ({self._who[r]}) ended with an error: {bytes(self._own.get(f'failed/{r}')).decode()}"
            if beat != self._beats[r][0]:
                self._beats[r] = (beat, now)
            reached = f"after step {beat.split()[1]}"
            if self._who[r].gone():
                return f"rank {r} ({self._who[r]}) is gone: its process ended {reached}, killed or out of memory"
            if now - self._beats[r][1] > self.silent_s:
                return f"rank {r} ({self._who[r]}) has been silent for {self.silent_s:g} s {reached}"
        return ""

    # -- for the main thread ------------------------------------------------------------------------------------------
    def message(self) -> str:
        """What the error of this rank says."""
        return (
            f"rank {self.rank} ends because {self.lost}. Saved steps are kept: start all ranks again and training goes "
            "on from the newest one, on this mesh or another"
        )

    def report(self) -> None:
        """Say it once, at once: torchrun ends all processes of a run that lost one, with little delay."""
        with self._lock:
            if not self._reported:
                self._reported = True
                print(f"error: {self.message()}", file=sys.stderr, flush=True)
        if self.rank == 0:
            time.sleep(LINGER_S)

    def check(self) -> None:
        """:class:`RankLost` once another rank is lost."""
        if self.lost:
            self.report()
            raise RankLost(self.message())

    def blame(self, failed: BaseException) -> RankLost:
        """The error for a collective that failed: the rank that was lost, waited for; else who is how far."""
        end = time.monotonic() + 4 * BEAT_S + (GRACE_S if self.world > 1 else 0)
        while not self.lost and self.world > 1 and time.monotonic() < end:
            time.sleep(POLL_S)
        if not self.lost:
            steps = ", ".join(f"rank {r} at step {(b.split() or ['', '?'])[-1]}" for r, (b, _) in
                              enumerate(self._beats) if r != self.rank)  # fmt: skip
            self.lost = f"{failed}; all ranks are alive ({steps}; this rank at step {self.step})"
        self.report()
        return RankLost(self.message())

    def fail(self, why: str) -> None:
        """Tell the others that this rank ends with an error."""
        if self.world > 1 and not self.lost:
            try:
                self._main.set(f"failed/{self.rank}", why)
            except RuntimeError as error:
                logger.debug("the store is gone: %s", error)

    def from_first(self, work: Callable[[], T]) -> T:
        """Have rank 0 do some work, however long, and give its result (JSON) to all; its typed errors too.

        The others hear a :class:`Told` with the text of the error.
        """
        if self.world == 1:
            return work()
        self._said += 1
        key = f"said/{self._said}"
        if self.rank == 0:
            try:
                found = work()
            except (SaescopeError, KeyboardInterrupt) as error:
                self._main.set(key, json.dumps(
                    {"error": type(error).__name__, "text": str(error), "status": getattr(error, "exit_status", 1)}
                ))
                raise
            self._main.set(key, json.dumps({"value": found}))
            return found
        while not self._main.check([key]):
            self.check()
            time.sleep(POLL_S)
        said = json.loads(self._main.get(key))
        if "error" in said:
            if said["error"] in ("KeyboardInterrupt", "TrainingInterrupted"):
                raise KeyboardInterrupt(said["text"])
            raise Told(f"rank 0: {said['text']}", said["status"])
        return said["value"]  # type: ignore[no-any-return]

    def close(self, *, well: bool) -> None:
        """End the thread. ``well``: this rank is done; rank 0, which may keep the store, waits for the others."""
        self._stop.set()
        if self.world == 1:
            return
        try:
            if well:
                self._main.set(f"alive/{self.rank}", "done")
                end = time.monotonic() + 20 * BEAT_S
                while self.rank == 0 and time.monotonic() < end:
                    if all(bytes(self._main.get(f"alive/{r}")) == b"done" for r in range(self.world)):
                        break
                    time.sleep(POLL_S)
        except RuntimeError as error:
            logger.debug("the store is gone: %s", error)
        self._thread.join(timeout=4 * BEAT_S)

    def __enter__(self) -> "Watch":
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: Any) -> None:
        if value is not None and not isinstance(value, (Told, KeyboardInterrupt)):
            self.fail(f"{type(value).__name__}: {value}")
        self.close(well=value is None)


