"""Explain, choose, check the judges, score: two artefacts per SAE, ``explanations/<key>/`` and ``scores/<key>/``.

Everything is asked for in whole lists, so that plug-ins may batch; what was asked of an LLM is in the reply cache, so
a killed run asks nothing twice. Output is sorted before it is written.
"""

import inspect
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from autointerp.choose import Choice, asks_a_judge, best_candidates, select
from autointerp.config import InterpConfig
from autointerp.exemplars import ExemplarTable
from autointerp.interfaces import ExplainContext, ScoreContext, ScoreJob, Scorer, ScoreResult, check_needs
from autointerp.judge_check import check_judge
from autointerp.records import (
    CALIBRATE,
    TRANSPORT_CODES,
    Exemplar,
    Explanation,
    Failure,
    JudgeCheck,
    LatentScore,
    LatentView,
    ScoreItem,
    Simulation,
)
from autointerp.score_faults import check_scores
from autointerp.tables import read_jsonl, read_parquet, write_jsonl, write_parquet
from sae.errors import DataError, NoAnswer
from sae.manifest import artefact_dir, canonical_json, content_of, is_complete, key_of, read_manifest, rng, writing
from sae.plugins import find

EXPLAIN_VERSION = 2
SCORE_VERSION = 2
CHECK_VERSION = 1
SHUFFLED = "shuffled"
logger = logging.getLogger(__name__)


OutputTokens = Mapping[int, tuple[Sequence[str], Sequence[str]]]
"""latent -> (promoted, suppressed) tokens of its decoder row."""


class Fan(Protocol):
    """Work in parts of a fixed number of latents, here or on other machines; see :mod:`autointerp.fan_out`."""

    part_latents: int

    def explain(
        self, exemplars: ExemplarTable, explainers: Sequence[Any], output_tokens: OutputTokens, prompted: bool
    ) -> list[Choice]:
        """:func:`explain_part` of every part, in the order of the latents."""
        ...

    def score(
        self, exemplars: ExemplarTable, tasks: Sequence[tuple[Scorer, Sequence[ScoreJob]]]
    ) -> list[list[ScoreResult]]:
        """Per scorer one result per job, in their order."""
        ...


class Scores(NamedTuple):
    """Content of ``scores/<key>/``."""

    scores: list[LatentScore]
    items: list[ScoreItem]
    simulations: list[Simulation]
    checks: list[JudgeCheck]


def _identity(plugins: Sequence[Any], ctx: ExplainContext | ScoreContext) -> dict[str, Any]:
    """Who answers: part of the key. Only what the plug-ins use counts."""
    needs = frozenset().union(*(p.needs for p in plugins)) if plugins else frozenset()
    who: dict[str, Any] = {"plugins": {p.name: _options(p) for p in plugins}, "seed": ctx.seed}
    if any(n.startswith("client:") for n in needs) and ctx.client is not None:
        identity = ctx.client.identity
        who["client"] = {"model": identity.model, "endpoint": identity.endpoint, "revision": identity.revision}
    if ctx.embedder is not None and ("embedder" in needs or isinstance(ctx, ExplainContext)):
        who["embedder"] = getattr(ctx.embedder, "model_hash", ctx.embedder.name)
    return who


def _options(plugin: Any) -> dict[str, Any]:
    """Version and settings of a plug-in: the constructor's arguments that it keeps under their names as numbers, texts
    or None, and its ``inputs`` (hashes of data files), if it has any."""
    names = inspect.signature(type(plugin)).parameters
    plain = (bool, int, float, str, type(None))
    kept = {k: v for k, v in vars(plugin).items() if k in names and isinstance(v, plain)}
    if (prompt := getattr(plugin, "prompt", None)) is not None:
        kept["prompt_sha256"] = prompt.sha256
    return kept | getattr(plugin, "inputs", {}) | {"version": plugin.version}


def load_plugins(cfg: InterpConfig, ctx: ExplainContext, scoring: ScoreContext) -> tuple[list[Any], list[Scorer]]:
    """(explainers, scorers) of a configuration, their needs checked; UnknownPlugin or Unsupported before any work."""
    explainers, scorers = plugins_of(cfg)
    for plugin in explainers:
        check_needs(plugin, ctx)
    for plugin in scorers:
        check_needs(plugin, scoring)
    return explainers, scorers


def plugins_of(cfg: InterpConfig) -> tuple[list[Any], list[Any]]:
    """(explainers, scorers), each told those settings of the configuration that its constructor takes."""

    def made(kind: Any, told: Mapping[str, Any]) -> Any:
        known = inspect.signature(kind).parameters
        return kind(**{name: value for name, value in told.items() if name in known})

    judging = {"simulator": cfg.simulator, "max_latents": cfg.costly_latents, **cfg.sizes.options()}
    explainers = [made(find("autointerp.explainers", name), {"candidates": cfg.candidates}) for name in cfg.explainers]
    return explainers, [made(find("autointerp.scorers", name), judging) for name in cfg.scorers]


