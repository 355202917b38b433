"""The page of one latent: explanations side by side, scores with floors, shaded windows with verdicts. Torch-free.

Everything here is plain data for ``latent.html.j2``, which escapes it.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from autointerp.records import Explanation, JudgeCheck, LatentScore
from evals import charts
from evals.board import plain, weak_reason
from evals.gains import Cell
from evals.page_data import LatentData, SaeData
from evals.page_text import number, percent, visible
from evals.page_tokens import TokenReader
from evals.page_windows import failure_text, neighbours, window_groups

HEADLINE_METRICS = ("auc", "pearson", "f1", "balanced_accuracy", "accuracy")
"""The first of these that a scorer reports stands for it in tables with one column per scorer."""
SHOWN_METRICS = ("auc", "pearson", "precision", "accuracy")
"""Metrics of the main table; the others fold away."""
MAX_PATTERNS = 12


@dataclass(frozen=True, kw_only=True)
class ScoreColumn:
    """A scorer's headline metric, a column of the SAE page."""

    key: str
    title: str
    hint: str
    weak: str = ""


def selected(explanations: Sequence[Explanation]) -> Explanation | None:
    """The explanation that was chosen; of several, the first that has a text; None if there is none."""
    chosen = [e for e in explanations if e.selected]
    return next((e for e in chosen if e.text), chosen[0] if chosen else None)


def headline_text(latent: LatentData) -> str:
    """What tables call a latent: the text of its chosen explanation; "" for none."""
    chosen = selected(latent.explanations)
    return visible(chosen.text or ("n-gram pattern" if chosen.pattern else "")) if chosen else ""


@dataclass(frozen=True)
class SaeDigest:
    """What the pages about several SAEs need of one: kept when all else about it is forgotten."""

    texts: Mapping[int, str]
    """What each explained latent is called, by number, ascending."""
    checks: tuple[JudgeCheck, ...] = ()
    train: Mapping[str, Any] = field(default_factory=dict)
    """Its training configuration; empty where unknown."""

    @staticmethod
    def of(sae: SaeData) -> "SaeDigest":
        texts = {x.latent: headline_text(x) for x in sae.latents}
        return SaeDigest(texts, tuple(sae.checks), dict(sae.cfg.get("train") or {}))


def weak_checks(checks: Iterable[JudgeCheck]) -> dict[tuple[str, str], str]:
    """(judge, scorer) -> why that judge is not believed."""
    return {(c.judge, c.scorer): weak_reason(c.auc, c.wrong_auc) for c in checks if c.weak}


def score_cell(score: LatentScore) -> Cell:
    """A score as a cell; without value it carries its reason."""
    return Cell(
        value=plain(score.value),
        ci_low=plain(score.ci_low),
        ci_high=plain(score.ci_high),
        n=score.n_pos + score.n_neg,
        n_failed=score.n_failed,
        reason="" if plain(score.value) is not None else f"undefined: {score.null_reason or 'no reason recorded'}",
    )


def _aggregate(scores: Iterable[LatentScore]) -> list[LatentScore]:
    return [s for s in scores if not s.group and not s.floor_kind]


def _headline(metrics: Iterable[str]) -> str:
    known = sorted(set(metrics))
    return next((m for m in HEADLINE_METRICS if m in known), known[0])


def score_columns(sae: SaeData) -> list[ScoreColumn]:
    """One column per scorer that scored a selected explanation of this SAE."""
    weak = weak_checks(sae.checks)
    metrics: dict[tuple[str, str], set[str]] = {}
    for latent in sae.latents:
        chosen = selected(latent.explanations)
        for s in _aggregate(latent.scores):
            if chosen is not None and s.explanation_id == chosen.explanation_id:
                metrics.setdefault((s.scorer, s.judge), set()).add(s.metric)
    many = {scorer for scorer, _ in metrics if sum(other == scorer for other, _ in metrics) > 1}
    columns = []
    for (scorer, judge), names in sorted(metrics.items()):
        metric = _headline(names)
        title = visible(f"{scorer} {metric}" + (f" ({judge})" if scorer in many else ""))
        columns.append(
            ScoreColumn(
                key=f"{scorer}|{judge}|{metric}",
                title=title,
                hint=f"judge {visible(judge)}, selected explanation",
                weak=weak.get((judge, scorer), ""),
            )
        )
    return columns


def best_scores(latent: LatentData) -> dict[str, Cell]:
    """Scores of the selected explanation, by the keys of :func:`score_columns`."""
    chosen = selected(latent.explanations)
    if chosen is None:
        return {}
    return {
        f"{s.scorer}|{s.judge}|{s.metric}": score_cell(s)
        for s in _aggregate(latent.scores)
        if s.explanation_id == chosen.explanation_id
    }


