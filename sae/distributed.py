"""Training on a mesh of processes: data parallel x latent shards, under torchrun (TRAINING 9, decision 016).

The result is that of one process but for rounding: every rank has its share of each global batch (data) and of the
latents of each SAE (latent). Rank 0 alone writes. What one rank decides or meets, all do; a rank that dies ends the run
with an error that names it (:mod:`sae.distributed_watch`).
"""

import logging
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from sae import console, distributed_run, distributed_state, manifest, resume, train
from sae.activations import ActivationStore
from sae.config import SubjectMeta, TrainConfig, require
from sae.distributed_cost import CAPACITY, MeshShape, check_divides, communication_bytes
from sae.distributed_mesh import CollectiveFailed, Mesh
from sae.distributed_watch import SILENT_S, RankLost, Watch
from sae.errors import DataError
from sae.metric_log import MetricLog
from sae.mirror import MakeMirror
from sae.train_run import Run, Store, identity, run_folder

__all__ = ["MeshShape", "Team", "communication_bytes", "join", "train_sharded"]
TIMEOUT_S = 600.0
"""Time limit of one collective; a rank that is alive but does not come is then named by its step."""
JOIN_S = 300.0
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Team:
    """This rank, among all."""

    mesh: Mesh
    watch: Watch

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which writes."""
        return self.mesh.rank == 0

    def say(self, text: str, *arguments: object) -> None:
        """Log an error that all ranks met, once."""
        if self.first:
            logger.error(text, *arguments)


def world_size() -> int:
    """Processes that torchrun started, 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def join(
    shape: MeshShape, device: str | torch.device = "cpu", *, silent_s: float = SILENT_S, timeout_s: float = TIMEOUT_S,
    join_s: float = JOIN_S,
) -> Iterator[Team]:  # fmt: skip
    """Make the process group that torchrun's environment describes; one process needs neither.

    ``ConfigError`` unless as many processes run as the mesh has ranks; :class:`sae.distributed_watch.RankLost` where
    one does not come within ``join_s``, or is lost later: a collective that fails becomes this error.
    """
    world, device = world_size(), torch.device(device)
    require(
        world == shape.world,
        f"the mesh {shape} has {shape.world} ranks, {world} process{'es run' if world > 1 else ' runs'}: start it with "
        f"torchrun --nproc-per-node {shape.world}, or give a mesh of {world}",
    )
    if world == 1:
        with Watch(None, 0, 1) as watch:
            yield Team(Mesh(shape, device), watch)
        return
    from torch.distributed.rendezvous import rendezvous

    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    try:
        store, rank, _ = next(iter(rendezvous("env://", timeout=timedelta(seconds=join_s))))
    except dist.DistError as error:
        raise RankLost(f"not all of the {world} ranks came within {join_s:g} s ({error}); start all again") from error
    watched = dist.PrefixStore("saescope", store)
    with Watch(watched, rank, world, silent_s=silent_s, join_s=join_s) as watch:
        try:
            dist.init_process_group(
                "nccl" if device.type == "cuda" else "gloo", store=store, rank=rank, world_size=world,
                timeout=timedelta(seconds=timeout_s), device_id=device if device.type == "cuda" else None,
            )  # fmt: skip
            yield Team(Mesh(shape, device), watch)
            dist.barrier()
            dist.destroy_process_group()
        except (CollectiveFailed, dist.DistError) as error:
            raise watch.blame(error) from error


@dataclass(frozen=True)
class Share(ActivationStore):
    """A store whose batches read a part of their rows from disk, and name all."""

    part: slice

    def read(self, flat: Any) -> Tensor:
        """float32 [n, D] of this rank's part of the indices."""
        return super().read(flat[self.part])


class _Job(NamedTuple):
    """One SAE to train."""

    cfg: TrainConfig
    key: str
    folder: Path


