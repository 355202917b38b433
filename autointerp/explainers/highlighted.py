"""A language model writes the explanation from windows with marked tokens (AUTOINTERP 3, ``highlighted``).

Ten top windows and one per quantile group, tokens at or above 0.3 of their window's peak marked, with strengths 1 to 9;
no chain of thought, no logits. For models that pass the judge check; the embedded 135M model cannot do this (LLM).
"""

import re
from typing import Any, ClassVar

from autointerp.client import Client, GenerateRequest, Message, Origin, Reply, check_capability, count_tokens
from autointerp.interfaces import ExplainContext
from autointerp.prompts import load_prompt, marked_window, numbered
from autointerp.records import Exemplar, Explanation, Failure, LatentView
from autointerp.replies import Answer, ask, json_object
from sae.config import require
from sae.errors import Unsupported
from sae.manifest import seed_of

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"explanation": {"type": "string"}},
    "required": ["explanation"],
    "additionalProperties": False,
}
MAX_WORDS = 40
REPLY_TOKENS = 160
N_TOP = 10
MIN_WINDOWS = 2
COPIED_WORDS = 8
"""An explanation of at least so many words that stands word for word in a window is a copy, not an explanation."""
_LABEL = re.compile(r"^[\s*_#]*EXPLANATION[*_]*:[\s*_]*(.+)$", re.I | re.M)
_HEDGE = re.compile(
    r"\b(unclear|unknown|not (?:clear|sure|certain)|no (?:clear|obvious|single|common)|cannot (?:tell|say|determine)|"
    r"can't (?:tell|say|determine)|difficult to|hard to (?:say|tell)|various|miscellaneous|insufficient)\b",
    re.I,
)


