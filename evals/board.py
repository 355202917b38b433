"""The leaderboard as data: which rows become which columns, floors, gains, matched L0, Pareto states. Torch-free.

A column is one (evaluation, metric, slice, evaluation version, preset): two versions, two presets or two judges never
share one (METRICS 2). A missing value is a :class:`Cell` without value and with a reason; it takes part in no ranking.
"""

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from evals.columns import HEADLINE, ColumnSpec
from evals.gains import NOT_RUN, Cell, Draws, Gain, gain_of
from evals.results import PLACE, current_versions
from evals.uncertainty import MIN_UNITS

if TYPE_CHECKING:
    import pandas as pd

MATCHED_L0 = (8, 16, 32, 64, 128, 256)
SUBJECT_FIELDS = (
    "sae_id",
    "kind",
    "lm",
    "lm_revision",
    "hookpoint",
    "architecture",
    "d_in",
    "d_sae",
    "k",
    "train_tokens",
    "sae_sha256",
)


@dataclass(frozen=True, kw_only=True)
class Column:
    """A headline column as it stands on one board."""

    spec: ColumnSpec
    id: str
    """Key, followed by what tells variants apart when there are several (`fvu@v2.paper`)."""
    version: int
    preset: str
    slice: str
    title: str
    judge: str = ""
    weak: str = ""
    """Why the judge is not believed; such a column is shown and never ranked."""
    task_set: str = ""
    """Probe tasks that it is a mean over, where the board holds means over several sets: they are never compared."""

    def of(self, rows: "pd.DataFrame") -> "pd.DataFrame":
        """Those of some rows of its metric that were made as it says."""
        found = rows[(rows["eval_version"] == self.version) & (rows["preset"] == self.preset)]
        return found[found["task_set"] == self.task_set] if self.task_set else found

    @property
    def ranked(self) -> bool:
        return self.spec.better != "neither" and not self.weak


@dataclass(frozen=True, kw_only=True)
class BoardSubject:
    """One line of the board: an SAE, or a baseline that is a floor."""

    fields: dict[str, Any]
    """SUBJECT_FIELDS; a missing number is None."""
    provenance: dict[str, str]
    n_failed: int = 0
    """Items that failed or had no value, over the columns of the board; they enter no value."""
    n_rows: int
    random_id: str | None = None
    """The random SAE it is compared with."""
    alone: bool = True
    """All SAEs of the board read one place of one LM, so that names need not say which."""

    @property
    def sae_id(self) -> str:
        return str(self.fields["sae_id"])

    @property
    def is_baseline(self) -> bool:
        return bool(self.fields["kind"] == "baseline")

    @property
    def short(self) -> str:
        """Readable name, without the LM and the hookpoint where the page states them once for all."""
        name = self.sae_id.removeprefix("baseline.")
        at = str(self.fields["hookpoint"]).replace(":", "-")  # as an id spells it
        if not self.alone:
            return name if at in name else f"{name} ({at})"
        rest = "" if self.is_baseline else name.partition(f"{at}.")[2]
        return rest or name

    @property
    def place(self) -> tuple[Any, ...]:
        """LM and hookpoint: errors and losses of different places are never ranked together."""
        return tuple(self.fields[name] for name in PLACE)


@dataclass(frozen=True, kw_only=True)
class Board:
    """All that tables and pages show; see :func:`build_board`."""

    columns: list[Column] = field(default_factory=list)
    subjects: list[BoardSubject] = field(default_factory=list)
    """SAEs first, baselines below."""
    cells: dict[tuple[str, str], Cell] = field(default_factory=dict)
    """(sae_id, column id) -> cell; every pair is present."""
    gains: dict[tuple[str, str], Gain] = field(default_factory=dict)
    draws: Draws | None = None
    """Resampled values behind the cells, where the board was built with them."""

    @property
    def saes(self) -> list[BoardSubject]:
        return [s for s in self.subjects if not s.is_baseline]

    @property
    def baselines(self) -> list[BoardSubject]:
        return [s for s in self.subjects if s.is_baseline]

    def columns_of(self, key: str) -> list[Column]:
        return [c for c in self.columns if c.spec.key == key]

    def best(self, column: Column) -> set[str]:
        """Of each place the SAE with the best value and all whose interval overlaps its own; empty for unranked
        columns, none where an SAE is alone. A value of too few units for an interval is no candidate."""
        if not column.ranked:
            return set()
        sign = 1 if column.spec.better == "higher" else -1
        found: set[str] = set()
        for place in {s.place for s in self.saes}:
            cells = [(s.sae_id, self.cells[s.sae_id, column.id]) for s in self.saes if s.place == place]
            known = [(i, c) for i, c in cells if c.value is not None and (c.ci_low is not None or c.n >= MIN_UNITS)]
            if len(known) > 1:
                top = max(known, key=lambda p: (sign * p[1].value, p[0]))[1]  # type: ignore[operator]
                found |= {i for i, c in known if c.value == top.value or overlap(c, top)}
        return found


