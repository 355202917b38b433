"""D. Explanation reconstruction: what the language model loses when it reads activations that patterns predict
(METRICS D, after Gao et al. 4.4).

Latents are simulated by their N2G patterns, scaled on the split explain, decoded, and spliced in at the positions of
`test` that pass the token filter. Mode full: every alive latent is simulated, nothing else is decoded. Mode subset: a
sample S of explained latents is simulated, the others keep their true activation a. The metrics of the two modes have
names of their own. U documents, S latents.
"""

from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from evals import patterns, uncertainty
from evals.base import EvalContext, EvalResult, RowMaker, SAESubject
from evals.n2g_scores import partners_of_like_density
from evals.passes import MEMO_BYTES, Batch, Passes, compare
from evals.results import Estimate, Metric
from evals.simulated import Simulation, codes_at, fitted_scales, joined, mask_of, simulate, without
from evals.units import Floats, UnitSums, choose_rows, ratio_table
from sae.errors import Unsupported
from sae.manifest import content_of, rng

if TYPE_CHECKING:
    import torch

    from autointerp.latent_cache import LatentCache
    from autointerp.n2g_patterns import PatternSet

GAO = "Gao et al. 2024 (arXiv 2406.04093) 4.4"
BY_DOCUMENT = "Interval: documents; the latents are held fixed."
FULL_UP_TO = {"quick": 0, "paper": 8_192, "tiny": 0}
"""Widest SAE of which every alive latent is explained; of a wider one, and in the other presets, a subset is."""
BUILD_TOKENS = 400
"""Tokens forwarded to build one latent's patterns where few are built; about a hundred where all of 4,608 are (decision
037)."""
SAME_ROWS_AS = "downstream_loss"
"""Rows are drawn for the same purpose, so that both evaluations read the same documents."""
Mode = Literal["full", "subset"]


def _metric(
    name: str, title: str, description: str, *, better: Literal["higher", "lower", "neither"], unit: str = "nats/token",
    headline: bool = False, low: float = -np.inf, reference: str = "METRICS D",
) -> Metric:
    return Metric(name=name, title=title, unit=unit, better=better, description=f"{description} {BY_DOCUMENT}",
                  headline=headline, low=low, reference=reference)


METRICS = (
    _metric("delta_ce", "Delta CE, explained", "Loss with the decoded simulation of all alive latents, minus the clean "
            "loss.", better="lower", headline=True, reference=GAO),
    _metric("kl", "KL, explained", "Mean KL(clean || simulated) of the next-token distribution.", better="lower",
            low=-1e-5, headline=True, reference=GAO),
    _metric("ce_simulated", "CE, explained", "Loss with the decoded simulation.", better="lower", low=0.0),
    _metric("floor_bigram_ce", "CE of a bigram model", "Loss of a bigram model of the training text on the same "
            "predictions; add-0.1, backing off to the unigram.", better="neither", low=0.0, reference=GAO),
    _metric("gain_over_bigram", "CE below the bigram model", "CE of the bigram model minus CE of the simulation.",
            better="higher"),
    _metric("floor_shuffled_delta_ce", "Delta CE, shuffled patterns", "delta_ce with the patterns of another latent of "
            "like density, scaled anew.", better="neither"),
    _metric("gain_over_shuffled", "Delta CE below shuffled patterns", "floor_shuffled_delta_ce minus delta_ce.",
            better="higher"),
    _metric("loss_recovered_subset", "Loss recovered, subset", "(CE_0 - CE_s) / (CE_0 - CE_a): of the loss that taking "
            "the sampled latents out adds, the share that their simulation saves. Undefined (no_effect) unless the "
            "interval of CE_0 - CE_a lies above 0.", better="higher", unit="share", headline=True),
    _metric("loss_of_subset", "Loss of the subset", "CE_0 - CE_a: what taking the sampled latents out adds.",
            better="neither"),
    _metric("delta_ce_subset", "Delta CE, subset explained", "Loss with the sampled latents simulated and the others "
            "true, minus the clean loss.", better="lower"),
    _metric("kl_subset", "KL, subset explained", "Mean KL(clean || the same).", better="lower", low=-1e-5),
    _metric("floor_shuffled_recovered", "Loss recovered, shuffled patterns", "loss_recovered_subset with the patterns "
            "of another sampled latent of like density, scaled anew.", better="neither", unit="share"),
    _metric("gain_over_shuffled_recovered", "Loss recovered over shuffled patterns", "loss_recovered_subset minus "
            "floor_shuffled_recovered, paired.", better="higher", unit="share"),
)  # fmt: skip
HEADLINES: dict[Mode, tuple[str, ...]] = {"full": ("delta_ce", "kl"), "subset": ("loss_recovered_subset",)}