# -- explanations -----------------------------------------------------------------------------------------------------
def _patterns(pattern: Mapping[str, Any] | None, tokens: TokenReader) -> list[dict[str, Any]]:
    entries = list((pattern or {}).get("patterns", []))
    entries.sort(key=lambda p: (-int(p.get("n_docs", 1)), -float(p.get("value", 0.0)), str(p.get("ids"))))
    return [
        {
            "tokens": [None if i is None else visible(tokens.piece(int(i))) for i in p.get("ids", [])],
            "anchored": bool(p.get("anchored")),
            "value": number(plain(p.get("value")), 2),
            "hint": f"predicts {number(plain(p.get('value')), 2)}; from {int(p.get('n_docs', 1))} exemplar(s)",
        }
        for p in entries
    ]


def _explanation(e: Explanation, chosen: Explanation | None, tokens: TokenReader) -> dict[str, Any]:
    patterns = _patterns(e.pattern, tokens)
    used = e.prompt_tokens + e.output_tokens
    facts = [
        ("margin", number(e.margin, 3) if e.margin is not None else ""),
        ("calibration AUC (used to choose)", number(e.calibrate_score, 3) if e.calibrate_score is not None else ""),
        ("model", visible(e.llm or "")),
        ("role", e.role if e.role != "input" else ""),
        ("tokens used", f"{used:,}" if used else ""),
        ("patterns", len(patterns) if patterns else ""),
    ]
    return {
        "explainer": visible(e.explainer),
        "candidate": e.candidate,
        "hedged": e.hedged,
        "text": visible(e.text or ""),
        "selected": chosen is not None and e.explanation_id == chosen.explanation_id,
        "failure": failure_text(e.failure),
        "patterns": patterns[:MAX_PATTERNS],
        "more_patterns": max(0, len(patterns) - MAX_PATTERNS),
        "facts": facts,
    }


# -- scores -----------------------------------------------------------------------------------------------------------
def floor_of(score: LatentScore, floors: Sequence[LatentScore]) -> LatentScore | None:
    """The shuffled floor on the same windows, by scorer, judge, metric, group; of several, that of the explainer."""
    same = [
        f
        for f in floors
        if (f.scorer, f.judge, f.metric, f.group) == (score.scorer, score.judge, score.metric, score.group)
    ]
    return next(
        (f for f in same if f.explanation_id == score.explanation_id),
        next((f for f in same if f.explainer == score.explainer), None),
    )


def _score_rows(
    latent: LatentData, chosen: Explanation | None, checks: Sequence[JudgeCheck], *, grouped: bool
) -> list[dict[str, Any]]:
    weak = weak_checks(checks)
    auc = {(c.judge, c.scorer): c.auc for c in checks}
    names = {e.explanation_id: e for e in latent.explanations}
    floors = [s for s in latent.scores if s.floor_kind]
    rows = []
    for s in latent.scores:
        if s.floor_kind or bool(s.group) != grouped:
            continue
        floor, explanation = floor_of(s, floors), names.get(s.explanation_id)
        gain = s.value - floor.value if s.value is not None and floor is not None and floor.value is not None else None
        label = s.explainer + (
            f" #{explanation.candidate}" if explanation is not None and explanation.candidate else ""
        )
        found = auc.get((s.judge, s.scorer))
        rows.append(
            {
                "explainer": visible(label),
                "scorer": s.scorer,
                "metric": s.metric,
                "group": visible(s.group),
                "cell": score_cell(s),
                "floor": score_cell(floor) if floor is not None else None,
                "gain": gain,
                "n_pos": s.n_pos,
                "n_neg": s.n_neg,
                "judge": visible(s.judge),
                "check": number(found, 2),
                "weak": weak.get((s.judge, s.scorer), ""),
                "selected": chosen is not None and s.explanation_id == chosen.explanation_id,
            }
        )
    rows.sort(
        key=lambda r: (
            not r["selected"],
            r["explainer"],
            r["scorer"],
            HEADLINE_METRICS.index(r["metric"]) if r["metric"] in HEADLINE_METRICS else 99,
            r["metric"],
            r["group"],
        )
    )
    return rows


def _short(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.4g}")


def _cell_list(cell: Cell) -> list[Any]:
    """[value, low, high], or [reason] for a gap."""
    return [cell.reason] if cell.value is None else [_short(cell.value), _short(cell.ci_low), _short(cell.ci_high)]


def _more_table(rows: Sequence[Mapping[str, Any]]) -> list[list[Any]]:
    """Rows of latent.js: chosen?, explainer, scorer, metric, value, floor, gain, n, failed, judge, AUC, weak."""
    return [
        [
            int(r["selected"]),
            *(r[name] for name in ("explainer", "scorer", "metric")),
            _cell_list(r["cell"]),
            _cell_list(r["floor"]) if r["floor"] is not None else None,
            _short(r["gain"]),
            f"{r['n_pos']} + {r['n_neg']}",
            *(r["cell"].n_failed, r["judge"], r["check"], r["weak"]),
        ]
        for r in rows
    ]


def _group_table(rows: Sequence[Mapping[str, Any]]) -> list[list[Any]]:
    """Scores by group as latent.js draws them: explainer, scorer, metric, group, value, n."""

    return [
        [
            r["explainer"],
            r["scorer"],
            r["metric"],
            r["group"],
            _cell_list(r["cell"]),
            f"{r['n_pos']} + {r['n_neg']}",
        ]
        for r in rows
    ]


