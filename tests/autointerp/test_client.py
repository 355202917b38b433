"""Request keys, the reply cache, the cached client: resume, budget, equal requests, kills."""

import os
import signal
import sqlite3
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from autointerp.client import (
    CachedClient,
    Capabilities,
    ContinuationRequest,
    GenerateRequest,
    Identity,
    LogprobReply,
    Message,
    NextTokenRequest,
    Origin,
    Reply,
    SlotRequest,
    Usage,
    check_capability,
    open_client,
    request_key,
)
from autointerp.clients.scripted import ScriptedClient
from autointerp.ledger import Ledger
from autointerp.records import Failure
from autointerp.reply_cache import ReplyCache
from sae.errors import ArtefactError, BudgetExceeded, ConfigError, Unsupported

HERE = Identity(endpoint="scripted", model="m")


def ask(text: str, **options) -> GenerateRequest:
    options = {"max_tokens": 8, **options}
    return GenerateRequest(messages=(Message(role="user", content=text),), **options)


def test_any_difference_changes_the_key() -> None:
    base = ask("a" * 400 + "x" + "b" * 400)
    others = [
        ask("a" * 400 + "y" + "b" * 400),
        replace(base, temperature=0.1), replace(base, top_p=0.9), replace(base, seed=1), replace(base, max_tokens=9),
        replace(base, stop=("\n",)), replace(base, schema={"type": "object"}), replace(base, attempt=1),
        NextTokenRequest(messages=base.messages, choices=("Yes",)),
        ContinuationRequest(prompt="a", continuations=(" b",)), ContinuationRequest(prompt="a", continuations=(" c",)),
        SlotRequest(ids=(1, 2, 3), positions=(0,), token_ids=(4,)),
        SlotRequest(ids=(1, 2), positions=(0,), token_ids=(4,)),
    ]  # fmt: skip
    keys = [request_key(HERE, r) for r in (base, *others)]
    keys += [request_key(i, base) for i in (replace(HERE, model="n"), replace(HERE, revision="2"))]
    assert len(set(keys)) == len(keys)


def test_the_key_ignores_whom_it_is_for_and_the_hash_seed() -> None:
    assert request_key(HERE, ask("x")) == request_key(HERE, ask("x", origin=Origin(stage="s", latent=3)))
    program = (
        "from autointerp.client import *;"
        "messages = (Message(role='user', content='ö'),);"
        "print(request_key(Identity(endpoint='e', model='m'), GenerateRequest(messages=messages, max_tokens=3,"
        " schema={'b': 1, 'a': [2]})))"
    )
    said = {
        subprocess.run(
            [sys.executable, "-c", program], env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, check=True
        ).stdout
        for seed in ("1", "2")
    }
    assert len(said) == 1


def test_bad_requests_are_refused_when_made() -> None:
    with pytest.raises(ConfigError):
        ask("x", max_tokens=0)
    with pytest.raises(ConfigError):
        SlotRequest(ids=(1, 2), positions=(2,), token_ids=(1,))
    with pytest.raises(ConfigError, match="empty continuation"):
        ContinuationRequest(prompt="a", continuations=("",))


def test_a_second_run_sends_nothing_and_says_the_same(tmp_path: Path) -> None:
    requests = [ask(str(i)) for i in range(5)]
    first = ScriptedClient(lambda r: f"answer {r.messages[0].content}")
    client = CachedClient(first, ReplyCache(tmp_path / "r.sqlite"))
    replies = client.generate(requests)
    client.close()
    second = ScriptedClient(lambda r: "other")
    again = CachedClient(second, ReplyCache(tmp_path / "r.sqlite"))
    assert again.generate(requests) == replies
    assert second.sent == []
    totals = [c.ledger.totals() for c in (client, again)]
    assert [t["sent"] for t in totals] == [5, 0]
    assert totals[0]["prompt_tokens"] == totals[1]["prompt_tokens"] > 0


