"""Intruder: can a reader tell the one silent window from four active ones, without any explanation? (AUTOINTERP 5.1)

Says whether a latent has something that can be explained at all; chance is one in five. The form is EleutherAI's
(2410.13928, 3.4), where the judge sees no explanation either. A trial: four windows of about equal strength and one
uniform silent window, in random order.
"""

from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

from autointerp.classify import MAX_FAILED_SHARE, base_score, null_scores, positives_of
from autointerp.client import Origin
from autointerp.interfaces import ScoreContext, ScoreJob, ScoreResult
from autointerp.numbered_choice import MODES, Mode, NumberedChoice
from autointerp.prompts import load_prompt, numbered, window_text
from autointerp.rates import wilson
from autointerp.records import Exemplar, Failure, LatentScore, ScoreItem
from sae.config import require
from sae.errors import Unsupported
from sae.manifest import rng

N_SHOWN = 5
CHANCE = 1 / N_SHOWN


class Trial(NamedTuple):
    """Five windows in the order shown."""

    shown: tuple[Exemplar, ...]
    place: int
    """Index of the intruder."""
    stratum: str
    """Quantile groups of the active ones, "3" or "2-4"; "" where there are none."""


class Intruder:
    """``Intruder(trials=20)``: at most so many per latent, each with a silent window of its own."""

    name: ClassVar[str] = "intruder"
    version: ClassVar[int] = 2
    needs: ClassVar[frozenset[str]] = frozenset({"client:generate"})
    metrics: ClassVar[tuple[str, ...]] = ("accuracy",)
    uses_explanation: ClassVar[bool] = False
    """The pipeline hands over one job per latent and no shuffled floor: chance is known."""

    def __init__(self, *, trials: int = 20, mode: Mode = "auto") -> None:
        require(trials >= 1, f"trials must be positive, got {trials}")
        require(mode in MODES, f"mode must be auto, logprob or json, got {mode!r}")
        self.trials, self.mode = trials, mode
        by_logprob, by_json = load_prompt("intruder_logprob"), load_prompt("intruder_json")
        self.choosing = NumberedChoice(by_logprob, by_json, "odd", N_SHOWN, mode)
        self.inputs = {prompt.name: prompt.sha256 for prompt in (by_logprob, by_json)}

    def score_many(self, jobs: list[ScoreJob], ctx: ScoreContext) -> list[ScoreResult]:
        """One result per job, whatever its explanation. An item is a trial, known by its intruder (a silent window);
        its verdict is "belongs to the others", so that false is right. :class:`Unsupported` where the client lacks the
        mode's verb."""
        client = ctx.client
        if client is None:
            raise Unsupported("'intruder' needs a language model; choose a client or another scorer")
        trials = [self._trials(job, ctx.seed) for job in jobs]
        asked = [(job, trial) for job, mine in zip(jobs, trials, strict=True) for trial in mine]
        holes = [{"windows": _lines(trial, ctx)} for _, trial in asked]
        said = iter(self.choosing.ask(holes, [_origin(job) for job, _ in asked], client, user=self.name))
        identity: dict[str, Any] = {"scorer": self.name, "version": self.version, "judge": self.choosing.name(client)}
        results = []
        for job, mine in zip(jobs, trials, strict=True):
            answers = [next(said) for _ in mine]
            if not mine:
                results.append(ScoreResult(scores=null_scores(job, "too_few_positive", self.metrics, **identity)))
                continue
            items = tuple(_item(job, trial, answer) for trial, answer in zip(mine, answers, strict=True))
            results.append(ScoreResult(scores=tuple(_rows(job, mine, items, identity)), items=items))
        return results

    @staticmethod
    def separation(items: Sequence[ScoreItem]) -> float | None:
        """Share of trials answered right: what the judge check looks at."""
        answered = [i.verdict is False for i in items if i.verdict is not None]
        return sum(answered) / len(answered) if answered else None

    def _trials(self, job: ScoreJob, seed: int) -> list[Trial]:
        """Strata in turn, each silent window once. Empty where four active and one silent window are not there."""
        strata = _strata(positives_of(job.exemplars))
        silent = sorted((e for e in job.exemplars if e.kind == "silent"), key=lambda e: e.exemplar_id)
        if not strata or not silent:
            return []
        draw = rng(seed, job.sae_id, job.latent, "intruder")
        intruders = [silent[i] for i in draw.permutation(len(silent))[: self.trials]]
        out = []
        for t, intruder in enumerate(intruders):
            name, members = strata[t % len(strata)]
            four = [members[i] for i in draw.permutation(len(members))[: N_SHOWN - 1]]
            place = int(draw.integers(N_SHOWN))
            out.append(Trial((*four[:place], intruder, *four[place:]), place, name))
        return out


