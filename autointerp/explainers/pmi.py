"""The embedded default explainer: choose a label, don't write one (LLM decision 1).

1. A shortlist from the concept bank by sentence embeddings: labels near the latent's words, and nearer to its active
   than to its silent windows.
2. Each label's contrast: mean over active windows of log P(label | window), minus the mean over silent windows.
   Pointwise mutual information, so a label's own probability cancels out.
3. The largest contrast wins. It must beat its shuffled floor: the same maximum when the roles active and silent are
   dealt to the windows at random. Otherwise the answer is "no explanation found".

n windows, m labels, E numbers per embedding.
"""

from collections.abc import Sequence
from itertools import combinations
from typing import Any, ClassVar, NamedTuple

import numpy as np

from autointerp.client import ContinuationRequest, LogprobReply, Origin
from autointerp.concepts import BANK, Bank, load_bank
from autointerp.interfaces import EmbedderLike, ExplainContext, explanation_by
from autointerp.records import Exemplar, Explanation, Failure, LatentView
from autointerp.texts import Decoder, marked_words, named, pmi_continuation, pmi_prompt
from sae.manifest import sha256_file

FLOOR_QUANTILE = 0.8
"""The true contrast must exceed this share of the shuffled ones."""
MAX_WORDS = 6
"""Marked words that stand for the latent in the shortlist."""


class _Choice(NamedTuple):
    label: str
    contrast: float
    """Nats."""
    floor: float
    """Nats."""


