"""I. Absorption: do other latents stand in where the latent of a first letter should fire? (METRICS I)

After Chanin et al., arXiv 2409.14507, with the thresholds of SAEBench 0.6.0; the main latents are chosen in another way
than theirs, so the values are not comparable with SAEBench's. Words are the unit of every interval.
"""

import math
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from evals import uncertainty
from evals.base import EvalContext, EvalResult, RowMaker
from evals.results import Estimate, Metric
from evals.spelling import LETTERS, SpellingConfig, build_spelling, open_spelling
from sae.config import to_dict
from sae.errors import Unsupported
from sae.manifest import rng

if TYPE_CHECKING:
    from pathlib import Path

    import pandas as pd

    from evals.letter_latents import LetterProbe, LetterScore
    from evals.spelling import Spelling

WORDS_PER_LETTER = {"quick": 100, "tiny": 20, "paper": None}
MIN_LETTERS = 20
MIN_MAIN_F1 = 0.5
PROMPT_TOKENS = 85
"""Tokens of a prompt of ten examples, for ``--dry-run``."""
SOURCE = "arXiv 2409.14507; thresholds of SAEBench 0.6.0, other choice of latents: not comparable with SAEBench"
BY_WORD = "Mean over words, then over letters. Interval: words inside each letter."


def _metric(name: str, title: str, better: Literal["higher", "lower", "neither"], description: str, *,
            unit: str = "share", high: float = 1.0, headline: bool = False) -> Metric:  # fmt: skip
    return Metric(name=name, title=title, unit=unit, better=better, description=description, reference=SOURCE,
                  low=0.0, high=high, headline=headline)


METRICS = (
    _metric("absorption_fraction", "Absorption", "lower",
            "Share of a word's projection on its first letter that up to three other latents bring where the letter's "
            f"main latents fall short. Undefined below a main_f1 of {MIN_MAIN_F1}: latents that carry no letter absorb "
            "none. " + BY_WORD, headline=True),
    _metric("absorption_full", "Full absorption", "lower",
            "Share of words at which all main latents are silent and one other latent brings 40 % of the projection "
            "at least. " + BY_WORD),
    _metric("n_split", "Latents per letter", "lower", "Main latents of a letter, mean over letters.",
            unit="latents", high=math.inf),
    _metric("main_f1", "F1 of the main latents", "higher",
            "Test F1 of a balanced logistic probe on a letter's main latents, mean over letters. Interval: letters.",
            unit="F1"),
    _metric("probe_f1", "Ceiling: dense probe", "neither",
            "Test F1 of a logistic probe on all channels, mean over the letters kept.", unit="F1"),
    _metric("n_letters", "Letters", "neither", "Letters whose dense probe has a test F1 above 0.6.",
            unit="letters", high=26.0),
)  # fmt: skip


