"""FVU, L0, CE and KL by SAEBench's core evaluation and by SAELens's evaluator, on the case of ``case.py``.

Run in the peers' environment: ``make_core.py LM_FOLDER OUT.json`` (see rebuild.sh). Both get the same duck-typed source
of tokens, as neither takes tokens from a file.
"""

import importlib.metadata
import sys
from pathlib import Path
from types import SimpleNamespace

import case
import torch
from sae_bench.custom_saes.topk_sae import TopKSAE
from sae_bench.evals.core import main as bench
from sae_bench.evals.core.eval_config import CoreEvalConfig
from sae_lens import TopKSAE as LensTopK
from sae_lens import TopKSAEConfig
from sae_lens import evals as lens
from sae_lens.saes.sae import SAEMetadata
from transformer_lens.model_bridge import TransformerBridge

HOOK = f"blocks.{case.LAYER}.hook_resid_post"
N_BATCHES = case.B // case.ROWS_PER_BATCH


class Tokens:
    """What the evaluators ask of an activation store."""

    context_size, store_batch_size_prompts = case.L, case.ROWS_PER_BATCH

    def __init__(self) -> None:
        self.ids, self.at = torch.from_numpy(case.tokens_BL()), 0

    def get_batch_tokens(self, n: int) -> torch.Tensor:
        rows = self.ids[self.at : self.at + n]
        self.at = (self.at + n) % len(self.ids)
        assert len(rows) == n
        return rows

    def reset_input_dataset(self) -> None:
        self.at = 0


def bench_sae() -> TopKSAE:
    sae = TopKSAE(case.D, case.F, case.K, "case", case.LAYER, torch.device("cpu"), torch.float32, hook_name=HOOK)
    for name, values in case.sae_weights().items():
        getattr(sae, name).data = torch.from_numpy(values)
    return sae


def lens_sae() -> LensTopK:
    cfg = TopKSAEConfig(
        d_in=case.D, d_sae=case.F, k=case.K, apply_b_dec_to_input=True, normalize_activations="none",
        metadata=SAEMetadata(model_name="case", hook_name=HOOK, context_size=case.L, prepend_bos=True))
    sae = LensTopK(cfg)
    for name, values in case.sae_weights().items():
        getattr(sae, name).data = torch.from_numpy(values)
    return sae


def flat(metrics: dict) -> dict[str, float]:
    return {name: float(v) for group in metrics.values() for name, v in group.items()}


def with_positions(of_tokens) -> dict[str, float]:
    """KL by the peer's own formula at every position but the first and the last (where nothing is predicted)."""
    kept = []
    for start in range(0, case.B, case.ROWS_PER_BATCH):
        batch = torch.from_numpy(case.tokens_BL()[start : start + case.ROWS_PER_BATCH])
        kept.append(of_tokens(batch)["kl_div_with_sae"][:, 1:-1])
    return {"kl_where_scored": float(torch.cat(kept).mean())}


def main(lm_folder: str, out: str) -> None:
    torch.set_grad_enabled(False)
    model = TransformerBridge.boot_transformers(lm_folder, device="cpu", dtype=torch.float32)
    special, sae = {case.BOS, 1, 2}, bench_sae()
    cfg = CoreEvalConfig(
        batch_size_prompts=case.ROWS_PER_BATCH, n_eval_reconstruction_batches=N_BATCHES,
        n_eval_sparsity_variance_batches=N_BATCHES, compute_kl=True, compute_ce_loss=True, compute_l2_norms=True,
        compute_sparsity_metrics=True, compute_variance_metrics=True,
        exclude_special_tokens_from_reconstruction=True)
    found = {"sae_bench": flat(bench.run_evals(sae, Tokens(), model, cfg, ignore_tokens=special)[0])}
    found["sae_bench"] |= with_positions(lambda batch: bench.get_recons_loss(
        sae, model, batch, None, compute_kl=True, compute_ce_loss=False, ignore_tokens=special,
        exclude_special_tokens_from_reconstruction=True))
    other = lens_sae()
    everything = lens.EvalConfig(
        batch_size_prompts=case.ROWS_PER_BATCH, n_eval_reconstruction_batches=N_BATCHES,
        n_eval_sparsity_variance_batches=N_BATCHES, compute_kl=True, compute_ce_loss=True, compute_l2_norms=True,
        compute_sparsity_metrics=True, compute_variance_metrics=True)
    scaler = lens.ActivationScaler() if hasattr(lens, "ActivationScaler") else SimpleNamespace(
        scale=lambda x: x, unscale=lambda x: x)
    metrics, _ = lens.run_evals(other, Tokens(), model, scaler, everything, exclude_special_tokens=special)
    found["sae_lens"] = flat(metrics)
    found["sae_lens"] |= with_positions(lambda batch: lens.get_recons_loss(
        other, model, scaler, batch, compute_kl=True, compute_ce_loss=False, ignore_tokens=list(special)))
    packages = ("sae-bench", "sae-lens", "transformer-lens", "torch")
    found["versions"] = {name: importlib.metadata.version(name) for name in packages}
    found["lm"] = case.digest(case.weights_of(Path(lm_folder)))
    case.write(Path(out), found)


if __name__ == "__main__":
    main(*sys.argv[1:])
