"""B. Downstream loss: what the language model loses when it reads the reconstruction (METRICS B).

B rows, L tokens per row, D = d_in, V vocabulary, M scored positions of a batch, U documents. Losses in nats per token.
Only positions that pass the token filter are replaced; all others keep their own activation.
"""

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from evals import uncertainty
from evals.base import EvalContext, EvalResult, RowMaker
from evals.passes import MEMO_BYTES, Passes, compare
from evals.results import Estimate, Metric
from evals.units import Floats, UnitSums, choose_rows, ratio_table, set_means
from sae.errors import Unsupported
from sae.manifest import rng

if TYPE_CHECKING:
    import torch

    from evals.pretraining import Curve

GAO = "Gao et al. 2024 (arXiv 2406.04093)"
BY_DOCUMENT = "Interval: documents."


class ScalingLaw(NamedTuple):
    """The data term B T^-beta of L(N, T) = E + A N^-alpha + B T^-beta (nats per token, T tokens)."""

    b: float
    beta: float


HOFFMANN = ScalingLaw(410.7, 0.2849)
REFIT = ScalingLaw(2085.43, 0.3658)
PRETRAINING_TOKENS = {"smollm2-135m": 2e12}
"""Published size of the pretraining text, by a part of the LM's name in lower case."""

METRICS = (
    Metric(name="delta_ce", title="Delta CE", unit="nats/token", better="lower", headline=True,
           description="mean next-token loss with x_hat spliced in, minus the clean loss. " + BY_DOCUMENT,
           reference=f"{GAO} 4.1"),
    Metric(name="kl", title="KL", unit="nats/token", better="lower", low=-1e-5, headline=True,
           description="mean KL(clean || patched) of the next-token distribution. " + BY_DOCUMENT,
           reference=f"{GAO} 4.1"),
    Metric(name="top1_agree", title="Top-1 agreement", unit="share", better="higher", low=0.0, high=1.0,
           description="share of positions with an equal most likely token. " + BY_DOCUMENT, reference="METRICS B"),
    Metric(name="ce_recovered_mean", title="CE recovered, mean", unit="share", better="higher",
           description="(CE_mean - CE') / (CE_mean - CE): against replacing by the set mean. " + BY_DOCUMENT,
           reference="METRICS B; secondary"),
    Metric(name="ce_recovered_zero", title="CE recovered, zero", unit="share", better="higher",
           description="(CE_zero - CE') / (CE_zero - CE): against replacing by 0, which is catastrophic, so all SAEs "
           "come near 1. " + BY_DOCUMENT, reference=f"{GAO} 4.1 rejects it; secondary"),
    Metric(name="ce_clean", title="Clean CE", unit="nats/token", better="neither", low=0.0,
           description="loss of the language model itself at the scored positions. " + BY_DOCUMENT,
           reference="METRICS B"),
    Metric(name="floor_random_error_kl", title="KL of a random error", unit="nats/token", better="neither", low=-1e-5,
           description="KL with an error of the same length in a uniformly random direction; an SAE above it errs in "
           "harmful directions. " + BY_DOCUMENT, reference="Gurnee 2024; METRICS B"),
    Metric(name="floor_mean_delta_ce", title="Delta CE of the mean", unit="nats/token", better="neither",
           description="loss added by replacing with the set mean. " + BY_DOCUMENT, reference="METRICS B"),
    Metric(name="floor_zero_delta_ce", title="Delta CE of zero", unit="nats/token", better="neither",
           description="loss added by replacing with 0. " + BY_DOCUMENT, reference="METRICS B"),
    Metric(name="equiv_compute", title="Equivalent compute (Hoffmann)", unit="share of pretraining compute",
           better="higher", low=0.0, high=1.0,
           description="estimate: share of the pretraining compute at which the LM would have had the patched loss, by "
           "the data term of the scaling law; 1 where delta_ce <= 0. " + BY_DOCUMENT,
           reference=f"{GAO} 4.1; constants of Hoffmann et al. 2022 (arXiv 2203.15556), for base models"),
    Metric(name="equiv_compute_refit", title="Equivalent compute (refit)", unit="share of pretraining compute",
           better="higher", low=0.0, high=1.0,
           description="the same with refitted constants; the two differ by up to a factor of 2. " + BY_DOCUMENT,
           reference="Besiroglu et al. 2024 (arXiv 2404.10102)"),
    Metric(name="equiv_compute_curve", title="Equivalent compute (own curve)", unit="share of pretraining compute",
           better="higher", low=0.0, high=1.0,
           description="share of the pretraining at which the LM's own loss was as much higher, by the curve given "
           "with --pretraining-curve; without one there is no such row. " + BY_DOCUMENT, reference=f"{GAO} 4.1"),
)


def equivalent_compute(delta_ce: Any, pretraining_tokens: float, law: ScalingLaw) -> Any:
    """C*/C = (R / (R + delta))^(1/beta), R = b T^-beta, N fixed (METRICS B); 1 where delta <= 0. Broadcasts."""
    r = law.b * pretraining_tokens ** -law.beta
    delta = np.asarray(delta_ce, dtype=np.float64)
    return np.where(np.isnan(delta), np.nan, (r / (r + np.maximum(delta, 0.0))) ** (1 / law.beta))


