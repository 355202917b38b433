"""C. Probe loss: does one latent carry a known feature? (METRICS C)

For each labelled task the best 1-d logistic probe over all latents, chosen and fitted on train, scored on test. Rows of
a task fall into groups (near-duplicates, variants of one question); groups are the unit of every interval.
"""

import math
from collections.abc import Iterator, Sequence
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

    from evals.probe_search import Search
    from evals.probes import DenseProbe

GAO = "Gao et al. 2024 (arXiv 2406.04093) 4.2"
BY_GROUP = "Interval: groups of prompts inside each task."
CHANCE = math.log(2)
MIN_GAP = 0.01
"""Mean nats between random directions and the dense probe below which their gap means nothing."""


def _metric(
    name: str, title: str, better: Literal["higher", "lower", "neither"], description: str,
    reference: str = "METRICS C.3", *, unit: str = "nats", low: float = 0.0, high: float = math.inf,
    headline: bool = False,
) -> Metric:
    return Metric(name=name, title=title, unit=unit, better=better, description=description, reference=reference,
                  low=low, high=high, headline=headline)


METRICS = (
    _metric("probe_loss", "Probe loss", "lower",
            "Mean over tasks of the test cross-entropy of the latent with the least train cross-entropy "
            "(pre-activations, 1-d logistic probe). Chance is ln 2. " + BY_GROUP,
            f"{GAO}; ours is held out, theirs in-sample", headline=True),
    _metric("probe_loss_insample", "Probe loss, in-sample", "lower",
            "Mean over tasks of the least train cross-entropy over latents: the paper's number. " + BY_GROUP, GAO),
    _metric("probe_loss_post", "Probe loss, post-activations", "lower",
            "probe_loss on post-activations, latent chosen anew. " + BY_GROUP),
    _metric("probe_loss_ci_task", "Probe loss, other tasks", "lower",
            "probe_loss. Interval: tasks, resampled by family.", "METRICS 3.3"),
    _metric("probe_loss_family_mean", "Probe loss, mean of families", "lower",
            "Mean over task families of the family's mean test cross-entropy. Interval: families.", "METRICS 3.3"),
    _metric("probe_auc", "Probe AUC", "higher",
            "Mean over tasks of the test AUC of the chosen latent's probe. " + BY_GROUP, unit="AUC", high=1.0),
    _metric("probe_acc", "Probe accuracy", "higher",
            "Mean over tasks of the test accuracy of that probe. " + BY_GROUP, unit="share", high=1.0),
    _metric("gap_closed_pooled", "Gap closed", "higher",
            "sum over tasks of (random - latent) / sum of (random - dense) in test cross-entropy: 0 for random "
            "directions, 1 for the dense probe. Undefined below a mean gap of 0.01 nats. " + BY_GROUP,
            "METRICS C.3, there per task and then the mean: one task of a small gap ruled it (decision 029)",
            unit="share", low=-math.inf),
    _metric("gain_vs_random", "Gain over random directions", "higher",
            "Mean over tasks of floor_random_directions minus probe_loss, on the same prompts. " + BY_GROUP,
            low=-math.inf),
    _metric("floor_random_directions", "Floor: random directions", "neither",
            "probe_loss of as many Gaussian directions as there are latents. " + BY_GROUP),
    _metric("floor_chance", "Floor: chance", "neither",
            "ln 2, the loss of always answering one half; classes are balanced."),
    _metric("dense_loss", "Ceiling: dense probe", "neither",
            "Test cross-entropy of an L2 logistic probe on all channels, C by grouped cross-validation on train. "
            + BY_GROUP),
)
TASK_METRICS = ("probe_loss", "probe_loss_insample", "probe_auc", "floor_random_directions", "dense_loss")


