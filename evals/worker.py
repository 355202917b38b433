"""One job of a run in a process of its own: it opens the finished artefacts of the run and measures one pair."""

from pathlib import Path
from typing import NamedTuple

from evals.base import Subject
from evals.interp import Interpretation
from evals.measure import MeasureJob, Measurement, select
from evals.run_config import RunConfig
from evals.run_log import RunLog
from evals.stages import Pipeline
from evals.world import all_subjects, make_measurement
from sae.config import to_dict
from sae.errors import ArtefactError


class World(NamedTuple):
    """What a process keeps between the jobs of one run: the model, the stores, results that subjects share."""

    key: tuple[str, str]
    measurement: Measurement
    subjects: dict[str, Subject]


_open: list[World] = []


def measure(job: MeasureJob) -> Path:
    """Folder of the rows of one (subject, evaluation, seed)."""
    world = _world(job.cfg)
    # by the run's own list: an evaluation from elsewhere ("module:object") is not found by its name
    evaluation = next(e for e in select(job.cfg.evals, job.cfg.preset) if e.name == job.evaluation)
    subject = world.subjects.get(job.sae_id)
    if subject is None:
        raise ArtefactError(f"this process finds no {job.sae_id} below {job.cfg.root}; is the folder shared by all?")
    world.measurement.force = job.force
    return world.measurement.run(evaluation, subject, job.seed)


def _world(cfg: RunConfig) -> World:
    key = (str(cfg.root), cfg.key())
    if not _open or _open[0].key != key:
        _open.clear()
        log = RunLog(root=cfg.root, preset=cfg.preset, key=cfg.key(), config=to_dict(cfg), writes=False)
        stages = Pipeline(cfg, log)
        needs = frozenset().union(*(e.needs for e in select(cfg.evals, cfg.preset)))
        interpretation = Interpretation(cfg, stages, log) if "scores" in needs else None
        subjects = {s.info.sae_id: s for s in all_subjects(cfg, stages)}
        _open.append(World(key, make_measurement(cfg, stages, interpretation, log), subjects))
    return _open[0]
