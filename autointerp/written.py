"""What all explainers share in which a language model writes the text: ask, read strictly, record. Torch-free.

A subclass says which windows it shows and how they fill its prompt; everything else is the same for all, so that
explainers differ in what they show and in nothing else (AUTOINTERP 3).
"""

import re
from typing import Any, ClassVar

from autointerp.client import Client, GenerateRequest, Message, Origin, Reply, Usage, check_capability, count_tokens
from autointerp.interfaces import ExplainContext, explanation_by
from autointerp.prompts import load_prompt
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
COPIED_WORDS = 8
"""An explanation of at least so many words that stands word for word in a window is a copy, not an explanation."""
_LABEL = re.compile(r"^[\s*_#]*EXPLANATION[*_]*:[\s*_]*(.+)$", re.I | re.M)
_HEDGE = re.compile(
    r"\b(unclear|unknown|not (?:clear|sure|certain)|no (?:clear|obvious|single|common)|cannot (?:tell|say|determine)|"
    r"can't (?:tell|say|determine)|difficult to|hard to (?:say|tell)|various|miscellaneous|insufficient)\b",
    re.I,
)


class WrittenExplainer:
    """``candidates=n``: one greedy text, or n > 1 at temperature 0.8 with seeds of their own."""

    name: ClassVar[str]
    version: ClassVar[int]
    needs: ClassVar[frozenset[str]] = frozenset({"client:generate"})
    role: ClassVar[str] = "input"

    def __init__(self, *, candidates: int = 1) -> None:
        require(candidates >= 1, f"candidates must be positive, got {candidates}")
        self.candidates = candidates
        self.prompt = load_prompt(self.name)

    def shown(self, view: LatentView) -> list[Exemplar]:
        """The windows for the prompt, the dispensable ones last: they are dropped where the context is small."""
        raise NotImplementedError

    def refusal(self, view: LatentView, shown: list[Exemplar]) -> Failure | None:
        """Why there is nothing to ask about this latent, if so."""
        raise NotImplementedError

    def holes(self, view: LatentView, shown: list[Exemplar], ctx: ExplainContext) -> dict[str, str]:
        """What fills the prompt."""
        raise NotImplementedError

    def least(self, shown: list[Exemplar]) -> int:
        """Fewer windows than this are never shown."""
        return min(2, len(shown))

    def explain_many(self, views: list[LatentView], ctx: ExplainContext) -> list[list[Explanation]]:
        """Per view ``candidates`` records, the first one selected; a reply that cannot be read is a failure record."""
        if ctx.client is None:
            raise Unsupported(f"{self.name!r} needs a language model; choose a client or another explainer")
        check_capability(ctx.client, "generate", self.name)
        chosen = [self._fitting(view, ctx, ctx.client) for view in views]
        refused = [self.refusal(view, shown) for view, shown in zip(views, chosen, strict=True)]
        plans: list[tuple[int, int]] = []
        requests: list[GenerateRequest] = []
        for v, (view, shown) in enumerate(zip(views, chosen, strict=True)):
            if refused[v] is None:
                messages = self._messages(view, shown, ctx)
                plans += [(v, c) for c in range(self.candidates)]
                requests += [self._request(view, messages, c, ctx) for c in range(self.candidates)]
        reminder = self.prompt.section("reminder")
        read = ask(ctx.client, requests, lambda i, reply: self._parse(reply, chosen[plans[i][0]], ctx), reminder)
        answers = dict(zip(plans, read, strict=True))
        records = []
        for v, (view, shown) in enumerate(zip(views, chosen, strict=True)):
            why = refused[v]
            if why is not None:
                records.append([self._record(view, shown, Answer(why, Usage(), ""), 0, ctx.client)])
                continue
            said = [answers[v, c] for c in range(self.candidates)]
            records.append([self._record(view, shown, a, c, ctx.client) for c, a in enumerate(said)])
        return records

    def _fitting(self, view: LatentView, ctx: ExplainContext, client: Client) -> list[Exemplar]:
        """As many of the windows as the context holds."""
        shown, limit = self.shown(view), client.capabilities.context_tokens
        while limit is not None and len(shown) > self.least(shown) and self.refusal(view, shown) is None:
            used = sum(count_tokens(client, m.content) + 4 for m in self._messages(view, shown, ctx))
            if used + REPLY_TOKENS <= limit:
                break
            shown = shown[:-1]
        return shown

    def _messages(self, view: LatentView, shown: list[Exemplar], ctx: ExplainContext) -> tuple[Message, ...]:
        return self.prompt.messages(**self.holes(view, shown, ctx))

    def _request(
        self, view: LatentView, messages: tuple[Message, ...], candidate: int, ctx: ExplainContext
    ) -> GenerateRequest:
        return GenerateRequest(
            messages=messages,
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
        self, view: LatentView, shown: list[Exemplar], answer: Answer[str], candidate: int, client: Client
    ) -> Explanation:
        found = answer.value
        return explanation_by(
            self,
            view,
            found,
            candidate=candidate,
            role=self.role,
            selected=candidate == 0,
            hedged=isinstance(found, str) and _HEDGE.search(found) is not None,
            llm=client.identity.model,
            llm_revision=client.identity.revision,
            prompt_sha256=self.prompt.sha256,
            exemplar_ids=tuple(e.exemplar_id for e in shown),
            prompt_tokens=answer.usage.prompt_tokens,
            cached_tokens=answer.usage.cached_tokens,
            output_tokens=answer.usage.output_tokens,
        )


def too_few(shown: list[Exemplar], least: int) -> Failure | None:
    """`too_few_positive` below ``least`` windows."""
    if len(shown) >= least:
        return None
    return Failure(
        code="too_few_positive", stage="explain", detail=f"{len(shown)} windows, at least {least} are needed"
    )


def strongest_first(view: LatentView, n_top: int) -> list[Exemplar]:
    """At most ``n_top`` top windows, strongest first, then one per quantile group, strongest group first."""
    top = [e for e in view.exemplars if e.kind == "top" and e.peak >= 0]
    top.sort(key=lambda e: (-max(e.acts), e.exemplar_id))
    groups = [e for e in view.exemplars if e.kind == "quantile" and e.peak >= 0]
    groups.sort(key=lambda e: (-e.group, e.exemplar_id))
    first_of = {e.group: e for e in reversed(groups)}
    return top[:n_top] + [first_of[g] for g in sorted(first_of, reverse=True)]
