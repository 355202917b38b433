"""The model card of an SAE: what it is, where it reads, what was measured, with intervals and floors. Torch-free.

Numbers come from result rows (``rows.jsonl`` of an evaluation) of exactly these weights; nothing else is claimed.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sae.errors import ArtefactError, ConfigError

ROWS_FILE = "rows.jsonl"
MAX_BYTES = 2**28
FLOOR = "baseline.random_sae."
_LICENCE = re.compile(r"[a-z0-9][a-z0-9.+-]*")
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
Row = Mapping[str, Any]


@dataclass(kw_only=True, frozen=True)
class Card:
    """What a card says."""

    name: str
    licence: str
    """Identifier of the hub, e.g. mit, apache-2.0, gemma, other."""
    library: str
    """saescope, or saelens for files that SAELens reads."""
    base_model: str | None
    """Hub id of the subject model; None where it is not known to be on the hub."""
    facts: Sequence[tuple[str, str]]
    """What it is, one fact a row."""
    rows: Sequence[Row] = ()
    """Result rows of these weights."""
    floors: Sequence[Row] = ()
    """Rows of the random SAE of the same runs."""
    usage: str = ""
    """How it is loaded: a line of Python."""
    tags: Sequence[str] = field(default=("sparse-autoencoder", "mechanistic-interpretability", "interpretability"))

    def __post_init__(self) -> None:
        if not _LICENCE.fullmatch(self.licence):
            raise ConfigError(
                f"--licence {self.licence!r} is no identifier of the hub; expected e.g. mit, apache-2.0, gemma, other"
            )
        if self.base_model is not None and not HUB_ID.fullmatch(self.base_model):
            raise ConfigError(f"--base-model {self.base_model!r} is no hub id; expected org/name")


def find_rows(paths: Iterable[Path]) -> list[dict[str, Any]]:
    """All result rows below folders (or in files) of ``rows.jsonl``; ``ArtefactError`` for what is no such file."""
    files: list[Path] = []
    for path in map(Path, paths):
        found = sorted(path.rglob(ROWS_FILE)) if path.is_dir() else [path]
        if not found:
            raise ArtefactError(f"--rows {path}: there is no {ROWS_FILE} below it; give a folder of results")
        files += found
    newest: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for file in sorted(files, key=_written):
        rows = _read(file)
        if rows:  # a repeated evaluation counts once, with its latest numbers
            newest[tuple(str(rows[0].get(name)) for name in ("sae_sha256", "eval", "preset", "seed"))] = rows
    rows = [row for part in newest.values() for row in part]
    bad = next((row for row in rows if not {"sae_id", "sae_sha256", "metric", "value"} <= set(row)), None)
    if bad is not None:
        raise ArtefactError(f"--rows: a row without sae_id, sae_sha256, metric and value: {str(bad)[:200]}")
    return rows


def _written(file: Path) -> tuple[str, str]:
    """When the evaluation was made, by its manifest; unknown comes first."""
    try:
        made = json.loads((file.parent / "manifest.json").read_text(encoding="utf-8"))
        return str((made.get("provenance") or {}).get("created_at") or made.get("created_at") or ""), str(file)
    except (OSError, ValueError, AttributeError):
        return "", str(file)


def _read(file: Path) -> list[dict[str, Any]]:
    try:
        if file.stat().st_size > MAX_BYTES:
            raise ArtefactError(f"--rows {file} has more than {MAX_BYTES:,} bytes; give the folder of one run")
        # splitlines() also cuts at U+2028, which JSON may hold
        return [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line]
    except (OSError, ValueError) as error:
        raise ArtefactError(f"--rows {file} is no file of result rows ({error})") from error


def of_weights(rows: Sequence[Row], sae_id: str, sha256: str) -> list[Row]:
    """Rows that were measured on these very weights. ``ConfigError`` where there is none: a card without its numbers,
    or with those of other weights of the same name, would mislead."""
    found = [row for row in rows if row["sae_sha256"] == sha256]
    if not found:
        ids = sorted({str(row["sae_id"]) for row in rows})
        stale = f"; {sae_id} was measured with other weights" if sae_id in ids else ""
        raise ConfigError(f"--rows hold no row of {sae_id} (sha256 {sha256[:12]}…){stale}; found {', '.join(ids[:8])}")
    return found


def render(card: Card) -> str:
    """The README.md: YAML front matter of the hub, then Markdown."""
    head = {
        "license": card.licence, "library_name": card.library, "tags": [*card.tags, "saescope"],
        **({"base_model": card.base_model} if card.base_model else {}),
    }  # fmt: skip
    lines = ["---", *(f"{name}: {_yaml(value)}" for name, value in head.items()), "---", "", f"# {card.name}", ""]
    lines += ["| | |", "|---|---|", *(f"| {_cell(a)} | {_cell(b)} |" for a, b in card.facts), ""]
    if card.usage:
        lines += ["```python", card.usage, "```", ""]
    lines += ["## Measured", "", *_metrics(card)]
    return "\n".join(lines) + "\n"


def _yaml(value: Any) -> str:
    """JSON of plain strings is YAML."""
    return json.dumps(value)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _metrics(card: Card) -> list[str]:
    if not card.rows:
        return ["No evaluation was given with this upload (`--rows`)."]
    floors = {_place(row): row for row in card.floors}
    wanted = sorted((r for r in card.rows if not r.get("slice")), key=_place)
    lines = ["| evaluation | metric | value [95 % interval] | random SAE | n | failed |", "|---|---|---|---|---|---|"]
    for row in wanted:
        floor = floors.get(_place(row))
        lines.append(
            f"| {_cell(str(row.get('eval')))} v{row.get('eval_version')} | {_cell(str(row['metric']))} "
            f"| {_number(row)} | {'' if floor is None else _number(floor)} "
            f"| {row.get('n')} | {row.get('n_failed') or 0} |"
        )
    presets = sorted({str(row.get("preset")) for row in wanted})
    lines += [
        "", f"Intervals: bootstrap over the units of each evaluation (n). Preset {', '.join(presets)}; all rows, "
        "slices included, are in `metrics.jsonl`. Random SAE: same size and L0, random directions.",
    ]  # fmt: skip
    return lines


def _place(row: Row) -> tuple[str, ...]:
    return tuple(str(row.get(name)) for name in ("eval", "eval_version", "metric", "slice", "split", "preset", "seed"))


def _number(row: Row) -> str:
    if row["value"] is None:
        return f"undefined ({row.get('failure')})"
    value, low, high = row["value"], row.get("ci_low"), row.get("ci_high")
    return f"{value:.4g}" if low is None or high is None else f"{value:.4g} [{low:.4g}, {high:.4g}]"
