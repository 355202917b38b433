"""Intervention: does the explanation say what pushing the latent makes the model write? (AUTOINTERP 5.6)

The real model is steered along the latent's decoder row on texts where the latent is silent, at a push matched by
its effect (:mod:`autointerp.steering`), and likewise along those of two other latents. Three answers of the judge:
``surprisal_gain``, by how many nats a steered piece makes the explanation likelier than the clean one of the same
prompt; ``choice_likelihood``, is the explanation likeliest under its own latent's pieces; ``choice``, the same asked by
a prompt. Both choices have chance 1/3.
"""

from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np

from autointerp.classify import MAX_FAILED_SHARE, base_score, null_scores, unscored
from autointerp.client import Client, ContinuationRequest, LogprobReply, Origin
from autointerp.interfaces import STAND_INS, ScoreContext, ScoreJob, ScoreResult
from autointerp.numbered_choice import NumberedChoice
from autointerp.prompts import escaped, load_prompt
from autointerp.rates import wilson
from autointerp.records import Exemplar, Failure, LatentScore, ScoreItem
from autointerp.texts import Decoder, any_of, pmi_continuation, pmi_prompt
from sae.config import require
from sae.errors import ConfigError, Unsupported
from sae.manifest import rng

N_SETS = 3
CHANCE = 1 / N_SETS
MIN_PROMPTS = 4
TRIED_OTHERS = 8
"""Of so many other latents two must be steerable."""
SEPARATOR = " | "
DECIMALS = 6
Likelihoods = dict[tuple[str, str], float | Failure]
"""(written piece, explanation) -> log P(explanation | piece), nats."""


class Pieces(NamedTuple):
    """What was written after the prompts of one latent, one text per prompt."""

    prompts: tuple[str, ...]
    """Ids of the silent texts that served as prompts."""
    clean: tuple[str, ...]
    sets: tuple[tuple[str, ...], ...]
    """Under this latent's push, then under those of the others."""
    kl_nats: float = 0.0


