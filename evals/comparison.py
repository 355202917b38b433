"""Is B better than A, at what, and is it real? The logic of ``python -m evals.compare`` (METRICS 3.2, 3.5). Torch-free.

A and B name SAEs of one results folder, or cells: SAEs trained alike but for their seed. Differences are B - A, on
the same units with the same resampling weights where the evaluation allows it. S training seeds, R resamples.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from evals.columns import ColumnSpec
from evals.compare_names import Cell, find_cell
from evals.results import PLACE, current_versions, draws_below, load_results
from evals.seed_noise import LEVEL, SeedSpread, exceeds_seed_noise, over_seeds, p_value, spread_of
from sae.errors import ArtefactError, ConfigError

if TYPE_CHECKING:
    import pandas as pd

    from evals.board import Column
    from evals.compare_units import Measured
    from evals.matched import AtOwnL0

Scope = Literal["", "one training seed", "real", "within seed noise"]


@dataclass(frozen=True, kw_only=True)
class Line:
    """One metric of the comparison."""

    metric: str
    title: str
    better: str
    a: float | None = None
    b: float | None = None
    """Means over the seeds of each cell."""
    sd_a: float | None = None
    sd_b: float | None = None
    """Standard deviation over training seeds; None with one."""
    sd_eval: float | None = None
    """Standard deviation over seeds of the evaluation, of the subject where it is largest; None with one."""
    delta: float | None = None
    """B - A."""
    ci_low: float | None = None
    ci_high: float | None = None
    stderr: float | None = None
    p: float | None = None
    p_holm: float | None = None
    n: int = 0
    """Resampling units, of the member with fewest."""
    method: str = ""
    verdict: str = ""
    scope: Scope = ""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """All lines; Holm's correction is over those that have a better side."""

    a: Cell
    b: Cell
    lines: list[Line]
    notes: list[str]
    equal_l0: "list[AtOwnL0]" = field(default_factory=list)
    """Where the L0 of A and B differ and other SAEs of one of them span the gap."""


def wanted_columns(results: "pd.DataFrame", everything: bool) -> "list[Column]":
    """The headline columns of the board; with ``everything`` all aggregates that have a better side."""
    from evals.board import Column, build_board
    from sae import plugins

    columns = build_board(results).columns
    if not everything:
        return columns
    taken = {(c.spec.eval, c.spec.metric, c.version, c.preset, c.slice) for c in columns}
    rows = results[results["slice"] == ""]
    seen = sorted({(str(e), int(v), str(p)) for e, v, p in rows[["eval", "eval_version", "preset"]].to_numpy()})
    available = set(plugins.names("evals.suite"))
    for evaluation, version, preset in seen:
        declared = plugins.find("evals.suite", evaluation).metrics if evaluation in available else ()
        for m in declared:
            if m.better == "neither" or (evaluation, m.name, version, preset, "") in taken:
                continue
            spec = ColumnSpec(key=f"{evaluation}.{m.name}", title=m.title, eval=evaluation, metric=m.name,
                              better=m.better, description=m.description, unit=m.unit)  # fmt: skip
            columns.append(Column(spec=spec, id=spec.key, version=version, preset=preset, slice="", title=m.title))
    return columns


def compare(root: Path, a_text: str, b_text: str, *, everything: bool = False) -> Comparison:
    """Compare two SAEs or cells under ``root``. ArtefactError without rows; ConfigError for names that fit nothing,
    fit too much, or lie at different places of different models."""
    root = Path(root)
    results = load_results(root)
    if results.empty:
        raise ArtefactError(f"{root} holds no result rows; run: python -m evals.run_all --root {root}")
    a, b = find_cell(root, results, a_text), find_cell(root, results, b_text)
    if set(a.sae_ids) & set(b.sae_ids):
        raise ConfigError(f"A and B share {', '.join(sorted(set(a.sae_ids) & set(b.sae_ids)))}")
    rows = current_versions(results[results["sae_id"].isin([*a.sae_ids, *b.sae_ids])])
    for name in PLACE:
        values = sorted(set(map(str, rows[name])))
        if len(values) > 1:
            raise ConfigError(f"A and B differ in {name} ({', '.join(values)}): their numbers are of different things")
    lines = [_line(root, rows, column, a, b) for column in wanted_columns(rows, everything)]
    lines = judged([line for line in lines if line.verdict != "not run"], len(a.sae_ids), len(b.sae_ids))
    return Comparison(a=a, b=b, lines=lines, notes=_notes(lines, min(len(a.sae_ids), len(b.sae_ids))),
                      equal_l0=_equal_l0(root, results, lines, a, b))  # fmt: skip


