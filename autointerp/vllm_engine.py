"""A vLLM engine, or several of them in processes of their own, behind one call: prompts and what is wanted of each.

Only plain values cross: the engines may live elsewhere. vLLM is imported when an engine is opened. V vocabulary.
"""

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any

from sae.errors import ConfigError, MissingExtra, SaescopeError

DEVICES = "CUDA_VISIBLE_DEVICES"


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """One prompt and what is to be done with it. Sampling belongs to the request: an engine has no defaults."""

    prompt: tuple[int, ...]
    max_tokens: int = 1
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    schema: Mapping[str, Any] | None = None
    choices: tuple[int, ...] = ()
    """Log-probabilities of these ids as the next token."""
    prompt_logprobs: int | None = None
    """Log-probabilities of each prompt token, and of so many likeliest ones beside it. Skips the prefix cache."""
    rows: tuple[tuple[int, ...], ...] = ()
    """Ids to score at the prompt's positions from ``start`` on, the last one excluded (fixed ids; reads the prefix
    cache). GPU model runner only."""
    start: int = 0


@dataclass(frozen=True, kw_only=True)
class Found:
    """What became of a prompt."""

    text: str = ""
    finish_reason: str = "stop"
    n_new: int = 0
    n_cached: int = 0
    choices: tuple[float | None, ...] = ()
    prompt: tuple[Mapping[int, float], ...] = ()
    """Per prompt position but the first: id -> log-probability."""
    rows: tuple[tuple[float, ...], ...] | None = None
    """None: the engine gave none (a hit of the prefix cache beyond ``start``)."""


