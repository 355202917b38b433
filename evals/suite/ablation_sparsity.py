"""E. Ablation sparsity: does removing one latent change few (token, position) pairs? (METRICS E)

At one position p of a row, one latent's contribution is taken out of the true residual (the SAE's error is kept), and
the layers above are run again on p ... p+T-1 with the clean prefix's keys and values.
G directions taken out one at a time, T = 16 positions, V vocabulary, D = d_in, A active latents, U documents.
"""

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from evals import uncertainty
from evals.base import EvalContext, EvalResult, RowMaker
from evals.results import Metric
from evals.units import Floats, Ints, UnitSums, ratio_table
from sae.console import track
from sae.errors import Unsupported
from sae.manifest import rng

if TYPE_CHECKING:
    import torch

    from sae.activations import ActivationStore
    from sae.upper import UpperRunner

T_POSITIONS = 16
TOKENS_BEFORE = 8
GAO = "Gao et al. 2024 (arXiv 2406.04093) 4.5"
BY_DOCUMENT = "Interval: the positions' documents."
PER_DIRECTION = ("sparsity", "sparsity_vocab", "time_participation", "effect_rms", "effect_share_tau0")
FLOORED = PER_DIRECTION[:3]


def _metric(name: str, title: str, better: Any, description: str, *, unit: str = "share", high: float = 1.0,
            headline: bool = False, low: float = 0.0, reference: str = GAO) -> Metric:
    text = f"{description} Mean over the active latents of a position, then over positions. {BY_DOCUMENT}"
    return Metric(name=name, title=title, unit=unit, better=better, low=low, high=high, headline=headline,
                  description=text, reference=reference)


_TEXTS = {
    "sparsity": ("Ablation sparsity", "(sum |c|)^2 / sum c^2 / (V T): effective share of (token, position) pairs "
                 "affected; c is the change of the logits less its median over the vocabulary. Gaussian: 2/pi."),
    "sparsity_vocab": ("Ablation sparsity, vocabulary", "The same at the position of the ablation alone (V numbers)."),
    "time_participation": ("Time participation", "(sum_t l_t)^2 / (T sum_t l_t^2), l_t = sum_v |c|."),
}
METRICS = (
    *(_metric(name, *(_TEXTS[name][0], "lower", _TEXTS[name][1])) for name in FLOORED),
    *(_metric(f"floor_{kind}_{name}", f"{_TEXTS[name][0]}, {title}", "neither", f"{name} of {text}.")
      for name in FLOORED for kind, title, text in (
          ("random", "random directions", "random directions as long as sampled contributions of active latents"),
          ("channels", "channels", "sampled residual channels set to 0"))),
    _metric("effect_rms", "Effect size", "neither", "sqrt(sum c^2 / (V T)).", unit="logits", high=float("inf")),
    _metric("effect_share_tau0", "Effect at the position itself", "neither", "Share of sum c^2 at the first position."),
    _metric("gain_vs_random", "Gain over random directions", "higher",
            "Mean ln S(random directions) - mean ln S(latents), paired by position; 0 = no better than random.",
            unit="nats", low=float("-inf"), high=float("inf"), headline=True,
            reference=GAO + "; the paired log ratio is ours, as positions differ far more than directions"),
    _metric("gain_vs_channels", "Gain over channels", "higher",
            "Mean ln S(channels) - mean ln S(latents), paired by position.", unit="nats", low=float("-inf"),
            high=float("inf"), reference=GAO),
)


class Effects(NamedTuple):
    """Statistics of G directions at one position; NaN where a direction has no effect beyond numerical noise."""

    values: dict[str, Floats]
    """By name of PER_DIRECTION, [G]."""

    @property
    def no_effect(self) -> int:
        """Directions without effect."""
        return int(np.isnan(self.values["sparsity"]).sum())

    def part(self, chosen: slice) -> "Effects":
        """The same for some of the directions."""
        return Effects({name: v[chosen] for name, v in self.values.items()})


