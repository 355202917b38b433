"""Detection by sentence embeddings: is a window near the explanation? No language model.

The cosine of explanation and window is the judge's answer; the cut that turns it into yes or no is chosen on the
calibrate windows (LLM decision 2). Metrics: AUTOINTERP 5.2.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from autointerp.classify import DETECTION_METRICS, cut_scores
from autointerp.interfaces import ScoreContext, ScoreJob, ScoreResult
from autointerp.records import Exemplar
from autointerp.texts import Decoder

DECIMALS = 5
"""Cosines are rounded: the last bits hang on which texts shared a batch."""


class Embedding:
    """Cosine of explanation and window, thresholded on the calibrate split."""

    name: ClassVar[str] = "embedding"
    version: ClassVar[int] = 3
    needs: ClassVar[frozenset[str]] = frozenset({"embedder"})
    metrics: ClassVar[tuple[str, ...]] = DETECTION_METRICS

    def __init__(self, *, max_latents: int | None = None) -> None:
        """``max_latents`` tells the pipeline what to hand over (:func:`autointerp.pipeline.jobs_for`)."""
        self.max_latents = max_latents

    def score_many(self, jobs: list[ScoreJob], ctx: ScoreContext) -> list[ScoreResult]:
        """One result per job; every distinct text is embedded once for all jobs."""
        assert ctx.embedder is not None
        decoder = Decoder(ctx.tokenizer)
        usable = [job for job in jobs if job.explanation.text is not None]
        shown = {e.exemplar_id: e for job in usable for e in (*job.exemplars, *job.calibrate)}
        read = {exemplar_id: decoder.window(e) for exemplar_id, e in shown.items()}
        ctx.embedder.embed(sorted({job.explanation.text or "" for job in usable}.union(read.values())))
        identity: dict[str, Any] = {"scorer": self.name, "version": self.version, "judge": ctx.embedder.name}
        embed = ctx.embedder.embed

        def values(text: str, windows: Sequence[Exemplar]) -> list[float]:
            return _cosines(embed([text])[0], embed([read[e.exemplar_id] for e in windows]))

        return [cut_scores(job, values, self.metrics, **identity) for job in jobs]


def _cosines(query_E: np.ndarray, windows_nE: np.ndarray) -> list[float]:
    return [float(v) for v in np.round(windows_nE @ query_E, DECIMALS)]


PLUGIN = Embedding
