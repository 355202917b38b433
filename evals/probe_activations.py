"""Activations at the last token of labelled prompts: made once per (model, hookpoint, task set), read by all subjects.

Artefact ``probes/<key>/``: ``acts.npy`` float32 [N, D], ``rows.parquet`` (one line per prompt), ``splits.parquet``
(which rows stand on which side, per seed), ``tasks.json``. N prompts, D = width of the hookpoint.
"""

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from evals.language_tasks import catalogue_sha256
from evals.probe_datasets import (
    ProbeTask,
    Split,
    build_task,
    csv_task,
    missing_tasks,
    split_task,
    task_names,
    task_table,
    tasks_sha256,
)
from sae.config import require, to_dict
from sae.console import progress, track
from sae.errors import ConfigError, DataError, did_you_mean
from sae.manifest import artefact_dir, canonical_json, is_complete, key_of, sha256_file, sha256_text, writing

if TYPE_CHECKING:
    import pandas as pd

    from evals.results import SubjectInfo
    from sae.language_model import LanguageModel

logger = logging.getLogger(__name__)
KIND = "probes"
STAGE_VERSION = 1
BATCH_TOKENS = 2_048
"""Tokens of one forward pass, padding included."""


@dataclass(kw_only=True, frozen=True)
class ProbeConfig:
    """Which probe tasks, how many rows of each, how much of each prompt."""

    tasks: tuple[str, ...] = ()
    """Names of evals/probe_tasks.json."""
    own: tuple[str, ...] = ()
    """Own tasks: NAME=FILE[:prompt_column:label_column:positive], by default prompt, target and 1."""
    cap_rows: int = 2_000
    """At most this many rows per task and side, half of each class."""
    max_tokens: int = 128
    """Last tokens of a prompt that are kept, the prefix token included (left truncation)."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the split into train and test; results are means over them."""

    def __post_init__(self) -> None:
        known = task_table()
        for name in self.tasks:
            if name not in known:
                raise ConfigError(f"there is no probe task {name!r}{did_you_mean(name, known)}")
            if "missing" in known[name]:
                raise ConfigError(f"the probe task {name!r} cannot be built: {known[name]['missing']}")
        names = [*self.tasks, *(OwnTask.parse(text).name for text in self.own)]
        require(len(set(names)) == len(names), "a probe task is named twice")
        require(self.cap_rows >= 120, f"cap_rows must be at least 120 (60 rows of each class), got {self.cap_rows}")
        require(self.max_tokens >= 2, "max_tokens must hold the prefix token and one more")
        require(len(self.seeds) >= 1, "at least one split seed is needed")

    @staticmethod
    def of_preset(preset: str, own: tuple[str, ...] = ()) -> "ProbeConfig":
        """Sizes of METRICS C.3; `tiny` has own tasks only."""
        if preset == "paper":
            return ProbeConfig(tasks=tuple(task_names("paper")), own=own)
        if preset == "quick":
            return ProbeConfig(tasks=tuple(task_names("quick")), own=own, cap_rows=256, max_tokens=64, seeds=(0,))
        return ProbeConfig(own=own, cap_rows=120, max_tokens=16, seeds=(0,))


class OwnTask(NamedTuple):
    """A parsed ``--task-csv``."""

    name: str
    path: Path
    prompt: str
    label: str
    positive: str

    @staticmethod
    def parse(text: str) -> "OwnTask":
        """``NAME=FILE[:prompt_column:label_column:positive]``; ConfigError if it is not of this form."""
        name, mark, rest = text.partition("=")
        parts = rest.rsplit(":", 3)
        if not mark or not name or not rest or len(parts) not in (1, 4):
            form = "NAME=FILE or NAME=FILE:prompt_column:label_column:positive"
            raise ConfigError(f"{text!r} is no probe task; write {form}")
        return OwnTask(name, Path(parts[0]), *(parts[1:] or ("prompt", "target", "1")))

    def build(self) -> ProbeTask:
        return csv_task(self.name, self.path, positive=[self.positive], prompt=self.prompt, label=self.label)


class TaskSplit(NamedTuple):
    """Rows of one task and split seed, as row numbers of the store."""

    task: str
    seed: int
    train: np.ndarray
    test: np.ndarray


