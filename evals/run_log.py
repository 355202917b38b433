"""What a run did: stages, minutes, peak memory, failures. Written to ``run.json`` as it goes. Torch-free."""

import json
import logging
import os
import resource
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sae.engines import Failure
from sae.manifest import MANIFEST, plain, provenance, read_manifest

RUN_FILE = "run.json"
logger = logging.getLogger(__name__)


@dataclass
class StageLog:
    """One stage of a run."""

    name: str
    seconds: float = 0.0
    """Wall seconds in this run."""
    work_seconds: float = 0.0
    """Wall seconds that its artefacts took when they were made, in this run or an earlier one."""
    status: str = "running"
    """running, done, reused, failed, interrupted."""
    note: str = ""
    peak_gb: float = 0.0
    """Peak resident memory of the process so far, GB."""
    began: float = field(default_factory=time.time)
    """Unix time."""

    def finish(self, folders: Iterable[Path]) -> None:
        """Take work seconds from the manifests of the stage's artefacts; `reused` when all were there before."""
        paths = [Path(folder) / MANIFEST for folder in folders]
        self.work_seconds = sum(float(read_manifest(p.parent).get("wall_s") or 0.0) for p in paths)
        if paths and all(p.stat().st_mtime < self.began for p in paths):
            self.status = "reused"


@dataclass(frozen=True)
class TaskFailure:
    """One (subject, evaluation) or one subject's stage that raised; the rest of the run went on."""

    subject: str
    task: str
    error: str
    """Exception type and message."""


def peak_gb() -> float:
    """Peak resident memory of this process in GB (10^9 bytes)."""
    kilo = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * kilo / 1e9


@dataclass
class RunLog:
    """Everything the summary and the pages say about a run."""

    root: Path
    preset: str
    key: str
    config: dict[str, Any]
    stages: list[StageLog] = field(default_factory=list)
    failures: list[TaskFailure] = field(default_factory=list)
    notes: dict[str, Any] = field(default_factory=dict)
    """Counts worth knowing: dropped tokens, ledger, judge checks, ..."""
    started: float = field(default_factory=time.monotonic)
    writes: bool = True
    """False for a process that measures a part of the run: ``run.json`` has one writer."""

    @contextmanager
    def stage(self, name: str) -> Iterator[StageLog]:
        """Time a stage; an exception marks it failed and goes on up."""
        log = StageLog(name)
        self.stages.append(log)
        logger.info("%s ...", name)
        begun = time.monotonic()
        try:
            yield log
        except BaseException as error:
            log.status = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
            raise
        finally:
            log.seconds = time.monotonic() - begun
            log.work_seconds = log.work_seconds or log.seconds
            log.peak_gb = peak_gb()
            if log.status == "running":
                log.status = "done"
            self.write()
            logger.info("%s: %s in %.1f s%s", name, log.status, log.seconds, f" ({log.note})" if log.note else "")

    def fail(self, subject: str, task: str, error: BaseException) -> None:
        """Record a failed task; the traceback goes to the debug log."""
        self.failures.append(TaskFailure(subject, task, f"{type(error).__name__}: {error}"))
        logger.error("%s, %s failed: %s: %s", subject, task, type(error).__name__, error)
        logger.debug("traceback", exc_info=error)
        self.write()

    def fail_job(self, subject: str, task: str, failure: Failure) -> None:
        """Record a job that an engine reports as failed."""
        told = f"{failure.error}: {failure.detail}" + (" (worker lost)" if failure.code == "worker_lost" else "")
        self.failures.append(TaskFailure(subject, task, told))
        logger.error("%s, %s failed: %s", subject, task, told)
        logger.debug("%s", failure.traceback)
        self.write()

    def write(self) -> None:
        """Replace run.json in one step."""
        if not self.writes:
            return
        self.root.mkdir(parents=True, exist_ok=True)
        content = {
            "preset": self.preset,
            "key": self.key,
            "config": self.config,
            "seconds": round(time.monotonic() - self.started, 2),
            "peak_gb": round(peak_gb(), 3),
            "stages": [asdict(s) for s in self.stages],
            "failures": [asdict(f) for f in self.failures],
            "notes": self.notes,
            "provenance": provenance(),
            "machine": machine(),
        }
        path = self.root / RUN_FILE
        temporary = path.with_name(f"{RUN_FILE}.tmp-{os.getpid()}")
        temporary.write_text(json.dumps(content, indent=1, sort_keys=True, default=plain) + "\n", encoding="utf-8")
        os.replace(temporary, path)


def machine() -> dict[str, Any]:
    """Processor, cores and memory: the device that a CPU timing belongs to."""
    model = ""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
        flags = next((line for line in lines if line.startswith("flags")), "").split()
    except OSError:
        flags = []
    wide = [f for f in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if f in flags]
    pages, size = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    return {"cpu": model, "features": wide, "cores": os.cpu_count(), "memory_gb": round(pages * size / 1e9, 1)}