class AbsorptionEval:
    """The plug-in."""

    name = "absorption"
    title = "First-letter absorption"
    version = 1
    metrics: tuple[Metric, ...] = METRICS
    needs = frozenset({"lm"})
    uses = frozenset({"sparse", "directions"})
    default_in = ("paper",)
    """Presets in which it runs without being named: small models hardly spell (METRICS I)."""

    def spelling(self, preset: str, seed: int = 0) -> SpellingConfig:
        return SpellingConfig(words_per_letter=WORDS_PER_LETTER[preset], seed=seed)

    def config(self, preset: str) -> dict[str, Any]:
        return {name: value for name, value in to_dict(self.spelling(preset)).items() if name != "seed"}

    def lm_tokens(self, preset: str, n_subjects: int) -> tuple[int, int]:
        """Tokens (below, above) the hookpoint, for ``--dry-run``: every word once, for all subjects together."""
        return 24 * (WORDS_PER_LETTER[preset] or 700) * PROMPT_TOKENS, 0

    def inputs(self, ctx: EvalContext) -> dict[str, str]:
        from sae.adapt import UNKNOWN

        # the file of a foreign SAE need not say its model: the words are read by the one that is loaded
        known = ctx.subject.info.lm_revision
        return {"lm": ctx.lm.revision if known == UNKNOWN else known, "hookpoint": ctx.hookpoint}

    def prepare(self, ctx: EvalContext) -> "Path":
        """The passes that all subjects share; Unsupported for a model that is not in float32."""
        import torch

        lm = ctx.lm
        if lm.dtype != torch.float32:
            raise Unsupported(f"absorption runs in float32, the LM is in {lm.dtype}; load it in float32")
        return build_spelling(ctx.root, lm, ctx.hookpoint, self.spelling(ctx.preset, ctx.seed))

    def run(self, ctx: EvalContext) -> EvalResult:
        """Rows of all letters together and of each; one line of details per scored word."""
        from evals.letter_latents import MIN_LETTER_F1, letter_probes, score_letters
        from evals.sparse_probes import codes_of

        if not hasattr(ctx.subject, "sae"):
            raise Unsupported(f"{ctx.subject.info.sae_id} has no decoder, which absorption is measured along")
        folder = self.prepare(ctx)
        spelling = open_spelling(folder)
        memo = f"{self.name}.{folder.name}"
        probes: list[LetterProbe] = ctx.memo(
            memo, lambda: letter_probes(spelling.x_ND, spelling.letter_N, spelling.test_N))
        kept = [p for p in probes if p.f1 > MIN_LETTER_F1]
        counts = {"n_words": len(spelling.words), "letters_probed": len(probes), "letters_kept": len(kept),
                  "dtype": "float32"}
        made = RowMaker(self, ctx)
        if len(kept) < MIN_LETTERS:
            for metric in self.metrics:
                made.add(metric.name, Estimate.undefined("gate_failed", n=len(kept)))
            return EvalResult(rows=made.rows, counts=counts)
        made.add("n_letters", Estimate(value=float(len(kept)), n=len(probes)))
        x = _tensor(spelling.x_ND)
        sae = ctx.subject.sae
        scores = score_letters(
            spelling.x_ND, codes_of(ctx.subject, x), sae.output_scale(x.to(sae.W_dec_FD.device)).cpu().numpy(),
            sae.W_dec_FD.detach().double().cpu().numpy(), spelling.letter_N, spelling.test_N, kept)
        counts |= {"n_scored_words": sum(len(s.rows) for s in scores),
                   "n_no_projection": sum(s.n_no_projection for s in scores)}
        _add_rows(made, scores, kept, ctx)
        return EvalResult(rows=made.rows, details=_details(scores, spelling), counts=counts, draws=made.draws)


def _tensor(x_ND: np.ndarray) -> Any:
    import torch

    return torch.from_numpy(x_ND)


def _add_rows(made: RowMaker, scores: "list[LetterScore]", kept: "list[LetterProbe]", ctx: EvalContext) -> None:
    resamples = uncertainty.resamples_of(ctx.preset)
    f1 = np.array([s.main_f1 for s in scores])
    n_main = np.array([float(len(s.main)) for s in scores])
    for name, values in (("main_f1", f1), ("n_split", n_main), ("probe_f1", np.array([p.f1 for p in kept]))):
        made.add(name, uncertainty.mean(values, rng(ctx.seed, "absorption", name), resamples=resamples))
    scored = [s for s in scores if len(s.rows)]
    for name in ("absorption_fraction", "absorption_full"):
        part = name.removeprefix("absorption_")
        if f1.mean() < MIN_MAIN_F1:
            made.add(name, Estimate.undefined("gate_failed", n=len(scores)))
            continue
        strata = [np.stack([getattr(s, part), np.ones(len(s.rows))], axis=1) for s in scored]
        made.add(name, uncertainty.stratified(
            strata, uncertainty.mean_of_sums, rng(ctx.seed, "absorption", name), resamples=resamples,
            n_failed=len(scores) - len(scored)))  # fmt: skip
    for s in scores:
        where = f"letter={LETTERS[s.letter]}"
        made.add("main_f1", Estimate(value=s.main_f1, n=1), slice=where)
        made.add("n_split", Estimate(value=float(len(s.main)), n=1), slice=where)
        if len(s.rows) and f1.mean() >= MIN_MAIN_F1:
            made.add("absorption_fraction", uncertainty.mean(
                s.fraction, rng(ctx.seed, "absorption", where), resamples=resamples), slice=where)  # fmt: skip


def _details(scores: "list[LetterScore]", spelling: "Spelling") -> "pd.DataFrame":
    """One line per scored word, which is the unit: the same words for every subject, so two of them pair."""
    import pandas as pd

    scored = [s for s in scores if len(s.rows)]
    parts = []
    for s in scored:
        share = 1.0 / (len(s.rows) * len(scored))
        parts.append(pd.DataFrame({
            "unit": s.rows, "word": [spelling.words[i] for i in s.rows], "letter": LETTERS[s.letter],
            "latents": " ".join(map(str, s.main)),
            "absorption_fraction.num": s.fraction * share, "absorption_fraction.den": share,
            "absorption_full.num": s.full * share, "absorption_full.den": share,
        }))
    return pd.concat(parts, ignore_index=True)


PLUGIN = AbsorptionEval()
