"""A. Reconstruction: how much of the activation the code keeps, with how many active latents (METRICS A).

N tokens, D = d_in, F = d_sae, U documents, x the activation, x_hat its reconstruction, r = x - x_hat, m the mean of x
over the whole evaluated set (never of a batch). One streaming pass; float64 sums per document.
"""

from typing import TYPE_CHECKING, Any

import numpy as np

from evals import uncertainty
from evals.base import EvalContext, EvalResult, RowMaker
from evals.results import Estimate, Metric
from evals.units import (
    BLOCK_TOKENS,
    Floats,
    SetMeans,
    UnitSums,
    UnitVectors,
    blocks,
    choose_rows,
    ratio_table,
    set_means,
)
from sae.manifest import rng

if TYPE_CHECKING:
    import torch

    from evals.base import Normalisation
    from sae.activations import ActivationStore
    from sae.base import SAE, SparseLatents

GAO = "Gao et al. 2024 (arXiv 2406.04093)"
BY_DOCUMENT = "Interval: documents."
DEAD_10M_TOKENS = 10_000_000
HISTOGRAM_STEP, HISTOGRAM_LOW = 0.25, -7.0
REFINED_TOKENS = {"paper": 16_384}
"""Tokens whose values are made best; in no other preset."""
REFINED_BLOCK = 2_048

METRICS = (
    Metric(name="fvu", title="FVU", unit="share of variance", better="lower", low=0.0, headline=True,
           description="sum |x - x_hat|^2 / sum |x - m|^2 over filtered tokens; always predicting the mean scores 1 by "
           "definition. m is held fixed in the resamples. " + BY_DOCUMENT,
           reference=f"{GAO} 2.1, normalised MSE against the mean predictor; m is taken from the evaluated set"),
    Metric(name="explained_variance", title="Explained variance", unit="share of variance", better="higher", high=1.0,
           description="1 - fvu. " + BY_DOCUMENT, reference="as fvu"),
    Metric(name="fvu_normalized", title="FVU, normalised space", unit="share of variance", better="lower", low=0.0,
           description="fvu of (x - shift) / scale, the space behind the SAE's input norm. " + BY_DOCUMENT,
           reference=f"{GAO} A.1: the paper's MSE is taken on normalised activations; eps left out of the scale"),
    Metric(name="nmse_zero", title="NMSE against zero", unit="ratio", better="lower", low=0.0,
           description="mean over tokens of |r|^2 / |x|^2; for old figures only. " + BY_DOCUMENT,
           reference="openai/sparse_autoencoder README; issue 8 there"),
    Metric(name="fvu_unfiltered", title="FVU, no token dropped", unit="share of variance", better="neither", low=0.0,
           description="fvu with no token dropped (attention sinks decide it); never ranked. " + BY_DOCUMENT,
           reference="as fvu"),
    Metric(name="cosine", title="Cosine", unit="cosine", better="higher", low=-1.0, high=1.0,
           description="mean cos(x, x_hat); a zero vector counts as 0. " + BY_DOCUMENT, reference="METRICS A"),
    Metric(name="cosine_centred", title="Cosine, centred", unit="cosine", better="higher", low=-1.0, high=1.0,
           description="mean cos(x - m, x_hat - m); a zero vector counts as 0. " + BY_DOCUMENT, reference="METRICS A"),
    Metric(name="l0", title="L0", unit="latents", better="neither", low=0.0, headline=True,
           description="mean number of active latents (z > 0) per token; for PCA the components kept. " + BY_DOCUMENT,
           reference=f"{GAO} 2"),
    Metric(name="l0_p05", title="L0, 5th percentile", unit="latents", better="neither", low=0.0,
           description="5 % of the tokens have at most this many active latents. " + BY_DOCUMENT,
           reference="METRICS A"),
    Metric(name="l0_p95", title="L0, 95th percentile", unit="latents", better="neither", low=0.0,
           description="95 % of the tokens have at most this many active latents. " + BY_DOCUMENT,
           reference="METRICS A"),
    Metric(name="shrinkage", title="Shrinkage", unit="share", better="neither",
           description="1 - sum |x_hat - m|^2 / sum (x_hat - m).(x - m); above 0: outputs too small; best is 0. "
           + BY_DOCUMENT, reference="Wright and Sharkey 2024 (feature suppression), as a regression slope"),
    Metric(name="norm_ratio", title="Norm ratio", unit="ratio", better="neither", low=0.0,
           description="sqrt(sum |x_hat|^2 / sum |x|^2); best is 1. " + BY_DOCUMENT, reference="METRICS A"),
    Metric(name="bias_norm", title="Bias", unit="standard deviations", better="lower", low=0.0,
           description="|mean r| / sqrt(mean |x - m|^2). Interval: documents, along the mean residual (delta method).",
           reference="METRICS A"),
    Metric(name="fvu_refined", title="FVU with the best values", unit="share of variance", better="lower", low=0.0,
           description="fvu on a part of the tokens with the encoder's choice of latents and the decoder kept and the "
           "active values made best; preset paper alone. " + BY_DOCUMENT, reference=f"{GAO} 5.1"),
    Metric(name="fvu_of_values", title="FVU by imperfect values", unit="share of variance", better="lower",
           description="fvu on those tokens minus fvu_refined: the cost of imperfect values. " + BY_DOCUMENT,
           reference=f"{GAO} 5.1"),
    Metric(name="dead_frac", title="Dead latents", unit="share", better="lower", low=0.0, high=1.0, headline=True,
           description="share of latents active on no evaluated token; n = tokens. A latent unseen in T tokens has a "
           "density below 3/T at 95 %. No interval: latents are all there are.", reference="METRICS A"),
    Metric(name="dead_frac_10m", title="Dead latents in 10 M tokens", unit="share", better="lower", low=0.0, high=1.0,
           description="dead_frac, only where at least 10 M tokens were seen; n = tokens.", reference=f"{GAO} 2.4"),
    Metric(name="dense_frac_01", title="Latents denser than 1 %", unit="share", better="lower", low=0.0, high=1.0,
           description="share of latents active on more than 1 % of tokens; n = tokens.", reference="METRICS A"),
    Metric(name="dense_frac_10", title="Latents denser than 10 %", unit="share", better="lower", low=0.0, high=1.0,
           description="share of latents active on more than 10 % of tokens; n = tokens.", reference="METRICS A"),
)


