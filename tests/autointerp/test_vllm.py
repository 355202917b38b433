"""The vllm client: exact values whichever way the engine can give them, sampling per request, clear refusals.

In the ordinary environment a small model answers in the engine's place (tests/support/tiny_vllm.py). `make llm VLLM=1`
runs the same contract on the real engine, with the embedded model on a processor.
"""

import importlib.util
import json
import sys

import pytest
import tiny_vllm
import torch

from autointerp.client import ContinuationRequest, GenerateRequest, Message, NextTokenRequest, Reply, SlotRequest
from autointerp.clients.vllm import PLUGIN as VllmClient
from autointerp.engine_options import engine_options
from autointerp.records import Failure
from autointerp.vllm_engine import device_slices, shared_out
from sae.errors import ConfigError, MissingExtra, SaescopeError
from sae.tokens import prefix_id

WAYS = ("right", "stale", "once", "none")
REAL = importlib.util.find_spec("vllm") is not None


def ask(text: str, **options) -> GenerateRequest:
    return GenerateRequest(messages=(Message(role="user", content=text),), **{"max_tokens": 8, **options})


@pytest.fixture
def client(tiny_lm_dir, monkeypatch: pytest.MonkeyPatch):
    """``client(fixed)``: the client over the stand-in."""
    monkeypatch.setitem(sys.modules, "vllm", tiny_vllm)
    monkeypatch.setattr("autointerp.clients.vllm.require_vllm", lambda: None)
    return lambda fixed="right", **options: VllmClient(model=str(tiny_lm_dir), fixed=fixed, **options)


def plain(lm, ids: list[int]) -> torch.Tensor:
    return torch.log_softmax(lm.logits(torch.tensor([ids]))[0], -1)


# --- mechanics, on the stand-in --------------------------------------------------------------------------------------


@pytest.mark.skipif(REAL, reason="vllm is installed here")
def test_without_vllm_the_extra_is_named() -> None:
    with pytest.raises(MissingExtra, match=r"pip install 'saescope\[vllm\]'"):
        VllmClient(model="default")


def test_the_fixed_id_path_is_used_only_where_it_is_right(client) -> None:
    assert {way: client(way).fixed_ids for way in WAYS} == {"right": True, "stale": False, "once": True, "none": False}


@pytest.mark.parametrize("way", WAYS)
def test_log_probabilities_equal_plain_passes(client, tiny_lm, way: str) -> None:
    """Twice, since the second answer may come from a warm cache."""
    one = client(way)
    encode = one.tokenizer.encode
    prompt, ends = "the cat sat", (" on a mat", " there", "!")
    ids = encode("a b c d e f", add_special_tokens=False)
    requests = [
        ContinuationRequest(prompt=prompt, continuations=ends),
        SlotRequest(ids=tuple(ids), positions=(2, 5, len(ids) - 1), token_ids=(40, 50, 60)),
        SlotRequest(ids=tuple(ids), positions=(0,), token_ids=(40,)),
        NextTokenRequest(messages=(Message(role="user", content="yes or no"),), choices=("y", "no", "n")),
    ]
    for _ in range(2):
        continued, slots, first, choice = one.logprobs(requests)
        head = [int(prefix_id(one.tokenizer)), *encode(prompt, add_special_tokens=False)]
        for end, total, count in zip(ends, continued.sums, continued.counts, strict=True):
            tail = encode(end, add_special_tokens=False)
            rows = plain(tiny_lm, head + tail)[len(head) - 1 : -1]
            assert count == len(tail)
            assert total == pytest.approx(sum(float(r[i]) for r, i in zip(rows, tail, strict=True)), abs=1e-3)
        table = plain(tiny_lm, ids)
        for position, row in zip((2, 5, len(ids) - 1), slots.rows, strict=True):
            assert row == pytest.approx([float(table[position][i]) for i in (40, 50, 60)], abs=1e-4)
        assert first.rows == (pytest.approx((float(table[0][40]),), abs=1e-4),)
        y, two_tokens, n = choice.rows[0]
        assert y is not None and n is not None and two_tokens is None, "'no' is two byte tokens"


