"""Options of vLLM's engines that the doors take, as texts and checked. Torch-free, and looks at no device."""

from collections.abc import Sequence
from typing import Any

from sae.errors import ConfigError, did_you_mean

ENGINE_OPTIONS: dict[str, type] = {
    "tensor_parallel_size": int, "gpu_memory_utilization": float, "max_model_len": int, "max_num_seqs": int,
    "max_num_batched_tokens": int, "cpu_offload_gb": float, "enforce_eager": bool,
}  # fmt: skip
"""Options of ``vllm.LLM`` that the doors take: where and how an engine runs, never what it answers, since they are no
part of a request's key."""
_BOOLEANS = {"true": True, "1": True, "false": False, "0": False}


def engine_options(client: str, replicas: int, texts: Sequence[str]) -> dict[str, Any]:
    """``NAME=VALUE`` texts as options of ``vllm.LLM``, and the number of engines checked; looks at no device.

    :class:`ConfigError` for a client that has no engines, for less than one of them, and for an option that
    :data:`ENGINE_OPTIONS` lacks or a value it cannot have.
    """
    if replicas < 1:
        raise ConfigError(f"replicas must be at least 1, got {replicas}")
    if client != "vllm" and (replicas > 1 or texts):
        what = f"replicas {replicas}" if replicas > 1 else f"option {texts[0]!r}"
        raise ConfigError(f"{what}: only the client vllm has engines, and the client is {client}; give --client vllm")
    found: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if name not in ENGINE_OPTIONS:
            raise ConfigError(f"vLLM option {text!r}: no option of ours{did_you_mean(name, ENGINE_OPTIONS)}")
        kind = ENGINE_OPTIONS[name]
        try:
            found[name] = _BOOLEANS[value.lower()] if kind is bool else kind(value)
        except (ValueError, KeyError):
            raise ConfigError(f"vLLM option {text!r}: expected {name}={kind.__name__}") from None
    if found.get("tensor_parallel_size", 1) < 1:
        raise ConfigError("vLLM option tensor_parallel_size must be at least 1")
    return found
