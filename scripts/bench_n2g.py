"""N2G patterns of all latents of an SAE: what they cost and what share of the loss they recover (METRICS D).

``OMP_NUM_THREADS=1 python scripts/bench_n2g.py --sae TOPK RANDOM [--root results] [--tokens 4096]`` on a finished run:
the patterns of every alive latent, then the losses of ``n2g_loss``, mode full, and the share (CE_0 - CE_s) /
(CE_0 - CE_a) with every latent in the subset: CE_0 with no latent at all, CE_a with the SAE, CE_s with the patterns.
With two SAEs the difference of their shares, paired by document. Nothing is written.
"""

import argparse
import json
import resource
import time
from pathlib import Path
from typing import Any

import numpy as np

from autointerp.doors import newest_artefact
from autointerp.latent_cache import LatentCache
from evals import patterns, uncertainty
from evals.base import EvalContext, SAESubject, subject_info
from evals.passes import Batch, Passes
from evals.patterns import Patterns
from evals.suite import n2g_loss
from evals.suite.n2g_loss import Plan, Splicer
from evals.units import UnitSums, choose_rows
from sae import checkpoint
from sae.activations import ActivationStore
from sae.language_model import LanguageModel
from sae.manifest import read_manifest, rng
from sae.tokens import TokenSet, drop_ids

RESAMPLES = 10_000


class BothArms(Splicer):
    """The arms of mode subset under a plan of mode full, so that one pass serves the metrics of both."""

    def __init__(self, subject: SAESubject, plan: Plan, rows: np.ndarray, L: int) -> None:
        super().__init__(subject, plan, rows, L)
        self.inner = Splicer(subject, plan._replace(mode="subset", latents=tuple(range(subject.info.d_sae))), rows, L)

    def arms(self, batch: Batch) -> dict[str, Any]:
        return self.inner.arms(batch)


def opened(root: Path, sae_id: str, lm: LanguageModel) -> EvalContext:
    """What ``n2g_loss`` is given, from the artefacts of a finished run."""
    where = newest_artefact(root, "latents", sae_id)
    if where is None:
        raise SystemExit(f"{root} holds no latents of {sae_id}; run evals.run_all first")
    sae = checkpoint.load(root / "saes" / sae_id)
    texts = {t.key: t for t in (TokenSet.open(f) for f in sorted((root / "tokens").iterdir()))}
    stores = {}
    for folder in sorted((root / "activations").iterdir()):
        text = texts.get(read_manifest(folder)["inputs"].get("tokens", ""))
        if text is not None:
            stores[text.split] = ActivationStore.open(folder, text)
    train = next((t for t in texts.values() if t.split == "train"), None)
    hookpoint = sae.cfg.meta.hookpoint if sae.cfg.meta else lm.default_hookpoint()
    return EvalContext(root=root, subject=SAESubject(sae, subject_info(sae, "")), preset="quick", seed=0,
                       hookpoint=hookpoint, stores=stores, load_lm=lambda: lm, latents=LatentCache.open(where),
                       scores=None, train_text=train)  # fmt: skip


def measured(ctx: EvalContext, built: Patterns, tokens: int) -> tuple[UnitSums, dict[str, Any]]:
    """Sums per document of all arms on ``tokens`` tokens of the split test; and counts."""
    import torch

    found, store, lm = built.found, ctx.stores["test"], ctx.lm
    L = store.tokens.L
    rows = choose_rows(store, max(1, tokens // L), ctx.seed, n2g_loss.SAME_ROWS_AS)
    keep_N = np.asarray(store.keep_N).reshape(-1, L)[rows].ravel()
    own, shuffled, scales = n2g_loss.simulations(ctx, found, np.asarray(store.tokens.tokens_BL[rows]), keep_N)
    plan = Plan("full", own, shuffled, tuple(sorted(found)), scales)
    passes = Passes(lm.upper(ctx.hookpoint), store, rows, tuple(drop_ids(lm.tokenizer)), lm.device)
    with torch.inference_mode():
        sums = n2g_loss.PLUGIN._passes(ctx, passes, BothArms(ctx.subject, plan, rows, L))  # type: ignore[arg-type]
    return sums, {
        "latents": len(found), "failed": len(built.failures), "patterns": sum(len(p.patterns) for p in found.values()),
        "scale_0": sum(s == 0 for s in scales.values()), "simulated_l0": round(len(own.flat_E) / int(keep_N.sum()), 2),
        "documents": len(sums.units), "predictions": int(sums.total("n")),
    }  # fmt: skip


def worth(sums: UnitSums) -> np.ndarray:
    """[U, 2]: what the patterns save and what all latents are worth, per document."""
    zero, own, sim = (sums.get(name) for name in ("ce.zero", "ce.own", "ce.sim"))
    return np.stack([zero - sim, zero - own], axis=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", type=Path, default=Path("results"))
    parser.add_argument("--sae", nargs="+", required=True, help="one SAE, or two to compare")
    parser.add_argument("--tokens", type=int, default=4_096)
    parser.add_argument("--latents", type=int, help="every nth alive latent, so that about so many are built")
    options = parser.parse_args()
    lm = LanguageModel.load("default", dtype="float32")
    sums = []
    for sae_id in options.sae:
        ctx = opened(options.root, sae_id, lm)
        assert ctx.latents is not None
        alive = n2g_loss.alive_latents(ctx.latents)
        asked = alive[:: max(1, len(alive) // options.latents)] if options.latents else alive
        began = time.process_time()
        built = patterns.patterns_of(ctx, asked)
        cost = {"patterns_cpu_s": round(time.process_time() - began, 1)}
        began = time.process_time()
        found, counts = measured(ctx, built, options.tokens)
        sums.append(found)
        cost["losses_cpu_s"] = round(time.process_time() - began, 1)
        peak = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
        report(sae_id, found, cost | counts | {"peak_mb": peak}, len(built.failures))
    if len(sums) == 2:
        both = np.concatenate([worth(s) for s in sums], axis=1)
        gain = uncertainty.function_of_sums(
            both, lambda s: s[..., 0] / s[..., 1] - s[..., 2] / s[..., 3], rng(0, "bench_n2g"), resamples=RESAMPLES)
        print(json.dumps({"share recovered, first minus second": shown(gain)}))


def shown(found: Any) -> list[Any]:
    """[value, low, high] of an estimate (no bounds for too few documents), or why there is none."""
    if found.value is None:
        return [found.failure]
    return [v if v is None else round(v, 4) for v in (found.value, found.ci_low, found.ci_high)]


def report(sae_id: str, sums: UnitSums, counts: dict[str, Any], n_failed: int) -> None:
    """One line of JSON per metric."""
    print(json.dumps({"sae": sae_id} | counts))
    for mode in ("full", "subset"):
        for name, estimate in n2g_loss.estimates(mode, sums, 0, RESAMPLES, n_failed).items():  # type: ignore[arg-type]
            print(json.dumps({"mode": mode, "metric": name, "value": shown(estimate)}), flush=True)


if __name__ == "__main__":
    main()