def test_each_request_keeps_its_own_sampling(client) -> None:
    one = client()
    schema = {"type": "object", "properties": {"odd": {"type": "integer"}}, "required": ["odd"]}
    asked = [ask("a", max_tokens=1), ask("b", temperature=0.7, seed=5, top_p=0.9), ask("c", schema=schema, stop=("Q",))]
    one.engine.llm.params.clear()
    replies = one.generate(asked)
    a, b, c = one.engine.llm.params
    assert (a.max_tokens, b.max_tokens) == (1, 8) and (a.temperature, b.temperature) == (0.0, 0.7)
    assert (b.seed, b.top_p) == (5, 0.9) and not hasattr(a, "seed")
    assert c.structured_outputs.json == schema and c.stop == ["Q"] and not hasattr(a, "structured_outputs")
    assert all(isinstance(r, Reply | Failure) for r in replies)
    assert replies[0].usage.output_tokens == 1 and replies[0].usage.cached_tokens == 3


def test_order_blocks_and_reports(client, monkeypatch: pytest.MonkeyPatch) -> None:
    one = client()
    asked = [ask("x" * n, max_tokens=2) for n in range(1, 8)]
    whole = one.generate(asked)
    monkeypatch.setattr("autointerp.clients.vllm.BLOCK_REQUESTS", 3)
    seen: list[int] = []
    assert one.generate(asked, lambda i, _: seen.append(i)) == whole and seen == list(range(7))
    assert one.generate([]) == [] and one.logprobs([]) == []


def test_what_does_not_fit_is_a_failure_of_its_own(client) -> None:
    one = client()
    good, bad = one.generate([ask("short"), ask("x" * 300)])
    assert isinstance(good, Reply) and bad.code == "prompt_too_long" and "200" in bad.detail
    [long] = one.logprobs([ContinuationRequest(prompt="y" * 300, continuations=(" z",))])
    assert long.code == "prompt_too_long"


def test_work_is_shared_out_in_runs_of_neighbours() -> None:
    for sizes, n in (([1] * 10, 3), ([100, 1, 1, 1], 2), ([], 2), ([5], 4), ([3, 1, 4, 1, 5, 9, 2, 6], 3)):
        parts = shared_out(sizes, n)
        assert len(parts) == n and [i for p in parts for i in p] == list(range(len(sizes)))
    assert [len(p) for p in shared_out([1] * 12, 4)] == [3, 3, 3, 3]
    assert device_slices(2, 2, "4,5,6,7") == ["4,5", "6,7"] and device_slices(1, 1, "GPU-8f, GPU-9a") == ["GPU-8f"]
    assert device_slices(3, 1, "") == [None] * 3, "no GPU is to be seen: the processor"
    with pytest.raises(ConfigError, match="need 4, and 3"):
        device_slices(2, 2, "0,1,2")


def test_options_of_engines_are_read_strictly() -> None:
    """What they may say is where an engine runs; what would change an answer is no part of a reply's key."""
    texts = ("max_model_len=8192", "gpu_memory_utilization=0.5", "enforce_eager=False", "tensor_parallel_size=2")
    found = engine_options("vllm", 2, texts)
    assert found == {"max_model_len": 8192, "gpu_memory_utilization": 0.5, "enforce_eager": False,
                     "tensor_parallel_size": 2}  # fmt: skip
    assert engine_options("openai", 1, ()) == {}
    for client, replicas, wrong in (
        ("vllm", 0, ()), ("vllm", -1, ()), ("openai", 2, ()), ("openai", 1, ("max_model_len=1",)),
        ("vllm", 1, ("max_model_len",)), ("vllm", 1, ("enforce_eager=maybe",)), ("vllm", 1, ("dtype=float16",)),
        ("vllm", 1, ("tensor_parallel_size=0",)),
    ):  # fmt: skip
        with pytest.raises(ConfigError):
            engine_options(client, replicas, wrong)