class Plan(NamedTuple):
    """What is simulated, and by what."""

    mode: Mode
    simulated: Simulation
    """By each latent's own patterns."""
    shuffled: Simulation
    """By those of another latent of like density."""
    latents: tuple[int, ...]
    """Those that have patterns."""
    scales: dict[int, float]


def alive_latents(cache: "LatentCache") -> list[int]:
    """Latents with an activation on the split explain, ascending."""
    return [int(i) for i in np.flatnonzero(cache.stats["n_active"].to_numpy() > 0)]


def recovered(
    saved_U: Floats, worth_U: Floats, n_U: Floats, metric: str, seed: int, resamples: int, n_failed: int = 0
) -> Estimate:
    """Σ saved / Σ worth over documents, worth = CE_0 - CE_a summed over the n scored tokens of each.

    Undefined with code `no_effect` unless the interval of the worth per token lies above 0: a share of nothing is noise
    (METRICS D). `too_few_rows` where the documents are too few for an interval.
    """
    worth = loss_of_subset(worth_U, n_U, seed, resamples)
    if worth.value is None or worth.ci_low is None or worth.ci_low <= 0:
        code = worth.failure or ("too_few_rows" if len(n_U) < uncertainty.MIN_UNITS else "no_effect")
        return Estimate.undefined(code, n=len(n_U), n_failed=n_failed)

    def share(s: Floats) -> Floats:
        return np.where(s[..., 1] > 0, s[..., 0] / s[..., 1], np.nan)

    return uncertainty.function_of_sums(
        np.stack([saved_U, worth_U], axis=1), share, rng(seed, "n2g_loss", metric, "bootstrap"), resamples=resamples,
        code="no_effect", n_failed=n_failed)


def loss_of_subset(worth_U: Floats, n_U: Floats, seed: int, resamples: int) -> Estimate:
    """CE_0 - CE_a per scored token."""
    return uncertainty.ratio(worth_U, n_U, rng(seed, "n2g_loss", "loss_of_subset", "bootstrap"), resamples=resamples)


def estimates(mode: Mode, sums: UnitSums, seed: int, resamples: int, n_failed: int) -> dict[str, Estimate]:
    """All metrics of a mode from sums per document.

    n, ce (clean), ce.sim, kl.sim, ce.shuffled; full: ce.bigram where there is a training text; subset: ce.own, ce.zero.
    """
    n, clean, sim, shuffled = (sums.get(name) for name in ("n", "ce", "ce.sim", "ce.shuffled"))

    def ratio(metric: str, num: Floats) -> Estimate:
        generator = rng(seed, "n2g_loss", metric, "bootstrap")
        return uncertainty.ratio(num, n, generator, resamples=resamples, n_failed=n_failed)

    if mode == "full":
        found = {"delta_ce": ratio("delta_ce", sim - clean), "kl": ratio("kl", sums.get("kl.sim")),
                 "ce_simulated": ratio("ce_simulated", sim),
                 "floor_shuffled_delta_ce": ratio("floor_shuffled_delta_ce", shuffled - clean),
                 "gain_over_shuffled": ratio("gain_over_shuffled", shuffled - sim)}
        bigram = sums.get("ce.bigram")
        if bigram.any():
            found |= {"floor_bigram_ce": ratio("floor_bigram_ce", bigram),
                      "gain_over_bigram": ratio("gain_over_bigram", bigram - sim)}
        return found
    zero, own = sums.get("ce.zero"), sums.get("ce.own")
    saved = {"loss_recovered_subset": zero - sim, "floor_shuffled_recovered": zero - shuffled,
             "gain_over_shuffled_recovered": shuffled - sim}
    shares = {m: recovered(of, zero - own, n, m, seed, resamples, n_failed) for m, of in saved.items()}
    return {
        **shares,
        "loss_of_subset": loss_of_subset(zero - own, n, seed, resamples),
        "delta_ce_subset": ratio("delta_ce_subset", sim - clean),
        "kl_subset": ratio("kl_subset", sums.get("kl.sim")),
    }


def simulations(
    ctx: EvalContext, found: "dict[int, PatternSet]", tokens_BL: np.ndarray, keep_N: np.ndarray
) -> tuple[Simulation, Simulation, dict[int, float]]:
    """By each latent's own patterns and by another's, both scaled on explain; and the scales of the first."""
    from autointerp.n2g_patterns import TokenIndex

    cache = patterns.latent_cache(ctx)
    explain, test = TokenIndex(np.asarray(cache.tokens("explain").tokens_BL)), TokenIndex(tokens_BL)
    latents = sorted(found)
    n_active = cache.stats["n_active"].to_numpy()
    partner = partners_of_like_density(latents, [float(n_active[i]) for i in latents])
    swapped = {i: found[partner[i]] for i in partner}
    scales = fitted_scales(cache, found, explain)
    return (simulate(found, scales, test, keep_N),
            simulate(swapped, fitted_scales(cache, swapped, explain), test, keep_N), scales)


