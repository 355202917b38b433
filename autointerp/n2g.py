"""Build N2G patterns: which few tokens before an activation suffice to cause it (AUTOINTERP 3, METRICS D).

After Foote et al. (N2G) in the reduced form of Gao et al., arXiv 2406.04093, section 4.3; where we differ from the
released code is the table of AUTOINTERP 3. Torch-free: the model is behind ``last_acts``. All pairs of all latents
advance in lockstep, so that each round of probes is one question to the model, which reads what several probes share
(the same few tokens, or the same beginning) once.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from autointerp.n2g_patterns import (
    MATCHERS,
    Matcher,
    Pattern,
    PatternSet,
    Prediction,
    TokenIndex,
    pad_token,
    predict,
)
from autointerp.records import Failure
from sae.errors import ConfigError
from sae.token_tree import count_nodes

__all__ = [
    "BuildResult", "Matcher", "Pair", "Pattern", "PatternSet", "Prediction", "TokenIndex", "build", "build_many",
    "pad_token", "predict", "token_patterns",
]

HALF = 0.5
GROUP_ENDS = (1, 2, 3, 4, 6, 8)
"""Suffix lengths are tried one by one, then in twos, then 8 at a time: most latents need few tokens, and every token of
a probe is a token for the model."""
GROUP_STEP = 8
MAX_SUFFIX = 8
"""Longer suffixes are not tried by default. Measured (SmolLM2-135M, block 15, TopK of 4,608 latents after 393,216
tokens, 32 latents, 8 pairs each): without a limit 1,485 tokens per latent, up to 12 tokens 577; patterns of 9 to 12
tokens changed no latent's F1, those beyond moved the mean from .087 to .093."""

AT_ONCE_SHARE = 0.6
"""All suffix lengths are asked about at once where that costs less than this share of what the groups would cost if no
pair were settled before the last. Measured on 128 latents, 16 pairs each: the groups cost about .7 of that."""

Tokens = tuple[int, ...]
Floats = NDArray[np.float64]
LastActs = Callable[[Sequence[tuple[int, Tokens]]], np.ndarray]
"""[(latent, token ids)] -> float32 activations at the last tokens (autointerp.interfaces.LastActs)."""


class Pair(NamedTuple):
    """One positive activation with its left context."""

    tokens: Tokens
    """Up to and including the token of the activation; without the row prefix."""
    act: float
    """Activation there, in the LM's own units."""


class _Outcome(NamedTuple):
    """What one pair led to."""

    pattern: Pattern | None
    code: str | None
    """n2g_unreproducible: no suffix reaches half the activation; n2g_degenerate: nothing but wildcards."""


@dataclass(frozen=True)
class BuildResult:
    """Patterns of one latent and what became of its pairs."""

    patterns: PatternSet
    n_pairs: int
    n_unreproducible: int = 0
    n_degenerate: int = 0
    outcomes: tuple[_Outcome, ...] = field(default=(), repr=False)

    @property
    def failure(self) -> Failure | None:
        """Set when no pattern is left."""
        if self.patterns.patterns:
            return None
        if self.n_pairs == 0:
            return Failure(code="too_few_positive", stage="explain", detail="no positive activation to build from")
        code = "n2g_degenerate" if self.n_degenerate else "n2g_unreproducible"
        detail = f"{self.n_pairs} pairs: {self.n_unreproducible} unreproducible, {self.n_degenerate} all wildcards"
        return Failure(code=code, stage="explain", detail=detail)


def suffix_groups(length: int) -> list[range]:
    """Suffix lengths 1..``length`` in the groups in which they are probed."""
    ends = [e for e in GROUP_ENDS if e < length]
    while (ends[-1] if ends else 0) + GROUP_STEP < length and (ends and ends[-1] >= GROUP_ENDS[-1]):
        ends.append(ends[-1] + GROUP_STEP)
    ends.append(length)
    starts = [1, *(e + 1 for e in ends[:-1])]
    return [range(s, e + 1) for s, e in zip(starts, ends, strict=True)]


class _Suffix(NamedTuple):
    """The shortest suffix of a pair that was found to reach half of its activation, and what it reaches."""

    tokens: Tokens
    value: float
    code: str | None = None


