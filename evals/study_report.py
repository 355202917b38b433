"""What a study shows and what it does not, written from its rows alone (METRICS 3.5). Torch-free.

A cell is one architecture at one sparsity: SAEs that are equal but for the seed of their training.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evals.board import Board, BoardSubject, Column, build_board, newest
from evals.comparison import Comparison, Line, compare
from evals.page_text import number
from evals.results import current_versions, draws_below, load_results
from evals.seed_noise import spread_of
from sae.errors import ArtefactError
from sae.manifest import is_complete, read_manifest

if TYPE_CHECKING:
    import pandas as pd

SAME_L0 = 0.05
"""Cells whose L0 differs by more than this share are not at equal sparsity."""


@dataclass(frozen=True)
class StudyCell:
    """SAEs of one recipe."""

    architecture: str
    k: int
    """The sparsity's own k, also where the architecture has none."""
    sae_ids: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"{self.architecture}, k {self.k}"


def find_cells(root: Path, board: Board, penalties: Mapping[tuple[float, float], int]) -> list[StudyCell]:
    """Cells of the SAEs below ``root``, in order of k and architecture.

    ``penalties``: (l1, gate_l1) -> k of the sparsity they belong to, for architectures without a k.
    """
    found: dict[tuple[str, int], list[str]] = {}
    for subject in board.saes:
        folder = root / "saes" / subject.sae_id
        k = subject.fields["k"]
        if k is None:
            if not is_complete(folder):
                raise ArtefactError(f"{folder} is gone, so its sparsity is unknown; run the study again")
            config = read_manifest(folder)["config"]
            k = _k_of(config, penalties)
        if k is not None:
            found.setdefault((str(subject.fields["architecture"]), int(k)), []).append(subject.sae_id)
    return [StudyCell(a, k, tuple(sorted(ids))) for (a, k), ids in sorted(found.items(), key=lambda p: p[0][::-1])]


def _k_of(config: Mapping[str, Any], penalties: Mapping[tuple[float, float], int]) -> int | None:
    train = config.get("train", config)
    architecture = train.get("architecture", config.get("architecture"))
    for (l1, gate_l1), k in penalties.items():
        if (architecture == "gated" and train.get("gate_l1") == gate_l1) or (
            architecture != "gated" and train.get("l1") == l1):  # fmt: skip
            return k
    return None


def cell_value(board: Board, cell: StudyCell, column: Column) -> tuple[float, float | None] | None:
    """Mean and deviation over the seeds; None unless all seeds have a value."""
    values = [board.cells[i, column.id].value for i in cell.sae_ids]
    found = spread_of(values)
    return None if found.value is None else (found.value, found.sd)


def study_rows(root: Path) -> "pd.DataFrame":
    """All rows below ``root`` that the study reports and publishes: newest run, versions that are in use."""
    return newest(current_versions(load_results(root)), "task_set", "seed")


