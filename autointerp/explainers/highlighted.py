"""A language model writes the explanation from windows with marked tokens (AUTOINTERP 3, ``highlighted``).

Ten top windows and one per quantile group, tokens at or above 0.3 of their window's peak marked, with strengths 1 to 9;
no chain of thought, no logits. For models that pass the judge check; the embedded 135M model cannot do this (LLM).
"""

from typing import ClassVar

from autointerp.interfaces import ExplainContext
from autointerp.prompts import marked_window, numbered
from autointerp.records import Exemplar, Failure, LatentView
from autointerp.written import WrittenExplainer, strongest_first, too_few

N_TOP = 10
MIN_WINDOWS = 2


class Highlighted(WrittenExplainer):
    """Windows with marks; the weakest group goes first where the context is small."""

    name: ClassVar[str] = "highlighted"
    version: ClassVar[int] = 1

    def shown(self, view: LatentView) -> list[Exemplar]:
        return strongest_first(view, N_TOP)

    def refusal(self, view: LatentView, shown: list[Exemplar]) -> Failure | None:
        return too_few(shown, MIN_WINDOWS)

    def holes(self, view: LatentView, shown: list[Exemplar], ctx: ExplainContext) -> dict[str, str]:
        largest = max((max(e.acts) for e in shown), default=0.0)
        return {"windows": numbered([marked_window(ctx.tokenizer, e, largest) for e in shown])}


PLUGIN = Highlighted
