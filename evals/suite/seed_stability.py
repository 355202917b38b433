"""H. Stability over seeds: do SAEs that differ in the training seed alone find the same latents? (METRICS H)

Measured where a run holds several seeds of one recipe (``run_all --sae A B C``). Alive latents only; latents are the
unit of every interval, and each counts the mean over the other seeds.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from evals import uncertainty
from evals.base import EvalContext, EvalResult, RowMaker
from evals.results import Estimate, Metric
from evals.units import choose_rows
from sae.errors import Unsupported
from sae.manifest import canonical_json, rng, sha256_text

if TYPE_CHECKING:
    import pandas as pd
    from scipy.sparse import csc_matrix

    from evals.seeds import Match

TOKENS = {"quick": 65_536, "paper": 131_072, "tiny": 4_096}
DECILES = 10
PAULO = "Paulo & Belrose 2025 (arXiv 2501.16615); METRICS H"
BY_LATENT = "Mean over the SAE's alive latents and over the other seeds. Interval: latents."


def _metric(name: str, title: str, description: str, *, better: str = "higher", low: float = 0.0,
            unit: str = "share", headline: bool = False) -> Metric:  # fmt: skip
    return Metric(name=name, title=title, unit=unit, better=better, description=description, reference=PAULO,  # type: ignore[arg-type]
                  low=low, high=1.0, headline=headline)


METRICS = (
    _metric("shared_frac", "Shared latents",
            "Share of latents whose one-to-one partner in the other SAE has a cosine of 0.7 at least in decoder and "
            "encoder. " + BY_LATENT, headline=True),
    _metric("matched_cos", "Cosine of partners",
            "Decoder cosine with the partner, 0 for a surplus. " + BY_LATENT, low=-1.0, unit="cosine"),
    _metric("mmcs", "Largest cosine",
            "Largest decoder cosine with any latent of the other, both directions averaged; not one to one. "
            "Interval: latents of this SAE.", low=-1.0, unit="cosine"),
    _metric("mutual_nn_frac", "Mutual neighbours",
            "Share of latents that are each other's nearest, with a cosine of 0.7 at least. " + BY_LATENT),
    _metric("firing_jaccard", "Firing overlap",
            "Tokens where a latent and its partner both fire over tokens where either does. " + BY_LATENT),
    _metric("floor_matched_cos", "Floor: random directions", "matched_cos of as many random directions.",
            better="neither", low=-1.0, unit="cosine"),
    _metric("floor_shared_frac", "Floor: shared random directions", "shared_frac of as many random directions.",
            better="neither"),
)  # fmt: skip
PER_LATENT = ("shared_frac", "matched_cos", "mutual_nn_frac", "firing_jaccard")


class Pair(NamedTuple):
    """One other seed."""

    sae_id: str
    match: "Match"
    jaccard_F: np.ndarray | None

    def values(self) -> dict[str, np.ndarray]:
        """[F] per metric that is a mean over latents."""
        from evals.seeds import SHARED

        found = {"mutual_nn_frac": self.match.mutual_F.astype(np.float64), "mmcs": self.match.best_F}
        if self.match.cos_F is not None and self.match.cos_enc_F is not None and self.jaccard_F is not None:
            both = (self.match.cos_F >= SHARED) & (self.match.cos_enc_F >= SHARED)
            found |= {"shared_frac": both.astype(np.float64), "matched_cos": self.match.cos_F,
                      "firing_jaccard": self.jaccard_F}  # fmt: skip
        return found


class SeedStability:
    """The plug-in."""

    name = "seed_stability"
    title = "Stability over seeds"
    version = 1
    metrics: tuple[Metric, ...] = METRICS
    needs = frozenset({"test", "peers"})
    uses = frozenset({"sparse"})

    def config(self, preset: str) -> dict[str, Any]:
        return {"tokens": TOKENS[preset]}

    def inputs(self, ctx: EvalContext) -> dict[str, str]:
        peers = sorted(f"{p.info.sae_id}:{p.info.sae_sha256}" for p in ctx.peers)
        return {"test": ctx.stores["test"].key, "peers": sha256_text(canonical_json(peers))}

    def run(self, ctx: EvalContext) -> EvalResult:
        """Rows over all other seeds, per other seed, and per decile of density; one line of details per latent."""
        from evals.seeds import firing

        if not ctx.peers or not all(hasattr(s, "sae") for s in (ctx.subject, *ctx.peers)):
            raise Unsupported(f"{ctx.subject.info.sae_id}: no other seed of this SAE is measured in this run")
        store = ctx.stores["test"]
        n_rows = max(1, TOKENS[ctx.preset] // store.tokens.L)
        rows_B = choose_rows(store, n_rows, ctx.seed, "seed_stability")
        fires = firing(ctx, ctx.subject, store, rows_B)  # type: ignore[arg-type]
        counts_F = np.asarray(fires.sum(axis=0)).ravel()
        alive = np.flatnonzero(counts_F)
        made, pairs = RowMaker(self, ctx), []
        for peer in sorted(ctx.peers, key=lambda p: p.info.sae_id):
            other = firing(ctx, peer, store, rows_B)  # type: ignore[arg-type]
            living = np.flatnonzero(np.asarray(other.sum(axis=0)).ravel())
            if len(alive) and len(living):
                found = _matched(ctx, ((ctx.subject, alive), (peer, living)), f"{store.key}.{n_rows}.{ctx.seed}")
                pairs.append(_pair(peer.info.sae_id, found, fires[:, alive], other[:, living]))
        table = _add_rows(made, pairs, counts_F[alive], ctx)
        details = _details(table, alive, counts_F[alive])
        sizes = {"n_tokens": int(fires.shape[0]), "n_alive": len(alive), "n_peers": len(ctx.peers), "dtype": "float32"}
        return EvalResult(rows=made.rows, details=details, counts=sizes)


def _matched(ctx: EvalContext, sides: Sequence[tuple[Any, np.ndarray]], tag: str) -> "Match":
    """The match of two (subject, alive latents), seen from the first; assigned once per run for both directions."""
    from evals.seeds import match

    ordered = sorted(sides, key=lambda side: side[0].info.sae_id)

    def build() -> "Match":
        tensors = [t[alive].detach().cpu() for s, alive in ordered for t in (s.sae.W_dec_FD, s.sae.W_enc_FD)]
        return match(*tensors)

    ids = [s.info.sae_id for s, _ in ordered]
    found: Match = ctx.memo(f"seed_match.{ids}.{tag}", build)
    return found if sides[0][0].info.sae_id == ids[0] else found.reversed()


def _pair(sae_id: str, found: "Match", a_NF: "csc_matrix", b_NG: "csc_matrix") -> Pair:
    from evals.seeds import jaccard

    return Pair(sae_id, found, None if found.partner_F is None else jaccard(a_NF, b_NG, found.partner_F))


def _add_rows(made: RowMaker, pairs: Sequence[Pair], counts_F: np.ndarray, ctx: EvalContext) -> dict[str, np.ndarray]:
    """Rows of all metrics; returns the values per latent, [F] by metric, NaN where a latent has none."""
    resamples = uncertainty.resamples_of(ctx.preset)

    def mean(values_F: np.ndarray, *purpose: str) -> Estimate:
        known = values_F[np.isfinite(values_F)]
        draw = rng(ctx.seed, "seed_stability", ctx.subject.info.sae_id, *purpose)
        return uncertainty.mean(known, draw, resamples=resamples, code="no_active_latent",
                                n_failed=len(values_F) - len(known))  # fmt: skip

    if not pairs:
        for metric in (*PER_LATENT, "mmcs"):
            made.add(metric, Estimate.undefined("no_active_latent"), split="test")
        return {}
    by_pair = [p.values() for p in pairs]
    table = {name: _mean_known([v[name] for v in by_pair]) for name in by_pair[0]}
    for metric in PER_LATENT:
        if metric not in table:  # more latents than can be matched one to one
            made.add(metric, Estimate.undefined("gate_failed"), split="test")
            continue
        made.add(metric, mean(table[metric], metric), split="test")
        for pair, values in zip(pairs, by_pair, strict=True):
            made.add(metric, mean(values[metric], metric, pair.sae_id), slice=f"peer={pair.sae_id}", split="test")
    # The way back has units of another SAE: its mean is held fixed.
    back = float(np.mean([p.match.best_back_G.mean() for p in pairs]))
    made.add("mmcs", mean((table["mmcs"] + back) / 2, "mmcs"), split="test")
    if "shared_frac" in table:
        _add_deciles(made, table["shared_frac"], counts_F, mean)
        _add_floor(made, len(counts_F), ctx)
    return table


def _mean_known(values: Sequence[np.ndarray]) -> np.ndarray:
    """[F] mean over the other seeds in which a latent has a value; NaN where it has none in any."""
    stacked = np.stack(values)
    known = np.isfinite(stacked)
    with np.errstate(invalid="ignore"):
        return np.asarray(np.where(known, stacked, 0.0).sum(axis=0) / known.sum(axis=0))


def _add_deciles(made: RowMaker, shared_F: np.ndarray, counts_F: np.ndarray, mean: Any) -> None:
    """Decile 1: the rarest tenth of the alive latents."""
    order = np.argsort(counts_F, kind="stable")
    for i, part in enumerate(np.array_split(order, DECILES), start=1):
        if len(part):
            made.add("shared_frac", mean(shared_F[part], "decile", str(i)), slice=f"decile={i}", split="test")


def _add_floor(made: RowMaker, n_alive: int, ctx: EvalContext) -> None:
    """Two random dictionaries of the SAE's width; one for all seeds, whose alive latents differ by a few."""
    import torch

    from evals.seeds import match
    from sae.manifest import seed_of

    width, n = ctx.subject.info.d_in, ctx.subject.info.d_sae

    def build() -> dict[str, np.ndarray]:
        generator = torch.Generator().manual_seed(seed_of(ctx.seed, "seed_stability", "floor", n))
        found = match(*(torch.randn(n, width, generator=generator) for _ in range(4)))
        return Pair("random", found, np.zeros(n)).values()

    floor = ctx.memo(f"seed_floor.{n}.{width}.{ctx.seed}", build)
    for metric in ("matched_cos", "shared_frac"):
        made.add(f"floor_{metric}", Estimate(value=float(floor[metric].mean()), n=n_alive), split="test")


def _details(table: Mapping[str, np.ndarray], alive: np.ndarray, counts_F: np.ndarray) -> "pd.DataFrame | None":
    """One line per alive latent; the unit is the latent."""
    import pandas as pd

    if not table:
        return None
    columns: dict[str, Any] = {"unit": alive.astype(np.int64), "n_active": counts_F}
    for metric in PER_LATENT:
        if metric in table:
            known = np.isfinite(table[metric])
            columns[f"{metric}.num"] = np.where(known, table[metric], 0.0)
            columns[f"{metric}.den"] = known.astype(np.float64)
    return pd.DataFrame(columns)


PLUGIN = SeedStability()
