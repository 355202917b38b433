"""Prompts of the tasks that ``--tasks`` adds: a store of their own beside that of the preset's tasks, read as one.

sparse_probing reads both, every other evaluation the preset's tasks alone, whose store and numbers stay as they are.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from evals.more_tasks import Admitted, admit, build_more, more_sha256
from evals.probe_activations import (
    KIND,
    STAGE_VERSION,
    ProbeActivations,
    ProbeConfig,
    TaskSplit,
    model_inputs,
    write_probes,
)
from sae.console import track
from sae.manifest import artefact_dir, is_complete, key_of, sha256_text, writing

if TYPE_CHECKING:
    import pandas as pd

    from evals.run_config import RunConfig
    from evals.stages import Pipeline
    from sae.language_model import LanguageModel

logger = logging.getLogger(__name__)
JOINED_VERSION = 1


def admitted(cfg: "RunConfig", stages: "Pipeline") -> Admitted | None:
    """What of ``cfg.tasks`` is measured; None where nothing is asked for. ConfigError as :func:`admit` says."""
    if not cfg.tasks:
        return None
    if cfg.sae:
        trained_on: dict[str, Sequence[str] | None] = {
            sae.sae_id: (sae.cfg.meta.text_sources if sae.cfg.meta is not None else ()) or None
            for sae in stages.given_saes
        }
    else:
        trained_on = {"": sorted(set(stages.tokens["train"].sources))}
    return admit(cfg.tasks, trained_on, cfg.allow_seen)


def check_tasks(cfg: "RunConfig", stages: "Pipeline") -> dict[str, Any] | None:
    """Before long work: the tasks can be had and were not trained on. What the log of the run says of them."""
    found = admitted(cfg, stages)
    if found is None:
        return None
    from sae.assets import fetch

    fetch("sae_probes")
    if found.refused:
        logger.warning(
            "%d of %d tasks of --tasks are left out, since their texts were trained on: %s",
            len(found.refused), len(found.refused) + len(found.tasks), ", ".join(found.refused),
        )  # fmt: skip
    if found.unknown:
        logger.warning("what %s was trained on is unknown: it may have seen the texts of --tasks", *found.unknown[:1])
    seen = sorted({name for tasks in found.seen_by.values() for name in tasks})
    return {"measured": list(found.tasks), "refused": found.refused, "seen": seen, "unknown": list(found.unknown)}


def build_more_probes(
    root: Path, lm: "LanguageModel", hookpoint: str, names: Sequence[str], sizes: ProbeConfig, *, force: bool = False
) -> ProbeActivations:
    """Activations of the named tasks at their last token, made if they are not there; sizes as the preset's tasks."""
    from sae.assets import find

    prefix, inputs = model_inputs(lm, hookpoint)
    inputs |= {"more_tasks": more_sha256(names), "sae_probes": find("sae_probes").wheel_sha256}
    config = {
        "more": list(names), "cap_rows": sizes.cap_rows, "max_tokens": sizes.max_tokens, "seeds": list(sizes.seeds)
    }  # fmt: skip
    key = key_of(KIND, STAGE_VERSION, config, inputs)
    folder = artefact_dir(root, KIND, key)
    if force or not is_complete(folder):
        tasks = [build_more(name) for name in track(names, "reading probe tasks", unit="task")]
        with writing(folder, kind=KIND, key=key, stage_version=STAGE_VERSION, config=config, inputs=inputs) as writer:
            writer.counts.update(write_probes(writer.path, tasks, lm, hookpoint, prefix, sizes))
    return ProbeActivations.open(folder)


@dataclass
class JoinedProbes(ProbeActivations):
    """Several stores of one model and hookpoint, one after the other."""

    parts: tuple[ProbeActivations, ...] = field(default=(), repr=False)

    @cached_property
    def x_ND(self) -> np.ndarray:
        """float32, in memory."""
        return np.concatenate([part.x_ND for part in self.parts])

    @cached_property
    def rows(self) -> "pd.DataFrame":
        """The rows of all parts; index = row of ``x_ND``."""
        import pandas as pd

        return pd.concat([part.rows for part in self.parts], ignore_index=True)

    @cached_property
    def splits(self) -> list[TaskSplit]:
        """Those of the parts, their rows counted on."""
        found, first = [], 0
        for part in self.parts:
            found += [s._replace(train=s.train + first, test=s.test + first) for s in part.splits]
            first += len(part.rows)
        return found


def joined(parts: Sequence[ProbeActivations], chosen: Admitted | None = None) -> ProbeActivations:
    """One store of all tasks, with a task set of its own. ``chosen``: what is to be said of seen and refused tasks."""
    meta: dict[str, Any] = {
        name: [task for part in parts for task in part.meta[name]] for name in ("tasks",)
    }  # fmt: skip
    for name in ("families", "failures", "missing", "dropped"):
        meta[name] = {task: value for part in parts for task, value in part.meta.get(name, {}).items()}
    for name in ("n_rows", "n_tokens", "n_truncated"):
        meta[name] = sum(part.meta.get(name, 0) for part in parts)
    sets = [part.task_set for part in parts]
    meta["task_set"] = sets[0] if len(sets) == 1 else sha256_text("+".join(sets))[:12]
    if chosen is not None:
        meta["refused"] = dict(chosen.refused)
        meta["seen_by"] = {sae_id: list(tasks) for sae_id, tasks in chosen.seen_by.items()}
    inputs = {f"part{i}": part.key for i, part in enumerate(parts)}
    key = key_of("probes_joined", JOINED_VERSION, {}, inputs)
    return JoinedProbes(parts[0].folder, key, meta, parts=tuple(parts))
