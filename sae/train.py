"""Train several SAEs on one shuffled stream of activations, of one hookpoint or several (TRAINING 6, 10, 11).

Shapes: N tokens of one batch, D = d_in, F = d_sae. Each SAE has its own optimiser, seed, log and artefact; its result
does not depend on which others are trained beside it, nor on how often training was interrupted.
"""

import logging
import re
from collections.abc import Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sae import console, live_pair, manifest, resume, train_run
from sae.base import SAE
from sae.config import InputNorm, SubjectMeta, TrainConfig
from sae.errors import ConfigError, DataError, SaescopeError
from sae.metric_log import MetricLog
from sae.mirror import MakeMirror
from sae.plugins import find
from sae.streams import LiveStore
from sae.train_run import STAGE_VERSION, Run, Store, identity, input_norm, run_folder

__all__ = [
    "STAGE_VERSION", "Job", "Store", "TrainingDiverged", "input_norm", "sae_id_of", "train_jobs", "train_key",
    "train_many",
]  # fmt: skip
START_SAMPLE_TOKENS = 65_536
"""Tokens that fix v0 and the starting weights."""
DATA_SEED = 0
"""Order of the stream; a constant, or an SAE would change with the SAEs trained beside it."""
NOTED_SAES = 3
"""SAEs whose figures fit beside a progress bar."""
logger = logging.getLogger(__name__)


class TrainingDiverged(SaescopeError):
    """Some SAEs met a loss that is not finite. The others were trained and saved."""

    def __init__(self, failures: dict[str, str], paths: list[Path]) -> None:
        detail = "; ".join(f"{sae_id}: {why}" for sae_id, why in sorted(failures.items()))
        super().__init__(
            f"{len(failures)} SAE(s) stopped: {detail}. Lower train.lr or train.l1, or check the activations. "
            f"{len(paths)} other SAE(s) are complete"
        )
        self.failures = failures
        """sae_id -> reason."""
        self.paths = paths
        """Folders of the SAEs that are complete."""


def train_key(cfg: TrainConfig, store_key: str) -> str:
    """16 hex digits: the training configuration and the activations."""
    return manifest.key_of("saes", STAGE_VERSION, identity(cfg), {"activations": store_key})


def sae_id_of(cfg: TrainConfig, meta: SubjectMeta, key: str) -> str:
    """``<lm>.<hookpoint>.topk-f4608-k32.s0-<8 hex>`` in [a-z0-9._-] (HOUSE 2)."""
    k = f"-k{cfg.k}" if find("sae.architectures", cfg.architecture).uses_k else ""
    name = f"{meta.lm_slug}.{meta.hookpoint}.{cfg.architecture}-f{cfg.d_sae}{k}.s{cfg.seed}-{key[:8]}"
    return re.sub(r"[^a-z0-9._-]+", "-", name.lower())


class Job(NamedTuple):
    """SAEs of one hookpoint."""

    store: Store
    cfgs: Sequence[TrainConfig]
    meta: SubjectMeta


class _Plan(NamedTuple):
    """One SAE that a call is to train."""

    store: Store
    cfg: TrainConfig
    meta: SubjectMeta
    key: str
    folder: Path


def train_many(
    root: Path,
    store: Store,
    cfgs: Sequence[TrainConfig],
    meta: SubjectMeta,
    *,
    device: str | torch.device = "cpu",
    force: bool = False,
    keeper: resume.Keeper | None = None,
    mirror: MakeMirror | None = None,
) -> list[Path]:
    """:func:`train_jobs` for one hookpoint: folders ``root/saes/<sae_id>`` in the order of ``cfgs``."""
    job = Job(store, cfgs, meta)
    return train_jobs(root, [job], device=device, force=force, keeper=keeper, mirror=mirror)[0]


