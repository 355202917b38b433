"""Contract suite of the clients: order, faults, exact log-probabilities, imports, keys."""

import asyncio
import subprocess
import sys
import time
from email.utils import formatdate
from pathlib import Path

import pytest
from loopback import ChatServer, Fault, completion

from autointerp.client import (
    CachedClient,
    GenerateRequest,
    Message,
    NextTokenRequest,
    Reply,
    open_client,
)
from autointerp.clients.openai import OpenAIClient, Retries
from autointerp.clients.scripted import ScriptedClient
from autointerp.records import Failure
from autointerp.reply_cache import ReplyCache
from sae.errors import ArtefactError, BudgetExceeded, ConfigError, SaescopeError, Unsupported
from sae.plugins import find, names

FAST = Retries(attempts=4, first_delay_s=0.01, max_delay_s=0.05, total_s=200)
SCHEMA = {"type": "object", "properties": {"match": {"type": "array"}}, "required": ["match"]}
SECRET = "sk-planted-0123456789abcdef"


@pytest.fixture(autouse=True)
def loopback_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def ask(text: str, **options) -> GenerateRequest:
    options = {"max_tokens": 8, **options}
    return GenerateRequest(messages=(Message(role="user", content=text),), **options)


def server_client(server: ChatServer, **options) -> OpenAIClient:
    options = {"retries": FAST, "timeout_s": 60.0, **options}  # a busy machine is slow
    return OpenAIClient(model="m", base_url=server.url, **options)


# --- all clients -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", names("autointerp.clients"))
def test_importing_a_client_imports_no_backend(name: str) -> None:
    program = (
        f"import sys; import autointerp.clients.{name};"
        "bad = {'torch', 'transformers', 'openai', 'vllm', 'httpx2', 'httpx'} & set(sys.modules); print(sorted(bad))"
    )
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert said.stdout.strip() == "[]"


@pytest.mark.parametrize("name", names("autointerp.clients"))
def test_every_client_has_the_protocol(name: str) -> None:
    plugin = find("autointerp.clients", name)
    assert callable(plugin.generate) and callable(plugin.logprobs)


# --- openai ----------------------------------------------------------------------------------------------------------


def test_replies_come_in_order_with_their_usage() -> None:
    def answer(body, n):
        time.sleep(0.05 if body["messages"][-1]["content"] == "0" else 0)
        return completion("R" + body["messages"][-1]["content"])

    with ChatServer(answer) as server:
        replies = server_client(server).generate([ask(str(i)) for i in range(40)])
    assert [r.text for r in replies] == [f"R{i}" for i in range(40)]
    assert (replies[0].usage.prompt_tokens, replies[0].usage.cached_tokens, replies[0].usage.output_tokens) == (
        11,
        4,
        3,
    )


