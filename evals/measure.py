"""Subjects x evaluations: each pair writes its rows once, a failing pair is reported and the others go on."""

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from evals.base import Eval, EvalContext, Subject
from evals.results import DETAILS_FILE, row_dir, write_draws, write_rows
from evals.run_log import RunLog
from sae import plugins
from sae.errors import ConfigError, Unsupported
from sae.manifest import is_complete, key_of, writing

SUITE = "evals.suite"
logger = logging.getLogger(__name__)


def select(names: Sequence[str]) -> list[Eval]:
    """The evaluations named, or all; an unknown name is an error that lists the near ones, before any work."""
    return [plugins.find(SUITE, name) for name in (names or plugins.names(SUITE))]


@dataclass
class Measurement:
    """What is shared by all pairs of one run."""

    root: Path
    preset: str
    seed: int
    hookpoint: str
    log: RunLog
    parts: Mapping[str, Callable[[], Any]]
    """Makers of what evaluations need, by EvalContext field: stores, probes, truth (if there is one); called on first
    use."""
    latents: Callable[[str], Any]
    """Latent cache of a subject, or None."""
    scores: Callable[[str], "Path | None"]
    """Folder of finished scores of a subject, or None."""
    load_lm: Callable[[], Any]
    device: str = "cpu"
    force: bool = False
    peers: Callable[[Subject], Sequence[Subject]] = lambda subject: ()
    """Other seeds of a subject among those of this run."""
    shared: dict[str, Any] = field(default_factory=dict)
    folders: list[Path] = field(default_factory=list)

    def context(self, evaluation: Eval, subject: Subject) -> EvalContext:
        needs, sae_id = evaluation.needs, subject.info.sae_id
        has_latents = "sparse" in subject.provides
        return EvalContext(
            root=self.root,
            subject=subject,
            preset=self.preset,
            seed=self.seed,
            hookpoint=self.hookpoint,
            stores=self.parts["stores"]() if needs & {"test", "interp"} else {},
            load_lm=self.load_lm if "lm" in needs else None,
            latents=self.latents(sae_id) if "interp" in needs and has_latents else None,
            probes=self.parts["probes"]() if "probes" in needs else None,
            scores=self.scores(sae_id) if "scores" in needs and has_latents else None,
            peers=self.peers(subject) if "peers" in needs else (),
            truth=self.parts["truth"]() if "truth" in needs else None,
            shared=self.shared,
        )

    def run(self, evaluation: Eval, subject: Subject) -> Path:
        """Rows of one pair: reused if complete, else computed. Returns their folder."""
        ctx = self.context(evaluation, subject)
        config = {"eval": evaluation.name, "preset": self.preset, "seed": self.seed, **evaluation.config(self.preset)}
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
        if "peers" in evaluation.needs:
            return [s for s in found if self.peers(s)], "no SAE of this run differs from another in its seed alone"
        return found, ""

    def run_all(
        self, evaluations: Sequence[Eval], subjects: Sequence[Subject], asked: Collection[str] = ()
    ) -> None:
        """Every pair that fits, evaluation by evaluation, so that what one loads serves all subjects.

        An evaluation without any is noted; if it is among those ``asked`` for by name, it is a failed task.
        """
        for evaluation in evaluations:
            fitting, why = self.fitting(evaluation, subjects)
            if not fitting:
                self.log.notes.setdefault("not_applicable", {})[evaluation.name] = why
                if evaluation.name in asked:
                    self.log.fail("all subjects", evaluation.name, Unsupported(why))
                continue
            with self.log.stage(f"eval: {evaluation.name}") as stage:
                made = []
                for subject in fitting:
                    try:
                        made.append(self.run(evaluation, subject))
                    except ConfigError:
                        raise
                    except Exception as error:  # a failing pair must not take the others with it
                        self.log.fail(subject.info.sae_id, evaluation.name, error)
                stage.finish(made)
                stage.note = f"{len(made)} of {len(fitting)} subjects"
                if len(made) < len(fitting):
                    stage.status = "failed"
                self.folders.extend(made)

    def counts(self) -> dict[str, int]:
        """Rows by status over all folders of this run."""
        from evals.results import read_rows

        total: dict[str, int] = {}
        for folder in self.folders:
            for row in read_rows(folder):
                total[row.status] = total.get(row.status, 0) + 1
        return dict(sorted(total.items()))
