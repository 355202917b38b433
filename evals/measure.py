"""Subjects x evaluations: each pair writes its rows once, a failing pair is reported and the others go on."""

import logging
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from evals.base import Eval, EvalContext, Subject
from evals.results import DETAILS_FILE, row_dir, write_draws, write_rows
from evals.run_log import RunLog, StageLog
from sae import plugins
from sae.engines import EngineName, Failure, run_jobs
from sae.errors import ArtefactError, Unsupported
from sae.manifest import is_complete, key_of, writing

SUITE = "evals.suite"
logger = logging.getLogger(__name__)


def select(names: Sequence[str], preset: str = "") -> list[Eval]:
    """The evaluations named, or all; an unknown name is an error that lists the near ones, before any work.

    Without names, an evaluation whose ``default_in`` leaves the preset out is left out; without a preset none is.
    """
    found = [plugins.find(SUITE, name) for name in (names or plugins.names(SUITE))]
    return [e for e in found if names or not preset or preset in getattr(e, "default_in", (preset,))]


@dataclass(frozen=True)
class MeasureJob:
    """One subject, one evaluation, one seed: all that a process elsewhere needs, beside the artefacts."""

    cfg: Any
    """evals.run_config.RunConfig."""
    sae_id: str
    evaluation: str
    seed: int
    force: bool = False


@dataclass(frozen=True)
class Elsewhere:
    """Where jobs are measured when not in this process."""

    engine: EngineName
    workers: int
    measure: Callable[[MeasureJob], Path]
    """Folder of the rows of a job; a function of a module."""
    cfg: Any
    """evals.run_config.RunConfig: what another process opens the artefacts by."""
    gpus: float = 0.0
    """Share of a device per job."""


