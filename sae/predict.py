"""What a training will cost, before it begins: tokens, disk, memory and time (TRAINING 13).

Sizes are counted, times are measured on this machine: a few batches of the language model, and a whole miniature of the
training (start, some steps, the artefact) with the real shapes. D = d_in, F = d_sae, P parameters of one SAE.
"""

import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sae import resume, train, train_run
from sae.activations import BATCH_ROWS
from sae.calibrate import MAX_TOKENS
from sae.config import SAEConfig, SubjectMeta, TrainConfig
from sae.errors import ConfigError, DataError
from sae.language_model import LanguageModel
from sae.metric_log import MetricLog
from sae.plugins import find
from sae.train import START_SAMPLE_TOKENS, Job, sae_id_of, train_key
from sae.train_run import Store, input_norm

WARM_BATCHES = 5
WARM_STEPS = 4
FINISH_TOKENS = 8_192
SAMPLE_ROWS = 8_192
"""Stored activations that stand for all of a store."""
MOST_OF_FREE = 0.9
"""Share of free memory or disk above which a run is refused."""


class TooLarge(ConfigError):
    """A run that would not fit this machine."""


# -- the machine ------------------------------------------------------------------------------------------------------
def reset_peak() -> None:
    """Begin a new measurement of :func:`peak_bytes`; where the kernel does not allow it the old peak goes on."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass


def peak_bytes() -> int:
    """Largest resident size of this process since :func:`reset_peak`."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    return 0


