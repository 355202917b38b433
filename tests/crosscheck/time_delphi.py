"""Seconds of delphi 0.1.3 on the embedded model: ``time_delphi.py {cache,judge} WORK.json OUT.json``.

Run by ``scripts/bench_delphi.py`` in delphi's environment (``delphi_env.sh``). ``cache``: from token ids to its latent
cache on disk. ``judge``: from that cache to explanations, detection and fuzzing by a server that answers at once.
"""

import asyncio
import json
import sys
import types
from functools import partial
from pathlib import Path
from typing import Any

import delphi_case as case
import numpy as np
import torch
from by_turns import timed


class _Absent:
    """Stands for the names of vLLM that delphi imports at its start. No engine is used here, and vLLM is 5 GB."""


def _without_vllm() -> None:
    names = {"vllm": ("LLM", "SamplingParams"), "vllm.distributed": (), "vllm.inputs": ("TokensPrompt",),
             "vllm.distributed.parallel_state": ("destroy_distributed_environment", "destroy_model_parallel")}
    for name, members in names.items():
        module = types.ModuleType(name)
        for member in members:
            setattr(module, member, _Absent)
        sys.modules[name] = module


_without_vllm()

from delphi.clients import OpenRouter  # noqa: E402
from delphi.config import CacheConfig, ConstructorConfig, SamplerConfig  # noqa: E402
from delphi.explainers import DefaultExplainer  # noqa: E402
from delphi.latents import LatentCache, LatentDataset  # noqa: E402
from delphi.pipeline import Pipe, Pipeline, process_wrapper  # noqa: E402
from delphi.scorers import DetectionScorer, FuzzingScorer  # noqa: E402
from delphi.sparse_coders.load_sparsify import sae_dense_latents  # noqa: E402
from sparsify import SparseCoder, SparseCoderConfig  # noqa: E402
from transformers import AutoModel, AutoTokenizer  # noqa: E402


def coder(weights: Any, dtype: torch.dtype) -> SparseCoder:
    sae = SparseCoder(case.D, SparseCoderConfig(num_latents=case.F, k=case.K), device="cpu", dtype=dtype)
    with torch.no_grad():
        sae.encoder.weight.copy_(torch.from_numpy(weights["W"]))
        sae.encoder.bias.zero_()
        sae.W_dec.copy_(torch.from_numpy(weights["W"]))
        sae.b_dec.copy_(torch.from_numpy(weights["b"]))
    return sae


def cache(work: dict[str, Any]) -> dict[str, Any]:
    """As ``populate_cache`` of its ``__main__``, with our token ids and rows a pass."""
    dtype = getattr(torch, work["dtype"])
    model = AutoModel.from_pretrained(work["lm"], dtype=dtype).eval()
    sae = coder(np.load(work["sae"]), dtype)
    ids = torch.from_numpy(np.load(work["ids"]))
    with torch.no_grad():
        sae_dense_latents(model(ids[:1]).last_hidden_state, sae)  # whatever is made at the first pass
    folder = Path(work["latents"])
    cfg = CacheConfig(batch_size=case.BATCH_ROWS, cache_ctx_len=case.L, n_tokens=ids.numel(), n_splits=case.N_SPLITS)

    def whole() -> None:
        made = LatentCache(model, {case.PLACE: partial(sae_dense_latents, sae=sae)}, batch_size=cfg.batch_size)
        made.run(cfg.n_tokens, ids)
        made.save_splits(cfg.n_splits, folder)
        made.save_config(folder, cfg, work["lm"])

    _, spent = timed(whole)
    return {"spent": spent.as_dict(), "bytes": sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())}


def judge(work: dict[str, Any]) -> dict[str, Any]:
    """As ``process_cache`` of its ``__main__``, explanations and scores written to files as there."""
    tokenizer = AutoTokenizer.from_pretrained(work["lm"])
    out = Path(work["out"])
    for name in ("explanations", "detection", "fuzz"):
        (out / name).mkdir(parents=True, exist_ok=True)

    def told(name: str, result: Any) -> Any:
        value = result.explanation if name == "explanations" else [vars(v) for v in result.score]
        (out / name / f"{result.record.latent}.txt").write_text(json.dumps(value))
        return result

    def ask(result: Any) -> Any:
        result[0].record.explanation = result[0].explanation
        return result[0].record

    def whole() -> list[Any]:
        dataset = LatentDataset(
            work["latents"], SamplerConfig(n_examples_train=case.SHOWN, n_examples_test=case.POSITIVE),
            ConstructorConfig(min_examples=case.SHOWN + case.POSITIVE, n_non_activating=case.SILENT),
            tokenizer=tokenizer, modules=[case.PLACE], latents={case.PLACE: torch.tensor(work["chosen"])})
        client = OpenRouter("m", api_key="none", base_url=work["url"] + "/chat/completions")
        explainer = DefaultExplainer(client, threshold=0.3)
        scorers = {"detection": DetectionScorer(client, n_examples_shown=case.PER_REQUEST),
                   "fuzz": FuzzingScorer(client, n_examples_shown=case.PER_REQUEST)}
        pipeline = Pipeline(
            dataset, Pipe(process_wrapper(explainer, postprocess=partial(told, "explanations"))),
            Pipe(*(process_wrapper(s, preprocess=ask, postprocess=partial(told, n)) for n, s in scorers.items())))
        return asyncio.run(pipeline.run(work["concurrent"]))

    done, spent = timed(whole)
    verdicts = [v for result in done if result is not None for scored in result for v in scored.score]
    return {"spent": spent.as_dict(), "latents": sum(r is not None for r in done), "verdicts": len(verdicts),
            "unread": sum(v.prediction is None for v in verdicts)}


def main(what: str, work_file: str, out: str) -> None:
    work = json.loads(Path(work_file).read_text())
    torch.set_num_threads(work["threads"])
    torch.set_grad_enabled(False)
    found = {"cache": cache, "judge": judge}[what](work)
    Path(out).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
