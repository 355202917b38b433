"""Training on a mesh in processes of their own. Imported by name, so that a fork server can run it."""

import multiprocessing
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from planted_store import META, PlantedStore, planted_store

from sae.config import TrainConfig

WORLD_LIMIT_S = 400.0


def store() -> PlantedStore:
    """2,048 planted tokens of width 16."""
    return planted_store(n=2_048)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def rank_main(
    rank: int, world: int, port: int, path: list[str], out: str, work: Callable[..., Any], arguments: Any
) -> None:
    """One rank; what it prints goes to a file."""
    sys.path[:] = path
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    import torch

    torch.set_num_threads(1)
    with open(f"{out}/rank-{rank}.txt", "w", buffering=1, encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        try:
            found = work(rank, *arguments)
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)
        torch.save(found, f"{out}/rank-{rank}.pt")


def begin(out: Path, world: int, work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Start all ranks; their output is in ``out``."""
    out.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["sae.distributed", "mesh_work"])
    port = free_port()
    ranks = []
    for rank in range(world):
        ranks.append(context.Process(target=rank_main, args=(rank, world, port, sys.path, str(out), work, arguments)))
        ranks[-1].start()
    return ranks


def run(out: Path, world: int, work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What ``work(rank, *arguments)`` returned on each rank; ``AssertionError`` with the output of a failed one."""
    import torch

    for rank in (ranks := begin(out, world, work, *arguments)):
        rank.join(WORLD_LIMIT_S)
    codes = [rank.exitcode for rank in ranks]
    for rank in ranks:
        rank.kill()
    text = "\n".join((out / f"rank-{r}.txt").read_text() for r in range(world))
    assert codes == [0] * world, f"exit codes {codes}\n{text}"
    return [torch.load(out / f"rank-{r}.pt", weights_only=False) for r in range(world)]


# -- work -------------------------------------------------------------------------------------------------------------
class Eventful(PlantedStore):
    """Something happens to one rank before some batch is handed out."""

    event: tuple[int, str]
    """Batch, and what: ``stop`` (SIGTERM to itself), ``wait`` (until it is killed), ``fail``, ``nan``."""

    def batches(self, batch_tokens: int, *, seed: int, epochs: int, first: int = 0) -> Iterator[tuple[Any, Any]]:
        stream = super().batches(batch_tokens, seed=seed, epochs=epochs, first=first)
        for index, (x_ND, flat) in enumerate(stream, first):
            if index == self.event[0]:
                if self.event[1] == "stop":
                    os.kill(os.getpid(), signal.SIGTERM)
                if self.event[1] == "wait":
                    print("waiting", flush=True)
                    time.sleep(600)
                if self.event[1] == "fail":
                    raise ZeroDivisionError("as planned")
                if self.event[1] == "nan":
                    x_ND = x_ND.clone()
                    x_ND[-1, 3] = float("nan")
            yield x_ND, flat


def eventful(event: tuple[int, str] | None) -> PlantedStore:
    if event is None:
        return store()
    found = Eventful(store().x_ND, store().key)
    found.event = event
    return found


def train(
    rank: int, root: str, cfgs: list[TrainConfig], mesh: str, events: dict[int, tuple[int, str]],
    limits: dict[str, float], options: dict[str, Any],
) -> dict[str, Any]:  # fmt: skip
    """Train by :func:`sae.distributed.train_sharded`, exactly; ``events``: what befalls each rank. What tests look at
    comes back, the name and text of an error that all ranks met included."""
    import torch

    torch.set_default_dtype(torch.float64)
    return train_float32(rank, root, cfgs, mesh, events, limits, options)


def train_float32(
    rank: int, root: str, cfgs: list[TrainConfig], mesh: str, events: dict[int, tuple[int, str]],
    limits: dict[str, float], options: dict[str, Any],
) -> dict[str, Any]:  # fmt: skip
    """As :func:`train`, in the type that users train in."""
    from sae import distributed, resume
    from sae.errors import SaescopeError

    keeper = resume.Keeper(every_s=None, every_steps=options.pop("save_every", None))
    with distributed.join(distributed.MeshShape.parse(mesh), **limits) as team:
        source = eventful(events.get(rank))
        try:
            folders = distributed.train_sharded(
                Path(root), source, cfgs, META, team, capacity=None, keeper=keeper, **options
            )
        except (SaescopeError, KeyboardInterrupt) as error:
            if team.watch.lost:
                raise
            return {"error": type(error).__name__, "text": str(error)}
        return {"folders": [str(f) for f in folders]}


def full_disk(rank: int, root: str, cfgs: list[TrainConfig], mesh: str) -> dict[str, Any]:
    """As :func:`train`, saving every third step, on a disk that is full when step 6 is written."""
    from sae import distributed_state

    real = distributed_state._write_tensors

    def write(path: Path, *arguments: Any) -> None:
        real(Path("/dev/full") if path.parent.name.startswith("step-6.") else path, *arguments)

    distributed_state._write_tensors = write
    return train(rank, root, cfgs, mesh, {}, {}, {"save_every": 3})


def select(rank: int, mesh: str) -> dict[str, Any]:
    """The largest of each row and of all, of values with many ties, negatives and a NaN: this rank's part of them."""
    import torch

    from sae import distributed, ops
    from sae.sharded_select import count_all, pick_batch, pick_largest

    generator = torch.Generator().manual_seed(3)
    h_NF = torch.randint(-6, 4, (64, 24), generator=generator).double()
    found: dict[str, Any] = {"h_NF": h_NF}
    with distributed.join(distributed.MeshShape.parse(mesh)) as team:
        one, shards = team.mesh, team.mesh.shape.latent
        part, latents = one.part(len(h_NF)), torch.arange(one.latent_rank, 24, shards)
        for k in (1, 3, 7, 20):
            own = ops.topk(h_NF[part][:, latents].contiguous(), min(k, len(latents)))
            (picked,) = pick_largest(own.values_NK, latents[own.indices_NK], (k,), len(latents), one)
            kept = torch.zeros(64, 24, dtype=torch.bool)
            rows = torch.arange(part.start, part.stop)[:, None].expand_as(own.indices_NK)[picked.keep_Nk]
            kept[rows, latents[own.indices_NK][picked.keep_Nk]] = True
            found[f"token {k}"], found[f"overflow {k}"] = kept, int(picked.overflow)
        for name, count in (("few", 20), ("some", 150), ("all", 10_000)):
            mine = torch.zeros(64, 24, dtype=torch.bool)
            mine[part, one.latent_rank :: shards] = True
            places = (mine & (h_NF > 0)).view(-1).nonzero().squeeze(1)
            for kind in (torch.float64, torch.float32):
                values = h_NF.view(-1)[places].to(kind)
                cut = pick_batch(values, places, count, count_all(len(values), one), one)
                found[f"batch {name} {kind}"], found[f"theta {name} {kind}"] = places[cut.keep_E], cut.theta
        broken = torch.tensor([1.0, float("nan"), 2.0, 3.0]) + one.rank
        cut = pick_batch(broken, torch.arange(4) + 4 * one.rank, 3, 4 * one.shape.world, one)
        found["nan"] = int(cut.keep_E[1])
    return found


def overflow(rank: int, mesh: str) -> dict[str, Any]:
    """All large values lie on latent rank 0, which may send 8 of its 32."""
    import torch

    from sae import distributed
    from sae.distributed_cost import candidates
    from sae.sharded_select import pick_largest

    with distributed.join(distributed.MeshShape.parse(mesh)) as team:
        one, found = team.mesh, {}
        values_NF = torch.rand(5, 32, generator=torch.Generator().manual_seed(1)) + 10 * (one.latent_rank == 0)
        for capacity in (1.0, None):
            top = torch.topk(values_NF, candidates(16, one.shape.latent, 32, capacity), dim=1)
            numbers = top.indices * one.shape.latent + one.latent_rank
            (picked,) = pick_largest(top.values, numbers, (16,), 32, one)
            found[str(capacity)] = int(picked.overflow), int(picked.keep_Nk.sum())
    return found


def measure(rank: int, cfg: TrainConfig, mesh: str, capacity: float | None) -> list[dict[str, Any]]:
    """Operands of each step's collectives, and how many latents were dead before it."""

    from sae import distributed, distributed_run
    source = store()
    rows = []
    with distributed.join(distributed.MeshShape.parse(mesh)) as team:
        run = distributed_run.start(
            cfg, META, "0" * 16, Path("x"), source, source.x_ND.float(), distributed_run.Silent(), team.mesh
        )
        distributed_run.count_dead(run, team.mesh)
        for x_ND, _ in source.batches(cfg.batch_tokens, seed=0, epochs=4):
            before, n_dead = dict(team.mesh.operands), run.state.n_dead_late
            distributed_run.step(run, x_ND[team.mesh.part(cfg.batch_tokens)].float(), team.mesh, capacity)
            moved = {k: v - before.get(k, 0) for k, v in team.mesh.operands.items()}
            rows.append({"n_dead": n_dead, "logged": run.state.logged, "moved": moved})
            if not run.active:
                break
    rows[-1]["b_dec"], rows[-1]["W_dec"] = run.sae.b_dec_D.detach().clone(), run.sae.W_dec_FD.detach().clone()
    return rows