def random_error(error_BLD: "torch.Tensor", rows_B: np.ndarray, seed: int) -> "torch.Tensor":
    """Errors of the same length in uniformly random directions; they depend on the seed and the row alone."""
    import torch

    shape = error_BLD.shape[1:]
    noise = torch.from_numpy(np.stack([
        rng(seed, "downstream_loss", "random_error", int(row)).standard_normal(shape, dtype=np.float32)
        for row in rows_B
    ]))
    length = error_BLD.norm(dim=-1, keepdim=True)
    return noise / noise.norm(dim=-1, keepdim=True).clamp_min(1e-30) * length


class Shared(NamedTuple):
    """Passes that depend on no subject."""

    hidden: "dict[int, torch.Tensor]"
    """Clean states by batch number; empty when too large to keep."""
    sums: UnitSums
    """ce.zero, ce.mean per document."""


def shared_passes(passes: Passes, mean_D: "torch.Tensor", keep_states: bool) -> Shared:
    """Clean, zero and mean passes over all rows."""
    import torch

    hidden, sums = {}, UnitSums()
    for batch in passes.batches("clean, zero and mean"):
        x = batch.block.x_BLD
        if keep_states:
            hidden[batch.number] = passes.states(batch, x)
        arms = {"zero": torch.zeros_like(mean_D), "mean": mean_D}
        sums.add(batch.doc_M, {
            f"ce.{arm}": passes.constant_losses(batch, value.to(x)) for arm, value in arms.items()
        })
    return Shared(hidden, sums)


def estimates(
    own: UnitSums, ablations: UnitSums, full_tokens: float | None, seed: int, resamples: int,
) -> dict[str, Estimate]:
    """All metrics of METRICS B from sums per document.

    ``own``: n, ce, ce.sae, kl.sae, top1.sae, n.random, kl.random. ``ablations``: ce.zero, ce.mean.
    ``full_tokens``: size of the LM's pretraining text, None if unknown.
    """
    n, clean, patched = own.get("n"), own.get("ce"), own.get("ce.sae")
    generator = lambda metric: rng(seed, "downstream_loss", metric, "bootstrap")  # noqa: E731

    def ratio(metric: str, num: Floats, den: Floats) -> Estimate:
        return uncertainty.ratio(num, den, generator(metric), resamples=resamples)

    def recovered(metric: str, ablated: Floats) -> Estimate:
        def share(s: Floats) -> Floats:
            return np.where(s[..., 1] > 0, s[..., 0] / s[..., 1], np.nan)

        sums = np.stack([ablated - patched, ablated - clean], axis=1)
        return uncertainty.function_of_sums(sums, share, generator(metric), resamples=resamples, code="gate_failed")

    def compute(metric: str, law: ScalingLaw) -> Estimate:
        if full_tokens is None:
            return Estimate.undefined("gate_failed", n=len(n))
        sums = np.stack([patched - clean, n], axis=1)
        return uncertainty.function_of_sums(
            sums, lambda s: equivalent_compute(s[..., 0] / s[..., 1], full_tokens, law), generator(metric),
            resamples=resamples)

    floored = own.get("n.random") > 0  # only every so many batches carry the random error
    zero, mean = ablations.get("ce.zero"), ablations.get("ce.mean")
    return {
        "delta_ce": ratio("delta_ce", patched - clean, n),
        "kl": ratio("kl", own.get("kl.sae"), n),
        "top1_agree": ratio("top1_agree", own.get("top1.sae"), n),
        "ce_clean": ratio("ce_clean", clean, n),
        "floor_random_error_kl": ratio(
            "floor_random_error_kl", own.get("kl.random")[floored], own.get("n.random")[floored]),
        "floor_mean_delta_ce": ratio("floor_mean_delta_ce", mean - clean, n),
        "floor_zero_delta_ce": ratio("floor_zero_delta_ce", zero - clean, n),
        "ce_recovered_mean": recovered("ce_recovered_mean", mean),
        "ce_recovered_zero": recovered("ce_recovered_zero", zero),
        "equiv_compute": compute("equiv_compute", HOFFMANN),
        "equiv_compute_refit": compute("equiv_compute_refit", REFIT),
    }


def on_curve(own: UnitSums, curve: "Curve", ctx: EvalContext) -> Estimate:
    """The patched loss placed on the subject's own pretraining."""
    sums = np.stack([own.get("ce.sae") - own.get("ce"), own.get("n")], axis=1)
    return uncertainty.function_of_sums(
        sums, lambda s: curve.share(s[..., 0] / s[..., 1]), rng(ctx.seed, "downstream_loss", "equiv_compute_curve"),
        resamples=uncertainty.resamples_of(ctx.preset))


def pretraining_tokens(lm_name: str) -> float | None:
    """Tokens the LM was pretrained on, where published and known here."""
    lowered = lm_name.lower()
    return next((tokens for part, tokens in PRETRAINING_TOKENS.items() if part in lowered), None)