def train_sharded(
    root: Path, store: Store, cfgs: Sequence[TrainConfig], meta: SubjectMeta, team: Team, *,
    capacity: float | None = CAPACITY, force: bool = False, keeper: resume.Keeper | None = None,
    mirror: MakeMirror | None = None,
) -> list[Path]:  # fmt: skip
    """As :func:`sae.train.train_many`, by all ranks of a team together; every rank returns the folders.

    ``store`` must give every rank the same batches. ``capacity``: see :func:`sae.distributed_cost.candidates`; None is
    exact on whatever data. Saved steps and SAEs are those of one process, so training may go on there or on another
    mesh. ``ConfigError`` for widths or batches that do not divide, before any work.
    """
    mesh, watch = team.mesh, team.watch
    for cfg in cfgs:
        check_divides(cfg, mesh.shape)
    train._check(store, cfgs, meta)
    require(len({cfg.batch_tokens for cfg in cfgs}) == 1, "SAEs trained on one stream need the same batch_tokens")
    keys = [train.train_key(cfg, store.key) for cfg in cfgs]
    require(len(set(keys)) == len(keys), "two of the training configurations are equal; give them different seeds")
    jobs = [_Job(cfg, key, Path(root) / "saes" / train.sae_id_of(cfg, meta, key))
            for cfg, key in zip(cfgs, keys, strict=True)]  # fmt: skip
    folders = [job.folder for job in jobs]
    picked = watch.from_first(lambda: [i for i, f in enumerate(folders) if force or not manifest.is_complete(f)])
    missing = [jobs[i] for i in picked]
    if not missing:
        return folders
    failures: dict[str, str] = {}
    with ExitStack() as stack:
        signals = stack.enter_context(resume.Signals())
        try:
            steps = watch.from_first(lambda: _prepare(missing, store.key, force, stack))
            runs = _begin(missing, steps, meta, store, team, mirror, stack)
            _loop(store, runs, failures, team, capacity, keeper or resume.Keeper(), signals)
            stopped = mesh.reduce_(torch.tensor(int(signals.stop), device=mesh.device), "world", "max")
        except CollectiveFailed as error:  # here, where torchrun's SIGTERM does not end this process before it is said
            raise watch.blame(error) from error
        if stopped:
            raise resume.TrainingInterrupted("all SAEs of this call are complete")
    if failures:
        done = watch.from_first(lambda: [str(f) for f in folders if manifest.is_complete(f)])
        raise train.TrainingDiverged(failures, [f for f in folders if str(f) in done and f.name not in failures])
    return folders


def _prepare(missing: Sequence[_Job], store_key: str, force: bool, stack: ExitStack) -> list[str | None]:
    """By rank 0: hold the run folders, find the newest steps."""
    for job in missing:
        stack.enter_context(resume.locked(run_folder(job.folder)))
        if force:
            resume.forget(run_folder(job.folder))
    found = [resume.newest(run_folder(job.folder), job.key, store_key) for job in missing]
    return [None if path is None else str(path) for path in found]


def _begin(
    missing: Sequence[_Job], steps: Sequence[str | None], meta: SubjectMeta, store: Store, team: Team,
    mirror: MakeMirror | None, stack: ExitStack,
) -> list[Run]:  # fmt: skip
    """Runs at their newest saved steps."""
    mesh = team.mesh
    sample_ND = store.read(train._start_tokens(store)).float().to(mesh.device)
    runs = []
    for job, step in zip(missing, steps, strict=True):
        log: MetricLog = distributed_run.Silent()
        if team.first:
            mirrored = None if mirror is None else mirror(job.folder.name, identity(job.cfg))
            log = stack.enter_context(MetricLog(run_folder(job.folder) / "train.jsonl", mirrored))
        run = distributed_run.start(job.cfg, meta, job.key, job.folder, store, sample_ND, log, mesh)
        if step is not None:
            distributed_state.restore(run, Path(step), mesh)
            if team.first:
                logger.info("%s goes on after step %d of %d", job.folder.name, run.step, run.n_steps)
        distributed_run.count_dead(run, mesh)
        runs.append(run)
    behind = min(zip(runs, steps, strict=True), key=lambda pair: pair[0].step)[1]
    if behind is not None:
        resume.restore_random(Path(behind))
    return runs


