"""Transcoding: how much of the target a transcoder predicts, and what the model loses when it is put in its place.

A transcoder reads the run's hookpoint and predicts another activation of the same token (an MLP's output from its
input); that one is collected here. B rows, L tokens per row, D = d_out, V vocabulary, M scored positions, U documents.
Only positions that pass the token filter are replaced; all others keep their own activation. Losses in nats per token.
"""

from typing import TYPE_CHECKING, Any

import numpy as np

from evals import uncertainty
from evals.base import EvalContext, EvalResult, RowMaker
from evals.results import Estimate, Metric
from evals.units import Block, Floats, UnitSums, blocks, choose_rows, ratio_table
from sae.errors import Unsupported
from sae.manifest import rng

if TYPE_CHECKING:
    import torch

    from sae.language_model import LanguageModel

BATCH_TOKENS = 256
"""Logits of three passes are held at a time: 3 x 256 x 49,152 floats are 150 MB."""
PAPER = "Dunefsky et al. 2024 (arXiv 2406.11944)"
BY_DOCUMENT = "Interval: documents."

METRICS = (
    Metric(name="target_fvu", title="FVU of the target", unit="share of variance", better="lower", low=0.0,
           headline=True, description="sum |t - t_hat|^2 / sum |t - m|^2 over filtered tokens, t the activation that "
           "is predicted, m its mean over the evaluated set; always predicting the mean scores 1. " + BY_DOCUMENT,
           reference=f"{PAPER} 3.2, normalised by the variance of the target"),
    Metric(name="l0", title="L0", unit="latents", better="neither", low=0.0, headline=True,
           description="mean number of active latents per token. " + BY_DOCUMENT, reference=f"{PAPER} 3.2"),
    Metric(name="delta_ce", title="Delta CE", unit="nats/token", better="lower", headline=True,
           description="mean next-token loss with the prediction in place of the target, minus the clean loss. "
           + BY_DOCUMENT, reference=f"{PAPER} 3.2"),
    Metric(name="kl", title="KL", unit="nats/token", better="lower", low=-1e-5,
           description="mean KL(clean || patched) of the next-token distribution. " + BY_DOCUMENT,
           reference="METRICS B, at the target"),
    Metric(name="ce_clean", title="Clean CE", unit="nats/token", better="neither", low=0.0,
           description="mean next-token loss of the untouched model. " + BY_DOCUMENT, reference="METRICS B"),
    Metric(name="floor_mean_delta_ce", title="Floor: delta CE of the mean", unit="nats/token", better="neither",
           description="delta CE with the set mean in place of the target. " + BY_DOCUMENT,
           reference="METRICS B, mean ablation"),
    Metric(name="ce_recovered_mean", title="CE recovered, mean", unit="share", better="higher",
           description="(CE_mean - CE') / (CE_mean - CE), against the set mean. " + BY_DOCUMENT, reference="METRICS B"),
)


def target_of(ctx: EvalContext) -> str:
    """Hookpoint that is predicted: a transcoder's second one, an SAE's own. ``Unsupported`` if it is unknown."""
    sae = ctx.subject.sae  # type: ignore[attr-defined]
    if not sae.transcodes:
        return ctx.hookpoint
    if sae.cfg.meta is None or sae.cfg.meta.hookpoint_out is None:
        raise Unsupported(f"{sae.sae_id}: its file does not say which activation it predicts")
    return str(sae.cfg.meta.hookpoint_out)


