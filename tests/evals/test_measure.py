"""The runner: a job that fails, for whatever reason, is told by name and takes no other with it."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from failing_eval import FailsOnRelu
from memory_store import info

from evals.base import EvalContext, EvalResult, RowMaker, SAESubject
from evals.measure import Elsewhere, Measurement
from evals.results import Estimate, Row, read_rows
from evals.run_config import tiny
from evals.run_log import RunLog
from evals.stages import Pipeline
from sae.errors import ConfigError, DataError, SaescopeError
from sae.manifest import writing


class LM:
    name, revision = "lm", "r"


def subject(name: str, architecture: str = "topk") -> SAESubject:
    made = SAESubject.__new__(SAESubject)
    made.info = replace(info(LM, "h", name, d_in=4), architecture=architecture)
    made.provides = frozenset({"sparse"})
    return made


SUBJECTS = [subject("first"), subject("second", "relu"), subject("third")]


class Fine(FailsOnRelu):
    name = "fine"

    def run(self, ctx: EvalContext) -> EvalResult:
        made = RowMaker(self, ctx)
        made.add("one", Estimate(value=0.5, n=3))
        return EvalResult(rows=made.rows)


class Raises(Fine):
    """Fails on the second subject with ``error``."""

    name = "raises"
    error: BaseException = ValueError("no relu here")

    def run(self, ctx: EvalContext) -> EvalResult:
        if ctx.subject.info.sae_id == "second":
            raise self.error
        return super().run(ctx)


class OutOfRange(Fine):
    """A value that its own declaration forbids, which is refused with a ConfigError."""

    name = "out_of_range"
    metrics = (replace(FailsOnRelu.metrics[0], low=0.0, high=1.0),)

    def run(self, ctx: EvalContext) -> EvalResult:
        made = RowMaker(self, ctx)
        made.add("one", Estimate(value=7.0 if ctx.subject.info.sae_id == "second" else 0.5, n=3))
        return EvalResult(rows=made.rows)


def measurement(root: Path) -> Measurement:
    log = RunLog(root=root, preset="tiny", key="k", config={})
    return Measurement(root=root, preset="tiny", seed=0, hookpoint="h", log=log, parts={}, latents=lambda i: None,
                       scores=lambda i: None, load_lm=lambda: None)  # fmt: skip


def rows_of(made: Measurement) -> list[Row]:
    return [row for folder in made.folders for row in read_rows(folder)]


@pytest.mark.parametrize("error", [
    ValueError("no relu here"), ConfigError("no relu here"), DataError("no relu here"), MemoryError("no relu here"),
    AssertionError("no relu here"),
])  # fmt: skip
def test_a_failed_job_is_told_and_the_others_are_done(tmp_path: Path, error: BaseException) -> None:
    made = measurement(tmp_path)
    made.run_all([type("R", (Raises,), {"error": error})(), Fine()], SUBJECTS)
    assert [(f.subject, f.task) for f in made.log.failures] == [("second", "raises")]
    assert made.log.failures[0].error == f"{type(error).__name__}: no relu here"
    assert sorted((r.eval, r.sae_id) for r in rows_of(made)) == [
        ("fine", "first"), ("fine", "second"), ("fine", "third"), ("raises", "first"), ("raises", "third")]
    told = json.loads((tmp_path / "run.json").read_text())
    assert [s["status"] for s in told["stages"]] == ["failed", "done"] and len(told["failures"]) == 1


def test_a_value_out_of_its_range_costs_its_own_job_alone(tmp_path: Path) -> None:
    made = measurement(tmp_path)
    made.run_all([OutOfRange(), Fine()], SUBJECTS)
    [failure] = made.log.failures
    assert (failure.subject, failure.task) == ("second", "out_of_range")
    assert "outside its declared range" in failure.error
    assert len(rows_of(made)) == 5


def test_the_next_run_tries_the_failed_job_again_and_nothing_else(tmp_path: Path) -> None:
    first = measurement(tmp_path)
    first.run_all([Raises()], SUBJECTS)
    before = {p: p.stat().st_mtime_ns for p in tmp_path.glob("rows/*/*/*/manifest.json")}
    again = measurement(tmp_path)
    again.run_all([type("R", (Raises,), {"run": Fine.run})()], SUBJECTS)
    assert not again.log.failures and len(rows_of(again)) == 3 and len(before) == 2
    assert all(p.stat().st_mtime_ns == t for p, t in before.items())


class Unprepared(Raises):
    """What its subjects share cannot be made."""

    name = "unprepared"

    def prepare(self, ctx: EvalContext) -> None:
        raise DataError("an asset is missing")

    def run(self, ctx: EvalContext) -> EvalResult:
        self.prepare(ctx)
        return super().run(ctx)


def here(job: Any) -> Path:
    """As a process elsewhere measures a job."""
    evaluation = {e.name: e for e in (Unprepared(), Fine())}[job.evaluation]
    return measurement(job.cfg).run(evaluation, next(s for s in SUBJECTS if s.info.sae_id == job.sae_id), job.seed)


def test_other_engines_go_on_where_the_shared_part_of_one_evaluation_fails(tmp_path: Path) -> None:
    made = measurement(tmp_path)
    made.run_all([Unprepared(), Fine()], SUBJECTS, seeds=(0, 1),
                 elsewhere=Elsewhere("local", 1, here, tmp_path))  # fmt: skip
    assert len(rows_of(made)) == 6 and {r.eval for r in rows_of(made)} == {"fine"}
    assert len(made.log.failures) == 6 and {f.task for f in made.log.failures} == {"unprepared"}
    assert all(f.error == "DataError: an asset is missing" for f in made.log.failures)
    assert made.log.stages[0].status == "failed"


def test_interruption_is_no_failed_job(tmp_path: Path) -> None:
    made = measurement(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        made.run_all([type("R", (Raises,), {"error": KeyboardInterrupt()})()], SUBJECTS)
    assert not isinstance(KeyboardInterrupt(), SaescopeError) and not made.log.failures


class Latents(Fine):
    name, needs = "latents", frozenset({"interp"})


def test_an_sae_without_latents_is_told_and_the_others_keep_theirs(tmp_path: Path, monkeypatch) -> None:
    """What breaks for all SAEs together is tried for each alone."""
    asked: list[list[str]] = []

    def build(root: Path, saes: list, stores: Any, **options: Any) -> list[Any]:
        asked.append([sae.sae_id for sae in saes])
        if any(sae.sae_id in broken for sae in saes):
            raise ConfigError("these latents would take more disk than there is")
        folders = [tmp_path / "latents" / sae.sae_id for sae in saes]
        for folder in folders:
            with writing(folder, kind="latents", key=folder.name, stage_version=1, config={}) as out:
                (out.path / "entries").write_text("")
        return [SimpleNamespace(folder=folder, key=folder.name) for folder in folders]

    monkeypatch.setattr("evals.stages.build_latents_many", build)
    cfg = replace(tiny(), root=tmp_path)

    def found(log: RunLog) -> dict[str, Any]:
        saes = [SimpleNamespace(sae_id=s.info.sae_id) for s in SUBJECTS]
        here = SimpleNamespace(cfg=cfg, root=tmp_path, log=log, saes=saes, store=lambda split: None)
        return Pipeline.latents.func(here)

    made, broken = measurement(tmp_path), {"second"}
    caches = found(made.log)
    assert sorted(caches) == ["first", "third"] and asked == [["first", "second", "third"], ["first"], ["second"],
                                                             ["third"]]  # fmt: skip
    [failure] = made.log.failures
    assert (failure.subject, failure.task) == ("second", "latents") and "more disk" in failure.error
    made.latents, made.parts = caches.get, {"stores": dict}
    made.run_all([Latents(), Fine()], SUBJECTS)
    assert [(f.subject, f.task) for f in made.log.failures[1:]] == [("second", "latents")]
    assert "see its failed task `latents`" in made.log.failures[1].error and len(rows_of(made)) == 5
    broken = {"first", "second", "third"}
    with pytest.raises(ConfigError, match="more disk"):
        found(measurement(tmp_path).log)