def _dot(a: "torch.Tensor", b: "torch.Tensor") -> "torch.Tensor":
    return (a * b).sum(dim=-1)


def _cosine(dot: "torch.Tensor", square_a: "torch.Tensor", square_b: "torch.Tensor") -> "torch.Tensor":
    import torch

    length = (square_a * square_b).sqrt()
    return torch.where(length > 0, dot / length.clamp_min(1e-300), 0.0).clamp(-1.0, 1.0)


class Accumulator:
    """Float64 sums of one subject, filled block by block in any order."""

    def __init__(self, means: SetMeans, d_sae: int | None) -> None:
        """``d_sae``: number of latents, None for a subject without codes."""
        self.means = means
        width = len(means.filtered_D)
        self.sums, self.all_sums = UnitSums(), UnitSums()
        """Over filtered tokens; over all tokens (fvu_unfiltered)."""
        self.residual, self.normalised = UnitVectors(width), UnitVectors(width)
        self.active_F = None if d_sae is None else np.zeros(d_sae, dtype=np.int64)
        self.l0_counts: dict[int, UnitSums] = {}
        self.n_tokens = 0
        self.first_bad_document: int | None = None

    def add(
        self, x_ND: "torch.Tensor", x_hat_ND: "torch.Tensor", doc_N: np.ndarray, keep_N: np.ndarray,
        codes: "SparseLatents | None" = None, norm: "Normalisation | None" = None,
    ) -> None:
        """One block: activations, reconstructions, document and filter of each token, codes, input norm."""
        import torch

        r, centred = x_ND.double() - x_hat_ND.double(), x_ND.double() - self.means.all_D
        self.all_sums.add(doc_N, {"error": _dot(r, r).numpy(), "variance": _dot(centred, centred).numpy()})
        keep = torch.from_numpy(np.asarray(keep_N, dtype=bool))
        if not bool(keep.any()):
            return
        doc, x, x_hat = np.asarray(doc_N)[np.asarray(keep_N)], x_ND[keep].double(), x_hat_ND[keep].double()
        self.n_tokens += len(x)
        self._note_bad(doc, x_hat)
        self.sums.add(doc, _token_sums(x, x_hat, self.means.filtered_D))
        self.residual.add(doc, (x - x_hat).numpy())
        if norm is not None:
            scale = norm.scale_N[keep].double().clamp_min(1e-30)
            n_ND = (x - norm.shift_N[keep].double()[:, None]) / scale[:, None]
            self.normalised.add(doc, n_ND.numpy())
            error = _dot(x - x_hat, x - x_hat) / scale.square()
            self.sums.add(doc, {"error_n": error.numpy(), "square_n": _dot(n_ND, n_ND).numpy()})
        if codes is not None:
            self._count(doc, codes.values_NK[keep], codes.indices_NK[keep])

    def _note_bad(self, doc: np.ndarray, x_hat: "torch.Tensor") -> None:
        bad = ~x_hat.isfinite().all(dim=-1).numpy()
        if bad.any():
            first = int(doc[bad].min())
            self.first_bad_document = first if self.first_bad_document is None else min(self.first_bad_document, first)

    def _count(self, doc: np.ndarray, values_NK: "torch.Tensor", indices_NK: "torch.Tensor") -> None:
        assert self.active_F is not None
        active = values_NK > 0
        self.active_F += np.bincount(indices_NK[active].numpy().astype(np.int64), minlength=len(self.active_F))
        l0 = active.sum(dim=-1).numpy()
        self.sums.add(doc, {"l0": l0})
        for value in np.unique(l0):
            chosen = doc[l0 == value]
            self.l0_counts.setdefault(int(value), UnitSums()).add(chosen, {"n": np.ones(len(chosen))})

    def normalised_variance_U(self) -> Floats:
        """Sum over each document's tokens of |n - mean n|^2, the mean over all documents."""
        n_U, vectors_UD = self.sums.get("n"), self.normalised.get()
        mean_D = vectors_UD.sum(axis=0) / n_U.sum()
        variance: Floats = self.sums.get("square_n") - 2 * vectors_UD @ mean_D + n_U * float(mean_D @ mean_D)
        return variance

    def l0_histogram(self) -> tuple[Floats, Floats]:
        """Sorted L0 values [C] and tokens of each document with each [U, C]."""
        units, values = self.sums.units, sorted(self.l0_counts)
        table = np.zeros((len(units), len(values)))
        for column, value in enumerate(values):
            counts = self.l0_counts[value]
            table[np.searchsorted(units, counts.units), column] = counts.get("n")
        return np.array(values, dtype=np.float64), table