class Scored(NamedTuple):
    """One (task, seed): what each probe did on its rows. Arrays over test rows but for the two of train."""

    label: np.ndarray
    unit: np.ndarray
    """Group of each test row."""
    logit: np.ndarray
    loss: dict[str, np.ndarray]
    """probe_loss, probe_loss_post (if measured), floor_random_directions, dense_loss."""
    train_loss: np.ndarray
    train_unit: np.ndarray
    feature: int


PROMPT_TOKENS = 40
"""Of a prompt of the shipped tasks, on average (METRICS C.3)."""


class ProbeLoss:
    """The plug-in."""

    name = "probe_loss"
    title = "Probe loss"
    version = 3
    metrics: tuple[Metric, ...] = METRICS
    needs = frozenset({"probes"})
    uses = frozenset({"features"})

    def config(self, preset: str) -> dict[str, Any]:
        """The probe set of the preset; own tasks enter through the key of the probe activations."""
        return to_dict(ProbeConfig.of_preset(preset)) | {"resamples": uncertainty.resamples_of(preset)}

    def lm_tokens(self, preset: str, n_subjects: int) -> tuple[int, int]:
        """Tokens (below, above) the hookpoint, for ``--dry-run``: the prompts, read once for all subjects."""
        cfg = ProbeConfig.of_preset(preset)
        return 2 * cfg.cap_rows * len(cfg.tasks) * min(cfg.max_tokens, PROMPT_TOKENS), 0

    def inputs(self, ctx: EvalContext) -> dict[str, str]:
        return {"probes": ctx.probes.key}

    def run(self, ctx: EvalContext) -> EvalResult:
        """Rows of all tasks together and of each; details per (task, seed, group)."""
        import torch

        from evals.probe_search import dense_block, dense_probes, random_directions_block, search, sparse_block

        probes: ProbeActivations = ctx.probes
        splits = probes.splits
        x_ND = torch.from_numpy(np.array(probes.x_ND))
        y_N = torch.from_numpy(probes.rows.label.to_numpy(copy=True)).float()
        n, n_features, subject = len(x_ND), ctx.subject.info.d_sae, ctx.subject

        def random_floor() -> "Search":
            train = np.unique(np.concatenate([s.train for s in splits]))
            block = random_directions_block(x_ND, train, n_features, ctx.seed)
            return search(block, n_features, n, y_N, splits, "probes: random directions")

        pre = search(dense_block(subject.features, x_ND), n_features, n, y_N, splits, "probes: latents")
        post = None
        if "sparse" in subject.provides:
            with torch.inference_mode():
                latents = subject.encode_sparse(x_ND)
            post = search(sparse_block(latents, n), n_features, n, y_N, splits, "probes: active latents")
        floor = ctx.memo(f"probe_random.{probes.key}.{n_features}.{ctx.seed}", random_floor)
        dense = ctx.memo(f"probe_dense.{probes.key}", lambda: dense_probes(probes))
        scored = _by_task(probes, splits, pre, post, floor, dense)
        rows = RowMaker(self, ctx)
        _add_rows(rows, scored, probes, ctx, n_asked=len(scored) + len(probes.failures))
        counts = {
            "n_tasks": len(scored), "task_set": scored_set(probes.task_set, [s.task for s in splits], list(scored)),
            "n_prompts": n, "n_tokens": probes.meta["n_tokens"],
            "n_constant": pre.n_constant, "n_nonfinite": pre.n_nonfinite, "n_unconverged": pre.n_unconverged,
            "task_failures": probes.failures, "tasks_missing": sorted(probes.meta["missing"]), "dtype": "float32",
        }  # fmt: skip
        return EvalResult(rows=rows.rows, details=_details(scored), counts=counts, draws=rows.draws)


