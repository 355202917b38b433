"""Saved steps and finished SAEs of a mesh: the files of one process, whatever the mesh that writes or reads them.

A step holds tensors in global order of latents, as :mod:`sae.resume` writes it, so that any mesh, one process included,
goes on from any other's. Rank 0 alone writes; rows come to it block by block, so that it never holds the whole. Each
rank reads its own rows from the file, through a memory map.
"""

import json
import math
import struct
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sae import manifest, resume, train_run
from sae.base import SAE
from sae.distributed_mesh import Mesh
from sae.distributed_watch import Watch
from sae.errors import ArtefactError, DataError
from sae.optim import Average
from sae.plugins import find
from sae.sharded import per_latent
from sae.train_run import Run, Store

BLOCK_BYTES = 64 * 2**20
"""Largest part of a tensor that a rank sends at once."""
_NUMPY = {"F64": np.float64, "F32": np.float32, "I64": np.int64, "I32": np.int32, "U8": np.uint8, "BOOL": np.bool_}


def _per_latent(name: str) -> bool:
    """As :func:`sae.sharded.per_latent`, for the names of a step: ``adam.W_enc_FD.exp_avg``, ``state.last_..._F``."""
    return any(per_latent(part) for part in name.split(".")) and not name.endswith(".step")


# -- collecting -------------------------------------------------------------------------------------------------------
def blocks(name: str, tensor: Tensor, mesh: Mesh) -> Iterator[Tensor | None]:
    """The tensor in global order, on the CPU of rank 0, in blocks of rows; other ranks of data rank 0 get None.

    All latent ranks of data rank 0 run through it together.
    """
    tensor = tensor.detach()
    if not _per_latent(name) or mesh.shape.latent == 1:
        yield tensor.cpu() if mesh.rank == 0 else None
        return
    row_bytes = max(1, math.prod(tensor.shape[1:]) * tensor.element_size())
    rows = max(1, BLOCK_BYTES // row_bytes)
    for start in range(0, len(tensor), rows):
        parts = mesh.gather_to_first(tensor[start : start + rows].contiguous())
        yield None if parts is None else torch.stack([p.cpu() for p in parts], 1).flatten(0, 1)


def _whole_shape(name: str, tensor: Tensor, mesh: Mesh) -> list[int]:
    shape = list(tensor.shape)
    if _per_latent(name):
        shape[0] *= mesh.shape.latent
    return shape


def whole(name: str, tensor: Tensor, mesh: Mesh) -> Tensor | None:
    """All of a tensor in global order on rank 0, None elsewhere; called by data rank 0."""
    out = torch.empty(_whole_shape(name, tensor, mesh), dtype=tensor.dtype) if mesh.rank == 0 else None
    at = 0
    for block in blocks(name, tensor, mesh):
        if out is not None and block is not None:
            if out.dim() == 0:
                out.copy_(block)
            else:
                out[at : at + len(block)] = block
                at += len(block)
    return out


# -- writing ----------------------------------------------------------------------------------------------------------
def save(run: Run, store_key: str, mesh: Mesh, watch: Watch) -> Path:
    """Write the state after ``run.step`` steps, as :func:`sae.resume.save` does; all ranks call it.

    Errors of rank 0 (``ArtefactError`` for a full disk) reach all ranks. ``DataError`` on all ranks for weights that
    are not finite; steps saved before are untouched.
    """
    broken = [name for name, t in run.sae.state_dict().items() if not bool(torch.isfinite(t).all())]
    if named := sorted({name for names in mesh.gather_objects(broken) for name in names}):
        raise DataError(f"{run.folder.name}: {named[0]} is not finite after step {run.step}, that step is not saved")
    folder = Path(watch.from_first(lambda: str(run.log.path.parent / f"step-{run.step}")))
    if watch.from_first(lambda: manifest.is_complete(folder)):
        return folder
    tensors = resume._tensors(run)
    if mesh.data_rank == 0 and mesh.rank:
        for name, tensor in tensors.items():
            for _ in blocks(name, tensor, mesh):
                pass
    watch.from_first(lambda: _write_step(run, folder, store_key, tensors, mesh))
    return folder


def _write_step(run: Run, folder: Path, store_key: str, tensors: dict[str, Tensor], mesh: Mesh) -> None:
    drained = False
    try:
        with manifest.writing(
            folder, kind="train-step", key=run.key, stage_version=resume.STEP_VERSION, config={"step": run.step},
            inputs={"activations": store_key},
        ) as out:  # fmt: skip
            drained = True
            _write_tensors(out.path / resume.TENSORS, tensors, mesh)
            (out.path / resume.STATE).write_text(json.dumps(resume._plain(run)), encoding="utf-8")
            (out.path / resume.LOG).write_text(run.log.text(), encoding="utf-8")
    finally:
        if not drained:  # the folder could not even be made; the others still send
            _drain(tensors, mesh)
    for _, old in resume._steps(folder.parent)[resume.KEEP_STEPS :]:
        resume._remove(old)


def _drain(tensors: dict[str, Tensor], mesh: Mesh) -> None:
    for name, tensor in tensors.items():
        for _ in blocks(name, tensor, mesh):
            pass


def _write_tensors(path: Path, tensors: dict[str, Tensor], mesh: Mesh) -> None:
    """The file that :func:`sae.resume._write_tensors` would write of the whole. What cannot be written is still
    received to the end, since the other ranks send it; then the error is raised."""
    header: dict[str, Any] = {}
    at = 0
    for name, tensor in tensors.items():
        shape = _whole_shape(name, tensor, mesh)
        size = math.prod(shape) * tensor.element_size()
        header[name] = {"dtype": resume._TYPES[tensor.dtype], "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text = text.ljust(-(-len(text) // 8) * 8)
    failed: OSError | None = None
    file = None
    try:
        file = open(path, "wb")
        file.write(struct.pack("<Q", len(text)) + text)
    except OSError as error:
        failed = error
    for name, tensor in tensors.items():
        for block in blocks(name, tensor, mesh):
            if failed is None and block is not None and block.numel():
                try:
                    assert file is not None
                    file.write(block.contiguous().reshape(-1).view(torch.uint8).numpy().data)
                except OSError as error:
                    failed = error
    try:
        if file is not None:
            file.close()
    except OSError as error:
        failed = failed or error
    if failed is not None:
        raise failed


# -- reading ----------------------------------------------------------------------------------------------------------
def read_step(folder: Path, mesh: Mesh) -> dict[str, Tensor]:
    """This rank's part of the tensors of a step; ``ArtefactError`` for a damaged file."""
    path = folder / resume.TENSORS
    try:
        with open(path, "rb") as file:
            (size,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(size))
        header.pop("__metadata__", None)
        data = np.memmap(path, dtype=np.uint8, mode="r", offset=8 + size)
        found = {}
        for name, entry in header.items():
            first, last = entry["data_offsets"]
            rows = np.frombuffer(data[first:last], _NUMPY[entry["dtype"]]).reshape(entry["shape"])
            if _per_latent(name):
                rows = rows[mesh.latent_rank :: mesh.shape.latent]
            found[name] = torch.from_numpy(np.array(rows))
    except (OSError, ValueError, KeyError, struct.error) as error:
        raise ArtefactError(f"{folder} is damaged ({error}); delete it to go on from the step before") from error
    return found


def restore(run: Run, folder: Path, mesh: Mesh) -> None:
    """Put this rank's share of a run that was just started into the state of a step, made on whatever mesh."""
    tensors = read_step(folder, mesh)
    plain = json.loads((folder / resume.STATE).read_text(encoding="utf-8"))
    tensors.pop("late", None)
    resume.put(run, tensors, plain)
    run.log.restore((folder / resume.LOG).read_text(encoding="utf-8"))


# -- the finished SAE -------------------------------------------------------------------------------------------------
def finish(run: Run, store: Store, mesh: Mesh, watch: Watch) -> None:
    """Write the artefact: rank 0 assembles the SAE and finishes it as one process would, ``run.failure`` on all ranks
    where it cannot be. Rank 0 needs room for the whole SAE, without gradients and moments."""
    average = {} if run.average is None else run.average.mean
    weights: dict[str, Tensor | None] = {}
    means: dict[str, Tensor | None] = {}
    if mesh.data_rank == 0:
        weights = {name: whole(name, t, mesh) for name, t in run.sae.state_dict().items()}
        means = {name: whole(name, t, mesh) for name, t in average.items()}

    def work() -> str:
        one = _assembled(run, weights, means)
        train_run.finish(one, store)
        return one.failure

    run.failure = watch.from_first(work)


def _assembled(run: Run, weights: dict[str, Any], means: dict[str, Any]) -> Run:
    """The run as one process would hold it at its end, on the CPU."""
    sae: SAE = find("sae.architectures", run.cfg.architecture)(run.sae.cfg)
    sae.to(weights["W_enc_FD"].dtype)
    sae.load_state_dict(weights)
    average = None
    if run.average is not None:
        average = Average(dict(sae.named_parameters()), run.average.decay)
        average.n_steps, average.mean = run.average.n_steps, means
    plain = {f.name: getattr(run, f.name) for f in fields(Run)}
    state = {f.name: getattr(run.state, f.name) for f in fields(run.state)}
    state["last_fired_tokens_F"] = torch.zeros(run.cfg.d_sae, dtype=torch.int64)
    return Run(**plain | {"sae": sae, "average": average, "state": type(run.state)(**state)})