def train_jobs(
    root: Path,
    jobs: Sequence[Job],
    *,
    device: str | torch.device = "cpu",
    force: bool = False,
    keeper: resume.Keeper | None = None,
    mirror: MakeMirror | None = None,
) -> list[list[Path]]:
    """Folders ``root/saes/<sae_id>`` of each job's SAEs, all trained side by side; complete ones are not trained again
    unless ``force``. Jobs whose stores are hookpoints of one :class:`sae.streams.LiveStream` share its passes.

    What was interrupted goes on from its newest saved step and ends with the bytes of an uninterrupted run (on a CPU,
    with as many threads); ``keeper`` says how often steps are saved, ``mirror`` where the rows of logs go as well.
    SIGTERM and SIGINT save and raise :class:`sae.resume.TrainingInterrupted`, a ``KeyboardInterrupt``.

    All configurations need the same ``batch_tokens``. An SAE whose loss becomes non-finite is stopped, the others go
    on, and :class:`TrainingDiverged`, which lists both, is raised at the end. ``ConfigError`` for configurations that
    do not go together, ``DataError`` for a store smaller than a batch; both before any work. ``device``: where weights,
    optimiser and batches lie; a GPU multiplies bfloat16 copies of the weights (TRAINING 7); what is saved comes back to
    the CPU. It is no part of the key: SAEs of two devices differ by rounding, and the manifest names the GPU.
    """
    device = torch.device(device)
    planned = _planned(root, jobs)
    folders = [[plan.folder for plan in plans] for plans in planned]
    missing = [plan for plans in planned for plan in plans if force or not manifest.is_complete(plan.folder)]
    if not missing:
        return folders
    failures: dict[str, str] = {}
    with ExitStack() as stack:
        signals = stack.enter_context(resume.Signals())
        for plan in missing:
            stack.enter_context(resume.locked(run_folder(plan.folder)))
        if force:
            for plan in missing:
                resume.forget(run_folder(plan.folder))
        runs = _begin(missing, device, mirror, stack)
        _loop(runs, failures, device, keeper or resume.Keeper(), signals)
        if signals.stop:  # it came in the last step
            raise resume.TrainingInterrupted("all SAEs of this call are complete")
    if failures:
        every = [folder for of_job in folders for folder in of_job]
        raise TrainingDiverged(failures, [f for f in every if manifest.is_complete(f) and f.name not in failures])
    return folders


def _begin(missing: Sequence[_Plan], device: torch.device, mirror: MakeMirror | None, stack: ExitStack) -> list[Run]:
    """Runs at their newest saved steps, the generators of random numbers at that of the one furthest behind."""
    saved = [resume.newest(run_folder(plan.folder), plan.key, plan.store.key) for plan in missing]
    runs: list[Run] = []
    sampled: Store | None = None
    for plan, step in zip(missing, saved, strict=True):
        if plan.store is not sampled:
            flat, sampled = _start_tokens(plan.store), plan.store
            sample_ND = torch.empty(0)  # that of the last hookpoint goes before the next one comes
            sample_ND = plan.store.read(flat).float().to(device)
        mirrored = None if mirror is None else mirror(plan.folder.name, identity(plan.cfg))
        log = stack.enter_context(MetricLog(run_folder(plan.folder) / "train.jsonl", mirrored))
        target_NO = _targets(plan.store, flat, device) if _plugin(plan.cfg).transcodes else None
        run = train_run.start(plan.cfg, plan.meta, plan.key, plan.folder, plan.store, sample_ND, log, target_NO)
        if step is not None:
            resume.restore(run, step)
            logger.info("%s goes on after step %d of %d", plan.folder.name, run.step, run.n_steps)
        runs.append(run)
    behind = min(zip(runs, saved, strict=True), key=lambda pair: pair[0].step)[1]
    if behind is not None:
        resume.restore_random(behind)
    return runs


