"""Explain and score in parts of so many latents, here, in processes or on Ray; the engine changes no result.

A part is the same whatever the engine and the number of workers, and all that it draws hangs on (seed, SAE, latent,
purpose); parts are put together in the order of the latents. Processes of one machine share the reply cache; other
machines of a Ray cluster have files of their own (:mod:`autointerp.shared_replies`).
"""

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from autointerp.choose import Choice
from autointerp.exemplars import ExemplarTable
from autointerp.interfaces import ScoreJob, Scorer, ScoreResult
from autointerp.ledger import LedgerEntry, LedgerKey
from autointerp.pipeline import OutputTokens, explain_part
from autointerp.shared_replies import gathered
from autointerp.workplace import Workplace, exemplar_table, needs_of, opened
from sae.engines import EngineName, Failure, failure_of, run_jobs
from sae.errors import ArtefactError, BudgetExceeded, ConfigError, DataError, NoAnswer, SaescopeError, Unsupported

PART_LATENTS = 64
Entries = dict[LedgerKey, LedgerEntry]
_KNOWN: dict[str, type[SaescopeError]] = {
    e.__name__: e for e in (ArtefactError, BudgetExceeded, ConfigError, DataError, NoAnswer, SaescopeError, Unsupported)
}


class PartsFailed(SaescopeError):
    """Some parts gave no result; what was answered is stored, and the same command goes on from there."""


class _ExplainJob(NamedTuple):
    place: Workplace
    exemplars: Path
    latents: tuple[int, ...]
    explainers: tuple[Any, ...]
    output_tokens: OutputTokens
    prompted: bool
    apart: bool


class _ScoreJob(NamedTuple):
    place: Workplace
    scorer: Any
    sample: tuple[int, ...]
    number: int
    jobs: tuple[ScoreJob, ...]
    apart: bool


def explain_job(job: _ExplainJob) -> tuple[Choice | Failure, Entries]:
    """One part explained, in whatever process; and what it asked of the language model, even where it failed."""
    here = opened(job.place)
    ctx = here.explaining(needs_of(job.explainers), job.place)
    table = exemplar_table(job.exemplars)

    def work() -> Choice:
        return explain_part(job.latents, table, job.explainers, ctx, job.output_tokens, prompted=job.prompted)

    return _counted(work, ctx.client, job.place, job.apart)


def score_job(job: _ScoreJob) -> tuple[list[ScoreResult] | Failure, Entries]:
    """One part scored by one scorer, in whatever process."""
    ctx = replace(opened(job.place).scoring(needs_of([job.scorer]), job.place), latents=job.sample)
    return _counted(lambda: job.scorer.score_many(list(job.jobs), ctx), ctx.client, job.place, job.apart)


def _counted(work: Callable[[], Any], client: Any, place: Workplace, apart: bool) -> tuple[Any, Entries]:
    """Result or failure, and the ledger lines. ``apart``: the part has a budget of its own, that of ``place``, whatever
    the parts before it in this process have spent."""
    if apart:
        client.allow(place.max_tokens, place.max_cost_usd)
    with _Counted(client) as counted:
        try:
            result = work()
        except Exception as error:
            result = failure_of(error)
    return result, counted.entries


class _Counted:
    """Takes the ledger lines that a part adds, and leaves the client's ledger empty for the next."""

    def __init__(self, client: Any) -> None:
        self.ledger, self.entries = getattr(client, "ledger", None), {}  # type: ignore[var-annotated]

    def __enter__(self) -> "_Counted":
        if self.ledger is not None:
            self.before, self.ledger.entries = self.ledger.entries, {}
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if self.ledger is not None:
            self.entries, self.ledger.entries = self.ledger.entries, self.before
            if kind is not None:  # interrupted: nobody takes them, so they stay
                _add(self.ledger.entries, self.entries)