def _token_sums(x: "torch.Tensor", x_hat: "torch.Tensor", mean_D: "torch.Tensor") -> dict[str, Any]:
    """Per token, float64: the quantities of METRICS A whose sums give all ratios."""
    r, centred, hat_centred = x - x_hat, x - mean_D, x_hat - mean_D
    error, square, hat_square = _dot(r, r), _dot(x, x), _dot(x_hat, x_hat)
    variance, hat_variance, both = _dot(centred, centred), _dot(hat_centred, hat_centred), _dot(centred, hat_centred)
    values = {
        "error": error, "square": square, "hat_square": hat_square, "variance": variance, "hat_variance": hat_variance,
        "covariance": both, "relative": error / square.clamp_min(1e-300),
        "cosine": _cosine(_dot(x, x_hat), square, hat_square),
        "cosine_centred": _cosine(both, variance, hat_variance),
    }
    return {name: value.numpy() for name, value in values.items()} | {"n": np.ones(len(x))}


def quantile_of_counts(values_C: Floats, share: float) -> uncertainty.SumsFunction:
    """Function of (tokens with each value) [..., C]: the smallest value that ``share`` of the tokens do not exceed."""

    def quantile(counts: Floats) -> Floats:
        running = np.cumsum(counts, axis=-1)
        # the tolerance keeps 0.95 * 20 = 19.000000000000004 from asking for one token more
        reached = running >= share * running[..., -1:] - 1e-9
        found: Floats = values_C[np.argmax(reached, axis=-1)]
        return found

    return quantile


def estimates(acc: Accumulator, seed: int, resamples: int) -> dict[str, Estimate]:
    """All metrics of METRICS A from the sums of one subject."""
    sums = acc.sums
    generator = lambda metric: rng(seed, "reconstruction", metric, "bootstrap")  # noqa: E731

    def of(metric: str, f: uncertainty.SumsFunction, *names: str, code: str = "constant_target") -> Estimate:
        return uncertainty.function_of_sums(sums.stack(*names), f, generator(metric), resamples=resamples, code=code)

    constant = sums.total("variance") <= 1e-12 * sums.total("square")
    n_units = len(sums.units)
    found = {
        "cosine": of("cosine", _share, "cosine", "n", code="too_few_rows"),
        "nmse_zero": of("nmse_zero", _share, "relative", "n", code="too_few_rows"),
        "norm_ratio": of("norm_ratio", lambda s: np.sqrt(_share(s)), "hat_square", "square"),
        "fvu_unfiltered": uncertainty.function_of_sums(
            acc.all_sums.stack("error", "variance"), _share, generator("fvu_unfiltered"), resamples=resamples,
            code="constant_target"),
    }
    if constant:
        names = ("fvu", "explained_variance", "fvu_normalized", "cosine_centred", "shrinkage", "bias_norm")
        return found | {name: Estimate.undefined("constant_target", n=n_units) for name in names}
    return found | {
        "fvu": of("fvu", _share, "error", "variance"),
        "explained_variance": of("explained_variance", lambda s: 1 - _share(s), "error", "variance"),
        "cosine_centred": of("cosine_centred", _share, "cosine_centred", "n"),
        "shrinkage": of("shrinkage", lambda s: 1 - _share(s), "hat_variance", "covariance", code="no_effect"),
        "bias_norm": _bias_norm(acc, generator("bias_norm"), resamples),
        "fvu_normalized": uncertainty.ratio(
            sums.get("error_n"), acc.normalised_variance_U(), generator("fvu_normalized"), resamples=resamples,
            code="constant_target"),
    }