def test_every_fault_ends_as_reply_or_typed_failure_none_lost() -> None:
    """One request per fault, among good ones; what recovers is a reply, what does not is its own failure."""
    once = {
        "sleep": Fault("sleep", body=1.5), "429": Fault("status", status=429, body={"error": {"message": "slow"}}),
        "429 after": Fault("status", status=429, headers={"retry-after": "0.1"}, body={}),
        "429 date": Fault("status", status=429, headers={"retry-after": formatdate(time.time(), usegmt=True)}, body={}),
        "500": Fault("status", status=500, body={}), "503": Fault("status", status=503, body=b"<html>no</html>"),
        "cut": Fault("truncated", body=completion("x")), "reset": Fault("reset"),
    }  # fmt: skip
    always = {
        "always sleep": (Fault("sleep", body=1.5), "timeout"),
        "always 429": (Fault("status", status=429, body={}), "rate_limited"),
        "always 500": (Fault("status", status=500, body={}), "server_error"),
        "always cut": (Fault("truncated", body=completion("x")), "server_error"),
        "always reset": (Fault("reset"), "connection"),
        "shape": ({"hello": 1}, "schema"),
        "shape 2": ({"choices": [{"message": 3}]}, "schema"),
        "list": ([1, 2], "schema"),
        "no choices": ({"choices": []}, "empty"),
        "refusal": (completion(None, refusal="I cannot"), "refusal"),
        "filter": (completion("", finish="content_filter"), "refusal"),
        "blank": (completion("  "), "empty"),
        "thought too long": (completion(None, finish="length"), "truncated"),
        "too long": (
            Fault("status", status=400, body={"error": {"code": "context_length_exceeded"}}),
            "prompt_too_long",
        ),
        "bad request": (Fault("status", status=400, body={"error": {"message": "what?"}}), "unsupported"),
    }
    good = [f"good {i}" for i in range(12)]

    def answer(body, n):
        text = body["messages"][-1]["content"]
        if text in once and n == 0:
            return once[text]
        return always[text][0] if text in always else completion("R " + text)

    asked = [t for pair in zip([*once, *always], (good * 2)[: len(once) + len(always)], strict=True) for t in pair]
    heard: list[int] = []
    with ChatServer(answer) as server:
        client = server_client(server, timeout_s=0.4)
        answers = client.generate([ask(t) for t in asked], on_reply=lambda i, a: heard.append(i))
        sent = [b["messages"][-1]["content"] for b in server.bodies]
    assert len(answers) == len(asked) and sorted(heard) == list(range(len(asked)))
    for text, got in zip(asked, answers, strict=True):
        if text in always:
            assert isinstance(got, Failure) and got.code == always[text][1], (text, got)
        else:
            assert isinstance(got, Reply) and got.text == f"R {text}", (text, got)
    assert all(sent.count(t) == 2 for t in once)
    assert sent.count("always 500") == sent.count("always reset") == FAST.attempts
    assert sent.count("bad request") == sent.count("refusal") == 1  # never retried


def test_retry_after_is_waited_for() -> None:
    limited = Fault("status", status=429, headers={"retry-after": "0.4"}, body={})
    with ChatServer(lambda body, n: limited if n == 0 else completion("x")) as server:
        started = time.monotonic()
        assert server_client(server).generate([ask("a")])[0].text == "x"
    assert time.monotonic() - started >= 0.4


def test_429_lowers_the_number_in_flight() -> None:
    def answer(body, n):
        time.sleep(0.02)
        return Fault("status", status=429, body={}) if n == 0 else completion("x")

    with ChatServer(answer) as server:
        client = server_client(server, concurrency=16)
        replies = client.generate([ask(str(i)) for i in range(60)])
        assert all(isinstance(r, Reply) for r in replies)
        assert server.most_in_flight <= 16


def test_a_server_that_was_away_is_tried_once_until_it_is_back() -> None:
    """Explanations of one SAE after another: each would wait half a minute for a server that is not there."""
    with ChatServer(lambda body, n: completion("x")) as gone:
        pass
    client = server_client(gone)
    said = [client.generate([ask("a"), ask("b")]) for _ in range(2)]
    assert all(isinstance(r, Failure) and r.code == "connection" for replies in said for r in replies)
    assert [replies[0].detail.split(":")[0] for replies in said] == ["4 attempts", "1 attempts"]
    with ChatServer(lambda body, n: Fault("reset") if n == 2 else completion("x")) as back:
        client.base_url = back.url
        assert [r.text for r in client.generate([ask("a"), ask("b")])] == ["x", "x"]
        assert client.generate([ask("c")])[0].text == "x"  # insisted on again


def test_many_requests_fly_at_once() -> None:
    def answer(body, n):
        time.sleep(0.1)
        return completion("x")

    with ChatServer(answer) as server:
        started = time.monotonic()
        server_client(server).generate([ask(str(i)) for i in range(64)])
        elapsed = time.monotonic() - started
        assert server.most_in_flight > 8
    assert elapsed < 64 * 0.1 / 2  # one after another takes 6.4 s