def test_logprob_replies_come_back_equal(tmp_path: Path) -> None:
    reply = LogprobReply(rows=((-1.25, None), (-0.1, -3.0)), sums=(-2.5,), counts=(2,), usage=Usage(prompt_tokens=3))
    request = SlotRequest(ids=(1, 2), positions=(0, 1), token_ids=(4, 5))
    cache = ReplyCache(tmp_path / "r.sqlite")
    assert CachedClient(ScriptedClient(lambda r: reply), cache).logprobs([request]) == [reply]
    assert CachedClient(ScriptedClient(queue=[]), cache).logprobs([request]) == [reply]
    assert reply.means == (-1.25,)


def test_equal_requests_are_sent_once_and_order_is_kept() -> None:
    backend = ScriptedClient(lambda r: "R" + r.messages[0].content)
    replies = CachedClient(backend).generate([ask("a"), ask("b"), ask("a")])
    assert [r.text for r in replies] == ["Ra", "Rb", "Ra"]
    assert len(backend.sent) == 2


@pytest.mark.parametrize("code", ["timeout", "rate_limited", "server_error", "connection", "schema", "unsupported"])
def test_what_got_no_answer_is_not_stored(tmp_path: Path, code: str) -> None:
    cache = ReplyCache(tmp_path / "r.sqlite")
    failing = ScriptedClient(lambda r: Failure(code=code, stage="generate"))
    assert CachedClient(failing, cache).generate([ask("a")])[0].code == code
    assert len(cache) == 0
    assert CachedClient(ScriptedClient(lambda r: "now"), cache).generate([ask("a")])[0].text == "now"


@pytest.mark.parametrize("code", ["refusal", "empty", "truncated"])
def test_an_answer_without_a_text_is_paid_for_once_and_can_be_replayed(tmp_path: Path, code: str) -> None:
    path = tmp_path / "r.sqlite"
    failure = Failure(code=code, stage="generate", detail="no")
    first = open_client("scripted", replies=path, answer=lambda r: failure)
    assert first.generate([ask("a")]) == [failure]
    first.close()
    later = open_client("scripted", replies=path, answer=lambda r: "other")
    assert later.generate([ask("a")]) == [failure] and later.backend.sent == []
    assert open_client("replay", replies=path).generate([ask("a")]) == [failure]


