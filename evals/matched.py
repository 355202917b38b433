"""Comparison at equal sparsity: matched L0 and Pareto states (METRICS 3.6, 3.7), from rows alone. Torch-free.

A *point* is an SAE in (L0, metric), or several of one architecture whose L0 differ by so little that they are seeds of
one recipe: their mean. R resamples.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from evals.board import MATCHED_L0, Board, BoardSubject, Column, overlap
from evals.gains import Cell, paired_interval
from evals.results import PLACE
from evals.seed_noise import LEVEL, SeedSpread, exceeds_seed_noise, over_seeds, p_value, spread_of
from evals.uncertainty import MIN_UNITS, holm, summarise

State = Literal["front", "dominated", "undecided", ""]
ONE_POINT = 1.05
"""SAEs of one architecture with an L0 below this multiple of the smallest count as one point (decision 026)."""
SAME_L0 = 1.01
"""Two subjects whose L0 differ by less are compared as they are."""
FAMILY = ("lm", "lm_revision", "hookpoint", "d_sae", "train_tokens", "architecture")
"""What SAEs share between which a metric is interpolated: model, place, width, amount of data, architecture."""
Point = tuple[float, Cell, str]
"""L0, metric, and the SAEs behind them, joined by commas."""


@dataclass(frozen=True, kw_only=True)
class Matched:
    """A metric of one architecture at one L0, interpolated between two of its SAEs."""

    lm: str
    hookpoint: str
    d_sae: int
    architecture: str
    column_id: str
    l0: float
    value: float
    ci_low: float | None
    ci_high: float | None
    between: tuple[str, str]
    """The two SAEs; of a point of several, all of them with commas."""


@dataclass(frozen=True, kw_only=True)
class AtOwnL0:
    """B - A at the L0 of one of them, the other interpolated between SAEs of its family (METRICS 3.6)."""

    column_id: str
    title: str
    better: str
    l0: float
    interpolated: Literal["A", "B"]
    between: tuple[str, str]
    a: float
    b: float
    delta: float
    ci_low: float | None
    ci_high: float | None
    paired: bool
    """Were all SAEs that take part resampled with the same weights? Only then is there an interval, over units and
    training seeds."""
    p: float | None = None
    p_holm: float | None = None
    """Corrected over the lines of the table."""
    verdict: str = ""
    scope: str = ""
    """`one training seed` where some point is of one SAE, else `real` or `within seed noise` (METRICS 3.5)."""
    spreads: tuple[SeedSpread, ...] = ()
    """Training seeds of the points behind both sides."""


def family_of(subject: BoardSubject) -> tuple[str, ...]:
    """Equal for SAEs between which a metric may be interpolated."""
    return tuple(str(subject.fields.get(name)) for name in FAMILY)


def points_of(board: Board, group: Sequence[BoardSubject], l0: Column, metric: Column) -> list[Point]:
    """Points by rising L0; subjects without one of the two numbers have none."""
    known: list[tuple[float, str, Cell]] = []
    for subject in group:
        x, y = board.cells[subject.sae_id, l0.id].value, board.cells[subject.sae_id, metric.id]
        if x is not None and x > 0 and y.value is not None:
            known.append((x, subject.sae_id, y))
    clusters: list[list[tuple[float, str, Cell]]] = []
    for entry in sorted(known, key=lambda p: p[:2]):
        if clusters and entry[0] < ONE_POINT * clusters[-1][0][0]:
            clusters[-1].append(entry)
        else:
            clusters.append([entry])
    return [_point(cluster) for cluster in clusters]


def _point(cluster: Sequence[tuple[float, str, Cell]]) -> Point:
    cells = [cell for _, _, cell in cluster]

    def mean(name: str) -> float | None:
        values = [getattr(cell, name) for cell in cells]
        return None if any(v is None for v in values) else float(np.mean(values))

    cell = cells[0] if len(cells) == 1 else Cell(value=mean("value"), ci_low=mean("ci_low"), ci_high=mean("ci_high"))
    return float(np.mean([x for x, _, _ in cluster])), cell, ",".join(name for _, name, _ in cluster)


def interpolate(points: Sequence[Point], at: float) -> tuple[Cell, tuple[str, str]] | None:
    """Linear in ln L0 between the two neighbours; None outside their range.

    The ends of the interval are interpolated like the value: exact where the two SAEs' errors move together, too wide
    otherwise. Where draws were kept, :func:`resampled_interval` replaces it.
    """
    for (x0, a, name_a), (x1, b, name_b) in itertools.pairwise(points):
        if x0 <= at <= x1 and x0 < x1:
            share = (math.log(at) - math.log(x0)) / (math.log(x1) - math.log(x0))

            def mix(p: float | None, q: float | None, share: float = share) -> float | None:
                return None if p is None or q is None else (1 - share) * p + share * q

            cell = Cell(value=mix(a.value, b.value), ci_low=mix(a.ci_low, b.ci_low), ci_high=mix(a.ci_high, b.ci_high))
            return cell, (name_a, name_b)
    return None


def mean_draws(
    board: Board, ids: Sequence[str], column: Column, *, seeds: bool = False
) -> tuple[np.ndarray, str] | None:
    """([R] resamples of the mean over ``ids``, what they pair with); None unless all were kept and resampled alike.

    ``seeds``: the SAEs are resampled too, with the same picks for every column.
    """
    cells = [board.cells[sae_id, column.id] for sae_id in ids]
    pairings = {(cell.pairing, cell.n) for cell in cells}
    found = [board.draws(*c.source) if board.draws and c.source is not None and c.pairing else None for c in cells]
    if len(pairings) > 1 or any(f is None for f in found) or len({len(f) for f in found}) > 1:  # type: ignore[arg-type]
        return None
    drawn = [np.asarray(f, dtype=np.float64) for f in found]
    mean = over_seeds(drawn, "equal L0", ",".join(ids)) if seeds else np.mean(drawn, axis=0)
    return mean, str(pairings.pop())


def l0_draws(board: Board, ids: Sequence[str], l0: Column, resamples: int, *, seeds: bool = False) -> np.ndarray:
    """[R] resamples of the mean L0; its value where none were kept, as that of topk is the same in all."""
    found = mean_draws(board, ids, l0, seeds=seeds)
    if found is not None and len(found[0]) == resamples:
        return found[0]
    return np.full(resamples, np.mean([board.cells[i, l0.id].value for i in ids]))


def interpolated_draws(
    board: Board, l0: Column, metric: Column, between: tuple[str, str], at: "float | np.ndarray", *, seeds: bool = False
) -> tuple[np.ndarray, str] | None:
    """[R] interpolations made inside each resample (METRICS 3.6): value and L0 of both points move with the same units.
    None unless both were resampled alike. ``at``: a number, or [R]."""
    ids = [names.split(",") for names in between]
    ends = [mean_draws(board, names, metric, seeds=seeds) for names in ids]
    if ends[0] is None or ends[1] is None or ends[0][1] != ends[1][1] or len(ends[0][0]) != len(ends[1][0]):
        return None
    y0, y1 = ends[0][0], ends[1][0]
    x0, x1 = (l0_draws(board, names, l0, len(y0), seeds=seeds) for names in ids)
    with np.errstate(divide="ignore", invalid="ignore"):
        share = np.clip((np.log(at) - np.log(x0)) / (np.log(x1) - np.log(x0)), 0.0, 1.0)
        return (1 - share) * y0 + share * y1, ends[0][1]


def interval_of(drawn_R: np.ndarray) -> tuple[float, float] | None:
    """95 % of the resamples; None where more than one in twenty is undefined."""
    known = drawn_R[np.isfinite(drawn_R)]
    if len(known) < 0.95 * len(drawn_R):
        return None
    return float(np.quantile(known, 0.025)), float(np.quantile(known, 0.975))


def resampled_interval(
    board: Board, l0: Column, metric: Column, between: tuple[str, str], at: float
) -> tuple[float, float] | None:
    """95 % of the interpolations of :func:`interpolated_draws`."""
    found = interpolated_draws(board, l0, metric, between, at)
    return None if found is None else interval_of(found[0])


def matched_l0(
    board: Board, keys: Sequence[str] = ("fvu", "delta_ce"), grid: Sequence[float] = MATCHED_L0
) -> list[Matched]:
    """Per family (FAMILY) with two points or more: each metric at the grid points in its range."""
    groups: dict[tuple[str, ...], list[BoardSubject]] = {}
    for s in board.saes:
        groups.setdefault(family_of(s), []).append(s)
    found = []
    for l0 in board.columns_of("l0"):
        for metric in (c for key in keys for c in board.columns_of(key) if c.preset == l0.preset):
            for _, members in sorted(groups.items()):
                points, fields = points_of(board, members, l0, metric), members[0].fields
                for at in grid:
                    hit = interpolate(points, at)
                    if hit is not None and hit[0].value is not None:
                        low_high = resampled_interval(board, l0, metric, hit[1], at)
                        low, high = low_high or (hit[0].ci_low, hit[0].ci_high)
                        found.append(Matched(
                            lm=str(fields["lm"]), hookpoint=str(fields["hookpoint"]), d_sae=int(fields["d_sae"]),
                            architecture=str(fields["architecture"]), column_id=metric.id, l0=at, value=hit[0].value,
                            ci_low=low, ci_high=high, between=hit[1],
                        ))  # fmt: skip
    return found


def at_own_l0(
    board: Board, a_ids: Sequence[str], b_ids: Sequence[str], keys: Sequence[str] = ("fvu", "delta_ce", "kl")
) -> list[AtOwnL0]:
    """B against A at equal L0, where theirs differ: one of them interpolated between SAEs of its family.

    The one whose family spans the other's L0, B before A; nothing where neither does: no value is extrapolated.
    """
    found = []
    for l0 in board.columns_of("l0"):
        for metric in (c for key in keys for c in board.columns_of(key) if c.preset == l0.preset):
            for moved, own in ((b_ids, a_ids), (a_ids, b_ids)):
                line = _at_l0_of(board, l0, metric, own, moved, "B" if moved is b_ids else "A")
                if line is not None:
                    found.append(line)
                    break
    return _judged(found)


def _judged(lines: Sequence[AtOwnL0]) -> list[AtOwnL0]:
    """Verdicts by the rules of the main table: Holm-corrected p, and what the training seeds allow to be said."""
    found = []
    for line, p_holm in zip(lines, holm([line.p for line in lines]), strict=True):
        if p_holm is None or line.ci_low is None or line.ci_high is None:
            found.append(replace(line, verdict="undecided: no interval"))
        elif p_holm >= LEVEL or line.ci_low <= 0 <= line.ci_high:
            found.append(replace(line, p_holm=p_holm, verdict="no difference shown"))
        else:
            winner = "B" if (line.delta > 0) == (line.better == "higher") else "A"
            scope = "one training seed"
            if min(s.n for s in line.spreads) > 1:
                scope = "real" if exceeds_seed_noise(line.delta, line.spreads) else "within seed noise"
            found.append(replace(line, p_holm=p_holm, verdict=f"{winner} better", scope=scope))
    return found


def _spreads(
    board: Board, l0: Column, metric: Column, own: Sequence[str], between: tuple[str, str], at: float
) -> tuple[SeedSpread, ...]:
    """Seeds of the side that stays, and of the two points of the other, by what they weigh in the difference."""
    points = [(1.0, list(own))]
    (x0, low), (x1, high) = (
        (float(np.mean([board.cells[i, l0.id].value for i in names.split(",")])), names.split(",")) for names in between
    )
    share = (math.log(at) - math.log(x0)) / (math.log(x1) - math.log(x0))
    points += [(weight, names) for weight, names in ((1 - share, low), (share, high)) if weight > 0]
    values = [[board.cells[i, metric.id].value for i in names] for _, names in points]
    return tuple(
        SeedSpread(spread_of(v).sd or 0.0, len(v), weight)
        for v, (weight, _) in zip(values, points, strict=True)
    )


def _at_l0_of(
    board: Board, l0: Column, metric: Column, own: Sequence[str], moved: Sequence[str], name: Literal["A", "B"]
) -> AtOwnL0 | None:
    known = {s.sae_id: s for s in board.saes}
    x, y, z = ([board.cells[i, c.id].value for i in ids] for ids, c in ((own, l0), (own, metric), (moved, l0)))
    if not {*own, *moved} <= known.keys() or any(v is None for v in (*x, *y, *z)):
        return None
    at, value, there = (float(np.mean(v)) for v in (x, y, z))  # type: ignore[arg-type]
    other = family_of(known[moved[0]])
    if max(at, there) < SAME_L0 * min(at, there) or family_of(known[own[0]]) == other:
        return None  # within one family the interpolated value is the SAE itself
    family = [s for s in board.saes if family_of(s) == other]
    hit = interpolate(points_of(board, family, l0, metric), at)
    if hit is None or hit[0].value is None:
        return None
    sign = 1.0 if name == "B" else -1.0
    a, b = (value, hit[0].value) if name == "B" else (hit[0].value, value)
    delta_R = _differences(board, l0, metric, own, hit[1], sign)
    n = min(board.cells[i, metric.id].n for i in (*own, *(i for names in hit[1] for i in names.split(","))))
    estimate = summarise(b - a, np.array([]) if delta_R is None else delta_R, n)
    p = None
    if delta_R is not None and estimate.ci_low is not None:
        p = p_value(delta_R[np.isfinite(delta_R)], estimate, n)
    return AtOwnL0(
        column_id=metric.id, title=metric.title, better=metric.spec.better, l0=at, interpolated=name, between=hit[1],
        a=a, b=b, delta=b - a, ci_low=estimate.ci_low, ci_high=estimate.ci_high, paired=delta_R is not None, p=p,
        spreads=_spreads(board, l0, metric, own, hit[1], at),
    )  # fmt: skip


def _differences(
    board: Board, l0: Column, metric: Column, own: Sequence[str], between: tuple[str, str], sign: float
) -> np.ndarray | None:
    """[R] ``sign`` x (interpolated - own), units and training seeds resampled; None unless all pair."""
    mine = mean_draws(board, own, metric, seeds=True)
    if mine is None:
        return None
    at = l0_draws(board, own, l0, len(mine[0]), seeds=True)
    drawn = interpolated_draws(board, l0, metric, between, at, seeds=True)
    if drawn is None or drawn[1] != mine[1] or len(drawn[0]) != len(mine[0]):
        return None
    return sign * (drawn[0] - mine[0])


def told_apart(board: Board, a: Cell, b: Cell) -> bool:
    """Does the interval of a - b exclude 0? By draws where they pair, else by whether the two intervals meet.

    A value of many units without an interval (the L0 of topk) was the same in all resamples and is taken as exact;
    one of few units has no interval since too little is known of its error, and is told apart from nothing.
    """
    if a.value == b.value or a.value is None or b.value is None:
        return False
    paired = paired_interval(a, b, board.draws)
    if paired is not None:
        return not paired[0] <= 0 <= paired[1]
    if any(c.ci_low is None and c.n < MIN_UNITS for c in (a, b)):
        return False
    return not overlap(*(c if c.ci_low is not None else replace(c, ci_low=c.value, ci_high=c.value) for c in (a, b)))


def pareto(board: Board, metric: Column) -> dict[str, State]:
    """State of every SAE in (L0, metric), fewer latents and a better metric being good.

    Dominated: some SAE of the same place is no worse in both, and the interval of the difference in the
    metric or in L0, paired where both were resampled alike, excludes 0; without draws, their two intervals are
    disjoint. Undecided: dominated by the point values, but no difference is shown.
    """
    of_l0 = board.columns_of("l0")
    l0 = next((c for c in of_l0 if c.preset == metric.preset), of_l0[0])
    sign = -1 if metric.spec.better == "higher" else 1
    states: dict[str, State] = {}
    for a in board.saes:
        x, y = board.cells[a.sae_id, l0.id], board.cells[a.sae_id, metric.id]
        if x.value is None or y.value is None:
            states[a.sae_id] = ""
            continue
        state: State = "front"
        for b in board.saes:
            if b is a or any(a.fields.get(f) != b.fields.get(f) for f in PLACE):
                continue
            u, v = board.cells[b.sae_id, l0.id], board.cells[b.sae_id, metric.id]
            if u.value is None or v.value is None or u.value > x.value or sign * v.value > sign * y.value:
                continue
            if (u.value, v.value) == (x.value, y.value):
                continue
            apart = told_apart(board, v, y) or told_apart(board, u, x)
            state = "dominated" if apart or state == "dominated" else "undecided"
        states[a.sae_id] = state
    return states
