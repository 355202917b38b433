"""What servers really say, and what must not follow from it: their refusals, their lists, their halves of characters,
what they leave uncounted."""

import json
import math
import time
from pathlib import Path

import pytest
from loopback import ChatServer, Fault, completion

from autointerp.client import CachedClient, GenerateRequest, LogprobReply, Message, NextTokenRequest, Reply, SlotRequest
from autointerp.clients.openai import OpenAIClient
from autointerp.clients.scripted import ScriptedClient
from autointerp.ledger import Ledger, Price
from autointerp.llm_requests import rough_tokens
from autointerp.records import Failure
from autointerp.replies import json_object
from autointerp.reply_cache import ReplyCache
from autointerp.retries import Retries
from sae.errors import BudgetExceeded

SCHEMA = {"type": "object", "properties": {"match": {"type": "array"}}, "required": ["match"]}
TOO_LONG = {
    "openai": (400, {"error": {
        "message": "This model's maximum context length is 8192 tokens. However, your messages resulted in 9000.",
        "code": "context_length_exceeded",
    }}),
    "vllm of 2025": (400, {"error": {
        "message": "'max_tokens' or 'max_completion_tokens' is too large: 30. This model's maximum context length is "
        "2048 tokens and your request has 2040 input tokens (30 > 2048 - 2040).", "type": "BadRequestError",
    }}),
    "vllm 0.32": (400, {"error": {
        "message": "This model's maximum context length is 2048 tokens. However, your prompt contains at least 2049 "
        "input tokens, which exceeds this limit even without any output tokens.", "type": "BadRequestError",
    }}),
    "vllm 0.32, reply": (400, {"error": {
        "message": "max_tokens=4000 cannot be greater than max_model_len=2048. Please request fewer output tokens.",
    }}),
    "llama.cpp": (400, {"error": {
        "code": 400, "message": "request (4031 tokens) exceeds the available context size (2048 tokens), try "
        "increasing it", "type": "exceed_context_size_error", "n_ctx": 2048,
    }}),
    "sglang": (400, {"message": "The input (5000 tokens) is longer than the model's context length (4096 tokens)."}),
    "tgi": (422, {"error": "Input validation error: `inputs` tokens + `max_new_tokens` must be <= 4096. Given: 5000"}),
    "gateway": (400, {"error": {"message": "prompt is too long: 210000 tokens > 200000 maximum, by the schema"}}),
}  # fmt: skip


@pytest.fixture(autouse=True)
def loopback_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def ask(text: str, **options) -> GenerateRequest:
    return GenerateRequest(messages=(Message(role="user", content=text),), **{"max_tokens": 30, **options})


def client_of(server: ChatServer, **options) -> OpenAIClient:
    fast = Retries(attempts=4, first_delay_s=0.01, max_delay_s=0.05, total_s=20)
    return OpenAIClient(model="m", base_url=server.url, **{"retries": fast, "timeout_s": 5.0, **options})


@pytest.mark.parametrize("kind", TOO_LONG)
def test_a_prompt_that_is_too_long_changes_nothing_for_the_others(kind: str) -> None:
    """vLLM named max_completion_tokens in that refusal: taken for a reasoning model, it would have got all later
    requests without their temperature, its own default instead of greedy, under the keys of greedy ones."""
    status, body = TOO_LONG[kind]

    def answer(sent, n):
        said = sent["messages"][-1]["content"]
        return Fault("status", status=status, body=body) if said == "long" else completion("x")

    with ChatServer(answer) as server:
        client = client_of(server)
        [long] = client.generate([ask("long", schema=SCHEMA)])
        [after] = client.generate([ask("after", schema=SCHEMA)])
        sent = server.bodies[-1]
    assert isinstance(long, Failure) and long.code == "prompt_too_long" and isinstance(after, Reply)
    assert sent["temperature"] == 0 and sent["max_tokens"] == 30 and "max_completion_tokens" not in sent
    assert sent["response_format"]["type"] == "json_schema"


def test_waiting_for_a_place_does_not_use_up_the_time_to_insist() -> None:
    """All requests of a run exist from its beginning; one that waited long for its place is retried like any other."""

    def answer(sent, n):
        time.sleep(0.1)
        return Fault("status", status=500, body={}) if n < 2 else completion("x")

    with ChatServer(answer) as server:
        few = Retries(attempts=4, first_delay_s=0.01, max_delay_s=0.02, total_s=1.5)
        began = time.monotonic()
        answers = client_of(server, concurrency=1, retries=few).generate([ask(str(i)) for i in range(15)])
        assert time.monotonic() - began > 3 * few.total_s / 2
    assert [type(a) for a in answers] == [Reply] * 15 and len(server.bodies) == 45