def _loop(
    store: Store, runs: list[Run], failures: dict[str, str], team: Team, capacity: float | None,
    keeper: resume.Keeper, signals: resume.Signals,
) -> None:  # fmt: skip
    """As the loop of one process (:mod:`sae.train`): each rank has its rows of every batch."""
    mesh = team.mesh
    for run in [run for run in runs if not run.active]:
        _finish(run, store, team, failures)
    active = [run for run in runs if run.active]
    if not active:
        return
    batch_tokens = active[0].cfg.batch_tokens
    first, last = min(run.step for run in active), max(run.n_steps for run in active)
    epochs = math.ceil(last / (store.n_kept // batch_tokens))
    names = f"training {len(runs)} SAE{'s' if len(runs) > 1 else ''} on {mesh.shape}"
    with ExitStack() as stack:
        bar = stack.enter_context(console.progress(names, (last - first) * batch_tokens, "tok")) if team.first else None
        part, source = mesh.part(batch_tokens), store
        if isinstance(store, ActivationStore):
            source = Share(store.folder, store.manifest, store.tokens, part)
        stream = source.batches(batch_tokens, seed=train.DATA_SEED, epochs=epochs, first=first)
        for index, (x_ND, flat) in enumerate(stream, first):
            x_ND = (x_ND if source is not store else x_ND[part]).to(mesh.device)
            team.watch.step = index
            for run in [run for run in runs if run.active and run.step == index]:
                distributed_run.step(run, x_ND, mesh, capacity)
                if run.failure:
                    _check_finite(store, x_ND, flat[part], index + 1, mesh)
                    failures[run.folder.name] = run.failure
                    team.say("%s stopped: %s; the other SAEs go on", run.folder.name, run.failure)
                elif not run.active:
                    _finish(run, store, team, failures)
            if bar is not None:
                bar.advance(batch_tokens, note=train._note(runs))
            team.watch.step = index + 1
            _save_steps(runs, store.key, index + 1, team, keeper, signals, failures)
            if not any(run.active for run in runs):
                return
    short = [run.folder.name for run in runs if run.active]
    raise DataError(f"the store ended before {', '.join(short)} had all steps; this is a fault of its batches()")


def _finish(run: Run, store: Store, team: Team, failures: dict[str, str]) -> None:
    distributed_state.finish(run, store, team.mesh, team.watch)
    if run.failure:
        failures[run.folder.name] = run.failure
        team.say("%s is not saved: %s; the other SAEs go on", run.folder.name, run.failure)


def _check_finite(store: Store, x_ND: Tensor, flat: Any, step: int, mesh: Mesh) -> None:
    """Name the tokens that are not finite, of whatever rank, on all ranks."""
    broken = (~torch.isfinite(x_ND).all(1)).nonzero().flatten().tolist()
    mine = [int(flat[i]) for i in broken] if mesh.latent_rank == 0 else []
    found = [token for tokens in mesh.gather_objects(mine) for token in tokens]
    if found:
        tokens = ", ".join(map(str, found[:5])) + (", ..." if len(found) > 5 else "")
        raise DataError(
            f"activations {store.key}: {len(found)} of {len(x_ND) * mesh.shape.data:,} tokens in the batch of step "
            f"{step} are NaN or infinite (flat index {tokens}); collect them again, with the model in float32. Saved "
            "steps are kept"
        )


def _save_steps(
    runs: list[Run], store_key: str, step: int, team: Team, keeper: resume.Keeper, signals: resume.Signals,
    failures: dict[str, str],
) -> None:  # fmt: skip
    """Save where rank 0's clock or a signal to any rank asks for it; all ranks stop at the same step."""
    asked = [int(signals.stop), int(team.first and keeper.due(step, signals)), int(signals.save)]
    flags = torch.tensor(asked, dtype=torch.int64, device=team.mesh.device)
    stop, *due = team.mesh.reduce_(flags, "world", "max").tolist()
    active = [run for run in runs if run.active and run.step == step]
    if not active or not (stop or any(due)):
        return
    for run in active:
        try:
            distributed_state.save(run, store_key, team.mesh, team.watch)
        except DataError as error:  # on all ranks
            run.failure = failures[run.folder.name] = str(error)
            team.say("%s; the other SAEs go on", error)
    keeper.done(signals)
    if stop:
        raise resume.TrainingInterrupted(f"{len(active)} SAE(s) saved after step {step}; the same command goes on")