def effect_statistics(delta_TV: np.ndarray) -> tuple[Floats, Floats]:
    """Sums over v of |c| and of c^2, each [T] float64; c = delta minus its lower median over v."""
    middle = (delta_TV.shape[1] - 1) // 2
    # numpy's partition: 15 times faster than torch.median on rows of a vocabulary
    median_T = np.partition(delta_TV, middle, axis=1)[:, middle]
    c_TV = delta_TV - median_T[:, None]
    return np.abs(c_TV).sum(axis=1, dtype=np.float64), np.einsum("tv,tv->t", c_TV, c_TV, dtype=np.float64)


def summarise_effects(l1_GT: Floats, l2_GT: Floats, n_vocab: int, floor: float) -> Effects:
    """S, S of the first position, time participation, size and share (METRICS E 4) from the sums of each direction.

    ``floor``: a direction whose sum of c^2 is not above it has no effect.
    """
    T = l1_GT.shape[1]
    energy_G = l2_GT.sum(axis=1)
    ok = energy_G > floor
    with np.errstate(all="ignore"):
        values = {
            "sparsity": l1_GT.sum(axis=1) ** 2 / energy_G / (n_vocab * T),
            "sparsity_vocab": l1_GT[:, 0] ** 2 / l2_GT[:, 0] / n_vocab,
            "time_participation": l1_GT.sum(axis=1) ** 2 / (T * (l1_GT**2).sum(axis=1)),
            "effect_rms": np.sqrt(energy_G / (n_vocab * T)),
            "effect_share_tau0": l2_GT[:, 0] / energy_G,
        }
    return Effects({name: np.where(ok, v, np.nan) for name, v in values.items()})


class Place(NamedTuple):
    """One position of one row."""

    row: int
    p: int
    doc: int


def choose_places(
    keep_BL: np.ndarray, doc_BL: np.ndarray, wanted: int, seed: int, *, T: int = T_POSITIONS,
    before: int = TOKENS_BEFORE,
) -> list[Place]:
    """At most ``wanted`` places, one per row, in row order: uniform over filtered positions of the row with ``before``
    tokens before and T - 1 after them in the same document. Depends on (seed, data) alone.
    """
    n_rows, L = keep_BL.shape
    places: list[Place] = []
    for row in rng(seed, "ablation_sparsity", "rows").permutation(n_rows):
        if len(places) == wanted:
            break
        p = np.arange(before, max(before, L - T + 1))
        doc = doc_BL[row]
        fits = p[keep_BL[row, p] & (doc[p - before] == doc[p]) & (doc[p + T - 1] == doc[p])]
        if len(fits):
            chosen = int(fits[rng(seed, "ablation_sparsity", "position", int(row)).integers(len(fits))])
            places.append(Place(int(row), chosen, int(doc[chosen])))
    return sorted(places)


class Ablator:
    """Runs the layers above the hookpoint with directions taken out at one position."""

    def __init__(self, upper: "UpperRunner", x_LD: "torch.Tensor", ids_L: "torch.Tensor", p: int, T: int,
                 device: Any = "cpu") -> None:
        self.upper, self.p, self.T = upper, p, T
        self.x_LD, self.ids_L = x_LD.to(device), ids_L.to(device)
        self.past = upper.prefix(self.x_LD[None, :p]) if upper.is_exact else None

    def logits(self, at_p_GD: "torch.Tensor") -> "torch.Tensor":
        """Logits [G, T, V] of p ... p+T-1 with the residual at p replaced by each row; all else is clean."""
        p, end = self.p, self.p + self.T
        x = self.x_LD[p:end].repeat(len(at_p_GD), 1, 1)
        x[:, 0] = at_p_GD
        if self.past is not None:
            return self.upper.continue_from(self.past, x, p)
        import torch

        full = torch.cat([self.x_LD[:p].expand(len(at_p_GD), p, -1), x], dim=1)
        return self.upper.logits(full, ids_BL=self.ids_L[:end].expand(len(at_p_GD), end))[:, p:]

    def effects(self, contributions_GD: "torch.Tensor") -> Effects:
        """Effects of taking out each contribution.

        The first and the last row of the batch are clean; the last is moved by rounding size, so that it shows what the
        LM makes of rounding errors. A direction has no effect if its energy is below (20 x largest noise)^2 (METRICS E)
        or not above the energy of the noise itself: with V T numbers the noise adds up.
        """
        import torch

        here = self.x_LD[self.p]
        taken = contributions_GD.to(here)
        batch = torch.cat([here[None], here - taken, here[None] * (1 + 2.0**-22)])
        logits = self.logits(batch).float().cpu().numpy()
        clean, n_vocab = logits[0], logits.shape[-1]
        sums = [effect_statistics(row - clean) for row in logits[1:]]
        l1_GT, l2_GT = (np.stack([s[i] for s in sums]) for i in range(2))
        resolution = float(np.finfo(np.float32).eps * np.abs(clean).max())
        noise = max(float(np.abs(logits[-1] - clean).max()), resolution)
        floor = max((20 * noise) ** 2, 4 * float(l2_GT[-1].sum()), resolution**2 * clean.size)
        return summarise_effects(l1_GT[:-1], l2_GT[:-1], n_vocab, floor)