def explain(
    root: Path, exemplars: ExemplarTable, explainers: Sequence[Any], ctx: ExplainContext, *, force: bool = False,
    output_tokens: "OutputTokens | None" = None, fan: "Fan | None" = None,
) -> Path:
    """All explainers on all latents that have exemplars; one text per latent is marked `selected`.

    ``output_tokens``: latent -> (promoted, suppressed) tokens. ``fan``: who does the work, in parts. The choice is
    made on the split `calibrate` alone. An artefact with requests that nobody answered is made again: what was
    answered comes from the reply cache.
    """
    began = time.monotonic()
    config, inputs = _identity(explainers, ctx), {"exemplars": exemplars.key}
    prompted = asks_a_judge(explainers, ctx)
    if prompted:
        config["chosen_by"] = _identity([find("autointerp.scorers", "detection")()], ctx)
    _note_parts(config, fan, len(exemplars.latents))
    key = key_of("explanations", EXPLAIN_VERSION, config, inputs)
    folder = artefact_dir(root, "explanations", key)
    if is_complete(folder) and not force and not _unanswered(folder):
        return folder
    told = output_tokens or {}
    if fan is None:
        parts = [explain_part(exemplars.latents, exemplars, explainers, ctx, told, prompted=prompted)]
    else:
        parts = fan.explain(exemplars, explainers, told, prompted)
    chosen, undecided = [e for part in parts for e in part.explanations], sum(part.unanswered for part in parts)
    chosen.sort(key=lambda e: (e.latent, e.explainer, e.candidate))
    with writing(
        folder, kind="explanations", key=key, stage_version=EXPLAIN_VERSION, config=config, inputs=inputs, began=began
    ) as out:
        write_jsonl(out.path / "explanations.jsonl", chosen)
        write_parquet(out.path / "explanations.parquet", chosen, Explanation)
        if output_tokens:  # for the pages: latent -> [promoted, suppressed]
            shown = {str(i): [list(side) for side in output_tokens[i]] for i in sorted(output_tokens)}
            (out.path / "output_tokens.json").write_text(canonical_json(shown) + "\n", encoding="utf-8")
        out.counts.update(sae_id=exemplars.sae_id, latents=len(exemplars.latents), explanations=len(chosen),
                          failed=sum(e.failure is not None for e in chosen),
                          unanswered=_count_unanswered(chosen) + undecided)
    return folder


def explain_part(
    latents: Sequence[int], exemplars: ExemplarTable, explainers: Sequence[Any], ctx: ExplainContext,
    output_tokens: OutputTokens, *, prompted: bool,
) -> Choice:
    """All explainers on some latents, and the choice of one text each. :class:`NoAnswer` if a model was not reached."""
    views = [_view(exemplars, latent, ctx, output_tokens) for latent in latents]
    found: dict[int, list[Explanation]] = {view.latent: [] for view in views}
    unanswered: list[NoAnswer] = []
    for explainer in explainers:
        for view, records in zip(views, explainer.explain_many(views, ctx), strict=True):
            if not records:
                raise DataError(
                    f"explainer {explainer.name!r} said nothing of latent {view.latent}, not even a failure"
                )
            found[view.latent] += records
        with _noted(unanswered):
            _require_answers(explainer.name, [e for es in found.values() for e in es if e.explainer == explainer.name])
    if unanswered:
        raise unanswered[0]
    return select(found, exemplars, ctx, prompted=prompted)


def _note_parts(config: dict[str, Any], fan: "Fan | None", n_latents: int) -> None:
    """Work done in several parts is another artefact: a local model's last bits depend on what it computes together."""
    if fan is not None and n_latents > fan.part_latents:
        config["part_latents"] = fan.part_latents


def _count_unanswered(records: Sequence[Any]) -> int:
    """Records whose failure is the server's and not an answer's: asking again may help."""
    return sum(r.failure is not None and r.failure.code in TRANSPORT_CODES for r in records)


def _unanswered(folder: Path) -> bool:
    n = int(read_manifest(folder)["counts"].get("unanswered", 0))
    if n:
        logger.info("%s: %d requests had no answer last time and are asked again", Path(folder).parent.name, n)
    return n > 0


def _view(exemplars: ExemplarTable, latent: int, ctx: ExplainContext, output_tokens: OutputTokens) -> LatentView:
    promoted, suppressed = output_tokens.get(latent, ((), ()))
    return exemplars.view(latent, tokenizer=ctx.tokenizer, promoted=promoted, suppressed=suppressed)


