"""How good is a judge on features that we know? Asked before any score of its is believed (AUTOINTERP 5.4).

24 invented descriptions with five fitting and five unfitting texts each (``judge_check.json``, our own), judged under
the right description and under another one's. A judge below 0.75, or less than 0.15 above its value for wrong
descriptions, is weak: its scores are shown, never ranked. Torch-free.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from typing import Any

import numpy as np

from autointerp.interfaces import SUBJECT_NEEDS, ScoreContext, ScoreJob, Scorer, check_needs
from autointerp.rates import auc, interval_of, too_many_failed
from autointerp.records import CALIBRATE, SCORE, Exemplar, Explanation, JudgeCheck, ScoreItem
from sae.config import require
from sae.manifest import rng
from sae.plugins import find

MIN_AUC = 0.75
MIN_ABOVE_WRONG = 0.15
N_RESAMPLES = 2_000
CHECK_ID = "judge_check"
BASE_RATE = 0.5


@dataclass(frozen=True)
class KnownFeature:
    """One description and the texts that do and do not fit it."""

    description: str
    fitting: tuple[str, ...]
    unfitting: tuple[str, ...]


@lru_cache(maxsize=1)
def known_features() -> tuple[KnownFeature, ...]:
    """The shipped descriptions, in the order of the file."""
    text = (resources.files("autointerp") / "judge_check.json").read_text(encoding="utf-8")
    return tuple(KnownFeature(e["description"], tuple(e["fitting"]), tuple(e["unfitting"])) for e in json.loads(text))


def check_judge(
    scorer: str | Scorer, ctx: ScoreContext, *, n_descriptions: int | None = None, seed: int = 0
) -> JudgeCheck:
    """Judge the known texts with a scorer of windows (its file name, or an object) as it will judge a run's windows.

    ``auc`` is the mean over descriptions of the AUC of its values; a judge that gives yes or no only (detection in list
    mode) gets its balanced accuracy instead, a judge with a ``separation(items)`` of its own that one; where it reads
    no description (``uses_explanation`` false), the wrong arm has texts that share nothing. Where more than a tenth of
    the answers of an arm failed, its value is None and the judge weak, however good the rest. The interval is a
    bootstrap over descriptions. ``n_descriptions``: the first so many. Raises :class:`Unsupported` if the context lacks
    what the scorer needs.
    """
    features = known_features()[:n_descriptions]
    require(len(features) >= 2, f"a judge check needs at least 2 descriptions, got {n_descriptions}")
    judge: Scorer = find("autointerp.scorers", scorer)() if isinstance(scorer, str) else scorer
    check_needs(judge, ctx, but=SUBJECT_NEEDS)
    shift = len(features) // 2
    n = range(len(features))
    right = [_job(i, features[i], features[i].description, ctx, "") for i in n]
    if getattr(judge, "uses_explanation", True):
        wrong = [_job(i, features[i], features[(i + shift) % len(features)].description, ctx, "wrong") for i in n]
    else:
        wrong = [_job(i, _nothing_shared(features, i), features[i].description, ctx, "wrong") for i in n]
    results = judge.score_many([*right, *wrong], ctx)
    measured = getattr(judge, "separation", separation)
    arms = results[: len(features)], results[len(features) :]
    values, wrong_values = ([measured(r.items) for r in arm] for arm in arms)
    items = [item for r in results for item in r.items]
    mean, wrong_mean = (
        _mean(v) if _answered(arm) else None for v, arm in zip((values, wrong_values), arms, strict=True)
    )
    interval = _interval(values, judge.name, seed) if mean is not None else (None, None)
    judged_by = next((s.judge for r in results for s in r.scores), judge.name)
    return JudgeCheck(
        judge=judged_by,
        scorer=judge.name,
        auc=mean,
        ci_low=interval[0],
        ci_high=interval[1],
        wrong_auc=wrong_mean,
        n=len(features),
        n_failed=sum(item.failure is not None for item in items),
        weak=is_weak(mean, wrong_mean),
        detail={
            "measure": _measure(judge, items),
            "per_description": {f.description: v for f, v in zip(features, values, strict=True)},
            "n_items": len(items),
            "n_undefined": sum(v is None for v in values),
        },
    )


def _answered(results: Sequence[Any]) -> bool:
    failed = [item.failure is not None for r in results for item in r.items]
    return not too_many_failed(sum(failed), len(failed))


def _measure(judge: Scorer, items: Sequence[ScoreItem]) -> str:
    if hasattr(judge, "separation"):
        return "accuracy"
    return "auc" if any(item.value is not None for item in items) else "balanced_accuracy"


def _nothing_shared(features: Sequence[KnownFeature], index: int) -> KnownFeature:
    """The floor of a judge that reads no description: "fitting" texts, each of another description."""
    here = features[index]
    foreign = tuple(features[(index + k) % len(features)].fitting[k] for k in range(len(here.fitting)))
    return KnownFeature(here.description, foreign, here.unfitting)


def is_weak(value: float | None, wrong: float | None) -> bool:
    """Below 0.75, or less than 0.15 above the wrong descriptions, or not measured at all."""
    return value is None or wrong is None or value < MIN_AUC or value - wrong < MIN_ABOVE_WRONG


def separation(items: Sequence[ScoreItem]) -> float | None:
    """How well the answers tell fitting from unfitting texts: AUC of the values, else balanced accuracy of the
    verdicts. Failed items are left out; None where a class is left empty."""
    if any(item.value is not None for item in items):
        answered = [(item.positive, item.value) for item in items if item.value is not None]
        return auc([v for p, v in answered if p], [v for p, v in answered if not p])
    hits = [bool(i.verdict) for i in items if i.positive and i.verdict is not None]
    false = [bool(i.verdict) for i in items if not i.positive and i.verdict is not None]
    if not hits or not false:
        return None
    return (sum(hits) / len(hits) + 1 - sum(false) / len(false)) / 2


def _job(index: int, feature: KnownFeature, description: str, ctx: ScoreContext, arm: str) -> ScoreJob:
    """One latent per description. The calibrate windows are the same texts: they set a threshold, which no number here
    depends on, and cost nothing twice."""
    return ScoreJob(
        explanation=Explanation(
            explanation_id=f"{CHECK_ID}/{index}/{arm or 'right'}",
            sae_id=CHECK_ID,
            latent=index,
            explainer=CHECK_ID,
            text=description,
        ),
        sae_id=CHECK_ID,
        latent=index,
        exemplars=tuple(_windows(index, feature, ctx, SCORE)),
        calibrate=tuple(_windows(index, feature, ctx, CALIBRATE)),
        pi=BASE_RATE,
    )


def _windows(index: int, feature: KnownFeature, ctx: ScoreContext, split: str) -> list[Exemplar]:
    out = []
    for kind, texts in (("top", feature.fitting), ("silent", feature.unfitting)):
        for k, text in enumerate(texts):
            ids = tuple(int(i) for i in ctx.tokenizer.encode(text, add_special_tokens=False))
            acts = tuple(1.0 if kind == "top" else 0.0 for _ in ids)
            fields: dict[str, Any] = {"token_ids": ids, "acts": acts, "peak": 0 if kind == "top" else -1}
            out.append(
                Exemplar(exemplar_id=f"{CHECK_ID}/{index}/{kind}/{k}", latent=index, kind=kind, split=split, **fields)
            )
    return out


def _mean(values: Sequence[float | None]) -> float | None:
    found = [v for v in values if v is not None]
    return float(np.mean(found)) if found else None


def _interval(values: Sequence[float | None], name: str, seed: int) -> tuple[float | None, float | None]:
    """95 % bootstrap over descriptions of the mean."""
    found = np.array([v for v in values if v is not None], dtype=np.float64)
    if len(found) < 2:
        return None, None
    draws = rng("judge_check", seed, name).integers(len(found), size=(N_RESAMPLES, len(found)))
    return interval_of(found[draws].mean(1), float(found.mean())) or (None, None)