@dataclass
class ProbeActivations:
    """A finished ``probes/<key>/`` folder."""

    folder: Path
    key: str
    meta: dict[str, Any] = field(repr=False)
    """families, task_set, failures (task -> code), missing (task -> reason), counts."""

    @staticmethod
    def open(folder: Path) -> "ProbeActivations":
        """Open a complete folder; ArtefactError otherwise."""
        from sae.manifest import read_manifest

        manifest = read_manifest(folder)
        meta = json.loads((Path(folder) / "tasks.json").read_text(encoding="utf-8"))
        return ProbeActivations(Path(folder), manifest["key"], meta)

    @cached_property
    def x_ND(self) -> np.ndarray:
        """float32 memory map."""
        return np.load(self.folder / "acts.npy", mmap_mode="r")

    @cached_property
    def rows(self) -> "pd.DataFrame":
        """task, label (int8), group (within the task), n_tokens, truncated; index = row of ``x_ND``."""
        import pandas as pd

        return pd.read_parquet(self.folder / "rows.parquet")

    @cached_property
    def splits(self) -> list[TaskSplit]:
        """In the order of the configuration, then by seed; tasks with too few rows have none."""
        import pandas as pd

        table = pd.read_parquet(self.folder / "splits.parquet")
        found = []
        for (order, seed), part in table.groupby(["order", "seed"], sort=True):
            sides = [part.row[part.side == side].to_numpy(dtype=np.int64, copy=True) for side in ("train", "test")]
            found.append(TaskSplit(self.meta["tasks"][int(order)], int(seed), *sides))
        return found

    @property
    def families(self) -> dict[str, str]:
        """Family of each task."""
        return dict(self.meta["families"])

    @property
    def failures(self) -> dict[str, str]:
        """Tasks asked for that cannot be measured, with the failure code."""
        return dict(self.meta["failures"])

    def marks(self, info: "SubjectInfo") -> dict[str, Any]:
        """What the manifest of a subject's rows says of tasks that its training text holds, and of those left out."""
        seen = self.meta.get("seen_by", {}) if info.kind == "sae" else {}
        told = {"seen": seen.get(info.sae_id, seen.get("", [])), "refused": sorted(self.meta.get("refused", {}))}
        return {name: tasks for name, tasks in told.items() if tasks}

    @property
    def task_set(self) -> str:
        """Hash of task names, row counts and cap: means over different sets are never compared."""
        return str(self.meta["task_set"])


def build_probes(
    root: Path, lm: "LanguageModel", hookpoint: str, cfg: ProbeConfig, *, force: bool = False
) -> ProbeActivations:
    """The activations of ``cfg``'s prompts at their last token, made if they are not there.

    Each prompt is fed as prefix token + its last ``max_tokens - 1`` tokens. The activation is kept even where the token
    filter of other metrics would drop it (METRICS C.3). Raises DataError for an unreadable own task, a NaN activation.
    """
    from sae.assets import find

    own = [OwnTask.parse(text) for text in cfg.own]
    prefix, inputs = model_inputs(lm, hookpoint)
    if cfg.tasks:
        inputs |= {"tasks": tasks_sha256(), "sae_probes": find("sae_probes").wheel_sha256}
    if any(task_table()[name].get("transform") == "languages" for name in cfg.tasks):
        inputs["catalogues"] = catalogue_sha256()
    for task in own:
        if not task.path.is_file():
            raise DataError(f"the probe task {task.name!r} reads {task.path}, which does not exist")
        inputs[f"own:{task.name}"] = sha256_file(task.path)
    config = to_dict(cfg) | {"own": [[*task[:1], *task[2:]] for task in own]}
    key = key_of(KIND, STAGE_VERSION, config, inputs)
    folder = artefact_dir(root, KIND, key)
    if force or not is_complete(folder):
        tasks = _build_tasks(cfg, own)
        with writing(folder, kind=KIND, key=key, stage_version=STAGE_VERSION, config=config, inputs=inputs) as writer:
            writer.counts.update(write_probes(writer.path, tasks, lm, hookpoint, prefix, cfg, missing_tasks()))
    return ProbeActivations.open(folder)


def model_inputs(lm: "LanguageModel", hookpoint: str) -> tuple[int, dict[str, str]]:
    """(prefix token, what a store of activations depends on besides its prompts)."""
    from sae.tokens import prefix_id

    prefix = prefix_id(lm.tokenizer)
    named = {"lm": f"{lm.name}@{lm.revision}", "hookpoint": hookpoint, "dtype": str(lm.dtype), "prefix": str(prefix)}
    return prefix, named


def _build_tasks(cfg: ProbeConfig, own: list[OwnTask]) -> list[ProbeTask]:
    if not cfg.tasks and not own:
        raise ConfigError("no probe task is named; choose some of evals/probe_tasks.json or bring a CSV")
    makers: list[Callable[[], ProbeTask]] = [partial(build_task, name) for name in cfg.tasks]
    makers += [task.build for task in own]
    return [make() for make in track(makers, "reading probe tasks", unit="task")]