def _charts(latent: LatentData) -> list[dict[str, Any]]:
    raw = next((latent.stats[n] for n in ("histogram", "hist_50", "hist") if latent.stats.get(n) is not None), None)
    heights = [float(h) for h in raw] if raw is not None else []
    if not heights or max(heights) <= 0:
        return []
    top = float(latent.stats.get("max_act") or 0.0)
    width = top / len(heights)
    notes = [f"{i * width:.3g} to {(i + 1) * width:.3g}: {h:g} tokens" for i, h in enumerate(heights)]
    edges = ("0", number(top, 2))
    return [
        {
            "svg": charts.bars(heights, edges, "activation histogram", notes=notes),
            "caption": "Active tokens by activation.",
        },
        {
            "svg": charts.bars(heights, edges, "activation histogram, logarithmic counts", log=True, notes=notes),
            "caption": "The same, counts on a log scale.",
        },
    ]


def effect_context(latent: LatentData) -> dict[str, Any] | None:
    """What taking the latent out does, as the template shows it; None where it was not measured."""
    effect = latent.effect
    if effect is None:
        return None

    def listed(tokens: Sequence[tuple[str, float]], sign: int) -> list[dict[str, str]]:
        return [
            {"token": visible(token), "points": f"{100 * change:+.2g}"} for token, change in tokens if sign * change > 0
        ]

    left_out = ", ".join(f"{n} × {visible(code)}" for code, n in sorted(effect.failures.items()))
    return {
        "failure": failure_text(effect.failure),
        "n_windows": effect.n_windows,
        "left_out": left_out,
        "n_tokens": effect.n_tokens,
        "loss": f"{effect.loss_rise:+.3g}" if effect.loss_rise is not None else "",
        "kl": number(effect.kl, 3),
        "lists": [
            ("Made likelier by this latent", listed(effect.raised, 1)),
            ("Made less likely", listed(effect.lowered, -1)),
        ],
    }


def latent_context(latent: LatentData, sae: SaeData, pages: Mapping[int, str]) -> dict[str, Any]:
    """What latent.html.j2 needs, but for the links before, behind and above. ``pages``: explanation by latent."""
    stats, chosen = latent.stats, selected(latent.explanations)
    shown = [max(e.acts, default=0.0) for e in latent.exemplars]
    max_act = max([float(stats.get("max_act") or 0.0), *(shown or [0.0])])
    density, pi = plain(stats.get("density")), plain(stats.get("pi"))
    facts: list[tuple[str, Any]] = [
        ("density (tokens)", percent(density) if density is not None else ""),
        ("active windows, score split", percent(pi) if pi is not None else ""),
        ("maximum", number(max_act, 2) if max_act else ""),
        ("mean when active", number(plain(stats.get("mean_positive")), 2)),
        ("active tokens", f"{int(stats['n_active']):,}" if plain(stats.get("n_active")) is not None else ""),
        ("documents", "" if plain(stats.get("n_docs")) is None else f"{int(stats['n_docs']):,}"),
        ("skew", number(plain(stats.get("skew")), 1)),
        ("kurtosis", number(plain(stats.get("kurtosis")), 1)),
    ]
    groups = window_groups(latent, sae.tokens, chosen)
    windows = [w for g in groups for w in g["windows"]]
    by_group = [r for r in _score_rows(latent, chosen, sae.checks, grouped=True) if r["selected"]]
    simulators = sorted({s.simulator for s in latent.simulations})
    lists = [
        ("Tokens with the largest mean activation", [sae.tokens.piece(i) for i in latent.top_ids]),
        ("Promoted next tokens (logit lens)", latent.promoted),
        ("Suppressed next tokens (logit lens)", latent.suppressed),
    ]
    ordered = sorted(
        latent.explanations, key=lambda e: (e is not chosen, e.failure is not None, e.explainer, e.candidate)
    )
    scores = _score_rows(latent, chosen, sae.checks, grouped=False)
    more = [r for r in scores if r["metric"] not in SHOWN_METRICS]
    return {
        "latent": latent.latent,
        "failures": [failure_text(f) for f in latent.failures],
        "facts": facts,
        "explanations": [_explanation(e, chosen, sae.tokens) for e in ordered],
        "score_rows": [r for r in scores if r["metric"] in SHOWN_METRICS],
        "n_more": len(more),
        "n_windows": len(windows),
        "n_by_group": len(by_group),
        "drawn": {"max": max_act, "groups": groups, "by_group": _group_table(by_group), "more": _more_table(more)},
        "has_wrong": any(v[0] in "✗⚠" for w in windows for v in w.get("v", ())),
        "has_sim": any("m" in w for w in windows),
        "max_text": number(max_act, 2),
        "simulator": visible(", ".join(simulators)),
        "verdict_of": visible(chosen.explainer) + "’s explanation" if chosen is not None and latent.items else "",
        "charts": _charts(latent),
        "neighbours": neighbours(latent, pages),
        "effect": effect_context(latent),
        "token_lists": [(t, [visible(x) for x in tokens]) for t, tokens in lists if tokens],
    }
