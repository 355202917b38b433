"""Detection by late interaction: is some word of the window near each phrase of the explanation? No language model.

One vector for a whole window (`embedding`) hardly moves with one word in it, while most latents of a small SAE fire on
words (docs/decisions/003). The value is that of :mod:`autointerp.phrases`; the cut that turns it into yes or no is
chosen on the calibrate windows. Metrics: AUTOINTERP 5.2.
"""

from typing import Any, ClassVar

from autointerp.classify import DETECTION_METRICS, cut_scores
from autointerp.interfaces import ScoreContext, ScoreJob, ScoreResult
from autointerp.phrases import PhraseJudge
from autointerp.texts import Decoder


class LateInteraction:
    """Mean over phrases of the best word's cosine, thresholded on the calibrate split."""

    name: ClassVar[str] = "late_interaction"
    version: ClassVar[int] = 2
    needs: ClassVar[frozenset[str]] = frozenset({"embedder"})
    metrics: ClassVar[tuple[str, ...]] = DETECTION_METRICS

    def score_many(self, jobs: list[ScoreJob], ctx: ScoreContext) -> list[ScoreResult]:
        """One result per job; every distinct phrase and word is embedded once for all jobs."""
        assert ctx.embedder is not None
        judge = PhraseJudge(ctx.embedder, Decoder(ctx.tokenizer))
        usable = [job for job in jobs if job.explanation.text is not None]
        windows = {e.exemplar_id: e for job in usable for e in (*job.exemplars, *job.calibrate)}
        judge.prepare((job.explanation.text or "" for job in usable), windows.values())
        identity: dict[str, Any] = {
            "scorer": self.name, "version": self.version, "judge": f"{self.name}/{ctx.embedder.name}",
        }  # fmt: skip
        return [cut_scores(job, judge.values, self.metrics, **identity) for job in jobs]


PLUGIN = LateInteraction
