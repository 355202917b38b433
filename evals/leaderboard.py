"""Tables from the rows, and the door ``python -m evals.leaderboard``. Torch-free.

``leaderboard.csv`` and ``.parquet`` hold one line per subject: per column the value, ``_ci_low``, ``_ci_high``, ``_n``,
``_n_failed``, ``_missing`` (why there is no value) and, for SAEs, ``_vs_random`` with its interval; then provenance.
``leaderboard.md`` is the same for people. All are rebuilt from the rows each time and replaced whole.
"""

import argparse
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evals.board import PROVENANCE, SUBJECT_FIELDS, Board, BoardSubject, Column, build_board
from evals.columns import HEADLINE
from evals.gains import NOT_RUN, Cell, Gain
from evals.matched import matched_l0, pareto
from evals.page_data import RunInfo, run_info
from evals.page_text import number
from evals.results import draws_below, load_results
from sae import console, exits
from sae.errors import ArtefactError

if TYPE_CHECKING:
    import pandas as pd

DOMINANCE = ("fvu", "delta_ce")


def cell_text(cell: Cell, digits: int = 3) -> str:
    """``0.237 [0.231, 0.243]``; ``gate failed`` for an undefined number, ``–`` for none."""
    if cell.value is None:
        return cell.gap
    if cell.ci_low is None or cell.ci_high is None:
        return number(cell.value, digits)
    return f"{number(cell.value, digits)} [{number(cell.ci_low, digits)}, {number(cell.ci_high, digits)}]"


def gain_text(gain: Gain | None, digits: int = 3) -> str:
    """``-0.312 [-0.330, -0.294] better``."""
    if gain is None:
        return "–"
    text = cell_text(Cell(value=gain.value, ci_low=gain.ci_low, ci_high=gain.ci_high), digits)
    return f"{text} {gain.verdict}".strip()


def wide_table(board: Board) -> "pd.DataFrame":
    """One line per subject, SAEs first; column names as the module says."""
    import pandas as pd

    lines = []
    for subject in board.subjects:
        line: dict[str, Any] = dict(subject.fields)
        for column in board.columns:
            cell, gain = board.cells[subject.sae_id, column.id], board.gains.get((subject.sae_id, column.id))
            line |= {
                column.id: cell.value,
                f"{column.id}_ci_low": cell.ci_low,
                f"{column.id}_ci_high": cell.ci_high,
                f"{column.id}_n": cell.n if cell.value is not None else None,
                f"{column.id}_n_failed": cell.n_failed,
                f"{column.id}_missing": cell.reason or None,
                f"{column.id}_vs_random": gain.value if gain else None,
                f"{column.id}_vs_random_ci_low": gain.ci_low if gain else None,
                f"{column.id}_vs_random_ci_high": gain.ci_high if gain else None,
            }
        line |= {"n_rows": subject.n_rows, "n_failed": subject.n_failed, "random_sae": subject.random_id}
        lines.append(line | subject.provenance)
    names = list(lines[0]) if lines else [*SUBJECT_FIELDS, "n_rows", "n_failed", *PROVENANCE]
    frame = pd.DataFrame(lines, columns=names)
    whole = ["d_in", "d_sae", "k", "train_tokens", *(f"{c.id}_n" for c in board.columns)]
    texts = ["random_sae", *(f"{c.id}_missing" for c in board.columns)]
    kinds = {n: "Int64" for n in whole if n in frame} | {n: "string" for n in texts if n in frame}
    floats = {
        n: "float64"
        for c in board.columns
        for n in frame
        if n.startswith(c.id) and n not in kinds and not n.endswith("_n_failed")
    }
    return frame.astype(floats | kinds)


def _markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(c.replace("|", "\\|").replace("\n", " ") for c in cells) + " |"

    return [line(header), line(["---"] * len(header)), *map(line, rows), ""]


def _arrow(column: Column) -> str:
    return {"higher": " ↑", "lower": " ↓", "neither": ""}[column.spec.better]