class Splicer:
    """The arms of one subject: what replaces the activations of a batch."""

    def __init__(self, subject: SAESubject, plan: Plan, rows: np.ndarray, L: int) -> None:
        self.subject, self.plan = subject, plan
        self.chosen_F = mask_of(plan.latents, subject.info.d_sae)
        self.first = {int(row): place * L for place, row in enumerate(rows)}
        """Simulations count tokens over the chosen rows alone."""

    def arms(self, batch: Batch) -> "dict[str, torch.Tensor]":
        """x_BLD of every arm; tokens that the filter drops keep their own activation."""
        x, keep, L = batch.block.x_BLD, batch.block.keep_BL, batch.block.x_BLD.shape[1]
        begins = np.array([self.first[int(row)] for row in batch.block.rows_B], dtype=np.int64)
        flat = (begins[:, None] + np.arange(L))[keep]
        by = {"sim": codes_at(self.plan.simulated, flat), "shuffled": codes_at(self.plan.shuffled, flat)}
        if self.plan.mode == "subset":
            own = self.subject.encode_sparse(x[keep])
            zero = without(own, self.chosen_F)
            by = {"own": own, "zero": zero} | {name: joined(zero, codes) for name, codes in by.items()}
        patched = {}
        for name, codes in by.items():
            patched[name] = x.clone()
            patched[name][keep] = self.subject.decode(codes, x[keep]).to(x.dtype)
        return patched


