"""A comparison as table and plot: terminal, Markdown, JSON, and one SVG file. Torch-free."""

import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from markupsafe import escape

from evals.compare_names import Cell
from evals.comparison import Comparison, Line
from evals.matched import AtOwnL0
from evals.page_text import number
from sae import console
from sae.manifest import canonical_json

HEADER = ("metric", "A", "B", "B − A", "p (Holm)", "reseed sd", "units", "verdict", "scope")
EQUAL_HEADER = ("metric", "L0", "A", "B", "B − A", "p (Holm)", "interpolated", "verdict", "scope")
ARROW = {"higher": " ↑", "lower": " ↓"}
LEFT, RAIL, RIGHT, ROW, LETTER = 150, 360, 250, 24, 7
"""Pixels; a letter of the labels is at most so wide on average."""
LIMIT = 8.0
"""Standard errors at which the axis of the plot ends; what lies beyond is drawn at its end."""
STYLE = (
    "text{font:12px sans-serif;fill:#222}.rail{stroke:#ccc}.zero{stroke:#555;stroke-dasharray:3 3}"
    ".ci{stroke:#555;stroke-width:2}.dot{fill:#888}.win{fill:#1565c0}.lose{fill:#c62828}"
)


def value_text(value: float | None) -> str:
    return "–" if value is None else number(value, 3)


def _with_sd(value: float | None, sd: float | None) -> str:
    return value_text(value) + ("" if sd is None else f" ± {value_text(sd)}")


def delta_text(line: "Line | AtOwnL0") -> str:
    """``-0.054 [-0.060, -0.048]``."""
    if line.delta is None:
        return "–"
    if line.ci_low is None:
        return value_text(line.delta)
    return f"{value_text(line.delta)} [{value_text(line.ci_low)}, {value_text(line.ci_high)}]"


def _p_text(line: "Line | AtOwnL0") -> str:
    return "" if line.p_holm is None else f"{line.p_holm:.3f}" if line.p_holm >= 0.001 else "< 0.001"


def table_rows(found: Comparison) -> list[list[str]]:
    """Cells of the table, in the order of HEADER."""
    return [
        [
            line.title + ARROW.get(line.better, ""), _with_sd(line.a, line.sd_a), _with_sd(line.b, line.sd_b),
            delta_text(line), _p_text(line), "" if line.sd_eval is None else value_text(line.sd_eval),
            f"{line.n} {line.method}".strip() if line.n else "", line.verdict, line.scope,
        ]
        for line in found.lines
    ]  # fmt: skip


def equal_rows(found: Comparison) -> list[list[str]]:
    """Cells of the table at equal L0, in the order of EQUAL_HEADER."""
    return [
        [
            line.title + ARROW.get(line.better, ""), f"{line.l0:.1f}", value_text(line.a),
            value_text(line.b), delta_text(line), _p_text(line), line.interpolated, line.verdict, line.scope,
        ]
        for line in found.equal_l0
    ]  # fmt: skip


def summary(found: Comparison) -> str:
    """One sentence: at what B is better, at what A is, how many show no difference."""
    parts = []
    for side in ("B", "A"):
        titles = [x.title + (f" ({x.scope})" if x.scope else "") for x in found.lines if x.verdict == f"{side} better"]
        if titles:
            parts.append(f"{side} is better at {', '.join(titles)}")
    unclear = sum(line.verdict == "no difference shown" for line in found.lines)
    if unclear:
        parts.append(f"no difference is shown at {unclear} metric{'s' * (unclear > 1)}")
    return ("; ".join(parts) or "nothing could be compared") + "."


def print_comparison(found: Comparison) -> None:
    """Table, summary and notes in the terminal."""
    console.say(f"A = {', '.join(found.a.sae_ids)}")
    console.say(f"B = {', '.join(found.b.sae_ids)}")
    console.table("B against A", HEADER, table_rows(found), right=(1, 2, 3, 4, 5))
    console.say(summary(found))
    if found.equal_l0:
        console.table("B against A at equal L0", EQUAL_HEADER, equal_rows(found), right=(1, 2, 3, 4, 5))
    for note in found.notes:
        console.say(note)


