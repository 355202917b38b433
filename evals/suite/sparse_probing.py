"""F. k-sparse probing: how much of a known feature do k latents carry? (METRICS F)

For each labelled task the k latents whose class means lie farthest apart on train, an L2 logistic regression on them,
and its score on test. Tasks, cleaning, splits and prompts are those of probe_loss; groups of prompts are the unit of
every interval.
"""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from evals import uncertainty
from evals.base import EvalContext, EvalResult, RowMaker
from evals.probe_activations import ProbeActivations, ProbeConfig, TaskSplit
from evals.probe_units import by_block, group_weights, scored_set, sums_by_unit, weighted_auc
from evals.results import Estimate, Metric
from sae.config import to_dict
from sae.manifest import rng

if TYPE_CHECKING:
    import pandas as pd

    from evals.sparse_probes import Features, KProbe

KS = (1, 2, 5, 16, 64)
HEADLINE_KS = (1, 5, 16)
KS_OF = {"quick": HEADLINE_KS, "tiny": (1, 5), "paper": KS}
SHUFFLED_K = 5
SHUFFLED = "floor_shuffled_auc"
MAX_RESAMPLES = 2_000
SOURCE = "protocol of sae-probes (arXiv 2502.16681), on cleaned tasks; METRICS F"
BY_GROUP = "Interval: groups of prompts inside each task."


def _metric(
    name: str, title: str, better: Literal["higher", "lower", "neither"], description: str, *, unit: str = "AUC",
    low: float = 0.0, high: float = 1.0, headline: bool = False,
) -> Metric:
    return Metric(name=name, title=title, unit=unit, better=better, description=description, reference=SOURCE,
                  low=low, high=high, headline=headline)


def _of_k(k: int) -> tuple[Metric, ...]:
    """The metrics of one k."""
    many = "1 latent" if k == 1 else f"{k} latents"
    return (
        _metric(f"auc_k{k}", f"Probe AUC, {many}", "higher",
                f"Mean over tasks of the test AUC of a logistic probe on {many}, chosen on train by the distance of "
                "the class means over the mean active value. " + BY_GROUP, headline=k in HEADLINE_KS),
        _metric(f"acc_k{k}", f"Probe accuracy, {many}", "higher", "Its test accuracy. " + BY_GROUP, unit="share"),
        _metric(f"f1_k{k}", f"Probe F1, {many}", "higher",
                "Its F1 of the positive class on test. " + BY_GROUP, unit="F1"),
        _metric(f"ce_k{k}", f"Probe loss, {many}", "lower",
                "Its test cross-entropy. " + BY_GROUP, unit="nats", high=math.inf),
        _metric(f"sparsity_cost_k{k}", f"Cost of sparsity, {many}", "lower",
                f"AUC of the dense probe minus auc_k{k}. " + BY_GROUP, low=-1.0),
        _metric(f"gain_vs_channels_k{k}", f"Gain over channels, {many}", "higher",
                f"auc_k{k} minus the same on as many channels, on the same prompts. " + BY_GROUP, low=-1.0),
        _metric(f"floor_channels_auc_k{k}", f"Floor: channels, k = {k}", "neither",
                "The same protocol on the raw channels. " + BY_GROUP),
        _metric(f"floor_random_auc_k{k}", f"Floor: random codes, k = {k}", "neither",
                "The same on codes of as many random directions, the largest kept at equal L0. " + BY_GROUP),
    )  # fmt: skip


METRICS = (
    *(metric for k in KS for metric in _of_k(k)),
    *(_metric(f"auc_k{k}_ci_task", f"Probe AUC, k = {k}, other tasks", "higher",
              f"auc_k{k}. Interval: tasks, resampled by family.") for k in HEADLINE_KS),
    _metric(SHUFFLED, "Floor: shuffled labels", "neither",
            f"auc_k{SHUFFLED_K} with the labels of train shuffled before latents are chosen; 0.5 is chance. Interval: "
            "tasks, each with a shuffle of its own, which moves it more than the prompts do."),
    _metric("dense_auc", "Ceiling: dense probe", "neither",
            "Test AUC of an L2 logistic probe on all channels. " + BY_GROUP),
)  # fmt: skip
_DIFFERENCES = ("sparsity_cost", "gain_vs_channels")


