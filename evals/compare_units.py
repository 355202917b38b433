"""What a comparison reads of one subject: a value, and resamples of it that pair with those of another. Torch-free.

U units, R resamples. Sources, best first: the stored draws of an aggregate; the sums per unit in ``details.parquet``,
resampled here with one set of weights for all subjects; the row's standard error alone.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from evals.results import DETAILS_FILE, read_draws, row_dir
from evals.uncertainty import resampled_sums, resamples_of
from sae import plugins
from sae.errors import UnknownPlugin
from sae.manifest import read_manifest, rng

if TYPE_CHECKING:
    import pandas as pd

OWN_INPUTS = ("sae", "latents", "exemplars", "scores", "peers")
"""Inputs that are a subject's own by nature; all others must be equal for two rows to be compared."""
SAMPLE_FIELDS = ("seed",)
"""Configuration that draws another sample of the same truth: such rows are compared, but not paired."""


@dataclass(frozen=True, kw_only=True)
class UnitTable:
    """Sums per unit of one metric of one subject: the row is Σ num / Σ den, averaged over the strata."""

    units: tuple[tuple[str, int], ...]
    """(stratum, unit)."""
    num_U: np.ndarray
    den_U: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One row of one subject, and what its resamples can be made from."""

    sae_id: str
    value: float | None
    stderr: float | None
    n: int
    failure: str
    identity: Mapping[str, str]
    """What must agree before two rows are compared: version, preset, dtype, task set, configuration, inputs."""
    sample: str
    """Which sample was drawn; equal samples pair."""
    per_latent: bool
    """The units are the subject's own latents: nothing pairs."""
    preset: str
    draws: np.ndarray | None = None
    table: UnitTable | None = None


@cache
def is_per_latent(evaluation: str) -> bool:
    """Does this evaluation resample latents? True of those that read explained latents or other seeds, unless they say
    that their ``units`` are others."""
    try:
        found = plugins.find("evals.suite", evaluation)
        return bool(found.needs & {"interp", "scores", "peers"}) and getattr(found, "units", "latents") == "latents"
    except UnknownPlugin:  # rows of an outside plug-in: only its own sums could say
        return False


def read_measured(root: Path, row: "pd.Series") -> Measured:
    """The row (of ``evals.results.load_results``) with its draws or sums per unit."""
    sae_id, evaluation, key = str(row["sae_id"]), str(row["eval"]), str(row["run_key"])
    metric, slice_text = str(row["metric"]), str(row["slice"])
    manifest = read_manifest(row_dir(root, sae_id, evaluation, key))
    config = dict(manifest.get("config", {}))
    sample = ",".join(f"{name}={config.pop(name)}" for name in SAMPLE_FIELDS if name in config)
    inputs = {k: v for k, v in manifest.get("inputs", {}).items() if k not in OWN_INPUTS}
    counts = manifest.get("counts", {})
    identity = {"version": str(row["eval_version"]), "preset": str(row["preset"])}
    identity |= {name: str(counts[name]) for name in ("dtype", "task_set") if name in counts}
    identity |= {f"config.{k}": str(v) for k, v in config.items()} | {f"inputs.{k}": v for k, v in inputs.items()}
    known = row["status"] == "ok"
    value = float(row["value"]) if known else None
    draws = table = None
    if value is not None:
        if slice_text == "":
            draws = read_draws(root, sae_id, evaluation, key, metric, str(row["split"]))
        table = unit_table(root, sae_id, evaluation, key, metric, slice_text, value)
    stderr = row["stderr"]
    return Measured(
        sae_id=sae_id, value=value, stderr=None if stderr is None or math.isnan(stderr) else float(stderr),
        n=int(row["n"]), failure="" if known else str(row["failure"] or row["status"]), identity=identity,
        sample=sample, per_latent=is_per_latent(evaluation), preset=str(row["preset"]), draws=draws, table=table,
    )  # fmt: skip


