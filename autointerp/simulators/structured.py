"""Simulation through a chat API: which numbered tokens are active, and how strongly, as JSON (AUTOINTERP 4).

For servers without prompt log-probabilities. Several windows share a request; only tokens above 0 are written, so a
reply is short. The answer is a point, not a distribution. W tokens per window.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

from autointerp.client import Client, GenerateRequest, Origin, Reply, check_capability
from autointerp.interfaces import ScoreContext, SimulationPair
from autointerp.prompts import MAX_STRENGTH, escaped, load_prompt, whole_pieces
from autointerp.records import Exemplar, Explanation, Failure, Simulation
from autointerp.replies import ask, json_object
from sae.config import require
from sae.errors import Unsupported
from sae.manifest import rng

REPLY_TOKENS, TOKENS_PER_ENTRY = 1_200, 14
"""Room for a reply: so much, and more where half of the tokens shown would not fit."""
DECIMALS = 6
ENTRY: dict[str, Any] = {
    "type": "object",
    "properties": {"i": {"type": "integer"}, "v": {"type": "integer"}},
    "required": ["i", "v"],
    "additionalProperties": False,
}
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"active": {"type": "array", "items": ENTRY}},
    "required": ["active"],
    "additionalProperties": False,
}


class Structured:
    """``Structured(per_request=5)`` windows of one explanation per request, in an order of their own."""

    name: ClassVar[str] = "structured"
    version: ClassVar[int] = 1
    needs: ClassVar[frozenset[str]] = frozenset({"client:generate"})

    def __init__(self, *, per_request: int = 5) -> None:
        require(per_request >= 1, f"per_request must be positive, got {per_request}")
        self.per_request = per_request
        self.prompt = load_prompt(self.name)

    def simulate_many(self, pairs: list[SimulationPair], ctx: ScoreContext) -> list[Simulation]:
        """One simulation per pair, scale UNIT. A reply that cannot be read fails all its windows."""
        client = ctx.client
        if client is None:
            raise Unsupported("'structured' needs a language model; choose a client or another simulator")
        check_capability(client, "generate", self.name)
        plan = self._plan(pairs, ctx.seed)
        shown = [[whole_pieces(ctx.tokenizer, pairs[i][1].token_ids) for i in part] for part in plan]
        requests = [self._request(pairs, part, texts) for part, texts in zip(plan, shown, strict=True)]
        values = self._ask(client, requests, shown)
        found: dict[int, tuple[float, ...] | Failure] = {}
        for part, texts, said in zip(plan, shown, values, strict=True):
            n = 0
            for i, units in zip(part, texts, strict=True):
                found[i] = said if isinstance(said, Failure) else _spread(units, said[n : n + len(units)])
                n += len(units)
        return [self._simulation(*pair, found.get(i)) for i, pair in enumerate(pairs)]

    def _plan(self, pairs: Sequence[SimulationPair], seed: int) -> list[list[int]]:
        """Indices of pairs per request: windows of one explanation, mixed so that active ones do not come together."""
        by_text: dict[tuple[str, int], list[int]] = {}
        for i, (explanation, exemplar) in enumerate(pairs):
            if explanation.text is not None:
                by_text.setdefault((explanation.explanation_id, exemplar.latent), []).append(i)
        plan = []
        for (_, latent), members in sorted(by_text.items()):
            members.sort(key=lambda i: pairs[i][1].exemplar_id)
            rng(seed, pairs[members[0]][0].sae_id, latent, self.name).shuffle(members)  # type: ignore[arg-type]
            plan += [members[k : k + self.per_request] for k in range(0, len(members), self.per_request)]
        return plan

    def _request(
        self, pairs: Sequence[SimulationPair], part: Sequence[int], texts: Sequence[Sequence[tuple[str, int]]]
    ) -> GenerateRequest:
        explanation, exemplar = pairs[part[0]]
        lines, n = [], 0
        for k, units in enumerate(texts, 1):
            lines.append(f"Text {k}")
            for piece, _ in units:
                n += 1
                lines.append(f"{n}\t{escaped(piece)}")
        return GenerateRequest(
            messages=self.prompt.messages(explanation=escaped(explanation.text or ""), texts="\n".join(lines)),
            max_tokens=max(REPLY_TOKENS, TOKENS_PER_ENTRY * n // 2),
            schema=SCHEMA,
            origin=Origin(stage="simulate.structured", sae_id=explanation.sae_id, latent=exemplar.latent),
        )

    def _ask(
        self, client: Client, requests: list[GenerateRequest], shown: Sequence[Sequence[Sequence[tuple[str, int]]]]
    ) -> list[list[int] | Failure]:
        sizes = [sum(len(units) for units in texts) for texts in shown]
        answers = ask(client, requests, lambda i, reply: strengths(reply, sizes[i]), self.prompt.section("reminder"))
        return [answer.value for answer in answers]

    def _simulation(
        self, explanation: Explanation, exemplar: Exemplar, found: tuple[float, ...] | Failure | None
    ) -> Simulation:
        if found is None:
            found = explanation.failure or Failure(
                code="unsupported", stage="simulate", detail="a bare pattern has no text to simulate from"
            )
        failed = isinstance(found, Failure)
        return Simulation(
            explanation_id=explanation.explanation_id,
            exemplar_id=exemplar.exemplar_id,
            simulator=self.name,
            values=None if failed else found,  # type: ignore[arg-type]
            failure=found if failed else None,  # type: ignore[arg-type]
        )


def strengths(reply: Reply, n: int) -> list[int] | Failure:
    """0 to 9 per numbered token of a reply; an index outside 1..n, a repeated one or a value outside 0..9 is a
    failure of the whole reply."""
    value = json_object(reply.text, SCHEMA)
    if isinstance(value, Failure):
        return value
    out: dict[int, int] = {}
    for entry in value["active"]:
        i, v = int(entry["i"]), int(entry["v"])
        if not 1 <= i <= n or not 0 <= v <= MAX_STRENGTH:
            return Failure(code="out_of_range", stage="simulate", detail=f"token {i} of {n} with value {v}")
        if i in out:
            return Failure(code="duplicate", stage="simulate", detail=f"token {i} occurs twice")
        out[i] = v
    return [out.get(i, 0) for i in range(1, n + 1)]


def _spread(units: Sequence[tuple[str, int]], levels: Sequence[int]) -> tuple[float, ...]:
    """Levels of units to values of tokens."""
    values = [round(level / MAX_STRENGTH, DECIMALS) for level in levels]
    return tuple(v for (_, n_tokens), v in zip(units, values, strict=True) for _ in range(n_tokens))


PLUGIN = Structured
