"""k-sparse probing by sae-probes itself on activations of ``probe_inputs.py``: ``make_probes.py CACHE OUT.json``."""

import importlib.metadata
import json
import sys
import tempfile
from pathlib import Path

import case
import numpy as np
import probe_case
import torch
from sae_probes.run_sae_evals import run_sae_eval

HOOK = f"blocks.{case.LAYER}.hook_resid_post"


class Encoder:
    """What sae-probes asks of an SAE."""

    def __init__(self) -> None:
        self.weights = {name: torch.from_numpy(a) for name, a in case.sae_weights().items()}

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        w = self.weights
        h = torch.relu((x - w["b_dec"]) @ w["W_enc"] + w["b_enc"])
        top = h.topk(case.K, dim=-1)
        return torch.zeros_like(h).scatter(-1, top.indices, top.values)


def main(cache: str, out: str) -> None:
    found: dict = {}
    for name in probe_case.DATASETS:
        found[name] = {}
        for penalty in ("l1", "l2"):
            with tempfile.TemporaryDirectory() as folder:
                run_sae_eval(
                    Encoder(), name, HOOK, penalty, "normal", "case", cache, device="cpu", ks=list(probe_case.KS),
                    results_path=folder)
                (path,) = Path(folder).rglob("*.json")
                rows = json.loads(path.read_text())
            found[name][penalty] = {
                "auc": [r["test_auc"] for r in rows], "acc": [r["test_acc"] for r in rows],
                "indices": rows[-1]["indices"]}
        x = torch.load(Path(cache) / f"model_activations_case/{name}_{HOOK}.pt")
        found[name]["x_mean_abs"] = float(np.abs(x.numpy()).mean())
    found["versions"] = {n: importlib.metadata.version(n) for n in ("sae-probes", "scikit-learn", "torch")}
    case.write(Path(out), found)


if __name__ == "__main__":
    main(*sys.argv[1:])
