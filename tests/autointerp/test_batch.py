"""Batch files: what is written is what would have been sent; what is read is what the ordinary client would find."""

import json
from pathlib import Path

import pytest
from held_out import random_sae, stores
from judges import TOKENIZER
from loopback import ChatServer, completion

from autointerp import batch_files, pipeline
from autointerp.__main__ import main
from autointerp.batch_files import read_replies
from autointerp.client import GenerateRequest, Message, NextTokenRequest, open_client
from autointerp.config import ExemplarConfig
from autointerp.exemplars import build_exemplars
from autointerp.explainers.highlighted import PLUGIN as Highlighted
from autointerp.explainers.token_activation import PLUGIN as TokenActivation
from autointerp.interfaces import ExplainContext, ScoreContext
from autointerp.latent_cache import build_latents
from autointerp.records import Failure
from autointerp.reply_cache import ReplyCache
from autointerp.scorers.detection import PLUGIN as Detection
from autointerp.scorers.fuzzing import PLUGIN as Fuzzing
from sae.errors import ConfigError, DataError, NoAnswer, Unsupported

SCHEMA = {"type": "object", "properties": {"match": {"type": "array"}}, "required": ["match"]}


def ask(text: str, **options) -> GenerateRequest:
    return GenerateRequest(messages=(Message(role="user", content=text),), **{"max_tokens": 8, **options})


def batch(root: Path, **options):
    return open_client("batch", replies=root / "replies.sqlite", model="m", folder=root / "batch", **options)


def written(root: Path) -> list[dict]:
    files = sorted((root / "batch").glob("*.jsonl"))
    return [json.loads(line) for f in files for line in f.read_text().splitlines()]