class N2GLoss:
    """METRICS D, `n2g_loss`."""

    name = "n2g_loss"
    title = "Explanation reconstruction"
    version = 2
    metrics: tuple[Metric, ...] = METRICS
    needs = frozenset({"interp", "scores", "lm", "test", "train_text"})
    uses = frozenset({"sparse", "reconstruct"})
    default_in = ("paper",)
    """Presets in which it runs without being named (METRICS, table of evaluations)."""
    units = "documents"

    def config(self, preset: str) -> dict[str, Any]:
        """`tokens`: at most this many tokens of the split test, whole rows; `latents`: of the subset."""
        tokens = {"quick": 4_096, "paper": 500_000, "tiny": 1_024}[preset]
        return {"tokens": tokens, "latents": patterns.LATENTS[preset], "pairs": patterns.PAIRS,
                "full_up_to": FULL_UP_TO[preset]}

    def lm_tokens(self, preset: str, n_subjects: int) -> tuple[int, int]:
        """Tokens (below, above) the hookpoint, for ``--dry-run``: patterns of the subset as if none were explained;
        clean once, four arms a subject."""
        config = self.config(preset)
        return config["latents"] * BUILD_TOKENS * n_subjects, config["tokens"] * (4 * n_subjects + 1)

    def mode(self, ctx: EvalContext) -> Mode:
        """By the width of the subject and the preset."""
        return "full" if ctx.subject.info.d_sae <= self.config(ctx.preset)["full_up_to"] else "subset"

    def inputs(self, ctx: EvalContext) -> dict[str, str]:
        inputs = {"latents": patterns.latent_cache(ctx).key, "test": ctx.stores["test"].key}
        if ctx.scores is not None:
            inputs["scores"] = content_of(ctx.scores)
        if ctx.train_text is not None and self.mode(ctx) == "full":
            inputs["train_text"] = ctx.train_text.key
        return inputs

    def run(self, ctx: EvalContext) -> EvalResult:
        """Rows of the subject's mode; the details are sums per document."""
        import torch

        from sae.tokens import drop_ids

        lm, store, subject = ctx.lm, ctx.stores["test"], ctx.subject
        if not isinstance(subject, SAESubject):
            raise Unsupported(f"{self.name} decodes simulated codes, {subject.info.sae_id} is no SAE")
        if lm.dtype != torch.float32:
            raise Unsupported(f"{self.name} runs in float32, the LM is in {lm.dtype}; load it in float32")
        mode, cache, config = self.mode(ctx), patterns.latent_cache(ctx), self.config(ctx.preset)
        asked = alive_latents(cache) if mode == "full" else patterns.stratified_latents(
            cache, config["latents"], ctx.seed)
        found, failures = patterns.patterns_of(ctx, asked)
        if not found:
            return self._undefined(ctx, mode, failures)
        L = store.tokens.L
        rows = choose_rows(store, max(1, config["tokens"] // L), ctx.seed, SAME_ROWS_AS)
        keep_N = np.asarray(store.keep_N).reshape(-1, L)[rows].ravel()
        simulated, shuffled, scales = simulations(ctx, found, np.asarray(store.tokens.tokens_BL[rows]), keep_N)
        plan = Plan(mode, simulated, shuffled, tuple(sorted(found)), scales)
        special = tuple(drop_ids(lm.tokenizer))
        passes = Passes(lm.upper(ctx.hookpoint), store, rows, special, lm.device)
        with torch.inference_mode():
            sums = self._passes(ctx, passes, Splicer(subject, plan, rows, L))
        return self._result(ctx, plan, sums, failures)

    def _passes(self, ctx: EvalContext, passes: Passes, splicer: Splicer) -> UnitSums:
        sums, store = UnitSums(), passes.store
        bigram = self._bigram(ctx, passes) if splicer.plan.mode == "full" else None
        kept: dict[int, Any] = ctx.memo(f"{self.name}.clean.{store.key}.{ctx.hookpoint}.{ctx.preset}.{ctx.seed}", dict)
        small = passes.upper.is_exact and passes.rows.size * store.tokens.L * store.d_in * 4 <= MEMO_BYTES
        done = 0
        for batch in passes.batches(f"{self.name} {ctx.subject.info.sae_id[-28:]}"):
            clean = kept.get(batch.number)
            if clean is None:
                clean = passes.states(batch, batch.block.x_BLD)
                if small:
                    kept[batch.number] = clean
            states = {name: passes.states(batch, x) for name, x in splicer.arms(batch).items()}
            values = {"n": np.ones(len(batch.doc_M)), **compare(passes, batch, clean, states)}
            if bigram is not None:
                values["ce.bigram"] = bigram[done : done + len(batch.doc_M)]
                done += len(batch.doc_M)
            sums.add(batch.doc_M, values)
        return sums

    def _bigram(self, ctx: EvalContext, passes: Passes) -> Floats | None:
        """Loss of the bigram model on every scored prediction, in the order of the passes; None without its text."""
        from evals.bigram import losses

        if ctx.train_text is None:
            return None
        text, store = ctx.train_text, passes.store

        def build() -> Floats:
            first, following = passes.predictions()
            return losses(text, first, following, passes.special, ctx.lm.vocab_size)

        found: Floats = ctx.memo(f"{self.name}.bigram.{store.key}.{text.key}.{ctx.preset}.{ctx.seed}", build)
        return found

    def _undefined(self, ctx: EvalContext, mode: Mode, failures: dict[int, str]) -> EvalResult:
        codes = list(failures.values())
        code = max(sorted(set(codes)), key=codes.count) if codes else "too_few_positive"
        made = RowMaker(self, ctx)
        for metric in HEADLINES[mode]:
            made.add(metric, Estimate.undefined(code, n_failed=len(failures)), split="test")
        return EvalResult(rows=made.rows, counts={"mode": mode, "n_latents": 0, "n_failed_builds": len(failures)})

    def _result(self, ctx: EvalContext, plan: Plan, sums: UnitSums, failures: dict[int, str]) -> EvalResult:
        made = RowMaker(self, ctx)
        for metric, estimate in estimates(
            plan.mode, sums, ctx.seed, uncertainty.resamples_of(ctx.preset), len(failures)
        ).items():
            made.add(metric, estimate, split="test")
        n, clean, sim = sums.get("n"), sums.get("ce"), sums.get("ce.sim")
        scales = np.array([plan.scales[i] for i in plan.latents])
        counts = {
            "mode": plan.mode, "n_latents": len(plan.latents), "n_failed_builds": len(failures),
            "n_scale_0": int((scales == 0).sum()), "median_scale": float(np.median(scales)),
            "n_alive": len(alive_latents(patterns.latent_cache(ctx))), "scored_tokens": int(n.sum()),
            "documents": len(n), "dtype": "float32",
        }  # fmt: skip
        if plan.mode == "full":
            table = {"delta_ce": (sim - clean, n), "kl": (sums.get("kl.sim"), n), "ce_simulated": (sim, n)}
        else:
            zero, own = sums.get("ce.zero"), sums.get("ce.own")
            table = {"loss_recovered_subset": (zero - sim, zero - own), "loss_of_subset": (zero - own, n),
                     "delta_ce_subset": (sim - clean, n), "kl_subset": (sums.get("kl.sim"), n)}
        return EvalResult(rows=made.rows, details=ratio_table(sums.units, table), counts=counts, draws=made.draws)


PLUGIN = N2GLoss()
