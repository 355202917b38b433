"""What the leaderboard page shows: rows by recipe, interval bars, plots, gains, checks, the run. Torch-free."""

from collections.abc import Mapping, Sequence
from typing import Any

from evals import charts
from evals.board import Board, Column
from evals.gains import Cell
from evals.latent_page import SaeDigest
from evals.matched import matched_l0, pareto
from evals.page_board import board_data, filters, provenance_hint
from evals.page_data import RunInfo
from evals.page_recipes import Recipe, counted, find_recipes, gain_cells, recipe_data, spread
from evals.page_text import config_text, number, slug, visible

PLOTTED = ("fvu", "delta_ce")
MANY = 60
"""SAEs up to which the page lists every single difference to the random SAE."""


def _spans(board: Board) -> dict[str, tuple[float, float]]:
    """Per column the range of the little interval plots: all SAEs and their random SAEs, with a margin."""
    wanted = {s.sae_id for s in board.saes} | {s.random_id for s in board.saes if s.random_id}
    spans = {}
    for column in board.columns:
        known = [board.cells[i, column.id] for i in sorted(wanted)]
        values = [v for c in known for v in (c.value, c.ci_low, c.ci_high) if v is not None]
        if values:
            pad = 0.04 * (max(values) - min(values))
            spans[column.id] = (min(values) - pad, max(values) + pad)
    return spans


def _bars(board: Board) -> list[dict[str, Any] | None]:
    """Per column what board.js draws its little interval plots on: the range, and the column that is its own floor."""
    spans, ids = _spans(board), [c.id for c in board.columns]
    found: list[dict[str, Any] | None] = []
    for column in board.columns:
        low, high = spans.get(column.id, (0.0, 0.0))
        own = [ids.index(c.id) for c in board.columns_of(column.spec.floor)] if column.spec.floor else []
        drawn = high > low and column.spec.better != "neither"
        found.append({"low": float(f"{low:.6g}"), "high": float(f"{high:.6g}"), "own": own} if drawn else None)
    return found


def _hint(cell: Cell, column: Column) -> str:
    if cell.value is None:
        return visible(cell.reason)
    hint = f"n = {cell.n}" + (f", {cell.n_failed} failed" if cell.n_failed else "")
    if column.judge:
        hint += f"; judge {column.judge}" + (f": {column.weak}" if column.weak else "")
    return visible(hint)


def _usual(board: Board) -> dict[str, str]:
    """Per column the hint that most cells with a value share: its head says it once."""
    found = {}
    for column in board.columns:
        cells = [board.cells[s.sae_id, column.id] for s in board.subjects]
        hints = [_hint(c, column) for c in cells if c.value is not None]
        found[column.id] = max(sorted(set(hints)), key=hints.count) if hints else ""
    return found


