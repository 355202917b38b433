"""The page of one SAE: its latents, all its measurements, training curves, densities. Torch-free."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

from autointerp.records import Explanation
from evals import charts
from evals.board import Board, BoardSubject, plain
from evals.gains import Cell
from evals.latent_page import ScoreColumn, best_scores, score_columns
from evals.page_board import cell_list
from evals.page_data import LatentData, SaeData
from evals.page_profile import field_profile
from evals.page_scores import coverage, distributions, floors_of
from evals.page_text import config_text, slug, visible
from evals.page_windows import failure_text

if TYPE_CHECKING:
    import pandas as pd


def _row_cell(row: Mapping[str, Any]) -> Cell:
    value = plain(row["value"])
    return Cell(
        value=value,
        ci_low=plain(row["ci_low"]),
        ci_high=plain(row["ci_high"]),
        n=int(row["n"]),
        n_failed=int(row["n_failed"]),
        reason="" if value is not None else f"{row['status']}: {plain(row['failure']) or 'no reason recorded'}",
    )


def _metric_rows(subject: BoardSubject, rows: "pd.DataFrame") -> list[dict[str, Any]]:
    identity = ("eval", "eval_version", "metric", "slice", "split", "preset")
    records: list[dict[str, Any]] = rows[rows["sae_id"] == subject.sae_id].to_dict("records")
    floors = {}
    if subject.random_id:
        for r in rows[rows["sae_id"] == subject.random_id].to_dict("records"):
            floors[tuple(r[i] for i in identity)] = _row_cell(r)
    return [
        {
            "eval": r["eval"],
            "metric": r["metric"],
            "slice": visible(r["slice"]),
            "cell": _row_cell(r),
            "version": r["eval_version"],
            "preset": r["preset"],
            "floor": floors.get(tuple(r[i] for i in identity)),
        }
        for r in records
    ]


def _sae_charts(sae: SaeData) -> list[dict[str, Any]]:
    import numpy as np

    found = []
    if sae.train is not None and not sae.train.empty:
        frame = sae.train
        steps = next((frame[c] for c in ("tokens", "tokens_seen", "step") if c in frame), None)
        for name, title in (
            ("fvu", "FVU on training batches"),
            ("loss", "Training loss"),
            ("l0", "L0"),
            ("dead", "Dead latents"),
        ):
            column = next((c for c in (name, f"train_{name}", f"{name}_frac", f"n_{name}") if c in frame), None)
            if steps is not None and column is not None:
                svg = charts.lines(
                    [(title, steps.astype(float).tolist(), frame[column].astype(float).tolist())],
                    str(steps.name),
                    title,
                )
                if svg:
                    found.append({"svg": svg, "caption": f"{title} over training."})
    if sae.stats is not None and "density" in sae.stats:
        density = sae.stats["density"].to_numpy(dtype=float)
        alive = density[density > 0]
        if alive.size:
            edges = np.arange(-7.0, 0.01, 0.25)
            heights = np.histogram(np.clip(np.log10(alive), -6.999, -1e-9), bins=edges)[0].tolist()
            notes = [f"10^{a:.2f} to 10^{a + 0.25:.2f}: {h} latents" for a, h in zip(edges[:-1], heights, strict=True)]
            svg = charts.bars(heights, ("density 1e-7", "1"), "density of latents", notes=notes)
            silent = int(density.size - alive.size)
            found.append(
                {
                    "svg": svg,
                    "caption": f"Densities of {alive.size:,} latents (log scale); {silent:,} more were silent.",
                }
            )
    return found


def _chosen(latent: LatentData) -> Explanation | None:
    """The explanation that the lists show; where none was chosen, the first, whose failure they show."""
    chosen = next((e for e in latent.explanations if e.selected), None)
    return chosen or (latent.explanations[0] if latent.explanations else None)


def _latent_list(sae: SaeData, columns: Sequence[ScoreColumn]) -> list[list[Any]]:
    """Rows as sae.js draws them: latent, text, failure, explainer, density, then a cell list per score column, with its
    shuffled floor at the end where there is one."""
    rows: list[list[Any]] = []
    for latent in sae.latents:
        chosen, scores = _chosen(latent), best_scores(latent)
        failure = "no explanation was made" if chosen is None else ""
        if chosen is not None and chosen.failure is not None:
            failure = f"failed: {failure_text(chosen.failure)}"
        text = (chosen.text or ("n-gram pattern" if chosen.pattern else "")) if chosen else ""
        density = plain(latent.stats.get("density"))
        row: list[Any] = [latent.latent, visible(text), visible(failure), visible(chosen.explainer) if chosen else ""]
        row.append(None if density is None else float(f"{density:.3g}"))
        floors = floors_of(latent)
        for c in columns:
            cell = cell_list(scores.get(c.key, Cell(reason="not scored")))
            floored = len(cell) > 1 and c.key in floors
            row.append([*cell, float(f"{floors[c.key]:.3g}")] if floored else cell)
        rows.append(row)
    return rows


EXTREMES = 5


def _extremes(sae: SaeData, columns: Sequence[ScoreColumn]) -> dict[str, Any] | None:
    """The best and the worst explained latents by the first score whose judge is believed; None without scores.

    Ties go to the lower latent. A latent is in one of the two lists only.
    """
    column = next((c for c in columns if not c.weak), columns[0] if columns else None)
    if column is None:
        return None
    found: list[tuple[float, int, dict[str, Any]]] = []
    for latent in sae.latents:
        cell, chosen = best_scores(latent).get(column.key), _chosen(latent)
        if cell is not None and cell.value is not None and chosen is not None:
            text = visible(chosen.text or "n-gram pattern")
            href = f"../latent/{slug(sae.sae_id)}/{latent.latent}.html"
            entry = {"latent": latent.latent, "text": text, "cell": cell, "href": href}
            found.append((-cell.value, latent.latent, entry))
    ranked = [entry for _, _, entry in sorted(found, key=lambda f: f[:2])]
    count = min(EXTREMES, len(ranked) // 2)
    if not count:
        return None
    return {"title": column.title, "weak": column.weak, "best": ranked[:count], "worst": ranked[: -count - 1 : -1]}


def sae_context(subject: BoardSubject, board: Board, rows: "pd.DataFrame", sae: SaeData) -> dict[str, Any]:
    """What sae.html.j2 needs."""
    fields, columns = subject.fields, score_columns(sae)
    metrics = _metric_rows(subject, rows)
    facts = [
        ("Language model", f"{fields['lm']} ({str(fields['lm_revision'])[:12]})"),
        ("Hookpoint", fields["hookpoint"]),
        ("Architecture", fields["architecture"]),
        ("Width", fields["d_in"]),
        ("Latents", f"{fields['d_sae']:,}" if fields["d_sae"] else ""),
        ("k", fields["k"]),
        ("Training tokens", f"{fields['train_tokens']:,}" if fields["train_tokens"] else ""),
        ("Explained", f"{len(sae.latents):,}" if sae.latents else ""),
        ("Failed items", subject.n_failed),
    ]
    return {
        "subject": subject,
        "facts": [(n, v if v is None else visible(str(v))) for n, v in facts],
        "n_latents": len(sae.latents),
        "listed": {
            "folder": f"../latent/{slug(sae.sae_id)}/",
            "columns": [{"title": c.title, "hint": c.hint, "weak": c.weak} for c in columns],
            "rows": _latent_list(sae, columns),
        },
        "extremes": _extremes(sae, columns),
        "coverage": coverage(sae),
        "distributions": distributions(sae, columns),
        "compare_href": f"../compare.html#{urlencode({'a': subject.sae_id})}",
        "profile": field_profile(subject, board),
        "metrics": [m for m in metrics if not m["slice"]],
        "sliced": [m for m in metrics if m["slice"]],
        "charts": _sae_charts(sae),
        "config_text": config_text(sae.cfg),
        "provenance": [("SHA-256", fields["sae_sha256"]), *((n, visible(v)) for n, v in subject.provenance.items())],
    }
