"""Seconds of sae-probes 0.4.2 on the embedded model: ``time_sae_probes.py WORK.json OUT.json``.

Run by ``scripts/bench_sae_probes.py`` in the peers' environment: activations of whole data sets, then k-sparse probes.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import embedded_case
import torch
from by_turns import timed
from make_embedded import Encoder
from sae_probes.generate_model_activations import ensure_dataset_activations
from sae_probes.run_sae_evals import run_sae_evals
from transformer_lens.model_bridge import TransformerBridge


def main(work_file: str, out: str) -> None:
    work: dict[str, Any] = json.loads(Path(work_file).read_text())
    torch.set_num_threads(work["threads"])
    torch.set_grad_enabled(False)
    model = TransformerBridge.boot_transformers(work["lm"], device="cpu", dtype=torch.float32)
    sae = Encoder(Path(work["sae"]))
    with tempfile.TemporaryDirectory() as folder:
        cache, results = Path(folder) / "cache", Path(folder) / "results"
        (cache / f"model_activations_{embedded_case.MODEL}").mkdir(parents=True)
        model(torch.zeros(1, 8, dtype=torch.long))  # whatever is made at the first pass
        _, made = timed(lambda: ensure_dataset_activations(
            embedded_case.MODEL, work["names"], [embedded_case.HOOK], cache, device="cpu", model=model))
        _, probed = timed(lambda: run_sae_evals(
            sae, embedded_case.MODEL, embedded_case.HOOK, "l2", "normal", ks=work["ks"], results_path=results,
            model_cache_path=cache, datasets=work["names"], device="cpu"))
        rows = [json.loads(p.read_text()) for p in sorted(results.rglob("*.json"))]
    auc = {by_k[0]["dataset"]: [r["test_auc"] for r in by_k] for by_k in rows}
    chosen = {by_k[0]["dataset"]: by_k[-1]["indices"] for by_k in rows}
    found = {"made": made.as_dict(), "probed": probed.as_dict(), "auc": auc, "chosen": chosen}
    Path(out).write_text(json.dumps(found | {"first": model.tokenizer("a")["input_ids"][0]}))


if __name__ == "__main__":
    main(*sys.argv[1:])