def _rows(board: Board, usual: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """A row of the table per subject."""
    best = {c.id: board.best(c) for c in board.columns}
    rows = {}
    for place, subject in enumerate(board.subjects):
        cells = []
        for column in board.columns:
            cell = board.cells[subject.sae_id, column.id]
            hint = _hint(cell, column)
            cells.append({
                "cell": cell,
                "digits": column.spec.digits,
                "hint": hint if hint != usual[column.id] else "",
                "best": subject.sae_id in best[column.id],
            })  # fmt: skip
        rows[subject.sae_id] = {
            "subject": subject,
            "href": f"sae/{slug(subject.sae_id)}.html",
            "cells": cells,
            "place": place,
            "provenance": provenance_hint(subject),
        }
    return rows


def _recipe_row(recipe: Recipe, board: Board, rows: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """The line above the seeds of a recipe: means, deviations and ranges over them."""
    cells = [
        {
            "spread": spread(board, recipe.members, column),
            "digits": column.spec.digits,
            "best": any(rows[s.sae_id]["cells"][i]["best"] for s in recipe.members),
        }
        for i, column in enumerate(board.columns)
    ]
    return {
        "title": recipe.title,
        "seeds": len(recipe.members),
        "fields": recipe.members[0].fields,
        "cells": cells,
        "n_failed": sum(s.n_failed for s in recipe.members),
    }


def _groups(board: Board, recipes: Sequence[Recipe], rows: Mapping[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """The bodies of the table in the order of the board: a recipe with its seeds, or the SAEs that stand alone.

    Without recipes all SAEs are one body; with recipes a single SAE is one by itself, so that bodies can be sorted.
    """
    if not recipes:
        return [{"head": None, "rows": [rows[s.sae_id] for s in board.saes]}] if board.saes else []
    of = {s.sae_id: r for r in recipes for s in r.members}
    groups: list[dict[str, Any]] = []
    done: set[str] = set()
    for subject in board.saes:
        recipe = of.get(subject.sae_id)
        if recipe is None:
            groups.append({"head": None, "rows": [rows[subject.sae_id]]})
        elif recipe.title not in done:
            done.add(recipe.title)
            members = [rows[s.sae_id] for s in recipe.members]
            groups.append({"head": _recipe_row(recipe, board, rows), "rows": members})
    return groups


def _series(board: Board) -> dict[str, int]:
    names = sorted({str(s.fields["architecture"]) for s in board.saes})
    return {name: i for i, name in enumerate(names)}


def plot_points(board: Board, metric: Column, recipes: Sequence[Recipe] = ()) -> list[charts.Point]:
    """L0 against a metric: every subject that has both, floors too; of a recipe the mean, its bars the range."""
    l0, series, points = board.columns_of("l0")[0], _series(board), []
    inside = {s.sae_id for r in recipes for s in r.members}
    for s in board.subjects:
        x, y = board.cells[s.sae_id, l0.id], board.cells[s.sae_id, metric.id]
        if x.value is None or y.value is None or s.sae_id in inside:
            continue
        note = f"{s.short}: L0 {number(x.value, 1)}, {metric.title} {number(y.value)}"
        if y.ci_low is not None and y.ci_high is not None:
            note += f" [{number(y.ci_low)}, {number(y.ci_high)}]"
        label = s.sae_id.split(".")[1] if s.is_baseline and "." in s.sae_id else str(s.fields["architecture"])
        points.append(
            charts.Point(
                label=visible(label),
                series=-1 if s.is_baseline else series[str(s.fields["architecture"])],
                x=x.value,
                y=y.value,
                x_ci=_pair(x.ci_low, x.ci_high),
                y_ci=_pair(y.ci_low, y.ci_high),
                href=f"sae/{slug(s.sae_id)}.html",
                note=visible(note),
            )
        )
    for recipe in recipes:
        mean_x, mean_y = (spread(board, recipe.members, c) for c in (l0, metric))
        if mean_x.value is None or mean_y.value is None:
            continue
        note = f"{recipe.title}, mean of {len(recipe.members)} seeds: L0 {number(mean_x.value, 1)}, {metric.title} "
        note += f"{number(mean_y.value)} ({number(mean_y.low)} to {number(mean_y.high)})"
        points.append(
            charts.Point(
                label=recipe.title.partition(",")[0],
                series=series[str(recipe.members[0].fields["architecture"])],
                x=mean_x.value,
                y=mean_y.value,
                x_ci=_pair(mean_x.low, mean_x.high),
                y_ci=_pair(mean_y.low, mean_y.high),
                note=visible(note),
            )
        )
    return points


def _pair(low: float | None, high: float | None) -> tuple[float, float] | None:
    return None if low is None or high is None else (low, high)


def _plots(board: Board, recipes: Sequence[Recipe]) -> list[dict[str, Any]]:
    plots = []
    for column in (c for key in PLOTTED for c in board.columns_of(key)):
        points = plot_points(board, column, recipes)
        if points:
            name = column.title + (f" ({column.spec.unit})" if column.spec.unit else "")
            svg = charts.scatter(
                points, "L0, active latents per token", name, f"L0 against {column.title}, {len(points)} marks"
            )
            plots.append({"svg": svg, "caption": column.spec.description})
    return plots


def _pareto_context(board: Board, recipes: Sequence[Recipe]) -> dict[str, Any]:
    states = [(c, pareto(board, c)) for key in PLOTTED for c in board.columns_of(key)] if len(board.saes) > 1 else []
    inside = {s.sae_id for r in recipes for s in r.members}
    rows = [(r.title, [counted([st[s.sae_id] for s in r.members]) for _, st in states]) for r in recipes]
    rows += [(s.short, [st[s.sae_id] for _, st in states]) for s in board.saes if s.sae_id not in inside]
    titles = {c.id: c.title for c in board.columns}
    return {
        "pareto_titles": [c.title for c, _ in states],
        "pareto_rows": rows if states else [],
        "matched": [
            {
                "title": titles.get(m.column_id, m.column_id),
                "l0": f"{m.l0:g}",
                "architecture": m.architecture,
                "d_sae": m.d_sae,
                "cell": Cell(value=m.value, ci_low=m.ci_low, ci_high=m.ci_high),
            }
            for m in matched_l0(board)
        ],
    }


def _gain_context(board: Board, recipes: Sequence[Recipe]) -> dict[str, Any]:
    """Differences to the random SAE: columns in which somebody has one; recipes first, then SAE by SAE."""
    shown = [
        c
        for c in board.columns
        if c.spec.better != "neither" and c.spec.against_random
        if any((s.sae_id, c.id) in board.gains for s in board.saes)
    ]
    listed = board.saes if len(board.saes) <= MANY else []
    rows = [
        (s.short, [(board.gains.get((s.sae_id, c.id)), c.spec.digits) for c in shown]) for s in listed if s.random_id
    ]
    of_recipes = [(r.title, gain_cells(board, r, shown)) for r in recipes if any(s.random_id for s in r.members)]
    return {"gain_columns": shown, "gain_rows": rows, "gain_recipes": of_recipes, "gain_many": not listed}


def _checks(digests: Mapping[str, SaeDigest]) -> list[dict[str, Any]]:
    checks = {(c.judge, c.scorer): c for digest in digests.values() for c in digest.checks}
    return [
        {
            "judge": visible(c.judge),
            "scorer": c.scorer,
            "wrong_auc": c.wrong_auc,
            "n": c.n,
            "n_failed": c.n_failed,
            "weak": c.weak,
            "cell": Cell(value=c.auc, ci_low=c.ci_low, ci_high=c.ci_high, reason="the check gave no AUC"),
        }
        for _, c in sorted(checks.items())
    ]


def _data(board: Board, recipes: Sequence[Recipe], usual: Mapping[str, str]) -> dict[str, Any]:
    """What board.js draws beside the table that is there."""
    data = board_data(board) | {"recipes": recipe_data(board, recipes), "bars": _bars(board)}
    for column in data["columns"]:
        column["usual"] = usual[column["id"]]
    return data


def index_context(board: Board, info: RunInfo, digests: Mapping[str, SaeDigest]) -> dict[str, Any]:
    """What index.html.j2 needs."""
    recipes = find_recipes(board, {i: d.train for i, d in digests.items()}) if board.subjects else []
    usual = _usual(board)
    rows = _rows(board, usual)
    where = "; ".join(sorted({f"{s.fields['lm']}, {s.fields['hookpoint']}" for s in board.subjects}))
    explained = [s for s in board.subjects if s.sae_id in digests and digests[s.sae_id].texts]
    empty = {c.id for c in board.columns if all(board.cells[s.sae_id, c.id].value is None for s in board.saes)}
    floors = {c.spec.floor for c in board.columns if c.spec.floor}  # drawn as ticks beside the columns they belong to
    return {
        "board": board,
        "board_data": _data(board, recipes, usual) if board.subjects else {},
        "usual": usual,
        "filters": filters(board),
        "lucky": " ".join(f"sae/{slug(s.sae_id)}.html" for s in explained),
        "default_x": board.columns_of("l0")[0].id if board.columns else "",
        "default_y": board.columns_of("fvu")[0].id if board.columns else "",
        "columns": board.columns,
        "off": empty
        | {c.id for c in board.columns if c.spec.key in floors}
        | ({"architecture", "d_sae", "k"} if recipes else set()),  # a recipe's title says what of these matters
        "where": visible(where) or "no language model yet",
        "groups": _groups(board, recipes, rows),
        "n_recipes": len(recipes),
        "key": charts.key(list(_series(board)), bool(board.baselines)),
        "floor_rows": [rows[s.sae_id] for s in board.baselines],
        "has_random": any(s.random_id for s in board.saes),
        "plots": _plots(board, recipes),
        "checks": _checks(digests),
        **_pareto_context(board, recipes),
        **_gain_context(board, recipes),
        **_run_context(info),
    }


def _minutes(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 100 else f"{seconds / 60:.1f} min"


def _run_context(info: RunInfo) -> dict[str, Any]:
    longest = max((s.seconds for s in info.stages), default=0.0)
    machine = ", ".join(
        [str(info.machine[k]) for k in ("cpu",) if info.machine.get(k)]
        + [f"{info.machine[k]} {unit}" for k, unit in (("cores", "cores"), ("memory_gb", "GB")) if info.machine.get(k)]
    )
    facts = [
        ("Command", visible(info.command)),
        ("Commit", ", ".join(info.commits)),
        ("Preset", ", ".join(info.presets)),
        ("Whole run", _minutes(float(info.seconds)) if info.seconds is not None else ""),
        ("Peak memory", f"{info.peak_gb:.1f} GB" if info.peak_gb else ""),
        ("Machine", visible(machine)),
        *((name, value) for name, value in info.versions.items()),
    ]
    return {
        "run_facts": facts,
        "failures": [visible(f) for f in info.failures],
        "config_text": config_text(info.config),
        "stages": [
            {
                "stage": s,
                "time": _minutes(s.seconds),
                "share": round(s.seconds / longest, 3) if longest else 0,
                "note": visible(s.note) + (f" (made earlier in {_minutes(s.work_seconds)})" if s.skipped else ""),
            }
            for s in info.stages
        ],
    }