@contextmanager
def _noted(unanswered: list[NoAnswer]) -> Iterator[None]:
    try:
        yield
    except NoAnswer as error:
        unanswered.append(error)


def _require_answers(name: str, records: Sequence[Explanation | ScoreItem]) -> None:
    """A complete artefact is never made again: one in which nobody was reached must not become complete."""
    failures = [e.failure for e in records if e.failure is not None]
    if records and len(failures) == len(records) and all(f.code in TRANSPORT_CODES for f in failures):
        pending = all(f.code == "pending" for f in failures)
        raise NoAnswer(
            f"{name!r}: the language model answered none of {len(records)} requests ({failures[0].code}: "
            f"{failures[0].detail}); {'' if pending else 'start or check the server and '}run the same command again"
        )


def open_explanations(folder: Path) -> list[Explanation]:
    """Records of one ``explanations/<key>/``, sorted by latent, explainer, candidate."""
    read_manifest(folder)
    return read_jsonl(Path(folder) / "explanations.jsonl", Explanation)


def score(
    root: Path, explanations: Path, exemplars: ExemplarTable, scorers: Sequence[Scorer], ctx: ScoreContext, *,
    force: bool = False, fan: "Fan | None" = None,
) -> Path:
    """All scorers on all explanations and on their shuffled floor; judges are checked first. Returns scores/<key>/.

    ``fan``: who does the work, in parts; the judges are checked here all the same.
    """
    began = time.monotonic()
    manifest = read_manifest(explanations)
    config = _identity(scorers, ctx) | {"check_descriptions": ctx.check_descriptions}
    inputs = {"explanations": str(manifest["key"]), "exemplars": exemplars.key, "content": content_of(explanations)}
    _note_parts(config, fan, len(exemplars.latents))
    ctx = replace(ctx, latents=tuple(exemplars.latents))
    key = key_of("scores", SCORE_VERSION, config, inputs)
    folder = artefact_dir(root, "scores", key)
    if is_complete(folder) and not force and not _unanswered(folder):
        return folder
    checks = sorted((checked(root, scorer, ctx) for scorer in scorers), key=lambda c: c.scorer)
    jobs = make_jobs(open_explanations(explanations), exemplars, ctx.seed)
    results: list[ScoreResult] = []
    unanswered: list[NoAnswer] = []
    tasks = [(scorer, jobs_for(scorer, jobs)) for scorer in scorers]
    parts = None if fan is None else fan.score(exemplars, tasks)
    for n, (scorer, mine) in enumerate(tasks):  # all are asked before any gives up: a batch client collects it all
        judged = scorer.score_many(mine, ctx) if parts is None else parts[n]
        with _noted(unanswered):
            _require_answers(scorer.name, [item for result in judged for item in result.items])
        results += judged
    if unanswered:
        raise unanswered[0]
    scores = sorted((s for r in results for s in r.scores), key=_score_order)
    check_scores(scores)
    items = sorted((i for r in results for i in r.items), key=lambda i: (i.scorer, i.explanation_id, i.exemplar_id))
    simulations = sorted(
        (s for r in results for s in r.simulations), key=lambda s: (s.simulator, s.explanation_id, s.exemplar_id)
    )
    with writing(
        folder, kind="scores", key=key, stage_version=SCORE_VERSION, config=config, inputs=inputs, began=began
    ) as out:
        write_parquet(out.path / "scores.parquet", scores, LatentScore)
        write_parquet(out.path / "items.parquet", items, ScoreItem)
        write_parquet(out.path / "simulations.parquet", simulations, Simulation)
        write_jsonl(out.path / "judges.jsonl", checks)
        out.counts.update(
            sae_id=exemplars.sae_id, jobs=len(jobs), scores=len(scores), items=len(items),
            failed_items=sum(i.failure is not None for i in items), unanswered=_count_unanswered(items),
            undefined=sum(s.value is None for s in scores),
        )
    return folder


def _score_order(s: LatentScore) -> tuple[Any, ...]:
    return (s.latent, s.explainer, s.scorer, s.floor_kind, s.metric, s.group, s.explanation_id)