def _l0_line(lines: Sequence[Line]) -> Line | None:
    """The line of L0, if both have it and they differ by more than one in a hundred."""
    from evals.matched import SAME_L0

    line = next((x for x in lines if x.metric.split("@")[0] == "l0"), None)
    if line is None or not line.a or not line.b or max(line.a, line.b) <= SAME_L0 * min(line.a, line.b):
        return None
    return line


def _equal_l0(root: Path, results: "pd.DataFrame", lines: Sequence[Line], a: Cell, b: Cell) -> "list[AtOwnL0]":
    from evals.board import build_board
    from evals.matched import at_own_l0

    if _l0_line(lines) is None:
        return []
    return at_own_l0(build_board(results, draws_below(root)), a.sae_ids, b.sae_ids)


def _line(root: Path, rows: "pd.DataFrame", column: "Column", a: Cell, b: Cell) -> Line:
    from evals.board import newest
    from evals.compare_units import difference_between, read_measured

    spec = column.spec
    found = rows[(rows["eval"] == spec.eval) & (rows["metric"] == spec.metric) & (rows["slice"] == column.slice)]
    found = column.of(found)
    chosen = newest(found) if len(found) else found
    base: dict[str, Any] = {"metric": column.id, "title": column.title, "better": "neither" if column.weak
                            else spec.better}  # fmt: skip
    sides: list[list[Measured]] = []
    for cell in (a, b):
        of_cell = chosen[chosen["sae_id"].isin(cell.sae_ids)].sort_values("sae_id")
        sides.append([read_measured(root, row) for _, row in of_cell.iterrows()])
    missing = [c for c, side in zip((a, b), sides, strict=True) if len(side) < len(c.sae_ids)]
    if missing:
        who = " and ".join("A" if c is a else "B" for c in missing)
        told = f"not comparable: not run alike for {who}{_made_otherwise(rows, column, missing[0])}"
        return Line(**base, verdict="not run" if len(missing) == 2 else told)
    members = [*sides[0], *sides[1]]
    wrong = next((w for m in members[1:] if (w := difference_between(members[0], m))), "")
    if wrong:
        return Line(**base, verdict=f"not comparable: {wrong}")
    values = [[m.value for m in side if m.value is not None] for side in sides]
    codes = sorted({m.failure for m in members if m.value is None})
    if codes:
        means = [sum(v) / len(v) if len(v) == len(s) else None for v, s in zip(values, sides, strict=True)]
        return Line(**base, a=means[0], b=means[1], verdict=f"undefined: {', '.join(codes)}")
    return _difference(base, sides, values, _eval_noise(root, found, members), weak=bool(column.weak))


def _made_otherwise(rows: "pd.DataFrame", column: "Column", cell: Cell) -> str:
    """`` (there: version 1, preset quick)``: how the cell's rows of this metric were made instead; "" without any."""
    spec = column.spec
    found = rows[(rows["eval"] == spec.eval) & (rows["metric"] == spec.metric) & rows["sae_id"].isin(cell.sae_ids)]
    if column.task_set and len(found):
        return f" (there: task set {', '.join(sorted(set(found['task_set'])))}; here: {column.task_set})"
    made = sorted({(int(v), str(p)) for v, p in zip(found["eval_version"], found["preset"], strict=True)}
                  - {(column.version, column.preset)})  # fmt: skip
    if not made:
        return ""
    told = "; ".join(f"version {version}, preset {preset}" for version, preset in made)
    return f" (there: {told}; here: version {column.version}, preset {column.preset})"


def _eval_noise(root: Path, found: "pd.DataFrame", members: "Sequence[Measured]") -> float | None:
    """The largest standard deviation of one subject's value over seeds of the evaluation (METRICS 3.4): one row per
    seed, the newest, and only rows made like the one that is compared."""
    from evals.board import newest
    from evals.compare_units import difference_between, read_measured

    spreads = []
    for member in members:
        mine = found[found["sae_id"] == member.sae_id]
        if mine["seed"].nunique() < 2:
            continue
        others = [read_measured(root, newest(part).iloc[0]) for _, part in mine.groupby("seed", sort=True)]
        values = [o.value for o in others if o.value is not None and not difference_between(member, o)]
        spreads.append(spread_of(values).sd)
    return max((sd for sd in spreads if sd is not None), default=None)


