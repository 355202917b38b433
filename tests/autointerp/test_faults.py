"""A thousand requests through the real client against a server that does everything wrong, with two kills on the way.

Every request ends as an answer or as a typed failure, none is lost, and no answer that the client had received is paid
for again.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from loopback import ChatServer, Fault, completion

from autointerp.reply_cache import ReplyCache
from sae.manifest import rng

N, CONCURRENCY = 1_000, 64
TIMEOUT_S = 2.0
ONCE = ("sleep", "429 after", "429", "500", "503 html", "cut body", "reset")
"""Answered at a later attempt."""
ALWAYS = {
    "always 500": "server_error", "always reset": "connection", "always cut": "server_error",
    "always 429": "rate_limited", "refusal": "refusal", "filter": "refusal", "blank": "empty", "thought": "truncated",
    "too long": "prompt_too_long", "no json": "no_json", "cut json": "truncated", "wrong length": "out_of_range",
    "twice": "duplicate", "wrong type": "schema",
}  # fmt: skip
"""Never answered, with the failure it must end as."""
UNANSWERED = ("always 500", "always reset", "always cut", "always 429", "too long")

CHILD = """
import json, sys
from pathlib import Path
from autointerp.client import GenerateRequest, Message, open_client
from autointerp.clients.openai import Retries
from autointerp.judging import SCHEMA, matches
from autointerp.records import Failure
from autointerp.replies import ask
url, cache, out, n = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4])
client = open_client("openai", replies=cache, model="m", base_url=url, concurrency=64, timeout_s=2.0,
                     retries=Retries(attempts=5, first_delay_s=0.01, max_delay_s=0.05, total_s=60))
requests = [GenerateRequest(messages=(Message(role="user", content=f"item {i}"),), max_tokens=20, schema=SCHEMA)
            for i in range(n)]
answers = ask(client, requests, lambda i, reply: matches(reply, 3), "Once more, in JSON.")
client.close()
out.write_text(json.dumps([a.value.code if isinstance(a.value, Failure) else sorted(a.value) for a in answers]))
print(json.dumps(client.ledger.totals()))
"""


def fate(i: int) -> str:
    """What happens to request i: fine for two in three, one of everything else."""
    draw = rng("fate", i)
    if draw.random() < 0.65:
        return "fine"
    kinds = [*ONCE, *ALWAYS]
    return str(kinds[int(draw.integers(len(kinds)))]) if draw.random() > 0.02 else "sleep"


def right(i: int) -> list[int]:
    return [1 + i % 3]


GOOD = {"no json": "I think two of them.", "wrong length": '{"match": [1, 9]}', "twice": '{"match": [2, 2]}',
        "wrong type": '{"match": ["1"]}'}  # fmt: skip


def answer_of(kind: str, i: int, n: int) -> Any:
    fine = completion(json.dumps({"match": right(i)}))
    status = lambda s, body={}, **headers: Fault("status", status=s, body=body, headers=headers)  # noqa: E731, B006
    once: dict[str, Any] = {
        "sleep": Fault("sleep", body=TIMEOUT_S + 1), "429 after": status(429, **{"retry-after": "0.05"}),
        "429": status(429), "500": status(500), "503 html": status(503, b"<html>no</html>"),
        "cut body": Fault("truncated", body=fine), "reset": Fault("reset"),
    }  # fmt: skip
    if kind == "fine" or kind in once:
        return once[kind] if kind in once and n == 0 else fine
    always: dict[str, Any] = {
        "always 500": status(500), "always reset": Fault("reset"), "always cut": Fault("truncated", body=fine),
        "always 429": status(429), "refusal": completion(None, refusal="I cannot"),
        "filter": completion("", finish="content_filter"), "blank": completion(" "),
        "thought": completion(None, finish="length"), "cut json": completion('{"match": [1', finish="length"),
        "too long": status(400, {"error": {"code": "context_length_exceeded"}}),
    }  # fmt: skip
    return always[kind] if kind in always else completion(GOOD[kind])


def paid(server: ChatServer) -> Counter[str]:
    """How often each request's answer was delivered; the client's questions whether anybody is there do not count."""
    return Counter(t for t in list(server.delivered) if t.startswith("item "))


class Gate:
    """Lets ``n`` requests in; the next ones wait until :meth:`drop` and then get nothing."""

    def __init__(self, n: int) -> None:
        self.left, self.lock, self.dropped = n, threading.Lock(), threading.Event()

    def passes(self) -> bool:
        with self.lock:
            self.left -= 1
            if self.left >= 0:
                return True
        self.dropped.wait(60)
        return False


class World:
    """The server, what it was asked, and the child that asks."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.gate = folder, Gate(10**9)
        self.cache = folder / "replies.sqlite"

    def answer(self, body: dict[str, Any], n: int) -> Any:
        if not self.gate.passes():
            return Fault("reset")
        said = body["messages"][-1]["content"]
        if not said.startswith("item "):  # the client asks whether anybody is there
            return completion("yes")
        i = int(said.split()[1])
        return answer_of(fate(i), i, n)

    def start(self, url: str) -> subprocess.Popen[str]:
        env = {**os.environ, "NO_PROXY": "127.0.0.1", "OMP_NUM_THREADS": "1"}
        env.pop("OPENAI_BASE_URL", None)
        command = [sys.executable, "-c", CHILD, url, str(self.cache), str(self.folder / "out.json"), str(N)]
        return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def stored(self) -> int:
        return len(ReplyCache(self.cache)) if self.cache.exists() else 0

    def finish(self, url: str) -> tuple[list[Any], dict[str, Any]]:
        out, err = (child := self.start(url)).communicate(timeout=120)
        assert child.returncode == 0, err
        return json.loads((self.folder / "out.json").read_text()), json.loads(out)


