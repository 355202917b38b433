"""J. Ground truth: does the SAE find the dictionary that made the data? (METRICS J)

For planted data with known directions and codes; no language model takes part. True directions are the unit of the
intervals (tokens for fvu_gap).
"""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from evals import uncertainty
from evals.base import EvalContext, EvalResult, RowMaker
from evals.results import Estimate, Metric
from sae.errors import Unsupported
from sae.manifest import rng

if TYPE_CHECKING:
    import pandas as pd
    import torch

    from evals.truth import Truth

RECOVERED = 0.9
FVU_TOKENS = {"quick": 16_384, "paper": 65_536, "tiny": 4_096}
ENCODE_ROWS = 8_192
SOURCE = "METRICS J; mean correlation coefficient after Sharkey et al. 2022, planted data after arXiv 2602.14687"
BY_DIRECTION = "Mean over true directions. Interval: true directions."


def _metric(name: str, title: str, description: str, *, better: str = "higher", low: float = 0.0, high: float = 1.0,
            unit: str = "share", headline: bool = False) -> Metric:  # fmt: skip
    return Metric(name=name, title=title, unit=unit, better=better, description=description, reference=SOURCE,  # type: ignore[arg-type]
                  low=low, high=high, headline=headline)


METRICS = (
    _metric("mcc", "Cosine with the truth",
            "|cosine| of a true direction with its one-to-one partner among alive decoder rows, 0 without. "
            + BY_DIRECTION, unit="cosine", headline=True),
    _metric("recovered_09", "Directions recovered", "Share with a |cosine| of 0.9 at least. " + BY_DIRECTION),
    _metric("firing_precision", "Firing precision",
            "Share of the partner's firings where the true code is active; directions whose partner never fires are "
            "left out and counted. " + BY_DIRECTION),
    _metric("firing_recall", "Firing recall",
            "Share of tokens with an active true code where the partner fires. " + BY_DIRECTION),
    _metric("firing_f1", "Firing F1", "F1 of the two, 0 without partner. " + BY_DIRECTION, unit="F1", headline=True),
    _metric("uniqueness", "Uniqueness", "Distinct nearest true directions over alive latents."),
    _metric("fvu_gap", "FVU above the true dictionary",
            "FVU minus that of the true dictionary with non-negative least squares on the true support. "
            "Interval: tokens.", better="lower", low=-math.inf, high=math.inf, unit="FVU"),
    _metric("floor_mcc", "Floor: random dictionary", "mcc of as many random directions. " + BY_DIRECTION,
            better="neither", unit="cosine"),
)  # fmt: skip


class GroundTruth:
    """The plug-in."""

    name = "ground_truth"
    title = "Known dictionary"
    version = 1
    metrics: tuple[Metric, ...] = METRICS
    needs = frozenset({"truth"})
    uses = frozenset({"sparse"})

    def config(self, preset: str) -> dict[str, Any]:
        return {"fvu_tokens": FVU_TOKENS[preset]}

    def inputs(self, ctx: EvalContext) -> dict[str, str]:
        return {"truth": ctx.truth.key}

    def run(self, ctx: EvalContext) -> EvalResult:
        """One row per metric; one line of details per true direction."""
        truth: Truth = ctx.truth
        if not hasattr(ctx.subject, "sae"):
            raise Unsupported(f"{ctx.subject.info.sae_id} has no decoder to compare with a known dictionary")
        if ctx.subject.info.d_in != truth.x_ND.shape[1]:
            raise Unsupported(
                f"{ctx.subject.info.sae_id} reads {ctx.subject.info.d_in} channels, the known data have "
                f"{truth.x_ND.shape[1]}"
            )
        fires = _firing(ctx.subject, truth.x_ND)
        alive = np.flatnonzero(fires.any(axis=0))
        made = RowMaker(self, ctx)
        found = _score(ctx.subject.sae.W_dec_FD.detach().cpu()[alive], truth, fires[:, alive])
        _add_rows(made, found, ctx)
        nearest = found["nearest"]
        made.add("uniqueness", Estimate(value=len(set(nearest)) / len(alive), n=len(alive)) if len(alive)
                 else Estimate.undefined("no_active_latent"))  # fmt: skip
        made.add("fvu_gap", _fvu_gap(ctx, truth))
        made.add("floor_mcc", _floor(ctx, truth, max(len(alive), 1)))
        counts = {"n_tokens": len(truth.x_ND), "n_alive": len(alive), "n_true": len(truth.directions_GD)}
        return EvalResult(rows=made.rows, details=_details(found), counts=counts)


def _firing(subject: Any, x_ND: "torch.Tensor") -> np.ndarray:
    """bool [N, F]."""
    import torch

    fires = np.zeros((len(x_ND), subject.info.d_sae), dtype=bool)
    for start in range(0, len(x_ND), ENCODE_ROWS):
        with torch.inference_mode():
            codes = subject.encode_sparse(x_ND[start : start + ENCODE_ROWS])
        rows, slots = np.nonzero(codes.values_NK.cpu().numpy())
        fires[rows + start, codes.indices_NK.cpu().numpy()[rows, slots]] = True
    return fires


