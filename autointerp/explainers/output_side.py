"""A language model says what a latent makes the model write next: from promoted and suppressed tokens (AUTOINTERP 3).

The tokens are those of the latent's decoder row through the unembedding; no window is shown. Output-centric
explanations: Gur-Arieh et al. 2501.08319, there "VocabProj". Its role is `output`: what it is good for is not to find
windows, and scorers of windows will say so.
"""

from collections.abc import Sequence
from typing import ClassVar

from autointerp.interfaces import ExplainContext
from autointerp.prompts import escaped
from autointerp.records import Exemplar, Failure, LatentView
from autointerp.written import WrittenExplainer

N_TOKENS = 15
MIN_TOKENS = 3


class OutputSide(WrittenExplainer):
    """Two lists of tokens."""

    name: ClassVar[str] = "output_side"
    version: ClassVar[int] = 2
    role: ClassVar[str] = "output"

    def shown(self, view: LatentView) -> list[Exemplar]:
        return []

    def refusal(self, view: LatentView, shown: list[Exemplar]) -> Failure | None:
        if len(view.promoted) >= MIN_TOKENS:
            return None
        detail = f"{len(view.promoted)} promoted tokens are known, at least {MIN_TOKENS} are needed"
        return Failure(code="no_candidate", stage="explain", detail=detail)

    def holes(self, view: LatentView, shown: list[Exemplar], ctx: ExplainContext) -> dict[str, str]:
        return {"promoted": _listed(view.promoted), "suppressed": _listed(view.suppressed)}


def _listed(tokens: Sequence[str]) -> str:
    """Each between bars, since blanks belong to tokens and quotation marks may be tokens."""
    return " ".join(f"|{escaped(t)}|" for t in tokens[:N_TOKENS]) or "(none)"


PLUGIN = OutputSide
