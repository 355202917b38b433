"""Verdicts on windows, counted by quantile group, kind and stratum (AUTOINTERP 5.2). Torch-free."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from autointerp.rates import too_many_failed
from autointerp.records import Exemplar, ScoreItem

SIDES = {"recall": ("positive",), "fpr_silent": ("silent",), "phi": ("strata",),
         "balanced_accuracy": ("positive", "silent")}  # fmt: skip
"""The windows that a metric is made of; of the others positive ones and those of all strata."""


class Counts(NamedTuple):
    """Answers to the windows of one cell (a quantile group, a stratum, a kind)."""

    hit: int
    """Positive cells: true positives. Negative cells: false positives."""
    miss: int
    failed: int = 0

    @property
    def n(self) -> int:
        """Answered windows."""
        return self.hit + self.miss


@dataclass(frozen=True)
class Cells:
    """The counted answers of one job."""

    groups: dict[int, Counts]
    """Positive windows by quantile group (-1: all, where there are no groups)."""
    kinds: dict[str, Counts]
    """Negative windows by kind."""
    strata: dict[str, Counts]
    """Negative windows by stratum, drawn uniformly inside it."""
    shares: dict[str, float]
    """Population share W_h of each of these strata, summing to 1."""


def positives_of(exemplars: Sequence[Exemplar]) -> list[Exemplar]:
    """The positive windows that recall is defined on: those with a quantile group, else all.

    `random_positive` windows are drawn by activation, not by window, and would weigh dense windows more.
    """
    positives = [e for e in exemplars if e.positive]
    grouped = [e for e in positives if e.group >= 0]
    return grouped or positives


def paired(exemplars: Sequence[Exemplar], items: Sequence[ScoreItem]) -> list[tuple[Exemplar, ScoreItem]]:
    """Windows that were judged, in their order, each with its item."""
    by_id = {item.exemplar_id: item for item in items}
    return [(e, by_id[e.exemplar_id]) for e in exemplars if e.exemplar_id in by_id]


def count_items(items: Sequence[ScoreItem]) -> Counts:
    """Verdicts yes, verdicts no, failures."""
    hit = sum(item.verdict is True for item in items)
    miss = sum(item.verdict is False for item in items)
    return Counts(hit, miss, len(items) - hit - miss)


def _group(pairs: Sequence[tuple[Exemplar, ScoreItem]], by: Callable[[Exemplar], object]) -> dict:
    groups: dict = {}
    for exemplar, item in pairs:
        groups.setdefault(by(exemplar), []).append(item)
    return {name: count_items(groups[name]) for name in sorted(groups)}


def count_cells(exemplars: Sequence[Exemplar], items: Sequence[ScoreItem]) -> Cells:
    """Sort the verdicts into groups, kinds and strata. Items are matched to windows by ``exemplar_id``."""
    pairs = paired(exemplars, items)
    chosen = {e.exemplar_id for e in positives_of([e for e, _ in pairs])}
    positive = [(e, i) for e, i in pairs if e.exemplar_id in chosen]
    negative = [(e, i) for e, i in pairs if not e.positive]
    # Only draws that are uniform inside a stratum may be pooled there.
    uniform = [(e, i) for e, i in negative if e.stratum_share is not None and e.kind in ("silent", e.stratum)]
    if not uniform or any(e.stratum_share is None for e, _ in negative if e.kind == "silent"):
        strata = {"silent": count_items([i for e, i in negative if e.kind == "silent"])}
        shares = {"silent": 1.0}
    else:
        strata = _group(uniform, lambda e: e.stratum)
        shares = {e.stratum: float(e.stratum_share or 0.0) for e, _ in uniform}
    answered = {h: shares[h] for h in strata if strata[h].n > 0}
    total = sum(answered.values())
    return Cells(
        groups=_group(positive, lambda e: e.group),
        kinds=_group(negative, lambda e: e.kind),
        strata=strata,
        # A stratum of which no window was answered is left out; the others stand for the population.
        shares={h: w / total if total > 0 else 1 / len(answered) for h, w in answered.items()},
    )


def stratum_of(exemplar: Exemplar, cells: Cells) -> str | None:
    """The cell of ``cells.strata`` that a silent window was counted in; None for one that stands for no population."""
    if exemplar.positive:
        return None
    if set(cells.strata) == {"silent"}:
        return "silent" if exemplar.kind == "silent" else None
    uniform = exemplar.stratum_share is not None and exemplar.kind in ("silent", exemplar.stratum)
    return exemplar.stratum if uniform else None


def failures_wrong(cells: Cells) -> Cells:
    """Failed items as misses of a positive and hits of a negative."""

    def positive(c: Counts) -> Counts:
        return Counts(c.hit, c.miss + c.failed)

    def negative(c: Counts) -> Counts:
        return Counts(c.hit + c.failed, c.miss)

    return Cells(
        {g: positive(c) for g, c in cells.groups.items()},
        {k: negative(c) for k, c in cells.kinds.items()},
        {h: negative(c) for h, c in cells.strata.items()},
        cells.shares,
    )


def spoilt(cells: Cells, drawn: Iterable[Counts]) -> dict[str, bool]:
    """Where too many windows failed: "" of all of them, and the sides of :data:`SIDES`."""

    def lost(counts: Iterable[Counts]) -> bool:
        counts = list(counts)
        failed = sum(c.failed for c in counts)
        return too_many_failed(failed, sum(c.n for c in counts) + failed)

    whole = lost([*cells.groups.values(), *drawn])
    sides = {
        "positive": list(cells.groups.values()), "silent": [cells.kinds.get("silent", Counts(0, 0))],
        "strata": list(cells.strata.values()),
    }  # fmt: skip
    return {"": whole} | {side: whole or lost(counts) for side, counts in sides.items()}
