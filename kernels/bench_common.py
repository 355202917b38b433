"""What the bench scripts share: timing in alternation, rows, ceilings of the device, the file they go to.

A plain module beside the scripts, found because a script's own folder is on the path.
"""

import csv
import gc
import importlib.metadata
import math
import platform
import statistics
import subprocess
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

COLUMNS = (
    "kernel", "provider", "mode", "n_tokens", "k", "d_sae", "d_in", "dtype", "p20_ms", "p50_ms", "p80_ms", "peak_mib",
    "tflops", "tbs", "floor_ms", "share", "repeats", "device", "threads", "torch", "triton", "commit", "utc",
)  # fmt: skip
FLUSH_BYTES = 256 * 2**20
"""Written before each call that is timed with a cold cache; several times an L2."""
WARMUPS = 2
QUEUE_CYCLES = 4_000_000
"""The GPU sleeps this long (2 ms) before each call that is timed as queued, so that the host is ahead of it."""
INSTRUCTIONS_PER_SM = 29.7e12 / 132
"""Thread instructions a second of a multiprocessor: 128 lanes at 1.755 GHz (H100)."""


@dataclass
class Bench:
    """One run: device, measured ceilings, time left, rows so far."""

    device: torch.device
    repeats: int
    seconds: float
    """Time for the whole run; what is slow to start is left out when it gets short."""
    product: float = 0.0
    """P: flop/s of a large bfloat16 product; 0 where it was not measured."""
    copy: float = 0.0
    """W: bytes/s of a copy, read + written."""
    rows: list[dict[str, object]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    """What could not be measured, or gave wrong numbers."""
    started: float = field(default_factory=time.monotonic)
    clock: Callable[[], float] = time.perf_counter
    """Seconds, on a CPU. Processor time on one thread tells the same where other work shares the machine."""

    commit: str = ""
    """Of the code that runs, where the working tree here cannot tell (a copy on another machine)."""

    @property
    def left(self) -> float:
        """Seconds left."""
        return self.seconds - (time.monotonic() - self.started)

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def instructions(self) -> float:
        """Thread instructions a second; 0 off a GPU."""
        if not self.cuda:
            return 0.0
        return INSTRUCTIONS_PER_SM * torch.cuda.get_device_properties(self.device).multi_processor_count

    def floor_ms(self, flop: float = 0.0, moved: float = 0.0, instructions: float = 0.0) -> float:
        """Least time of dense flop, bytes and instructions after one another (KERNELS 3); 0 where not known."""
        if not (self.product and self.copy):
            return 0.0
        extra = instructions / self.instructions if self.instructions else 0.0
        return 1e3 * (flop / self.product + moved / self.copy + extra)

    @contextmanager
    def guard(self, what: str) -> Iterator[None]:
        """A failure inside is printed and kept, and the rest goes on: device time is dear. The run then fails."""
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            self.failures.append(f"{what}: {type(error).__name__}: {str(error)[:300]}")

    def run(
        self, kernel: str, calls: Mapping[str, Callable[[], object]], shape: tuple[int, int, int, int], dtype: str, *,
        mode: str = "forward", cold: bool = False, flop: float = 0.0, moved: float = 0.0, floor_ms: float = 0.0,
        repeats: int | None = None, queued: bool = False,
    ) -> dict[str, float]:  # fmt: skip
        """Time the calls by turns and add a row for each; p50 in ms by provider. ``shape`` = (N, K, F, D).

        ``queued``: the GPU's time alone, as in a training step, where the host is ahead; otherwise a call of many short
        kernels lasts as long as the host needs to launch them.

        ``flop`` and ``moved`` are the useful work of the operation, the same for all providers, so that their rates
        compare. Peak memory is what a call takes beyond what was there before it.
        """
        repeats = repeats or self.repeats
        peaks = {name: self._peak_mib(call) for name, call in calls.items()}
        times = self._alternate(calls, repeats, cold, queued)
        medians = {}
        for name in calls:
            p20, p50, p80 = (statistics.quantiles(times[name], n=10, method="inclusive")[i] for i in (1, 4, 7))
            medians[name] = p50
            self.rows.append(dict(zip(COLUMNS, (
                kernel, name, mode, *shape, dtype, _four(p20), _four(p50), _four(p80), peaks[name],
                _four(flop / p50 / 1e9), _four(moved / p50 / 1e9), _four(floor_ms), _four(floor_ms / p50), repeats,
                device_name(self.device), torch.get_num_threads(), torch.__version__, triton_version(),
                self.commit or commit(), datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            ), strict=True)))  # fmt: skip
            print(line(self.rows[-1]), flush=True)
        return medians

    def _peak_mib(self, call: Callable[[], object]) -> object:
        for _ in range(WARMUPS - 1):
            call()
        if not self.cuda:
            call()
            return ""
        gc.collect()  # what an earlier call left in a cycle must not be freed during this one
        torch.cuda.synchronize(self.device)
        before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        call()
        torch.cuda.synchronize(self.device)
        return round((torch.cuda.max_memory_allocated(self.device) - before) / 2**20, 1)

    def _alternate(
        self, calls: Mapping[str, Callable[[], object]], repeats: int, cold: bool, queued: bool
    ) -> dict[str, list[float]]:
        """ms of each call; on a GPU by events, read when all are done."""
        if not self.cuda:
            found: dict[str, list[float]] = {name: [] for name in calls}
            for _ in range(repeats):
                for name, call in calls.items():
                    began = self.clock()
                    call()
                    found[name].append(1e3 * (self.clock() - began))
            return found
        trash = torch.empty(FLUSH_BYTES // 4, dtype=torch.int32, device=self.device) if cold else None
        events: dict[str, list[tuple[Any, Any]]] = {name: [] for name in calls}
        for _ in range(repeats):
            for name, call in calls.items():
                if trash is not None:
                    trash.zero_()
                if queued:
                    torch.cuda._sleep(QUEUE_CYCLES)
                begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                begin.record()
                call()
                end.record()
                events[name].append((begin, end))
        torch.cuda.synchronize(self.device)
        return {name: [begin.elapsed_time(end) for begin, end in pairs] for name, pairs in events.items()}


def _four(value: float) -> str:
    """Four digits; empty for what is not known."""
    return f"{value:.4g}" if value else ""


def line(row: Mapping[str, object]) -> str:
    """A row for people."""
    shape = f"N{row['n_tokens']} K{row['k']} F{row['d_sae']} D{row['d_in']} {row['dtype']}"
    parts = [f"{row['kernel']:14} {row['provider']:16} {row['mode']:25}{shape:38}"]
    parts.append(f"p20 {row['p20_ms']}  p50 {row['p50_ms']}  p80 {row['p80_ms']} ms")
    for name, unit in (("peak_mib", "MiB"), ("tflops", "TFLOP/s"), ("tbs", "TB/s"), ("share", "of the floor")):
        parts += [f"{row[name]} {unit}"] if row[name] not in ("", None) else []
    return "  ".join(parts)


def device_name(device: torch.device) -> str:
    """Name of the GPU or of the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next((text.split(":", 1)[1].strip() for text in lines if text.startswith("model name")), platform.machine())


def triton_version() -> str:
    """Version of Triton, empty where it is not installed."""
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return ""


def commit() -> str:
    """Short hash of the working tree's commit; empty outside a repository."""
    command = ["git", "rev-parse", "--short=10", "HEAD"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def check_file(path: Path) -> None:
    """``SystemExit`` if rows of other columns are in the file: they would be read under wrong names."""
    if path.exists():
        with open(path, newline="", encoding="utf-8") as file:
            found = next(csv.reader(file), [])
        if found and found != list(COLUMNS):
            raise SystemExit(f"{path} has other columns ({', '.join(found)}); move it away or give --out")


def append(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    """Add rows to the file, with a header if it is new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists() or path.stat().st_size == 0
    with open(path, "a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(rows)


def near(name: str, got: torch.Tensor, want: torch.Tensor, limit: float) -> None:
    """``RuntimeError`` if two tensors are further apart than ``limit`` in relative norm: a wrong kernel has no time."""
    off = size = 0.0
    for a, b in zip(got.reshape(-1).split(2**26), want.reshape(-1).split(2**26), strict=True):  # float64 by parts
        off += float((a.double() - b.double()).square().sum())
        size += float(b.double().square().sum())
    error = math.sqrt(off / size) if size else math.sqrt(off)
    if not error <= limit:
        raise RuntimeError(f"{name} is off by {error:.2g}, at most {limit:g}: nothing was written")
