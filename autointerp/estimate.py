"""What a run will ask of its language model, before anything is paid (AUTOINTERP 6): plug-ins run on stand-in windows.

Nothing is guessed about prompts: the shipped ones are rendered with windows of the configured number and length, and
the answers are stand-ins of a typical length. Two latents are rendered and scaled. Plug-ins that need more than a
client and a tokenizer (an embedder, the subject model) are left out.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from autointerp.choose import asks_a_judge, select
from autointerp.client import Capabilities, OnReply, expected_usage
from autointerp.config import ExemplarConfig, InterpConfig
from autointerp.interfaces import SUBJECT_NEEDS, ExplainContext, ScoreContext, missing_needs
from autointerp.judge_check import check_judge, known_features
from autointerp.judge_sizes import JudgeSizes
from autointerp.ledger import TOKENS_PER_PRICE, Price
from autointerp.llm_requests import (
    ContinuationRequest,
    Identity,
    LogprobReply,
    NextTokenRequest,
    Reply,
    Request,
    request_key,
)
from autointerp.pipeline import jobs_for, make_jobs, plugins_of
from autointerp.records import CALIBRATE, EXPLAIN, SCORE, Exemplar, Explanation, LatentView

SAMPLE = 2
"""Latents rendered; two, so that there is a shuffled floor."""
TYPICAL_TEXT = "words about the weather, and names of places that often stand near them"
STAND_IN_PI = 0.01
CAPABILITIES = {
    "transformers": Capabilities(next_token=True, continuation=True, slots=True, local=True),
    "vllm": Capabilities(next_token=True, continuation=True, slots=True, structured="json_schema"),
}
"""Of the clients that can do more than write."""
_NUMBERED = re.compile(r"^\[\d+\]", re.M)
_TEXTS = re.compile(r"^Text \d+$", re.M)


@dataclass(frozen=True)
class StageEstimate:
    """Requests and tokens of one stage, for one SAE (a judge check: once per run)."""

    stage: str
    requests: int
    prompt_tokens: int
    output_tokens: int
    once: bool = False

    @property
    def tokens(self) -> int:
        return self.prompt_tokens + self.output_tokens

    def cost_usd(self, price: Price | None) -> float | None:
        """Without any prefix reuse; None without a price."""
        if price is None:
            return None
        return (self.prompt_tokens * price.prompt + self.output_tokens * price.output) / TOKENS_PER_PRICE


def total(stages: Sequence[StageEstimate], n_saes: int, stage: str = "total") -> StageEstimate:
    """Sum over the stages of a run with so many SAEs."""
    times = [1 if s.once else n_saes for s in stages]
    sums = [
        sum(n * getattr(s, name) for n, s in zip(times, stages, strict=True))
        for name in ("requests", "prompt_tokens", "output_tokens")
    ]
    return StageEstimate(stage, sums[0], sums[1], sums[2], once=True)


def estimate(
    explainers: Sequence[Any],
    scorers: Sequence[Any],
    cfg: ExemplarConfig,
    *,
    latents: int,
    tokenizer: Any,
    capabilities: Capabilities,
    embedder: bool = True,
    check_descriptions: int = JudgeSizes().check_descriptions,
) -> list[StageEstimate]:
    """Per plug-in that asks a language model its stage and its judge check.

    ``tokenizer``: the subject's; it also stands in for the model's own. ``embedder``: whether the run has one.
    """
    table = _StandIns(cfg, tokenizer)
    stages: list[StageEstimate] = []
    found: dict[int, list[Explanation]] = {latent: [] for latent in range(SAMPLE)}
    meter = lambda: _Meter(capabilities, tokenizer)  # noqa: E731
    for explainer in explainers:
        client = meter()
        ctx = ExplainContext(client=client, tokenizer=tokenizer)
        if _asks(explainer) and not missing_needs(explainer.needs, ctx):
            views = [table.view(latent) for latent in found]
            for view, records in zip(views, explainer.explain_many(views, ctx), strict=True):
                found[view.latent] += records
            stages.append(client.stage(f"explain.{explainer.name}", latents / SAMPLE))
        else:
            for latent, records in found.items():
                records.append(_typical(explainer.name, latent))
    client = meter()
    choosing = ExplainContext(client=client, tokenizer=tokenizer, embedder=_THERE if embedder else None)  # type: ignore[arg-type]
    prompted = asks_a_judge(explainers, choosing)
    if prompted:
        chosen = select(found, table, choosing, prompted=True).explanations  # type: ignore[arg-type]
        stages.append(client.stage("explain.choose", latents / SAMPLE))
    else:  # whichever is chosen, as many are scored
        chosen = [e for records in found.values() for e in _first_selected(records)]
    jobs = make_jobs(chosen, table, 0)  # type: ignore[arg-type]
    for scorer in scorers:
        client = meter()
        scoring = ScoreContext(client=client, tokenizer=tokenizer)
        if not _asks(scorer) or missing_needs(scorer.needs - SUBJECT_NEEDS, scoring):
            continue
        scorer.score_many(jobs_for(scorer, jobs), scoring)
        most = getattr(scorer, "max_latents", None)
        stages.append(client.stage(f"score.{scorer.name}", min(latents, most or latents) / SAMPLE))
        client = meter()
        check_judge(scorer, ScoreContext(client=client, tokenizer=tokenizer), n_descriptions=check_descriptions)
        stages.append(client.stage(f"check.{scorer.name}", 1.0, once=True))
    return [s for s in stages if s.requests]


def capabilities_of(client: str, *, next_token: bool = False) -> Capabilities:
    """What a client will be able to do, without opening it."""
    return CAPABILITIES.get(client, Capabilities(structured="json_schema", next_token=next_token))


def planned(cfg: InterpConfig, exemplars: ExemplarConfig, tokenizer: Any) -> list[StageEstimate]:
    """The estimate of a configuration, before any client is opened."""
    return estimate(
        *plugins_of(cfg), exemplars, latents=cfg.latents, tokenizer=tokenizer,
        check_descriptions=cfg.sizes.check_descriptions,
        capabilities=capabilities_of(cfg.client, next_token=cfg.next_token), embedder=cfg.embedder != "none",
    )  # fmt: skip


def _asks(plugin: Any) -> bool:
    return any(need.startswith("client:") for need in plugin.needs)


_THERE = object()
"""Stands for an embedder that is never asked."""


def _typical(explainer: str, latent: int) -> Explanation:
    return Explanation(
        explanation_id=f"stand-in/{latent}/{explainer}/0", sae_id=_StandIns.sae_id, latent=latent, explainer=explainer,
        text=f"{TYPICAL_TEXT} {latent}",
    )  # fmt: skip


def _first_selected(records: Sequence[Explanation]) -> list[Explanation]:
    return [replace(e, selected=i == 0) for i, e in enumerate(records)]


class _StandIns:
    """Windows of real text in the numbers and lengths of a configuration; answers as an exemplar table does."""

    sae_id = "stand-in"

    def __init__(self, cfg: ExemplarConfig, tokenizer: Any) -> None:
        self.cfg = cfg
        texts = [t for f in known_features() for pair in zip(f.fitting, f.unfitting, strict=True) for t in pair]
        self.ids = [int(i) for i in tokenizer.encode(". ".join(texts), add_special_tokens=False)]
        self.next = 0
        self._scored: dict[tuple[int, str], list[Exemplar]] = {}

    def view(self, latent: int) -> LatentView:
        """Top, quantile, silent and hard windows of the split explain, and output tokens."""
        cfg = self.cfg
        shown = self._windows(latent, EXPLAIN, "top", cfg.explain_top)
        shown += self._windows(latent, EXPLAIN, "quantile", cfg.n_groups)
        shown += self._windows(latent, EXPLAIN, "silent", cfg.explain_silent)
        tokens = tuple(f" word{i}" for i in range(10))
        return LatentView(
            sae_id=self.sae_id, latent=latent, exemplars=tuple(shown), density=STAND_IN_PI, max_act=1.0,
            promoted=tokens, suppressed=tokens,
        )  # fmt: skip

    def scored(self, latent: int, split: str = SCORE) -> list[Exemplar]:
        """The windows of a split, the same whenever asked."""
        if (latent, split) not in self._scored:
            self._scored[latent, split] = self._made(latent, split)
        return self._scored[latent, split]

    def _made(self, latent: int, split: str) -> list[Exemplar]:
        cfg = self.cfg
        if split == CALIBRATE:
            shown = self._windows(latent, split, "quantile", cfg.calibrate_positive)
            return shown + self._windows(latent, split, "silent", cfg.calibrate_silent)
        shown = self._windows(latent, split, "quantile", cfg.score_positive)
        shown += self._windows(latent, split, "silent", cfg.score_silent)
        hard = (("same_token", cfg.score_hard), ("co_occurring", cfg.score_hard), ("decoder_near", cfg.score_hard // 2))
        for kind, n in (*hard, ("embedding_near", cfg.score_embedding_near)):
            shown += self._windows(latent, split, kind, n)
        return shown

    def pi(self, latent: int) -> float:
        return STAND_IN_PI

    def _windows(self, latent: int, split: str, kind: str, n: int) -> list[Exemplar]:
        positive = kind in ("top", "quantile")
        out = []
        for i in range(n):
            self.next += 13  # no two windows alike: equal requests are asked once
            ids = tuple(self.ids[(self.next + k) % len(self.ids)] for k in range(self.cfg.window_tokens))
            acts = [0.0] * len(ids)
            if positive:
                peak = (7 * i) % len(ids)
                acts[peak] = 1.0 - 0.5 * i / n
            out.append(
                Exemplar(
                    exemplar_id=f"{latent}/{split}/{kind}/{i:03d}", latent=latent, kind=kind, split=split,
                    group=i % self.cfg.n_groups if kind == "quantile" else -1, token_ids=ids, acts=tuple(acts),
                    peak=acts.index(max(acts)) if positive else -1,
                )  # fmt: skip
            )
        return out


class _Meter:
    """A client that counts what it is asked and answers with something of the right form."""

    identity = Identity(endpoint="estimate", model="stand-in")

    def __init__(self, capabilities: Capabilities, tokenizer: Any) -> None:
        self.capabilities, self.tokenizer = capabilities, tokenizer
        self._used: dict[str, tuple[int, int]] = {}
        """Request key -> (prompt tokens, output tokens): equal requests are asked once."""

    def stage(self, name: str, times: float, *, once: bool = False) -> StageEstimate:
        prompt, output = (sum(used[i] for used in self._used.values()) for i in (0, 1))
        return StageEstimate(
            name, round(times * len(self._used)), round(times * prompt), round(times * output), once=once
        )

    def generate(self, requests: Sequence[Any], on_reply: OnReply | None = None) -> list[Any]:
        return [self._answer(r, lambda r: Reply(text=json.dumps(_typical_reply(r)))) for r in requests]

    def logprobs(self, requests: Sequence[Any], on_reply: OnReply | None = None) -> list[Any]:
        return [self._answer(r, _typical_logprobs) for r in requests]

    def _answer(self, request: Request, make: Callable[[Any], Any]) -> Any:
        answer = make(request)
        output = int(isinstance(request, NextTokenRequest))
        if isinstance(answer, Reply):
            output = len(self.tokenizer.encode(answer.text, add_special_tokens=False))
        prompt = expected_usage(self, request).prompt_tokens
        self._used[request_key(self.identity, request)] = (prompt, output)
        return answer


def _typical_reply(request: Any) -> Mapping[str, Any]:
    names = set((request.schema or {}).get("properties", ()))
    said = request.messages[-1].content
    if "explanation" in names:
        return {"explanation": f"{TYPICAL_TEXT} {request.seed}"}
    if "match" in names:
        return {"match": list(range(1, 1 + len(_NUMBERED.findall(said)) // 2))}
    if "odd" in names:
        return {"odd": 1}
    return {"active": [{"i": i + 1, "v": 9} for i in range(len(_TEXTS.findall(said)))]}


def _typical_logprobs(request: Any) -> LogprobReply:
    if isinstance(request, NextTokenRequest):
        return LogprobReply(rows=((-3.0,) * len(request.choices),))
    if isinstance(request, ContinuationRequest):
        return LogprobReply(sums=(-10.0,) * len(request.continuations), counts=(5,) * len(request.continuations))
    return LogprobReply(rows=((-3.0,) * len(request.token_ids),) * len(request.positions))
