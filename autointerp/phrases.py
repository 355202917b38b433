"""How near is some word of a window to each phrase of a text? Late interaction with sentence embeddings. Torch-free.

The value is the mean over the text's phrases of the largest cosine with a word of the window: MaxSim of ColBERT
(Khattab and Zaharia 2020, arXiv 2004.12832, equation 3) over phrases and words instead of word pieces.
docs/decisions/003 has what it sees that one vector per window does not.
"""

import re
from collections.abc import Iterable, Sequence

import numpy as np

from autointerp.interfaces import EmbedderLike
from autointerp.records import Exemplar
from autointerp.texts import Decoder, spelling

DECIMALS = 5
"""Cosines are rounded: the last bits hang on which texts shared a batch."""
LEAD = re.compile(r"^(?:words such as|the words?|tokens such as|the tokens?)\s+(?=\S)", re.IGNORECASE)
"""Openings that say what kind of thing follows, not which."""
BREAK = re.compile(r"[,;]\s+|\s+or\s+")


def phrases(text: str) -> tuple[str, ...]:
    """The parts of an explanation that can each be met by a word: "words such as run, comma ," -> ("run", "comma ,").

    Never empty: a text without parts is one phrase.
    """
    bare = LEAD.sub("", text.strip())
    return tuple(p for p in (part.strip() for part in BREAK.split(bare)) if p) or (text,)


class PhraseJudge:
    """Values of (text, window) pairs; every distinct phrase and word is embedded once."""

    def __init__(self, embedder: EmbedderLike, decoder: Decoder) -> None:
        self.embedder, self.decoder = embedder, decoder
        self._row: dict[str, int] = {}
        """Of each word that was met, in ``_vectors``."""
        self._vectors: np.ndarray | None = None
        """float32 [n, E]."""
        self._words: dict[str, np.ndarray] = {}
        """exemplar_id -> rows of its words, in the order of the alphabet."""

    def prepare(self, texts: Iterable[str], exemplars: Iterable[Exemplar]) -> None:
        """Embed everything that :meth:`values` will need in one go; optional, but batches are larger."""
        needed = {p for t in texts for p in phrases(t)}
        spelt = {e.exemplar_id: self._spelt(e) for e in exemplars if e.exemplar_id not in self._words}
        new = sorted({w for words in spelt.values() for w in words} - self._row.keys())
        self.embedder.embed(sorted(needed.union(new)))
        if new:
            self._row.update({word: row for row, word in enumerate(new, start=len(self._row))})
            vectors = self.embedder.embed(new)
            self._vectors = vectors if self._vectors is None else np.concatenate([self._vectors, vectors])
        for exemplar_id, words in spelt.items():
            self._words[exemplar_id] = np.array([self._row[w] for w in words], dtype=np.int32)

    def values(self, text: str, exemplars: Sequence[Exemplar]) -> list[float]:
        """One value in [-1, 1] per window, in their order."""
        self.prepare((), exemplars)
        phrases_pE = self.embedder.embed(phrases(text))
        values = []
        for exemplar in exemplars:
            assert self._vectors is not None
            words_wE = self._vectors[self._words[exemplar.exemplar_id]]
            values.append(round(float((words_wE @ phrases_pE.T).max(0).mean()), DECIMALS))
        return values

    def _spelt(self, exemplar: Exemplar) -> list[str]:
        return sorted({spelling(w) for w in self.decoder.words(exemplar.token_ids)}) or [""]