def free_memory_bytes() -> int:
    """Memory that this process may still take: what the system has available, or what its control group leaves."""
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    free = int(fields["MemAvailable"].split()[0]) * 1024
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
        cache = dict(line.split() for line in Path("/sys/fs/cgroup/memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return free
    return free if limit == "max" else min(free, int(limit) - used + int(cache.get("inactive_file", 0)))


# -- sizes that are counted -------------------------------------------------------------------------------------------
Widths = tuple[int, ...]
"""Width of the activations; for a transcoder that of its inputs and that of its targets."""


def parameters(cfg: TrainConfig, widths: Widths) -> int:
    """P of one SAE, without making it."""
    plugin = find("sae.architectures", cfg.architecture)
    decided = {"apply_b_dec_to_input": True} | plugin.cfg_fields(cfg)
    d_out = widths[-1] if plugin.transcodes else widths[0]
    with torch.device("meta"):
        sae = plugin(
            SAEConfig(
                architecture=cfg.architecture, d_in=widths[0], d_out=d_out, d_sae=cfg.d_sae, train_tokens=None,
                input_norm=input_norm(cfg), sae_id="", meta=None, train_steps=None, seed=cfg.seed, **decided,
            )
        )  # fmt: skip
    return sum(p.numel() for p in sae.parameters())


def state_bytes(cfg: TrainConfig, widths: Widths) -> int:
    """Weights, gradients and Adam's two moments in float32, and the average where there is one."""
    return 4 * parameters(cfg, widths) * (5 if cfg.ema_decay > 0 else 4)


def step_bytes(cfg: TrainConfig, widths: Widths) -> int:
    """One saved step: all of that but the gradients, and the 8-byte counters of the latents."""
    return state_bytes(cfg, widths) - 4 * parameters(cfg, widths) + 8 * cfg.d_sae


def check_enough(n_kept: int, cfgs: Sequence[TrainConfig]) -> None:
    """:class:`sae.errors.DataError` where the text gives less than one batch."""
    largest = max(cfg.batch_tokens for cfg in cfgs)
    if n_kept < largest:
        raise DataError(
            f"the text gives {n_kept:,} tokens after the filter, a batch is {largest:,}: give more text (--texts, "
            "--tokens.train-tokens) or lower --train.batch-tokens"
        )


def check_targets(hookpoints: Sequence[str], cfgs: Sequence[TrainConfig]) -> None:
    """:class:`sae.errors.ConfigError` where a transcoder has no target, or a target has no transcoder."""
    transcoders = [find("sae.architectures", cfg.architecture).transcodes for cfg in cfgs]
    if any(transcoders) and len(hookpoints) < 2:
        raise ConfigError("a transcoder needs --hookpoint-out, the activation that it reconstructs")
    if len(hookpoints) > 1 and not any(transcoders):
        raise ConfigError("--hookpoint-out is for transcoders: give --train.architecture transcoder, or leave it out")


def check_fits(
    sources: Sequence[tuple[Sequence[TrainConfig], Widths]], root: Path, new_disk: int, device: torch.device,
    held: int = 0,
) -> None:  # fmt: skip
    """:class:`TooLarge` before anything is allocated, with the sizes and what to lower. ``sources``: SAEs that are
    trained at once, with their widths; ``held``: bytes that a stream takes beside them."""
    wanted = held + 8 * START_SAMPLE_TOKENS * max(sum(widths) for _, widths in sources)
    wanted += sum(state_bytes(cfg, widths) for cfgs, widths in sources for cfg in cfgs)
    where, free = "memory", free_memory_bytes()
    if device.type == "cuda":
        where, free = "memory of the GPU", torch.cuda.mem_get_info(device)[0]
    if wanted > MOST_OF_FREE * free:
        stream = f" and {held / 1e9:.2f} GB for the buffer of the stream (--stream.buffer-tokens)" if held else ""
        raise TooLarge(
            f"{sum(len(cfgs) for cfgs, _ in sources)} SAE(s) need at least {wanted / 1e9:.2f} GB for weights, "
            f"gradients, Adam and the start sample{stream}, {free / 1e9:.2f} GB of {where} are free: lower "
            "train.d-sae, or train fewer at once"
        )
    place = next(path for path in (root, *root.absolute().parents) if path.exists())
    disk = shutil.disk_usage(place).free
    if new_disk > MOST_OF_FREE * disk:
        raise TooLarge(
            f"the run writes {new_disk / 1e9:.2f} GB, {disk / 1e9:.2f} GB are free at {place}: choose another --root, "
            "lower tokens.train-tokens, or store nothing: --stream.source live"
        )


def check_cap(new_disk: int, disk_gb: float | None, tokens: int) -> None:
    """:class:`TooLarge` where the activations of ``tokens`` take more disk than the run is allowed."""
    if disk_gb is not None and new_disk > disk_gb * 1e9:
        raise TooLarge(
            f"the activations of {tokens:,} tokens take {new_disk / 1e9:.3f} GB of disk, --stream.disk-gb allows "
            f"{disk_gb:g}: allow more, lower --tokens.train-tokens to {int(tokens * disk_gb * 1e9 / new_disk):,} "
            "(several passes make up for it: --train.train-tokens), or store nothing: --stream.source live"
        )


# -- times that are measured ------------------------------------------------------------------------------------------
@dataclass
class Sample:
    """Some activations that stand for a store of ``n_kept``: rows repeat."""

    x_ND: Tensor
    n_kept: int
    target_NO: Tensor | None = None
    """For transcoders; as many rows."""
    key: str = "sample"

    @property
    def d_in(self) -> int:
        return self.x_ND.shape[1]

    @property
    def kept_N(self) -> np.ndarray:
        return np.arange(self.n_kept)

    def read(self, flat: Any) -> Tensor:
        """float32 [n, D]."""
        return self.x_ND[torch.from_numpy(np.asarray(flat) % len(self.x_ND))]

    def read_target(self, flat: Any) -> Tensor:
        """float32 [n, d_out]; ``ValueError`` where there are none."""
        if self.target_NO is None:
            raise ValueError("a sample without targets")
        return self.target_NO[torch.from_numpy(np.asarray(flat) % len(self.target_NO))]

    def batches(self, batch_tokens: int, *, seed: int, epochs: int, first: int = 0) -> Iterator[tuple[Tensor, Any]]:
        """Random rows, as many batches as are taken."""
        for batch in range(first, epochs * max(1, self.n_kept // batch_tokens)):
            flat = np.random.Generator(np.random.Philox(seed + batch)).integers(0, self.n_kept, batch_tokens)
            yield self.read(flat), flat


class LmTime(NamedTuple):
    """Speed of collecting, and what it gave."""

    seconds_per_token: float
    """Of all hookpoints together."""
    x_ND: tuple[Tensor, ...]
    """Activations of the batches that were timed, per hookpoint, for :class:`Sample`."""
    peak_bytes: int


@torch.no_grad()
def time_lm(
    lm: LanguageModel, hookpoints: Sequence[str], rows_BL: np.ndarray, batch_rows: int = BATCH_ROWS
) -> LmTime:
    """Median over some batches of the rows of a token set, after one that warms up."""
    reset_peak()
    seconds, kept = [], []
    for i in range(WARM_BATCHES + 1):
        start = (i * batch_rows) % max(1, len(rows_BL) - batch_rows + 1)
        ids = torch.from_numpy(rows_BL[start : start + batch_rows].astype(np.int64)).to(lm.device)
        begun = time.perf_counter()
        captured = lm.capture(ids, hookpoints)
        found = [captured[h].float()[:, 1:].flatten(0, 1).cpu() for h in hookpoints]  # position 0 never passes
        seconds.append((time.perf_counter() - begun) / ids.numel())
        kept.append(found)
    return LmTime(statistics.median(seconds[1:]), tuple(map(torch.cat, zip(*kept, strict=True))), peak_bytes())


class Trial(NamedTuple):
    """A miniature of one training of several SAEs."""

    start_s: float
    """Start sample and starting weights of all,"""
    step_s: float
    """one batch through all,"""
    finish_s: float
    """the artefacts of all."""
    peak_bytes: int
    """Largest resident size of the process meanwhile."""
    artefact_bytes: int
    """Size of the artefacts of all."""
    gpu_bytes: int
    """Peak of the GPU's allocator; 0 on a CPU."""


def try_training(store: Store, cfgs: Sequence[TrainConfig], meta: SubjectMeta, device: torch.device) -> Trial:
    """:func:`try_jobs` for one hookpoint."""
    return try_jobs([Job(store, cfgs, meta)], device)


def try_jobs(jobs: Sequence[Job], device: torch.device) -> Trial:
    """Start, step and finish SAEs of the real shapes on real activations, in a temporary folder."""
    n_steps = WARM_STEPS + 1
    reset_peak()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        begun = time.perf_counter()
        runs = [run for job in jobs for run in _started(job, n_steps, Path(folder), device, stack)]
        start_s = _since(begun, device)
        seconds = []
        size = runs[0].cfg.batch_tokens
        streams = [(job.store, job.store.batches(size, seed=0, epochs=n_steps)) for job in jobs]
        for index in range(n_steps):
            begun = time.perf_counter()
            for store, batches in streams:
                x_ND, flat = next(batches)
                train._feed([run for run in runs if run.store is store], x_ND, flat, index, device, {})
            seconds.append(_since(begun, device))
        finish_s = sum(_finish_seconds(run, run.store) for run in runs)
        size = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
    gpu = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    return Trial(start_s, statistics.median(seconds[1:]), finish_s, peak_bytes(), size, gpu)


def _started(job: Job, n_steps: int, folder: Path, device: torch.device, stack: ExitStack) -> list[train_run.Run]:
    """Runs that have one step more to go than will be tried, so that none ends by itself."""
    store, cfgs, meta = job
    picked = start_tokens(store)
    sample_ND = store.read(picked).to(device)
    runs = []
    for cfg in cfgs:
        short = replace(cfg, train_tokens=(n_steps + 1) * cfg.batch_tokens)
        key = train_key(short, store.key)
        path = folder / sae_id_of(short, meta, key)
        log = stack.enter_context(MetricLog(train_run.run_folder(path) / "train.jsonl"))
        target_NO = _targets(cfg, store, picked, device)
        runs.append(train_run.start(short, meta, key, path, store, sample_ND, log, target_NO))
    return runs


def _targets(cfg: TrainConfig, store: Any, flat: Any, device: torch.device) -> Tensor | None:
    """Raw targets for a transcoder, None for others."""
    transcodes = find("sae.architectures", cfg.architecture).transcodes
    return store.read_target(flat).to(device) if transcodes else None


def start_tokens(store: Store) -> np.ndarray:
    """As many tokens as the start sample of a training, in the order of the store."""
    kept = np.asarray(store.kept_N)
    return kept[np.linspace(0, len(kept) - 1, min(len(kept), START_SAMPLE_TOKENS)).astype(np.int64)]


def _since(begun: float, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begun


def _finish_seconds(run: train_run.Run, store: Store) -> float:
    """Of the artefact, and of what the architecture does at the end, which reads up to 2^20 tokens (calibration)."""
    kept = np.asarray(store.kept_N)
    few = Sample(store.read(kept[:FINISH_TOKENS]), min(FINISH_TOKENS, len(kept)), key=store.key)
    begun = time.perf_counter()
    try:
        run.sae.finish(few)
    except DataError:  # a threshold of so short a training need not hold; the time of finding it does
        pass
    ending = time.perf_counter() - begun
    passes = 2 if run.average is not None else 1
    begun = time.perf_counter()
    train_run.finish(run, few)
    return time.perf_counter() - begun + passes * ending * (min(len(kept), MAX_TOKENS) / few.n_kept - 1)


# -- the prediction ---------------------------------------------------------------------------------------------------
class Line(NamedTuple):
    """One stage."""

    stage: str
    seconds: float
    memory_bytes: int
    """Largest resident size of the process during the stage."""
    disk_bytes: int
    """What the stage leaves."""
    note: str


@dataclass(frozen=True)
class Prediction:
    """All stages of a run; a stage whose artefact is there costs nothing."""

    lines: tuple[Line, ...]
    working_disk_bytes: int
    """On disk for a while beside that: saved steps."""

    @property
    def seconds(self) -> float:
        return sum(line.seconds for line in self.lines)

    @property
    def memory_bytes(self) -> int:
        return max((line.memory_bytes for line in self.lines), default=0)

    @property
    def disk_bytes(self) -> int:
        return sum(line.disk_bytes for line in self.lines)


def training_line(cfgs: Sequence[TrainConfig], trial: Trial, mapped_bytes: int) -> Line:
    """The stage of training from its miniature; ``mapped_bytes`` of the store become resident by and by."""
    steps = max(cfg.train_tokens // cfg.batch_tokens for cfg in cfgs)
    seconds = trial.start_s + trial.finish_s
    tokens = sum(cfg.train_tokens // cfg.batch_tokens * cfg.batch_tokens for cfg in cfgs)
    share = tokens / (len(cfgs) * steps * cfgs[0].batch_tokens)  # some may end before others
    seconds += steps * trial.step_s * share
    note = f"{len(cfgs)} SAE(s), {steps:,} steps, {tokens:,} tokens in all, {tokens / seconds:,.0f} tokens/s"
    if trial.gpu_bytes:
        note += f", {trial.gpu_bytes / 1e9:.2f} GB on the GPU"
    return Line("training", seconds, trial.peak_bytes + mapped_bytes, trial.artefact_bytes, note)


def saved_steps_bytes(cfgs: Sequence[TrainConfig], widths: Widths) -> int:
    """Largest room that saved steps take: those kept, and one being written."""
    return (resume.KEEP_STEPS + 1) * sum(step_bytes(cfg, widths) for cfg in cfgs)


def check_prediction(found: Prediction, root: Path) -> None:
    """:class:`TooLarge` where the measured miniature shows that the run itself would not fit."""
    place = next(path for path in (root, *root.absolute().parents) if path.exists())
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * 4096
    limits = (
        ("memory", found.memory_bytes - resident, free_memory_bytes(), "lower train.batch-tokens or train.d-sae"),
        ("disk", found.disk_bytes + found.working_disk_bytes, shutil.disk_usage(place).free, "choose another --root"),
    )
    for what, wanted, free, cure in limits:
        if wanted > MOST_OF_FREE * free:
            raise TooLarge(f"the run needs {wanted / 1e9:.2f} GB of {what}, {free / 1e9:.2f} GB are free: {cure}")

