"""The baseline: a list of the words that a latent marks, in a fixed form of words. No language model."""

from typing import ClassVar

from autointerp.interfaces import ExplainContext, explanation_by
from autointerp.records import Explanation, Failure, LatentView
from autointerp.texts import Decoder, list_text


class TokenList:
    """One candidate per latent, made from the marked words of its explain windows (AUTOINTERP 3)."""

    name: ClassVar[str] = "token_list"
    version: ClassVar[int] = 1
    needs: ClassVar[frozenset[str]] = frozenset()

    def explain_many(self, views: list[LatentView], ctx: ExplainContext) -> list[list[Explanation]]:
        """One explanation per view; `too_few_positive` where no window holds a marked word."""
        decoder = Decoder(ctx.tokenizer)
        return [[self._explain(view, decoder)] for view in views]

    def _explain(self, view: LatentView, decoder: Decoder) -> Explanation:
        found: str | Failure | None = list_text(decoder, view)
        if found is None:
            found = Failure(code="too_few_positive", stage="explain", detail="no positive window to list words from")
        shown = tuple(e.exemplar_id for e in view.exemplars if e.positive)
        return explanation_by(self, view, found, exemplar_ids=shown)


PLUGIN = TokenList