def _by_task(
    probes: ProbeActivations, splits: Sequence[TaskSplit], pre: "Search", post: "Search | None", floor: "Search",
    dense: "Sequence[DenseProbe]",
) -> dict[str, list[Scored]]:
    """Per task one entry per seed; a task without a finite feature is left out (the caller counts it)."""
    label_N, group_N = probes.rows.label.to_numpy(), probes.rows.group.to_numpy()
    scored: dict[str, list[Scored]] = {}
    for s, split in enumerate(splits):
        chosen, random = pre.choices[s], floor.choices[s]
        if chosen is None or random is None:
            continue
        loss = {"probe_loss": chosen.test.loss_N, "floor_random_directions": random.test.loss_N,
                "dense_loss": dense[s].scores.loss_N}
        best_post = post.choices[s] if post is not None else None
        if best_post is not None:
            loss["probe_loss_post"] = best_post.test.loss_N
        scored.setdefault(split.task, []).append(Scored(
            label_N[split.test], group_N[split.test], chosen.test.logit_N, loss, chosen.train.loss_N,
            group_N[split.train], chosen.feature,
        ))
    return scored


def task_values(entries: Sequence[Scored], blocks: Iterator[np.ndarray]) -> dict[str, np.ndarray]:
    """[1 + R] per metric: the value, then its resamples; means over the split seeds, same weights for all metrics."""
    values = by_block(blocks, lambda weights: _means_over_seeds(entries, weights))
    values["gain_vs_random"] = values["floor_random_directions"] - values["probe_loss"]
    return values


def _means_over_seeds(entries: Sequence[Scored], weights: np.ndarray) -> dict[str, np.ndarray]:
    """[b] per metric, of one block of weights [b, U]."""
    n_units = weights.shape[1]
    per_seed: list[dict[str, np.ndarray]] = []
    for e in entries:
        names = sorted(e.loss)
        columns = [*(e.loss[name] for name in names), ((e.logit > 0) == (e.label > 0)).astype(np.float64)]
        sums = weights @ sums_by_unit(e.unit, columns, n_units)
        train = weights @ sums_by_unit(e.train_unit, [e.train_loss], n_units)
        with np.errstate(invalid="ignore", divide="ignore"):
            means = sums[:, 1:] / sums[:, :1]
            found = {name: means[:, i] for i, name in enumerate((*names, "probe_acc"))}
            found["probe_loss_insample"] = train[:, 1] / train[:, 0]
        found["probe_auc"] = weighted_auc(e.logit, e.label, e.unit, weights)
        per_seed.append(found)
    return {name: np.mean([found[name] for found in per_seed], axis=0) for name in per_seed[0]}


def split_of(metric: str) -> str:
    """The side of a task that a metric is taken on."""
    return "insample" if metric == "probe_loss_insample" else "heldout"


def pooled_gap(values: Sequence[dict[str, np.ndarray]], n: int, n_failed: int) -> Estimate:
    """sum (random - latent) / sum (random - dense) over tasks, from [1 + R] values of each task; ``n`` groups.

    `too_few_rows` without tasks, `no_effect` where the dense probe is hardly better than random directions.
    """
    if not values:
        return Estimate.undefined("too_few_rows", n_failed=n_failed)
    parts = ("gain_vs_random", "floor_random_directions", "dense_loss")
    gain, random, dense = (np.mean([v[name] for v in values], axis=0) for name in parts)
    gap = random - dense
    if gap[0] < MIN_GAP:
        return Estimate.undefined("no_effect", n=n, n_failed=n_failed)
    # a resampled gap near 0 is held at the bound, so that no single one rules the interval
    share = gain / np.maximum(gap, MIN_GAP)
    return uncertainty.summarise(float(share[0]), share[1:], n, n_failed)


def _weights(entries: Sequence[Scored], task: str, ctx: EvalContext) -> Iterator[np.ndarray]:
    """Over the groups that any split of the task uses; depends on no subject."""
    units = [side for e in entries for side in (e.unit, e.train_unit)]
    return group_weights(units, rng(ctx.seed, "probe_loss", task), uncertainty.resamples_of(ctx.preset))


