"""Simulation from one pass: the probability of each digit in a slot behind each token (AUTOINTERP 4).

A completion prompt holds rules, three worked texts whose slots turn from ``?`` to digits, the explanation, and the
window, one token per line with a ``?`` as its slot. At each separator the distribution over the next token gives the
mass on the digits and the expected value E[v] = sum_v v p_v / (9 mass), in [0, 1]. The form is that of "all at once"
simulation by Bills et al. 2023 (Language models can explain neurons in language models); texts and alphabet are ours.
W tokens per window. For models that pass the judge check: a 135M model has no signal here (LLM).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from autointerp.alphabet import NEW_LINE, Alphabet, verify_alphabet
from autointerp.client import LogprobReply, Origin, SlotRequest, check_capability
from autointerp.interfaces import ScoreContext, SimulationPair
from autointerp.prompts import escaped, load_prompt, pieces
from autointerp.records import Exemplar, Explanation, Failure, Simulation
from sae.config import require
from sae.errors import Unsupported

DECIMALS = 6
LEARN_SHARE = 0.1
"""Share of a worked text whose slots still show ``?``."""


@dataclass(frozen=True)
class _Layout:
    """What is the same in all requests of one model."""

    alphabet: Alphabet
    fixed: tuple[int, ...]
    """Ids of rules and worked texts."""


class AllAtOnce:
    """``AllAtOnce(min_mass=0.1, max_low_share=0.2)``: a token with less mass on the digits is low; a window with more
    low tokens than that has no values and the failure ``low_mass``."""

    name: ClassVar[str] = "all_at_once"
    version: ClassVar[int] = 1
    needs: ClassVar[frozenset[str]] = frozenset({"client:slots"})

    def __init__(self, *, min_mass: float = 0.1, max_low_share: float = 0.2) -> None:
        require(0 <= min_mass <= 1 and 0 <= max_low_share <= 1, "min_mass and max_low_share must lie in [0, 1]")
        self.min_mass, self.max_low_share = min_mass, max_low_share
        self.prompt = load_prompt("all_at_once")

    def simulate_many(self, pairs: list[SimulationPair], ctx: ScoreContext) -> list[Simulation]:
        """One simulation per pair, scale UNIT. :class:`Unsupported` for a client without prompt log-probabilities or
        whose tokenizer cannot write the alphabet."""
        client = ctx.client
        if client is None:
            raise Unsupported("'all_at_once' needs a language model; choose a client or another simulator")
        check_capability(client, "slots", self.name)
        if client.tokenizer is None:
            raise Unsupported("'all_at_once' builds token ids and needs the client's tokenizer, which this one lacks")
        if not pairs:
            return []
        layout = self._layout(client.tokenizer)
        asked = [i for i, (explanation, _) in enumerate(pairs) if explanation.text is not None]
        requests = [self._request(*pairs[i], layout, client.tokenizer, ctx.tokenizer) for i in asked]
        replies = dict(zip(asked, client.logprobs(requests), strict=True))
        return [self._simulation(*pair, replies.get(i)) for i, pair in enumerate(pairs)]

    def _layout(self, tokenizer: Any) -> _Layout:
        alphabet = verify_alphabet(tokenizer)
        ids = _opening(tokenizer) + _encode(tokenizer, self.prompt.section("rules") + NEW_LINE)
        for title, marked in _worked_texts(self.prompt.sections):
            ids += self._header(tokenizer, title)
            for k, (piece, digit) in enumerate(marked):
                shown = alphabet.slot if k < LEARN_SHARE * len(marked) else (alphabet.digits[digit],)
                ids += [*_encode(tokenizer, piece), *alphabet.separator, *shown, *alphabet.new_line]
        return _Layout(alphabet, tuple(ids))

    def _header(self, tokenizer: Any, explanation: str) -> list[int]:
        text = self.prompt.section("header", explanation=escaped(explanation))
        return _encode(tokenizer, f"{NEW_LINE}{text}{NEW_LINE}")

    def _request(
        self, explanation: Explanation, exemplar: Exemplar, layout: _Layout, tokenizer: Any, window_tokenizer: Any
    ) -> SlotRequest:
        """The window's tokens may be another model's: their texts are encoded anew, each on its own line."""
        assert explanation.text is not None
        ids = [*layout.fixed, *self._header(tokenizer, explanation.text)]
        positions = []
        abc = layout.alphabet
        for piece in pieces(window_tokenizer, exemplar.token_ids):
            ids += [*_encode(tokenizer, escaped(piece)), *abc.separator]
            positions.append(len(ids) - 1)
            ids += [*abc.slot, *abc.new_line]
        return SlotRequest(
            ids=tuple(ids),
            positions=tuple(positions),
            token_ids=abc.digits,
            origin=Origin(stage="simulate.all_at_once", sae_id=explanation.sae_id, latent=exemplar.latent),
        )

    def _simulation(
        self, explanation: Explanation, exemplar: Exemplar, reply: LogprobReply | Failure | None
    ) -> Simulation:
        ids: dict[str, Any] = {
            "explanation_id": explanation.explanation_id,
            "exemplar_id": exemplar.exemplar_id,
            "simulator": self.name,
        }
        if reply is None:
            failure = explanation.failure or Failure(
                code="unsupported", stage="simulate", detail="a bare pattern has no text to simulate from"
            )
            return Simulation(failure=failure, **ids)
        if isinstance(reply, Failure):
            return Simulation(failure=reply, **ids)
        read = [expected_digit(row) for row in reply.rows]
        if len(read) != len(exemplar.token_ids) or any(r is None for r in read):
            detail = f"{sum(r is not None for r in read)} readable slots for {len(exemplar.token_ids)} tokens"
            return Simulation(failure=Failure(code="schema", stage="simulate", detail=detail), **ids)
        values, mass = zip(*[r for r in read if r is not None], strict=True)
        n_low = sum(m < self.min_mass for m in mass)
        if n_low > self.max_low_share * len(mass):
            detail = f"{n_low} of {len(mass)} tokens have less than {self.min_mass:g} of their mass on the digits"
            return Simulation(mass=mass, failure=Failure(code="low_mass", stage="simulate", detail=detail), **ids)
        return Simulation(values=values, mass=mass, **ids)


def expected_digit(log_p: Sequence[float | None]) -> tuple[float, float] | None:
    """(E[v] / 9 over the digits, their mass) from ten log-probabilities; None unless all ten are finite numbers or -inf
    and some mass is there."""
    if len(log_p) != 10 or any(v is None or math.isnan(v) or v > 1e-3 for v in log_p):
        return None
    p = [math.exp(v) for v in log_p if v is not None]
    mass = sum(p)
    if mass <= 0:
        return None
    value = sum(v * p_v for v, p_v in enumerate(p)) / (9 * mass)
    return round(value, DECIMALS), round(min(1.0, mass), DECIMALS)


def _encode(tokenizer: Any, text: str) -> list[int]:
    return [int(i) for i in tokenizer.encode(text, add_special_tokens=False)] if text else []


def _opening(tokenizer: Any) -> list[int]:
    """The BOS id if the tokenizer has one; nothing otherwise."""
    return [] if tokenizer.bos_token_id is None else [int(tokenizer.bos_token_id)]


def _worked_texts(sections: Sequence[tuple[str, str]]) -> list[tuple[str, list[tuple[str, int]]]]:
    """(explanation, [(token, digit)]) of each ``shot`` section."""
    out = []
    for role, body in sections:
        if role == "shot":
            title, line = body.split("\n", 1)
            marked = [part.rsplit("=", 1) for part in line.split("|")]
            out.append((title, [(piece, int(digit)) for piece, digit in marked]))
    return out


PLUGIN = AllAtOnce