class Engine:
    """One ``vllm.LLM`` in this process."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        """``options`` of ``vllm.LLM``; prefix caching is on. :class:`MissingExtra` without vLLM."""
        try:
            import vllm
        except ImportError:
            raise MissingExtra("vllm", "vllm") from None
        self._vllm = vllm
        self.llm = vllm.LLM(enable_prefix_caching=True, **options)
        self.tokenizer = self.llm.get_tokenizer()
        config = self.llm.model_config
        self.context_tokens, self.dtype = int(config.max_model_len), str(config.dtype).removeprefix("torch.")

    def run(self, wanted: Sequence[Wanted]) -> list[Found]:
        """In order."""
        if not wanted:
            return []
        prompts = [{"prompt_token_ids": list(w.prompt)} for w in wanted]
        outputs = self.llm.generate(prompts, [self._params(w) for w in wanted], use_tqdm=False)
        return [_found(w, o) for w, o in zip(wanted, outputs, strict=True)]

    def _params(self, w: Wanted) -> Any:
        more: dict[str, Any] = {}
        if w.schema is not None:
            kind = self._vllm.sampling_params.StructuredOutputsParams
            more["structured_outputs"] = kind(json=dict(w.schema))
        if w.choices:
            more["logprob_token_ids"] = list(w.choices)
        if w.prompt_logprobs is not None:
            more["prompt_logprobs"] = w.prompt_logprobs
        if w.rows:
            width = max(map(len, w.rows))
            more["prompt_logprob_token_ids"] = [[*row, *[-1] * (width - len(row))] for row in w.rows]
            more |= {"prompt_logprob_start": w.start, "skip_reading_prefix_cache": False}
        if w.temperature > 0:
            more |= {"seed": w.seed, "top_p": w.top_p}
        return self._vllm.SamplingParams(
            max_tokens=w.max_tokens, temperature=w.temperature, stop=list(w.stop) or None, **more
        )


def _found(w: Wanted, output: Any) -> Found:
    written = output.outputs[0]
    prompt: tuple[Mapping[int, float], ...] = ()
    if w.prompt_logprobs is not None:
        given = output.prompt_logprobs or []
        prompt = tuple({int(i): float(v.logprob) for i, v in (row or {}).items()} for row in list(given)[1:])
    rows = getattr(output, "prompt_token_id_logprobs", None)
    first = dict(written.logprobs[0]) if w.choices and written.logprobs else {}
    return Found(
        text=str(written.text), finish_reason="length" if written.finish_reason == "length" else "stop",
        n_new=len(written.token_ids), n_cached=int(output.num_cached_tokens or 0),
        choices=tuple(float(first[i].logprob) if i in first else None for i in w.choices), prompt=prompt,
        rows=None if not w.rows or rows is None
        else tuple(tuple(float(v) for v in row[: len(ids)]) for row, ids in zip(rows, w.rows, strict=True)),
    )  # fmt: skip


# -- engines in processes of their own ------------------------------------------------------------------------------
_ENGINE: Engine | None = None


def _open(options: Mapping[str, Any], devices: str | None) -> tuple[Any, int, str]:
    """Open this process's engine; its tokenizer, context and type. No initializer of the pool, whose errors would not
    be told."""
    global _ENGINE
    if devices is not None:
        os.environ[DEVICES] = devices  # before vLLM looks at them
    _ENGINE = Engine(options)
    return _ENGINE.tokenizer, _ENGINE.context_tokens, _ENGINE.dtype


def _run(wanted: Sequence[Wanted]) -> list[Found]:
    assert _ENGINE is not None
    return _ENGINE.run(wanted)


class Replicas:
    """Data parallel: whole engines side by side, each with devices of its own; neighbours in a list stay together,
    since they begin alike and each engine has its own prefix cache."""

    def __init__(self, n: int, options: Mapping[str, Any]) -> None:
        """Raises what opening an engine raises. The caller's door must be guarded by ``if __name__ == "__main__"``."""
        each = int(options.get("tensor_parallel_size", 1))
        slices = device_slices(n, each, os.environ.get(DEVICES))
        self._pools = [ProcessPoolExecutor(1, get_context("spawn")) for _ in slices]
        opened = [
            pool.submit(_open, dict(options), devices) for pool, devices in zip(self._pools, slices, strict=True)
        ]  # all load at once
        self.tokenizer, self.context_tokens, self.dtype = self._results(opened)[0]

    def run(self, wanted: Sequence[Wanted]) -> list[Found]:
        """In order. :class:`SaescopeError` where an engine's process ended."""
        if not self._pools:
            raise SaescopeError("the vLLM engines have ended; run the same command again")
        parts = shared_out([len(w.prompt) + w.max_tokens for w in wanted], len(self._pools))
        jobs = [pool.submit(_run, wanted[p.start : p.stop]) for pool, p in zip(self._pools, parts, strict=True)]
        return [found for part in self._results(jobs) for found in part]

    def _results(self, jobs: Sequence[Future[Any]]) -> list[Any]:
        try:
            return [job.result() for job in jobs]
        except BrokenProcessPool:
            n = len(self._pools)
            self.close()
            raise SaescopeError(
                f"one of {n} vLLM engines ended (killed, or out of memory); replies so far are stored: "
                "run the same command again, with fewer --replicas if it was memory"
            ) from None
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End the processes; idempotent."""
        pools, self._pools = self._pools, []
        for pool in pools:
            pool.shutdown(cancel_futures=True)


def device_slices(n: int, each: int, visible: str | None) -> list[str | None]:
    """Devices of each engine: ``each`` of those visible (``CUDA_VISIBLE_DEVICES``; None: all there are). None where
    there are none at all: the engines share the processor. :class:`ConfigError` where there are too few."""
    if visible is None:
        import torch

        names = [str(i) for i in range(torch.cuda.device_count())]
    else:
        names = [name.strip() for name in visible.split(",") if name.strip()]
    if not names:
        return [None] * n
    if len(names) < n * each:
        raise ConfigError(
            f"{n} vLLM engines of {each} GPU each need {n * each}, and {len(names)} "
            f"{'is' if len(names) == 1 else 'are'} visible; lower --replicas or tensor_parallel_size"
        )
    return [",".join(names[i * each : (i + 1) * each]) for i in range(n)]


def engines_planned(replicas: int, options: Mapping[str, Any]) -> str:
    """What is to be opened, for a plan; :class:`ConfigError` where there are too few GPUs. Opens nothing."""
    slices = device_slices(replicas, int(options.get("tensor_parallel_size", 1)), os.environ.get(DEVICES))
    where = "on the processor" if slices[0] is None else "on GPU " + " | ".join(str(part) for part in slices)
    return f"vllm: {replicas} engine{'' if replicas == 1 else 's side by side'} {where}"


def shared_out(sizes: Sequence[int], n: int) -> list[range]:
    """``n`` runs of neighbours of about equal total size, in order, together everything."""
    total, out, start, done = sum(sizes), [], 0, 0
    for part in range(1, n + 1):
        stop = start
        while stop < len(sizes) and (part == n or done + sizes[stop] / 2 <= part * total / n):
            done += sizes[stop]
            stop += 1
        out.append(range(start, stop))
        start = stop
    return out
