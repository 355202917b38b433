"""A language model writes the explanation from token-activation pairs (AUTOINTERP 3, ``token_activation``).

The form of Bills et al. 2023 (Language models can explain neurons in language models, "Step 1"): five top records, one
token a line with its activation as a whole number from 0 to 9; where few are not 0, those once more by themselves.
Texts and examples are ours.
"""

from typing import Any, ClassVar

from autointerp.interfaces import ExplainContext
from autointerp.prompts import MAX_STRENGTH, escaped, pieces
from autointerp.records import Exemplar, Failure, LatentView
from autointerp.written import WrittenExplainer, strongest_first, too_few

N_RECORDS = 5
MIN_RECORDS = 2
SPARSE_SHARE = 0.2
"""Below this share of tokens that are not 0 the active ones are repeated."""


class TokenActivation(WrittenExplainer):
    """Records as columns of tokens and numbers."""

    name: ClassVar[str] = "token_activation"
    version: ClassVar[int] = 1

    def shown(self, view: LatentView) -> list[Exemplar]:
        return strongest_first(view, N_RECORDS)[:N_RECORDS]

    def refusal(self, view: LatentView, shown: list[Exemplar]) -> Failure | None:
        return too_few(shown, MIN_RECORDS)

    def holes(self, view: LatentView, shown: list[Exemplar], ctx: ExplainContext) -> dict[str, str]:
        largest = max((max(e.acts) for e in shown), default=0.0)
        records = [_pairs(ctx.tokenizer, e, largest) for e in shown]
        text = "\n".join(f"Text {i}\n{_lines(pairs)}" for i, pairs in enumerate(records, 1))
        every = [pair for pairs in records for pair in pairs]
        active = [pair for pair in every if pair[1] > 0]
        if len(active) < SPARSE_SHARE * len(every):
            text += f"\nOnly the tokens above 0, all texts\n{_lines(active)}"
        return {"records": text}


def _pairs(tokenizer: Any, exemplar: Exemplar, largest: float) -> list[tuple[str, int]]:
    """(token, floor(9 a / largest)); a character split over tokens is one line, with the larger number."""
    out: list[tuple[str, int]] = []
    waiting = 0
    for piece, act in zip(pieces(tokenizer, exemplar.token_ids), exemplar.acts, strict=True):
        level = max(waiting, int(MAX_STRENGTH * act // largest) if act > 0 and largest > 0 else 0)
        waiting = 0 if piece else level
        if piece:
            out.append((escaped(piece), min(MAX_STRENGTH, level)))
    return out


def _lines(pairs: list[tuple[str, int]]) -> str:
    return "\n".join(f"{token}\t{level}" for token, level in pairs)


PLUGIN = TokenActivation