def _name(subject: BoardSubject) -> str:
    return f"{subject.short}" + (" (floor)" if subject.is_baseline else "")


def _matched_section(board: Board) -> list[str]:
    matched = matched_l0(board)
    if not matched:
        return []
    rows = (
        [m.column_id, f"{m.l0:g}", m.architecture, str(m.d_sae),
         cell_text(Cell(value=m.value, ci_low=m.ci_low, ci_high=m.ci_high))]
        for m in matched
    )  # fmt: skip
    lines = ["## At equal L0", "", "Interpolated in ln L0 between two SAEs of one architecture.", ""]
    return lines + _markdown_table(["metric", "L0", "architecture", "d_sae", "value"], rows)


def _asked_for(board: Board) -> list[Column]:
    """Columns with a number, or a reason why there is none, for somebody: the others only widen the table."""
    return [c for c in board.columns if any(cell_text(board.cells[s.sae_id, c.id]) != "–" for s in board.subjects)]


def markdown(board: Board, info: RunInfo) -> str:
    """The leaderboard for people: values, gains over the random SAE, matched L0, where the minutes went."""
    out = ["# Leaderboard", ""]
    if not board.subjects:
        return "\n".join([*out, "No rows yet: run `python -m evals.run_all`.", ""])
    lms = sorted({f"{s.fields['lm']} at `{s.fields['hookpoint']}`" for s in board.subjects})
    out += [f"Subject: {'; '.join(lms)}.", ""]
    for name, value in (
        ("Command", info.command),
        ("Commit", ", ".join(info.commits)),
        ("Preset", ", ".join(info.presets)),
    ):
        if value:
            out.append(f"- {name}: `{value}`")
    out += ["", "Values with 95 % intervals; ↓ lower is better, ↑ higher is better; – = not measured.",
            "Words stand where a number was asked for and is undefined.", ""]
    facts = ["name", "architecture", "d_sae", "k"]
    columns = _asked_for(board)
    rows = []
    for s in board.subjects:
        known = [str(s.fields[f]) if s.fields[f] is not None else "" for f in facts[1:]]
        cells = [cell_text(board.cells[s.sae_id, c.id], c.spec.digits) for c in columns]
        rows.append([_name(s), *known, *cells, str(s.n_failed)])
    titles = [c.title + _arrow(c) + (" (weak judge)" if c.weak else "") for c in columns]
    out += _markdown_table([*facts, *titles, "failed items"], rows)
    if board.gains:
        out += ["## Difference to the random SAE", "", "Value minus that of a random SAE of the same width and L0.", ""]
        shown = [c for c in columns if c.spec.better != "neither" and c.spec.against_random]
        out += _markdown_table(
            ["name", *(c.title + _arrow(c) for c in shown)],
            (
                [_name(s), *(gain_text(board.gains.get((s.sae_id, c.id)), c.spec.digits) for c in shown)]
                for s in board.saes
            ),
        )
    out += _matched_section(board)
    states = [(c, pareto(board, c)) for key in DOMINANCE for c in board.columns_of(key)]
    if len(board.saes) > 1:
        out += ["## Pareto state in (L0, metric)", ""]
        out += _markdown_table(
            ["name", *(c.title for c, _ in states)],
            ([_name(s), *(st[s.sae_id] or "–" for _, st in states)] for s in board.saes),
        )
    out += ["## What the columns are", ""]
    keys = {c.spec.key for c in columns}
    out += [f"- **{spec.title}**: {spec.description}" for spec in HEADLINE if spec.key in keys]
    if info.stages:
        out += ["", "## Where the minutes went", ""]
        out += _markdown_table(
            ["stage", "seconds", ""], ([s.name, f"{s.seconds:.1f}", "reused" if s.skipped else ""] for s in info.stages)
        )
    return "\n".join(out).rstrip() + "\n"


def _replace(path: Path, content: bytes) -> None:
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    temporary.write_bytes(content)
    os.replace(temporary, path)