class Scored(NamedTuple):
    """One (task, seed): labels, groups and logits on its test rows, by the name of the probe."""

    label: np.ndarray
    unit: np.ndarray
    logits: dict[str, np.ndarray]
    """`k<k>`, `channels_k<k>`, `random_k<k>`, `shuffled`, `dense`."""
    columns: dict[int, np.ndarray]
    """Chosen latents by k."""


class SparseProbing:
    """The plug-in."""

    name = "sparse_probing"
    title = "k-sparse probing"
    version = 2
    metrics: tuple[Metric, ...] = METRICS
    needs = frozenset({"probes"})
    uses = frozenset({"sparse"})
    more_tasks = True
    """Reads the tasks of ``--tasks`` beside the preset's."""
    """Channels and random directions, which have features alone, are floors of every row here."""

    def config(self, preset: str) -> dict[str, Any]:
        """The probe set of the preset, and k; own tasks enter through the key of the probe activations."""
        resamples = min(MAX_RESAMPLES, uncertainty.resamples_of(preset))
        return to_dict(ProbeConfig.of_preset(preset)) | {"ks": list(KS_OF[preset]), "resamples": resamples}

    def inputs(self, ctx: EvalContext) -> dict[str, str]:
        return {"probes": ctx.probes.key}

    def run(self, ctx: EvalContext) -> EvalResult:
        """Rows of all tasks together and of each; details per (task, seed, group)."""
        probes: ProbeActivations = ctx.probes
        ks = KS_OF[ctx.preset]
        found = _all_probes(ctx, probes, ks)
        scored = _by_task(probes, found)
        rows = RowMaker(self, ctx)
        values = {task: _task_values(entries, task, ctx) for task, entries in scored.items()}
        _add_rows(rows, values, scored, probes, ks, ctx)
        counts = {
            "n_tasks": len(scored), "n_prompts": len(probes.x_ND),
            "task_set": scored_set(probes.task_set, [s.task for s in probes.splits], list(scored)),
            "n_short": sum(len(e.columns[k]) < k for entries in scored.values() for e in entries for k in ks),
            "task_failures": probes.failures, "dtype": "float32", **probes.marks(ctx.subject.info),
        }  # fmt: skip
        return EvalResult(rows=rows.rows, details=_details(scored), counts=counts, draws=rows.draws)


def _all_probes(ctx: EvalContext, probes: ProbeActivations, ks: Sequence[int]) -> "dict[str, list[KProbe | None]]":
    """By name of the probe, one per split: those of the subject, and the floors that all subjects share."""
    import torch

    from evals.probe_search import dense_probes
    from evals.sparse_probes import DenseFeatures, KProbe, codes_of, random_topk

    x_ND = torch.from_numpy(np.array(probes.x_ND))
    subject = codes_of(ctx.subject, x_ND)
    n, width = len(x_ND), ctx.subject.info.d_sae
    train = np.unique(np.concatenate([s.train for s in probes.splits]))
    found = {f"k{k}": p for k, p in _fit(subject, probes, ks, "k-sparse probes").items()}
    tag = f"{probes.key}.{','.join(map(str, ks))}"
    channels = ctx.memo(f"sparse_channels.{tag}", lambda: _fit(
        DenseFeatures(lambda columns: x_ND[:, columns], n, x_ND.shape[1]), probes, ks, "k-sparse probes: channels"))
    l0 = max(1, round(subject.l0))
    random = ctx.memo(f"sparse_random.{tag}.{width}.{l0}.{ctx.seed}", lambda: _fit(
        random_topk(x_ND, train, width, l0, ctx.seed), probes, ks, "k-sparse probes: random codes"))
    found |= {f"random_k{k}": p for k, p in random.items()}
    found |= {f"channels_k{k}": p for k, p in channels.items()}
    found["shuffled"] = _fit(subject, probes, (SHUFFLED_K,), "k-sparse probes: shuffled", ctx.seed)[SHUFFLED_K]
    dense = ctx.memo(f"probe_dense.{probes.key}", lambda: dense_probes(probes))
    found["dense"] = [KProbe(np.zeros(0, dtype=np.int64), d.scores.logit_N, d.c) for d in dense]
    return found  # fmt: skip


