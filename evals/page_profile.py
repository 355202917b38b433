"""One SAE against the field: where it stands, column by column, among the SAEs of its hookpoint. Torch-free."""

from typing import Any

from markupsafe import Markup

from evals import charts
from evals.board import Board, BoardSubject, Column, overlap
from evals.page_board import same_place


def standing(subject: BoardSubject, others: list[BoardSubject], board: Board, column: Column) -> str:
    """``ahead of 2, level with 1``: level where the 95 % intervals meet or one is unknown; "" for unranked columns."""
    own = board.cells[subject.sae_id, column.id]
    if own.value is None or not column.ranked:
        return ""
    sign = 1 if column.spec.better == "higher" else -1
    counts = {"ahead of": 0, "level with": 0, "behind": 0}
    for other in others:
        cell = board.cells[other.sae_id, column.id]
        if cell.value is None:
            continue
        unknown = None in (own.ci_low, own.ci_high, cell.ci_low, cell.ci_high)
        if overlap(own, cell) or (unknown and own.value != cell.value) or own.value == cell.value:
            counts["level with"] += 1
        else:
            counts["ahead of" if sign * (own.value - cell.value) > 0 else "behind"] += 1
    return ", ".join(f"{name} {n}" for name, n in counts.items() if n)


def field_profile(subject: BoardSubject, board: Board) -> list[dict[str, Any]]:
    """A row per column that has a better side and a value here; empty where no other SAE stands at the same place."""
    peers = [s for s in board.subjects if s.sae_id != subject.sae_id and same_place(s, subject)]
    others = [s for s in peers if not s.is_baseline]
    if not others:
        return []
    rows = []
    for column in board.columns:
        own = board.cells[subject.sae_id, column.id]
        if own.value is None or column.spec.better == "neither":
            continue
        known = [(s, board.cells[s.sae_id, column.id]) for s in peers]
        values = [(s, c.value) for s, c in known if c.value is not None]
        strip: Markup = charts.strip(
            own.value,
            (own.ci_low, own.ci_high),
            [(v, s.short) for s, v in values if not s.is_baseline],
            [(v, s.short) for s, v in values if s.is_baseline],
            f"{column.title}: {subject.short} among {len(values)} others",
        )
        rows.append(
            {
                "title": column.title,
                "better": column.spec.better,
                "hint": column.spec.description,
                "weak": column.weak,
                "cell": own,
                "digits": column.spec.digits,
                "standing": standing(subject, others, board, column),
                "strip": strip,
            }
        )
    return rows
