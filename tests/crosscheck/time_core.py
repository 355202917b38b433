"""Seconds of SAEBench's core evaluation on the embedded model: ``time_core.py LM_FOLDER OUT.json IDS.npy THREADS``.

Run in the peers' environment by ``scripts/bench_core.py``, which times ours on the same tokens and SAE. IDS: [B, L].
"""

import sys
import time
from pathlib import Path

import case
import numpy as np
import torch
from sae_bench.custom_saes.topk_sae import TopKSAE
from sae_bench.evals.core import main as bench
from sae_bench.evals.core.eval_config import CoreEvalConfig
from transformer_lens.model_bridge import TransformerBridge

LAYER, D, F, K, BATCH = 15, 576, 4_608, 32, 8


def weights() -> dict[str, np.ndarray]:
    r = np.random.default_rng(4)
    w_dec = r.standard_normal((F, D)).astype(np.float32)
    w_dec /= np.linalg.norm(w_dec, axis=1, keepdims=True)
    return {"W_enc": np.ascontiguousarray(w_dec.T), "b_enc": np.zeros(F, np.float32), "W_dec": w_dec,
            "b_dec": np.zeros(D, np.float32)}


class Tokens:
    store_batch_size_prompts = BATCH

    def __init__(self, ids_BL: np.ndarray) -> None:
        self.ids, self.at = torch.from_numpy(ids_BL), 0
        self.context_size = ids_BL.shape[1]

    def get_batch_tokens(self, n: int) -> torch.Tensor:
        self.at += n
        return self.ids[self.at - n : self.at]

    def reset_input_dataset(self) -> None:
        self.at = 0


def main(lm_folder: str, out: str, ids_file: str, threads: str) -> None:
    torch.set_num_threads(int(threads))
    torch.set_grad_enabled(False)
    model = TransformerBridge.boot_transformers(lm_folder, device="cpu", dtype=torch.float32)
    sae = TopKSAE(D, F, K, "case", LAYER, torch.device("cpu"), torch.float32)
    for name, values in weights().items():
        getattr(sae, name).data = torch.from_numpy(values)
    ids = np.load(ids_file)
    n = len(ids) // BATCH
    cfg = CoreEvalConfig(
        batch_size_prompts=BATCH, n_eval_reconstruction_batches=n, n_eval_sparsity_variance_batches=n, compute_kl=True,
        compute_ce_loss=True, compute_l2_norms=True, compute_sparsity_metrics=True, compute_variance_metrics=True,
        compute_featurewise_density_statistics=True, exclude_special_tokens_from_reconstruction=True)
    model(torch.from_numpy(ids[:1]))  # whatever is made at the first pass
    processor, wall = time.process_time(), time.monotonic()
    metrics, _ = bench.run_evals(sae, Tokens(ids), model, cfg, ignore_tokens={0})
    processor, wall = time.process_time() - processor, time.monotonic() - wall
    found = {name: float(v) for group in metrics.values() for name, v in group.items()}
    case.write(Path(out), {"processor_s": processor, "wall_s": wall, "metrics": found})


if __name__ == "__main__":
    main(*sys.argv[1:])
