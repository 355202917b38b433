"""Which of a latent's explanations is the one: chosen on the split `calibrate` alone (AUTOINTERP 3, "best of n").

Two measures, never mixed within a run. Where an explainer gives several candidates (or no embedder is there) and a
language model can be asked, it judges the calibrate windows and candidates are ranked by balanced accuracy; else by the
AUC of embedded phrases. What a text was chosen by is kept and never reported as its score.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from autointerp.classify import MAX_FAILED_SHARE
from autointerp.exemplars import ExemplarTable
from autointerp.interfaces import ExplainContext, ScoreContext
from autointerp.judging import Verdict, verdict_item
from autointerp.phrases import PhraseJudge
from autointerp.rates import auc
from autointerp.records import CALIBRATE, TRANSPORT_CODES, Explanation, Failure
from autointerp.texts import Decoder
from sae.errors import NoAnswer
from sae.plugins import find

STAGE = "explain.choose"


def asks_a_judge(explainers: Sequence[Any], ctx: ExplainContext) -> bool:
    """Whether candidates of these explainers are ranked by the language model; then it is part of what a choice
    depends on."""
    able = ctx.client is not None and (ctx.client.capabilities.generate or ctx.client.capabilities.next_token)
    return able and (ctx.embedder is None or any(getattr(e, "candidates", 1) > 1 for e in explainers))


class Choice(NamedTuple):
    """What :func:`select` says."""

    explanations: list[Explanation]
    unanswered: int
    """Windows about which the language model could not be reached: the next run chooses again."""


def select(
    found: Mapping[int, Sequence[Explanation]], exemplars: ExemplarTable, ctx: ExplainContext, *, prompted: bool
) -> Choice:
    """All explanations with exactly one per latent marked ``selected``; a pattern only where there is no text.

    ``prompted``: rank by prompted detection (:func:`asks_a_judge`). Ties: the shorter text there, the earlier one else.
    Raises :class:`NoAnswer` if the language model answered nothing at all.
    """
    unanswered = 0
    texts = {latent: [e for e in es if _is_text(e)] for latent, es in found.items()}
    if prompted:
        scored, unanswered = _prompted(texts, exemplars, ctx)
    else:
        scored = _phrase_aucs([e for es in texts.values() for e in es], exemplars, ctx)
    out: list[Explanation] = []
    for latent in sorted(found):
        candidates = found[latent]
        pool = texts[latent] or [e for e in candidates if e.failure is None] or candidates

        def rank(i: int, pool: Sequence[Explanation] = pool) -> tuple[float, int, int]:
            e = pool[i]
            return (scored.get(e.explanation_id) or 0.0, -len(e.text or "") if prompted else 0, -i)

        winner = pool[max(range(len(pool)), key=rank)].explanation_id
        out += [
            replace(e, selected=e.explanation_id == winner, calibrate_score=scored.get(e.explanation_id))
            for e in candidates
        ]
    return Choice(out, unanswered)


def best_candidates(explanations: Sequence[Explanation]) -> list[Explanation]:
    """Of every (latent, explainer) the one to be scored: the selected one, else the best on the split calibrate."""
    best: dict[tuple[int, str], Explanation] = {}
    for e in explanations:
        here = best.setdefault((e.latent, e.explainer), e)
        if _preference(e) < _preference(here):
            best[e.latent, e.explainer] = e
    return list(best.values())


def _preference(e: Explanation) -> tuple[bool, bool, float, int, int]:
    return (not e.selected, e.failure is not None, -(e.calibrate_score or 0.0), len(e.text or ""), e.candidate)


def _is_text(e: Explanation) -> bool:
    return e.text is not None and e.pattern is None and e.failure is None


def _prompted(
    texts: Mapping[int, Sequence[Explanation]], exemplars: ExemplarTable, ctx: ExplainContext
) -> tuple[dict[str, float | None], int]:
    """Balanced accuracy on the calibrate windows of every text that has a rival; equal texts are asked about once."""
    assert ctx.client is not None
    judge = find("autointerp.scorers", "detection")()
    scoring = ScoreContext(seed=ctx.seed, client=ctx.client, tokenizer=ctx.tokenizer)
    rivals = [
        e
        for latent in sorted(texts)
        if len(texts[latent]) > 1
        for e in sorted(texts[latent], key=lambda e: (e.explainer, e.candidate))
    ]
    windows = {e.latent: sorted(exemplars.scored(e.latent, CALIBRATE), key=lambda w: w.exemplar_id) for e in rivals}
    said = judge.verdicts([(e, e.latent, windows[e.latent]) for e in rivals], scoring, ctx.client, STAGE)
    every = [v for verdicts in said for v in verdicts]
    lost = [v for v in every if isinstance(v, Failure) and v.code in TRANSPORT_CODES]
    if every and len(lost) == len(every):
        raise NoAnswer(
            f"the language model answered none of {len(every)} questions about candidate texts ({lost[0].code}: "
            f"{lost[0].detail}); run the same command again when it does"
        )
    scored = {
        e.explanation_id: _balanced_accuracy(e, windows[e.latent], verdicts)
        for e, verdicts in zip(rivals, said, strict=True)
    }
    return scored, len(lost)


def _balanced_accuracy(explanation: Explanation, windows: Sequence[Any], verdicts: Sequence[Verdict]) -> float | None:
    """None where too many answers failed or a class is left empty."""
    if sum(isinstance(v, Failure) for v in verdicts) > MAX_FAILED_SHARE * len(verdicts):
        return None
    items = [verdict_item(explanation, w, v, "detection") for w, v in zip(windows, verdicts, strict=True)]
    count = Counter((i.positive, i.verdict) for i in items if i.verdict is not None)
    rates = []
    for positive in (True, False):
        n = count[positive, True] + count[positive, False]
        if n == 0:
            return None
        rates.append(count[positive, positive] / n)
    return sum(rates) / 2


def _phrase_aucs(
    explanations: Sequence[Explanation], exemplars: ExemplarTable, ctx: ExplainContext
) -> dict[str, float | None]:
    """AUC of each text on the calibrate windows of its latent; the words of all windows are embedded together."""
    if ctx.embedder is None:
        return {e.explanation_id: None for e in explanations}
    windows = {latent: exemplars.scored(latent, CALIBRATE) for latent in sorted({e.latent for e in explanations})}
    judge = PhraseJudge(ctx.embedder, Decoder(ctx.tokenizer))
    judge.prepare((e.text or "" for e in explanations), (w for of_latent in windows.values() for w in of_latent))
    found = {}
    for e in explanations:
        values = np.array(judge.values(e.text or "", windows[e.latent]))
        positive = np.array([w.positive for w in windows[e.latent]], dtype=bool)
        found[e.explanation_id] = auc(values[positive], values[~positive])
    return found