def wait_for(condition, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.02)


@pytest.mark.slow
def test_a_thousand_requests_none_lost_none_paid_twice(tmp_path: Path) -> None:
    world = World(tmp_path)
    with ChatServer(world.answer) as server:
        # Kill 1: after 400 requests the server falls silent; once all it has answered is stored, the client dies.
        world.gate = Gate(400)
        child = world.start(server.url)
        wait_for(lambda: world.gate.left < 0 and world.stored() == sum(paid(server).values()) > 100)
        child.send_signal(signal.SIGKILL)
        child.wait()
        world.gate.dropped.set()
        # Kill 2: in full flight. What was on its way is lost to us; what was received is not.
        world.gate = Gate(10**9)
        before = len(server.bodies)
        child = world.start(server.url)
        wait_for(lambda: len(server.bodies) > before + 300)
        child.send_signal(signal.SIGKILL)
        child.wait()
        wait_for(lambda: server.in_flight == 0)
        stored_then, delivered_then = world.stored(), sum(paid(server).values())
        assert max(paid(server).values()) == 1  # nothing of the first run was asked for again
        answers, ledger = world.finish(server.url)
        delivered = paid(server)
        again, again_ledger = world.finish(server.url)
        last = paid(server) - delivered
    kinds = [fate(i) for i in range(N)]
    assert set(kinds) == {"fine", *ONCE, *ALWAYS}
    expected = [ALWAYS[k] if k in ALWAYS else right(i) for i, k in enumerate(kinds)]
    assert answers == expected and len(answers) == N
    # Paid twice: at most what was in flight at the second kill, and none that had been stored by then.
    twice = sum(n - 1 for n in delivered.values())
    assert twice == delivered_then - stored_then <= CONCURRENCY
    assert ledger["failed"] == sum(k in UNANSWERED or ALWAYS.get(k) in ("refusal", "empty") or k == "thought"
                                   for k in kinds)  # fmt: skip
    # Run again: only what never had an answer is asked for, and nothing else is paid.
    assert again == answers and not last
    assert again_ledger["sent"] == sum(k in UNANSWERED for k in kinds)
