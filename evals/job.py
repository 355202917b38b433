"""The main job itself: stages, evaluations, publication, summary."""

import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from evals import leaderboard
from evals.checks import check_before_loading, check_disk, fitted
from evals.interp import Interpretation
from evals.measure import Elsewhere, select
from evals.more_probes import check_tasks
from evals.random_model import measure_random_model
from evals.run_config import RunConfig
from evals.run_log import RunLog
from evals.stages import Pipeline, lm_description
from evals.worker import measure
from evals.world import all_subjects, make_measurement
from sae import console, exits
from sae.config import to_dict
from sae.engines import check_engine

logger = logging.getLogger(__name__)


def run_job(cfg: RunConfig) -> int:
    """Run everything that is not yet there; returns 0, or 1 if a task failed and the others went on."""
    evaluations = select(cfg.evals, cfg.preset)
    check_before_loading(cfg)
    log = RunLog(root=cfg.root, preset=cfg.preset, key=cfg.key(), config=to_dict(cfg))
    check_engine(cfg.engine, gpus=_gpus(cfg), shared=[cfg.root])
    stages = Pipeline(cfg, log)
    cfg = stages.cfg = fitted(cfg, stages.given_saes)
    log.key, log.config = cfg.key(), to_dict(cfg)
    with log.stage("load language model") as stage:
        lm = stages.lm()
        stage.note = f"{lm.name}, {stages.hookpoint}, {lm_description(lm)['dtype']}"
        log.notes["lm"] = lm_description(lm) | {"hookpoint": stages.hookpoint}
    check_disk(cfg, stages.hookpoint, lm.check_hookpoint(stages.hookpoint))
    if (more := check_tasks(cfg, stages)) is not None:
        log.notes["more_tasks"] = more
    needs = frozenset().union(*(e.needs for e in evaluations))
    interpretation = Interpretation(cfg, stages, log) if "scores" in needs else None
    _prepare(stages, interpretation, needs)
    measurement = make_measurement(cfg, stages, interpretation, log)
    measurement.run_all(
        evaluations, all_subjects(cfg, stages), asked=cfg.evals, seeds=cfg.eval_seeds, elsewhere=_elsewhere(cfg))
    if cfg.random_model:
        measurement.folders += measure_random_model(cfg, stages.hookpoint, evaluations, interpretation, log)
    with log.stage("leaderboard and pages"):
        log.notes["rows"] = measurement.counts()
        log.write()
        paths = _publish(cfg, interpretation)
    log.write()
    summarise(log, paths)
    return exits.FAILED if log.failures else exits.DONE


def _prepare(stages: Pipeline, interpretation: Interpretation | None, needs: frozenset[str]) -> None:
    """Make the artefacts that the evaluations need, in the order of the house."""
    _ = stages.tokens
    _ = stages.saes
    if needs & {"interp", "scores"}:
        _ = stages.latents
    if interpretation is not None:
        _ = interpretation.scores
        _ = interpretation.effects


def _elsewhere(cfg: RunConfig) -> Elsewhere | None:
    """None: in this process."""
    if cfg.engine == "local" and cfg.workers == 1:
        return None
    # every process opens the stages that the driver made: it makes none of them again
    opened = replace(cfg, force=False)
    return Elsewhere(cfg.engine, cfg.workers, measure, opened, gpus=_gpus(cfg))


def _gpus(cfg: RunConfig) -> float:
    """Share of a device per job elsewhere."""
    return float(cfg.device.startswith("cuda"))


def _publish(cfg: RunConfig, interpretation: Interpretation | None) -> list[Path]:
    """Tables, pages and the explanation dataset; the paths that a person wants to know."""
    paths = leaderboard.build(cfg.root)
    if interpretation is not None and interpretation.scores:
        from autointerp.dataset import export

        paths.append(export(cfg.root, cfg.root / "dataset"))
    return paths


def summarise(log: RunLog, paths: Sequence[Path]) -> None:
    """The end of a run, for people: where the minutes went, the board, failures, paths."""
    rows = [
        (s.name, s.status, f"{s.seconds:.1f}", f"{s.work_seconds:.1f}", f"{s.peak_gb:.2f}", s.note) for s in log.stages
    ]
    total = time.monotonic() - log.started  # no sum: some stages run inside others
    rows.append(("total", "", f"{total:.1f}", "", "", f"{total / 60:.1f} minutes"))
    columns = ("stage", "status", "seconds", "work s", "peak GB", "what")
    console.table("Where the time went", columns, rows, right=(2, 3, 4))
    leaderboard.print_board(log.root)
    if log.failures:
        console.table(
            "Failed tasks (run the same command again to retry them)",
            ("subject", "task", "error"),
            [(f.subject, f.task, f.error) for f in log.failures],
        )
    for path in paths:
        console.say(str(path.resolve()))