def _partners(true_GD: "torch.Tensor", dec_FD: "torch.Tensor") -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(partner [G] or -1, |cosine| with it [G], nearest true direction of each decoder row [F])."""
    from scipy.optimize import linear_sum_assignment
    from torch.nn.functional import normalize

    cos_GF = (normalize(true_GD.double(), dim=1) @ normalize(dec_FD.double(), dim=1).T).abs().clamp_max(1).numpy()
    partner = np.full(len(true_GD), -1, dtype=np.int64)
    best = np.zeros(len(true_GD))
    if not cos_GF.size:
        return partner, best, np.zeros(0, dtype=np.int64)
    rows, columns = linear_sum_assignment(cos_GF, maximize=True)
    partner[rows], best[rows] = columns, cos_GF[rows, columns]
    return partner, best, cos_GF.argmax(axis=0)


def _score(dec_FD: "torch.Tensor", truth: "Truth", fires_NF: np.ndarray) -> dict[str, np.ndarray]:
    """[G] per metric, and `nearest` [F]."""
    partner, cos, nearest = _partners(truth.directions_GD, dec_FD)
    true_NG = (truth.codes_NG > 0).numpy()
    said_NG = np.zeros_like(true_NG)
    said_NG[:, partner >= 0] = fires_NF[:, partner[partner >= 0]]
    both, said, real = (true_NG & said_NG).sum(axis=0), said_NG.sum(axis=0), true_NG.sum(axis=0)
    with np.errstate(invalid="ignore", divide="ignore"):
        return {
            "mcc": cos, "recovered_09": (cos >= RECOVERED).astype(np.float64), "firing_precision": both / said,
            "firing_recall": both / real, "firing_f1": 2 * both / (said + real), "nearest": nearest,
        }  # fmt: skip


def _add_rows(made: RowMaker, found: dict[str, np.ndarray], ctx: EvalContext) -> None:
    for metric in ("mcc", "recovered_09", "firing_precision", "firing_recall", "firing_f1"):
        known = found[metric][np.isfinite(found[metric])]  # a true direction that is silent here has no recall
        estimate = uncertainty.mean(
            known, rng(ctx.seed, "ground_truth", metric), resamples=uncertainty.resamples_of(ctx.preset),
            code="no_active_latent", n_failed=len(found[metric]) - len(known),
        )  # fmt: skip
        made.add(metric, estimate)


def _fvu_gap(ctx: EvalContext, truth: "Truth") -> Estimate:
    import torch

    from evals.truth import best_reconstruction

    n = min(FVU_TOKENS[ctx.preset], len(truth.x_ND))
    rows = np.sort(rng(ctx.seed, "ground_truth", "tokens").permutation(len(truth.x_ND))[:n])
    x = truth.x_ND.double().numpy()[rows]
    ideal = ctx.memo(f"truth_ideal.{truth.key}.{n}.{ctx.seed}", lambda: best_reconstruction(truth, rows))
    parts = []
    with torch.inference_mode():
        for start in range(0, n, ENCODE_ROWS):
            parts.append(ctx.subject.reconstruct(truth.x_ND[rows[start : start + ENCODE_ROWS]]).double().cpu().numpy())
    errors = [np.square(x - y).sum(axis=1) for y in (np.concatenate(parts), ideal, x.mean(axis=0))]
    gap: Callable[[np.ndarray], np.ndarray] = lambda s: (s[..., 0] - s[..., 1]) / s[..., 2]  # noqa: E731
    return uncertainty.function_of_sums(
        np.stack(errors, axis=1), gap, rng(ctx.seed, "ground_truth", "fvu_gap"), code="constant_target",
        resamples=uncertainty.resamples_of(ctx.preset),
    )  # fmt: skip


def _floor(ctx: EvalContext, truth: "Truth", n_latents: int) -> Estimate:
    import torch

    from sae.manifest import seed_of

    def build() -> Estimate:
        generator = torch.Generator().manual_seed(seed_of(ctx.seed, "ground_truth", "floor", n_latents))
        random_FD = torch.randn(n_latents, truth.x_ND.shape[1], generator=generator)
        return uncertainty.mean(_partners(truth.directions_GD, random_FD)[1], rng(ctx.seed, "ground_truth", "floor"),
                                resamples=uncertainty.resamples_of(ctx.preset))  # fmt: skip

    floor: Estimate = ctx.memo(f"truth_floor.{truth.key}.{n_latents}.{ctx.seed}.{ctx.preset}", build)
    return floor


def _details(found: dict[str, np.ndarray]) -> "pd.DataFrame":
    """One line per true direction, which is the unit: the same for every subject, so two of them pair."""
    import pandas as pd

    columns: dict[str, Any] = {"unit": np.arange(len(found["mcc"]), dtype=np.int64)}
    for metric, values in found.items():
        if metric != "nearest":
            known = np.isfinite(values)
            columns[f"{metric}.num"], columns[f"{metric}.den"] = np.where(known, values, 0.0), known.astype(np.float64)
    return pd.DataFrame(columns)


PLUGIN = GroundTruth()
