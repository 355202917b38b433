"""A language model says what separates windows where a latent fires from windows where it is silent (AUTOINTERP 3).

Ten active and ten silent windows, without marks; silent windows that hold one of the latent's own tokens come first,
so that "the word stop" does not pass for "stop after don't".
"""

from typing import ClassVar

from autointerp.interfaces import ExplainContext
from autointerp.prompts import numbered, window_text
from autointerp.records import Exemplar, Failure, LatentView
from autointerp.written import WrittenExplainer, strongest_first, too_few

N_EACH = 10
N_TOP = 5
"""Half of the active windows are the strongest, half spread over the range."""
MIN_EACH = 2
HARD_KINDS = ("same_token", "co_occurring", "decoder_near")


class Contrastive(WrittenExplainer):
    """Windows A and B; pairs of one each are dropped where the context is small."""

    name: ClassVar[str] = "contrastive"
    version: ClassVar[int] = 1

    def shown(self, view: LatentView) -> list[Exemplar]:
        """Active and silent windows in turn."""
        active = strongest_first(view, N_TOP)
        spread = active[N_TOP:][:: max(1, len(active[N_TOP:]) // (N_EACH - N_TOP))]
        active = (active[:N_TOP] + spread)[:N_EACH]
        active += [e for e in strongest_first(view, N_EACH) if e not in active][: N_EACH - len(active)]
        silent = [e for kind in (*HARD_KINDS, "silent") for e in view.exemplars if e.kind == kind][:N_EACH]
        n = min(len(active), len(silent))
        return [e for pair in zip(active[:n], silent[:n], strict=True) for e in pair]

    def least(self, shown: list[Exemplar]) -> int:
        return min(2 * MIN_EACH, len(shown))

    def refusal(self, view: LatentView, shown: list[Exemplar]) -> Failure | None:
        return too_few(shown, 2 * MIN_EACH)

    def holes(self, view: LatentView, shown: list[Exemplar], ctx: ExplainContext) -> dict[str, str]:
        texts = [(e.positive, window_text(ctx.tokenizer, e.token_ids)) for e in shown]
        return {
            "active": numbered([t for positive, t in texts if positive]),
            "silent": numbered([t for positive, t in texts if not positive]),
        }


PLUGIN = Contrastive