def write_report(root: Path, reference: str, penalties: Mapping[tuple[float, float], int],
                 failures: Sequence[str] = ()) -> list[Path]:  # fmt: skip
    """``study.md`` and ``study.json`` below ``root``. ArtefactError without rows."""
    results = study_rows(root)
    if results.empty:
        raise ArtefactError(f"{root} holds no result rows; run the study first")
    board = build_board(results, draws_below(root))
    cells = find_cells(root, board, penalties)
    pairs = []
    for cell in cells:
        base = next((c for c in cells if c.k == cell.k and c.architecture == reference), None)
        if base is not None and base is not cell:
            pairs.append((base, cell, compare(root, ",".join(base.sae_ids), ",".join(cell.sae_ids), everything=True)))
    text = "\n".join([
        *_head(board, results, cells), *_tables(board, cells), *_further(board, pairs), *_shown(pairs, reference),
        *_floors(board),
        *_not_shown(board, results, cells, pairs, failures),
    ]) + "\n"  # fmt: skip
    (root / "study.md").write_text(text, encoding="utf-8")
    record = {
        "cells": [vars(c) for c in cells],
        "comparisons": [{"a": a.name, "b": b.name, "lines": [vars(line) for line in c.lines], "notes": c.notes}
                        for a, b, c in pairs],
        "failures": list(failures),
    }  # fmt: skip
    (root / "study.json").write_text(json.dumps(record, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    return [root / "study.md", root / "study.json"]


def _head(board: Board, results: "pd.DataFrame", cells: Sequence[StudyCell]) -> list[str]:
    first = board.saes[0].fields
    seeds = sorted({len(c.sae_ids) for c in cells})
    tokens = sorted({int(s.fields["train_tokens"]) for s in board.saes if s.fields["train_tokens"]})
    return [
        f"# {len({c.architecture for c in cells})} architectures, {len({c.k for c in cells})} sparsities, "
        f"{' or '.join(map(str, seeds))} seeds",
        "",
        f"{len(board.saes)} SAEs of {first['d_sae']:,} latents on {first['lm']}, {first['hookpoint']}, each trained on "
        f"{' or '.join(f'{t:,}' for t in tokens)} tokens; {len(results):,} rows of {results['eval'].nunique()} "
        f"evaluations, preset {', '.join(sorted(set(map(str, results['preset']))))}. This text is made from the rows: "
        "`python scripts/study.py --report-only`.",
        "",
        "A difference is called real where its interval, resampled over units and seeds, excludes 0, Holm's correction "
        "over all metrics of one comparison leaves p below 0.05, and Welch's test over training seeds does too.",
        "",
    ]


def _tables(board: Board, cells: Sequence[StudyCell]) -> list[str]:
    lines: list[str] = []
    ids = {i for c in cells for i in c.sae_ids}
    columns = [c for c in board.columns if any(board.cells[i, c.id].value is not None for i in ids)]
    for k in sorted({c.k for c in cells}):
        lines += [f"## Sparsity k = {k}: mean over seeds ± standard deviation over seeds", ""]
        here = [c for c in cells if c.k == k]
        lines.append("| metric | " + " | ".join(c.architecture for c in here) + " | random SAE |")
        lines.append("|---|" + "---|" * (len(here) + 1))
        floor = _random_of(board, here)
        for column in columns:
            texts = [_value_text(cell_value(board, c, column), column.spec.digits) for c in here]
            value = board.cells[floor.sae_id, column.id].value if floor else None
            texts.append("–" if value is None else number(value, column.spec.digits))
            better = {"higher": " ↑", "lower": " ↓"}.get(column.spec.better, "")
            lines.append(f"| {column.title}{better} | " + " | ".join(texts) + " |")
        lines.append("")
    return lines


def _further(board: Board, pairs: Sequence[tuple[StudyCell, StudyCell, Comparison]]) -> list[str]:
    """Metrics with a better side that are no column of the board, from the comparisons' own means over seeds."""
    lines: list[str] = []
    shown = {c.id for c in board.columns}
    for k in sorted({a.k for a, _, _ in pairs}):
        here = [(a, b, comparison) for a, b, comparison in pairs if a.k == k]
        names = [here[0][0].architecture, *(b.architecture for _, b, _ in here)]
        values: dict[str, dict[str, str]] = {}
        for a, b, comparison in here:
            for line in comparison.lines:
                if line.metric in shown or line.better == "neither":
                    continue
                row = values.setdefault(f"{line.title} ({line.metric.partition('.')[0]})", {})
                for cell, value, sd in ((a, line.a, line.sd_a), (b, line.b, line.sd_b)):
                    if value is not None:
                        row[cell.architecture] = _value_text((value, sd), 3)
        if any(values.values()):
            lines += [f"## Further metrics at k = {k}", "", "| metric | " + " | ".join(names) + " |",
                      "|---|" + "---|" * len(names)]  # fmt: skip
            lines += ["| " + " | ".join([title, *(row.get(n, "–") for n in names)]) + " |"
                      for title, row in values.items() if row]  # fmt: skip
            lines.append("")
    return lines


def _value_text(found: tuple[float, float | None] | None, digits: int) -> str:
    if found is None:
        return "–"
    mean, sd = found
    return number(mean, digits) + ("" if sd is None else f" ± {number(sd, digits)}")


def _random_of(board: Board, cells: Sequence[StudyCell]) -> BoardSubject | None:
    ids = {i for c in cells for i in c.sae_ids}
    named = {s.random_id for s in board.saes if s.sae_id in ids and s.random_id}
    k = cells[0].k
    randoms = [s for s in board.baselines if s.sae_id in named]
    return next((s for s in randoms if s.fields["k"] == k), randoms[0] if randoms else None)


def _sentence(line: Line, a: StudyCell, b: StudyCell) -> str:
    winner, loser = (b, a) if line.verdict == "B better" else (a, b)
    return (
        f"- **{winner.architecture}** over {loser.architecture} at k {a.k}: {line.title}, "
        f"Δ {number(line.delta or 0.0)} "
        f"[{number(line.ci_low or 0.0)}, {number(line.ci_high or 0.0)}] ({b.architecture} minus {a.architecture}), "
        f"p {number(line.p_holm or 0.0, 2)}"
    )


def _at_equal_l0(comparison: Comparison) -> bool:
    line = next((x for x in comparison.lines if x.metric.split("@")[0] == "l0"), None)
    return bool(line and line.a and line.b and abs(line.b / line.a - 1) <= SAME_L0)


def _shown(pairs: Sequence[tuple[StudyCell, StudyCell, Comparison]], reference: str) -> list[str]:
    lines = ["## What it shows", "", f"Each architecture against {reference} at the same sparsity.", ""]
    fair: list[str] = []
    unfair: list[str] = []
    for a, b, comparison in pairs:
        for line in comparison.lines:
            if line.scope == "real":
                (fair if _at_equal_l0(comparison) else unfair).append(_sentence(line, a, b))
    lines += fair or ["- At equal L0, no difference is real over training seeds."]
    if unfair:
        lines += ["", "Real, but at another L0 than the reference (more active latents lower FVU, ΔCE and KL by "
                  "themselves):", "", *unfair]  # fmt: skip
    return [*lines, ""]


def _floors(board: Board) -> list[str]:
    lines = ["## Against the random SAE", ""]
    for column in board.columns:
        gains = [g for s in board.saes if (g := board.gains.get((s.sae_id, column.id))) is not None]
        if not gains or column.spec.better == "neither":
            continue
        better = sum(g.verdict == "better" for g in gains)
        worse = sum(g.verdict == "worse" for g in gains)
        lines.append(
            f"- {column.title}: {better} of {len(gains)} SAEs better, {worse} worse, {len(gains) - better - worse} "
            "not told apart"
        )
    if len(lines) == 2:
        lines.append("- No random SAE was measured.")
    return [*lines, ""]


def _not_shown(
    board: Board, results: "pd.DataFrame", cells: Sequence[StudyCell],
    pairs: Sequence[tuple[StudyCell, StudyCell, Comparison]], failures: Sequence[str],
) -> list[str]:
    lines = ["## What it does not show", ""]
    for a, b, comparison in pairs:
        known = [x for x in comparison.lines if x.verdict]
        none = [x.title for x in known if x.verdict == "no difference shown"]
        noise = [x.title for x in known if x.scope == "within seed noise"]
        if none:
            lines.append(f"- {b.architecture} and {a.architecture} at k {a.k}: no difference in {len(none)} of "
                         f"{len(known)} metrics ({'; '.join(none[:6])}{'; …' if len(none) > 6 else ''}).")  # fmt: skip
        if noise:
            lines.append(f"- {b.architecture} and {a.architecture} at k {a.k}: {'; '.join(noise)} differ for these "
                         "SAEs, but no more than training seeds do.")  # fmt: skip
        if not _at_equal_l0(comparison):
            lines += [f"- {b.name} against {a.name}: {note}" for note in comparison.notes]
    lines += _undefined(results)
    few = [c.name for c in cells if len(c.sae_ids) < 3]
    if few:
        lines.append(f"- Fewer than three seeds: {', '.join(few)}.")
    lines += [f"- Failed: {f}." for f in failures]
    first = board.saes[0].fields
    lines += [
        f"- One model ({first['lm']}), one place ({first['hookpoint']}), one width ({first['d_sae']:,}), one text mix: "
        "nothing is said of others.",
        "- One recipe of training for all but the penalty: an architecture that wants another learning rate or more "
        "tokens is not seen at its best.",
        "- Latents, documents and prompts are samples; intervals say how far other samples might lie, not whether the "
        "metrics measure what a user wants.",
        "",
    ]
    return lines


def _undefined(results: "pd.DataFrame") -> list[str]:
    """Metrics of SAEs that have no value, with the reason."""
    rows = results[(results["kind"] == "sae") & (results["slice"] == "") & results["value"].isna()]
    lines = []
    for (evaluation, code), group in sorted(rows.groupby(["eval", "failure"]), key=lambda p: p[0]):
        metrics = sorted(set(map(str, group["metric"])))
        n = group["sae_id"].nunique()
        shown = ", ".join(metrics[:5]) + (", …" if len(metrics) > 5 else "")
        lines.append(f"- {evaluation}: {shown} undefined for {n} SAEs ({code}).")
    return lines