def test_the_number_of_attempts_is_the_true_one() -> None:
    patient = Fault("status", status=429, body={}, headers={"retry-after": "3600"})
    with ChatServer(lambda *_: patient) as server:
        [failure] = client_of(server).generate([ask("a")])
    assert failure.code == "rate_limited" and failure.detail.startswith("1 attempts"), "an hour is not waited for"


@pytest.mark.parametrize(("listed", "row"), [
    ([("Yes", -0.7), ("No", -2.0), ("Yes", -3.0)], (math.log(math.exp(-0.7) + math.exp(-3.0)), -2.0)),
    ([("Yes", -9.0), ("No", -2.0), ("Yes", -1e-9)], (0.0, -2.0)),
    ([("Yes", -0.1), ("No", float("-inf"))], (-0.1, None)),
    ([("Yes", -0.1), ("No", float("nan"))], (-0.1, None)),
    ([("Yes", -0.1), ("No", None)], (-0.1, None)),
    ([("Yes", -0.1), (" No", -0.2)], (-0.1, None)),
])  # fmt: skip
def test_lists_of_log_probabilities(listed, row, tmp_path: Path) -> None:
    """One text may be listed twice (a token with and without the space before it); what is no number is not listed."""
    top = [{"token": token, "logprob": value, "bytes": None} for token, value in listed]
    said = completion("Yes")
    said["choices"][0]["logprobs"] = {"content": [{"token": "Yes", "logprob": -0.1, "top_logprobs": top}]}
    request = NextTokenRequest(messages=(Message(role="user", content="q"),), choices=("Yes", "No"))
    with ChatServer(lambda *_: said) as server:
        client = CachedClient(client_of(server, next_token=True), ReplyCache(tmp_path / "r.sqlite"))
        first, again = client.logprobs([request]), client.logprobs([request])
    assert first[0].rows == (tuple(v if v is None else pytest.approx(v, abs=1e-12) for v in row),) and again == first


@pytest.mark.parametrize("reply", [
    LogprobReply(rows=((float("nan"), -1.0),)), LogprobReply(rows=((None, float("-inf")),)),
    LogprobReply(sums=(float("nan"),), counts=(1,)),
])  # fmt: skip
def test_a_broken_models_numbers_are_failures_and_stop_nothing(reply, tmp_path: Path) -> None:
    client = CachedClient(ScriptedClient(lambda r: reply), ReplyCache(tmp_path / "r.sqlite"))
    [answer] = client.logprobs([SlotRequest(ids=(1, 2), positions=(0,), token_ids=(3, 4))])
    assert isinstance(answer, Failure) and answer.code == "schema" and len(client.cache) == 0


def test_halves_of_characters_go_out_and_come_in_whole(tmp_path: Path) -> None:
    """A text may hold half an emoji (``"\\ud83d"`` in JSON), a reply may be cut inside one."""
    with ChatServer(lambda body, n: completion("cut \ud83d")) as server:
        client = CachedClient(client_of(server), ReplyCache(tmp_path / "r.sqlite"))
        good, half = client.generate([ask("naïve 日本 \U0001f600"), ask("half \ud83d and \ude00")])
        sent = {b["messages"][-1]["content"] for b in server.bodies}
    assert sent == {"naïve 日本 \U0001f600", "half � and �"}
    assert good.text == half.text == "cut �"
    half.text.encode("utf-8")


def test_thoughts_before_an_answer_are_not_the_answer() -> None:
    schema = {"type": "object", "properties": {"odd": {"type": "integer"}}, "required": ["odd"]}
    thought = '<think>Is it {"odd": 1}? {No.}</think>\n\n{"odd": 3}'
    assert json_object(thought, schema) == {"odd": 3}
    assert json_object('{"odd": 3}', schema) == {"odd": 3}
    assert json_object('<think>only {"odd": 1}, perhaps</think>', schema).code == "no_json"


def test_tokens_without_a_tokenizer() -> None:
    assert rough_tokens("x" * 300) == 100 and rough_tokens("") == 0 and rough_tokens("a") == 1
    assert rough_tokens("日本語の文章") == 6, "a character of Chinese or Japanese is about a token, not a third"
    assert rough_tokens("\ud83d") == 1