def _ask(last_acts: LastActs, latents: Sequence[int], probes: Sequence[list[Tokens]], prefix: Tokens) -> list[Floats]:
    """Activations of each latent on its probes, to which ``prefix`` is put in front; one question to the model."""
    flat = [(latent, prefix + tokens) for latent, asked in zip(latents, probes, strict=True) for tokens in asked]
    answers = np.asarray(last_acts(flat), dtype=np.float64)
    if answers.shape != (len(flat),):
        raise ConfigError(f"last_acts returned shape {answers.shape} for {len(flat)} probes")
    return np.split(answers, np.cumsum([len(asked) for asked in probes])[:-1])


def _groups(pairs: Sequence[Pair], max_suffix: int | None, prefix: Tokens) -> list[list[range]]:
    """Per pair the suffix lengths in the groups in which they are asked about.

    Suffixes of neighbouring positions begin alike: where the pairs lie that close, a tree of all lengths is read in
    less than the trees of one group after the other, and all are asked about at once.
    """
    longest = [min(len(pair.tokens), max_suffix or len(pair.tokens)) for pair in pairs]
    staged = [suffix_groups(n) for n in longest]
    rounds = [{prefix + pair.tokens[-n:] for pair, groups in zip(pairs, staged, strict=True) if r < len(groups)
               for n in groups[r]} for r in range(max(map(len, staged), default=0))]  # fmt: skip
    together = count_nodes(list(set().union(*rounds)))
    if together < AT_ONCE_SHARE * sum(count_nodes(list(lists)) for lists in rounds):
        return [[range(1, n + 1)] for n in longest]
    return staged


def _suffixes(
    latents: Sequence[int], pairs: Sequence[Pair], last_acts: LastActs, prefix: Tokens, max_suffix: int | None
) -> list[_Suffix | None]:
    """Of each pair the shortest suffix that reaches half of its activation; None where none does."""
    found: list[_Suffix | None] = [None] * len(pairs)
    groups = _groups(pairs, max_suffix, prefix)
    still, number = list(range(len(pairs))), 0
    while still:
        probes = [[pairs[i].tokens[-n:] for n in groups[i][number]] for i in still]
        answers = _ask(last_acts, [latents[i] for i in still], probes, prefix)
        for i, asked, acts in zip(still, probes, answers, strict=True):
            reached = np.flatnonzero(acts / pairs[i].act >= HALF)
            if reached.size:  # the shortest that qualifies, as in a sequential search
                found[i] = _Suffix(asked[int(reached[0])], float(acts[reached[0]]))
        number += 1
        still = [i for i in still if found[i] is None and number < len(groups[i])]
    return found


def _variants(suffix: Tokens, pad_id: int) -> list[Tokens]:
    """A pad token in front, then in place of each token."""
    return [(pad_id, *suffix), *((*suffix[:p], pad_id, *suffix[p + 1 :]) for p in range(len(suffix)))]


def _outcome(pair: Pair, suffix: _Suffix, acts: Floats, matcher: Matcher) -> _Outcome:
    """From the activations on the :func:`_variants` of a suffix."""
    anchored = bool(acts[0] / pair.act < HALF)
    saliency = 1.0 - acts[1:] / suffix.value
    # NaN never counts as "does not matter": a token stays literal unless its replacement was seen to be harmless.
    wildcard = saliency < HALF
    ids = tuple(None if w else t for t, w in zip(suffix.tokens, wildcard.tolist(), strict=True))
    pattern = Pattern(ids, anchored, suffix.value)
    if pattern.fires_everywhere:
        return _Outcome(pattern if matcher == "released" else None, "n2g_degenerate")
    return _Outcome(pattern, suffix.code)


def _merge(outcomes: Sequence[_Outcome], matcher: Matcher) -> tuple[Pattern, ...]:
    """Equal patterns become one: mean value under ``longest``, the last document's under ``released``."""
    values: dict[tuple[tuple[int | None, ...], bool], list[float]] = defaultdict(list)
    for outcome in outcomes:
        if outcome.pattern is not None:
            values[outcome.pattern.ids, outcome.pattern.anchored].append(outcome.pattern.value)
    merged = [
        Pattern(ids, anchored, v[-1] if matcher == "released" else float(np.mean(v)), len(v))
        for (ids, anchored), v in values.items()
    ]
    return tuple(sorted(merged, key=lambda p: ([-1 if i is None else i for i in p.ids], p.anchored)))