def _difference(
    base: Mapping[str, Any], sides: "Sequence[Sequence[Measured]]", values: Sequence[Sequence[float]],
    sd_eval: float | None, *, weak: bool,
) -> Line:
    import numpy as np

    from evals.compare_units import common_draws
    from evals.uncertainty import summarise

    members = [m for side in sides for m in side]
    draws, method = common_draws(members, str(base["metric"]))
    a, b = (spread_of(v) for v in values)
    assert a.value is not None and b.value is not None
    delta, n = b.value - a.value, min(m.n for m in members)
    known: dict[str, Any] = dict(base) | {
        "a": a.value, "b": b.value, "sd_a": a.sd, "sd_b": b.sd, "sd_eval": sd_eval, "delta": delta, "n": n,
        "method": method,
    }  # fmt: skip
    verdict = "weak judge: not ranked" if weak else ""
    why = "" if base["better"] == "neither" else "undecided: no "
    gap = {name: why and why + name for name in ("error estimate", "interval")}
    if draws is None:
        return Line(**known, verdict=verdict or gap["error estimate"])
    cut = len(sides[0])
    delta_R = over_seeds(draws[cut:], str(base["metric"]), "b") - over_seeds(draws[:cut], str(base["metric"]), "a")
    estimate = summarise(delta, delta_R, n)
    if estimate.ci_low is None or estimate.ci_high is None:
        equal = bool((delta_R == 0).all())
        return Line(**known, verdict=verdict or ("no difference shown" if equal else gap["interval"]))
    p = p_value(delta_R[np.isfinite(delta_R)], estimate, n)
    return Line(**known, ci_low=estimate.ci_low, ci_high=estimate.ci_high, stderr=estimate.stderr, p=p,
                verdict=verdict)  # fmt: skip


def beyond_seed_noise(line: Line, n_a: int, n_b: int) -> bool:
    """Does the difference exceed what training seeds alone make (:func:`evals.seed_noise.exceeds_seed_noise`)?"""
    if line.sd_a is None or line.sd_b is None or line.delta is None:
        return False
    return exceeds_seed_noise(line.delta, [SeedSpread(line.sd_a, n_a), SeedSpread(line.sd_b, n_b)])


def judged(lines: Sequence[Line], n_a: int, n_b: int) -> list[Line]:
    """Holm-corrected p, verdicts and their scope; metrics without a better side get none. ``n_a``, ``n_b``: seeds."""
    from evals.uncertainty import holm

    adjusted = holm([line.p if line.better != "neither" else None for line in lines])
    found = []
    for line, p_holm in zip(lines, adjusted, strict=True):
        if p_holm is None or line.delta is None or line.ci_low is None or line.ci_high is None:
            found.append(line)
            continue
        if p_holm >= LEVEL or line.ci_low <= 0 <= line.ci_high:
            found.append(replace(line, p_holm=p_holm, verdict="no difference shown"))
            continue
        scope: Scope = "one training seed"
        if min(n_a, n_b) > 1:
            scope = "real" if beyond_seed_noise(line, n_a, n_b) else "within seed noise"
        winner = "B" if (line.delta > 0) == (line.better == "higher") else "A"
        found.append(replace(line, p_holm=p_holm, verdict=f"{winner} better", scope=scope))
    return found


def _notes(lines: Sequence[Line], fewest_seeds: int) -> list[str]:
    """What a reader must know beside the table."""
    notes = []
    if fewest_seeds == 1:
        notes.append(
            "One training seed on a side: a verdict holds for these two SAEs, not for their recipes. Train more seeds "
            "(python -m sae train --grid seed=0,1,2) and name them together to learn about the recipes."
        )
    l0 = _l0_line(lines)
    if l0 is not None:
        notes.append(
            f"L0 differs ({l0.a:.1f} against {l0.b:.1f}): more active latents lower FVU, ΔCE and KL by themselves; "
            "see the section at equal L0 of the leaderboard."
        )
    shown = [x for x in lines if x.verdict.endswith(" better") and x.sd_eval]
    small = [x.title for x in shown if abs(x.delta or 0.0) < 2 * math.sqrt(2) * (x.sd_eval or 0.0)]
    if small:
        notes.append(
            f"Smaller than twice the reseed noise of the evaluation itself: {', '.join(small)}. Another sample of its "
            "documents, prompts or positions may turn the verdict; run more --eval-seeds."
        )
    return notes