@dataclass
class FanOut:
    """Hands parts to :func:`sae.engines.run_jobs`; see :class:`autointerp.pipeline.Fan`."""

    place: Workplace
    engine: EngineName = "local"
    workers: int = 1
    part_latents: int = PART_LATENTS
    threads: int | None = None

    def __post_init__(self) -> None:
        if self.part_latents < 1:
            raise ConfigError(f"part_latents must be positive, got {self.part_latents}")
        self.entries: Entries = {}
        """What all parts asked of the language model."""

    def explain(
        self, exemplars: ExemplarTable, explainers: Sequence[Any], output_tokens: OutputTokens, prompted: bool
    ) -> list[Choice]:
        """Every part explained, in the order of the latents."""
        jobs = [
            _ExplainJob(
                self._share(len(part) / len(exemplars.latents)), exemplars.folder, part, tuple(explainers),
                {i: output_tokens[i] for i in part if i in output_tokens}, prompted, self._apart,
            )
            for part in self._parts(exemplars.latents)
        ]  # fmt: skip
        return self._run(explain_job, jobs, lambda job: job.latents[0])

    def score(
        self, exemplars: ExemplarTable, tasks: Sequence[tuple[Scorer, Sequence[ScoreJob]]]
    ) -> list[list[ScoreResult]]:
        """Per scorer one result per job, in their order. The parts of all scorers are handed out together."""
        part_of = {i: n for n, part in enumerate(self._parts(exemplars.latents)) for i in part}
        asking = [any(need.startswith("client:") for need in scorer.needs) for scorer, _ in tasks]
        total = sum(len(jobs) for asks, (_, jobs) in zip(asking, tasks, strict=True) if asks)
        sample = tuple(exemplars.latents)
        parts: list[_ScoreJob] = []
        places: list[tuple[int, list[int]]] = []  # of each part: whose it is, and where its results go
        for s, (scorer, jobs) in enumerate(tasks):
            members: dict[int, list[int]] = {}
            for index, job in enumerate(jobs):
                members.setdefault(part_of[job.latent], []).append(index)
            for _, mine in sorted(members.items()):
                share = self._share(len(mine) / total if asking[s] else 0.0)
                parts.append(_ScoreJob(share, scorer, sample, len(parts), tuple(jobs[i] for i in mine), self._apart))
                places.append((s, mine))
        found: list[list[Any]] = [[None] * len(jobs) for _, jobs in tasks]
        done = self._run(score_job, parts, lambda job: job.number)
        for (s, mine), results in zip(places, done, strict=True):
            for index, result in zip(mine, results, strict=True):
                found[s][index] = result
        return found

    def _parts(self, latents: Sequence[int]) -> list[tuple[int, ...]]:
        n = self.part_latents
        return [tuple(latents[start : start + n]) for start in range(0, len(latents), n)]

    @property
    def _apart(self) -> bool:
        """Whether parts are done where nobody sees what the others spend."""
        return self.engine != "local" or self.workers > 1

    def _share(self, part: float) -> Workplace:
        if not self._apart:
            return self.place
        if self.place.max_tokens is None and self.place.max_cost_usd is None:
            return self.place.share(part, self.workers)
        here = opened(self.place).client(self.place)  # has checked the judges
        return self.place.share(part, self.workers, here.spent_tokens, here.spent_usd)

    def _run(self, function: Callable[[Any], Any], jobs: Sequence[Any], order: Callable[[Any], int]) -> list[Any]:
        """Results in the order of the parts. The first failure is raised once every part has had its turn."""
        done: dict[int, Any] = {}
        failed: list[Failure] = []
        gpus = float(self.place.device.startswith("cuda"))
        several = self.engine == "ray" and "RAY_ADDRESS" in os.environ
        with gathered(self.place.root) if several else nullcontext():
            for job, result in run_jobs(
                function, jobs, engine=self.engine, workers=self.workers, threads=self.threads, gpus=gpus,
                shared=[self.place.root],
            ):  # fmt: skip
                if not isinstance(result, Failure):
                    result, entries = result
                    _add(self.entries, entries)
                if isinstance(result, Failure):
                    failed.append(result)
                else:
                    done[order(job)] = result
        if failed:
            first = failed[0]
            kind = _KNOWN.get(first.error, PartsFailed)
            known = kind is not PartsFailed
            said = first.detail if known else f"{first.error}: {first.detail}\n{first.traceback}"
            raise kind(f"{said} ({len(failed)} of {len(jobs)} parts failed; run the same command again to go on)")
        return [done[n] for n in sorted(done)]


def _add(into: Entries, entries: Mapping[LedgerKey, LedgerEntry]) -> None:
    for key, entry in entries.items():
        here = into.setdefault(key, LedgerEntry())
        for name, value in vars(entry).items():
            setattr(here, name, getattr(here, name) + value)
