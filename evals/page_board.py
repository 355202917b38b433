"""The board as data for board.js and compare.js, and the filters of the leaderboard. Torch-free."""

import math
from collections.abc import Sequence
from typing import Any

from evals.board import Board, BoardSubject
from evals.gains import Z95, Cell, Draws, paired_interval
from evals.page_text import slug, visible

FACTS = (("d_sae", "Latents"), ("k", "k"), ("train_tokens", "Training tokens"))
"""Numbers of an SAE that may be an axis, beside the columns."""
FILTERS = (("lm", "Model"), ("hookpoint", "Hookpoint"), ("architecture", "Architecture"), ("d_sae", "Width"))


def _short(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.6g}")


def cell_list(cell: Cell) -> list[Any]:
    """[value, low, high] with six significant digits, or [reason] for a gap."""
    if cell.value is None:
        return [visible(cell.reason)]
    return [_short(cell.value), _short(cell.ci_low), _short(cell.ci_high)]


def filters(board: Board) -> list[dict[str, Any]]:
    """The choices of the leaderboard: name, title, and what the SAEs (not the floors) have, in order."""
    found = []
    for name, title in FILTERS:
        values = {s.fields[name] for s in board.saes if s.fields[name] is not None}
        ordered = sorted(values, key=lambda v: (isinstance(v, str), v))
        found.append({"name": name, "title": title, "options": [visible(str(v)) for v in ordered]})
    return found


def _subject(subject: BoardSubject, board: Board, places: dict[str, int]) -> dict[str, Any]:
    fields = {name: subject.fields[name] for name, _ in (*FILTERS, *FACTS)}
    l0 = board.cells[subject.sae_id, board.columns_of("l0")[0].id].value
    return {
        "id": visible(subject.sae_id),
        "short": visible(subject.short),
        "href": f"sae/{slug(subject.sae_id)}.html",
        "floor": int(subject.is_baseline),
        "random": places.get(subject.random_id or "", -1),
        "l0": _short(l0),
        "cells": [cell_list(board.cells[subject.sae_id, c.id]) for c in board.columns],
        **{n: visible(v) if isinstance(v, str) else v for n, v in fields.items()},
    }


def board_data(board: Board) -> dict[str, Any]:
    """Columns, subjects in the order of the board, and the facts that may be axes."""
    places = {s.sae_id: i for i, s in enumerate(board.subjects)}
    return {
        "columns": [
            {
                "id": c.id,
                "title": visible(c.title),
                "unit": c.spec.unit,
                "better": c.spec.better,
                "weak": visible(c.weak),
                "digits": c.spec.digits,
                "what": c.spec.description,
            }
            for c in board.columns
        ],
        "facts": [{"id": name, "title": title} for name, title in FACTS],
        "subjects": [_subject(s, board, places) for s in board.subjects],
    }


def difference(a: Cell, b: Cell, draws: Draws | None) -> list[Any] | None:
    """a - b as [value, low, high, paired]; the interval is paired where draws were kept on the same units, else both
    standard errors are added as if independent; None where a value is missing."""
    if a.value is None or b.value is None:
        return None
    value = a.value - b.value
    if (paired := paired_interval(a, b, draws)) is not None:
        return [_short(value), _short(paired[0]), _short(paired[1]), 1]
    if a.stderr is None or b.stderr is None:
        return [_short(value), None, None, 0]
    half = Z95 * math.hypot(a.stderr, b.stderr)
    return [_short(value), _short(value - half), _short(value + half), 0]


def pair_differences(board: Board, draws: Draws | None, i: int) -> dict[str, list[list[Any] | None]]:
    """``"i-j"`` (i < j, places on the board) -> differences i - j by column, within one LM and hookpoint."""
    a = board.subjects[i]
    return {
        f"{i}-{j}": [
            difference(board.cells[a.sae_id, c.id], board.cells[b.sae_id, c.id], draws) for c in board.columns
        ]
        for j, b in enumerate(board.subjects[i + 1 :], start=i + 1)
        if same_place(a, b)
    }


def same_place(a: BoardSubject, b: BoardSubject) -> bool:
    """Do two subjects stand at one hookpoint of one LM? Only then do differences mean something."""
    return all(a.fields[f] == b.fields[f] for f in ("lm", "hookpoint"))


def provenance_hint(subject: BoardSubject) -> str:
    """Versions and provenance in a line, for a row's title."""
    wanted: Sequence[str] = ("code_sha", "preset", "seed", "saescope", "torch", "device", "dtype", "eval_version")
    parts = [f"{n}: {subject.provenance[n]}" for n in wanted if subject.provenance.get(n)]
    return visible("; ".join([subject.sae_id, *parts]))
