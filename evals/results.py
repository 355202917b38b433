"""Result rows: one tidy row per (SAE, evaluation, metric, slice, seed), strict to write, easy to read. Torch-free.

Rows carry no provenance, so that two runs write the same bytes; it lies in the folder's manifest and is joined when
they are read.
"""

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import cache, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from sae.config import from_dict
from sae.errors import ArtefactError, ConfigError
from sae.manifest import canonical_json, is_complete, read_manifest, sha256_text

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd

PLACE = ("lm", "lm_revision", "hookpoint")
"""Fields of a row that say of what it is measured: numbers of different places are never ranked or compared."""
ROWS_FILE = "rows.jsonl"
DETAILS_FILE = "details.parquet"
DRAWS_FILE = "draws.npz"
Status = Literal["ok", "undefined", "failed", "skipped"]
KEY_FIELDS = ("sae_id", "eval", "eval_version", "metric", "slice", "split", "seed", "run_key")


@dataclass(frozen=True, kw_only=True)
class Metric:
    """Declaration of a metric, made once, in the file of its evaluation."""

    name: str
    title: str
    unit: str
    better: Literal["higher", "lower", "neither"]
    description: str
    """Formula in words, and the unit over which the interval resamples."""
    reference: str
    """Paper and equation or section, and where we differ."""
    low: float = -math.inf
    high: float = math.inf
    headline: bool = False
    """Shown on the first leaderboard page."""