def estimates(sums: UnitSums, seed: int, resamples: int) -> dict[str, Estimate]:
    """All metrics from sums per document: error, variance, l0, tokens; ce, ce.own, ce.mean, kl, scored."""

    def ratio(metric: str, num: Floats, den: Floats, code: str = "too_few_rows") -> Estimate:
        generator = rng(seed, "transcoding", metric, "bootstrap")
        return uncertainty.ratio(num, den, generator, resamples=resamples, code=code)

    def share(s: Floats) -> Floats:
        return np.where(s[..., 1] > 0, s[..., 0] / s[..., 1], np.nan)

    clean, own, mean, n = (sums.get(name) for name in ("ce", "ce.own", "ce.mean", "scored"))
    recovered = uncertainty.function_of_sums(
        np.stack([mean - own, mean - clean], axis=1), share, rng(seed, "transcoding", "ce_recovered_mean", "bootstrap"),
        resamples=resamples, code="gate_failed")
    return {
        "target_fvu": ratio("target_fvu", sums.get("error"), sums.get("variance"), "constant_target"),
        "l0": ratio("l0", sums.get("l0"), sums.get("tokens")),
        "delta_ce": ratio("delta_ce", own - clean, n), "kl": ratio("kl", sums.get("kl"), n),
        "ce_clean": ratio("ce_clean", clean, n), "floor_mean_delta_ce": ratio("floor_mean_delta_ce", mean - clean, n),
        "ce_recovered_mean": recovered,
    }


class _Passes:
    """What one subject needs of the model on the chosen rows."""

    def __init__(self, ctx: EvalContext, lm: "LanguageModel", target: str, rows: np.ndarray) -> None:
        from sae.tokens import drop_ids

        self.ctx, self.lm, self.target, self.rows = ctx, lm, target, rows
        self.store, self.special = ctx.stores["test"], np.asarray(drop_ids(lm.tokenizer), dtype=np.int64)

    def ids(self, block: Block) -> "torch.Tensor":
        import torch

        return torch.from_numpy(np.asarray(self.store.tokens.tokens_BL[block.rows_B], dtype=np.int64))

    def targets(self, ids_BL: "torch.Tensor") -> "torch.Tensor":
        return self.lm.capture(ids_BL, [self.target])[self.target].float().cpu()

    def mean(self) -> "torch.Tensor":
        """Mean target [D] over the filtered tokens of the rows, float64; the same for every subject."""
        import torch

        total_D, n = torch.zeros(()), 0
        for block in blocks(self.store, self.rows, BATCH_TOKENS, f"mean of {self.target}"):
            kept_ND = self.targets(self.ids(block))[torch.from_numpy(block.keep_BL)].double()
            total_D, n = total_D + kept_ND.sum(dim=0), n + len(kept_ND)
        return total_D / max(n, 1)

    def scored(self, block: Block, ids_BL: "torch.Tensor") -> np.ndarray:
        """[B, L]: a prediction counts if its token passed the filter and the next one is ordinary, same document."""
        ids, score = ids_BL.numpy(), np.zeros_like(block.keep_BL, dtype=bool)
        same = block.doc_BL[:, 1:] == block.doc_BL[:, :-1]
        score[:, :-1] = block.keep_BL[:, :-1] & same & ~np.isin(ids[:, 1:], self.special)
        return score

    def losses(self, block: Block, ids_BL: "torch.Tensor", arms: "dict[str, torch.Tensor]") -> dict[str, np.ndarray]:
        """Per scored position: ``ce`` (clean), ``ce.<arm>``, and ``kl`` of the arm ``own``."""
        import torch

        score_BL = torch.from_numpy(self.scored(block, ids_BL))
        following_M = ids_BL.roll(-1, dims=1)[score_BL][:, None]

        def log_probs(logits_BLV: "torch.Tensor") -> "torch.Tensor":
            return logits_BLV.cpu()[score_BL].float().log_softmax(dim=-1)

        clean_MV = log_probs(self.lm.logits(ids_BL))
        found = {"ce": -clean_MV.gather(1, following_M)[:, 0]}
        for arm, value_BLD in arms.items():
            log_q_MV = log_probs(self.lm.replace(ids_BL, self.target, value_BLD))
            found[f"ce.{arm}"] = -log_q_MV.gather(1, following_M)[:, 0]
            if arm == "own":
                found["kl"] = (clean_MV.exp() * (clean_MV - log_q_MV)).sum(dim=-1)
        return {name: value.double().numpy() for name, value in found.items()}