class DownstreamLoss:
    """METRICS B."""

    name = "downstream_loss"
    title = "Downstream loss"
    version = 1
    metrics: tuple[Metric, ...] = METRICS
    needs = frozenset({"lm", "test"})
    uses = frozenset({"reconstruct"})

    def config(self, preset: str) -> dict[str, Any]:
        """`tokens`: at most this many tokens of the split test, whole rows; the random error is measured in one batch
        of `random_error_every`; `pretraining_tokens` by LM name.
        """
        # METRICS has 16,384 tokens in quick: 85 s a subject on two AVX2 cores. 4,096 take 17 s (measured)
        tokens, every = {"quick": (4_096, 2), "paper": (500_000, 1), "tiny": (1_024, 1)}[preset]
        return {"tokens": tokens, "random_error_every": every, "pretraining_tokens": PRETRAINING_TOKENS}

    def lm_tokens(self, preset: str, n_subjects: int) -> tuple[int, int]:
        """Tokens (below, above) the hookpoint, for ``--dry-run``: about three passes a subject, PCA included."""
        return 0, 3 * self.config(preset)["tokens"] * (n_subjects + 1)

    def inputs(self, ctx: EvalContext) -> dict[str, str]:
        known = ctx.pretraining
        more = {"pretraining_tokens": str(known.tokens)} if known is not None and known.tokens else {}
        more |= {"curve": known.curve.key} if known is not None and known.curve is not None else {}
        return {"test": ctx.stores["test"].key, **more}

    def run(self, ctx: EvalContext) -> EvalResult:
        import torch

        from sae.tokens import drop_ids

        lm, store = ctx.lm, ctx.stores["test"]
        if lm.dtype != torch.float32:
            raise Unsupported(f"downstream_loss runs in float32, the LM is in {lm.dtype}; load it in float32")
        rows = choose_rows(store, max(1, self.config(ctx.preset)["tokens"] // store.tokens.L), ctx.seed, self.name)
        passes = Passes(lm.upper(ctx.hookpoint), store, rows, tuple(drop_ids(lm.tokenizer)), lm.device)
        with torch.inference_mode():
            mean_D = set_means(ctx, store, rows).filtered_D
            small = passes.upper.is_exact and rows.size * store.tokens.L * lm.d_model * 4 <= MEMO_BYTES
            shared: Shared = ctx.memo(
                f"{self.name}.{store.key}.{ctx.hookpoint}.{ctx.preset}.{ctx.seed}",
                lambda: shared_passes(passes, mean_D, small))
            own = self._own_passes(ctx, passes, shared)
        known = ctx.pretraining
        tokens = known.tokens if known is not None and known.tokens else pretraining_tokens(lm.name)
        found = estimates(own, shared.sums, tokens, ctx.seed, uncertainty.resamples_of(ctx.preset))
        if known is not None and known.curve is not None:
            found["equiv_compute_curve"] = on_curve(own, known.curve, ctx)
        return self._result(ctx, own, shared.sums, found)

    def _own_passes(self, ctx: EvalContext, passes: Passes, shared: Shared) -> UnitSums:
        import torch

        own, every = UnitSums(), self.config(ctx.preset)["random_error_every"]
        for batch in passes.batches(f"{self.name} {ctx.subject.info.sae_id[-28:]}"):
            x, keep = batch.block.x_BLD, batch.keep_BL
            patched = x.clone()
            patched[keep] = ctx.subject.reconstruct(x[keep]).to(x.dtype)
            clean = shared.hidden.get(batch.number)
            if clean is None:
                clean = passes.states(batch, x)
            arms, ones = {"sae": passes.states(batch, patched)}, np.ones(len(batch.doc_M))
            counts = {"n": ones}
            if batch.number % every == 0:
                noisy = torch.where(keep[..., None], x + random_error(x - patched, batch.block.rows_B, ctx.seed), x)
                arms["random"], counts["n.random"] = passes.states(batch, noisy), ones
            own.add(batch.doc_M, {**counts, **compare(passes, batch, clean, arms)})
        return own

    def _result(self, ctx: EvalContext, own: UnitSums, ablations: UnitSums, found: dict[str, Estimate]) -> EvalResult:
        made = RowMaker(self, ctx)
        for metric, estimate in found.items():
            made.add(metric, estimate, split="test")
        n, clean, patched = own.get("n"), own.get("ce"), own.get("ce.sae")
        table = {"delta_ce": (patched - clean, n), "kl": (own.get("kl.sae"), n), "top1_agree": (own.get("top1.sae"), n)}
        for arm in ("mean", "zero"):
            ablated = ablations.get(f"ce.{arm}")
            table[f"ce_recovered_{arm}"] = (ablated - patched, ablated - clean)
        counts = {"scored_tokens": int(n.sum()), "documents": len(n), "dtype": "float32",
                  "equiv_compute_clipped": bool((patched - clean).sum() <= 0)}
        return EvalResult(rows=made.rows, details=ratio_table(own.units, table), counts=counts, draws=made.draws)


PLUGIN = DownstreamLoss()
