"""Build N2G patterns: which few tokens before an activation suffice to cause it (AUTOINTERP 3, METRICS D).

After Foote et al. (N2G) in the reduced form of Gao et al., arXiv 2406.04093, section 4.3; where we differ from the
released code is the table of AUTOINTERP 3. Torch-free: the model is behind ``last_acts``. All pairs of all latents
advance in lockstep, so that each round of probes is one batch for the model, and probes that several latents share
(the same few tokens) are forwarded once.
"""

from collections import defaultdict
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

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
from sae.console import progress
from sae.errors import ConfigError

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

Tokens = tuple[int, ...]
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


_Search = Generator[list[Tokens], np.ndarray, _Outcome]


def _search(pair: Pair, pad_id: int, matcher: Matcher, max_suffix: int | None) -> _Search:
    """One pair's questions to the model, round by round; yields probes without prefix, is sent their activations."""
    suffix: Tokens | None = None
    value = pair.act
    for group in suffix_groups(min(len(pair.tokens), max_suffix or len(pair.tokens))):
        probes = [pair.tokens[-n:] for n in group]
        acts = yield probes
        reached = np.flatnonzero(acts / pair.act >= HALF)
        if reached.size:  # the shortest that qualifies, as in a sequential search
            suffix, value = probes[int(reached[0])], float(acts[reached[0]])
            break
    code = None
    if suffix is None:
        code = "n2g_unreproducible"
        if matcher == "longest":
            return _Outcome(None, code)
        suffix = pair.tokens
    replaced = [(*suffix[:p], pad_id, *suffix[p + 1 :]) for p in range(len(suffix))]
    acts = yield [(pad_id, *suffix), *replaced]
    anchored = bool(acts[0] / pair.act < HALF)
    saliency = 1.0 - acts[1:] / value
    # NaN never counts as "does not matter": a token stays literal unless its replacement was seen to be harmless.
    wildcard = saliency < HALF
    ids = tuple(None if w else t for t, w in zip(suffix, wildcard.tolist(), strict=True))
    pattern = Pattern(ids, anchored, value)
    if pattern.fires_everywhere:
        return _Outcome(pattern if matcher == "released" else None, "n2g_degenerate")
    return _Outcome(pattern, code)


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


def _run(jobs: Sequence[tuple[int, _Search]], last_acts: LastActs, prefix: Tokens) -> dict[int, _Outcome]:
    """Advance all searches together: one call of the model per round."""
    outcomes: dict[int, _Outcome] = {}
    questions = {i: next(search) for i, (_, search) in enumerate(jobs)}
    with progress("N2G patterns", total=len(jobs), unit="pairs") as bar:
        while questions:
            probes = [(jobs[i][0], (*prefix, *tokens)) for i, asked in questions.items() for tokens in asked]
            answers = np.asarray(last_acts(probes), dtype=np.float64)
            if answers.shape != (len(probes),):
                raise ConfigError(f"last_acts returned shape {answers.shape} for {len(probes)} probes")
            offset, following = 0, {}
            for i, asked in questions.items():
                try:
                    following[i] = jobs[i][1].send(answers[offset : offset + len(asked)])
                except StopIteration as finished:
                    outcomes[i] = finished.value
                    bar.advance()
                offset += len(asked)
            questions = following
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
    recipe). ``last_acts`` is asked once per round for the probes of every pair still in search; order and grouping
    of latents never change a result. Raises :class:`ConfigError` for an unknown matcher or a non-positive activation.
    """
    if matcher not in MATCHERS:
        raise ConfigError(f"no matcher {matcher!r}; expected one of {', '.join(MATCHERS)}")
    if max_suffix is not None and max_suffix < 1:
        raise ConfigError(f"max_suffix must be at least 1, got {max_suffix}")
    _check_pairs(pairs_by_latent)
    asked_of = [(latent, pair) for latent, pairs in pairs_by_latent.items() for pair in pairs]
    jobs = [(latent, _search(pair, pad_id, matcher, max_suffix)) for latent, pair in asked_of]
    outcomes = _run(jobs, last_acts, prefix)
    by_latent: dict[int, list[_Outcome]] = {latent: [] for latent in pairs_by_latent}
    for i, (latent, _) in enumerate(jobs):
        by_latent[latent].append(outcomes[i])
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
