"""What the doors spend, write down and open: budgets over parts, SAEs and judges, the ledger of a stopped run, keys
nowhere, one engine for all."""

import argparse
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
from door_world import answer, make_root
from held_out import random_sae
from loopback import ChatServer, Fault, completion

from autointerp.__main__ import main
from autointerp.client import Capabilities
from autointerp.clients.scripted import ScriptedClient
from autointerp.doors import _places, _Spent
from autointerp.llm_requests import rough_tokens
from autointerp.workplace import forget_clients

PER_REPLY = 14
"""Tokens of every answer of the loop-back server."""
SECRET = "sk-planted-0123456789abcdef"
EXPLAIN, DETECT = ("--explainers", "highlighted,token_list"), ("--scorers", "detection")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("budgets")
    make_root(root)
    return root


@pytest.fixture
def root(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    return Path(shutil.copytree(made, tmp_path / "root"))


Door = Callable[..., int]


@pytest.fixture
def door(root: Path, tiny_lm_dir: Path) -> Door:
    def run(name: str, server: ChatServer, *more: str) -> int:
        common = ["--root", str(root), "--model", str(tiny_lm_dir), "--client", "openai", "--llm", "m",
                  "--base-url", server.url, "--embedder", str(root / "embedder")]  # fmt: skip
        return main([name, *common, *more])

    return run


def reserved(body: dict) -> int:
    """What is set aside for a request before it is sent."""
    return sum(rough_tokens(m["content"]) + 4 for m in body["messages"]) + body["max_tokens"]


@pytest.mark.parametrize("workers", [1, 2])
def test_a_budget_that_pays_for_all_is_not_stopped_by_its_parts(root: Path, door: Door, workers: int) -> None:
    """Four parts, of which a process does several: what one of them spends is not taken from the others twice."""
    whole = shutil.copytree(root, root.parent / "whole")
    with ChatServer(answer) as server:
        assert door("explain", server, *EXPLAIN, "--root", str(whole)) == 0
        n, most = len(server.bodies), max(map(reserved, server.bodies))
    assert n == 8
    parts = ("--part-latents", "2", "--workers", str(workers))
    budget = n * PER_REPLY + (most if workers == 1 else 4 * most + 8)
    with ChatServer(answer) as server:
        assert door("explain", server, *EXPLAIN, *parts, "--max-llm-tokens", str(budget)) == 0
        assert len(server.bodies) == n


def test_a_stopped_run_says_what_it_paid_and_stays_inside_its_budget(root: Path, door: Door, capsys) -> None:
    """The judge's check and all parts draw from one budget; the ledger holds every reply that was sent."""
    prices = root / "prices.json"
    prices.write_text(json.dumps({"m": {"prompt": 1e4, "cached": 0.0, "output": 1e5}}))
    paid = (7 * 1e4 + 3 * 1e5) / 1e6  # of a reply: 11 prompt tokens, 4 of them cached, and 3 more
    with ChatServer(answer) as server:
        assert door("explain", server, "--explainers", "token_list") == 0 and not server.bodies
        limit = ("--prices", str(prices), "--max-cost-usd", "22", "--part-latents", "2")
        assert door("score", server, *DETECT, *limit) == 3
        n = len(server.bodies)
        assert 20 < n < 58 and n * paid <= 22, "not a dollar more, the check of the judge included"
        assert "--max-cost-usd" in capsys.readouterr().err
        ledger = pd.read_parquet(root / "ledgers" / f"score.{random_sae().sae_id}.parquet")
        assert ledger["sent"].sum() == n and ledger["sent_usd"].sum() == pytest.approx(n * paid)
        assert door("score", server, *DETECT, "--part-latents", "2") == 0
        whole = pd.read_parquet(root / "ledgers" / f"score.{random_sae().sae_id}.parquet")
        assert whole["sent"].sum() == len(server.bodies) - n, "what was paid is not paid again"


def test_the_saes_of_a_run_share_one_budget(root: Path, tiny_lm_dir: Path) -> None:
    sae_id = random_sae().sae_id
    shutil.copytree(root / "saes" / sae_id, root / "saes" / f"{sae_id}-b")
    options = argparse.Namespace(
        root=root, sae=[], model=str(tiny_lm_dir), device="cpu", client="openai", llm="m", llm_revision=None,
        base_url="http://127.0.0.1:1/v1", concurrency=4, timeout_s=1.0, next_token=False, replicas=1, vllm=[],
        embedder="none", seed=0, max_llm_tokens=1000, max_cost_usd=2.0, prices=root / "p.json", engine="local",
        workers=1, dry_run=False,
    )  # fmt: skip
    spent, seen = _Spent(), []
    for place, _ in _places(options, spent):
        seen.append((place.sae_id, place.max_tokens, place.max_cost_usd))
        spent.tokens, spent.usd = spent.tokens + 700, spent.usd + 2.5
    assert seen == [(sae_id, 1000, 2.0), (f"{sae_id}-b", 300, 0.0)]


def test_a_batch_holds_no_more_than_its_budget(root: Path, tiny_lm_dir: Path, capsys) -> None:
    """Nothing is sent, and all that is written will be paid for; a batch is that of its command alone."""
    common = ["--root", str(root), "--model", str(tiny_lm_dir), "--client", "batch", "--llm", "m", "--embedder", "none"]
    assert main(["explain", *common, "--explainers", "highlighted"]) == 1 and "pending" in capsys.readouterr().err
    whole = [json.loads(line)["body"] for line in (root / "batch/requests-000.jsonl").read_text().splitlines()]
    assert len(whole) == 8
    budget = sum(sorted(map(reserved, whole))[:5])
    assert main(["explain", *common, "--explainers", "highlighted", "--max-llm-tokens", str(budget)]) == 3
    written = [json.loads(line)["body"] for line in (root / "batch/requests-000.jsonl").read_text().splitlines()]
    assert 0 < len(written) < 8 and sum(map(reserved, written)) <= budget


def test_no_byte_below_the_root_and_no_word_holds_the_key(root: Path, door: Door, monkeypatch, capsys, caplog) -> None:
    """A server that repeats the key in its errors, a run from end to end, and the dataset of it."""
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    caplog.set_level("DEBUG")

    def told(body, n):
        said = body["messages"][-1]["content"]
        if len(said) % 5 == 0:
            return Fault("status", status=400, body={"error": {"message": f"Bearer {SECRET} may not ({SECRET})"}})
        return answer(body, n) if len(said) % 7 else completion(None, refusal=f"not for {SECRET}")

    with ChatServer(told) as server:
        assert door("explain", server, *EXPLAIN) == 0
        assert door("score", server, *DETECT) == 0
        assert main(["export", "--root", str(root), "--out", str(root / "out"), "--accept-licences"]) == 0
        url = server.url.replace("http://", f"http://user:{SECRET}@")
        assert main(["explain", "--root", str(root), "--client", "openai", "--llm", "m", "--base-url", url]) == 2
    written = [p for p in root.rglob("*") if p.is_file()]
    assert len(written) > 20 and {"manifest.json", "replies.sqlite", "README.md"} <= {p.name for p in written}
    assert not [p for p in written if SECRET.encode() in p.read_bytes()]
    items = pd.read_parquet(next((root / "scores").rglob("items.parquet")))
    assert items["failure"].astype(str).str.contains(r"\[key\]").any(), "failures were written, without the key"
    said = capsys.readouterr()
    assert SECRET not in said.out + said.err + caplog.text


def test_a_run_repeats_from_its_replies_alone(root: Path, door: Door, tiny_lm_dir: Path) -> None:
    """No server, no key: the same bytes; and what was never answered is an error, not a call."""
    with ChatServer(answer) as server:
        assert door("explain", server, *EXPLAIN) == 0
        assert door("score", server, *DETECT) == 0

    def records() -> dict[str, bytes]:
        return {p.name: p.read_bytes() for kind in ("explanations", "scores") for p in (root / kind).rglob("*.*")
                if p.suffix in (".jsonl", ".parquet")}  # fmt: skip

    before = records()
    shutil.rmtree(root / "judge_checks")
    common = ["--root", str(root), "--model", str(tiny_lm_dir), "--client", "replay", "--llm", "m", "--force",
              "--embedder", str(root / "embedder")]  # fmt: skip
    assert main(["explain", *common, *EXPLAIN]) == 0
    assert main(["score", *common, *DETECT]) == 0
    assert records() == before and len(before) == 6
    assert main(["score", *common, "--scorers", "fuzzing"]) == 2


# --- engines ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    """The options of every client of vLLM that was opened."""
    opened: list[dict] = []

    def plugin(**options):
        opened.append(options)
        able = Capabilities(structured="json_schema")
        return ScriptedClient(lambda r: '{"explanation": "x", "match": []}', model="m", capabilities=able)

    monkeypatch.setattr("autointerp.clients.vllm.PLUGIN", plugin)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    forget_clients()
    yield opened
    forget_clients()


def vllm(root: Path, lm: Path, name: str, *more: str) -> int:
    common = ["--root", str(root), "--model", str(lm), "--client", "vllm", "--llm", "m"]
    return main([name, *common, "--embedder", str(root / "embedder"), *more])


def test_one_client_of_engines_serves_saes_parts_and_judges(root: Path, tiny_lm_dir: Path, engines) -> None:
    """A second engine on the same GPU would not find the memory."""
    more = ("--replicas", "2", "--vllm", "max_model_len=512", "--vllm", "enforce_eager=true", "--part-latents", "3")
    assert vllm(root, tiny_lm_dir, "explain", *more, "--explainers", "highlighted", "--max-llm-tokens", "900000") == 0
    assert vllm(root, tiny_lm_dir, "score", *more, *DETECT) == 0
    assert engines == [{"model": "m", "replicas": 2, "max_model_len": 512, "enforce_eager": True}]


def test_a_plan_with_engines_opens_none(root: Path, tiny_lm_dir: Path, engines, capsys, monkeypatch) -> None:
    prices = root / "prices.json"
    prices.write_text(json.dumps({"m": {"prompt": 1000.0, "cached": 0.0, "output": 1000.0}}))
    more = ("--dry-run", "--replicas", "2", "--explainers", "highlighted")
    assert vllm(root, tiny_lm_dir, "explain", *more, "--prices", str(prices)) == 0
    said = capsys.readouterr().out
    assert "vllm: 2 engines side by side on GPU 0 | 1" in said and "explain.highlighted" in said
    assert "US dollars" in said and "total" in said
    assert vllm(root, tiny_lm_dir, "explain", *more, "--vllm", "tensor_parallel_size=2") == 2
    assert "2 vLLM engines of 2 GPU each need 4, and 2 are visible" in capsys.readouterr().err
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert vllm(root, tiny_lm_dir, "explain", *more) == 0
    assert "2 engines side by side on the processor" in capsys.readouterr().out
    assert engines == []


@pytest.mark.parametrize(("client", "more", "said"), [
    ("vllm", ("--replicas", "0"), "replicas must be at least 1"),
    ("vllm", ("--replicas", "3"), "need 3, and 2 are visible"),
    ("openai", ("--replicas", "2"), "give --client vllm"),
    ("transformers", ("--vllm", "max_model_len=8"), "give --client vllm"),
    ("vllm", ("--vllm", "max_model_length=8"), "did you mean 'max_model_len'"),
    ("vllm", ("--vllm", "max_model_len=long"), "expected max_model_len=int"),
    ("vllm", ("--vllm", "quantization=fp8"), "no option of ours"),
    ("vllm", ("--workers", "2"), "--replicas gives it more engines"),
    ("vllm", ("--engine", "ray"), "works in one process"),
    ("batch", ("--workers", "2"), "works in one process"),
    ("openai", ("--max-cost-usd", "1"), "--prices FILE"),
    ("openai", ("--llm-revision", "2"), "add --llm NAME"),
])  # fmt: skip
def test_what_cannot_be_is_said_before_anything_is_opened(tmp_path, engines, capsys, client, more, said) -> None:
    common = ["--root", str(tmp_path / "nowhere"), "--model", str(tmp_path / "no-model"), "--client", client]
    assert main(["explain", *common, *more]) == 2
    assert said in capsys.readouterr().err and engines == []


def test_two_models_of_one_name_are_told_apart(root: Path, door: Door) -> None:
    with ChatServer(answer) as server:
        for revision, n in ((), 8), (("--llm-revision", "b"), 16), (("--llm-revision", "b"), 16):
            assert door("explain", server, *EXPLAIN, *revision, "--force") == 0
            assert len(server.bodies) == n