def _strata(positives: Sequence[Exemplar]) -> list[tuple[str, list[Exemplar]]]:
    """Quantile groups, neighbours joined until each holds four windows; a weaker remainder joins the last."""
    by_group: dict[int, list[Exemplar]] = {}
    for e in sorted(positives, key=lambda e: e.exemplar_id):
        by_group.setdefault(e.group, []).append(e)
    strata: list[tuple[list[int], list[Exemplar]]] = []
    for group in sorted(by_group, reverse=True):
        if not strata or len(strata[-1][1]) >= N_SHOWN - 1:
            strata.append(([], []))
        strata[-1][0].append(group)
        strata[-1][1].extend(by_group[group])
    if len(strata) > 1 and len(strata[-1][1]) < N_SHOWN - 1:
        rest = strata.pop()
        strata[-1][0].extend(rest[0])
        strata[-1][1].extend(rest[1])
    return [(_named(groups), members) for groups, members in strata if len(members) >= N_SHOWN - 1]


def _named(groups: Sequence[int]) -> str:
    low, high = min(groups), max(groups)
    return "" if low < 0 else str(low) if low == high else f"{low}-{high}"


def _lines(trial: Trial, ctx: ScoreContext) -> str:
    return numbered([window_text(ctx.tokenizer, e.token_ids) for e in trial.shown])


def _origin(job: ScoreJob) -> Origin:
    return Origin(stage="score.intruder", sae_id=job.sae_id, latent=job.latent)


def _item(job: ScoreJob, trial: Trial, answer: int | Failure) -> ScoreItem:
    failed = isinstance(answer, Failure)
    return ScoreItem(
        explanation_id=job.explanation.explanation_id,
        exemplar_id=trial.shown[trial.place].exemplar_id,
        scorer=Intruder.name,
        positive=False,
        verdict=None if failed else answer != trial.place,
        failure=answer if failed else None,  # type: ignore[arg-type]
    )


def _rows(
    job: ScoreJob, trials: Sequence[Trial], items: Sequence[ScoreItem], identity: dict[str, Any]
) -> list[LatentScore]:
    """Accuracy over all trials and per stratum, with Wilson intervals; base_rate is chance."""
    base = {**base_score(job, **identity), "base_rate": CHANCE}
    too_many = sum(i.failure is not None for i in items) > MAX_FAILED_SHARE * len(items)
    cells = {"": list(items)}
    for trial, item in zip(trials, items, strict=True):
        if trial.stratum:
            cells.setdefault(f"decile={trial.stratum}", []).append(item)
    rows = []
    for group in sorted(cells):
        answered = [i for i in cells[group] if i.verdict is not None]
        right = sum(i.verdict is False for i in answered)
        null = too_many or not answered
        interval = None if null else wilson(right, len(answered))
        rows.append(
            LatentScore(
                metric="accuracy",
                group=group,
                value=None if null else right / len(answered),
                ci_low=interval.low if interval else None,
                ci_high=interval.high if interval else None,
                value_worst=right / len(cells[group]),
                n_pos=len(answered),
                n_failed=len(cells[group]) - len(answered),
                null_reason="too_many_failures" if null else None,
                **base,
            )
        )
    return rows


PLUGIN = Intruder