def _share(sums: Floats) -> Floats:
    return np.where(sums[..., 1] == 0, np.nan, sums[..., 0] / sums[..., 1])


def _bias_norm(acc: Accumulator, generator: np.random.Generator, resamples: int) -> Estimate:
    residual_UD = acc.residual.get()
    total_D = residual_UD.sum(axis=0)
    if not np.isfinite(total_D).all():
        return Estimate.undefined("non_finite", n=len(residual_UD))
    length = float(np.linalg.norm(total_D))
    # a resampled norm is biased upwards; the projection on the mean residual is not, and has the same value
    along_U = residual_UD @ (total_D / length) if length > 0 else np.zeros(len(residual_UD))
    sums = np.stack([along_U, acc.sums.get("n"), acc.sums.get("variance")], axis=1)

    def bias(s: Floats) -> Floats:
        size: Floats = np.abs(s[..., 0]) / s[..., 1] / np.sqrt(s[..., 2] / s[..., 1])
        return size

    return uncertainty.function_of_sums(sums, bias, generator, resamples=resamples, code="constant_target")


def code_estimates(acc: Accumulator, seed: int, resamples: int) -> dict[str, Estimate]:
    """L0 and densities; only for a subject with codes."""
    assert acc.active_F is not None
    generator = lambda metric: rng(seed, "reconstruction", metric, "bootstrap")  # noqa: E731
    values_C, table_UC = acc.l0_histogram()
    n = acc.n_tokens
    density_F = acc.active_F / max(n, 1)

    def share(mask_F: np.ndarray) -> Estimate:
        return Estimate(value=float(mask_F.mean()), n=n) if n else Estimate.undefined("too_few_rows")

    dead = share(acc.active_F == 0)
    return {
        "l0": uncertainty.ratio(acc.sums.get("l0"), acc.sums.get("n"), generator("l0"), resamples=resamples),
        "l0_p05": uncertainty.function_of_sums(
            table_UC, quantile_of_counts(values_C, 0.05), generator("l0_p05"), resamples=resamples),
        "l0_p95": uncertainty.function_of_sums(
            table_UC, quantile_of_counts(values_C, 0.95), generator("l0_p95"), resamples=resamples),
        "dead_frac": dead,
        "dead_frac_10m": dead if n >= DEAD_10M_TOKENS else Estimate.undefined("too_few_rows", n=n),
        "dense_frac_01": share(density_F > 0.01),
        "dense_frac_10": share(density_F > 0.1),
    }


def refined_estimates(
    sae: "SAE", store: "ActivationStore", rows: np.ndarray, means: SetMeans, seed: int, resamples: int
) -> dict[str, Estimate]:
    """``fvu_refined`` and ``fvu_of_values`` on the filtered tokens of ``rows``."""
    import torch

    from sae.refine import refine

    sums = UnitSums()
    for block in blocks(store, rows, REFINED_BLOCK, f"best values {sae.sae_id[-28:]}"):
        x = block.x_BLD[torch.from_numpy(block.keep_BL)]
        if not len(x):
            continue
        here, centred = x.to(sae.W_dec_FD.device), x.double() - means.filtered_D
        found = {"variance": _dot(centred, centred).numpy()}
        for name, codes in (("before", sae.encode_sparse(here)), ("after", refine(sae, here))):
            r = x.double() - sae.decode(codes, here).double().cpu()
            found[name] = _dot(r, r).numpy()
        sums.add(block.doc_BL[block.keep_BL], found)
    before, after, variance = (sums.get(name) for name in ("before", "after", "variance"))
    return {
        name: uncertainty.ratio(num, variance, rng(seed, "reconstruction", name, "bootstrap"), resamples=resamples,
                                code="constant_target")
        for name, num in (("fvu_refined", after), ("fvu_of_values", before - after))
    }  # fmt: skip


