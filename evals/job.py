"""The main job itself: stages, evaluations, publication, summary."""

import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from autointerp.records import INTERP_SPLITS
from evals import leaderboard
from evals.base import SAESubject, Subject
from evals.baselines import baseline_subjects
from evals.interp import Interpretation
from evals.measure import Measurement, select
from evals.probe_activations import ProbeActivations, ProbeConfig, build_probes
from evals.run_config import RunConfig
from evals.run_log import RunLog
from evals.seeds import peers_of
from evals.stages import Pipeline, free_disk_gb, lm_description
from sae import console, plugins
from sae.config import to_dict
from sae.errors import ConfigError

logger = logging.getLogger(__name__)
EXIT_OK, EXIT_FAILED = 0, 1
SPARE_DISK_GB = 0.5


def run_job(cfg: RunConfig) -> int:
    """Run everything that is not yet there; returns 0, or 1 if a task failed and the others went on."""
    evaluations = select(cfg.evals)
    for architecture in cfg.architectures if not cfg.sae else ():
        if plugins.find("sae.architectures", architecture).transcodes:
            raise ConfigError(f"{architecture!r} reconstructs another activation: the evaluations are for autoencoders")
    log = RunLog(root=cfg.root, preset=cfg.preset, key=cfg.key(), config=to_dict(cfg))
    stages = Pipeline(cfg, log)
    with log.stage("load language model") as stage:
        lm = stages.lm()
        stage.note = f"{lm.name}, {stages.hookpoint}, {lm_description(lm)['dtype']}"
        log.notes["lm"] = lm_description(lm) | {"hookpoint": stages.hookpoint}
    _check_disk(cfg, lm.check_hookpoint(stages.hookpoint))
    needs = frozenset().union(*(e.needs for e in evaluations))
    interpretation = Interpretation(cfg, stages, log) if "scores" in needs else None
    _prepare(stages, interpretation, needs)
    measurement = _measurement(cfg, stages, interpretation, log)
    measurement.run_all(evaluations, _subjects(cfg, stages), asked=cfg.evals)
    with log.stage("leaderboard and pages"):
        log.notes["rows"] = measurement.counts()
        log.write()
        paths = _publish(cfg, interpretation)
    log.write()
    summarise(log, paths)
    return EXIT_FAILED if log.failures else EXIT_OK


def _check_disk(cfg: RunConfig, d_in: int) -> None:
    """ConfigError if the artefacts cannot fit: better now than after an hour."""
    t = cfg.tokens
    splits = [t.explain_tokens, t.calibrate_tokens, t.score_tokens] + ([] if cfg.sae else [t.train_tokens])
    need = (sum(splits) * 2 + t.test_tokens * 4) * d_in / 1e9 + 0.3
    free = free_disk_gb(cfg.root)
    if free < need + SPARE_DISK_GB:
        raise ConfigError(
            f"{cfg.root} has {free:.2f} GB free, the run writes about {need:.2f} GB (activations above all) and wants "
            f"{SPARE_DISK_GB:.1f} GB to spare; "
            "free some space, choose another --root, or lower --tokens.train-tokens"
        )


def _prepare(stages: Pipeline, interpretation: Interpretation | None, needs: frozenset[str]) -> None:
    """Make the artefacts that the evaluations need, in the order of the house."""
    _ = stages.tokens
    _ = stages.saes
    if needs & {"interp", "scores"}:
        _ = stages.latents
    if interpretation is not None:
        _ = interpretation.scores
        _ = interpretation.effects


def _subjects(cfg: RunConfig, stages: Pipeline) -> list[Subject]:
    """SAEs, the random SAE, and the floors that share some evaluations with them."""
    reference = stages.store(stages.reference_split)
    first = stages.subjects[0]
    l0 = first.info.k or max(1, round(_mean_l0(stages, first)))
    floors = baseline_subjects(reference, first.info, cfg.seed, l0s=(l0,), n_features=first.info.d_sae)
    return [*stages.subjects, *floors]


def _mean_l0(stages: Pipeline, subject: SAESubject) -> float:
    codes = subject.encode_sparse(stages.reference_sample[:2048])
    return float((codes.values_NK > 0).sum(dim=1).float().mean())


def _measurement(cfg: RunConfig, stages: Pipeline, interpretation: Interpretation | None, log: RunLog) -> Measurement:
    made: dict[str, Any] = {}

    def stores() -> dict[str, Any]:
        splits = ("test", *INTERP_SPLITS)
        return made.setdefault("stores", {split: stages.store(split) for split in splits})

    def probes() -> ProbeActivations:
        if "probes" not in made:
            with log.stage("probe prompts") as stage:
                made["probes"] = build_probes(
                    cfg.root,
                    stages.lm(),
                    stages.hookpoint,
                    ProbeConfig.of_preset(cfg.preset, own=cfg.task_csv),
                    force=cfg.force,
                )
                stage.finish([made["probes"].folder])
        return made["probes"]

    return Measurement(
        root=cfg.root,
        preset=cfg.preset,
        seed=cfg.seed,
        hookpoint=stages.hookpoint,
        log=log,
        parts={"stores": stores, "probes": probes},
        latents=lambda sae_id: stages.latents.get(sae_id),
        scores=lambda sae_id: interpretation.scores.get(sae_id) if interpretation else None,
        load_lm=stages.lm_float32,
        device=cfg.device,
        force=cfg.force,
        peers=lambda subject: peers_of(subject, stages.subjects),
    )


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
