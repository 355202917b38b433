"""Ask a language model for one number out of a few: by the probabilities of the numbers, or as JSON. Torch-free."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from autointerp.client import Client, GenerateRequest, LogprobReply, NextTokenRequest, Origin, Reply, check_capability
from autointerp.judging import MIN_YES_NO_MASS
from autointerp.prompts import Prompt
from autointerp.records import Failure
from autointerp.replies import ask, json_object

REPLY_TOKENS = 20
Mode = Literal["auto", "logprob", "json"]
MODES = ("auto", "logprob", "json")


@dataclass(frozen=True)
class NumberedChoice:
    """How a scorer asks "which of these?": its two prompts, the field of the JSON answer, the largest number."""

    logprob_prompt: Prompt
    json_prompt: Prompt
    field: str
    n: int
    mode: Mode = "auto"

    def mode_for(self, client: Client) -> Mode:
        """The mode in which this client is asked: never auto. A model that cannot write a number as one token has no
        probability of it, and is asked for JSON."""
        if self.mode != "auto":
            return self.mode
        return "logprob" if client.capabilities.next_token and self._spelled(client.tokenizer) else "json"

    def _choices(self) -> tuple[str, ...]:
        numbers = [str(i) for i in range(1, self.n + 1)]
        return (*numbers, *(f" {i}" for i in numbers))

    def _spelled(self, tokenizer: Any) -> bool:
        """Is each number one token in one of its spellings? True where the tokenizer is not known."""
        if tokenizer is None:
            return True
        single = [len(tokenizer.encode(c, add_special_tokens=False)) == 1 for c in self._choices()]
        return all(single[i] or single[i + self.n] for i in range(self.n))

    def name(self, client: Client) -> str:
        """Who chooses and how."""
        return f"{self.mode_for(client)}/{client.identity.model}"

    def ask(
        self, holes: Sequence[Mapping[str, str]], origins: Sequence[Origin], client: Client, *, user: str
    ) -> list[int | Failure]:
        """Per question the index chosen, 0 to n - 1. :class:`Unsupported` where the client lacks the mode's verb;
        ``user`` is the plug-in that asks."""
        mode = self.mode_for(client)
        check_capability(client, "next_token" if mode == "logprob" else "generate", f"{user} ({mode} mode)")
        if not holes:
            return []
        pairs = list(zip(holes, origins, strict=True))
        if mode == "logprob":
            choices = self._choices()
            asked = [
                NextTokenRequest(messages=self.logprob_prompt.messages(**h), choices=choices, origin=o)
                for h, o in pairs
            ]
            return [self._most_likely(reply) for reply in client.logprobs(asked)]
        schema = self._schema()
        requests = [
            GenerateRequest(messages=self.json_prompt.messages(**h), max_tokens=REPLY_TOKENS, schema=schema, origin=o)
            for h, o in pairs
        ]
        answers = ask(client, requests, lambda _, reply: self._read(reply), self.json_prompt.section("reminder"))
        return [answer.value for answer in answers]

    def _schema(self) -> dict[str, Any]:
        return {
            "type": "object",
            "properties": {self.field: {"type": "integer"}},
            "required": [self.field],
            "additionalProperties": False,
        }

    def _most_likely(self, reply: LogprobReply | Failure) -> int | Failure:
        """Index of the number with the largest probability, over its spellings."""
        if isinstance(reply, Failure):
            return reply
        row = reply.rows[0]
        if len(row) != 2 * self.n or any(v is not None and not v <= 1e-3 for v in row):
            return Failure(code="schema", stage="score", detail="log-probabilities of the numbers are not as asked")
        p = [0.0 if v is None else math.exp(v) for v in row]
        by_number = [p[i] + p[i + self.n] for i in range(self.n)]
        if sum(by_number) < MIN_YES_NO_MASS:
            detail = f"mass {sum(by_number):.3g} on the numbers 1 to {self.n}"
            return Failure(code="low_mass", stage="score", detail=detail)
        return max(range(self.n), key=lambda i: (by_number[i], -i))

    def _read(self, reply: Reply) -> int | Failure:
        value = json_object(reply.text, self._schema())
        if isinstance(value, Failure):
            return value
        number = int(value[self.field])
        if not 1 <= number <= self.n:
            return Failure(code="out_of_range", stage="score", detail=f"number {number} of {self.n}")
        return number - 1