def _planned(root: Path, jobs: Sequence[Job]) -> list[list[_Plan]]:
    """Names of all SAEs. ``ConfigError`` and ``DataError`` as :func:`train_jobs` says."""
    for job in jobs:
        _check(*job)
    sizes = sorted({cfg.batch_tokens for job in jobs for cfg in job.cfgs})
    if not jobs or not sizes:
        raise ConfigError("train_many needs at least one TrainConfig")
    if len(sizes) > 1:
        raise ConfigError(f"SAEs trained on one stream need the same batch_tokens, got {sizes}: train them apart")
    planned = []
    for store, cfgs, meta in jobs:
        keys = [train_key(cfg, store.key) for cfg in cfgs]
        names = [sae_id_of(cfg, meta, key) for cfg, key in zip(cfgs, keys, strict=True)]
        planned.append([
            _Plan(store, cfg, meta, key, Path(root) / "saes" / name)
            for cfg, key, name in zip(cfgs, keys, names, strict=True)
        ])  # fmt: skip
    folders = [plan.folder for plans in planned for plan in plans]
    if len(set(folders)) < len(folders):
        raise ConfigError("two of the training configurations are equal; give them different seeds")
    return planned


def _check(store: Store, cfgs: Sequence[TrainConfig], meta: SubjectMeta) -> None:
    if not cfgs:
        raise ConfigError("train_many needs at least one TrainConfig")
    for cfg in cfgs:
        plugin = _plugin(cfg)
        if plugin.uses_k and cfg.k is None:
            raise ConfigError(f"architecture {cfg.architecture!r} needs k")
        if plugin.transcodes and not hasattr(store, "read_target"):
            raise ConfigError(f"{cfg.architecture!r} is trained on pairs of activations: give a sae.paired.PairedStore")
        if plugin.transcodes and cfg.ema_decay > 0:
            raise ConfigError(f"ema_decay is not for {cfg.architecture!r} yet; set it to 0")
    largest = max(cfg.batch_tokens for cfg in cfgs)
    if store.n_kept < largest:
        raise DataError(
            f"the store has {store.n_kept:,} tokens after the filter, a batch is {largest:,}: "
            "give more text (tokens.train_tokens) or lower train.batch_tokens"
        )
    if isinstance(store, (LiveStore, live_pair.LivePair)):
        store.stream.window(largest)
    if not re.fullmatch(r"[a-z0-9._-]+", meta.lm_slug):
        raise ConfigError(f"lm_slug {meta.lm_slug!r} may only hold a-z, 0-9, '.', '_' and '-'")


def _plugin(cfg: TrainConfig) -> type[SAE]:
    return find("sae.architectures", cfg.architecture)  # type: ignore[no-any-return]


def _targets(store: Store, flat: Any, device: torch.device) -> Tensor:
    """Raw targets of a :class:`sae.paired.PairedStore`."""
    return store.read_target(flat).to(device)  # type: ignore[attr-defined,no-any-return]


def _start_tokens(store: Store) -> np.ndarray:
    """Tokens spread evenly over the store, in random order: a function of the store alone."""
    kept = np.asarray(store.kept_N)
    picked = kept[np.linspace(0, len(kept) - 1, min(len(kept), START_SAMPLE_TOKENS)).astype(np.int64)]
    order = manifest.rng("train", "start-sample", DATA_SEED).permutation(len(picked))
    return picked[order]  # type: ignore[no-any-return]


def _loop(
    runs: list[Run], failures: dict[str, str], device: torch.device, keeper: resume.Keeper, signals: resume.Signals
) -> None:
    """Feed all runs; each is saved as soon as it has had its steps. The stream begins where the one furthest behind
    stopped, and those that are further on wait for their own next batch."""
    for run in [run for run in runs if not run.active]:  # its last step was saved, its artefact was not
        _finish(run, failures)
    active = [run for run in runs if run.active]
    if not active:
        return
    batch_tokens = active[0].cfg.batch_tokens
    first, last = min(run.step for run in active), max(run.n_steps for run in active)
    stores = list({id(run.store): run.store for run in active}.values())
    names = f"training {len(runs)} SAE{'s' if len(runs) > 1 else ''}"
    with console.progress(names, total=(last - first) * batch_tokens, unit="tok") as bar:

        def filling(share: float) -> None:
            bar.advance(0, note=f"buffer {share:.0%} full")
            if signals.stop:
                raise resume.TrainingInterrupted("the stream was filling its buffer; the same command goes on")

        stream = live_pair.together(stores, batch_tokens, seed=DATA_SEED, first=first, last=last, tick=filling)
        with closing(stream):
            for index, parts in enumerate(stream, first):
                for store, (x_ND, flat) in zip(stores, parts, strict=True):
                    _feed([run for run in runs if run.store is store], x_ND, flat, index, device, failures)
                bar.advance(batch_tokens, note=_note(runs))
                _save_steps(runs, index + 1, keeper, signals, failures)
                if not any(run.active for run in runs):
                    return
    short = [run.folder.name for run in runs if run.active]
    if short:
        raise DataError(f"the store ended before {', '.join(short)} had all steps; this is a fault of its batches()")