@pytest.mark.parametrize(
    ("status", "body", "kind", "said"),
    [
        (401, {"error": {"message": f"Incorrect API key provided: {SECRET}"}}, ConfigError, "OPENAI_API_KEY"),
        (403, {}, ConfigError, "refused the key"),
        (404, {"error": {"message": "model not found"}}, ConfigError, "no model 'm'"),
        (402, {}, BudgetExceeded, "no credit"),
        (429, {"error": {"code": "insufficient_quota"}}, BudgetExceeded, "no credit"),
    ],
)
def test_what_cannot_get_better_stops_the_run_once(status, body, kind, said, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)

    def answer(sent, n):
        return completion("x") if sent["messages"][-1]["content"] == "0" else Fault("status", status=status, body=body)

    with ChatServer(answer) as server:
        client = CachedClient(server_client(server), ReplyCache(tmp_path / "r.sqlite"))
        with pytest.raises(kind, match=said) as caught:
            client.generate([ask(str(i)) for i in range(200)])
        assert len(server.bodies) <= 40  # those in flight, no retries
    assert SECRET not in str(caught.value)
    assert len(client.cache) == 1  # the reply in flight was kept


def test_a_dead_server_stops_the_run() -> None:
    with ChatServer(lambda body, n: completion("x")) as server:
        pass  # closed: nobody listens there any more
    with pytest.raises(SaescopeError, match="48 times in a row"):
        server_client(server).generate([ask(str(i)) for i in range(100)])


def test_bad_requests_alone_do_not_pass_for_a_dead_server() -> None:
    """A resumed run asks nothing but what failed before: it must end, not stop at the eighth."""

    def answer(body, n):
        text = body["messages"][-1]["content"]
        return Fault("status", status=500, body={}) if text.startswith("bad") else completion("yes")

    with ChatServer(answer) as server:
        answers = server_client(server).generate([ask(f"bad {i}") for i in range(30)])
        others = {b["messages"][-1]["content"] for b in server.bodies if not b["messages"][-1]["content"][:3] == "bad"}
    assert [a.code for a in answers] == ["server_error"] * 30 and len(others) == 1


def test_a_server_that_only_says_500_stops_the_run() -> None:
    with ChatServer(lambda body, n: Fault("status", status=500, body={})) as server:
        with pytest.raises(SaescopeError, match="48 times in a row.*server_error"):
            server_client(server, concurrency=4).generate([ask(str(i)) for i in range(500)])
        assert len(server.bodies) <= 48 + 4 + FAST.attempts  # those, what was in flight, and the last question


def test_structured_output_is_lowered_where_the_server_does_not_know_it() -> None:
    def answer(body, n):
        kind = body.get("response_format", {}).get("type")
        if kind is not None:
            return Fault("status", status=400, body={"error": {"message": f"response_format {kind} is not supported"}})
        return completion('{"match": []}')

    with ChatServer(answer) as server:
        client = server_client(server)
        assert all(isinstance(r, Reply) for r in client.generate([ask(str(i), schema=SCHEMA) for i in range(5)]))
        assert client.structured == "parse"
        sent = len(server.bodies)
        client.generate([ask("later", schema=SCHEMA)])
        assert len(server.bodies) == sent + 1


def test_reasoning_models_get_their_own_limit() -> None:
    def answer(body, n):
        if "max_tokens" in body:
            said = "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead."
            return Fault("status", status=400, body={"error": {"message": said}})
        return completion(str(body["max_completion_tokens"]))

    with ChatServer(answer) as server:
        assert server_client(server).generate([ask("a", max_tokens=77)])[0].text == "77"


def test_each_request_keeps_its_own_sampling() -> None:
    with ChatServer(lambda body, n: completion("x")) as server:
        server_client(server).generate([ask("a", max_tokens=1), ask("b", max_tokens=200, temperature=0.8, seed=5)])
        by_text = {b["messages"][-1]["content"]: b for b in server.bodies}
    assert (by_text["a"]["max_tokens"], by_text["a"]["temperature"]) == (1, 0.0)
    assert (by_text["b"]["max_tokens"], by_text["b"]["temperature"], by_text["b"]["seed"]) == (200, 0.8, 5)


