"""Fuzzing: are the marked tokens those that the explanation speaks of? (AUTOINTERP 5.1)

Windows with tokens in ``<<...>>``: positive ones with the latent's own tokens marked, and negatives that carry the same
masks in silent windows or on wrong tokens (:mod:`autointerp.fuzz`). Marks have no base rate, so there is no precision.
The form of the question is EleutherAI's (2410.13928, 3.3); masks, texts and metrics are ours.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np

from autointerp.classify import (
    Counts,
    base_score,
    cell_row,
    count_items,
    drawn_rate,
    positives_of,
    unscored,
)
from autointerp.client import Origin
from autointerp.fuzz import NEGATIVES, WRONG, Marked, marked_windows
from autointerp.interfaces import ScoreContext, ScoreJob, ScoreResult
from autointerp.judging import MODES, Mode, Question, YesNoJudge, verdict_item
from autointerp.prompts import load_prompt, marked_text
from autointerp.rates import auc, auc_interval, interval_of, too_many_failed
from autointerp.records import LatentScore, ScoreItem
from sae.config import require
from sae.errors import Unsupported
from sae.manifest import rng


class Fuzzing:
    """``Fuzzing(mode="auto", per_request=10)``; auto = logprob where the client has next-token log-probabilities."""

    name: ClassVar[str] = "fuzzing"
    version: ClassVar[int] = 3
    needs: ClassVar[frozenset[str]] = frozenset({"client:generate"})
    metrics: ClassVar[tuple[str, ...]] = ("recall", "balanced_accuracy", "auc")

    def __init__(self, *, mode: Mode = "auto", per_request: int = 10) -> None:
        require(mode in MODES, f"mode must be auto, logprob or list, got {mode!r}")
        require(per_request >= 1, f"per_request must be positive, got {per_request}")
        self.mode, self.per_request = mode, per_request
        self.inputs = {name: load_prompt(name).sha256 for name in ("fuzzing_logprob", "fuzzing_list")}
        self._judge = YesNoJudge(load_prompt("fuzzing_logprob"), load_prompt("fuzzing_list"), mode, per_request)

    def score_many(self, jobs: list[ScoreJob], ctx: ScoreContext) -> list[ScoreResult]:
        """One result per job. An item is known by its window and its ``mask``: a positive window may be judged twice,
        under its own marks and under wrong ones (``positive`` false). :class:`Unsupported` where the client lacks the
        mode's verb."""
        if ctx.client is None:
            raise Unsupported("'fuzzing' needs a language model; choose a client or another scorer")
        drawn = [self._drawn(job, ctx.seed) if job.explanation.text is not None else [] for job in jobs]
        usable = [i for i, marked in enumerate(drawn) if marked]
        questions = [
            Question(
                explanation=jobs[i].explanation.text or "",
                lines=tuple(_shown(m, ctx.tokenizer) for m in drawn[i]),
                origin=Origin(stage="score.fuzzing", sae_id=jobs[i].sae_id, latent=jobs[i].latent),
                order=rng(ctx.seed, jobs[i].sae_id, jobs[i].latent, "fuzzing"),
            )
            for i in usable
        ]
        said = dict(zip(usable, self._judge.ask(questions, ctx.client, self.name), strict=True))
        identity: dict[str, Any] = {"scorer": self.name, "version": self.version, "judge": self._judge.name(ctx.client)}
        results = []
        for i, job in enumerate(jobs):
            if i not in said:
                results.append(unscored(job, self.metrics, **identity))
                continue
            items = tuple(
                replace(verdict_item(job.explanation, m.exemplar, v, self.name), mask=m.mask, positive=m.positive)
                for m, v in zip(drawn[i], said[i], strict=True)
            )
            results.append(ScoreResult(scores=tuple(_rows(job, drawn[i], items, identity)), items=items))
        return results

    @staticmethod
    def _drawn(job: ScoreJob, seed: int) -> list[Marked]:
        """Empty unless there is something of both classes."""
        silent = [e for e in job.exemplars if e.kind == "silent"]
        generator = rng(seed, job.sae_id, job.latent, "fuzzing/marks")
        found = marked_windows(positives_of(job.exemplars), silent, generator)
        return found if any(m.positive for m in found) and not all(m.positive for m in found) else []


def _shown(marked: Marked, tokenizer: Any) -> str:
    on = set(marked.mask)
    return marked_text(tokenizer, marked.exemplar.token_ids, [i in on for i in range(len(marked.exemplar.token_ids))])


