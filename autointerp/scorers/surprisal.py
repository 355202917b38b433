"""Detection by likelihood: does a window make the explanation more probable than no window does?

log P(explanation | window) - log P(explanation), from a language model that cannot answer questions (LLM, "judge by
likelihood"). Windows are compared within one explanation, so its own probability cancels out of every metric here.
The cut is chosen on the calibrate windows. A subset of the windows is judged, since each costs a forward pass.
"""

import math
from collections.abc import Sequence
from typing import Any, ClassVar

from autointerp.classify import (
    DETECTION_METRICS,
    choose_threshold,
    detection_scores,
    make_items,
    null_scores,
    positives_of,
    unscored,
)
from autointerp.client import Client, ContinuationRequest, LogprobReply, Origin
from autointerp.interfaces import ScoreContext, ScoreJob, ScoreResult
from autointerp.records import Exemplar, Failure
from autointerp.texts import PMI_NO_TEXT, Decoder, any_of, deal, pmi_continuation, pmi_prompt

Values = dict[tuple[str, str], float | Failure]
"""(exemplar id or "" for no window, explanation text) -> log P(explanation | window)."""


class Surprisal:
    """Likelihood contrast of the explanation."""

    name: ClassVar[str] = "surprisal"
    version: ClassVar[int] = 3
    needs: ClassVar[frozenset[str]] = frozenset({"client:continuation"})
    metrics: ClassVar[tuple[str, ...]] = DETECTION_METRICS

    def __init__(
        self,
        *,
        positive: int = 8,
        silent: int = 8,
        calibrate: int = 8,
        max_latents: int | None = None,
        selected_only: bool = True,
    ) -> None:
        """At most this many windows per job; half of ``calibrate`` are positive.

        ``max_latents`` and ``selected_only`` tell the pipeline what to hand over, see
        :func:`autointerp.pipeline.jobs_for`: every window and every text costs a pass of the language model.
        """
        self.positive, self.silent, self.calibrate = positive, silent, calibrate
        self.max_latents, self.selected_only = max_latents, selected_only

    def score_many(self, jobs: list[ScoreJob], ctx: ScoreContext) -> list[ScoreResult]:
        """One result per job; a window shared by several jobs is read once for all their explanations."""
        assert ctx.client is not None
        windows = {
            i: (self._drawn(job.exemplars, self.positive, self.silent),
                self._drawn(job.calibrate, self.calibrate // 2, self.calibrate - self.calibrate // 2))
            for i, job in enumerate(jobs) if job.explanation.text is not None
        }  # fmt: skip
        asked = {i: drawn for i, drawn in windows.items() if all(drawn)}  # the others cannot be scored: ask nothing
        values = self._ask(jobs, asked, Decoder(ctx.tokenizer), ctx.client)
        judge = ctx.client.identity.model
        return [self._score(job, windows.get(i), values, judge) for i, job in enumerate(jobs)]

    @staticmethod
    def _drawn(exemplars: Sequence[Exemplar], positive: int, silent: int) -> list[Exemplar]:
        """Positives dealt round the quantile groups, then uniform silent windows."""
        return deal(positives_of(exemplars), positive) + any_of([e for e in exemplars if e.kind == "silent"], silent)

    def _ask(
        self,
        jobs: Sequence[ScoreJob],
        windows: dict[int, tuple[list[Exemplar], list[Exemplar]]],
        decoder: Decoder,
        client: Client,
    ) -> Values:
        texts: dict[str, set[str]] = {"": set()}
        prompts = {"": PMI_NO_TEXT}
        latent_of: dict[str, tuple[str, int | None]] = {"": ("", None)}
        for i, (drawn, known) in windows.items():
            explanation = jobs[i].explanation.text or ""
            texts[""].add(explanation)
            for exemplar in (*drawn, *known):
                texts.setdefault(exemplar.exemplar_id, set()).add(explanation)
                prompts[exemplar.exemplar_id] = pmi_prompt(decoder.window(exemplar))
                latent_of[exemplar.exemplar_id] = (jobs[i].sae_id, jobs[i].latent)
        asked = [(window, sorted(texts[window])) for window in sorted(texts) if texts[window]]
        requests = [
            ContinuationRequest(
                prompt=prompts[window],
                continuations=tuple(pmi_continuation(t) for t in explanations),
                origin=Origin(stage="score.surprisal", sae_id=latent_of[window][0], latent=latent_of[window][1]),
            )
            for window, explanations in asked
        ]
        values: Values = {}
        replies = client.logprobs(requests) if requests else []
        for (window, explanations), reply in zip(asked, replies, strict=True):
            for k, text in enumerate(explanations):
                values[window, text] = reply.sums[k] if isinstance(reply, LogprobReply) else reply
        return values

    def _score(
        self, job: ScoreJob, windows: tuple[list[Exemplar], list[Exemplar]] | None, values: Values, judge: str
    ) -> ScoreResult:
        identity: dict[str, Any] = {"scorer": self.name, "version": self.version, "judge": judge}
        text = job.explanation.text
        if text is None or windows is None or not all(windows):
            return unscored(job, self.metrics, **identity)
        drawn, known = windows
        contrasts = [(_contrast(values, e, text), e.positive) for e in known]
        fitted = [(v, positive) for v, positive in contrasts if not isinstance(v, Failure) and math.isfinite(v)]
        if not fitted:
            return ScoreResult(scores=null_scores(job, "too_many_failures", self.metrics, **identity))
        threshold = choose_threshold([v for v, _ in fitted], [y for _, y in fitted])
        items = make_items(job, drawn, [_contrast(values, e, text) for e in drawn], threshold, self.name)
        return ScoreResult(scores=detection_scores(job, items, **identity), items=tuple(items))


def _contrast(values: Values, exemplar: Exemplar, text: str) -> float | Failure:
    """log P(text | window) - log P(text) in nats."""
    with_window, without = values[exemplar.exemplar_id, text], values["", text]
    if isinstance(with_window, Failure):
        return with_window
    return without if isinstance(without, Failure) else with_window - without


PLUGIN = Surprisal