class Intervention:
    """``Intervention(prompts=30, prompt_tokens=64, trials=5)``: 30 prompts of 64 tokens, dealt to 5 choices among three
    groups of six pieces. ``prompt_tokens=None``: the latent's silent windows of the split score, of their width."""

    name: ClassVar[str] = "intervention"
    version: ClassVar[int] = 2
    needs: ClassVar[frozenset[str]] = frozenset({"lm", "sae", "client:generate"})
    metrics: ClassVar[tuple[str, ...]] = ("surprisal_gain", "choice_likelihood", "choice")

    def __init__(
        self, *, prompts: int = 30, prompt_tokens: int | None = 64, trials: int = 5, new_tokens: int = 8,
        target_nats: float = 0.5, max_latents: int | None = None, selected_only: bool = True,
    ) -> None:  # fmt: skip
        """``max_latents`` and ``selected_only``: see :func:`autointerp.pipeline.jobs_for`; steering is dear."""
        require(prompts >= MIN_PROMPTS and 1 <= trials <= prompts, f"bad sizes: {prompts} prompts, {trials} trials")
        require(new_tokens >= 1 and target_nats > 0, "new_tokens and target_nats must be positive")
        require(prompt_tokens is None or prompt_tokens >= 1, f"prompt_tokens must be positive, got {prompt_tokens}")
        self.prompts, self.prompt_tokens, self.trials = prompts, prompt_tokens, trials
        self.new_tokens, self.target_nats = new_tokens, target_nats
        self.max_latents, self.selected_only = max_latents, selected_only
        by_logprob, by_json = load_prompt("intervention_logprob"), load_prompt("intervention_json")
        self.choosing = NumberedChoice(by_logprob, by_json, "group", N_SETS)
        self.inputs = {prompt.name: prompt.sha256 for prompt in (by_logprob, by_json)}

    def score_many(self, jobs: list[ScoreJob], ctx: ScoreContext) -> list[ScoreResult]:
        """One result per job; a latent is steered once for all its explanations. An item is a prompt: its value the
        gain, its verdict whether the choice that it took part in was right."""
        client = ctx.client
        if client is None:
            raise Unsupported("'intervention' needs a language model as judge; choose a client or another scorer")
        written: dict[tuple[str, int], Pieces | Failure] = {}
        for job in jobs:
            if job.explanation.text and (job.sae_id, job.latent) not in written:
                written[job.sae_id, job.latent] = self._pieces(job, ctx)
        found = [written.get((job.sae_id, job.latent)) if job.explanation.text else None for job in jobs]
        asked = [(j, p) for j, p in zip(jobs, found, strict=True) if isinstance(p, Pieces) and j.explanation.text]
        likely = _likelihoods(asked, client) if client.capabilities.continuation else None
        chosen = iter(self._choices(asked, ctx, client))
        identity: dict[str, Any] = {"scorer": self.name, "version": self.version, "judge": self.choosing.name(client)}
        results = []
        for job, pieces in zip(jobs, found, strict=True):
            if pieces is None:
                results.append(unscored(job, self.metrics, **identity))
            elif isinstance(pieces, Failure):
                results.append(ScoreResult(scores=null_scores(job, pieces.code, self.metrics, **identity)))
            else:
                results.append(self._result(job, pieces, likely, next(chosen), identity, ctx.seed))
        return results

    @staticmethod
    def separation(items: Sequence[ScoreItem]) -> float | None:
        """Share of gains above zero, or of right choices where the judge gives no likelihoods."""
        gains = [i.value > 0 for i in items if i.value is not None]
        rights = gains or [i.verdict for i in items if i.verdict is not None]
        return sum(rights) / len(rights) if rights else None

    def _pieces(self, job: ScoreJob, ctx: ScoreContext) -> Pieces | Failure:
        silent = sorted((e for e in job.exemplars if e.kind == "silent"), key=lambda e: e.exemplar_id)
        if job.sae_id in STAND_INS:
            return _stand_ins(job, silent, Decoder(ctx.tokenizer))
        if self.prompt_tokens is None:
            width = max((len(e.token_ids) for e in silent), default=0)
            drawn = any_of([e for e in silent if len(e.token_ids) == width], self.prompts)
            prompts = sorted(drawn, key=lambda e: e.exemplar_id)
        else:
            width, prompts = self.prompt_tokens, self._long(job, self.prompt_tokens, ctx)
        if len(prompts) < MIN_PROMPTS:
            detail = f"{len(prompts)} silent texts of {width} tokens, {MIN_PROMPTS} are the least"
            return Failure(code="too_few_rows", stage="score", detail=detail)
        return self._steered(job, prompts, ctx)

    def _long(self, job: ScoreJob, tokens: int, ctx: ScoreContext) -> list[Exemplar]:
        """Texts of more tokens than a window has; they are in the latent cache."""
        from autointerp.silent_prompts import silent_prompts

        if job.cache is None:
            raise ConfigError(
                f"'intervention' takes its prompts of {tokens} tokens from the latent cache, and this job names none; "
                "use prompt_tokens=None for its silent windows"
            )
        return silent_prompts(job.cache, job.latent, self.prompts, tokens, ctx.seed)

    def _steered(self, job: ScoreJob, prompts: Sequence[Exemplar], ctx: ScoreContext) -> Pieces | Failure:
        from autointerp.steering import Steering
        from sae.tokens import prefix_id

        lm, sae = ctx.lm, ctx.sae
        if lm is None or sae is None or sae.sae_id != job.sae_id:
            have = "none" if sae is None else sae.sae_id
            raise Unsupported(f"'intervention' needs the model and the SAE {job.sae_id}; this run gives it {have}")
        first = int(prefix_id(lm.tokenizer))
        steering = Steering(
            lm, ctx.hookpoint, [(first, *e.token_ids) for e in prompts],
            target_nats=self.target_nats, new_tokens=self.new_tokens,
        )  # fmt: skip
        own = steering.matched(sae.W_dec_FD[job.latent])
        if isinstance(own, Failure):
            return own
        sets = [steering.continuations(own.vector_D)]
        for other in _others(job, ctx, sae.d_sae):
            push = steering.matched(sae.W_dec_FD[other])
            if not isinstance(push, Failure):
                sets.append(steering.continuations(push.vector_D))
            if len(sets) == N_SETS:
                break
        if len(sets) < N_SETS:
            return Failure(code="kl_unreachable", stage="score", detail="no two other latents to compare with")
        clean = tuple(steering.continuations(None))
        return Pieces(tuple(e.exemplar_id for e in prompts), clean, tuple(map(tuple, sets)), own.kl_nats)

    def _deal(self, n_prompts: int) -> list[range]:
        """Disjoint prompts of each choice, at least two where there are enough."""
        trials = max(1, min(self.trials, n_prompts // 2))
        return [range(t, n_prompts, trials) for t in range(trials)]

    def _choices(
        self, asked: Sequence[tuple[ScoreJob, Pieces]], ctx: ScoreContext, client: Client
    ) -> list[list[bool | Failure]]:
        """Per job and trial, whether the prompted judge picked the latent's own group."""
        holes, places, origins = [], [], []
        for job, pieces in asked:
            draw = rng(ctx.seed, job.sae_id, job.latent, "intervention.order")
            for part in self._deal(len(pieces.prompts)):
                order = draw.permutation(N_SETS)
                lines = [
                    f"[{n}] " + SEPARATOR.join(escaped(pieces.sets[s][i].strip()) for i in part)
                    for n, s in enumerate(order, 1)
                ]
                holes.append({"explanation": escaped(job.explanation.text or ""), "groups": "\n".join(lines)})
                places.append(int(np.flatnonzero(order == 0)[0]))
                origins.append(Origin(stage="score.intervention", sae_id=job.sae_id, latent=job.latent))
        answers = self.choosing.ask(holes, origins, client, user=self.name)
        right = iter([a if isinstance(a, Failure) else a == place for a, place in zip(answers, places, strict=True)])
        return [[next(right) for _ in self._deal(len(pieces.prompts))] for _, pieces in asked]

    def _result(
        self, job: ScoreJob, pieces: Pieces, likely: Likelihoods | None, chosen: Sequence[bool | Failure],
        identity: dict[str, Any], seed: int,
    ) -> ScoreResult:  # fmt: skip
        deal, text = self._deal(len(pieces.prompts)), job.explanation.text or ""
        gains: list[float | Failure] = []
        picked: list[bool | Failure] = []
        if likely is not None:
            pairs = zip(pieces.sets[0], pieces.clean, strict=True)
            gains = [_minus(likely[steered, text], likely[clean, text]) for steered, clean in pairs]
            picked = [_likeliest(pieces, part, likely, text) for part in deal]
        rows = [
            _gain_row(job, gains, identity), _choice_row("choice_likelihood", job, picked, identity),
            _choice_row("choice", job, list(chosen), identity),
        ]  # fmt: skip
        trial_of = {i: t for t, part in enumerate(deal) for i in part}
        items = []
        for i, prompt in enumerate(pieces.prompts):
            gain, verdict = gains[i] if gains else None, chosen[trial_of[i]]
            failure = next((x for x in (gain, verdict) if isinstance(x, Failure)), None)
            items.append(
                ScoreItem(
                    explanation_id=job.explanation.explanation_id, exemplar_id=prompt, scorer=self.name, positive=False,
                    value=None if failure else gain, verdict=None if failure else verdict, failure=failure,  # type: ignore[arg-type]
                )
            )  # fmt: skip
        return ScoreResult(scores=tuple(rows), items=tuple(items))


def _others(job: ScoreJob, ctx: ScoreContext, d_sae: int) -> list[int]:
    """Other latents in an order of their own: of the run's sample where it has enough, else of the whole SAE."""
    sample = [i for i in ctx.latents if i != job.latent]
    pool = sample if len(sample) >= N_SETS - 1 else [i for i in range(d_sae) if i != job.latent]
    order = rng(ctx.seed, job.sae_id, job.latent, "intervention.others").permutation(len(pool))
    return [pool[i] for i in order[:TRIED_OTHERS]]


def _stand_ins(job: ScoreJob, silent: Sequence[Exemplar], decoder: Decoder) -> Pieces | Failure:
    """Where no model can be steered (judge check, estimate): fitting texts stand for the latent's pieces, unfitting
    ones for the clean pieces and those of the others."""
    fitting = [decoder.window(e) for e in job.exemplars if e.positive]
    unfitting = [decoder.window(e) for e in silent]
    n = min(len(fitting), len(unfitting))
    if n < MIN_PROMPTS:
        return Failure(code="too_few_rows", stage="score", detail=f"{n} pairs of texts")
    turned = [tuple(unfitting[(i + k) % n] for i in range(n)) for k in range(N_SETS)]
    return Pieces(tuple(e.exemplar_id for e in silent[:n]), turned[0], (tuple(fitting[:n]), turned[1], turned[2]))


def _likelihoods(asked: Sequence[tuple[ScoreJob, Pieces]], client: Client) -> Likelihoods:
    """Every explanation after every piece that it is judged on; a piece is read once for all explanations."""
    wanted: dict[str, set[str]] = {}
    whose: dict[str, Origin] = {}
    for job, pieces in asked:
        for piece in {*pieces.clean, *(p for s in pieces.sets for p in s)}:
            wanted.setdefault(piece, set()).add(job.explanation.text or "")
            origin = Origin(stage="score.intervention", sae_id=job.sae_id, latent=job.latent)
            whose[piece] = min(whose.get(piece, origin), origin, key=lambda o: (o.sae_id, o.latent or 0))
    order = sorted(wanted)
    requests = [
        ContinuationRequest(
            prompt=pmi_prompt(piece), continuations=tuple(pmi_continuation(t) for t in sorted(wanted[piece])),
            origin=whose[piece],
        )
        for piece in order
    ]  # fmt: skip
    found: Likelihoods = {}
    for piece, reply in zip(order, client.logprobs(requests) if requests else [], strict=True):
        for k, text in enumerate(sorted(wanted[piece])):
            found[piece, text] = reply.sums[k] if isinstance(reply, LogprobReply) else reply
    return found


def _minus(steered: float | Failure, clean: float | Failure) -> float | Failure:
    if isinstance(steered, Failure):
        return steered
    return clean if isinstance(clean, Failure) else round(steered - clean, DECIMALS)


def _likeliest(pieces: Pieces, part: range, likely: Likelihoods, text: str) -> bool | Failure:
    """Is the mean log-likelihood after the latent's own pieces above that after either other group? A tie is wrong."""
    means = []
    for group in pieces.sets:
        values = [likely[group[i], text] for i in part]
        if failed := next((v for v in values if isinstance(v, Failure)), None):
            return failed
        means.append(float(np.mean(values)))  # type: ignore[arg-type]
    return round(means[0] - max(means[1:]), DECIMALS) > 0


def _gain_row(job: ScoreJob, gains: Sequence[float | Failure], identity: dict[str, Any]) -> LatentScore:
    """Mean over prompts in nats, with 1.96 standard errors; there is no worst value of an unbounded number."""
    values = [g for g in gains if not isinstance(g, Failure)]
    reason = _null_reason(len(values), len(gains))
    mean = None if reason else float(np.mean(values))
    spread = float(np.std(values, ddof=1)) if mean is not None and len(values) > 1 else 0.0
    half = 1.96 * spread / len(values) ** 0.5 if spread > 0 else None
    return LatentScore(
        metric="surprisal_gain", value=mean, null_reason=reason, n_pos=len(values), n_failed=len(gains) - len(values),
        ci_low=None if mean is None or half is None else mean - half,
        ci_high=None if mean is None or half is None else mean + half, **base_score(job, **identity),
    )  # fmt: skip


def _choice_row(metric: str, job: ScoreJob, chosen: Sequence[bool | Failure], identity: dict[str, Any]) -> LatentScore:
    """Share of right choices with its Wilson interval; base_rate is chance."""
    answered = [c for c in chosen if not isinstance(c, Failure)]
    reason = _null_reason(len(answered), len(chosen))
    interval = None if reason else wilson(sum(answered), len(answered))
    return LatentScore(
        metric=metric, value=None if reason else sum(answered) / len(answered), null_reason=reason,
        ci_low=interval.low if interval else None, ci_high=interval.high if interval else None,
        value_worst=sum(answered) / len(chosen) if chosen else None, n_pos=len(answered),
        n_failed=len(chosen) - len(answered), **{**base_score(job, **identity), "base_rate": CHANCE},
    )  # fmt: skip


def _null_reason(n_answered: int, n_asked: int) -> str | None:
    if n_asked == 0:
        return "unsupported"
    return "too_many_failures" if n_asked - n_answered > MAX_FAILED_SHARE * n_asked else None


PLUGIN = Intervention