def overlap(a: Cell, b: Cell) -> bool:
    """Do two 95 % intervals meet? False when one is unknown."""
    if None in (a.ci_low, a.ci_high, b.ci_low, b.ci_high):
        return False
    return bool(a.ci_low <= b.ci_high and b.ci_low <= a.ci_high)  # type: ignore[operator]


def slice_parts(text: str) -> dict[str, str]:
    """``"explainer=pmi,scorer=embedding"`` as a dict; a part without ``=`` is dropped."""
    return dict(part.split("=", 1) for part in text.split(",") if "=" in part)


def plain(value: Any) -> Any:
    """A pandas scalar as JSON would have it; NaN becomes None."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)) or str(value) in ("nan", "NaT", "<NA>"):
        return None
    return value.item() if hasattr(value, "item") else value


def newest(results: "pd.DataFrame", *more: str) -> "pd.DataFrame":
    """One row per (sae_id, eval, version, metric, slice, split, preset) and ``more``: lowest seed, of it the newest
    run."""
    identity = ["sae_id", "eval", "eval_version", "metric", "slice", "split", "preset", *more]
    ordered = results.assign(_made=results["created_at"].fillna("").astype(str))
    ordered = ordered.sort_values(
        [*identity, "seed", "_made", "run_key"], ascending=[True] * (len(identity) + 1) + [False, True], kind="stable"
    )
    return ordered.drop_duplicates(identity, keep="first").drop(columns="_made").reset_index(drop=True)


def _matching(rows: "pd.DataFrame", spec: ColumnSpec) -> "pd.DataFrame":
    found = rows[(rows["eval"] == spec.eval) & (rows["metric"] == spec.metric)]
    wanted = dict(spec.slice)
    if not wanted:
        return found[found["slice"] == ""]
    fits = {s for s in found["slice"].unique() if wanted.items() <= slice_parts(s).items()}
    return found[found["slice"].isin(fits)]


def _of_one_scorer(found: "pd.DataFrame", spec: ColumnSpec, weak: dict[tuple[str, str], str]) -> "pd.DataFrame":
    """The rows of the scorer that the column prefers; all of them where it names none."""
    if not spec.scorers:
        return found
    parts = [slice_parts(s) for s in found["slice"]]
    used = [p.get("scorer", "") for p in parts]
    strong = {p.get("scorer", "") for p in parts if (p.get("judge", ""), p.get("scorer", "")) not in weak}
    best = next((s for s in (*(s for s in spec.scorers if s in strong), *spec.scorers) if s in used), None)
    return found.loc[[u == best for u in used]]


def _columns(rows: "pd.DataFrame", spec: ColumnSpec, weak: dict[tuple[str, str], str]) -> list[Column]:
    """The variants of one headline column, the most recent version first."""
    found = _of_one_scorer(_matching(rows, spec), spec, weak)
    several = len({t for t in found["task_set"] if t}) > 1
    variants = sorted(
        {
            (-int(v), str(p), str(s), str(t) if several else "")
            for v, p, s, t in zip(
                found["eval_version"], found["preset"], found["slice"], found["task_set"], strict=True)
        }
    )
    columns = []
    for minus_version, preset, slice_text, task_set in variants:
        parts = slice_parts(slice_text)
        tags = [f"v{-minus_version}", preset] if len({v[:2] for v in variants}) > 1 else []
        if len({v[2] for v in variants}) > 1:
            named = {*spec.slice} | ({("scorer", parts.get("scorer", ""))} if spec.scorers else set())
            tags += [value for name, value in sorted(parts.items()) if (name, value) not in named]
        tags += [f"tasks {task_set}"] if several else []
        judge = parts.get("judge", "")
        columns.append(
            Column(
                spec=spec,
                id=spec.key + (f"@{'.'.join(tags)}" if tags else ""),
                version=-minus_version,
                preset=preset,
                slice=slice_text,
                title=spec.title + (f" ({', '.join(tags)})" if tags else ""),
                judge=judge,
                weak=weak.get((judge, parts.get("scorer", "")), ""),
                task_set=task_set,
            )
        )
    return columns or [Column(spec=spec, id=spec.key, version=0, preset="", slice="", title=spec.title)]


CELL_FIELDS = ("value", "ci_low", "ci_high", "stderr", "n", "n_failed", "failure", "status", "pairing")
SOURCE_FIELDS = ("sae_id", "eval", "run_key", "metric", "split")


def _cells(rows: "pd.DataFrame", column: Column) -> dict[str, Cell]:
    """sae_id -> cell of those that have one: of several rows the first, as :func:`newest` orders them."""
    found = column.of(_matching(rows, column.spec))
    first = found[found["slice"] == column.slice].drop_duplicates("sae_id")
    records = first[[*dict.fromkeys((*CELL_FIELDS, *SOURCE_FIELDS, "slice"))]].to_dict("records")
    return {str(record["sae_id"]): _cell(record) for record in records}


def _cell(record: Mapping[Hashable, Any]) -> Cell:
    row = {name: plain(record[name]) for name in CELL_FIELDS}
    source = tuple(str(record[name]) for name in SOURCE_FIELDS) if record["slice"] == "" else None
    reason = "" if row["value"] is not None else f"{row['status']}: {row['failure'] or 'no reason recorded'}"
    return Cell(
        value=row["value"],
        ci_low=row["ci_low"],
        ci_high=row["ci_high"],
        stderr=row["stderr"],
        n=int(row["n"] or 0),
        n_failed=int(row["n_failed"] or 0),
        reason=reason,
        source=source,  # type: ignore[arg-type]
        pairing=str(row["pairing"] or ""),
    )


def _joined(rows: "pd.DataFrame", column: str) -> str:
    """All values of a provenance column; of several, each with its evaluation."""
    pairs = sorted({(str(e), str(v)) for e, v in zip(rows["eval"], rows[column], strict=True) if plain(v) is not None})
    values = {v for _, v in pairs}
    if column in ("run_key", "eval_version") or len(values) > 1:
        return ";".join(f"{e}={v}" for e, v in pairs)
    return values.pop() if values else ""


PROVENANCE = (
    "eval_version",
    "preset",
    "seed",
    "run_key",
    "code_sha",
    "dirty",
    "saescope",
    "torch",
    "transformers",
    "device",
    "dtype",
    "llm",
)


def _subjects(rows: "pd.DataFrame") -> list[BoardSubject]:
    """In the order of their sae_id."""
    n_rows = rows["sae_id"].value_counts()
    first = rows.drop_duplicates("sae_id")
    # A subject has hundreds of rows and a few runs: what is told of a run is the same in all of its rows.
    runs = dict(iter(rows.drop_duplicates(["sae_id", "eval", *PROVENANCE]).groupby("sae_id")))
    return sorted(
        (
            _subject(record, runs[record["sae_id"]], int(n_rows[record["sae_id"]]))
            for record in first[list(SUBJECT_FIELDS)].to_dict("records")
        ),
        key=lambda subject: subject.sae_id,
    )


def _subject(record: Mapping[Hashable, Any], runs: "pd.DataFrame", n_rows: int) -> BoardSubject:
    fields = {name: plain(record[name]) for name in SUBJECT_FIELDS}
    for name in ("d_in", "d_sae", "k", "train_tokens"):
        fields[name] = None if fields[name] is None else int(fields[name])
    provenance = {name: _joined(runs, name) for name in PROVENANCE}
    return BoardSubject(fields=fields, provenance=provenance, n_rows=n_rows)


def is_random(subject: BoardSubject) -> bool:
    """Is this the baseline "random SAE" (not random directions, not an SAE on a random LM)?"""
    words = f"{subject.sae_id}.{subject.fields['architecture']}".replace("-", "_").split(".")
    return subject.is_baseline and any(w == "random" or w.startswith("random_sae") for w in words)


def _random_of(
    subject: BoardSubject, baselines: Sequence[BoardSubject], l0: dict[str, float | None], inputs: dict[str, set[str]]
) -> str | None:
    """The random SAE of the same LM and hookpoint; of several, one measured on the same text, then that of equal width,
    then of nearest L0. ``inputs``: by sae_id the pairings of its cells."""

    def distance(other: BoardSubject) -> tuple[bool, bool, float, str]:
        a, b = l0.get(subject.sae_id), l0.get(other.sae_id)
        gap = abs(math.log(max(a, 1e-9) / max(b, 1e-9))) if a is not None and b is not None else math.inf
        apart = not inputs.get(subject.sae_id, set()) & inputs.get(other.sae_id, set())
        return apart, other.fields["d_sae"] != subject.fields["d_sae"], gap, other.sae_id

    same = [b for b in baselines if is_random(b) and all(b.fields[f] == subject.fields[f] for f in ("lm", "hookpoint"))]
    return min(same, key=distance).sae_id if same else None


def weak_reason(auc: float | None, wrong_auc: float | None) -> str:
    """What the board says of a judge that failed its check."""
    found = "no AUC" if auc is None else f"AUC {auc:.2f}"
    wrong = "" if wrong_auc is None else f", with wrong explanations {wrong_auc:.2f}"
    return f"weak judge ({found}{wrong})"


def weak_judges(rows: "pd.DataFrame") -> dict[tuple[str, str], str]:
    """(judge, scorer) as slices spell them -> why that judge is not believed; one weak check is enough."""
    checks = rows[(rows["eval"] == "explanation") & rows["metric"].isin(["judge_auc", "judge_wrong_auc", "judge_weak"])]
    found: dict[tuple[str, str], dict[str, Any]] = {}
    names = ("sae_id", "slice", "metric", "value")
    for sae_id, slice_text, metric, value in zip(*(checks[name] for name in names), strict=True):
        found.setdefault((str(sae_id), str(slice_text)), {})[str(metric)] = plain(value)
    weak = {}
    for (_, slice_text), values in sorted(found.items()):
        if values.get("judge_weak") == 1:
            parts = slice_parts(slice_text)
            reason = weak_reason(values.get("judge_auc"), values.get("judge_wrong_auc"))
            weak[parts.get("judge", ""), parts.get("scorer", "")] = reason
    return weak


def build_board(results: "pd.DataFrame", draws: Draws | None = None) -> Board:
    """Choose columns and cells from all rows (``evals.results.load_results``). No rows: an empty board.

    ``draws`` (``evals.results.read_draws`` on the same root) makes differences to floors paired where they can be.
    """
    if results.empty:
        return Board()
    rows = newest(current_versions(results), "task_set")
    weak = weak_judges(rows)
    evaluations, metrics = {spec.eval for spec in HEADLINE}, {spec.metric for spec in HEADLINE}
    asked = rows[rows["eval"].isin(evaluations) & rows["metric"].isin(metrics)]
    columns = [column for spec in HEADLINE for column in _columns(asked, spec, weak)]
    subjects = _subjects(rows)
    cells: dict[tuple[str, str], Cell] = {}
    for column in columns:
        found = _cells(asked, column)
        cells |= {(s.sae_id, column.id): found.get(s.sae_id, NOT_RUN) for s in subjects}
    subjects = [
        replace(s, n_failed=sum(cells[s.sae_id, c.id].n_failed for c in columns if c.spec.better != "neither"))
        for s in subjects
    ]
    l0_column = next(c for c in columns if c.spec.key == "l0")
    l0 = {s.sae_id: cells[s.sae_id, l0_column.id].value for s in subjects}
    baselines = [s for s in subjects if s.is_baseline]
    inputs = {s.sae_id: {cells[s.sae_id, c.id].pairing for c in columns} - {""} for s in subjects}
    saes = [replace(s, random_id=_random_of(s, baselines, l0, inputs)) for s in subjects if not s.is_baseline]
    alone = len({s.place for s in saes}) <= 1
    saes, baselines = ([replace(s, alone=alone) for s in group] for group in (saes, baselines))
    fvu = next(c for c in columns if c.spec.key == "fvu")
    saes.sort(key=lambda s: (cells[s.sae_id, fvu.id].value is None, cells[s.sae_id, fvu.id].value or 0.0, s.sae_id))
    gains = {}
    for subject in saes:
        for column in columns:
            if subject.random_id is not None:
                gain = gain_of(column, cells[subject.sae_id, column.id], cells[subject.random_id, column.id], draws)
                if gain is not None:
                    gains[subject.sae_id, column.id] = gain
    return Board(columns=columns, subjects=[*saes, *baselines], cells=cells, gains=gains, draws=draws)
