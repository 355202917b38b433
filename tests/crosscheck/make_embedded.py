"""k-sparse probing by sae-probes itself on activations of the embedded model: ``make_embedded.py CACHE OUT.json``."""

import importlib.metadata
import json
import sys
import tempfile
from pathlib import Path

import case
import embedded_case
import numpy as np
import probe_case
import torch
from sae_probes.run_sae_evals import run_sae_eval


class Encoder:
    """What sae-probes asks of an SAE: dense codes."""

    def __init__(self, path: Path) -> None:
        self.weights = dict(np.load(path))

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        values, indices = embedded_case.encode(self.weights, x)
        return torch.zeros(len(x), embedded_case.F).scatter(1, indices, values.float())


def main(cache: str, out: str) -> None:
    found: dict = {}
    sae = Encoder(Path(cache) / "sae.npz")
    for name in embedded_case.DATASETS:
        found[name] = {}
        for penalty in ("l1", "l2"):
            with tempfile.TemporaryDirectory() as folder:
                run_sae_eval(
                    sae, name, embedded_case.HOOK, penalty, "normal", embedded_case.MODEL, cache, device="cpu",
                    ks=list(probe_case.KS), results_path=folder)
                (path,) = Path(folder).rglob("*.json")
                rows = json.loads(path.read_text())
            found[name][penalty] = {
                "auc": [r["test_auc"] for r in rows], "acc": [r["test_acc"] for r in rows],
                "indices": rows[-1]["indices"]}
        x = torch.load(Path(cache) / f"model_activations_{embedded_case.MODEL}/{name}_{embedded_case.HOOK}.pt")
        found[name]["x_mean_abs"] = float(np.abs(x.numpy()).mean())
        found[name]["codes_sum"] = float(sae.encode(x).double().sum())
    found["versions"] = {n: importlib.metadata.version(n) for n in ("sae-probes", "scikit-learn", "torch")}
    case.write(Path(out), found)


if __name__ == "__main__":
    main(*sys.argv[1:])