def test_the_budget_stops_cleanly_and_the_run_goes_on_from_there(tmp_path: Path) -> None:
    requests = [ask(f"question number {i}") for i in range(10)]
    each = -(-len("question number 0") // 3) + 4 + 8  # characters / 3, per message 4, max_tokens
    client = CachedClient(ScriptedClient(lambda r: "yes"), ReplyCache(tmp_path / "r.sqlite"), max_tokens=3 * each)
    with pytest.raises(BudgetExceeded, match="--max-llm-tokens"):
        client.generate(requests)
    sent = len(client.backend.sent)
    assert 3 <= sent < 10 and len(client.cache) == sent
    assert client.spent_tokens <= 3 * each
    client.close()
    later = CachedClient(ScriptedClient(lambda r: "yes"), ReplyCache(tmp_path / "r.sqlite"))
    assert [r.text for r in later.generate(requests)] == ["yes"] * 10
    assert len(later.backend.sent) == 10 - sent


def test_what_arrived_before_an_error_is_kept(tmp_path: Path) -> None:
    queue = ["a", "b", ConfigError("the key was refused")]
    client = CachedClient(ScriptedClient(queue=queue), ReplyCache(tmp_path / "r.sqlite"))
    with pytest.raises(ConfigError):
        client.generate([ask(str(i)) for i in range(5)])
    assert len(client.cache) == 2


def test_a_local_block_is_stored_whole_or_not_at_all(tmp_path: Path) -> None:
    local = Capabilities(local=True)
    queue = ["a", "b", ConfigError("out of memory")]
    client = CachedClient(ScriptedClient(queue=queue, capabilities=local), ReplyCache(tmp_path / "r.sqlite"))
    with pytest.raises(ConfigError):
        client.generate([ask(str(i)) for i in range(5)])
    assert len(client.cache) == 0
    heard: list[int] = []
    many = CachedClient(ScriptedClient(lambda r: "x", capabilities=local), client.cache)
    many.generate([ask(str(i)) for i in range(300)], on_reply=lambda i, reply: heard.append(i))
    assert heard == list(range(300)) and len(client.cache) == 300


KILLED = """
import os, signal, sys
from pathlib import Path
from autointerp.client import CachedClient, GenerateRequest, Message
from autointerp.clients.scripted import ScriptedClient
from autointerp.reply_cache import ReplyCache
n = 0
def answer(request):
    global n
    n += 1
    if n == 150:
        os.kill(os.getpid(), signal.SIGKILL)
    return "R" + request.messages[0].content
CachedClient(ScriptedClient(answer), ReplyCache(Path(sys.argv[1]))).generate(
    [GenerateRequest(messages=(Message(role="user", content=str(i)),), max_tokens=4) for i in range(200)])
"""


def test_after_kill_9_the_rest_is_asked_and_nothing_is_lost(tmp_path: Path) -> None:
    path = tmp_path / "r.sqlite"
    done = subprocess.run([sys.executable, "-c", KILLED, str(path)], capture_output=True)
    assert done.returncode == -signal.SIGKILL
    cache = ReplyCache(path)
    kept = len(cache)
    assert kept == 149  # each reply is safe before the next is asked for
    backend = ScriptedClient(lambda r: "R" + r.messages[0].content)
    replies = CachedClient(backend, cache).generate([ask(str(i), max_tokens=4) for i in range(200)])
    assert [r.text for r in replies] == [f"R{i}" for i in range(200)]
    assert len(backend.sent) == 200 - kept


def test_a_damaged_cache_is_named(tmp_path: Path) -> None:
    path = tmp_path / "r.sqlite"
    path.write_bytes(b"this is no database, but long enough to look at" * 20)
    with pytest.raises(ArtefactError, match="r.sqlite"):
        ReplyCache(path)
    with pytest.raises(ArtefactError, match="no reply cache"):
        ReplyCache(tmp_path / "absent.sqlite", must_exist=True)


def test_a_damaged_reply_is_fetched_again(tmp_path: Path) -> None:
    path = tmp_path / "r.sqlite"
    client = CachedClient(ScriptedClient(lambda r: "first"), ReplyCache(path))
    client.generate([ask("a")])
    client.close()
    with sqlite3.connect(path) as db:
        db.execute("UPDATE replies SET reply = x'00ff00'")
    again = CachedClient(ScriptedClient(lambda r: "second"), ReplyCache(path))
    assert again.generate([ask("a")])[0].text == "second"


def test_requests_are_kept_when_asked_for(tmp_path: Path) -> None:
    client = open_client(
        "scripted", replies=tmp_path / "r.sqlite", keep_requests=True, answer=lambda r: "x", model="named"
    )
    request = ask("what?")
    client.generate([request])
    stored = client.cache.request(request_key(client.identity, request))
    assert stored["messages"][0]["content"] == "what?"


def test_a_missing_capability_is_named_before_anything_is_sent() -> None:
    client = CachedClient(ScriptedClient(lambda r: "x", capabilities=Capabilities()))
    with pytest.raises(Unsupported, match="all_at_once needs 'slots'"):
        check_capability(client, "slots", "all_at_once")
    with pytest.raises(Unsupported):
        client.logprobs([SlotRequest(ids=(1,), positions=(0,), token_ids=(1,))])
    assert client.backend.sent == []


def test_an_external_ledger_is_shared() -> None:
    ledger = Ledger()
    for _ in range(2):
        CachedClient(ScriptedClient(lambda r: Reply(text="x")), ledger=ledger).generate([ask("a")])
    assert ledger.totals()["requests"] == 2
