"""N2G patterns of a subject's latents: read from its explanations, and built for further latents where one asks.

What is built is kept for the run, so that two evaluations that ask for one latent build it once.
"""

from collections.abc import Iterable
from functools import partial
from itertools import islice, zip_longest
from typing import TYPE_CHECKING, NamedTuple

from evals.explained import read_explanations
from sae.manifest import canonical_json, rng, sha256_text

if TYPE_CHECKING:
    from autointerp.latent_cache import LatentCache
    from autointerp.n2g_patterns import PatternSet
    from evals.base import EvalContext

PAIRS = 16
"""Positive activations from which patterns are built where no explanation says how many."""
LATENTS = {"quick": 64, "paper": 1000, "tiny": 4}
"""Latents that an evaluation of patterns measures at least (METRICS D 1)."""
BUILT_AT_ONCE = 8_192
"""Latents whose probes are forwarded together, and so share what they have in common: a list of tokens and its code
take about 0.7 KB, a latent asks about 100 lists where few are built and fewer where all are."""
STRATA = 10


class Patterns(NamedTuple):
    """Of some latents: the patterns of those that have any, and why the others have none."""

    found: "dict[int, PatternSet]"
    failures: dict[int, str]


def latent_cache(ctx: "EvalContext") -> "LatentCache":
    """The latent cache of the context; it is a fault of the caller's `needs` if there is none."""
    if ctx.latents is None:
        raise RuntimeError("patterns need the latent cache of their subject; declare `interp` in `needs`")
    return ctx.latents


def read_patterns(ctx: "EvalContext") -> Patterns:
    """Patterns by latent, and failure codes of the others: of the explanations that were scored, where there are any,
    and, if those are fewer than the preset asks for, of the first latents of the draw that they began."""
    found: Patterns = ctx.memo(_memo_key(ctx, LATENTS[ctx.preset]), lambda: _read(ctx))
    return found


def pairs_used(ctx: "EvalContext") -> int:
    """From how many activations the patterns of :func:`read_patterns` are built."""
    return _explained(ctx)[1]


def patterns_of(ctx: "EvalContext", latents: Iterable[int]) -> Patterns:
    """Patterns of ``latents``: those that :func:`read_patterns` has, the others built now from as many activations.

    What is built together does not depend on what this run has built before: the size of a batch moves last bits.
    """
    wanted = sorted({int(i) for i in latents})
    parts = [read_patterns(ctx)]
    rest = [i for i in wanted if i not in parts[0].found and i not in parts[0].failures]
    for start in range(0, len(rest), BUILT_AT_ONCE):
        group = rest[start : start + BUILT_AT_ONCE]
        parts.append(ctx.memo(_memo_key(ctx, *group), partial(_build, ctx, group, pairs_used(ctx))))
    found = {i: p.found[i] for p in parts for i in wanted if i in p.found}
    failures = {i: p.failures[i] for p in parts for i in wanted if i in p.failures}
    return Patterns(found, failures)


def _memo_key(ctx: "EvalContext", *group: int) -> str:
    digest = sha256_text(canonical_json(group))[:16]
    return f"patterns.{latent_cache(ctx).key}.{ctx.scores}.{ctx.hookpoint}.{ctx.seed}.{digest}"


def _explained(ctx: "EvalContext") -> tuple[Patterns, int]:
    """Of the scored explanations by N2G; and from how many activations each was built. Read once a run."""
    found: tuple[Patterns, int] = ctx.memo(f"explained.{_memo_key(ctx)}", lambda: _read_explained(ctx))
    return found


def _read_explained(ctx: "EvalContext") -> tuple[Patterns, int]:
    from autointerp.n2g_patterns import PatternSet

    mine = []
    if ctx.scores is not None:
        mine = [e for e in read_explanations(ctx.scores) if e.explainer == "n2g"]
    found = {e.latent: PatternSet.load(e.pattern) for e in mine if e.pattern is not None}
    failures = {e.latent: e.failure.code for e in mine if e.failure is not None}
    return Patterns(found, failures), max((len(e.exemplar_ids) for e in mine), default=PAIRS)


def _read(ctx: "EvalContext") -> Patterns:
    from autointerp.latent_cache import sample_latents

    told, n_pairs = _explained(ctx)
    known = told.found.keys() | told.failures.keys()
    if len(known) >= LATENTS[ctx.preset]:
        return told
    drawn = sample_latents(latent_cache(ctx), LATENTS[ctx.preset], ctx.seed).latents.tolist()
    missing = [i for i in drawn if i not in known]
    if not missing:  # no more are eligible
        return told
    built = _build(ctx, missing, n_pairs)
    return Patterns(told.found | built.found, told.failures | built.failures)


def _build(ctx: "EvalContext", latents: list[int], n_pairs: int) -> Patterns:
    from autointerp.exemplars import draw_pairs
    from autointerp.last_acts import LastActs
    from autointerp.n2g import build_many, pad_token
    from sae.tokens import prefix_id

    cache, lm, sae = latent_cache(ctx), ctx.lm, ctx.subject.sae  # type: ignore[attr-defined]
    pairs = {i: draw_pairs(cache, i, n_pairs, seed=ctx.seed) for i in latents}
    results = build_many(
        pairs, LastActs(lm, sae, ctx.hookpoint), pad_id=pad_token(lm.tokenizer), prefix=(prefix_id(lm.tokenizer),)
    )
    failures = {i: r.failure.code for i, r in results.items() if r.failure is not None}
    return Patterns({i: r.patterns for i, r in results.items() if i not in failures}, failures)


def stratified_latents(cache: "LatentCache", n: int, seed: int) -> list[int]:
    """``n`` eligible latents, as many from each tenth of them by density (METRICS D), ascending; all if fewer exist.

    Inside a tenth they come in the order of the uniform draw from which latents are explained
    (``autointerp.latent_cache.sample_latents``), so that most of them have patterns already.
    """
    order = rng(seed, cache.sae_id, "sample_latents").permutation(cache.eligible()).tolist()
    n_active = cache.stats["n_active"].to_numpy()
    rank = {latent: place for place, latent in enumerate(sorted(order, key=lambda i: (int(n_active[i]), i)))}
    tenths = [[i for i in order if rank[i] * STRATA // len(order) == b] for b in range(STRATA)]
    rounds = (latent for one_of_each in zip_longest(*tenths) for latent in one_of_each if latent is not None)
    return sorted(islice(rounds, n))
