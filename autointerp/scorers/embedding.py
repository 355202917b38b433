"""Detection by sentence embeddings: is a window near the explanation? No language model.

The cosine of explanation and window is the judge's answer; the cut that turns it into yes or no is chosen on the
calibrate windows (LLM decision 2). Metrics: AUTOINTERP 5.2.
"""

from typing import Any, ClassVar

import numpy as np

from autointerp.classify import DETECTION_METRICS, choose_threshold, detection_scores, make_items, null_scores
from autointerp.interfaces import EmbedderLike, ScoreContext, ScoreJob, ScoreResult
from autointerp.texts import Decoder

DECIMALS = 5
"""Cosines are rounded: the last bits hang on which texts shared a batch."""


class Embedding:
    """Cosine of explanation and window, thresholded on the calibrate split."""

    name: ClassVar[str] = "embedding"
    version: ClassVar[int] = 1
    needs: ClassVar[frozenset[str]] = frozenset({"embedder"})
    metrics: ClassVar[tuple[str, ...]] = DETECTION_METRICS

    def score_many(self, jobs: list[ScoreJob], ctx: ScoreContext) -> list[ScoreResult]:
        """One result per job; every distinct text is embedded once for all jobs."""
        assert ctx.embedder is not None
        decoder = Decoder(ctx.tokenizer)
        usable = [job for job in jobs if job.explanation.text is not None]
        texts = {job.explanation.text or "" for job in usable}
        texts |= {decoder.window(e) for job in usable for e in (*job.exemplars, *job.calibrate)}
        ctx.embedder.embed(sorted(texts))
        return [self._score(job, decoder, ctx.embedder) for job in jobs]

    def _score(self, job: ScoreJob, decoder: Decoder, embedder: EmbedderLike) -> ScoreResult:
        identity: dict[str, Any] = {"scorer": self.name, "version": self.version, "judge": embedder.name}
        failure = job.explanation.failure
        if job.explanation.text is None:
            code = failure.code if failure else "unsupported"  # a bare pattern has no text to embed
            return ScoreResult(scores=null_scores(job, code, self.metrics, **identity))
        if not job.exemplars or not job.calibrate:
            return ScoreResult(scores=null_scores(job, "too_few_positive", self.metrics, **identity))
        query = embedder.embed([job.explanation.text])[0]
        drawn = _cosines(query, embedder.embed([decoder.window(e) for e in job.exemplars]))
        known = _cosines(query, embedder.embed([decoder.window(e) for e in job.calibrate]))
        threshold = choose_threshold(known, [e.positive for e in job.calibrate])
        items = make_items(job, job.exemplars, drawn, threshold, self.name)
        return ScoreResult(scores=detection_scores(job, items, **identity), items=tuple(items))


def _cosines(query_E: np.ndarray, windows_nE: np.ndarray) -> list[float]:
    return [float(v) for v in np.round(windows_nE @ query_E, DECIMALS)]


PLUGIN = Embedding
