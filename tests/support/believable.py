"""What a careful reader would check of a table of rows: ranges, intervals, and numbers that must agree with each other.

Used on the fresh rows of every evaluation (``test_versions``) and on the study that is published (``test_believable``).
"""

import math
from collections.abc import Callable
from typing import Any

import pandas as pd

from evals.results import Estimate, Metric, faults

Values = dict[str, float]
"""Aggregates of one subject in one evaluation, by metric; of explanations also by slice."""
DIGITS = 1e-7

EQUAL: dict[str, list[tuple[str, Callable[[Values], float]]]] = {
    "reconstruction": [("explained_variance", lambda v: 1 - v["fvu"])],
    "downstream_loss": [
        (f"ce_recovered_{arm}", lambda v, arm=arm: 1 - v["delta_ce"] / v[f"floor_{arm}_delta_ce"])
        for arm in ("mean", "zero")
    ],
    "transcoding": [("ce_recovered_mean", lambda v: 1 - v["delta_ce"] / v["floor_mean_delta_ce"])],
    "probe_loss": [
        ("gain_vs_random", lambda v: v["floor_random_directions"] - v["probe_loss"]),
        ("gap_closed_pooled", lambda v: v["gain_vs_random"] / (v["floor_random_directions"] - v["dense_loss"])),
        ("probe_loss_ci_task", lambda v: v["probe_loss"]),
        ("floor_chance", lambda v: math.log(2)),
    ],
    "sparse_probing": [
        equation
        for k in (1, 2, 5, 16, 64)
        for equation in (
            (f"sparsity_cost_k{k}", lambda v, k=k: v["dense_auc"] - v[f"auc_k{k}"]),
            (f"gain_vs_channels_k{k}", lambda v, k=k: v[f"auc_k{k}"] - v[f"floor_channels_auc_k{k}"]),
            (f"auc_k{k}_ci_task", lambda v, k=k: v[f"auc_k{k}"]),
        )
    ],
    "n2g": [(f"gain_over_{of}", lambda v, of=of: v["n2g_f1"] - v[f"floor_{of}_f1"]) for of in ("token", "shuffled")],
    "n2g_loss": [
        ("gain_over_bigram", lambda v: v["floor_bigram_ce"] - v["ce_simulated"]),
        ("gain_over_shuffled", lambda v: v["floor_shuffled_delta_ce"] - v["delta_ce"]),
        ("gain_over_shuffled_recovered", lambda v: v["loss_recovered_subset"] - v["floor_shuffled_recovered"]),
    ],
    "explanation": [
        ("balanced_accuracy", lambda v: (v["recall"] + 1 - v["fpr_silent"]) / 2),
        *(
            (f"gain_{name}", lambda v, name=name: v[name] - v[f"floor_{name}"])
            for name in ("auc", "balanced_accuracy", "precision", "precision_at_half", "recall", "phi", "pearson", "r2")
        ),
    ],
}
"""(metric, what it must equal); where a number is missing or is of other units (n), nothing is asked."""

NOT_ABOVE: dict[str, list[tuple[str, str]]] = {
    "reconstruction": [("l0_p05", "l0_p95"), ("dense_frac_10", "dense_frac_01")],
    "n2g": [("n2g_precision_lift", "n2g_precision")],
}

MEANS = {"probe_loss": "task=", "sparse_probing": "task=", "seed_stability": "peer="}
"""Slices whose plain mean is the aggregate, where no task and no latent failed."""


def complaints(rows: pd.DataFrame, metrics: dict[tuple[str, str], Metric]) -> list[str]:
    """In words. ``rows``: columns of :class:`evals.results.Row`; ``metrics`` by (evaluation, name)."""
    found = []
    for row in rows.to_dict("records"):
        where = f"{row['sae_id']} {row['eval']}.{row['metric']} {row['slice']}"
        numbers = {name: _plain(row[name]) for name in ("value", "ci_low", "ci_high", "stderr")}
        estimate = Estimate(**numbers, n=row["n"], n_failed=row["n_failed"], failure=row["failure"] or None)
        found += [f"{where} {fault}" for fault in faults(metrics[row["eval"], row["metric"]], estimate)]
        if (row["status"] == "ok") != (estimate.value is not None):
            found.append(f"{where} is {row['status']} with the value {estimate.value}")
        if estimate.value is not None and row["n"] < 1:
            found.append(f"{where} is made of no unit")
        if row["metric"].startswith("l0") and (estimate.value or 0) > row["d_sae"]:
            found.append(f"{where}: more latents are active than there are")
    for (sae_id, evaluation, _run), part in rows.groupby(["sae_id", "eval", "run_key"]):
        found += [f"{sae_id} {evaluation}: {text}" for text in _agreement(str(evaluation), part)]
    return found


def _plain(number: Any) -> float | None:
    return None if number is None or math.isnan(number) else float(number)


def _agreement(evaluation: str, rows: pd.DataFrame) -> list[str]:
    known = rows[rows.value.notna()]
    grouped = evaluation == "explanation"
    wholes = known.groupby("slice") if grouped else [("", known[known.slice == ""])]
    found = []
    for name, part in wholes:
        value, n = dict(zip(part.metric, part.value, strict=True)), dict(zip(part.metric, part.n, strict=True))
        for metric, expected in EQUAL.get(evaluation, ()):
            found += [f"{name} {text}" for text in _unequal(metric, expected, value, n)]
        for low, high in NOT_ABOVE.get(evaluation, ()):
            if low in value and high in value and value[low] > value[high] + DIGITS:
                found.append(f"{name} {low} {value[low]} is above {high} {value[high]}")
    prefix = MEANS.get(evaluation)
    for metric, part in known.groupby("metric") if prefix else ():
        whole, parts = part[part.slice == ""], part[part.slice.str.startswith(prefix)]
        if len(whole) == 1 and len(parts) and not whole.n_failed.iloc[0] and not parts.n_failed.any():
            if abs(parts.value.mean() - whole.value.iloc[0]) > DIGITS:
                found.append(f"{metric} {whole.value.iloc[0]} is not {parts.value.mean()}, the mean of {prefix[:-1]}s")
    return found


def _unequal(metric: str, expected: Callable[[Values], float], value: Values, n: dict[str, int]) -> list[str]:
    if metric not in value:
        return []
    read: set[str] = set()

    class Noting(dict):
        def __getitem__(self, key: str) -> float:
            read.add(key)
            return super().__getitem__(key)

    try:
        wanted = expected(Noting(value))
    except KeyError:
        return []
    same_units = len({n[name] for name in (*read, metric)}) == 1 or metric.endswith("_ci_task")
    if same_units and abs(value[metric] - wanted) > DIGITS * max(1.0, abs(wanted)):
        return [f"{metric} {value[metric]} should be {wanted}"]
    return []
