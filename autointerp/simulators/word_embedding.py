"""The default simulator without a large model: how near is each word to the explanation? (LLM decision 4)

Every token of a word gets the word's cosine to the explanation, negative ones cut at 0. W tokens per window.
"""

from typing import Any, ClassVar

import numpy as np

from autointerp.interfaces import ScoreContext, SimulationPair
from autointerp.records import Exemplar, Explanation, Failure, Simulation
from autointerp.texts import Decoder, Word, spelling

DECIMALS = 5
"""Cosines are rounded: the last bits hang on which texts shared a batch."""


class WordEmbedding:
    """Cosine of word and explanation, scale UNIT."""

    name: ClassVar[str] = "word_embedding"
    version: ClassVar[int] = 2
    needs: ClassVar[frozenset[str]] = frozenset({"embedder"})

    def simulate_many(self, pairs: list[SimulationPair], ctx: ScoreContext) -> list[Simulation]:
        """One simulation per pair; every distinct word is embedded once for all pairs."""
        assert ctx.embedder is not None
        decoder = Decoder(ctx.tokenizer)
        words = {e.exemplar_id: decoder.words(e.token_ids) for x, e in pairs if x.text is not None}
        texts = {x.text for x, _ in pairs if x.text is not None}
        texts |= {spelling(w) for found in words.values() for w in found}
        vectors = dict(zip(sorted(texts), ctx.embedder.embed(sorted(texts)), strict=True))
        return [self._simulate(x, e, words.get(e.exemplar_id, []), vectors) for x, e in pairs]

    def _simulate(
        self, explanation: Explanation, exemplar: Exemplar, words: list[Word], vectors: dict[str, np.ndarray]
    ) -> Simulation:
        ids: dict[str, Any] = {
            "explanation_id": explanation.explanation_id,
            "exemplar_id": exemplar.exemplar_id,
            "simulator": self.name,
        }
        if explanation.text is None:
            failure = explanation.failure or Failure(
                code="unsupported", stage="simulate", detail="a bare pattern has no text to embed"
            )
            return Simulation(failure=failure, **ids)
        query = vectors[explanation.text]
        values = np.zeros(len(exemplar.token_ids))
        for word in words:
            values[word.first : word.last + 1] = np.maximum(vectors[spelling(word)] @ query, 0.0)
        if not np.isfinite(values).all():
            failure = Failure(code="non_finite", stage="simulate", detail="the embedder's vectors are no numbers")
            return Simulation(failure=failure, **ids)
        return Simulation(values=tuple(float(v) for v in np.round(values, DECIMALS)), **ids)


PLUGIN = WordEmbedding