def channel_contributions(x_D: "torch.Tensor", n: int, seed: int, row: int) -> "torch.Tensor":
    """[n, D]: what ``n`` uniformly drawn channels hold; taking one out sets the channel to 0."""
    import torch

    drawn = rng(seed, "ablation_sparsity", "channels", row).choice(len(x_D), size=min(n, len(x_D)), replace=False)
    chosen = torch.from_numpy(np.sort(drawn))
    out = x_D.new_zeros(len(chosen), len(x_D))
    out[torch.arange(len(chosen)), chosen] = x_D[chosen]
    return out


def random_contributions(lengths_A: "torch.Tensor", n: int, width: int, seed: int, row: int) -> "torch.Tensor":
    """[n, D]: uniformly random directions with the lengths of ``n`` sampled contributions of active latents."""
    import torch

    generator = rng(seed, "ablation_sparsity", "random", row)
    directions = torch.from_numpy(generator.standard_normal((n, width), dtype=np.float32))
    sampled = generator.choice(len(lengths_A), size=n, replace=len(lengths_A) < n)
    return directions / directions.norm(dim=1, keepdim=True) * lengths_A[torch.from_numpy(sampled)][:, None].cpu()


def position_values(latents: Effects | None, random: Effects | None, channels: Effects) -> dict[str, float]:
    """Means over the directions of one position; NaN where none has an effect."""

    def mean(values: Floats) -> float:
        finite = values[np.isfinite(values)]
        return float(finite.mean()) if len(finite) else float("nan")

    out: dict[str, float] = {}
    for prefix, effects in (("", latents), ("floor_random_", random), ("floor_channels_", channels)):
        for name in PER_DIRECTION if not prefix else FLOORED:
            out[prefix + name] = mean(effects.values[name]) if effects is not None else float("nan")
    logs = {kind: mean(np.log(e.values["sparsity"])) if e is not None else float("nan")
            for kind, e in (("latents", latents), ("random", random), ("channels", channels))}
    for kind in ("random", "channels"):
        out[f"gain_vs_{kind}"] = logs[kind] - logs["latents"]
    return out