class Transcoding:
    """Transcoders against their target."""

    name = "transcoding"
    title = "Transcoding"
    version = 1
    metrics: tuple[Metric, ...] = METRICS
    needs = frozenset({"lm", "test"})
    uses = frozenset({"transcode"})

    def config(self, preset: str) -> dict[str, Any]:
        """`tokens`: at most this many tokens of the split test, whole rows."""
        return {"tokens": {"quick": 4_096, "paper": 500_000, "tiny": 1_024}[preset]}

    def inputs(self, ctx: EvalContext) -> dict[str, str]:
        return {"test": ctx.stores["test"].key, "target": target_of(ctx)}

    def run(self, ctx: EvalContext) -> EvalResult:
        import torch

        lm, store, target = ctx.lm, ctx.stores["test"], target_of(ctx)
        if lm.dtype != torch.float32:
            raise Unsupported(f"transcoding runs in float32, the LM is in {lm.dtype}; load it in float32")
        rows = choose_rows(store, max(1, self.config(ctx.preset)["tokens"] // store.tokens.L), ctx.seed, self.name)
        passes = _Passes(ctx, lm, target, rows)
        with torch.inference_mode():
            key = f"{self.name}.{store.key}.{target}.{ctx.preset}.{ctx.seed}"
            sums = self._sums(ctx, passes, ctx.memo(key, passes.mean))
        made = RowMaker(self, ctx)
        for metric, estimate in estimates(sums, ctx.seed, uncertainty.resamples_of(ctx.preset)).items():
            made.add(metric, estimate, split="test")
        n, clean = sums.get("scored"), sums.get("ce")
        table = {"target_fvu": (sums.get("error"), sums.get("variance")), "l0": (sums.get("l0"), sums.get("tokens")),
                 "delta_ce": (sums.get("ce.own") - clean, n), "kl": (sums.get("kl"), n)}
        counts = {"scored_tokens": int(n.sum()), "tokens": int(sums.total("tokens")), "documents": len(n),
                  "target": target, "dtype": "float32"}
        return EvalResult(rows=made.rows, details=ratio_table(sums.units, table), counts=counts, draws=made.draws)

    def _sums(self, ctx: EvalContext, passes: _Passes, mean_D: "torch.Tensor") -> UnitSums:
        import torch

        sums = UnitSums()
        for block in blocks(passes.store, passes.rows, BATCH_TOKENS, f"{self.name} {ctx.subject.info.sae_id[-28:]}"):
            ids_BL, keep = passes.ids(block), torch.from_numpy(block.keep_BL)
            target_BLD = passes.targets(ids_BL)
            codes, found_ND = ctx.subject.codes_and_reconstruction(block.x_BLD[keep])
            assert codes is not None
            t_ND = target_BLD[keep].double()
            if found_ND.shape != t_ND.shape:
                raise Unsupported(
                    f"{ctx.subject.info.sae_id} predicts {found_ND.shape[1]} channels, {passes.target} has "
                    f"{t_ND.shape[1]}; is it the right model?")
            patched, meant = target_BLD.clone(), target_BLD.clone()
            patched[keep], meant[keep] = found_ND.float(), mean_D.float()
            doc_N = block.doc_BL[block.keep_BL]
            sums.add(doc_N, {
                "error": (t_ND - found_ND.double()).square().sum(dim=1).numpy(),
                "variance": (t_ND - mean_D).square().sum(dim=1).numpy(),
                "l0": (codes.values_NK > 0).sum(dim=1).numpy(), "tokens": np.ones(len(t_ND)),
            })
            losses = passes.losses(block, ids_BL, {"own": patched, "mean": meant})
            scored = block.doc_BL[passes.scored(block, ids_BL)]
            sums.add(scored, {**losses, "scored": np.ones(len(scored))})
        return sums


PLUGIN = Transcoding()
