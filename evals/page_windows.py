"""Windows and neighbours of a latent as data for latent.js: tokens, verdicts, simulations. Torch-free."""

from collections.abc import Mapping, Sequence
from typing import Any

from autointerp.records import DIAGNOSTIC_KINDS, Exemplar, Explanation, Failure, ScoreItem, Simulation
from evals.board import plain
from evals.page_data import LatentData
from evals.page_text import number, simulated_percent, visible, window_tokens
from evals.page_tokens import TokenReader

KIND_TITLES = (
    ("explain", ("top",), "Strongest", False),
    ("explain", ("quantile",), "Over the whole range", False),
    ("score", ("top", "quantile", "random_positive"), "Scored, active", False),
    ("score", ("silent",), "Scored, silent", False),
    (
        "score",
        ("same_token", "co_occurring", "decoder_near", *DIAGNOSTIC_KINDS),
        "Scored, silent but close (hard negatives)",
        False,
    ),
    ("explain", ("random_positive",), "Random activations (used for the n-gram pattern)", True),
    ("explain", ("silent", "same_token", "co_occurring", "decoder_near"), "Silent, shown to the explainer", True),
    (
        "calibrate",
        ("top", "quantile", "random_positive", "silent", "same_token", "co_occurring", "decoder_near"),
        "Calibration windows",
        True,
    ),
)


def failure_text(failure: Failure | None) -> str:
    """``code (detail)``, "" for None."""
    if failure is None:
        return ""
    return visible(failure.code + (f" ({failure.detail})" if failure.detail else ""))


def _verdict(item: ScoreItem) -> str:
    """Its first character says how it went: ⚠ failed, ✓ right, ✗ wrong, else a strength that is neither."""
    value = f" {number(plain(item.value), 2)}" if item.value is not None else ""
    if item.failure is not None or (item.verdict is None and item.value is None):
        return f"⚠ {item.scorer}: {failure_text(item.failure) or 'no answer'}"
    if item.verdict is None:  # a judge of strengths, not of yes and no
        return f"{item.scorer}{value}"
    if item.scorer == "intervention":  # its verdict says whether the choice was right
        return f"{'✓' if item.verdict else '✗'} {item.scorer}{value}"
    name = item.scorer
    if name == "fuzzing":  # the same window may be shown with right and with wrong marks
        name += f" ({'right' if item.positive else 'wrong'} tokens marked)"
    return f"{'✓' if item.verdict == item.positive else '✗'} {name}{value}"


def _window(
    e: Exemplar, tokens: Sequence[str], items: Sequence[ScoreItem], simulation: Simulation | None
) -> dict[str, Any]:
    """What latent.js draws: k kind, p active, s source, t tokens, v verdicts, m simulated per cent, f its failure."""
    values = simulation.values if simulation is not None and simulation.failure is None else None
    window: dict[str, Any] = {
        "k": e.kind.replace("_", " ") + (f" {e.group + 1}" if e.group >= 0 else ""),
        "p": int(e.positive),
        "s": visible(e.source),
        "t": window_tokens(tokens, e.acts, merge=not values, peak=e.peak),
    }
    if items:
        window["v"] = [_verdict(i) for i in sorted(items, key=lambda i: i.scorer)]
    if values:
        window["m"] = simulated_percent(values)
    if simulation is not None and simulation.failure is not None:
        window["f"] = failure_text(simulation.failure)
    return window


def window_groups(latent: LatentData, tokens: TokenReader, chosen: Explanation | None) -> list[dict[str, Any]]:
    """Windows by kind, verdicts and simulations being those of the chosen explanation."""
    wanted = chosen.explanation_id if chosen is not None else ""
    items: dict[str, list[ScoreItem]] = {}
    for item in latent.items:
        if item.explanation_id == wanted:
            items.setdefault(item.exemplar_id, []).append(item)
    simulations = {s.exemplar_id: s for s in latent.simulations if s.explanation_id == wanted}
    groups = []
    for split, kinds, title, fold in KIND_TITLES:
        found = [e for e in latent.exemplars if e.split == split and e.kind in kinds]
        found.sort(key=lambda e: (kinds.index(e.kind), -max(e.acts, default=0.0), e.exemplar_id))
        windows = [
            _window(e, tokens.window(e.token_ids), items.get(e.exemplar_id, ()), simulations.get(e.exemplar_id))
            for e in found
        ]
        if windows:
            groups.append({"title": title, "fold": fold, "windows": windows})
    return groups


def neighbours(latent: LatentData, pages: Mapping[int, str]) -> list[dict[str, Any]]:
    """Neighbours with the explanation of those that have a page; the others are numbers only."""
    ids, near = latent.stats.get("nearest"), latent.stats.get("nearest_cosine")
    pairs = [] if ids is None or near is None else [(int(i), float(v)) for i, v in zip(ids, near, strict=True)]
    beside = sorted({e.neighbour for e in latent.exemplars if e.kind == "co_occurring" and e.neighbour is not None})
    lists = (
        ("Nearest latents by decoder direction (cosine)", pairs),
        ("Latents active on the same tokens, whose windows are hard negatives above", [(i, None) for i in beside]),
    )
    return [
        {
            "title": title,
            "entries": [
                {"latent": i, "value": number(v, 2), "text": pages.get(i, ""), "linked": i in pages}
                for i, v in found
                if i >= 0
            ],
        }
        for title, found in lists
        if found
    ]