def test_first_token_logprobs_from_the_top_list() -> None:
    top = [{"token": "Yes", "logprob": -0.1, "bytes": None}, {"token": "No", "logprob": -2.5, "bytes": None}]

    def answer(body, n):
        said = completion("Yes")
        said["choices"][0]["logprobs"] = {"content": [{"token": "Yes", "logprob": -0.1, "top_logprobs": top}]}
        return said

    request = NextTokenRequest(messages=(Message(role="user", content="q"),), choices=("Yes", "No", "Maybe"))
    with ChatServer(answer) as server:
        assert server_client(server, next_token=True).logprobs([request])[0].rows == ((-0.1, -2.5, None),)
        with pytest.raises(Unsupported):
            server_client(server).logprobs([request])
        bare = ChatServer(lambda body, n: completion("Yes"))
        with bare:
            assert server_client(bare, next_token=True).logprobs([request])[0].code == "unsupported"


def test_no_written_byte_and_no_message_holds_the_key(tmp_path, monkeypatch, caplog) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    caplog.set_level("DEBUG")

    def answer(body, n):
        text = body["messages"][-1]["content"]
        said = {"error": {"message": f"bad {SECRET} and Bearer {SECRET}"}}
        return Fault("status", status=400, body=said) if text == "bad" else completion("fine")

    with ChatServer(answer) as server:
        client = open_client(
            "openai", replies=tmp_path / "r.sqlite", keep_requests=True, model="m", base_url=server.url, retries=FAST
        )
        answers = client.generate([ask("good"), ask("bad")])
        client.ledger.write(tmp_path / "ledger.parquet")
        client.close()
    assert answers[1].code == "unsupported" and "[key]" in answers[1].detail
    written = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert len(written) >= 2
    assert all(SECRET.encode() not in p.read_bytes() for p in written)
    assert SECRET not in repr(answers) and SECRET not in repr(vars(client.backend)) and SECRET not in caplog.text


def test_it_works_inside_a_running_event_loop() -> None:
    with ChatServer(lambda body, n: completion("x")) as server:
        client = server_client(server)

        async def notebook() -> list:
            return client.generate([ask("a")])

        assert asyncio.run(notebook())[0].text == "x"


def test_what_is_missing_is_said_at_construction() -> None:
    with pytest.raises(ConfigError, match="--llm"):
        OpenAIClient(base_url="http://127.0.0.1:1/v1")
    with pytest.raises(ConfigError, match="OPENAI_API_KEY"):
        OpenAIClient(model="m")
    for url in ("localhost:8000/v1", "ftp://host/v1", "http://"):
        with pytest.raises(ConfigError, match="begins with http"):
            OpenAIClient(model="m", base_url=url)
    for url in (f"http://me:{SECRET}@host/v1", f"https://host/v1?key={SECRET}"):
        with pytest.raises(ConfigError, match="keys are read from OPENAI_API_KEY") as caught:
            OpenAIClient(model="m", base_url=url)
        assert SECRET not in str(caught.value)


# --- replay ----------------------------------------------------------------------------------------------------------


def test_replay_repeats_and_refuses_what_it_does_not_hold(tmp_path: Path) -> None:
    path = tmp_path / "r.sqlite"
    live = open_client("scripted", replies=path, answer=lambda r: "R" + r.messages[0].content, model="big")
    replies = live.generate([ask("a"), ask("b")])
    live.close()
    replay = open_client("replay", replies=path)
    assert replay.identity.model == "big"
    assert replay.generate([ask("b"), ask("a")]) == replies[::-1]
    with pytest.raises(ArtefactError, match="1 of 1 requests"):
        replay.generate([ask("a"), ask("new")])
    open_client("scripted", replies=path, answer=lambda r: "x", model="other").close()
    with pytest.raises(ConfigError, match="2 models fit"):
        open_client("replay", replies=path)
    assert open_client("replay", replies=path, model="other").identity.model == "other"


def test_a_script_that_runs_out_fails_and_does_not_invent() -> None:
    answers = ScriptedClient(queue=["a"]).generate([ask("1"), ask("2")])
    assert answers[0].text == "a" and answers[1].code == "connection"