class Highlighted:
    """``Highlighted(candidates=n)``: one greedy text, or n > 1 at temperature 0.8 with seeds of their own."""

    name: ClassVar[str] = "highlighted"
    version: ClassVar[int] = 1
    needs: ClassVar[frozenset[str]] = frozenset({"client:generate"})

    def __init__(self, *, candidates: int = 1) -> None:
        require(candidates >= 1, f"candidates must be positive, got {candidates}")
        self.candidates = candidates
        self.prompt = load_prompt("highlighted")

    def explain_many(self, views: list[LatentView], ctx: ExplainContext) -> list[list[Explanation]]:
        """Per view ``candidates`` records, the first one selected; a reply that cannot be read is a failure record."""
        if ctx.client is None:
            raise Unsupported("'highlighted' needs a language model; choose a client or another explainer")
        check_capability(ctx.client, "generate", self.name)
        chosen = [self._chosen(view, ctx) for view in views]
        plans: list[tuple[int, int]] = []
        requests: list[GenerateRequest] = []
        for v, (view, shown) in enumerate(zip(views, chosen, strict=True)):
            if len(shown) >= MIN_WINDOWS:
                plans += [(v, c) for c in range(self.candidates)]
                requests += [self._request(view, shown, c, ctx) for c in range(self.candidates)]
        read = ask(
            ctx.client,
            requests,
            lambda i, reply: self._parse(reply, chosen[plans[i][0]], ctx),
            self.prompt.section("reminder"),
        )
        answers = dict(zip(plans, read, strict=True))
        return [
            [self._record(view, shown, answers.get((v, c)), c, ctx.client) for c in range(self.candidates)]
            if len(shown) >= MIN_WINDOWS
            else [self._record(view, shown, None, 0, ctx.client)]
            for v, (view, shown) in enumerate(zip(views, chosen, strict=True))
        ]

    def _chosen(self, view: LatentView, ctx: ExplainContext) -> list[Exemplar]:
        """Top windows, strongest first, then one per group, strongest group first; as many as the context holds."""
        top = [e for e in view.exemplars if e.kind == "top" and e.peak >= 0]
        top.sort(key=lambda e: (-max(e.acts), e.exemplar_id))
        groups = [e for e in view.exemplars if e.kind == "quantile" and e.peak >= 0]
        groups.sort(key=lambda e: (-e.group, e.exemplar_id))
        first_of = {e.group: e for e in reversed(groups)}
        shown = top[:N_TOP] + [first_of[g] for g in sorted(first_of, reverse=True)]
        client = ctx.client
        limit = client.capabilities.context_tokens if client is not None else None
        while client is not None and limit is not None and len(shown) > MIN_WINDOWS:
            used = sum(count_tokens(client, m.content) + 4 for m in self._messages(shown, ctx))
            if used + REPLY_TOKENS <= limit:
                break
            shown = shown[:-1]  # the weakest group goes first
        return shown

    def _messages(self, shown: list[Exemplar], ctx: ExplainContext) -> tuple[Message, ...]:
        largest = max((max(e.acts) for e in shown), default=0.0)
        return self.prompt.messages(windows=numbered([marked_window(ctx.tokenizer, e, largest) for e in shown]))

    def _request(self, view: LatentView, shown: list[Exemplar], candidate: int, ctx: ExplainContext) -> GenerateRequest:
        return GenerateRequest(
            messages=self._messages(shown, ctx),
            max_tokens=REPLY_TOKENS,
            temperature=0.0 if self.candidates == 1 else 0.8,
            seed=seed_of(ctx.seed, view.sae_id, view.latent, self.name, candidate) % 2**31,
            schema=SCHEMA,
            origin=Origin(stage=f"explain.{self.name}", sae_id=view.sae_id, latent=view.latent),
        )

    def _parse(self, reply: Reply, shown: list[Exemplar], ctx: ExplainContext) -> str | Failure:
        """The explanation of a reply: one line, at most 40 words, no copy of a window or of an example's answer."""
        value = json_object(reply.text, SCHEMA)
        if isinstance(value, Failure):
            labelled = _LABEL.findall(reply.text)
            if value.code != "no_json" or not labelled:
                return value
            value = {"explanation": labelled[-1]}
        text = " ".join(value["explanation"].split())
        if not text:
            return Failure(code="empty", stage="explain", detail="the explanation is blank")
        if len(text.split()) > MAX_WORDS:
            return Failure(code="too_long", stage="explain", detail=f"{len(text.split())} words, at most {MAX_WORDS}")
        if text.casefold() in self._example_answers() or "<<" in text or self._copied(text, shown, ctx):
            return Failure(code="echo", stage="explain", detail=text[:120])
        return text

    def _example_answers(self) -> set[str]:
        said = [json_object(t, SCHEMA) for role, t in self.prompt.sections if role == "assistant"]
        return {a["explanation"].casefold() for a in said if isinstance(a, dict)}

    @staticmethod
    def _copied(text: str, shown: list[Exemplar], ctx: ExplainContext) -> bool:
        if len(text.split()) < COPIED_WORDS:
            return False
        windows = (" ".join(str(ctx.tokenizer.decode(list(e.token_ids))).split()).casefold() for e in shown)
        return any(text.casefold() in w for w in windows)

    def _record(
        self, view: LatentView, shown: list[Exemplar], answer: Answer[str] | None, candidate: int, client: Client
    ) -> Explanation:
        value: str | Failure = Failure(
            code="too_few_positive", stage="explain", detail=f"{len(shown)} windows, at least {MIN_WINDOWS} are needed"
        )
        if answer is not None:
            value = answer.value
        text = value if isinstance(value, str) else None
        return Explanation(
            explanation_id=f"{view.sae_id}/{view.latent}/{self.name}/{candidate}",
            sae_id=view.sae_id,
            latent=view.latent,
            explainer=self.name,
            explainer_version=self.version,
            text=text,
            candidate=candidate,
            selected=candidate == 0,
            hedged=bool(text and _HEDGE.search(text)),
            llm=client.identity.model,
            llm_revision=client.identity.revision,
            prompt_sha256=self.prompt.sha256,
            exemplar_ids=tuple(e.exemplar_id for e in shown),
            prompt_tokens=answer.usage.prompt_tokens if answer else 0,
            cached_tokens=answer.usage.cached_tokens if answer else 0,
            output_tokens=answer.usage.output_tokens if answer else 0,
            failure=value if isinstance(value, Failure) else None,
        )


PLUGIN = Highlighted
