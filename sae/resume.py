"""Steps on disk from which training goes on bit for bit, and the signals that ask for them (TRAINING 11).

A run keeps ``<sae_id>.run/step-<n>/`` with every tensor and counter that the next step depends on; the manifest comes
last, so that a process killed at any moment leaves the steps before. No pickle.
"""

import fcntl
import json
import logging
import os
import random
import shutil
import signal
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from sae import manifest
from sae.errors import ArtefactError, DataError, StaleArtefact
from sae.row_adam import RowAdam

if TYPE_CHECKING:
    from sae.train_run import Run

STEP_VERSION = 1
TENSORS, STATE, LOG = "tensors.safetensors", "state.json", "train.jsonl"
ROWS, PARTS = (("enc", "W_enc_FD"), ("dec", "W_dec_FD")), ("exp_avg", "exp_avg_sq")
"""How :class:`sae.row_adam.RowAdam` names the matrices whose moments it keeps, and their parameters."""
KEEP_STEPS = 2
"""Steps kept on disk; a third is there while it is being written."""
EVERY_S = 300.0
_TYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64",
    torch.int32: "I32", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
logger = logging.getLogger(__name__)


class TrainingInterrupted(KeyboardInterrupt):
    """A signal ended training after its state was written; the same call goes on from there."""


class Signals:
    """SIGTERM and SIGINT ask for an end at the next step boundary, SIGUSR1 for a saved step; a second SIGINT leaves at
    once. Outside the main thread no handler can be set, and the signals keep their meaning."""

    def __init__(self) -> None:
        self.stop = False
        self.save = False
        self._before: dict[int, Any] = {}

    def _on(self, number: int, _: FrameType | None) -> None:
        if number == signal.SIGUSR1:
            self.save = True
            return
        if number == signal.SIGINT and self.stop:
            raise KeyboardInterrupt
        self.stop = True
        logger.warning("%s: saving at the end of this step; a second Ctrl-C leaves at once", signal.strsignal(number))

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
                self._before[number] = signal.signal(number, self._on)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


class Keeper:
    """When steps are saved: every ``every_s`` seconds, every ``every_steps`` steps, and when a signal asks."""

    def __init__(self, every_s: float | None = EVERY_S, every_steps: int | None = None) -> None:
        self.every_s, self.every_steps = every_s, every_steps
        self._last = time.monotonic()

    def due(self, step: int, signals: Signals) -> bool:
        """Whether the state after ``step`` steps is to be saved. When does not matter to what is trained."""
        by_step = bool(self.every_steps) and step % (self.every_steps or 1) == 0
        by_time = self.every_s is not None and time.monotonic() - self._last >= self.every_s
        return signals.stop or signals.save or by_step or by_time

    def done(self, signals: Signals) -> None:
        """Steps have been saved."""
        signals.save = False
        self._last = time.monotonic()


@contextmanager
def locked(folder: Path, work: str = "trains this SAE") -> Iterator[None]:
    """Hold a run folder for this process: two that train one SAE would write over each other's log and steps.

    ``work``: what another one would be doing. :class:`sae.errors.ArtefactError` where another one holds it. A killed
    process lets go; a file system without locks is taken as free.
    """
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise ArtefactError(f"{folder} is in use: another process {work}; wait for it or stop it") from None
    except OSError as error:
        logger.debug("%s cannot be locked: %s", folder, error)
    try:
        yield
    finally:
        os.close(descriptor)


# -- what a step consists of ------------------------------------------------------------------------------------------
def _moments(run: "Run") -> dict[str, Tensor]:
    """State of the optimiser by parameter name, as references to its own tensors."""
    found: dict[str, Tensor] = {}
    adam = run.optimiser
    if isinstance(adam, RowAdam):
        for name, pair in adam.moments.items():
            found |= {f"adam.{name}.exp_avg": pair[0], f"adam.{name}.exp_avg_sq": pair[1]}
        adam = adam.biases
    for name, parameter in run.sae.named_parameters():
        found |= {f"adam.{name}.{part}": value for part, value in adam.state.get(parameter, {}).items()}
    return found