def _fit(
    features: "Features", probes: ProbeActivations, ks: Sequence[int], title: str, shuffle: int | None = None
) -> "dict[int, list[KProbe | None]]":
    """Per k one probe per split, None where no feature is ranked. ``shuffle``: seed of permuted train labels."""
    from evals.probes import grouped_folds
    from evals.sparse_probes import KProbe, best_columns, probe_k
    from sae.console import track

    label_N, group_N = probes.rows.label.to_numpy(), probes.rows.group.to_numpy()
    label_of = [label_N] * len(probes.splits)
    if shuffle is not None:
        label_of = [_shuffled(label_N, split, shuffle) for split in probes.splits]
    score_SF = (
        features.scores(label_N, probes.splits)
        if shuffle is None
        else np.concatenate([features.scores(y, [s]) for y, s in zip(label_of, probes.splits, strict=True)])
    )
    found: dict[int, list[KProbe | None]] = {k: [] for k in ks}
    for s, split in enumerate(track(probes.splits, title, unit="task")):
        y = label_of[s][split.train]
        fold_N = grouped_folds(group_N[split.train], y)
        columns = best_columns(score_SF[s], max(ks))
        x_NK = features.take(columns)
        for k in ks:
            if not len(columns):
                found[k].append(None)
                continue
            logit, c = probe_k(x_NK[split.train, :k], y, fold_N, x_NK[split.test, :k])
            found[k].append(KProbe(columns[:k], logit, c))
    return found


def _shuffled(label_N: np.ndarray, split: TaskSplit, seed: int) -> np.ndarray:
    label = label_N.copy()
    draw = rng(seed, "sparse_probing", "shuffled", split.task, split.seed)
    label[split.train] = draw.permutation(label[split.train])
    return label


def _by_task(probes: ProbeActivations, found: "Mapping[str, list[KProbe | None]]") -> dict[str, list[Scored]]:
    """Per task one entry per seed; a task in which some probe has no feature is left out (the caller counts it)."""
    label_N, group_N = probes.rows.label.to_numpy(), probes.rows.group.to_numpy()
    scored: dict[str, list[Scored]] = {}
    bad: set[str] = set()
    for s, split in enumerate(probes.splits):
        of_split = {name: of_probe[s] for name, of_probe in found.items()}
        logits = {name: probe.logit_N for name, probe in of_split.items() if probe is not None}
        columns = {int(name[1:]): p.columns for name, p in of_split.items() if p is not None and name[1:].isdigit()}
        if len(logits) < len(found):
            bad.add(split.task)
            continue
        scored.setdefault(split.task, []).append(Scored(label_N[split.test], group_N[split.test], logits, columns))
    return {task: entries for task, entries in scored.items() if task not in bad}


def _task_values(entries: Sequence[Scored], task: str, ctx: EvalContext) -> dict[str, np.ndarray]:
    """[1 + R] per metric: the value, then its resamples; means over the split seeds, same weights for all metrics."""
    resamples = min(MAX_RESAMPLES, uncertainty.resamples_of(ctx.preset))
    blocks = group_weights([e.unit for e in entries], rng(ctx.seed, "sparse_probing", task), resamples)

    def means_over_seeds(weights: np.ndarray) -> dict[str, np.ndarray]:
        per_seed = [_entry_values(e, weights) for e in entries]
        return {name: np.mean([found[name] for found in per_seed], axis=0) for name in per_seed[0]}

    values = by_block(blocks, means_over_seeds)
    for k in entries[0].columns:
        values[f"sparsity_cost_k{k}"] = values["dense_auc"] - values[f"auc_k{k}"]
        values[f"gain_vs_channels_k{k}"] = values[f"auc_k{k}"] - values[f"floor_channels_auc_k{k}"]
    return values


def _entry_values(e: Scored, weights: np.ndarray) -> dict[str, np.ndarray]:
    """[b] per metric, of one block of weights [b, U]."""
    found: dict[str, np.ndarray] = {}
    for name, logit in e.logits.items():
        auc = weighted_auc(logit, e.label, e.unit, weights)
        kind, _, k = name.rpartition("_")
        metric = {"shuffled": SHUFFLED, "dense": "dense_auc"}.get(name)
        found[metric or (f"floor_{kind}_auc_{k}" if kind else f"auc_{name}")] = auc
        if metric or kind:
            continue
        loss, said, true = _per_row(logit, e.label)
        columns = [loss, (said == true).astype(np.float64), (said & true).astype(np.float64),
                   said.astype(np.float64) + true]  # fmt: skip
        sums = weights @ sums_by_unit(e.unit, columns, weights.shape[1])
        with np.errstate(invalid="ignore", divide="ignore"):
            found[f"ce_{name}"], found[f"acc_{name}"] = sums[:, 1] / sums[:, 0], sums[:, 2] / sums[:, 0]
            found[f"f1_{name}"] = 2 * sums[:, 3] / sums[:, 4]
    return found