class AblationSparsity:
    """METRICS E."""

    name = "ablation_sparsity"
    title = "Ablation sparsity"
    version = 1
    metrics: tuple[Metric, ...] = METRICS
    needs = frozenset({"lm", "test"})
    uses = frozenset({"sparse", "directions"})

    def config(self, preset: str) -> dict[str, Any]:
        """Positions; most active latents per position; random directions and channels per position; T."""
        sizes = {"quick": (16, 24, 8), "paper": (1_024, 64, 16), "tiny": (6, 8, 4)}[preset]
        return {"positions": sizes[0], "latents": sizes[1], "floor_directions": sizes[2], "T": T_POSITIONS}

    def lm_tokens(self, preset: str, n_subjects: int) -> tuple[int, int]:
        """Tokens (below, above) the hookpoint, for ``--dry-run``: latents, random directions and channels over T."""
        c = self.config(preset)
        return 0, n_subjects * c["positions"] * (c["latents"] + 2 * c["floor_directions"]) * c["T"]

    def inputs(self, ctx: EvalContext) -> dict[str, str]:
        return {"test": ctx.stores["test"].key}

    def run(self, ctx: EvalContext) -> EvalResult:
        import torch

        lm, store, sizes = ctx.lm, ctx.stores["test"], self.config(ctx.preset)
        if lm.dtype != torch.float32:
            raise Unsupported(f"ablation_sparsity needs float32 (noise inflates the effects), the LM is in {lm.dtype}")
        L = store.tokens.L
        places = choose_places(
            np.asarray(store.keep_N).reshape(-1, L), np.asarray(store.doc_of_N).reshape(-1, L), sizes["positions"],
            ctx.seed)
        upper, sums = lm.upper(ctx.hookpoint), UnitSums()
        counts = dict.fromkeys(("no_effect", "no_active_latent", "active_latents", "sampled_latents"), 0)
        with torch.inference_mode():
            for place in track(places, f"{self.name} {ctx.subject.info.sae_id[-24:]}", unit="positions"):
                values = self._measure(ctx, upper, store, place, sizes, counts)
                for name, value in values.items():
                    if np.isfinite(value):
                        sums.add([place.doc], {name: [value], f"n.{name}": [1.0]})
        return self._result(ctx, sums, len(places), counts)

    def _measure(
        self, ctx: EvalContext, upper: "UpperRunner", store: "ActivationStore", place: Place, sizes: dict[str, int],
        counts: dict[str, int],
    ) -> dict[str, float]:
        import torch

        L, n_floor = store.tokens.L, sizes["floor_directions"]
        x_LD = store.read(np.arange(place.row * L, (place.row + 1) * L)).float()
        ids_L = torch.from_numpy(np.asarray(store.tokens.tokens_BL[place.row], dtype=np.int64))
        ablator = Ablator(upper, x_LD, ids_L, place.p, sizes["T"], ctx.lm.device)
        here = x_LD[place.p]
        channels: Effects = ctx.memo(
            f"{self.name}.channels.{store.key}.{ctx.hookpoint}.{ctx.preset}.{ctx.seed}.{place.row}",
            lambda: ablator.effects(channel_contributions(here, n_floor, ctx.seed, place.row)))
        found = ctx.subject.contributions(here)
        n_active = len(found.indices_A)
        counts["active_latents"] += n_active
        if not n_active:
            counts["no_active_latent"] += 1
            return {}
        drawn = _sample(n_active, sizes["latents"], ctx.seed, place.row)
        counts["sampled_latents"] += len(drawn)
        vectors = found.vectors_AD[torch.from_numpy(drawn)]
        random = random_contributions(found.vectors_AD.norm(dim=1), n_floor, len(here), ctx.seed, place.row)
        both = ablator.effects(torch.cat([vectors, random]))
        latents, floor = both.part(slice(0, len(drawn))), both.part(slice(len(drawn), None))
        counts["no_effect"] += latents.no_effect
        return position_values(latents, floor, channels)

    def _result(self, ctx: EvalContext, sums: UnitSums, n_places: int, counts: dict[str, int]) -> EvalResult:
        made, resamples = RowMaker(self, ctx), uncertainty.resamples_of(ctx.preset)
        silent = counts["no_active_latent"] == n_places
        code = "too_few_rows" if not n_places else "no_active_latent" if silent else "no_effect"
        table = {}
        for metric in (m.name for m in METRICS):
            num, den = sums.get(metric), sums.get(f"n.{metric}")
            used = den > 0
            missing = n_places - int(den.sum())
            estimate = uncertainty.ratio(
                num[used], den[used], rng(ctx.seed, self.name, metric, "bootstrap"), resamples=resamples, code=code,
                n_failed=missing)
            made.add(metric, estimate, split="test")
            table[metric] = (num, den)
        return EvalResult(rows=made.rows, details=ratio_table(sums.units, table),
                          counts={**counts, "positions": n_places, "dtype": "float32"})


def _sample(n: int, most: int, seed: int, row: int) -> Ints:
    """Which of ``n`` active latents are taken: all, or ``most`` of them drawn uniformly, in rising order."""
    if n <= most:
        return np.arange(n, dtype=np.int64)
    drawn = rng(seed, "ablation_sparsity", "latents", row).choice(n, size=most, replace=False)
    return np.sort(drawn).astype(np.int64)


PLUGIN = AblationSparsity()