def density_histogram(active_F: np.ndarray, n_tokens: int) -> dict[str, int]:
    """Latents per bin of log10 density, in steps of 0.25 from -7 to 0, and `dead`. Lower bin edges are the keys."""
    alive = active_F[active_F > 0] / max(n_tokens, 1)
    edges = np.arange(HISTOGRAM_LOW, 0, HISTOGRAM_STEP)
    # the last bin holds density 1 as well, the first all that is rarer
    places = np.clip(((np.log10(alive) - HISTOGRAM_LOW) // HISTOGRAM_STEP).astype(int), 0, len(edges) - 1)
    counts = np.bincount(places, minlength=len(edges))
    return {"dead": int((active_F == 0).sum())} | {f"{e:.2f}": int(c) for e, c in zip(edges, counts, strict=True)}


class Reconstruction:
    """METRICS A."""

    name = "reconstruction"
    title = "Reconstruction"
    version = 1
    metrics: tuple[Metric, ...] = METRICS
    needs = frozenset({"test"})
    uses = frozenset({"reconstruct"})

    def config(self, preset: str) -> dict[str, Any]:
        """`tokens`: at most this many tokens of the split test, whole rows."""
        sizes = {"tokens": {"quick": 65_536, "paper": 2_000_000, "tiny": 4_096}[preset]}
        return sizes | ({"refined_tokens": REFINED_TOKENS[preset]} if preset in REFINED_TOKENS else {})

    def inputs(self, ctx: EvalContext) -> dict[str, str]:
        return {"test": ctx.stores["test"].key}

    def run(self, ctx: EvalContext) -> EvalResult:
        import torch

        store, subject = ctx.stores["test"], ctx.subject
        rows = choose_rows(store, max(1, self.config(ctx.preset)["tokens"] // store.tokens.L), ctx.seed, self.name)
        coded = "sparse" in subject.provides
        means, resamples = set_means(ctx, store, rows), uncertainty.resamples_of(ctx.preset)
        acc = Accumulator(means, subject.info.d_sae if coded else None)
        with torch.inference_mode():
            for block in blocks(store, rows, BLOCK_TOKENS, f"{self.name} {subject.info.sae_id[-28:]}"):
                x = block.x_BLD.flatten(0, 1)
                codes, x_hat = subject.codes_and_reconstruction(x)
                acc.add(x, x_hat.float(), block.doc_BL.ravel(), block.keep_BL.ravel(), codes, subject.normalisation(x))
            found = estimates(acc, ctx.seed, resamples)
            if ctx.preset in REFINED_TOKENS and hasattr(subject, "sae"):
                part = np.linspace(0, len(rows) - 1, min(len(rows), REFINED_TOKENS[ctx.preset] // store.tokens.L))
                found |= refined_estimates(subject.sae, store, rows[part.astype(np.int64)], means, ctx.seed, resamples)
        return self._result(ctx, acc, found, rows.size * store.tokens.L)

    def _result(self, ctx: EvalContext, acc: Accumulator, found: dict[str, Estimate], n_read: int) -> EvalResult:
        made, resamples = RowMaker(self, ctx), uncertainty.resamples_of(ctx.preset)
        counts: dict[str, Any] = {
            "tokens_read": n_read, "tokens": acc.n_tokens, "documents": len(acc.sums.units), "dtype": "float32",
            "n_dropped": dict(ctx.stores["test"].n_dropped), "first_non_finite_document": acc.first_bad_document,
        }
        if acc.active_F is not None:
            found |= code_estimates(acc, ctx.seed, resamples)
            counts["density_histogram"] = density_histogram(acc.active_F, acc.n_tokens)
            counts["always_on"] = np.flatnonzero(acc.active_F > 0.99 * acc.n_tokens).tolist() if acc.n_tokens else []
            counts["tokens_without_active_latent"] = int(acc.l0_counts[0].total("n")) if 0 in acc.l0_counts else 0
        elif ctx.subject.info.k is not None:
            found["l0"] = Estimate(value=float(ctx.subject.info.k), n=len(acc.sums.units))
        for metric, estimate in found.items():
            made.add(metric, estimate, split="test")
        n_U = acc.sums.get("n")
        table = {"fvu": (acc.sums.get("error"), acc.sums.get("variance")), "cosine": (acc.sums.get("cosine"), n_U),
                 "nmse_zero": (acc.sums.get("relative"), n_U)}
        if acc.active_F is not None:
            table["l0"] = (acc.sums.get("l0"), n_U)
        return EvalResult(rows=made.rows, details=ratio_table(acc.sums.units, table), counts=counts, draws=made.draws)


PLUGIN = Reconstruction()