def _check_pairs(pairs_by_latent: Mapping[int, Sequence[Pair]]) -> None:
    for latent, pairs in pairs_by_latent.items():
        for pair in pairs:
            if not pair.tokens or not (np.isfinite(pair.act) and pair.act > 0):
                raise ConfigError(
                    f"latent {latent}: a pair of {len(pair.tokens)} tokens with activation {pair.act}; "
                    "expected at least one token and a positive activation"
                )


def _run(
    jobs: Sequence[tuple[int, Pair]], last_acts: LastActs, prefix: Tokens, pad_id: int, matcher: Matcher,
    max_suffix: int | None,
) -> list[_Outcome]:  # fmt: skip
    """What each (latent, pair) leads to: first all suffixes, then all their variants in one question."""
    latents, pairs = [latent for latent, _ in jobs], [pair for _, pair in jobs]
    unreproducible = "n2g_unreproducible"
    outcomes = [_Outcome(None, unreproducible)] * len(jobs)
    suffixes = _suffixes(latents, pairs, last_acts, prefix, max_suffix)
    if matcher == "released":  # the whole document stands for itself
        suffixes = [s or _Suffix(p.tokens, p.act, unreproducible) for s, p in zip(suffixes, pairs, strict=True)]
    refined = [(i, suffix) for i, suffix in enumerate(suffixes) if suffix is not None]
    if refined:
        variants = [_variants(suffix.tokens, pad_id) for _, suffix in refined]
        answers = _ask(last_acts, [latents[i] for i, _ in refined], variants, prefix)
        for (i, suffix), acts in zip(refined, answers, strict=True):
            outcomes[i] = _outcome(pairs[i], suffix, acts, matcher)
    return outcomes


def build_many(
    pairs_by_latent: Mapping[int, Sequence[Pair]],
    last_acts: LastActs,
    *,
    pad_id: int,
    prefix: Tokens = (),
    matcher: Matcher = "longest",
    max_suffix: int | None = MAX_SUFFIX,
    tokenizer_hash: str = "",
) -> dict[int, BuildResult]:
    """Patterns of all latents at once.

    ``prefix`` is put before every probe (the row prefix, so that position 0 is never scored; empty for the released
    recipe). A pair that needs more than ``max_suffix`` tokens is unreproducible (None: no limit, as in the released
    recipe). ``last_acts`` is asked once per round for the suffixes of every pair still in search, then once for the
    variants of all that were found; order and grouping of latents never change a result. Raises
    :class:`ConfigError` for an unknown matcher or a non-positive activation.
    """
    if matcher not in MATCHERS:
        raise ConfigError(f"no matcher {matcher!r}; expected one of {', '.join(MATCHERS)}")
    if max_suffix is not None and max_suffix < 1:
        raise ConfigError(f"max_suffix must be at least 1, got {max_suffix}")
    _check_pairs(pairs_by_latent)
    asked_of = [(latent, pair) for latent, pairs in pairs_by_latent.items() for pair in pairs]
    by_latent: dict[int, list[_Outcome]] = {latent: [] for latent in pairs_by_latent}
    outcomes = _run(asked_of, last_acts, prefix, pad_id, matcher, max_suffix) if asked_of else []
    for (latent, _), outcome in zip(asked_of, outcomes, strict=True):
        by_latent[latent].append(outcome)
    return {
        latent: BuildResult(
            PatternSet(_merge(found, matcher), pad_id, matcher, tokenizer_hash),
            n_pairs=len(found),
            n_unreproducible=sum(o.code == "n2g_unreproducible" for o in found),
            n_degenerate=sum(o.code == "n2g_degenerate" for o in found),
            outcomes=tuple(found),
        )
        for latent, found in by_latent.items()
    }


def build(
    pairs: Sequence[Pair],
    last_acts: LastActs,
    *,
    latent: int = 0,
    pad_id: int,
    prefix: Tokens = (),
    max_suffix: int | None = MAX_SUFFIX,
) -> BuildResult:
    """:func:`build_many` for one latent with the default matcher."""
    return build_many({latent: pairs}, last_acts, pad_id=pad_id, prefix=prefix, max_suffix=max_suffix)[latent]


def token_patterns(pairs: Sequence[Pair], *, pad_id: int, tokenizer_hash: str = "") -> PatternSet:
    """``floor_token`` of METRICS D: the last tokens of the pairs as one-token patterns, what a unigram explains."""
    found = [_Outcome(Pattern((pair.tokens[-1],), False, float(pair.act)), None) for pair in pairs]
    return PatternSet(_merge(found, "longest"), pad_id, "longest", tokenizer_hash)