def answered(entries, path: Path, answer) -> Path:
    """An output file as OpenAI writes it, in another order."""
    lines = [
        {"id": f"batch_req_{i}", "custom_id": e["custom_id"], "error": None, "response": answer(e["body"])}
        for i, e in enumerate(reversed(entries))
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def echo(body) -> dict:
    return {"status_code": 200, "request_id": "r", "body": completion("R " + body["messages"][-1]["content"])}


REQUESTS = [ask("plain"), ask("ünïcode \u2028 text", temperature=0.8, seed=3), ask("shaped", schema=SCHEMA)]


def test_the_bodies_are_those_of_the_ordinary_client(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    answers = batch(tmp_path).generate(REQUESTS)
    assert {a.code for a in answers} == {"pending"} and "requests-000.jsonl" in answers[0].detail
    entries = written(tmp_path)
    assert {(e["method"], e["url"]) for e in entries} == {("POST", "/v1/chat/completions")}
    with ChatServer(lambda body, n: completion("x")) as server:
        open_client("openai", model="m", base_url=server.url).generate(REQUESTS)
        sent = server.bodies
    order = lambda body: body["messages"][-1]["content"]  # noqa: E731
    assert sorted((e["body"] for e in entries), key=order) == sorted(sent, key=order)


def test_an_answered_batch_is_nothing_but_hits(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    batch(tmp_path).generate(REQUESTS)
    output = answered(written(tmp_path), tmp_path / "out.jsonl", echo)
    assert main(["batch-read", str(output), "--root", str(tmp_path)]) == 0
    assert "3 replies stored" in capsys.readouterr().out
    again = batch(tmp_path)
    replies = again.generate(REQUESTS)
    assert [r.text for r in replies] == ["R " + r.messages[-1].content for r in REQUESTS]
    assert replies[0].usage.prompt_tokens == 11 and replies[0].usage.cached_tokens == 4
    with ChatServer(lambda body, n: completion("other")) as server:
        client = open_client("openai", replies=tmp_path / "replies.sqlite", model="m", base_url=server.url)
        assert client.generate(REQUESTS) == replies and server.bodies == []
    assert read_replies([output], ReplyCache(tmp_path / "replies.sqlite")) == (0, 3, {})


def test_failed_lines_are_counted_and_asked_again(tmp_path: Path) -> None:
    requests = [ask(f"q {i}") for i in range(6)]
    batch(tmp_path).generate(requests)

    def answer(body):
        i = int(body["messages"][-1]["content"][2:])
        return [
            echo(body), {"status_code": 500, "body": {"error": "x"}}, {"status_code": 429, "body": {}}, None,
            {"status_code": 200, "body": completion(None, refusal="I cannot")}, {"status_code": 200, "body": {"a": 1}},
        ][i]  # fmt: skip

    output = answered(written(tmp_path), tmp_path / "out.jsonl", answer)
    result = read_replies([output], ReplyCache(tmp_path / "replies.sqlite"))
    assert result == (2, 0, {"rate_limited": 1, "schema": 1, "server_error": 2})
    answers = batch(tmp_path).generate(requests)
    assert [a.code if isinstance(a, Failure) else a.text for a in answers] == [
        "R q 0", "pending", "pending", "pending", "refusal", "pending"
    ]  # fmt: skip
    assert sorted(e["body"]["messages"][0]["content"] for e in written(tmp_path)) == ["q 1", "q 2", "q 3", "q 5"]


def test_files_keep_within_the_limits_and_replace_older_ones(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(batch_files, "MAX_REQUESTS", 4)
    client = batch(tmp_path)
    client.generate([ask(f"first {i}") for i in range(5)])
    client.generate([ask(f"second {i}") for i in range(5)])  # one run, one set of files
    assert [len(f.read_text().splitlines()) for f in sorted((tmp_path / "batch").iterdir())] == [4, 4, 2]
    monkeypatch.setattr(batch_files, "MAX_BYTES", 500)
    batch(tmp_path).generate([ask("x" * 150 + str(i)) for i in range(3)])
    sizes = [f.stat().st_size for f in sorted((tmp_path / "batch").iterdir())]
    assert len(sizes) == 3 and max(sizes) <= 500
    assert len({e["custom_id"] for e in written(tmp_path)}) == 3


@pytest.mark.parametrize(
    ("content", "says"),
    [("{", "line 1"), ('{"custom_id": "abc"}', "no request key"), ("[1]", "line 1"), ("\n\n{}", "line 1"),
     (json.dumps({"custom_id": "a" * 64, "body": {}}), "file of requests")],
)  # fmt: skip
def test_a_wrong_file_is_named(tmp_path: Path, content: str, says: str) -> None:
    (tmp_path / "f.jsonl").write_text(content)
    with pytest.raises(DataError, match=says):
        read_replies([tmp_path / "f.jsonl"], ReplyCache(tmp_path / "r.sqlite"))
    with pytest.raises(DataError, match="absent"):
        read_replies([tmp_path / "absent.jsonl"], ReplyCache(tmp_path / "r.sqlite"))


def test_a_door_without_a_cache_says_what_to_do(tmp_path: Path, capsys) -> None:
    (tmp_path / "f.jsonl").write_text("")
    assert main(["batch-read", str(tmp_path / "f.jsonl"), "--root", str(tmp_path)]) == 2
    assert "no reply cache" in capsys.readouterr().err


def test_what_a_batch_cannot_do_is_said_before() -> None:
    with pytest.raises(ConfigError, match="--llm"):
        open_client("batch", folder="x")
    client = open_client("batch", folder="x", model="m")
    request = NextTokenRequest(messages=(Message(role="user", content="q"),), choices=("Yes",))
    with pytest.raises(Unsupported):
        client.logprobs([request])


def test_a_run_by_batches_takes_a_round_to_explain_one_to_choose_and_one_to_score(tmp_path: Path) -> None:
    cfg = ExemplarConfig(
        window_tokens=12, min_window_tokens=4, left_tokens=8, explain_top=6, explain_silent=5, explain_random=4,
        calibrate_positive=4, calibrate_silent=4, score_positive=8, score_silent=8, score_hard=2, min_windows=(6, 3, 8),
    )  # fmt: skip
    cache = build_latents(tmp_path, random_sae(), stores(tmp_path), window_tokens=12, min_window_tokens=4)
    exemplars = build_exemplars(tmp_path, cache, cache.eligible(cfg)[:3], cfg)

    def run() -> Path:
        client = batch(tmp_path)
        ctx = ExplainContext(client=client, tokenizer=TOKENIZER)
        explained = pipeline.explain(tmp_path, exemplars, [Highlighted(), TokenActivation()], ctx)
        scoring = ScoreContext(client=client, tokenizer=TOKENIZER)
        return pipeline.score(tmp_path, explained, exemplars, [Detection(), Fuzzing()], scoring)

    def answer(body) -> dict:
        names = body["response_format"]["json_schema"]["schema"]["required"]
        said = {"explanation": "a letter"} if names == ["explanation"] else {"match": [1]}
        return {"status_code": 200, "body": completion(json.dumps(said))}

    rounds = []
    for _ in range(5):
        try:
            folder = run()
            break
        except NoAnswer as waits:
            assert "pending" in str(waits) and "batch-read" in str(waits)
        rounds.append({e["body"]["response_format"]["json_schema"]["schema"]["required"][0] for e in written(tmp_path)})
        output = answered(written(tmp_path), tmp_path / "out.jsonl", answer)
        assert read_replies([output], ReplyCache(tmp_path / "replies.sqlite")).failed == {}
    # Without an embedder a judge chooses among the texts, which takes a round of its own.
    assert rounds == [{"explanation"}, {"match"}, {"match"}]
    found = pipeline.open_scores(folder)
    assert {s.scorer for s in found.scores} == {"detection", "fuzzing"} and not any(i.failure for i in found.items)
