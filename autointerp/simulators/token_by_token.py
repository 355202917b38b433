"""Simulation one token at a time: the expected digit for the last token of what has been read (AUTOINTERP 4).

For servers that list next-token log-probabilities and nothing more. A request per token: dear, hence off by default.
The reader sees no more than the latent did, the text up to the token. W tokens per window.
"""

import math
from typing import ClassVar

from autointerp.alphabet import DIGITS, verify_spelled
from autointerp.client import LogprobReply, NextTokenRequest, Origin, check_capability
from autointerp.interfaces import ScoreContext, SimulationPair
from autointerp.prompts import escaped, load_prompt, marked_text
from autointerp.records import Exemplar, Explanation, Failure, Simulation
from sae.config import require
from sae.errors import Unsupported

CHOICES = (*DIGITS, *(f" {d}" for d in DIGITS))
DECIMALS = 6


class TokenByToken:
    """``TokenByToken(min_mass=0.1, max_low_share=0.2)``, as for ``all_at_once``: a token with less mass on the digits
    is low; a window with more low tokens than that, or one without any mass, fails with ``low_mass``."""

    name: ClassVar[str] = "token_by_token"
    version: ClassVar[int] = 1
    needs: ClassVar[frozenset[str]] = frozenset({"client:next_token"})

    def __init__(self, *, min_mass: float = 0.1, max_low_share: float = 0.2) -> None:
        require(0 <= min_mass <= 1 and 0 <= max_low_share <= 1, "min_mass and max_low_share must lie in [0, 1]")
        self.min_mass, self.max_low_share = min_mass, max_low_share
        self.prompt = load_prompt(self.name)

    def simulate_many(self, pairs: list[SimulationPair], ctx: ScoreContext) -> list[Simulation]:
        """One simulation per pair, scale UNIT. A token without an answer fails its window. :class:`Unsupported` for a
        client without log-probabilities or whose tokenizer cannot write a digit as one token."""
        client = ctx.client
        if client is None:
            raise Unsupported("'token_by_token' needs a language model; choose a client or another simulator")
        check_capability(client, "next_token", self.name)
        verify_spelled(client.tokenizer, self.name)
        requests = []
        for explanation, exemplar in pairs:
            if explanation.text is None:
                continue
            origin = Origin(stage="simulate.token_by_token", sae_id=explanation.sae_id, latent=exemplar.latent)
            for i in range(len(exemplar.token_ids)):
                so_far = marked_text(ctx.tokenizer, exemplar.token_ids[: i + 1], [k == i for k in range(i + 1)])
                messages = self.prompt.messages(explanation=escaped(explanation.text), text=so_far)
                requests.append(NextTokenRequest(messages=messages, choices=CHOICES, origin=origin))
        replies = iter(client.logprobs(requests) if requests else [])
        return [
            self._simulation(x, e, [next(replies) for _ in e.token_ids] if x.text is not None else None)
            for x, e in pairs
        ]

    def _simulation(
        self, explanation: Explanation, exemplar: Exemplar, replies: list[LogprobReply | Failure] | None
    ) -> Simulation:
        ids = {
            "explanation_id": explanation.explanation_id, "exemplar_id": exemplar.exemplar_id, "simulator": self.name,
        }  # fmt: skip
        if replies is None:
            failure = explanation.failure or Failure(
                code="unsupported", stage="simulate", detail="a bare pattern has no text to simulate from"
            )
            return Simulation(failure=failure, **ids)  # type: ignore[arg-type]
        read = [expected_value(reply) for reply in replies]
        failed = next((r for r in read if isinstance(r, Failure)), None)
        if failed is not None:
            return Simulation(failure=failed, **ids)  # type: ignore[arg-type]
        values, mass = zip(*[r for r in read if not isinstance(r, Failure)], strict=True)
        n_low = sum(m < self.min_mass for m in mass)
        if n_low > self.max_low_share * len(mass):
            detail = f"{n_low} of {len(mass)} tokens have less than {self.min_mass:g} of their mass on the digits"
            low = Failure(code="low_mass", stage="simulate", detail=detail)
            return Simulation(mass=mass, failure=low, **ids)  # type: ignore[arg-type]
        return Simulation(values=values, mass=mass, **ids)  # type: ignore[arg-type]


def expected_value(reply: LogprobReply | Failure) -> tuple[float, float] | Failure:
    """(sum_v v p_v / (9 mass), mass) over the digits in both spellings. A digit that the server does not list counts
    as 0; where it lists none at all, the answer is `low_mass`."""
    if isinstance(reply, Failure):
        return reply
    row = reply.rows[0] if reply.rows else ()
    if len(row) != len(CHOICES) or any(v is not None and not v <= 1e-3 for v in row):
        return Failure(code="schema", stage="simulate", detail="log-probabilities of the digits are not as asked")
    p = [0.0 if v is None else math.exp(v) for v in row]
    by_digit = [p[d] + p[d + len(DIGITS)] for d in range(len(DIGITS))]
    mass = sum(by_digit)
    if mass <= 0:
        return Failure(code="low_mass", stage="simulate", detail="no digit is among the likely next tokens")
    value = sum(d * q for d, q in enumerate(by_digit)) / (9 * mass)
    return round(value, DECIMALS), round(min(1.0, mass), DECIMALS)


PLUGIN = TokenByToken
