"""Static pages: leaderboard, a page per SAE and per explained latent. They open from disk, ask no network. Torch-free.

Markup comes from the templates in ``evals/site`` alone, with automatic escaping; every text of a token, an explanation
or a file goes through :func:`evals.page_text.visible` and is written as text.
"""

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evals import charts
from evals.board import Board, BoardSubject, Column, build_board, newest
from evals.gains import Cell
from evals.latent_page import SaeDigest, latent_context
from evals.matched import matched_l0, pareto
from evals.page_board import board_data, filters, provenance_hint
from evals.page_compare import compare_context
from evals.page_data import RunInfo, SaeData, SiteData, run_info
from evals.page_text import config_text, data_block, number, percent, slug, sort_key, visible
from evals.results import draws_below
from evals.sae_page import sae_context
from sae.console import track
from sae.manifest import canonical_json, sha256_text

if TYPE_CHECKING:
    import jinja2
    import pandas as pd

SITE = Path(__file__).with_name("site")
STATIC = ("style.css", "site.js", "latent.js", "board.js", "sae.js", "compare.js")
Write = Callable[..., None]
"""write(path below the site, template, **context)."""
PLOTTED = ("fvu", "delta_ce")


def environment() -> "jinja2.Environment":
    """Templates of ``evals/site``: escaping always on, an unknown name is an error."""
    import jinja2

    env = jinja2.Environment(
        loader=jinja2.FileSystemLoader(SITE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        auto_reload=False,  # no look at the file's date for each of ten thousand pages
    )
    env.filters["num"] = number
    env.filters["pct"] = percent
    env.filters["key"] = sort_key
    env.filters["data"] = data_block
    return env


def build_site(
    root: Path, results: "pd.DataFrame", board: Board | None = None, data: Mapping[str, SaeData] | None = None
) -> Path:
    """Build ``root/site`` anew and put it in place whole. Returns the path of index.html.

    ``board`` as :func:`evals.board.build_board` makes it of ``results``, ``data`` as
    :class:`evals.page_data.SiteData` reads it below ``root``; same artefacts, same bytes.
    """
    root = Path(root)
    info = run_info(root, results)
    data = SiteData(root) if data is None else data
    board = board or build_board(results, draws_below(root))
    target, temporary = root / "site", root / f"site.tmp-{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        write = _writer(temporary, _foot(info))
        digests = _write_saes(write, board, newest(results), data)
        write("index.html", "index.html.j2", **index_context(board, info, digests))
        write("compare.html", "compare.html.j2", **compare_context(root, board, digests, draws_below(root)))
        old = root / f"site.tmp-old-{os.getpid()}"
        if target.exists():
            os.replace(target, old)
        os.replace(temporary, target)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target / "index.html"


def _writer(folder: Path, foot: str) -> Write:
    """Makes the folder with its scripts; the answer renders a template into a page of it."""
    env = environment()
    folder.mkdir(parents=True)
    for name in STATIC:
        shutil.copyfile(SITE / name, folder / name)

    def write(path: str, template: str, **context: Any) -> None:
        file = folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        up = "../" * path.count("/")
        file.write_text(
            env.get_template(template).render(up=up, foot=foot, **context), encoding="utf-8", errors="replace"
        )

    return write


def _write_saes(
    write: Write, board: Board, rows: "pd.DataFrame", data: Mapping[str, SaeData]
) -> dict[str, SaeDigest]:
    """A page per SAE and per explained latent. Each SAE is read once and let go; what is kept of it is returned."""
    digests: dict[str, SaeDigest] = {}
    for nth, subject in enumerate(board.subjects, 1):
        title = f"Pages, SAE {nth} of {len(board.subjects)}"
        # A call of its own: a name left here would keep one SAE alive while the next is read.
        digest = _write_sae(write, subject, board, rows, data, title)
        if subject.sae_id in data:
            digests[subject.sae_id] = digest
    return digests


def _write_sae(
    write: Write, subject: BoardSubject, board: Board, rows: "pd.DataFrame", data: Mapping[str, SaeData], title: str
) -> SaeDigest:
    sae = data[subject.sae_id] if subject.sae_id in data else SaeData(sae_id=subject.sae_id)
    digest, place = SaeDigest.of(sae), slug(subject.sae_id)
    write(f"sae/{place}.html", "sae.html.j2", **sae_context(subject, board, rows, sae))
    for i, latent in enumerate(track(sae.latents, title, unit="pages")):
        beside = {
            "previous": f"{sae.latents[i - 1].latent}.html" if i else "",
            "following": f"{sae.latents[i + 1].latent}.html" if i + 1 < len(sae.latents) else "",
            "subject_short": subject.short,
            "sae_href": f"sae/{place}.html",
        }
        context = latent_context(latent, sae, digest.texts) | beside
        write(f"latent/{place}/{latent.latent}.html", "latent.html.j2", **context)
    return digest


def _foot(info: RunInfo) -> str:
    parts = [f"Commit {', '.join(c[:12] for c in info.commits)}" if info.commits else "", info.command]
    return visible(" · ".join(p for p in parts if p) or "saescope")


# -- index ------------------------------------------------------------------------------------------------------------
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


def _index_row(
    subject: BoardSubject, board: Board, columns: Sequence[Column], spans: Mapping[str, tuple[float, float]]
) -> dict[str, Any]:
    cells = []
    for column in columns:
        cell = board.cells[subject.sae_id, column.id]
        floor = board.cells[subject.random_id, column.id].value if subject.random_id else None
        if column.spec.floor:  # a column with a floor of its own (shuffled explanations) shows that one
            own = [board.cells[subject.sae_id, c.id].value for c in board.columns_of(column.spec.floor)]
            floor = next((v for v in own if v is not None), floor)
        bar = ""
        if cell.value is not None and column.spec.better != "neither":
            bar = charts.interval_bar(cell.value, cell.ci_low, cell.ci_high, floor, spans.get(column.id, (0, 0)))
        hint = (
            cell.reason
            if cell.value is None
            else f"n = {cell.n}" + (f", {cell.n_failed} failed" if cell.n_failed else "")
        )
        if column.judge and cell.value is not None:
            hint += f"; judge {column.judge}" + (f": {column.weak}" if column.weak else "")
        cells.append(
            {
                "cell": cell,
                "digits": column.spec.digits,
                "bar": bar,
                "hint": visible(hint),
                "best": subject.sae_id in board.best(column),
            }
        )
    return {
        "subject": subject,
        "href": f"sae/{slug(subject.sae_id)}.html",
        "cells": cells,
        "place": board.subjects.index(subject),
        "provenance": provenance_hint(subject),
    }


def _series(board: Board) -> dict[str, int]:
    names = sorted({str(s.fields["architecture"]) for s in board.saes})
    return {name: i for i, name in enumerate(names)}


def plot_points(board: Board, metric: Column) -> list[charts.Point]:
    """L0 against a metric: every subject that has both, floors too."""
    l0, series, points = board.columns_of("l0")[0], _series(board), []
    for s in board.subjects:
        x, y = board.cells[s.sae_id, l0.id], board.cells[s.sae_id, metric.id]
        if x.value is None or y.value is None:
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
                x_ci=_pair(x),
                y_ci=_pair(y),
                href=f"sae/{slug(s.sae_id)}.html",
                note=visible(note),
            )
        )
    return points