def write_probes(
    folder: Path, tasks: list[ProbeTask], lm: "LanguageModel", hookpoint: str, prefix: int, cfg: ProbeConfig,
    missing: Mapping[str, str] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Files of the artefact; returns the counts for the manifest. ``missing``: tasks that cannot be had, with why."""
    import pandas as pd

    chosen, splits, failures = _choose(tasks, cfg)
    prompts = [tasks[t].prompts[i] for t, i in chosen]
    ids, truncated = _tokenise(lm.tokenizer, prompts, prefix, cfg.max_tokens)
    x_ND = last_token_activations(lm, hookpoint, ids)
    bad = np.flatnonzero(~np.isfinite(x_ND).all(axis=1))
    if len(bad):
        first = prompts[bad[0]][:80]
        raise DataError(f"{lm.name} gives NaN or infinite activations at {hookpoint} for the prompt {first!r}")
    np.save(folder / "acts.npy", x_ND)
    pd.DataFrame({
        "task": [tasks[t].name for t, _ in chosen],
        "label": np.array([tasks[t].labels[i] for t, i in chosen], dtype=np.int8),
        "group": np.array([tasks[t].groups[i] for t, i in chosen], dtype=np.int32),
        "n_tokens": np.array([len(i) for i in ids], dtype=np.int32),
        "truncated": truncated,
    }).to_parquet(folder / "rows.parquet")
    splits.to_parquet(folder / "splits.parquet")
    counts = {"n_rows": len(ids), "n_tokens": int(sum(map(len, ids))), "n_truncated": int(truncated.sum())}
    names = [task.name for task in tasks]
    identity = [[task.name, len(task.keys), int(task.labels.sum()), task.n_groups] for task in tasks]
    meta = {
        "tasks": names, "families": {task.name: task.family for task in tasks}, "failures": failures,
        "missing": dict(missing or {}), "dropped": {task.name: dict(task.n_dropped) for task in tasks},
        "task_set": sha256_text(canonical_json([identity, cfg.cap_rows, cfg.max_tokens, cfg.seeds]))[:12], **counts,
    }
    (folder / "tasks.json").write_text(canonical_json(meta) + "\n", encoding="utf-8")
    return counts | {"n_tasks": len(tasks) - len(failures), "task_set": meta["task_set"], "dtype": str(lm.dtype)}


def _choose(tasks: list[ProbeTask], cfg: ProbeConfig) -> tuple[list[tuple[int, int]], "pd.DataFrame", dict[str, str]]:
    """Prompts needed by any split as (task, row), the table of the splits, and the tasks that have none."""
    import pandas as pd

    found: list[tuple[int, int, Split]] = []
    failures: dict[str, str] = {}
    for t, task in enumerate(tasks):
        of_task = [(seed, split_task(task, seed=seed, cap_rows=cfg.cap_rows)) for seed in cfg.seeds]
        if any(split is None for _, split in of_task):
            failures[task.name] = "too_few_rows" if 0 < task.labels.sum() < len(task.labels) else "one_class"
            logger.warning("probe task %s is left out: %s", task.name, failures[task.name])
            continue
        found += [(t, seed, split) for seed, split in of_task if split is not None]
    used = sorted({(t, int(i)) for t, _, split in found for side in split for i in side})
    row_of = {pair: row for row, pair in enumerate(used)}
    records = [
        (t, seed, side, row_of[t, int(i)])
        for t, seed, split in found for side, rows in zip(("train", "test"), split, strict=True) for i in rows
    ]
    if not records:
        raise DataError(f"no probe task has 60 rows of each class on both sides: {', '.join(sorted(failures))}")
    return used, pd.DataFrame(records, columns=["order", "seed", "side", "row"]), failures


def _tokenise(tokenizer: Any, prompts: list[str], prefix: int, max_tokens: int) -> tuple[list[list[int]], np.ndarray]:
    """Prefix id + the last ``max_tokens - 1`` ids of each prompt, and whether something was cut off."""
    full = tokenizer(prompts, add_special_tokens=False)["input_ids"]
    truncated = np.array([len(ids) > max_tokens - 1 for ids in full])
    return [[prefix, *ids[-(max_tokens - 1) :]] for ids in full], truncated


def last_token_activations(lm: "LanguageModel", hookpoint: str, ids: list[list[int]]) -> np.ndarray:
    """float32 [N, D]: the activation at the last token of each list of ids.

    Batches hold prompts of like length. Padding stands on the right, where a causal model cannot see it.
    """
    import torch

    order = sorted(range(len(ids)), key=lambda i: (len(ids[i]), i))
    out = np.empty((len(ids), lm.check_hookpoint(hookpoint)), dtype=np.float32)
    with progress("probe prompts", sum(map(len, ids)), "tok") as bar:
        start = 0
        while start < len(order):
            stop = start + 1
            while stop < len(order) and (stop + 1 - start) * len(ids[order[stop]]) <= BATCH_TOKENS:
                stop += 1
            batch = order[start:stop]
            lengths = torch.tensor([len(ids[i]) for i in batch])
            padded = torch.full((len(batch), int(lengths.max())), ids[batch[0]][0], dtype=torch.long)
            for r, i in enumerate(batch):
                padded[r, : len(ids[i])] = torch.tensor(ids[i])
            acts = lm.capture(padded.to(lm.device), [hookpoint])[hookpoint]
            last = acts[torch.arange(len(batch), device=acts.device), (lengths - 1).to(acts.device)]
            out[batch] = last.float().cpu().numpy()
            bar.advance(int(lengths.sum()))
            start = stop
    return out
