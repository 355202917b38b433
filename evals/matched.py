"""Comparison at equal sparsity: matched L0 and Pareto states (METRICS 3.6, 3.7), from rows alone. Torch-free."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from evals.board import MATCHED_L0, Board, BoardSubject, Column, overlap
from evals.gains import Cell, paired_interval

State = Literal["front", "dominated", "undecided", ""]


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
    """The two SAEs."""


def _points(board: Board, group: Sequence[BoardSubject], l0: Column, metric: Column) -> list[tuple[float, Cell, str]]:
    points = []
    for subject in group:
        x, y = board.cells[subject.sae_id, l0.id].value, board.cells[subject.sae_id, metric.id]
        if x is not None and x > 0 and y.value is not None:
            points.append((x, y, subject.sae_id))
    return sorted(points, key=lambda p: (p[0], p[2]))


def interpolate(points: Sequence[tuple[float, Cell, str]], at: float) -> tuple[Cell, tuple[str, str]] | None:
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


def resampled_interval(
    board: Board, l0: Column, metric: Column, between: tuple[str, str], at: float
) -> tuple[float, float] | None:
    """95 % of the interpolations made inside each resample (METRICS 3.6): value and L0 of both SAEs move with the same
    units. None unless all four were resampled alike."""
    if board.draws is None:
        return None
    cells = [board.cells[sae_id, column.id] for column in (metric, l0) for sae_id in between]
    if len({(c.pairing, c.n) for c in cells[:2]}) > 1 or len({(c.pairing, c.n) for c in cells[2:]}) > 1:
        return None
    found = [board.draws(*c.source) if c.source is not None and c.pairing else None for c in cells]
    if any(f is None for f in found[:2]) or len(found[0]) != len(found[1]):  # type: ignore[arg-type]
        return None
    y0, y1 = (np.asarray(f, dtype=np.float64) for f in found[:2])
    x0, x1 = (
        np.full(len(y0), cell.value) if f is None or len(f) != len(y0) else np.asarray(f, dtype=np.float64)
        for f, cell in zip(found[2:], cells[2:], strict=True)
    )  # the L0 of topk is the same in all resamples, so that none are kept
    with np.errstate(divide="ignore", invalid="ignore"):
        share = np.clip((math.log(at) - np.log(x0)) / (np.log(x1) - np.log(x0)), 0.0, 1.0)
        drawn = (1 - share) * y0 + share * y1
    drawn = drawn[np.isfinite(drawn)]
    if len(drawn) < 0.95 * len(y0):
        return None
    return float(np.quantile(drawn, 0.025)), float(np.quantile(drawn, 0.975))


def matched_l0(
    board: Board, keys: Sequence[str] = ("fvu", "delta_ce"), grid: Sequence[float] = MATCHED_L0
) -> list[Matched]:
    """Per (lm, hookpoint, d_sae, architecture) with two SAEs or more: each metric at the grid points in its range."""
    groups: dict[tuple[str, str, int, str], list[BoardSubject]] = {}
    for s in board.saes:
        group = (str(s.fields["lm"]), str(s.fields["hookpoint"]), int(s.fields["d_sae"]), str(s.fields["architecture"]))
        groups.setdefault(group, []).append(s)
    found = []
    for l0 in board.columns_of("l0"):
        for metric in (c for key in keys for c in board.columns_of(key)):
            for (lm, hookpoint, d_sae, architecture), members in sorted(groups.items()):
                points = _points(board, members, l0, metric)
                for at in grid:
                    hit = interpolate(points, at)
                    if hit is not None and hit[0].value is not None:
                        low_high = resampled_interval(board, l0, metric, hit[1], at)
                        low, high = low_high or (hit[0].ci_low, hit[0].ci_high)
                        found.append(
                            Matched(
                                lm=lm,
                                hookpoint=hookpoint,
                                d_sae=d_sae,
                                architecture=architecture,
                                column_id=metric.id,
                                l0=at,
                                value=hit[0].value,
                                ci_low=low,
                                ci_high=high,
                                between=hit[1],
                            )
                        )
    return found


def told_apart(board: Board, a: Cell, b: Cell) -> bool:
    """Does the interval of a - b exclude 0? By draws where they pair, else by whether the two intervals meet.

    A value without an interval (the L0 of topk) is taken as exact: equal values are not apart.
    """
    if a.value == b.value:
        return False
    paired = paired_interval(a, b, board.draws)
    return not overlap(a, b) if paired is None else not paired[0] <= 0 <= paired[1]


def pareto(board: Board, metric: Column) -> dict[str, State]:
    """State of every SAE in (L0, metric), fewer latents and a better metric being good.

    Dominated: some SAE of the same LM and hookpoint is no worse in both, and the interval of the difference in the
    metric or in L0, paired where both were resampled alike, excludes 0; without draws, their two intervals are
    disjoint. Undecided: dominated by the point values, but no difference is shown.
    """
    l0 = board.columns_of("l0")[0]
    sign = -1 if metric.spec.better == "higher" else 1
    states: dict[str, State] = {}
    for a in board.saes:
        x, y = board.cells[a.sae_id, l0.id], board.cells[a.sae_id, metric.id]
        if x.value is None or y.value is None:
            states[a.sae_id] = ""
            continue
        state: State = "front"
        for b in board.saes:
            if b is a or any(a.fields[f] != b.fields[f] for f in ("lm", "hookpoint")):
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