# --- what is paid ----------------------------------------------------------------------------------------------------


def test_a_server_that_does_not_count_cannot_hide_a_spent_budget() -> None:
    def uncounted(body, n):
        said = completion("word " * 30)
        del said["usage"]
        return said

    with ChatServer(uncounted) as server:
        client = CachedClient(client_of(server, concurrency=1), max_tokens=400)
        with pytest.raises(BudgetExceeded):
            client.generate([ask(f"{i:03d} " + "question " * 10, max_tokens=60) for i in range(50)])
        assert 3 <= len(server.bodies) <= 6
        prompt, output = rough_tokens("000 " + "question " * 10) + 4, rough_tokens("word " * 30)
    assert client.spent_tokens == len(server.bodies) * (prompt + output)
    assert client.ledger.totals()["sent_tokens"] == client.spent_tokens


@pytest.mark.parametrize("said", [
    completion(None, finish="length"), completion(" "), completion(None, refusal="I cannot"),
    completion("", finish="content_filter"),
], ids=["thought", "blank", "refusal", "filter"])  # fmt: skip
def test_an_answer_with_nothing_to_read_was_paid_for(said, tmp_path: Path) -> None:
    """A reasoning model that never comes to a word must run into the limit, and the ledger must say what it took."""
    said = {**said, "usage": {"prompt_tokens": 100, "completion_tokens": 1000, "total_tokens": 1100}}
    prices = {"m": Price(prompt=10.0, cached=0.0, output=100.0)}

    def limited(server: ChatServer, **budget) -> CachedClient:
        cache = ReplyCache(tmp_path / "r.sqlite")
        return CachedClient(client_of(server, concurrency=1), cache, ledger=Ledger(prices), **budget)

    asked = [ask(f"{i:03d}", max_tokens=1000) for i in range(20)]
    with ChatServer(lambda *_: said) as server:
        client = limited(server, max_cost_usd=0.505)  # each costs 100 * 10 + 1000 * 100 = 0.101 dollars
        with pytest.raises(BudgetExceeded):
            client.generate(asked)
        n = len(server.bodies)
        assert n == 5 and client.spent_usd == pytest.approx(0.505)
        assert client.ledger.totals()["sent_usd"] == pytest.approx(0.505), "counted although the run was stopped"
        client.close()
        later = limited(server)
        answers = later.generate(asked)
        again = limited(server)
        assert again.generate(asked) == answers and len(server.bodies) == 20, "paid once"
    assert all(type(a) is Failure for a in answers), "callers see a plain failure"
    totals, repeated = later.ledger.totals(), again.ledger.totals()
    assert totals["failed"] == repeated["failed"] == 20 and totals["sent"] == 15 and repeated["sent"] == 0
    assert totals["cost_usd"] == pytest.approx(20 * 0.101) == repeated["cost_usd"]
    assert totals["sent_usd"] == pytest.approx(15 * 0.101) and repeated["sent_usd"] == 0


def test_other_processes_may_write_while_a_local_block_is_computed(tmp_path: Path) -> None:
    """A block is stored whole; until then nobody may have to wait for it, for it may take minutes."""
    path = tmp_path / "r.sqlite"
    one, other = ReplyCache(path), ReplyCache(path)
    other._db.execute("PRAGMA busy_timeout=100")
    with one.batch(atomic=True):
        one.put("a", {"text": "x"})
        other.put("b", {"text": "y"})
        assert len(other) == 1, "the block is not there in part"
        one.put("c", {"text": "z"})
    assert set(other.get_many(["a", "b", "c"])) == {"a", "b", "c"}
    with pytest.raises(ZeroDivisionError), one.batch(atomic=True):
        one.put("d", {"text": "w"})
        raise ZeroDivisionError
    one.put("e", {"text": "v"})
    assert set(other.get_many(["d", "e"])) == {"e"}


def test_an_old_stored_failure_without_its_price_is_read(tmp_path: Path) -> None:
    cache = ReplyCache(tmp_path / "r.sqlite")
    client = CachedClient(ScriptedClient(lambda r: Failure(code="refusal", stage="generate")), cache)
    [refusal] = client.generate([ask("a")])
    [stored] = cache.get_many([k for k in _keys(cache)]).values()
    assert json.loads(json.dumps(stored)) == {"failure": {**vars(refusal)}} and client.generate([ask("a")]) == [refusal]


def _keys(cache: ReplyCache) -> list[str]:
    return [row[0] for row in cache._db.execute("SELECT key FROM replies")]