def _feed(
    runs: Sequence[Run], x_ND: Tensor, flat: Any, index: int, device: torch.device, failures: dict[str, str]
) -> None:
    """One batch through all SAEs of a hookpoint whose next step is ``index``."""
    if device.type == "cuda" and x_ND.device.type == "cpu":  # pinned, so that the copy goes on during the last step
        x_ND = x_ND.pin_memory()
    x_ND = x_ND.to(device, non_blocking=True)
    alike: dict[InputNorm, list[Run]] = {}
    for run in runs:
        if run.active and run.step == index:
            alike.setdefault(run.sae.cfg.input_norm, []).append(run)
    for together in alike.values():
        normalised = together[0].sae.normalise(x_ND)
        for run in [run for run in together if run.sae.transcodes]:
            wanted_NO = _targets(run.store, flat, device)
            run.state.target_ND = run.sae.normalise_target(wanted_NO)
            train_run.step(run, wanted_NO, *normalised)
            run.state.target_ND = None  # no part of what a saved step must hold
        train_run.step_many([run for run in together if not run.sae.transcodes], x_ND, *normalised)
    for run in (run for together in alike.values() for run in together):
        if run.failure:
            _check_finite(run.store, x_ND, flat, index + 1)
            failures[run.folder.name] = run.failure
            logger.error("%s stopped: %s; the other SAEs go on", run.folder.name, run.failure)
        elif not run.active:
            _finish(run, failures)


def _note(runs: list[Run]) -> str:
    """Last figures of the first SAEs that are still training, and how many others there are."""
    active = [run for run in runs if run.active] or runs
    rest = len(active) - NOTED_SAES
    return " | ".join(run.note for run in active[:NOTED_SAES]) + (f" | and {rest} more" if rest > 0 else "")


def _finish(run: Run, failures: dict[str, str]) -> None:
    train_run.finish(run, run.store)
    if run.failure:
        failures[run.folder.name] = run.failure
        logger.error("%s is not saved: %s; the other SAEs go on", run.folder.name, run.failure)


def _check_finite(store: Store, x_ND: Tensor, flat: Any, step: int) -> None:
    """A loss that is not finite has two causes; the one that no option of training cures is named."""
    broken = (~torch.isfinite(x_ND).all(1)).nonzero().flatten().tolist()
    if broken:
        tokens = ", ".join(str(int(flat[i])) for i in broken[:5]) + (", ..." if len(broken) > 5 else "")
        raise DataError(
            f"activations {store.key}: {len(broken)} of {len(x_ND):,} tokens in the batch of step {step} are NaN or "
            f"infinite (flat index {tokens}); collect them again, with the model in float32. Saved steps are kept"
        )


def _save_steps(
    runs: list[Run], step: int, keeper: resume.Keeper, signals: resume.Signals, failures: dict[str, str]
) -> None:
    active = [run for run in runs if run.active and run.step == step]
    if not active or not keeper.due(step, signals):
        return
    for run in active:
        try:
            resume.save(run, run.store.key)
        except DataError as error:  # its next loss would not be finite either; the others go on
            run.failure = failures[run.folder.name] = str(error)
            logger.error("%s; the other SAEs go on", error)
    keeper.done(signals)
    if signals.stop:
        raise resume.TrainingInterrupted(f"{len(active)} SAE(s) saved after step {step}; the same command goes on")
