"""Patterns of tokens with wildcards that stand for one latent: data, JSON, exact matching. Torch-free.

A pattern is read like text: its last token is the one on which the latent is predicted to be active. N flat tokens
(n = row * L + position), m tokens per pattern. The two ways to match are the table of AUTOINTERP 3: ``longest`` tries
literal and wildcard branches and keeps the most specific pattern; ``released`` repeats the walk of
openai/sparse_autoencoder (explanations.py at 4965b94), in which a short pattern shadows every longer one.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sae.errors import ConfigError, Unsupported

FORMAT_VERSION = 1
Matcher = Literal["longest", "released"]
MATCHERS: tuple[Matcher, ...] = ("longest", "released")
WILDCARD_WORD = "*"
START_WORD = "^"


@dataclass(frozen=True)
class Pattern:
    """One n-gram with wildcards."""

    ids: tuple[int | None, ...]
    """Token ids in reading order; None matches any token."""
    anchored: bool
    """Matches only where it begins at the first position of a row (behind the prefix token)."""
    value: float
    """Predicted activation at the last token, in the LM's own units."""
    n_docs: int = 1
    """Pairs that led to this pattern."""

    @property
    def n_literals(self) -> int:
        return sum(i is not None for i in self.ids)

    @property
    def fires_everywhere(self) -> bool:
        """Holds nothing but wildcards and is not anchored."""
        return self.n_literals == 0 and not self.anchored

    def rank(self) -> tuple[int, bool, int, float]:
        """Under ``longest`` the largest rank among the matching patterns wins."""
        return (len(self.ids), self.anchored, self.n_literals, self.value)

    def words(self, decode: Callable[[list[int]], str]) -> str:
        """Readable form: neighbouring literals are decoded together, wildcards become ``*``, an anchor ``^``."""
        parts: list[str] = [START_WORD + " "] if self.anchored else []
        literals: list[int] = []
        for token in (*self.ids, None):
            if token is not None:
                literals.append(token)
                continue
            if literals:
                parts.append(decode(literals))
                literals = []
            parts.append(" " + WILDCARD_WORD)
        text = "".join(parts)[: -len(" " + WILDCARD_WORD)]  # the sentinel at the end of the loop added one too many
        return " ".join(text.split())


class Prediction(NamedTuple):
    """Where and how strongly a pattern set fires; silent everywhere else."""

    flat_n: NDArray[np.int64]
    """Ascending flat token indices."""
    value_n: NDArray[np.float32]
    """Predicted activations, in the LM's own units."""


@dataclass(frozen=True)
class PatternSet:
    """All patterns of one latent."""

    patterns: tuple[Pattern, ...]
    pad_id: int
    matcher: Matcher = "longest"
    tokenizer_hash: str = ""

    def dump(self) -> dict[str, Any]:
        """Plain JSON types, keyed by token id; ``load(dump(x)) == x``."""
        entries = [
            {"ids": list(p.ids), "anchored": p.anchored, "value": p.value, "n_docs": p.n_docs} for p in self.patterns
        ]
        return {
            "version": FORMAT_VERSION, "matcher": self.matcher, "tokenizer_hash": self.tokenizer_hash,
            "pad_id": self.pad_id, "patterns": entries,
        }

    @classmethod
    def load(cls, values: Mapping[str, Any]) -> "PatternSet":
        """The inverse of :meth:`dump`; :class:`ConfigError` for anything else."""
        try:
            if values["version"] != FORMAT_VERSION or values["matcher"] not in MATCHERS:
                raise ConfigError(
                    f"patterns of version {values['version']!r}, matcher {values['matcher']!r}: expected version "
                    f"{FORMAT_VERSION} and one of {', '.join(MATCHERS)}; build the patterns again"
                )
            patterns = tuple(
                Pattern(
                    tuple(None if i is None else int(i) for i in p["ids"]),
                    bool(p["anchored"]), float(p["value"]), int(p["n_docs"]),
                )
                for p in values["patterns"]
            )
            return cls(patterns, int(values["pad_id"]), values["matcher"], str(values["tokenizer_hash"]))
        except (KeyError, TypeError) as error:
            raise ConfigError(f"not a dumped pattern set ({error!r}); build the patterns again") from error

    def words(self, decode: Callable[[list[int]], str], limit: int = 6) -> str:
        """The most frequent distinct patterns in words, as a text judge reads them: ``"... court of *"; "... law"``."""
        seen: dict[str, None] = {}
        ordered = sorted(self.patterns, key=lambda p: (-p.n_docs, -p.value, [-1 if i is None else i for i in p.ids]))
        for pattern in ordered:
            text = pattern.words(decode)
            if text:
                seen.setdefault(f'"... {text}"' if not pattern.anchored else f'"{text}"')
        return "; ".join(list(seen)[:limit])


def pad_token(tokenizer: Any) -> int:
    """N2G's neutral filler: the first of ``" _"``, ``"_"`` that the tokenizer writes as a single id."""
    for text in (" _", "_"):
        ids = tokenizer.encode(text, add_special_tokens=False)
        if len(ids) == 1:
            return int(ids[0])
    raise Unsupported('the tokenizer has no single id for " _" or "_"; pass pad_id with another neutral token')


