"""What a run measures and with what: subjects, and the makers of everything that evaluations need."""

from collections.abc import Callable
from typing import Any

from autointerp.records import INTERP_SPLITS
from evals.base import SAESubject, Subject
from evals.baselines import baseline_subjects
from evals.interp import Interpretation
from evals.measure import Measurement
from evals.more_probes import admitted, build_more_probes, joined
from evals.pretraining import Curve, Pretraining
from evals.probe_activations import ProbeActivations, ProbeConfig, build_probes
from evals.run_config import RunConfig
from evals.run_log import RunLog
from evals.seeds import peers_of
from evals.stages import Pipeline
from evals.truth import Truth


def all_subjects(cfg: RunConfig, stages: Pipeline) -> list[Subject]:
    """SAEs, the random SAE, and the floors that share some evaluations with them."""
    reference = stages.store(stages.reference_split)
    first = stages.subjects[0]
    l0 = first.info.k or max(1, round(_mean_l0(stages, first)))
    floors = baseline_subjects(reference, first.info, cfg.seed, l0s=(l0,), n_features=first.info.d_sae)
    return [*stages.subjects, *floors]


def _mean_l0(stages: Pipeline, subject: SAESubject) -> float:
    codes = subject.encode_sparse(stages.reference_sample[:2048])
    return float((codes.values_NK > 0).sum(dim=1).float().mean())


def _with_more_tasks(
    cfg: RunConfig, stages: Pipeline, log: RunLog, probes: Callable[[], ProbeActivations]
) -> ProbeActivations:
    """The preset's tasks, where it has some, and those of ``--tasks``."""
    chosen, sizes = admitted(cfg, stages), ProbeConfig.of_preset(cfg.preset, own=cfg.task_csv)
    assert chosen is not None
    parts = [probes()] if sizes.tasks or sizes.own else []
    with log.stage("probe prompts of more tasks") as stage:
        more = build_more_probes(
            cfg.root, stages.lm(), stages.hookpoint, chosen.tasks, ProbeConfig.of_preset(cfg.preset), force=cfg.force)
        stage.finish([more.folder])
    return joined([*parts, more], chosen)


def make_measurement(
    cfg: RunConfig, stages: Pipeline, interpretation: Interpretation | None, log: RunLog
) -> Measurement:
    """What all pairs of a run share; stores, prompts and scores are made when an evaluation first asks for them."""
    made: dict[str, Any] = {}
    truth, sizes = cfg.truth, ProbeConfig.of_preset(cfg.preset, own=cfg.task_csv)

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
                    sizes,
                    force=cfg.force,
                )
                stage.finish([made["probes"].folder])
        return made["probes"]

    def more_probes() -> ProbeActivations:
        if "more_probes" not in made:
            made["more_probes"] = _with_more_tasks(cfg, stages, log, probes)
        return made["more_probes"]

    return Measurement(
        root=cfg.root,
        preset=cfg.preset,
        seed=cfg.seed,
        hookpoint=stages.hookpoint,
        log=log,
        parts={"stores": stores, "train_text": lambda: stages.tokens["train"]}
        | ({"probes": probes} if sizes.tasks or sizes.own else {})
        | ({"truth": lambda: Truth.open(truth)} if truth else {})
        | ({"more_probes": more_probes} if cfg.tasks else {}),
        pretraining=Pretraining(
            cfg.pretraining_tokens, Curve.open(cfg.pretraining_curve) if cfg.pretraining_curve else None),
        latents=lambda sae_id: stages.latents.get(sae_id),
        scores=lambda sae_id: interpretation.scores.get(sae_id) if interpretation else None,
        load_lm=stages.lm_float32,
        device=cfg.device,
        force=cfg.force,
        peers=lambda subject: peers_of(subject, stages.subjects),
    )