@dataclass(frozen=True, kw_only=True)
class SubjectInfo:
    """What is measured; copied into each of its rows."""

    sae_id: str
    kind: Literal["sae", "baseline"]
    lm: str
    lm_revision: str
    hookpoint: str
    architecture: str
    d_in: int
    d_sae: int
    k: int | None
    train_tokens: int | None
    sae_sha256: str


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A value with its 95 % interval, or the reason why there is none."""

    value: float | None
    ci_low: float | None = None
    ci_high: float | None = None
    stderr: float | None = None
    n: int = 0
    """Number of resampling units."""
    n_failed: int = 0
    failure: str | None = None
    """Failure code when value is None."""
    draws: "np.ndarray | None" = field(default=None, compare=False, repr=False)
    """[R] resampled values that the interval is made of; not part of a row."""

    @staticmethod
    def undefined(code: str, n: int = 0, n_failed: int = 0) -> "Estimate":
        return Estimate(value=None, n=n, n_failed=n_failed, failure=code)


@dataclass(frozen=True, kw_only=True)
class Row(SubjectInfo):
    """One number of one subject."""

    eval: str
    eval_version: int
    metric: str
    slice: str
    """"" for the aggregate, else `task=...`, `decile=...`, `explainer=...,scorer=...,judge=...`."""
    split: str
    seed: int
    run_key: str
    value: float | None
    status: Status
    failure: str | None
    ci_low: float | None
    ci_high: float | None
    stderr: float | None
    n: int
    n_failed: int
    preset: str

    def sort_key(self) -> tuple[Any, ...]:
        return tuple(getattr(self, f) for f in KEY_FIELDS)


TOLERANCE = 1e-9
"""Of bounds, in the units of the metric: sums are rounded."""


def faults(metric: Metric, e: Estimate) -> list[str]:
    """What cannot be right about finite numbers, in words: a value or an interval out of the metric's declared range, a
    value out of its own interval, half an interval, an interval of one unit, negative spreads and counts, an interval
    without width whose resamples do not differ, numbers beside a value that is undefined."""
    found = []
    low, high = metric.low - TOLERANCE, metric.high + TOLERANCE
    if e.value is not None and not low <= e.value <= high:
        found.append(f"= {e.value} is outside its declared range [{metric.low}, {metric.high}]")
    if e.stderr is not None and e.stderr < 0:
        found.append(f"has the negative standard error {e.stderr}")
    if e.n < 0 or e.n_failed < 0:
        found.append(f"counts {e.n} units, {e.n_failed} failed")
    if e.value is None and (e.ci_low, e.ci_high, e.stderr) != (None, None, None):
        found.append("is undefined but has an interval")
    if (e.ci_low is None) != (e.ci_high is None):
        found.append("has half an interval")
    if e.value is None or e.ci_low is None or e.ci_high is None:
        return found
    slack = TOLERANCE * max(1.0, abs(e.value))
    if not e.ci_low - slack <= e.value <= e.ci_high + slack:
        found.append(f"= {e.value} is outside its own interval [{e.ci_low}, {e.ci_high}]")
    if e.ci_low < low or e.ci_high > high:
        found.append(f"has an interval [{e.ci_low}, {e.ci_high}] beyond its range [{metric.low}, {metric.high}]")
    if e.ci_low == e.ci_high and not e.stderr:
        found.append("claims a certainty: its interval has no width")
    if e.n < 2:
        found.append(f"has an interval from {e.n} units")
    return found


def make_row(
    info: SubjectInfo,
    eval_name: str,
    version: int,
    metric: Metric,
    estimate: Estimate,
    *,
    seed: int,
    run_key: str,
    preset: str,
    slice: str = "",
    split: str = "",
) -> Row:
    """Check an estimate against its declaration and make the row.

    A non-finite number is never written: it becomes `undefined` with failure code `non_finite`.
    Raises ConfigError where the numbers cannot be right (:func:`faults`).
    """
    e = estimate
    numbers = [x for x in (e.value, e.ci_low, e.ci_high, e.stderr) if x is not None]
    if any(not math.isfinite(x) for x in numbers):
        e = Estimate.undefined("non_finite", n=e.n, n_failed=e.n_failed)
    if found := faults(metric, e):
        raise ConfigError(f"{eval_name}.{metric.name} {'; '.join(found)}")
    if e.value is None and not e.failure:
        raise ConfigError(f"{eval_name}.{metric.name}: a missing value needs a failure code")
    status: Status = "ok" if e.value is not None else "failed" if e.failure == "internal" else "undefined"
    return Row(
        eval=eval_name,
        eval_version=version,
        metric=metric.name,
        slice=slice,
        split=split,
        seed=seed,
        run_key=run_key,
        value=e.value,
        status=status,
        failure=e.failure,
        ci_low=e.ci_low,
        ci_high=e.ci_high,
        stderr=e.stderr,
        n=e.n,
        n_failed=e.n_failed,
        preset=preset,
        **asdict(info),
    )


def write_rows(folder: Path, rows: Iterable[Row], metrics: Sequence[Metric]) -> int:
    """Write `rows.jsonl`, sorted by key. Undeclared metrics and duplicate keys are errors. Returns the row count."""
    ordered = sorted(rows, key=Row.sort_key)
    declared = {m.name for m in metrics}
    seen: set[tuple[Any, ...]] = set()
    for row in ordered:
        if row.metric not in declared:
            raise ConfigError(f"{row.eval} wrote the metric {row.metric!r}, which it does not declare")
        if row.sort_key() in seen:
            raise ConfigError(f"{row.eval} wrote {row.metric!r} slice {row.slice!r} twice")
        seen.add(row.sort_key())
    text = "".join(canonical_json(asdict(row)) + "\n" for row in ordered)
    (folder / ROWS_FILE).write_text(text, encoding="utf-8")
    return len(ordered)


def read_rows(folder: Path) -> list[Row]:
    """Rows of one complete folder."""
    if not is_complete(folder):
        raise ArtefactError(f"{folder} holds no complete rows; run its evaluation again")
    lines = (folder / ROWS_FILE).read_text(encoding="utf-8").split("\n")  # splitlines() also cuts at U+2028 and U+0085
    return [from_dict(Row, json.loads(line)) for line in lines if line]


def row_folders(root: Path) -> list[Path]:
    """Complete `rows/<sae_id>/<eval>/<key>` folders, sorted."""
    return sorted(p.parent for p in (Path(root) / "rows").glob("*/*/*/manifest.json"))


def row_dir(root: Path, sae_id: str, eval_name: str, key: str) -> Path:
    return Path(root) / "rows" / sae_id / eval_name / key


PROVENANCE_COLUMNS = (
    "code_sha",
    "dirty",
    "saescope",
    "torch",
    "transformers",
    "vllm",
    "created_at",
    "device",
    "dtype",
    "llm",
)


def write_draws(folder: Path, draws: "Mapping[str, np.ndarray]") -> None:
    """``draws.npz`` beside the rows: "metric|split" -> float32 [R] resampled values of an aggregate."""
    import numpy as np

    np.savez(folder / DRAWS_FILE, **{name: np.asarray(v, dtype=np.float32) for name, v in draws.items()})  # type: ignore[arg-type]


@lru_cache(maxsize=256)
def _read_draws(path: Path, _written: float) -> "dict[str, np.ndarray]":
    import numpy as np

    with np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


def read_draws(root: Path, sae_id: str, eval_name: str, run_key: str, metric: str, split: str) -> "np.ndarray | None":
    """The draws behind an aggregate row, None where its evaluation kept none."""
    path = row_dir(root, sae_id, eval_name, run_key) / DRAWS_FILE
    if not path.is_file():
        return None
    return _read_draws(path, path.stat().st_mtime).get(f"{metric}|{split}")


def draws_below(root: Path) -> "Callable[[str, str, str, str, str], np.ndarray | None]":
    """:func:`read_draws` of one results folder that does not change meanwhile. What was asked for is kept, 4 R bytes
    each: a page that compares all pairs of SAEs asks for each as often as there are SAEs."""
    return cache(lambda *source: read_draws(root, *source))


def pairing_of(manifest: Mapping[str, Any]) -> str:
    """Equal for two subjects that one version of an evaluation measured on the same inputs in the same way."""
    inputs = {name: key for name, key in manifest.get("inputs", {}).items() if name != "sae"}
    return sha256_text(canonical_json([manifest.get("stage_version"), manifest.get("config"), inputs]))[:16]


def load_results(root: Path) -> Any:
    """All rows under ``root`` as a DataFrame, provenance, wall time, pairing and task set joined from the manifests."""
    import pandas as pd

    records: list[Mapping[str, Any]] = []
    for folder in row_folders(root):
        manifest = read_manifest(folder)
        made = {**manifest.get("provenance", {}), **manifest.get("counts", {})}
        extra = {name: made.get(name) for name in PROVENANCE_COLUMNS} | {"wall_s": manifest.get("wall_s")}
        extra["pairing"] = pairing_of(manifest)
        # of the tasks asked for; compare tells a mean over fewer of them (" without ...") itself
        extra["task_set"] = str(made.get("task_set") or "").partition(" without ")[0]
        records.extend(asdict(row) | extra for row in read_rows(folder))
    columns = [f.name for f in fields(Row)] + [*PROVENANCE_COLUMNS, "wall_s", "pairing", "task_set"]
    return pd.DataFrame(records, columns=columns)


def current_versions(results: "pd.DataFrame") -> "pd.DataFrame":
    """Without the rows of a version of an evaluation that whoever has them has in a later version too (equal preset and
    task set): nobody needs the old number then. Where one SAE or floor lacks the later version, both stay, apart."""
    stale: list[int] = []
    for _, group in results.groupby(["eval", "preset", "task_set"], sort=False, dropna=False):
        later: set[str] = set()
        for version in sorted(group["eval_version"].unique(), reverse=True):
            rows = group[group["eval_version"] == version]
            if set(rows["sae_id"]) <= later:
                stale += list(rows.index)
            later |= set(rows["sae_id"])
    return results.drop(index=stale) if stale else results