class Pmi:
    """Labels of the concept bank ranked by pointwise mutual information with the latent's windows."""

    name: ClassVar[str] = "pmi"
    version: ClassVar[int] = 2
    needs: ClassVar[frozenset[str]] = frozenset({"client:continuation", "embedder"})

    def __init__(self, *, active: int = 4, silent: int = 2, shortlist: int = 5, window_tokens: int = 24) -> None:
        """Windows and labels per latent: their product is what the language model has to read."""
        self.active, self.silent, self.shortlist, self.window_tokens = active, silent, shortlist, window_tokens
        self.inputs = {"bank_sha256": sha256_file(BANK)}

    def explain_many(self, views: list[LatentView], ctx: ExplainContext) -> list[list[Explanation]]:
        """One explanation per view, or `too_few_positive`, `no_candidate` (nothing beats the shuffled floor), or the
        failure of the language model. ``margin`` is the winner's contrast minus its floor, in nats."""
        assert ctx.client is not None and ctx.embedder is not None
        decoder = Decoder(ctx.tokenizer)
        bank = load_bank(ctx.embedder)
        windows = [self._windows(view) for view in views]
        shortlists = self._shortlists(views, windows, decoder, bank, ctx.embedder)
        requests = [
            ContinuationRequest(
                prompt=pmi_prompt(decoder.around(exemplar, self.window_tokens)),
                continuations=tuple(pmi_continuation(label) for label in labels),
                origin=Origin(stage="explain.pmi", sae_id=view.sae_id, latent=view.latent),
            )
            for view, (active, silent), labels in zip(views, windows, shortlists, strict=True)
            if labels
            for exemplar in (*active, *silent)
        ]
        replies = iter(ctx.client.logprobs(requests) if requests else [])
        out = []
        for view, (active, silent), labels in zip(views, windows, shortlists, strict=True):
            answers = [next(replies) for _ in (*active, *silent)] if labels else []
            out.append([self._explain(view, active, silent, labels, answers, ctx)])
        return out

    def _windows(self, view: LatentView) -> tuple[list[Exemplar], list[Exemplar]]:
        """Three of the ten strongest windows (the first in the text), one of the strongest quantile group, and silent
        ones; other positive windows where these are too few. Empty without two positive and one silent."""
        top = [e for e in view.exemplars if e.kind == "top"]
        spread = [e for e in view.exemplars if e.kind == "quantile"][::-1]
        positive = top[: self.active - self.active // 4] + spread[: self.active // 4]
        positive += [e for e in (*top, *spread) if e not in positive][: self.active - len(positive)]
        silent = [e for e in view.exemplars if e.kind == "silent"][: self.silent]
        return (positive, silent) if len(positive) >= 2 and silent else ([], [])

    def _shortlists(
        self,
        views: Sequence[LatentView],
        windows: Sequence[tuple[list[Exemplar], list[Exemplar]]],
        decoder: Decoder,
        bank: Bank,
        embedder: EmbedderLike,
    ) -> list[list[str]]:
        words = [[named(w) for w, _ in marked_words(decoder, view)[:MAX_WORDS]] for view in views]
        around = lambda exemplars: [decoder.around(e, self.window_tokens) for e in exemplars]  # noqa: E731
        texts = [(around(active), around(silent)) for active, silent in windows]
        embedder.embed(sorted({t for w, (a, s) in zip(words, texts, strict=True) for t in (*w, *a, *s)}))
        out: list[list[str]] = []
        for latent_words, (active, silent) in zip(words, texts, strict=True):
            if not active or not latent_words:
                out.append([])
                continue
            near_words = bank.vectors_nE @ embedder.embed(latent_words).mean(0)
            towards = embedder.embed(active).mean(0) - embedder.embed(silent).mean(0)
            score = np.round(near_words + bank.vectors_nE @ towards, 5)
            order = sorted(range(len(bank.labels)), key=lambda i: (-score[i], bank.labels[i]))  # noqa: B023
            out.append([bank.labels[i] for i in order[: self.shortlist]])
        return out

    def _explain(
        self,
        view: LatentView,
        active: list[Exemplar],
        silent: list[Exemplar],
        labels: list[str],
        answers: list[Any],
        ctx: ExplainContext,
    ) -> Explanation:
        common: dict[str, Any] = {
            "llm": ctx.client.identity.model if ctx.client else None,
            "llm_revision": ctx.client.identity.revision if ctx.client else None,
            "exemplar_ids": tuple(e.exemplar_id for e in (*active, *silent)),
        }
        if not labels:
            return explanation_by(self, view, Failure(code="too_few_positive", stage="explain"), **common)
        failed = [a for a in answers if not isinstance(a, LogprobReply)]
        if failed:
            return explanation_by(self, view, failed[0], **common)
        usage = [a.usage for a in answers]
        common["prompt_tokens"] = sum(u.prompt_tokens for u in usage)
        common["cached_tokens"] = sum(u.cached_tokens for u in usage)
        choice = choose(labels, np.array([a.sums for a in answers], dtype=np.float64), len(active))
        margin = round(choice.contrast - choice.floor, 6)
        if margin <= 0:
            detail = f"no explanation found: best {choice.label!r} at {choice.contrast:.2f}, floor {choice.floor:.2f}"
            failure = Failure(code="no_candidate", stage="explain", detail=detail)
            return explanation_by(self, view, failure, margin=margin, **common)
        return explanation_by(self, view, choice.label, margin=margin, **common)


def choose(labels: Sequence[str], logp_nm: np.ndarray, n_active: int) -> _Choice:
    """The label of largest contrast, with its shuffled floor.

    ``logp_nm``: log P(label | window), the first ``n_active`` windows active, the others silent. The floor is the
    0.8 quantile of the largest contrast over all ways to call ``n_active`` of the n windows active.
    """
    n = len(logp_nm)
    total = logp_nm.sum(0)
    contrasts = []
    for members in combinations(range(n), n_active):
        inside = logp_nm[list(members)].sum(0)
        contrasts.append(inside / n_active - (total - inside) / (n - n_active))
    # combinations() begins with the true one: (0, 1, ..., n_active - 1).
    best = int(np.argmax(contrasts[0]))
    floor = float(np.quantile([c.max() for c in contrasts[1:]], FLOOR_QUANTILE))
    return _Choice(labels[best], float(contrasts[0][best]), floor)


PLUGIN = Pmi