def _add_rows(
    rows: RowMaker, scored: dict[str, list[Scored]], probes: ProbeActivations, ctx: EvalContext, *, n_asked: int
) -> None:
    values = {task: task_values(entries, _weights(entries, task, ctx)) for task, entries in scored.items()}
    n_groups = {task: {split: len(np.unique(np.concatenate([getattr(e, name) for e in entries])))
                       for split, name in (("heldout", "unit"), ("insample", "train_unit"))}
                for task, entries in scored.items()}  # fmt: skip

    def add(metric: str, per_task: dict[str, np.ndarray], n_failed: int = 0, part: str = "") -> None:
        mean, split = np.mean(list(per_task.values()), axis=0), split_of(metric)
        n = sum(n_groups[task][split] for task in per_task)
        rows.add(metric, uncertainty.summarise(float(mean[0]), mean[1:], n, n_failed), slice=part, split=split)

    for task, of_task in values.items():
        for metric in TASK_METRICS:
            add(metric, {task: of_task[metric]}, part=f"task={task}")
    for task, code in probes.failures.items():
        rows.add("probe_loss", Estimate.undefined(code), slice=f"task={task}", split="heldout")
    for metric in (m.name for m in METRICS):
        per_task = {task: v[metric] for task, v in values.items() if metric in v}
        if metric == "floor_chance":
            rows.add(metric, Estimate(value=CHANCE, n=len(values)), split="heldout")
        elif per_task:
            add(metric, per_task, n_asked - len(per_task))
        elif metric == "probe_loss":
            rows.add(metric, Estimate.undefined("too_few_rows", n_failed=n_asked), split="heldout")
    gap = pooled_gap(list(values.values()), sum(n["heldout"] for n in n_groups.values()), n_asked - len(values))
    rows.add("gap_closed_pooled", gap, split="heldout")
    if values:
        _add_family_rows(rows, {task: float(v["probe_loss"][0]) for task, v in values.items()}, probes.families, ctx)


def _add_family_rows(rows: RowMaker, loss: dict[str, float], families: dict[str, str], ctx: EvalContext) -> None:
    resamples = uncertainty.resamples_of(ctx.preset)
    by_task = uncertainty.mean_by_family(
        list(loss.values()), [families[t] for t in loss], rng(ctx.seed, "probe_loss", "families"), resamples=resamples
    )
    rows.add("probe_loss_ci_task", by_task, split="heldout")
    members: dict[str, list[float]] = {}
    for task, value in loss.items():
        members.setdefault(families[task], []).append(value)
    means = [float(np.mean(members[name])) for name in sorted(members)]
    estimate = uncertainty.mean(means, rng(ctx.seed, "probe_loss", "family_mean"), resamples=resamples)
    rows.add("probe_loss_family_mean", estimate, split="heldout")


def _details(scored: dict[str, list[Scored]]) -> "pd.DataFrame":
    """One line per (task, seed, group) of the test sides. For each loss, Σ num / Σ den over all lines is the mean over
    tasks (and seeds), so that two subjects can be compared group by group."""
    import pandas as pd

    parts = []
    for task, entries in scored.items():
        for seed_index, e in enumerate(entries):
            units, inverse = np.unique(e.unit, return_inverse=True)
            sums = sums_by_unit(inverse, list(e.loss.values()), len(units))
            share = 1.0 / (len(e.unit) * len(entries))
            columns: dict[str, Any] = {"task": task, "split_seed": seed_index, "group": units, "feature": e.feature}
            for i, name in enumerate(e.loss, start=1):
                columns[f"{name}.num"], columns[f"{name}.den"] = sums[:, i] * share, sums[:, 0] * share
            parts.append(pd.DataFrame(columns))
    table = pd.concat(parts, ignore_index=True) if parts else pd.DataFrame({"task": []})
    return table.assign(unit=np.arange(len(table), dtype=np.int64))


PLUGIN = ProbeLoss()