@dataclass
class Measurement:
    """What is shared by all pairs of one run."""

    root: Path
    preset: str
    seed: int
    hookpoint: str
    log: RunLog
    parts: Mapping[str, Callable[[], Any]]
    """Makers of what evaluations need, by EvalContext field: stores, probes, train_text, truth (if there is one),
    and more_probes, where the run has more tasks; called on first use."""
    latents: Callable[[str], Any]
    """Latent cache of a subject, or None."""
    scores: Callable[[str], "Path | None"]
    """Folder of finished scores of a subject, or None."""
    load_lm: Callable[[], Any]
    device: str = "cpu"
    force: bool = False
    peers: Callable[[Subject], Sequence[Subject]] = lambda subject: ()
    """Other seeds of a subject among those of this run."""
    pretraining: Any = None
    """evals.pretraining.Pretraining."""
    shared: dict[str, Any] = field(default_factory=dict)
    folders: list[Path] = field(default_factory=list)

    def context(self, evaluation: Eval, subject: Subject, seed: int | None = None) -> EvalContext:
        needs, sae_id = evaluation.needs, subject.info.sae_id
        has_latents = "sparse" in subject.provides
        return EvalContext(
            root=self.root,
            subject=subject,
            preset=self.preset,
            seed=self.seed if seed is None else seed,
            hookpoint=self.hookpoint,
            stores=self.parts["stores"]() if needs & {"test", "interp"} else {},
            load_lm=self.load_lm if "lm" in needs else None,
            latents=self.latents(sae_id) if "interp" in needs and has_latents else None,
            probes=self.parts[self._probes_of(evaluation)]() if "probes" in needs else None,
            scores=self.scores(sae_id) if "scores" in needs and has_latents else None,
            train_text=self.parts["train_text"]() if "train_text" in needs else None,
            peers=self.peers(subject) if "peers" in needs else (),
            truth=self.parts["truth"]() if "truth" in needs else None,
            pretraining=self.pretraining,
            shared=self.shared,
        )

    def _probes_of(self, evaluation: Eval) -> str:
        """The part with its prompts: an evaluation that takes more tasks reads those of ``--tasks`` too."""
        more = getattr(evaluation, "more_tasks", False) and "more_probes" in self.parts
        return "more_probes" if more else "probes"

    def run(self, evaluation: Eval, subject: Subject, seed: int | None = None) -> Path:
        """Rows of one pair: reused if complete, else computed. Returns their folder."""
        ctx = self.context(evaluation, subject, seed)
        if ctx.latents is None and "interp" in evaluation.needs and "sparse" in subject.provides:
            raise ArtefactError("its latents could not be cached: see its failed task `latents`")
        own = {"eval": evaluation.name, "preset": self.preset, "seed": ctx.seed}
        config = evaluation.config(self.preset) | own  # what the run says comes last: no evaluation may hide it
        inputs = {"sae": subject.info.sae_sha256, **evaluation.inputs(ctx)}
        key = key_of("rows", evaluation.version, config, inputs)
        folder = row_dir(self.root, subject.info.sae_id, evaluation.name, key)
        if is_complete(folder) and not self.force:
            return folder
        ctx.run_key = key
        with writing(
            folder, kind="rows", key=key, stage_version=evaluation.version, config=config, inputs=inputs
        ) as out:
            result = evaluation.run(ctx)
            write_rows(out.path, result.rows, evaluation.metrics)
            if result.draws:
                write_draws(out.path, result.draws)
            if result.details is not None:
                result.details.to_parquet(out.path / DETAILS_FILE, index=False)
            out.counts.update({"device": self.device, **result.counts})
        return folder

    def fitting(self, evaluation: Eval, subjects: Sequence[Subject]) -> tuple[list[Subject], str]:
        """Subjects that an evaluation can measure in this run; where there is none, why."""
        found = [s for s in subjects if evaluation.uses <= s.provides]
        if not found:
            return [], "no subject of this run has what it reads"
        if "truth" in evaluation.needs and "truth" not in self.parts:
            return [], "this run has no known dictionary"
        if "probes" in evaluation.needs and self._probes_of(evaluation) not in self.parts:
            return [], "this preset has no probe task; bring one with --task-csv"
        if "peers" in evaluation.needs:
            return [s for s in found if self.peers(s)], "no SAE of this run differs from another in its seed alone"
        return found, ""

    def run_all(
        self, evaluations: Sequence[Eval], subjects: Sequence[Subject], asked: Collection[str] = (),
        *, seeds: Sequence[int] = (), elsewhere: "Elsewhere | None" = None,
    ) -> None:
        """Every pair that fits, for every seed, evaluation by evaluation, so that what one loads serves all subjects.

        An evaluation without any is noted; if it is among those ``asked`` for by name, it is a failed task.
        ``elsewhere``: the engine and processes that measure instead of this one.
        """
        pairs: list[tuple[Eval, list[Subject]]] = []
        for evaluation in evaluations:
            fitting, why = self.fitting(evaluation, subjects)
            if fitting:
                pairs.append((evaluation, fitting))
                continue
            self.log.notes.setdefault("not_applicable", {})[evaluation.name] = why
            if evaluation.name in asked:
                self.log.fail("all subjects", evaluation.name, Unsupported(why))
        if elsewhere is not None:
            self._elsewhere(pairs, seeds or (self.seed,), elsewhere)
            return
        for evaluation, fitting in pairs:
            with self.log.stage(f"eval: {evaluation.name}") as stage:
                jobs = [(subject, seed) for subject in fitting for seed in seeds or (self.seed,)]
                results = run_jobs(lambda job, e=evaluation: self.run(e, *job), jobs)  # type: ignore[misc]
                self._collect(stage, ((s, evaluation.name, found) for (s, _), found in results), len(jobs))

    def _elsewhere(
        self, pairs: Sequence[tuple[Eval, list[Subject]]], seeds: Sequence[int], elsewhere: "Elsewhere"
    ) -> None:
        """All jobs at once on another engine; what they share is made here first, so that no two make it."""
        for evaluation, fitting in pairs:
            with self.log.stage(f"shared: {evaluation.name}") as stage:
                for seed in seeds:
                    try:
                        ctx = self.context(evaluation, fitting[0], seed)
                        prepare = getattr(evaluation, "prepare", None)
                        if prepare is not None:
                            prepare(ctx)
                    except Exception as error:  # the jobs that need it will fail and be told; the others go on
                        stage.status = "failed"
                        logger.debug("%s: what its subjects share cannot be made", evaluation.name, exc_info=error)
        by_id = {s.info.sae_id: s for _, fitting in pairs for s in fitting}
        jobs = [
            MeasureJob(elsewhere.cfg, s.info.sae_id, evaluation.name, seed, self.force)
            for evaluation, fitting in pairs for s in fitting for seed in seeds
        ]
        with self.log.stage(f"evaluations ({elsewhere.engine}, {elsewhere.workers} workers)") as stage:
            results = run_jobs(
                elsewhere.measure, jobs, engine=elsewhere.engine, workers=elsewhere.workers, gpus=elsewhere.gpus,
                shared=[self.root])
            self._collect(stage, ((by_id[j.sae_id], j.evaluation, found) for j, found in results), len(jobs))

    def _collect(self, stage: StageLog, results: Iterable[tuple[Subject, str, "Path | Failure"]], n_jobs: int) -> None:
        """Folders of what was measured; a failing job is told and does not take the others with it."""
        made: list[Path] = []
        for subject, name, found in results:
            if isinstance(found, Failure):
                self.log.fail_job(subject.info.sae_id, name, found)
            else:
                made.append(found)
        stage.finish(made)
        stage.note = f"{len(made)} of {n_jobs} subjects"
        if len(made) < n_jobs:
            stage.status = "failed"
        self.folders.extend(sorted(made))

    def counts(self) -> dict[str, int]:
        """Rows by status over all folders of this run."""
        from evals.results import read_rows

        total: dict[str, int] = {}
        for folder in self.folders:
            for row in read_rows(folder):
                total[row.status] = total.get(row.status, 0) + 1
        return dict(sorted(total.items()))