def write_tables(root: Path, board: Board, info: RunInfo) -> list[Path]:
    """Write leaderboard.csv, .md and .parquet below ``root``; each is replaced whole. Returns their paths."""
    import io

    root = Path(root)
    table = wide_table(board)
    buffer = io.BytesIO()
    table.to_parquet(buffer, index=False)
    contents = {
        "leaderboard.csv": table.to_csv(index=False, lineterminator="\n").encode(),
        "leaderboard.md": markdown(board, info).encode(),
        "leaderboard.parquet": buffer.getvalue(),
    }
    for name, content in contents.items():
        _replace(root / name, content)
    return [root / name for name in contents]


def print_board(root: Path) -> None:
    """The board in the terminal: one line per metric, one column per SAE, then the floors."""
    board = build_board(load_results(root), draws_below(root))
    if not board.subjects:
        console.say(f"no rows under {root}; run: python -m evals.run_all --root {root}")
        return
    columns = [c for c in board.columns if any(board.cells[s.sae_id, c.id] != NOT_RUN for s in board.subjects)]
    groups = [("SAEs", board.saes), ("floors and ceilings", board.baselines)]
    for title, subjects in groups:
        for start in range(0, len(subjects), 4):
            part = subjects[start : start + 4]
            rows = []
            for column in columns:
                cells = [cell_text(board.cells[s.sae_id, column.id], column.spec.digits) for s in part]
                if all(c == "–" for c in cells):
                    continue
                best = board.best(column)
                marked = [c + (" *" if s.sae_id in best else "") for c, s in zip(cells, part, strict=True)]
                rows.append([column.title + _arrow(column) + (" (weak judge)" if column.weak else ""), *marked])
            if title == "SAEs":
                rows += _gain_rows(board, part)
            if rows:
                console.table(title, ["metric", *(s.short for s in part)], rows, right=range(1, len(part) + 1))
    console.say("value [95 % interval]; * best, or not told apart from the best; – not measured, words: undefined")


def _gain_rows(board: Board, subjects: Sequence[BoardSubject]) -> list[list[str]]:
    rows = []
    for column in board.columns:
        gains = [board.gains.get((s.sae_id, column.id)) for s in subjects]
        if column.spec.better != "neither" and any(g is not None for g in gains):
            rows.append([f"{column.title} − random SAE", *(gain_text(g, column.spec.digits) for g in gains)])
    return rows


def build(root: Path, *, site: bool = True) -> list[Path]:
    """Tables, and pages if asked, from whatever lies complete under ``root``. Returns what was written.

    Raises ArtefactError when ``root`` does not exist or holds no rows.
    """
    root = Path(root)
    if not root.is_dir():
        raise ArtefactError(f"there is no folder {root}; run: python -m evals.run_all --root {root}")
    results = load_results(root)
    if results.empty:
        raise ArtefactError(f"{root} holds no result rows; run: python -m evals.run_all --root {root}")
    board = build_board(results, draws_below(root))
    written = write_tables(root, board, run_info(root, results))
    if site:
        from evals.pages import build_site

        written.append(build_site(root, results, board))
    return written


def main(arguments: Sequence[str] | None = None) -> int:
    """Door of ``python -m evals.leaderboard``; its exit status: :mod:`sae.exits`."""
    parser = argparse.ArgumentParser("python -m evals.leaderboard", description="Tables and pages from result rows.")
    parser.add_argument("--root", type=Path, default=Path("results"), help="folder of artefacts (default: results)")
    parser.add_argument(
        "--site", action=argparse.BooleanOptionalAction, default=True, help="also build the static pages"
    )
    options = parser.parse_args(arguments)
    console.setup()
    return exits.run(lambda: _run(options), kept="")


def _run(options: argparse.Namespace) -> int:
    written = build(options.root, site=options.site)
    print_board(options.root)
    for path in written:
        console.say(str(path))
    return exits.DONE


if __name__ == "__main__":
    sys.exit(main())