def markdown(found: Comparison) -> str:
    """The same as Markdown, with how the numbers are made."""

    def cells(row: Sequence[str]) -> str:
        return "| " + " | ".join(c.replace("|", "\\|") for c in row) + " |"

    lines = ["# Comparison", "", f"- A: {', '.join(found.a.sae_ids)}", f"- B: {', '.join(found.b.sae_ids)}", ""]
    lines += [summary(found), "", cells(HEADER), cells(["---"] * len(HEADER)), *map(cells, table_rows(found)), ""]
    if found.equal_l0:
        lines += ["## At equal L0", "", "The side named is interpolated in ln L0 between SAEs of its own family, at "
                  "the other's L0; intervals, p and scope are made as above, p is corrected over this table.", ""]
        lines += [cells(EQUAL_HEADER), cells(["---"] * len(EQUAL_HEADER)), *map(cells, equal_rows(found)), ""]
    lines += [f"- {note}" for note in found.notes]
    lines += [
        "- Differences are B − A with 95 % bootstrap intervals; ± is the standard deviation over training seeds. "
        "p is two-sided and Holm-corrected over the metrics of this table that have a better side. Reseed sd: the "
        "standard deviation over seeds of the evaluation, of the SAE where it is largest.",
        "- Paired: both were measured on the same units, resampled with the same weights. Latents of different SAEs "
        "do not pair.",
        "- Scope: `one training seed` holds for these SAEs alone; `real` means the difference also exceeds the spread "
        "of training seeds (Welch's test, and seeds resampled in the interval).",
    ]
    return "\n".join(lines) + "\n"


def forest(found: Comparison) -> str:
    """SVG: per metric B − A in standard errors of the difference, signed so that right is better for B."""
    drawn = [x for x in found.lines if x.stderr and x.ci_low is not None and x.better in ("higher", "lower")]
    left = max(LEFT, 16 + LETTER * max((len(x.title) for x in drawn), default=0))
    width, rail = left + RAIL + RIGHT, left + RAIL
    height, middle = ROW * (len(drawn) + 5), left + RAIL / 2
    scale = RAIL / (2 * LIMIT)

    def x(v: float) -> float:
        return middle + scale * max(-LIMIT, min(LIMIT, v))

    body = [f'<rect width="{width}" height="{height}" fill="#fff"/><style>{STYLE}</style>']
    for i, (side, cell) in enumerate((("A", found.a), ("B", found.b))):
        body.append(f'<text x="8" y="{ROW * (i + 0.7):g}">{side} = {escape(_cell_text(cell, width))}</text>')
    body.append(f'<line class="zero" x1="{middle:g}" x2="{middle:g}" y1="{3 * ROW}" y2="{height - 2 * ROW:g}"/>')
    body.append(f'<text x="{left}" y="{2.7 * ROW:g}">← A better</text>')
    body.append(f'<text x="{rail}" y="{2.7 * ROW:g}" text-anchor="end">B better →</text>')
    for i, line in enumerate(drawn):
        y = ROW * (i + 3.5)
        sign = 1 if line.better == "higher" else -1
        low, high, at = (sign * v / line.stderr for v in (line.ci_low, line.ci_high, line.delta))  # type: ignore[operator]
        kind = {"B better": "win", "A better": "lose"}.get(line.verdict, "dot")
        body.append(f'<text x="{left - 8}" y="{y + 4:g}" text-anchor="end">{escape(line.title)}</text>')
        body.append(f'<line class="rail" x1="{left}" x2="{rail}" y1="{y:g}" y2="{y:g}"/>')
        body.append(f'<line class="ci" x1="{x(low):.1f}" x2="{x(high):.1f}" y1="{y:g}" y2="{y:g}"/>')
        body.append(f'<circle class="{kind}" cx="{x(at):.1f}" cy="{y:g}" r="4"/>')
        body.append(f'<text x="{rail + 10}" y="{y + 4:g}">{escape(delta_text(line))}</text>')
    centred = f'<text text-anchor="middle" x="{middle:g}"'
    body.append(f'{centred} y="{height - ROW - 2:g}">standard errors of the difference; '
                f"ends of the axis: {LIMIT:g} and beyond</text>")  # fmt: skip
    body.append(f'{centred} y="{height - 8:g}">after Holm\'s correction '
                '<tspan class="win">B better</tspan>, <tspan class="lose">A better</tspan>, '
                '<tspan class="dot">no difference shown</tspan></text>')  # fmt: skip
    title = escape(f"B against A in standard errors: {summary(found)}")
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height:g}" role="img">'
        f"<title>{title}</title>{''.join(body)}</svg>\n"
    )


def _cell_text(cell: Cell, width: int) -> str:
    """The SAEs of one side, as far as the plot is wide."""
    text, room = ", ".join(cell.sae_ids), int(width / LETTER) - 6
    return text if len(text) <= room else text[: room - 1] + "…"


def write_comparison(found: Comparison, out: Path) -> list[Path]:
    """``<A>_vs_<B>.md``, ``.json`` and ``.svg`` in ``out``; returns their paths."""
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    names = (re.sub(r"[^A-Za-z0-9._-]+", "_", cell.name).strip("_")[-80:] for cell in (found.a, found.b))
    stem = "_vs_".join(names)
    texts = {".md": markdown(found), ".json": canonical_json(asdict(found)) + "\n", ".svg": forest(found)}
    paths = []
    for ending, text in texts.items():
        paths.append(out / (stem + ending))
        paths[-1].write_text(text, encoding="utf-8")
    return paths
