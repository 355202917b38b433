"""Simulation: does the explanation predict how strongly the latent fires on each token? (AUTOINTERP 4)

A simulator, chosen by name, gives a value per token; a calibration fitted on the calibrate windows maps values to
activations. An explanation that is a pattern is simulated by the pattern itself. Weighted so that the drawn windows
stand for all grid windows of the split. W tokens per window.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from autointerp.calibration import (
    SIMULATION_METRICS,
    SimulationMetric,
    fit,
    simulation_metrics,
    window_sums,
    window_weights,
)
from autointerp.classify import base_score, null_scores, positives_of
from autointerp.interfaces import ScoreContext, ScoreJob, ScoreResult, Simulator
from autointerp.rates import too_many_failed
from autointerp.records import ActivationScale, Exemplar, LatentScore, ScoreItem, Simulation
from autointerp.texts import any_of, deal
from sae.plugins import find

PATTERN_SIMULATOR = "pattern"


class SimulationScorer:
    """Correlation and explained variance of simulated activations."""

    name: ClassVar[str] = "simulation"
    version: ClassVar[int] = 3
    metrics: ClassVar[tuple[str, ...]] = SIMULATION_METRICS

    def __init__(
        self,
        simulator: str = "word_embedding",
        *,
        calibration: str | None = None,
        windows_per_sign: int = 10,
        calibrate_per_sign: int = 10,
    ) -> None:
        """``calibration``: linear, scale or percentile; by default scale for values in activation units, else linear.

        ``windows_per_sign``: at most this many positive (spread over the quantile groups) and silent windows.
        """
        self.calibration = calibration
        self.windows_per_sign, self.calibrate_per_sign = windows_per_sign, calibrate_per_sign
        self.simulator: Simulator = find("autointerp.simulators", simulator)()
        self.inputs = {"simulator": simulator, "simulator_version": self.simulator.version}

    @property
    def needs(self) -> frozenset[str]:
        """Those of the simulator."""
        return self.simulator.needs

    def score_many(self, jobs: list[ScoreJob], ctx: ScoreContext) -> list[ScoreResult]:
        """One result per job; the simulator sees the windows of all jobs at once."""
        by_kind: dict[bool, list[int]] = {True: [], False: []}
        for i, job in enumerate(jobs):
            by_kind[job.explanation.pattern is not None].append(i)
        results: dict[int, ScoreResult] = {}
        for is_pattern, members in by_kind.items():
            if not members:
                continue
            simulator = find("autointerp.simulators", PATTERN_SIMULATOR)() if is_pattern else self.simulator
            results.update(zip(members, self._score([jobs[i] for i in members], simulator, ctx), strict=True))
        return [results[i] for i in range(len(jobs))]

    def _score(self, jobs: list[ScoreJob], simulator: Simulator, ctx: ScoreContext) -> list[ScoreResult]:
        drawn = [self._windows(job) if job.explanation.failure is None else ([], []) for job in jobs]
        pairs = [(job.explanation, e) for job, (a, b) in zip(jobs, drawn, strict=True) for e in (*a, *b)]
        answers = iter(simulator.simulate_many(pairs, ctx) if pairs else [])
        judge = _judge(simulator, ctx)
        out = []
        for job, (scored, known) in zip(jobs, drawn, strict=True):
            on_scored = [next(answers) for _ in scored]
            on_known = [next(answers) for _ in known]
            identity = {"scorer": self.name, "version": self.version, "judge": judge}
            out.append(self._result(job, scored, on_scored, known, on_known, identity))
        return out

    def _windows(self, job: ScoreJob) -> tuple[list[Exemplar], list[Exemplar]]:
        """(score windows, calibrate windows): positives and uniform silent windows alone, at most n of each sign."""
        return (
            choose_windows(job.exemplars, self.windows_per_sign),
            choose_windows(job.calibrate, self.calibrate_per_sign),
        )

    def _result(
        self,
        job: ScoreJob,
        scored: list[Exemplar],
        on_scored: list[Simulation],
        known: list[Exemplar],
        on_known: list[Simulation],
        identity: dict[str, Any],
    ) -> ScoreResult:
        failure = job.explanation.failure
        if failure is not None:
            return ScoreResult(scores=null_scores(job, failure.code, self.metrics, **identity))
        said: dict[str, Any] = {"simulations": tuple(on_scored), "items": tuple(map(self._item, scored, on_scored))}
        answered = [(e, s) for e, s in zip(scored, on_scored, strict=True) if s.values is not None]
        fitted = [(e, s) for e, s in zip(known, on_known, strict=True) if s.values is not None]
        n_failed = len(scored) - len(answered)
        code = None
        if not scored or not known:
            code = "too_few_positive"
        elif not fitted or any(_lost(scored, answered, sign) for sign in (True, False)):
            code = "too_many_failures"
        if code is not None:
            rows = [
                LatentScore(**{**row.__dict__, "n_failed": n_failed})
                for row in null_scores(job, code, self.metrics, **identity)
            ]
            return ScoreResult(scores=tuple(rows), **said)
        found = self._measure(job, answered, fitted)
        n_pos = sum(e.positive for e, _ in answered)
        counts = {"n_pos": n_pos, "n_neg": len(answered) - n_pos, "n_failed": n_failed}
        base = {**base_score(job, **identity), **counts}
        return ScoreResult(scores=tuple(_row(metric, found[metric], base) for metric in self.metrics), **said)

    def _item(self, exemplar: Exemplar, simulation: Simulation) -> ScoreItem:
        """The largest simulated value of a window: what the judge check looks at. There is no verdict."""
        return ScoreItem(
            explanation_id=simulation.explanation_id,
            exemplar_id=exemplar.exemplar_id,
            scorer=self.name,
            positive=exemplar.positive,
            value=None if simulation.values is None else max(simulation.values, default=0.0),
            failure=simulation.failure,
        )

    def _measure(
        self, job: ScoreJob, scored: list[tuple[Exemplar, Simulation]], known: list[tuple[Exemplar, Simulation]]
    ) -> dict[str, SimulationMetric]:
        scale = known[0][1].scale
        kind = self.calibration or ("scale" if scale == ActivationScale.ACTIVATION else "linear")
        signs = np.array([e.positive for e, _ in known])
        weights = np.repeat(window_weights(signs, job.pi), [len(e.token_ids) for e, _ in known])
        calibrated = fit(kind, _flat([s.values for _, s in known]), _flat([e.acts for e, _ in known]), weights)
        positive = np.array([e.positive for e, _ in scored])
        sums = window_sums(
            [np.asarray(e.acts) for e, _ in scored],
            [np.asarray(s.values) for _, s in scored],
            window_weights(positive, job.pi),
            calibrated,
        )
        return simulation_metrics(sums, positive, job.sae_id, job.latent, job.explanation.explanation_id)


def choose_windows(exemplars: Sequence[Exemplar], per_sign: int) -> list[Exemplar]:
    """At most ``per_sign`` positive windows, dealt round the quantile groups, and as many uniform silent ones."""
    silent = [e for e in exemplars if e.kind == "silent"]
    return deal(positives_of(exemplars), per_sign) + any_of(silent, per_sign)


def _lost(scored: Sequence[Exemplar], answered: Sequence[tuple[Exemplar, Simulation]], positive: bool) -> bool:
    """Did more than a tenth of the windows of this sign fail? A correlation over the other sign alone says nothing."""
    n = sum(e.positive == positive for e in scored)
    return too_many_failed(n - sum(e.positive == positive for e, _ in answered), n)


def _flat(rows: Sequence[Sequence[float] | None]) -> np.ndarray:
    return np.concatenate([np.asarray(row, dtype=np.float64) for row in rows])


def _judge(simulator: Simulator, ctx: ScoreContext) -> str:
    """Whose answers these are: the pattern's own, the embedder's, or the language model's."""
    if "embedder" in simulator.needs and ctx.embedder is not None:
        return f"{simulator.name}/{ctx.embedder.name}"
    if any(need.startswith("client:") for need in simulator.needs) and ctx.client is not None:
        return f"{simulator.name}/{ctx.client.identity.model}"
    return simulator.name


def _row(metric: str, found: SimulationMetric, base: dict[str, Any]) -> LatentScore:
    return LatentScore(
        metric=metric,
        value=found.value,
        ci_low=found.interval.low if found.interval else None,
        ci_high=found.interval.high if found.interval else None,
        null_reason=found.null_reason,
        **base,
    )


PLUGIN = SimulationScorer
