"""What a bigram model of the training text loses: the floor of explanation reconstruction (METRICS D). Torch-free.

V vocabulary, M predictions asked for. Losses in nats per token.
p(w | v) = (c(v, w) + 0.1 V q(w)) / (c(v) + 0.1 V) with the unigram q(w) = (c(w) + 0.1) / (C + 0.1 V): as much is added
as by adding 0.1 to every count of the row, but spread like the unigram, which is all that is left of a token never seen
(decision 022).
"""

from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

ADDED = 0.1
"""Added per word of the vocabulary (METRICS D)."""
CHUNK_TOKENS = 4_000_000

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


class Text(Protocol):
    """What is read of a ``sae.tokens.TokenSet``."""

    @property
    def tokens_BL(self) -> Any:
        """[B, L]; position 0 is the row prefix."""
        ...

    def doc_ids_BL(self) -> npt.NDArray[Any]: ...


def pairs(text: Text, special: tuple[int, ...]) -> Iterator[tuple[Ints, Ints]]:
    """(token, next token) of one document, neither the row prefix nor special; in chunks of rows."""
    docs_BL = np.asarray(text.doc_ids_BL())
    rows = max(1, CHUNK_TOKENS // text.tokens_BL.shape[1])
    for start in range(0, len(docs_BL), rows):
        ids = np.asarray(text.tokens_BL[start : start + rows], dtype=np.int64)
        docs = docs_BL[start : start + rows]
        ordinary = ~np.isin(ids, np.asarray(special, dtype=np.int64))
        ordinary[:, 0] = False
        fit = ordinary[:, :-1] & ordinary[:, 1:] & (docs[:, :-1] == docs[:, 1:])
        yield ids[:, :-1][fit], ids[:, 1:][fit]


def losses(text: Text, first_M: Ints, next_M: Ints, special: tuple[int, ...], vocab_size: int) -> Floats:
    """-log p(next | first) [M] under the bigram model of ``text``; counted for the pairs that are asked for alone."""
    V = vocab_size
    asked, place = np.unique(first_M.astype(np.int64) * V + next_M, return_inverse=True)
    row_V, word_V, seen = np.zeros(V, dtype=np.int64), np.zeros(V, dtype=np.int64), np.zeros(len(asked), dtype=np.int64)
    for first, following in pairs(text, special):
        row_V += np.bincount(first, minlength=V)
        word_V += np.bincount(following, minlength=V)
        joint = first * V + following
        at = np.searchsorted(asked, joint)
        hit = at < len(asked)
        hit[hit] = asked[at[hit]] == joint[hit]
        seen += np.bincount(at[hit], minlength=len(asked))
    unigram_V = (word_V + ADDED) / (word_V.sum() + ADDED * V)
    p = (seen[place] + ADDED * V * unigram_V[next_M]) / (row_V[first_M] + ADDED * V)
    return -np.log(p)