def _rows(
    job: ScoreJob, drawn: Sequence[Marked], items: Sequence[ScoreItem], identity: dict[str, Any]
) -> list[LatentScore]:
    """Recall per quantile group, false positives per kind of negative, balanced accuracy with both kinds weighing
    alike, AUC where the judge gave numbers."""
    pairs = list(zip(drawn, items, strict=True))
    groups = {
        g: count_items([i for m, i in pairs if m.positive and m.exemplar.group == g])
        for g in sorted({m.exemplar.group for m in drawn if m.positive})
    }
    present = [k for k in NEGATIVES if any(m.kind == k for m in drawn)]
    kinds = {k: count_items([i for m, i in pairs if m.kind == k]) for k in present}
    n_failed = sum(c.failed for c in (*groups.values(), *kinds.values()))
    lost = {"": too_many_failed(n_failed, len(items))}
    sides = [("positive", groups.values()), ("negative", kinds.values()), *((k, [c]) for k, c in kinds.items())]
    lost |= {side: lost[""] or _lost(cells) for side, cells in sides}
    # Rows of marks have no base rate: the latent's own rate is not that of marked windows.
    base = {**base_score(job, **identity), "base_rate": None}
    counted = {
        **base, "n_pos": sum(c.n for c in groups.values()), "n_neg": sum(c.n for c in kinds.values()),
        "n_failed": n_failed,
    }  # fmt: skip
    rows = _aggregates(groups, kinds, lost, counted)
    for metric, cells in (("recall", {f"decile={g}": c for g, c in groups.items() if g >= 0}),
                          ("fpr", {f"kind={k}": c for k, c in kinds.items()})):  # fmt: skip
        for group, c in cells.items():
            null = lost["positive" if metric == "recall" else group.removeprefix("kind=")]
            rows.append(cell_row(metric, group, c, null, base, positive=metric == "recall"))
    if WRONG not in kinds:  # every mask covers the active tokens of every other window
        rows.append(LatentScore(metric="fpr", group=f"kind={WRONG}", null_reason="no_hard_negative", **base))
    if any(i.value is not None for i in items):
        for kind in ("", *kinds):
            rows.append(_auc_row(pairs, kind, lost["positive"] or lost[kind or "negative"], base))
    return rows


def _lost(cells: Iterable[Counts]) -> bool:
    """Did more than a tenth of these windows fail?"""
    cells = list(cells)
    failed = sum(c.failed for c in cells)
    return too_many_failed(failed, sum(c.n for c in cells) + failed)



def _aggregates(
    groups: dict[int, Counts], kinds: dict[str, Counts], lost: Mapping[str, bool], base: dict[str, Any]
) -> list[LatentScore]:
    answered_groups = {g: c for g, c in groups.items() if c.n}
    answered_kinds = {k: c for k, c in kinds.items() if c.n}
    rows = []
    for metric in ("recall", "balanced_accuracy"):
        sides = [(answered_groups, "group")] + ([(answered_kinds, "kind")] if metric != "recall" else [])
        too_many = lost["positive"] or (metric != "recall" and lost["negative"])
        null = too_many or any(not cells for cells, _ in sides)
        value = interval = None
        if not null:
            value = _combined([np.mean([c.hit / c.n for c in cells.values()]) for cells, _ in sides])
            draws = [drawn_rate(slot, [(1 / len(cells), c) for c in cells.values()]) for cells, slot in sides]
            interval = interval_of(np.asarray(_combined(draws)), float(value))
        worst_recall = np.mean([c.hit / (c.n + c.failed) for c in groups.values()])
        worst_fpr = np.mean([(c.hit + c.failed) / (c.n + c.failed) for c in kinds.values()])
        rows.append(
            LatentScore(
                metric=metric,
                value=None if value is None else float(value),
                ci_low=interval.low if interval else None,
                ci_high=interval.high if interval else None,
                value_worst=float(_combined([worst_recall] if metric == "recall" else [worst_recall, worst_fpr])),
                null_reason=("too_many_failures" if too_many else "one_class") if null else None,
                **base,
            )
        )
    return rows


def _combined(rates: Sequence[Any]) -> Any:
    """[recall] -> recall; [recall, fpr] -> (recall + 1 - fpr) / 2."""
    return rates[0] if len(rates) == 1 else (rates[0] + 1 - rates[1]) / 2


def _auc_row(
    pairs: Sequence[tuple[Marked, ScoreItem]], kind: str, too_many: bool, base: dict[str, Any]
) -> LatentScore:
    """AUC of right marks against one kind of negative, or all of them."""
    chosen = [(m, i) for m, i in pairs if m.positive or kind in ("", m.kind)]
    pos = [i.value for m, i in chosen if m.positive and i.value is not None]
    neg = [i.value for m, i in chosen if not m.positive and i.value is not None]
    value = None if too_many else auc(pos, neg)
    key = (base["sae_id"], base["latent"], base["explanation_id"], base["scorer"], kind)
    interval = None if value is None else auc_interval(pos, neg, *key)
    return LatentScore(
        metric="auc",
        group=f"kind={kind}" if kind else "",
        value=value,
        ci_low=interval.low if interval else None,
        ci_high=interval.high if interval else None,
        n_pos=len(pos),
        n_neg=len(neg),
        n_failed=len(chosen) - len(pos) - len(neg),
        null_reason=("too_many_failures" if too_many else "one_class") if value is None else None,
        **base,
    )


PLUGIN = Fuzzing
