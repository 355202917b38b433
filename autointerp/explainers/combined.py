"""An input-side and an output-side text, joined (AUTOINTERP 3): when the latent fires, and what it does then.

Gur-Arieh et al. 2501.08319 found the two together better on both sides than either. It runs the two explainers itself;
their requests are the same as theirs alone, so that with the reply cache nothing is asked twice.
"""

from typing import Any, ClassVar

from autointerp.interfaces import ExplainContext, explanation_by
from autointerp.records import Explanation, Failure, LatentView
from sae.plugins import find


class Combined:
    """``Combined(input_side="highlighted", output_side="output_side")``: file names of explainers."""

    name: ClassVar[str] = "combined"
    version: ClassVar[int] = 1

    def __init__(self, *, input_side: str = "highlighted", output_side: str = "output_side") -> None:
        self.input_side, self.output_side = input_side, output_side
        self._sides: tuple[Any, Any] = (
            find("autointerp.explainers", input_side)(), find("autointerp.explainers", output_side)(),
        )  # fmt: skip
        self.inputs = {
            f"{s.name}_{what}": value
            for s in self._sides
            for what, value in (("version", s.version), ("prompt", getattr(getattr(s, "prompt", None), "sha256", "")))
        }

    @property
    def needs(self) -> frozenset[str]:
        """Those of both sides."""
        return frozenset().union(*(side.needs for side in self._sides))

    def explain_many(self, views: list[LatentView], ctx: ExplainContext) -> list[list[Explanation]]:
        """One record per view; where a side has no text, its failure."""
        found = [side.explain_many(views, ctx) for side in self._sides]
        return [[self._joined(view, a[0], b[0])] for view, a, b in zip(views, *found, strict=True)]

    def _joined(self, view: LatentView, before: Explanation, after: Explanation) -> Explanation:
        found: str | Failure | None = before.failure or after.failure
        if found is None and before.text and after.text:
            found = f"{before.text}; the next words: {after.text}"
        elif found is None:
            found = Failure(code="unsupported", stage="explain", detail="a bare pattern has no text to join")
        return explanation_by(
            self,
            view,
            found,
            role="both",
            hedged=before.hedged or after.hedged,
            llm=before.llm or after.llm,
            llm_revision=before.llm_revision or after.llm_revision,
            exemplar_ids=before.exemplar_ids,
        )


PLUGIN = Combined