def _tensors(run: "Run") -> dict[str, Tensor]:
    found = {f"sae.{name}": tensor for name, tensor in run.sae.state_dict().items()} | _moments(run)
    for field in fields(run.state):
        value = getattr(run.state, field.name)
        if isinstance(value, Tensor):
            found[f"state.{field.name}"] = value
    if run.average is not None:
        found |= {f"average.{name}": mean for name, mean in run.average.mean.items()}
    if run.late is not None and (pending := run.late.pending()):
        found["late"] = torch.tensor([[step, *figures] for step, figures in pending], dtype=torch.float64)
    found["random.torch"] = torch.get_rng_state()
    if torch.cuda.is_initialized():
        found |= {f"random.cuda.{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
    return found


def _plain(run: "Run") -> dict[str, Any]:
    counters = {f.name: getattr(run.state, f.name) for f in fields(run.state) if f.name != "cfg"}
    kind, keys, *rest = np.random.get_state()
    return {
        "step": run.step,
        "seconds": run.seconds,
        "last": run.last,
        "note": run.note,
        "counters": {k: v for k, v in counters.items() if not isinstance(v, Tensor)},
        "average_steps": 0 if run.average is None else run.average.n_steps,
        "row_adam_steps": run.optimiser.n_steps if isinstance(run.optimiser, RowAdam) else 0,
        "random": {"python": random.getstate(), "numpy": [kind, np.asarray(keys).tolist(), *rest]},
        "machine": _machine(run),
    }


def _machine(run: "Run") -> dict[str, Any]:
    """What bit-equality depends on beside the configuration."""
    device = run.state.last_fired_tokens_F.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {"torch": str(torch.__version__), "device": name, "threads": torch.get_num_threads()}


def _write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """A safetensors file written tensor by tensor: the state is the largest thing in memory and is not copied."""
    header: dict[str, Any] = {}
    at = 0
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _TYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text = text.ljust(-(-len(text) // 8) * 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors.values():
            if tensor.numel():
                flat = tensor.detach().cpu().contiguous().reshape(-1)
                file.write(flat.view(torch.uint8).numpy().data)


# -- writing ------------------------------------------------------------------------------------------------------
def _steps(folder: Path) -> list[tuple[int, Path]]:
    """Complete steps below a run folder, newest first."""
    found = [(path.name.removeprefix("step-"), path) for path in folder.glob("step-*") if manifest.is_complete(path)]
    return sorted(((int(number), path) for number, path in found if number.isdigit()), reverse=True)


def _remove(path: Path) -> None:
    """The manifest first: a step half removed must not look complete."""
    (path / manifest.MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(path, ignore_errors=True)


def save(run: "Run", store_key: str) -> Path:
    """Write the state after ``run.step`` steps below the run's log, keep the newest two; returns the step's folder.

    ``ArtefactError`` when the disk is full, ``DataError`` for weights that are not finite; in both cases the steps
    saved before are untouched.
    """
    folder = run.log.path.parent / f"step-{run.step}"
    if manifest.is_complete(folder):
        return folder
    tensors = _tensors(run)
    for name, tensor in tensors.items():
        if name.startswith("sae.") and not bool(torch.isfinite(tensor).all()):
            raise DataError(f"{run.folder.name}: {name} is not finite after step {run.step}, that step is not saved")
    inputs = {"activations": store_key}
    with manifest.writing(
        folder, kind="train-step", key=run.key, stage_version=STEP_VERSION, config={"step": run.step}, inputs=inputs
    ) as out:
        _write_tensors(out.path / TENSORS, tensors)
        (out.path / STATE).write_text(json.dumps(_plain(run)), encoding="utf-8")
        (out.path / LOG).write_text(run.log.text(), encoding="utf-8")
    for _, old in _steps(folder.parent)[KEEP_STEPS:]:
        _remove(old)
    return folder


# -- reading ------------------------------------------------------------------------------------------------------
def newest(run_folder: Path, key: str, store_key: str) -> Path | None:
    """The newest undamaged step of a run, None where there is none. What a killed process left half written goes.

    ``StaleArtefact`` if a step was made under another configuration or from other activations: nothing is overwritten.
    """
    steps = _steps(run_folder)
    for _, path in steps:
        try:
            content = manifest.read_manifest(path)
            found = content.get("key"), content.get("stage_version"), content.get("inputs", {}).get("activations")
            if found != (key, STEP_VERSION, store_key):
                raise StaleArtefact(
                    f"{path} belongs to another training (key, version, activations {found}; expected "
                    f"{(key, STEP_VERSION, store_key)}): give the configuration that it was begun with, or delete "
                    f"{run_folder} (--force does)"
                )
            for name, entry in content["files"].items():
                if manifest.sha256_file(path / name) != entry["sha256"]:
                    raise ArtefactError(f"{path / name} is damaged: its sha256 is not that of the manifest")
        except StaleArtefact:
            raise
        except (ArtefactError, OSError) as error:
            logger.warning("%s; trying the step before", error)
            continue
        for leftover in run_folder.glob("*.tmp-*"):
            pid = leftover.name.rpartition("-")[2]
            if not (pid.isdigit() and Path(f"/proc/{pid}").exists() and int(pid) != os.getpid()):
                shutil.rmtree(leftover, ignore_errors=True)
        return path
    return None


def forget(run_folder: Path) -> None:
    """Remove all steps of a run; its log stays."""
    for path in run_folder.glob("step-*"):
        _remove(path)


@torch.no_grad()
def restore(run: "Run", folder: Path) -> None:
    """Put a run that was just started into the state of a step (from :func:`newest`): the next step is what it would
    have been. Another torch, device or number of threads is only warned of: results then differ by rounding."""
    try:
        tensors = load_file(folder / TENSORS)
        plain = json.loads((folder / STATE).read_text(encoding="utf-8"))
    except (SafetensorError, OSError, json.JSONDecodeError) as error:
        raise ArtefactError(f"{folder} is damaged ({error}); delete it to go on from the step before") from error
    if plain["machine"] != _machine(run):
        logger.warning(
            "%s was saved under %s, this is %s: training goes on, but not bit for bit",
            folder, plain["machine"], _machine(run),
        )  # fmt: skip
    put(run, tensors, plain)
    run.log.restore((folder / LOG).read_text(encoding="utf-8"))


@torch.no_grad()
def put(run: "Run", tensors: dict[str, Tensor], plain: dict[str, Any]) -> None:
    """Put a run into the state that a step's tensors and counters describe; its log stays as it is."""
    device = run.state.last_fired_tokens_F.device
    run.sae.load_state_dict({k[4:]: v for k, v in tensors.items() if k.startswith("sae.")})
    _restore_optimiser(run, tensors, plain, device)
    for name, value in plain["counters"].items():
        setattr(run.state, name, value)
    for name, tensor in tensors.items():
        if name.startswith("state."):
            setattr(run.state, name.removeprefix("state."), tensor.to(device))
    if run.average is not None:
        run.average.n_steps = plain["average_steps"]
        for name, mean in run.average.mean.items():
            mean.copy_(tensors[f"average.{name}"])
    if run.late is not None and "late" in tensors:
        run.late.refill([(int(row[0]), row[1:]) for row in tensors["late"].tolist()])
    run.step, run.seconds, run.last, run.note = (plain[name] for name in ("step", "seconds", "last", "note"))


def _restore_optimiser(run: "Run", tensors: dict[str, Tensor], plain: dict[str, Any], device: torch.device) -> None:
    adam = run.optimiser
    if isinstance(adam, RowAdam) and "adam.enc.exp_avg" not in tensors:  # saved on a CPU or by a mesh
        plain = plain | {"row_adam_steps": int(tensors["adam.W_enc_FD.step"])}
        moments = {f"adam.{row}.{part}": tensors[f"adam.{name}.{part}"] for row, name in ROWS for part in PARTS}
        tensors = tensors | moments
    elif not isinstance(adam, RowAdam) and "adam.enc.exp_avg" in tensors:  # saved on a GPU
        steps = {f"adam.{name}.step": torch.tensor(float(plain["row_adam_steps"])) for _, name in ROWS}
        moments = {f"adam.{name}.{part}": tensors[f"adam.{row}.{part}"] for row, name in ROWS for part in PARTS}
        tensors = tensors | steps | moments
    if isinstance(adam, RowAdam):
        adam.n_steps = plain["row_adam_steps"]
        for name, pair in adam.moments.items():
            pair[0].copy_(tensors[f"adam.{name}.exp_avg"])
            pair[1].copy_(tensors[f"adam.{name}.exp_avg_sq"])
        adam = adam.biases
    for group in adam.param_groups:
        names = {parameter: name for name, parameter in run.sae.named_parameters()}
        for parameter in group["params"]:
            prefix = f"adam.{names[parameter]}."
            state = {k.removeprefix(prefix): v.to(device) for k, v in tensors.items() if k.startswith(prefix)}
            if state:
                adam.state[parameter] = state


def restore_random(folder: Path) -> None:
    """The generators of torch, CUDA, numpy and Python as they were when a step was saved."""
    tensors = load_file(folder / TENSORS)
    plain = json.loads((folder / STATE).read_text(encoding="utf-8"))["random"]
    torch.set_rng_state(tensors["random.torch"])
    states = [tensors[name] for name in sorted(n for n in tensors if n.startswith("random.cuda."))]
    if states and torch.cuda.is_available() and len(states) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states)
    kind, keys, *rest = plain["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    version, internal, gauss = plain["python"]
    random.setstate((version, tuple(internal), gauss))