def make_jobs(explanations: Sequence[Explanation], exemplars: ExemplarTable, seed: int) -> list[ScoreJob]:
    """Of each explainer and latent one job, for its best candidate, and one under `shuffled`: the text of another
    latent by the same explainer."""
    jobs = []
    by_explainer: dict[str, list[Explanation]] = {}
    for e in best_candidates(explanations):
        jobs.append(_job(e, e.latent, exemplars, ""))
        if e.failure is None:
            by_explainer.setdefault(e.explainer, []).append(e)
    for name, group in sorted(by_explainer.items()):
        if len(group) < 2:
            continue
        order = rng(seed, exemplars.sae_id, name, 0, SHUFFLED).permutation(len(group))
        for here, there in zip(order, np.roll(order, 1), strict=True):  # one cycle: no text stays at home
            jobs.append(_job(group[int(there)], group[int(here)].latent, exemplars, SHUFFLED))
    return jobs


def jobs_for(scorer: Scorer, jobs: Sequence[ScoreJob]) -> list[ScoreJob]:
    """The jobs that a scorer wants: all, unless it says otherwise because each is dear.

    ``scorer.max_latents``: those of so many latents, spread evenly over the sample. ``scorer.selected_only``: of each
    latent its selected explanation, and its floor by the same explainer. ``scorer.uses_explanation = False``: one job
    per latent, no floor.
    """
    if not getattr(scorer, "uses_explanation", True):
        jobs = [job for job in jobs if job.explanation.selected and not job.floor_kind]
    most, selected_only = getattr(scorer, "max_latents", None), getattr(scorer, "selected_only", False)
    latents = sorted({job.latent for job in jobs})
    if most is not None and most < len(latents):
        latents = [latents[i] for i in np.linspace(0, len(latents) - 1, most).round().astype(int)]
    wanted = set(latents)
    explainers = {(j.latent, j.explanation.explainer) for j in jobs if not j.floor_kind and j.explanation.selected}
    return [
        job
        for job in jobs
        if job.latent in wanted
        and (not selected_only or (job.latent, job.explanation.explainer) in explainers)
        and (not selected_only or job.floor_kind or job.explanation.selected)
    ]


def _job(explanation: Explanation, latent: int, exemplars: ExemplarTable, floor_kind: str) -> ScoreJob:
    windows: list[Exemplar] = exemplars.scored(latent)
    return ScoreJob(
        explanation=explanation, sae_id=exemplars.sae_id, latent=latent, exemplars=tuple(windows),
        calibrate=tuple(exemplars.scored(latent, CALIBRATE)), pi=exemplars.pi(latent), floor_kind=floor_kind,
        cache=_cache_of(exemplars),
    )


def _cache_of(exemplars: ExemplarTable) -> Path | None:
    """Stand-ins of the estimate are from no cache."""
    key = getattr(exemplars, "latents_key", None)
    return None if key is None else artefact_dir(Path(exemplars.folder).parents[1], "latents", key)


def checked(root: Path, scorer: Scorer, ctx: ScoreContext) -> JudgeCheck:
    """The judge's check, kept as ``judge_checks/<key>/``, so that a judge is checked once."""
    config = _identity([scorer], ctx) | {"n": ctx.check_descriptions}
    key = key_of("judge_checks", CHECK_VERSION, config)
    folder = artefact_dir(root, "judge_checks", key)
    if is_complete(folder):
        (check,) = read_jsonl(folder / "check.jsonl", JudgeCheck)
    else:
        check = check_judge(scorer, ctx, n_descriptions=ctx.check_descriptions, seed=ctx.seed)
        if check.auc is not None and not check.n_failed:  # what had no answer is asked again by the next run
            with writing(folder, kind="judge_checks", key=key, stage_version=CHECK_VERSION, config=config) as out:
                write_jsonl(out.path / "check.jsonl", [check])
    level = logging.WARNING if check.weak else logging.INFO
    logger.log(level, "judge %s (%s): AUC %s, under wrong descriptions %s%s", check.judge, check.scorer,
               _show(check.auc), _show(check.wrong_auc), "; weak: shown, never ranked" if check.weak else "")
    return check


def _show(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.2f}"


def open_scores(folder: Path) -> Scores:
    """Records of one ``scores/<key>/``."""
    checks = open_checks(folder)
    folder = Path(folder)
    return Scores(
        read_parquet(folder / "scores.parquet", LatentScore), read_parquet(folder / "items.parquet", ScoreItem),
        read_parquet(folder / "simulations.parquet", Simulation), checks,
    )


def open_checks(folder: Path) -> list[JudgeCheck]:
    """The judges' checks of one ``scores/<key>/`` alone."""
    read_manifest(folder)
    return read_jsonl(Path(folder) / "judges.jsonl", JudgeCheck)


def failures_of(records: Sequence[Any]) -> dict[str, int]:
    """How often each failure code occurs among records that carry a ``failure``."""
    counts: dict[str, int] = {}
    for record in records:
        failure: Failure | None = record.failure
        if failure is not None:
            counts[failure.code] = counts.get(failure.code, 0) + 1
    return dict(sorted(counts.items()))
