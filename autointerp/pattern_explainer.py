"""Explanations by N2G patterns: what the explainers ``n2g`` and ``n2g_released`` share (AUTOINTERP 3)."""

from collections.abc import Callable
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

from autointerp.interfaces import ExplainContext, explanation_by
from autointerp.n2g import MAX_SUFFIX, BuildResult, Matcher, Pair, build_many, pad_token
from autointerp.records import Explanation, LatentView
from sae.manifest import sha256_text

KIND = "random_positive"
_HASHES: "WeakKeyDictionary[Any, tuple[int, str]]" = WeakKeyDictionary()
"""By tokenizer its size when it was looked at, as tokens may be added, and the hash."""


class PatternExplainer:
    """Patterns from the random positive activations of the split explain; ``text`` is the patterns in words, so that
    a judge of texts can judge them too. The number of pairs per latent is ``ExemplarConfig.explain_random``."""

    name: ClassVar[str]
    version: ClassVar[int]
    needs: ClassVar[frozenset[str]] = frozenset({"last_acts"})
    matcher: ClassVar[Matcher] = "longest"
    """How patterns are built and matched; a subclass may choose the other one."""
    max_suffix: ClassVar[int | None] = MAX_SUFFIX

    def explain_many(self, views: list[LatentView], ctx: ExplainContext) -> list[list[Explanation]]:
        """One explanation per view; ``n2g_unreproducible``, ``n2g_degenerate`` or ``too_few_positive`` where no pattern
        is left. Probes of all latents run together."""
        from sae.tokens import prefix_id

        assert ctx.last_acts is not None
        pairs = {view.latent: pairs_of(view) for view in views}
        # The released recipe puts nothing in front of its probes.
        prefix = () if self.matcher == "released" else (prefix_id(ctx.tokenizer),)
        results = build_many(
            pairs, ctx.last_acts, pad_id=pad_token(ctx.tokenizer), prefix=prefix, matcher=self.matcher,
            max_suffix=self.max_suffix, tokenizer_hash=tokenizer_hash(ctx.tokenizer),
        )
        return [[self._explanation(view, results[view.latent], ctx.tokenizer.decode)] for view in views]

    def _explanation(self, view: LatentView, result: BuildResult, decode: Callable[[list[int]], str]) -> Explanation:
        failure = result.failure
        return explanation_by(
            self,
            view,
            failure or result.patterns.words(decode),
            pattern=None if failure else result.patterns.dump(),
            exemplar_ids=tuple(e.exemplar_id for e in view.exemplars if e.kind == KIND),
        )


def pairs_of(view: LatentView) -> list[Pair]:
    """The random positive activations of a view, cut behind the drawn token."""
    return [
        Pair(e.token_ids[: e.peak + 1], e.acts[e.peak]) for e in view.exemplars if e.kind == KIND and e.peak >= 0
    ]


def tokenizer_hash(tokenizer: Any) -> str:
    """16 hex digits over the vocabulary: patterns are keyed by token id. Sorting it takes 50 ms or more, so it is done
    once for each tokenizer."""
    size, known = _HASHES.get(tokenizer, (-1, ""))
    if size != len(tokenizer):
        vocabulary = tokenizer.get_vocab()
        known = sha256_text("\n".join(f"{vocabulary[t]} {t}" for t in sorted(vocabulary)))[:16]
        _HASHES[tokenizer] = (len(tokenizer), known)
    return known