@pytest.mark.slow
def test_replicas_answer_as_one_engine_does(client, tiny_lm_dir, tmp_path, monkeypatch) -> None:
    """Two engines in processes of their own."""
    (tmp_path / "vllm.py").write_text("from tiny_vllm import *\nfrom tiny_vllm import sampling_params\n")
    monkeypatch.syspath_prepend(tmp_path)  # spawned processes get this path
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    alone, both = client(), client(replicas=2)
    try:
        asked = [ask("x" * n, max_tokens=3) for n in range(1, 9)]
        assert both.generate(asked) == alone.generate(asked) and both.identity == alone.identity
        slots = [SlotRequest(ids=tuple(range(10, 20 + n)), positions=(4, 7), token_ids=(40, 41)) for n in range(4)]
        assert both.logprobs(slots) == alone.logprobs(slots)
        [process] = both.engine._pools[1]._processes.values()
        process.kill()
        with pytest.raises(SaescopeError, match="one of 2 vLLM engines ended"):
            both.generate(asked)
        with pytest.raises(SaescopeError, match="have ended"):
            both.generate(asked)
    finally:
        both.close()


# --- the real engine -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real() -> VllmClient:
    pytest.importorskip("vllm")
    return VllmClient(max_model_len=1024, enforce_eager=True, dtype="float32", gpu_memory_utilization=0.3)


@pytest.mark.llm
def test_real_log_probabilities_equal_plain_passes(real) -> None:
    from sae.language_model import LanguageModel

    lm = LanguageModel.load("default", dtype="float32")
    assert real.identity.model == lm.name and real.identity.revision == lm.revision
    encode = lm.tokenizer.encode
    ids = encode("The capital of France is Paris, and that of Italy is Rome. Count: 1 2 3 4", add_special_tokens=False)
    digits = tuple(encode(d, add_special_tokens=False)[0] for d in "0123456789")
    prompt, ends = "The capital of France is", (" Paris", " a large town in Texas")
    requests = [
        SlotRequest(ids=tuple(ids), positions=(3, 10, len(ids) - 1), token_ids=digits),
        ContinuationRequest(prompt=prompt, continuations=ends),
        NextTokenRequest(messages=(Message(role="user", content="Is Paris a town?"),), choices=("Yes", "No", " Yes")),
    ]
    first, second = real.logprobs(requests), real.logprobs(requests)
    slots, continued, choice = first
    print(f"fixed ids: {real.fixed_ids}")
    table = plain(lm, ids)
    worst = max(
        abs(v - float(table[p][i])) for p, row in zip((3, 10, len(ids) - 1), slots.rows, strict=True)
        for i, v in zip(digits, row, strict=True)
    )  # fmt: skip
    head = [int(prefix_id(lm.tokenizer)), *encode(prompt, add_special_tokens=False)]
    for end, total in zip(ends, continued.sums, strict=True):
        tail = encode(end, add_special_tokens=False)
        rows = plain(lm, head + tail)[len(head) - 1 : -1]
        worst = max(worst, abs(total - sum(float(r[i]) for r, i in zip(rows, tail, strict=True))))
    print(f"largest difference of a log-probability from a plain pass: {worst:.2g} nats")
    assert worst < 2e-2 and all(v is not None for v in choice.rows[0])
    assert [a == pytest.approx(b, abs=2e-2) for a, b in zip(first[0].rows[0], second[0].rows[0], strict=True)]


@pytest.mark.llm
def test_real_generation_keeps_order_sampling_and_schema(real) -> None:
    schema = {"type": "object", "properties": {"odd": {"type": "integer"}}, "required": ["odd"],
              "additionalProperties": False}  # fmt: skip
    asked = [ask("Say one word.", max_tokens=1), ask("Count to ten. " * 80, max_tokens=30),
             ask("Which number is odd? 4 7 8", schema=schema, max_tokens=40), ask("x " * 2000)]  # fmt: skip
    one, many, shaped, long = real.generate(asked)
    assert one.usage.output_tokens == 1 and many.usage.output_tokens > 5
    assert set(json.loads(shaped.text)) == {"odd"} and long.code == "prompt_too_long"
    again = real.generate(asked[:2])  # blocks of the prefix cache hold 128 tokens on a processor
    print(f"second time: {again[1].usage.cached_tokens} of {again[1].usage.prompt_tokens} prompt tokens from the cache")
    assert [r.text for r in again] == [one.text, many.text] and again[1].usage.cached_tokens > 0
    hot = [ask("Tell a story.", temperature=1.0, seed=s, max_tokens=12) for s in (1, 1, 2)]
    a, b, c = (r.text for r in real.generate(hot))
    assert a == b != c