class TokenIndex:
    """Where each token id stands in a token set, so that a pattern costs its rarest literal alone."""

    def __init__(self, tokens_BL: NDArray[np.integer], first_position: int = 1) -> None:
        """``first_position`` is 1 where rows begin with a prefix token, else 0; patterns never reach before it."""
        tokens = np.asarray(tokens_BL)
        if tokens.ndim != 2 or not 0 <= first_position <= tokens.shape[1]:
            raise ConfigError(f"tokens of shape {tokens.shape}: expected rows [B, L] with L >= {first_position}")
        self.n_rows, self.row_tokens = tokens.shape
        self.first_position = first_position
        self.tokens_N = tokens.reshape(-1)

    @cached_property
    def _order(self) -> NDArray[np.int64]:
        return np.argsort(self.tokens_N, kind="stable").astype(np.int64)

    @cached_property
    def _sorted(self) -> NDArray[Any]:
        return self.tokens_N[self._order]

    def _span(self, token: int) -> tuple[int, int]:
        # A Python int beyond the array's type would make numpy compare in float64.
        if not 0 <= token <= np.iinfo(self.tokens_N.dtype).max:
            return 0, 0
        wanted = self.tokens_N.dtype.type(token)
        return (
            int(np.searchsorted(self._sorted, wanted, side="left")),
            int(np.searchsorted(self._sorted, wanted, side="right")),
        )

    def count(self, token: int) -> int:
        """Occurrences of a token id."""
        low, high = self._span(token)
        return high - low

    def positions(self, token: int) -> NDArray[np.int64]:
        """Ascending flat indices of a token id."""
        low, high = self._span(token)
        return self._order[low:high]

    def ends(self, pattern: Pattern) -> NDArray[np.int64]:
        """Ascending flat indices of the last token of every match; a match lies in one row, behind the prefix."""
        m, first, row = len(pattern.ids), self.first_position, self.row_tokens
        literals = [(i, token) for i, token in enumerate(pattern.ids) if token is not None]
        if m == 0 or first + m > row:
            return np.zeros(0, dtype=np.int64)
        if pattern.anchored:
            begins = np.arange(self.n_rows, dtype=np.int64) * row + first
        elif literals:
            offset, rarest = min(literals, key=lambda item: (self.count(item[1]), item[0]))
            begins = self.positions(rarest) - offset
            column = begins % row
            inside = (begins >= 0) & (column >= first) & (column + m <= row)
            begins = begins[inside]
        else:
            columns = np.arange(first, row - m + 1, dtype=np.int64)
            begins = (np.arange(self.n_rows, dtype=np.int64)[:, None] * row + columns).reshape(-1)
        for offset, token in literals:
            begins = begins[self.tokens_N[begins + offset] == token]
        return begins + (m - 1)


def predict(patterns: PatternSet, index: TokenIndex, keep_N: NDArray[np.bool_] | None = None) -> Prediction:
    """Exact prediction for every token of a set; tokens outside ``keep_N`` (the token filter) are left out."""
    ranked = sorted(patterns.patterns, key=Pattern.rank)
    found = [index.ends(p) for p in ranked]
    flat = np.concatenate(found) if found else np.zeros(0, dtype=np.int64)
    which = np.repeat(np.arange(len(ranked)), [f.size for f in found])
    # Ascending by (token, rank): the last entry of each token is the pattern that wins.
    order = np.lexsort((which, flat))
    flat, which = flat[order], which[order]
    last = np.ones(flat.size, dtype=bool)
    last[:-1] = flat[1:] != flat[:-1]
    flat, which = flat[last], which[last]
    if keep_N is not None:
        kept = np.asarray(keep_N)[flat]
        flat, which = flat[kept], which[kept]
    if patterns.matcher == "released":
        return _released(patterns.patterns, index, flat)
    values = np.array([p.value for p in ranked], dtype=np.float32)
    return Prediction(flat, values[which] if flat.size else np.zeros(0, dtype=np.float32))


class _Node:
    """Trie over reversed patterns."""

    __slots__ = ("anchored_value", "children", "value")

    def __init__(self) -> None:
        self.children: dict[int | None, _Node] = {}
        self.value: float | None = None
        self.anchored_value: float | None = None


def _trie(patterns: Sequence[Pattern]) -> _Node:
    root = _Node()
    for pattern in patterns:
        node = root
        for token in reversed(pattern.ids):
            node = node.children.setdefault(token, _Node())
        if pattern.anchored:
            node.anchored_value = pattern.value
        else:
            node.value = pattern.value
    return root


def _released(patterns: Sequence[Pattern], index: TokenIndex, candidates: NDArray[np.int64]) -> Prediction:
    """The greedy walk, only where ``longest`` fires: a released firing is always a longest firing too."""
    root = _trie(patterns)
    flat: list[int] = []
    values: list[float] = []
    for end in candidates.tolist():
        first = end - end % index.row_tokens + index.first_position
        value = _walk(root, index.tokens_N, first, end)
        if value is not None:
            flat.append(end)
            values.append(value)
    return Prediction(np.array(flat, dtype=np.int64), np.array(values, dtype=np.float32))


def _walk(root: _Node, tokens_N: NDArray[np.integer], first: int, end: int) -> float | None:
    """Backwards from ``end``: the literal child before the wildcard, no way back, the first leaf reached is taken."""
    node = root
    for at in range(end, first - 1, -1):
        step = node.children.get(int(tokens_N[at])) or node.children.get(None)
        if step is None:
            return None
        node = step
        if node.value is not None:
            return node.value
        if node.anchored_value is not None and at == first:
            return node.anchored_value
    return None