def _pair(cell: Cell) -> tuple[float, float] | None:
    return None if cell.ci_low is None or cell.ci_high is None else (cell.ci_low, cell.ci_high)


def _plots(board: Board) -> list[dict[str, Any]]:
    plots = []
    for column in (c for key in PLOTTED for c in board.columns_of(key)):
        points = plot_points(board, column)
        if points:
            name = column.title + (f" ({column.spec.unit})" if column.spec.unit else "")
            svg = charts.scatter(
                points, "L0, active latents per token", name, f"L0 against {column.title}, {len(points)} subjects"
            )
            plots.append({"svg": svg, "caption": column.spec.description})
    return plots


def index_context(board: Board, info: RunInfo, digests: Mapping[str, SaeDigest]) -> dict[str, Any]:
    """What index.html.j2 needs."""
    spans = _spans(board)
    rows = {s.sae_id: _index_row(s, board, board.columns, spans) for s in board.subjects}
    shown = [c for c in board.columns if c.spec.better != "neither" and c.spec.against_random]
    gains = [
        (s.short, [(board.gains.get((s.sae_id, c.id)), c.spec.digits) for c in shown])
        for s in board.saes
        if s.random_id
    ]
    states = [(c, pareto(board, c)) for key in PLOTTED for c in board.columns_of(key)] if len(board.saes) > 1 else []
    checks = {(c.judge, c.scorer): c for digest in digests.values() for c in digest.checks}
    where = "; ".join(sorted({f"{s.fields['lm']}, {s.fields['hookpoint']}" for s in board.subjects}))
    explained = [s for s in board.subjects if s.sae_id in digests and digests[s.sae_id].texts]
    return {
        "board": board,
        "board_data": board_data(board) if board.subjects else {},
        "filters": filters(board),
        "lucky": " ".join(f"sae/{slug(s.sae_id)}.html" for s in explained),
        "default_x": board.columns_of("l0")[0].id if board.columns else "",
        "default_y": board.columns_of("fvu")[0].id if board.columns else "",
        "columns": board.columns,
        "where": visible(where) or "no language model yet",
        "sae_rows": [rows[s.sae_id] for s in board.saes],
        "floor_rows": [rows[s.sae_id] for s in board.baselines],
        "has_random": any(s.random_id for s in board.saes),
        "plots": _plots(board),
        "pareto_titles": [c.title for c, _ in states],
        "pareto_rows": [(s.short, [st[s.sae_id] for _, st in states]) for s in board.saes] if states else [],
        "matched": [
            {
                "title": m.column_id,
                "l0": f"{m.l0:g}",
                "architecture": m.architecture,
                "d_sae": m.d_sae,
                "cell": Cell(value=m.value, ci_low=m.ci_low, ci_high=m.ci_high),
            }
            for m in matched_l0(board)
        ],
        "gain_columns": shown,
        "gain_rows": gains,
        "checks": [
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
        ],
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


def site_digest(folder: Path) -> str:
    """SHA-256 over all files of a site, names and contents: two builds of the same artefacts agree."""
    from sae.manifest import sha256_file

    files = sorted(p for p in Path(folder).rglob("*") if p.is_file())
    return sha256_text(canonical_json([[p.relative_to(folder).as_posix(), sha256_file(p)] for p in files]))
