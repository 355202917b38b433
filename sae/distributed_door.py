"""``torchrun --nproc-per-node 4 -m sae train --mesh data=2,latent=2``: the same options as one process has.

Rank 0 loads the model, collects the activations, prints and writes; the others open what it collected, on a file system
that all see. Every rank ends with the same exit status; what went wrong is said once, by rank 0, and by every rank that
had to end because another was lost.
"""

import logging
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sae import console, exits
from sae.config import SubjectMeta, TrainConfig, from_dict, to_dict
from sae.distributed_cost import (
    MeshShape,
    check_divides,
    communication_bytes,
    state_bytes_per_rank,
    step_bytes_per_rank,
)
from sae.errors import ConfigError, SaescopeError

if TYPE_CHECKING:
    from sae.distributed import Team
    from sae.train_door import TrainDoor

logger = logging.getLogger(__name__)


def wanted(cfg: "TrainDoor") -> bool:
    """Whether this process is one rank of a mesh. ``ConfigError`` under torchrun without ``--mesh``: its processes
    would all train the same SAEs into the same folders."""
    world = int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1
    if world > 1 and cfg.mesh is None:
        raise ConfigError(
            f"torchrun started {world} processes: say how they divide the work, --mesh data={world} (the tokens of a "
            f"batch), --mesh latent={world} (the latents of each SAE) or both, data=R,latent=S with R x S = {world}"
        )
    return cfg.mesh is not None


Show = Callable[[Sequence[Path]], None]
"""Prints the figures of finished SAEs."""


def main(cfg: "TrainDoor", cfgs: Sequence[TrainConfig], show: Show) -> int:
    """Exit status, the same on all ranks."""
    rank = int(os.environ.get("RANK", "0"))
    console.setup(cfg.verbose, rank=rank)
    try:
        assert cfg.mesh is not None
        shape = MeshShape.parse(cfg.mesh)
        for one in cfgs:
            check_divides(one, shape)
        _check_source(cfg)
        from sae.distributed import join
        from sae.distributed_watch import RankLost

        limits = cfg.distributed
        try:
            with join(
                shape, cfg.device, silent_s=limits.silent_s, timeout_s=limits.timeout_s, join_s=limits.join_s
            ) as team:
                return _train(cfg, cfgs, team, show)
        except RankLost:  # it has been said
            sys.stdout.flush()
            os._exit(RankLost.exit_status)  # a process group that lost a member may wait for it at its own end
    except (SaescopeError, KeyboardInterrupt) as error:
        if rank == 0:
            raise
        return exits.INTERRUPTED if isinstance(error, KeyboardInterrupt) else error.exit_status


def _check_source(cfg: "TrainDoor") -> None:
    if cfg.hookpoint_out is not None:
        raise ConfigError("--hookpoint-out is for transcoders, which have no sharded training: leave --mesh out")
    if cfg.stream.source == "live":
        raise ConfigError("a mesh trains on stored activations: leave out --stream.source live, or --mesh")


def _train(cfg: "TrainDoor", cfgs: Sequence[TrainConfig], team: "Team", show: Show) -> int:
    """Hookpoint after hookpoint, batch size after batch size."""
    from sae.distributed import train_sharded
    from sae.mirror import to_wandb
    from sae.resume import Keeper
    from sae.subjects import open_store
    from sae.train_plan import by_batch

    said = team.watch.from_first(lambda: _collected(cfg, cfgs, team.mesh.shape))
    mirror = None if cfg.wandb is None else to_wandb(cfg.wandb)
    folders: list[Path] = []
    begun = time.monotonic()
    for one in said:  # none after --plan
        store, meta = open_store(Path(one["activations"])), from_dict(SubjectMeta, one["meta"])
        for group in by_batch(cfgs):
            folders += train_sharded(
                cfg.root, store, group, meta, team, capacity=cfg.distributed.capacity, force=cfg.force,
                keeper=Keeper(every_s=cfg.save_every_s), mirror=mirror,
            )  # fmt: skip
    if team.first and folders:
        show(folders)
        console.say(f"training took {(time.monotonic() - begun) / 60:.2f} minutes on {team.mesh.shape}")
    return 0


def _collected(cfg: "TrainDoor", cfgs: Sequence[TrainConfig], shape: MeshShape) -> list[dict[str, Any]]:
    """By rank 0: where the activations of each hookpoint are, and what they are of; none after ``--plan``."""
    import torch

    from sae import predict as small
    from sae.activations import ActivationStore
    from sae.subjects import collect_all, expected_kept, meta_of, subject
    from sae.tokens import drop_ids

    found = subject(cfg)
    small.check_enough(len(expected_kept(found, cfg.filter)), cfgs)
    n = found.tokens.n_tokens
    disk = sum(n * width * 2 + n for store, width in zip(found.stores, found.widths, strict=True) if store is None)
    small.check_cap(disk, cfg.stream.disk_gb, n)
    small.check_fits([([], found.widths)], cfg.root, disk, torch.device(cfg.device))
    console.say(f"activations: {disk / 1e9:.3f} GB to collect, by rank 0; {n:,} tokens")
    for hookpoint, width in zip(found.hookpoints, found.widths, strict=True):
        _print_plan(cfg, cfgs, hookpoint, width, shape)
    if cfg.plan:
        return []
    stores = [store for store in collect_all(cfg, found) if isinstance(store, ActivationStore)]
    ids = () if found.lm is None or not cfg.filter.drop_special else drop_ids(found.lm.tokenizer)
    return [{"activations": str(store.folder), "meta": to_dict(meta_of(store, ids))} for store in stores]


def _print_plan(
    cfg: "TrainDoor", cfgs: Sequence[TrainConfig], hookpoint: str, d_in: int, shape: MeshShape
) -> None:
    """Memory and communication of each SAE per rank, counted; :class:`sae.predict.TooLarge` where it does not fit."""
    from sae import predict as small
    from sae.train import START_SAMPLE_TOKENS

    rows, state_bytes = [], 0
    varied = [f.name for f in fields(TrainConfig) if len({getattr(one, f.name) for one in cfgs}) > 1]
    for one in cfgs:
        state = state_bytes_per_rank(one, d_in, shape)
        step = step_bytes_per_rank(one, d_in, shape, capacity=cfg.distributed.capacity)
        sent = communication_bytes(one, d_in, shape, capacity=cfg.distributed.capacity, n_dead=one.d_sae)
        state_bytes += state
        label = " ".join(f"{name}={getattr(one, name)}" for name in varied) or one.architecture
        rows.append((label, *(f"{n / 1e6:,.1f}" for n in (state, step, sent))))
    columns = ("SAE", "weights, gradients, Adam: MB", "one step: MB", "sent in a step (AuxK on): MB")
    console.table(f"{hookpoint}: expected on {shape}, per rank", columns, rows, right=(1, 2, 3))
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if cfg.device == "cpu" else 1
    needed = here * (state_bytes + 8 * START_SAMPLE_TOKENS * d_in)
    free = small.free_memory_bytes()
    if cfg.device == "cpu" and needed > small.MOST_OF_FREE * free:
        raise small.TooLarge(
            f"{here} rank(s) on this machine need {needed / 1e9:.2f} GB for weights, gradients, Adam and the start "
            f"sample, {free / 1e9:.2f} GB are free: lower train.d-sae, train fewer SAEs, or take more latent ranks on "
            "other machines"
        )
