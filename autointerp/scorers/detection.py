"""Detection by a prompted judge: a language model says which windows fit the explanation (AUTOINTERP 5.1).

How it is asked: :mod:`autointerp.judging`. Metrics: AUTOINTERP 5.2.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

from autointerp.classify import DETECTION_METRICS, detection_scores, unscored
from autointerp.client import Client, Origin
from autointerp.interfaces import ScoreContext, ScoreJob, ScoreResult
from autointerp.judging import MODES, Mode, Question, Verdict, YesNoJudge, ordered, verdict_item
from autointerp.prompts import load_prompt, window_text
from autointerp.records import DIAGNOSTIC_KINDS, Exemplar, Explanation
from sae.config import require
from sae.errors import Unsupported
from sae.manifest import rng


class Detection:
    """``Detection(mode="auto", per_request=10)``; auto = logprob where the client has next-token log-probabilities."""

    name: ClassVar[str] = "detection"
    version: ClassVar[int] = 3
    needs: ClassVar[frozenset[str]] = frozenset({"client:generate"})
    metrics: ClassVar[tuple[str, ...]] = (*DETECTION_METRICS, "average_precision")

    def __init__(self, *, mode: Mode = "auto", per_request: int = 10) -> None:
        require(mode in MODES, f"mode must be auto, logprob or list, got {mode!r}")
        require(per_request >= 1, f"per_request must be positive, got {per_request}")
        self.mode, self.per_request = mode, per_request
        self.inputs = {name: load_prompt(name).sha256 for name in ("detection_logprob", "detection_list")}
        self._judge = YesNoJudge(load_prompt("detection_logprob"), load_prompt("detection_list"), mode, per_request)

    def score_many(self, jobs: list[ScoreJob], ctx: ScoreContext) -> list[ScoreResult]:
        """One result per job. :class:`Unsupported` where the client lacks the mode's verb."""
        if ctx.client is None:
            raise Unsupported("'detection' needs a language model; choose a client or another scorer")
        jobs = [replace(job, exemplars=tuple(ordered(job.exemplars))) for job in jobs]
        usable = [i for i, job in enumerate(jobs) if job.explanation.text is not None and job.exemplars]
        found: dict[int, dict[str, Verdict]] = {i: {} for i in usable}
        for apart in (False, True):  # a diagnostic window never shares a request with one that counts
            shown = {i: [e for e in jobs[i].exemplars if (e.kind in DIAGNOSTIC_KINDS) == apart] for i in usable}
            asked = [(jobs[i].explanation, jobs[i].latent, windows) for i, windows in shown.items() if windows]
            answers = self.verdicts(asked, ctx, ctx.client) if asked else []
            for i, said in zip((i for i, windows in shown.items() if windows), answers, strict=True):
                found[i] |= {e.exemplar_id: v for e, v in zip(shown[i], said, strict=True)}
        identity: dict[str, Any] = {
            "scorer": self.name, "version": self.version, "judge": self._judge.name(ctx.client),
        }  # fmt: skip
        results = []
        for i, job in enumerate(jobs):
            if i in found:
                items = tuple(
                    verdict_item(job.explanation, e, found[i][e.exemplar_id], self.name) for e in job.exemplars
                )
                results.append(ScoreResult(scores=detection_scores(job, items, rank=True, **identity), items=items))
                continue
            results.append(unscored(job, self.metrics, **identity))
        return results

    def verdicts(
        self,
        asked: Sequence[tuple[Explanation, int, Sequence[Exemplar]]],
        ctx: ScoreContext,
        client: Client,
        stage: str = "score.detection",
    ) -> list[list[Verdict]]:
        """Per (explanation, latent whose windows these are, windows) one verdict per window."""
        questions = [
            Question(
                explanation=explanation.text or "",
                lines=tuple(window_text(ctx.tokenizer, e.token_ids) for e in windows),
                origin=Origin(stage=stage, sae_id=explanation.sae_id, latent=latent),
                order=rng(ctx.seed, explanation.sae_id, latent, "detection"),
            )
            for explanation, latent, windows in asked
        ]
        return self._judge.ask(questions, client, self.name)


PLUGIN = Detection