def unit_table(
    root: Path, sae_id: str, evaluation: str, key: str, metric: str, slice_text: str, value: float
) -> UnitTable | None:
    """Sums per unit from the details; None where they hold none or do not give the row's value back.

    Ratio columns ``<metric>.num`` / ``.den`` belong to the aggregate (slice ""); a column ``task`` makes strata, in
    which groups are the units. Long tables (slice, metric, unit, value, floor) hold one value per unit; ``floor_`` and
    ``gain_`` metrics follow from them.
    """
    import pandas as pd

    path = row_dir(root, sae_id, evaluation, key) / DETAILS_FILE
    if not path.is_file():
        return None
    details = pd.read_parquet(path)
    if slice_text == "" and f"{metric}.num" in details:
        strata = details["task"].astype(str) if "task" in details else pd.Series("", index=details.index)
        unit = details["group"] if "group" in details else details["unit"]
        num, den = details[f"{metric}.num"], details[f"{metric}.den"]
    elif {"slice", "metric", "unit", "value", "floor"} <= set(details):
        kind, _, rest = metric.partition("_")
        plain = rest if kind in ("floor", "gain") else metric
        details = details[(details["slice"] == slice_text) & (details["metric"] == plain)]
        strata, unit, num = pd.Series("", index=details.index), details["unit"], details["value"]
        if plain != metric:
            num = details["floor"] if kind == "floor" else details["value"] - details["floor"]
        den = pd.Series(1.0, index=details.index)
    else:
        return None
    flat = pd.DataFrame({"s": strata, "u": unit, "num": num, "den": den}).dropna()
    flat = flat.groupby(["s", "u"], sort=True)[["num", "den"]].sum()
    table = UnitTable(
        units=tuple((str(s), int(u)) for s, u in flat.index),
        num_U=flat["num"].to_numpy(dtype=np.float64), den_U=flat["den"].to_numpy(dtype=np.float64),
    )  # fmt: skip
    again = _mean_over_strata(table)
    return table if again is not None and math.isclose(again, value, rel_tol=1e-6, abs_tol=1e-9) else None


def _strata(units: Sequence[tuple[str, int]]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for i, (stratum, _) in enumerate(units):
        found.setdefault(stratum, []).append(i)
    return found


def _mean_over_strata(table: UnitTable) -> float | None:
    parts = [(table.num_U[i].sum(), table.den_U[i].sum()) for i in _strata(table.units).values()]
    if not parts or any(den == 0 for _, den in parts):
        return None
    return float(np.mean([num / den for num, den in parts]))


def difference_between(a: Measured, b: Measured) -> str:
    """Why two rows may not be compared: ``config.tokens: 4096, 65536``; empty if they may (METRICS 2)."""
    names = sorted(a.identity.keys() | b.identity.keys())
    wrong = [n for n in names if a.identity.get(n) != b.identity.get(n)]
    return "; ".join(f"{n}: {a.identity.get(n, 'none')[:24]}, {b.identity.get(n, 'none')[:24]}" for n in wrong)


def common_draws(members: Sequence[Measured], purpose: str) -> tuple[list[np.ndarray] | None, str]:
    """Resamples [R] of every member by one method, and its name; None where some member has no error estimate.

    Members on one sample share their resampling weights, so that differences are paired (METRICS 3.2); latents of
    different subjects do not pair, and neither do different samples.
    """
    lengths = {len(m.draws) for m in members if m.draws is not None}
    if all(m.draws is not None for m in members) and len(lengths) == 1:
        one_sample = len({m.sample for m in members}) == 1 and len({m.n for m in members}) == 1
        paired = one_sample and not members[0].per_latent
        # Draws of one generator over other units would pair by accident of their order: shuffle them.
        drawn = [m.draws.astype(np.float64) for m in members if m.draws is not None]
        if not paired:
            drawn = [rng("compare", purpose, m.sae_id).permutation(d) for m, d in zip(members, drawn, strict=True)]
        return drawn, "paired draws" if paired else "unpaired draws"
    tables = [m.table for m in members]
    if all(t is not None for t in tables):
        together = not members[0].per_latent and len({m.sample for m in members}) == 1
        every = sorted({u for t in tables if t is not None for u in t.units})
        drawn = [_resample(m, every if together else None, purpose) for m in members]
        name = "paired units" if together else "unpaired latents" if members[0].per_latent else "unpaired units"
        return drawn, name
    if all(m.stderr is not None and m.value is not None for m in members):
        resamples = resamples_of(members[0].preset)
        noise = (rng("compare", purpose, m.sae_id, "row").normal(size=resamples) for m in members)
        drawn = [m.value + m.stderr * z for m, z in zip(members, noise, strict=True)]  # type: ignore[operator]
        return drawn, "unpaired, from standard errors"
    return None, "no error estimate"


def _resample(member: Measured, every: Sequence[tuple[str, int]] | None, purpose: str) -> np.ndarray:
    """[R] resampled values. With ``every`` (the units of all members) the weights depend on the units alone; a unit
    that a member lacks adds nothing to its sums."""
    table = member.table
    assert table is not None
    units: Sequence[tuple[str, int]] = table.units if every is None else every
    place = {unit: i for i, unit in enumerate(units)}
    sums = np.zeros((len(units), 2))
    sums[[place[u] for u in table.units]] = np.stack([table.num_U, table.den_U], axis=1)
    who: tuple[Any, ...] = (member.sae_id,) if every is None else (member.sample,)
    values = []
    for stratum, rows in _strata(units).items():
        total = resampled_sums(sums[rows], rng("compare", purpose, *who, stratum), resamples_of(member.preset))
        with np.errstate(all="ignore"):
            values.append(np.where(total[:, 1] == 0, np.nan, total[:, 0] / total[:, 1]))
    return np.asarray(np.mean(values, axis=0))
