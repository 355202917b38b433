"""Floor: the same pipeline on the model with random weights (arXiv 2501.17727; METRICS A, G).

An SAE is trained on the activations of the randomised model and measured on that model's own text, like every other
SAE. What explains and judges stays the real model: only the subject loses what it learned.
"""

from dataclasses import replace
from functools import cached_property
from typing import Any

import torch

from evals.base import Eval, SAESubject, subject_info
from evals.interp import Interpretation
from evals.run_config import RunConfig
from evals.run_log import RunLog
from evals.stages import Pipeline
from evals.world import make_measurement
from sae.base import SAE
from sae.language_model import LanguageModel
from sae.manifest import seed_of, sha256_file

EVALUATIONS = ("reconstruction", "explanation", "n2g")
"""What the randomised model is a floor of: scores that trained and random models may share."""


def randomise(lm: LanguageModel, seed: int) -> LanguageModel:
    """Each matrix drawn anew from a normal law of its own mean and deviation, in place; norms and biases stay.

    The revision says so, which keeps its activations apart from the model's own.
    """
    with torch.no_grad():
        for name, p in lm.model.named_parameters():
            if p.ndim >= 2:
                generator = torch.Generator().manual_seed(seed_of(seed, "random_model", name))
                mean, std = float(p.float().mean()), float(p.float().std())
                p.copy_((torch.randn(p.shape, generator=generator) * std + mean).to(p.dtype))
    lm.revision, lm.slug = f"{lm.revision}+random-{seed}", f"{lm.slug}-random"
    return lm


class RandomPipeline(Pipeline):
    """The stages on the randomised model; no random SAE beside its one SAE."""

    def lm(self, dtype: str = "auto") -> LanguageModel:
        known = set(self._lms)
        found = super().lm(dtype)
        if set(self._lms) != known:
            randomise(found, self.cfg.seed)
        return found

    @property
    def saes(self) -> list[SAE]:  # type: ignore[override]
        return list(self.trained)


class BorrowedJudge(Interpretation):
    """Explains and scores latents of one pipeline with the client, the embedder and the judges of another."""

    def __init__(self, cfg: RunConfig, stages: Pipeline, log: RunLog, judge: Interpretation) -> None:
        self.__dict__ |= {"client": judge.client, "embedder": judge.embedder, "score_context": judge.score_context}
        super().__init__(cfg, stages, log)

    @cached_property
    def effects(self) -> dict[str, Any]:
        return {}


def measure_random_model(
    cfg: RunConfig, hookpoint: str, evaluations: list[Eval], judge: Interpretation | None, log: RunLog
) -> list[Any]:
    """Rows of one SAE of the randomised model under ``baseline.random_lm.…``; returns their folders.

    A failure is a failed task of the run, never its end.
    """
    chosen = [e for e in evaluations if e.name in EVALUATIONS and not (e.needs & {"peers", "truth"})]
    if not chosen:
        return []
    small = replace(cfg, sae=(), architectures=cfg.architectures[:1], train_seeds=(), hookpoint=hookpoint)
    stages = RandomPipeline(small, log)
    with log.stage("random-weights model") as stage:
        try:
            sae = stages.trained[0]
            interpretation = BorrowedJudge(small, stages, log, judge) if judge is not None else None
            real = subject_info(sae, sha256_file(stages.folders[sae.sae_id] / "sae.safetensors"), kind="baseline")
            info = replace(
                real, sae_id=f"baseline.random_lm.{sae.sae_id}", lm_revision=real.lm_revision.partition("+random")[0])
            measurement = make_measurement(small, stages, interpretation, log)
            measurement.latents = lambda _: stages.latents.get(sae.sae_id)
            measurement.scores = lambda _: interpretation.scores.get(sae.sae_id) if interpretation else None
            measurement.run_all(chosen, [SAESubject(sae, info)], seeds=cfg.eval_seeds)
        except Exception as error:  # a floor that fails must not take the SAEs with it
            log.fail("baseline.random_lm", "random-weights model", error)
            stage.status = "failed"
            return []
    return measurement.folders