def _per_row(logit_N: np.ndarray, label_N: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(cross-entropy in nats, called positive, is positive)."""
    true = label_N > 0
    return np.logaddexp(0.0, np.where(true, -logit_N, logit_N)), logit_N > 0, true


def _add_rows(
    rows: RowMaker, values: Mapping[str, Mapping[str, np.ndarray]], scored: Mapping[str, Sequence[Scored]],
    probes: ProbeActivations, ks: Sequence[int], ctx: EvalContext,
) -> None:
    groups = {task: len(np.unique(np.concatenate([e.unit for e in entries]))) for task, entries in scored.items()}
    asked = {split.task for split in probes.splits} | probes.failures.keys()
    shown = [f"auc_k{k}" for k in ks if k in HEADLINE_KS]
    for task, of_task in values.items():
        for metric in (*shown, "dense_auc"):
            v = of_task[metric]
            rows.add(metric, uncertainty.summarise(float(v[0]), v[1:], groups[task]), slice=f"task={task}",
                     split="heldout")  # fmt: skip
    for task in sorted(asked - values.keys()):
        code = probes.failures.get(task, "no_active_latent")
        for metric in shown:
            rows.add(metric, Estimate.undefined(code), slice=f"task={task}", split="heldout")
    n_failed = len(asked) - len(values)
    if not values:
        for metric in shown:
            rows.add(metric, Estimate.undefined("no_active_latent", n_failed=n_failed), split="heldout")
        return
    n = sum(groups.values())
    for metric in (m.name for m in METRICS):
        if metric == SHUFFLED:
            of_tasks = [float(v[metric][0]) for v in values.values()]
            rows.add(metric, uncertainty.mean(
                of_tasks, rng(ctx.seed, "sparse_probing", SHUFFLED), resamples=uncertainty.resamples_of(ctx.preset),
                n_failed=n_failed), split="heldout")  # fmt: skip
        elif metric in next(iter(values.values())):
            mean = np.mean([of_task[metric] for of_task in values.values()], axis=0)
            rows.add(metric, uncertainty.summarise(float(mean[0]), mean[1:], n, n_failed), split="heldout")
    for metric in shown:
        estimate = uncertainty.mean_by_family(
            [float(v[metric][0]) for v in values.values()], [probes.families[t] for t in values],
            rng(ctx.seed, "sparse_probing", "families"), resamples=uncertainty.resamples_of(ctx.preset),
        )  # fmt: skip
        rows.add(f"{metric}_ci_task", estimate, split="heldout")


def _details(scored: Mapping[str, Sequence[Scored]]) -> "pd.DataFrame":
    """One line per (task, seed, group) of the test sides, with the latents chosen. Σ num / Σ den of `ce_k`, `acc_k`
    over all lines is the mean over tasks and seeds."""
    import pandas as pd

    parts = []
    for task, entries in scored.items():
        for seed_index, e in enumerate(entries):
            units, inverse = np.unique(e.unit, return_inverse=True)
            columns: dict[str, Any] = {"task": task, "split_seed": seed_index, "group": units}
            share = 1.0 / (len(e.unit) * len(entries))
            for k, chosen in e.columns.items():
                loss, said, true = _per_row(e.logits[f"k{k}"], e.label)
                sums = sums_by_unit(inverse, [loss, (said == true).astype(np.float64)], len(units)) * share
                for i, name in enumerate(("ce", "acc"), start=1):
                    columns[f"{name}_k{k}.num"], columns[f"{name}_k{k}.den"] = sums[:, i], sums[:, 0]
                columns[f"latents_k{k}"] = " ".join(map(str, chosen))
            parts.append(pd.DataFrame(columns))
    table = pd.concat(parts, ignore_index=True) if parts else pd.DataFrame({"task": []})
    return table.assign(unit=np.arange(len(table), dtype=np.int64))


PLUGIN = SparseProbing()
