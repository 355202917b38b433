"""Independent jobs on this machine or on Ray: one result per job, in the order they finish. Torch-free.

Nothing is scheduled here: Ray's own scheduler, or the pool of the standard library, gives jobs to processes. A job is
anything that can be pickled and that names all its result depends on; then both engines return the same results.
"""

import logging
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import islice
from multiprocessing import get_context, parent_process
from pathlib import Path
from threading import Thread
from typing import Any, Literal, TypeVar

from sae.errors import ConfigError, did_you_mean
from sae.ray_jobs import check_cluster, import_ray, run_on_ray

Job = TypeVar("Job")
Result = TypeVar("Result")
EngineName = Literal["local", "ray"]
ENGINES: tuple[EngineName, ...] = ("local", "ray")
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Failure:
    """A job that gave no result; the others go on."""

    code: Literal["internal", "out_of_memory", "worker_lost"]
    error: str
    """Name of the exception's type."""
    detail: str
    """Its message."""
    traceback: str = ""


def run_jobs(
    function: Callable[[Job], Result],
    jobs: Iterable[Job],
    *,
    engine: EngineName = "local",
    workers: int = 1,
    threads: int | None = None,
    gpus: float = 0.0,
    shared: Sequence[Path] = (),
) -> Iterator[tuple[Job, Result | Failure]]:
    """Yield (job, result) or (job, :class:`Failure`) for every job, as they finish; every job is yielded once.

    ``local``: with one worker in this process, in order and only as far as the caller asks; with more, in as many
    fresh processes, to which ``function`` goes by name (a function of a module, or a `functools.partial` of one) and
    whose door must be guarded by ``if __name__ == "__main__"``. ``ray``: one Ray task per job, on the cluster that
    RAY_ADDRESS names, else on one started here with ``workers`` CPUs and stopped at the end; ``function`` may be any.
    ``shared``: folders that the jobs read and write, which every node of a cluster must see under the same path.

    ``threads``: of each worker's matrix products, since their number moves last digits; by default as many as this
    process has, so that results do not hang on the engine. ``gpus``: share of a device that each Ray task asks for.

    A process that dies costs its own job (`worker_lost`), the death of a node of a cluster none: its jobs are done
    elsewhere. Results must not depend on the order or on each other; what
    is slow to open is best kept in a `functools.lru_cache` of ``function``'s module, as processes serve many jobs.
    ConfigError for an unknown engine, no worker or a cluster that cannot do the work, MissingExtra without Ray; all
    before any job. KeyboardInterrupt
    stops all.
    """
    if engine not in ENGINES:
        raise ConfigError(f"unknown engine {engine!r}{did_you_mean(engine, ENGINES)}")
    if workers < 1:
        raise ConfigError(f"workers must be at least 1, got {workers}")
    if threads is not None and threads < 1:
        raise ConfigError(f"threads must be at least 1, got {threads}")
    if engine == "ray":
        import_ray()
        return run_on_ray(
            _with_threads, function, list(jobs), workers=workers, threads=threads or _own_threads(), gpus=gpus,
            shared=shared, variables=THREAD_VARIABLES, failure=_lost,
        )  # fmt: skip
    if workers == 1:
        return _here(function, jobs)
    return _in_processes(function, jobs, workers, threads or _own_threads())


def check_engine(engine: EngineName, *, gpus: float = 0.0, shared: Sequence[Path] = ()) -> None:
    """What :func:`run_jobs` would refuse, told before the work that leads up to its jobs."""
    if engine == "ray":
        check_cluster(gpus=gpus, shared=shared)


def _own_threads() -> int:
    torch = sys.modules.get("torch")
    if torch is not None:
        return int(torch.get_num_threads())
    return int(os.environ.get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0)))


def failure_of(error: BaseException) -> Failure:
    """What is told of an exception."""
    kind = type(error).__name__
    memory = isinstance(error, MemoryError) or kind == "OutOfMemoryError"
    text = "".join(traceback.format_exception(error))
    return Failure("out_of_memory" if memory else "internal", kind, str(error), text)


def _lost(code: Literal["out_of_memory", "worker_lost"] | None, error: BaseException) -> Failure:
    """What is told of a job that gave no answer; without a code the exception is its own."""
    return failure_of(error) if code is None else Failure(code, type(error).__name__, str(error))


def _guarded(function: Callable[[Any], Any], job: Any) -> Any:
    try:
        return function(job)
    except Exception as error:  # a failing job must not stop the others
        return failure_of(error)


def _here(function: Callable[[Any], Any], jobs: Iterable[Any]) -> Iterator[tuple[Any, Any]]:
    for job in jobs:
        yield job, _guarded(function, job)


# -- processes of this machine --------------------------------------------------------------------------------------
def _set_threads(threads: int) -> None:
    """Before numeric libraries are imported the environment decides, afterwards torch itself."""
    for name in THREAD_VARIABLES:
        os.environ[name] = str(threads)
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(threads)


def _with_threads(threads: int, function: Callable[[Any], Any], job: Any) -> Any:
    _set_threads(threads)
    return _guarded(function, job)


def _start_process(threads: int) -> None:
    _set_threads(threads)
    Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A process whose driver was killed would wait for work for ever."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _pool(workers: int, threads: int) -> ProcessPoolExecutor:
    # spawned, not forked: a forked child of a process that has run torch may hang in its thread pools
    return ProcessPoolExecutor(workers, get_context("spawn"), _start_process, (threads,))


def _in_processes(
    function: Callable[[Any], Any], jobs: Iterable[Any], workers: int, threads: int
) -> Iterator[tuple[Any, Any]]:
    left = iter(jobs)
    pool = _pool(workers, threads)
    running: dict[Future[Any], Any] = {}
    try:
        while True:
            # no more in flight than workers: when the pool breaks, only these can have broken it
            for job in islice(left, workers - len(running)):
                running[pool.submit(_with_threads, threads, function, job)] = job
            if not running:
                return
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            if any(isinstance(future.exception(), BrokenProcessPool) for future in done):
                wait(running)
                suspects = [(running[f], f) for f in running]
                running = {}
                pool.shutdown(wait=False, cancel_futures=True)
                yield from _one_by_one(function, suspects, threads)
                pool = _pool(workers, threads)
                continue
            for future in done:
                job, error = running.pop(future), future.exception()
                yield job, future.result() if error is None else failure_of(error)
    finally:
        # what still runs here was interrupted: nobody takes its result, and the command would end only after it
        useless = list((pool._processes or {}).values()) if running else []
        pool.shutdown(wait=False, cancel_futures=True)
        for process in useless:
            process.terminate()


def _one_by_one(
    function: Callable[[Any], Any], suspects: Sequence[tuple[Any, "Future[Any]"]], threads: int
) -> Iterator[tuple[Any, Any]]:
    """Jobs of a broken pool: finished ones as they are, the others alone, so that who breaks is known."""
    for job, future in suspects:
        if not isinstance(future.exception(), BrokenProcessPool):
            error = future.exception()
            yield job, future.result() if error is None else failure_of(error)
            continue
        with _pool(1, threads) as alone:
            try:
                result = alone.submit(_with_threads, threads, function, job).result()
            except BrokenProcessPool:
                result = Failure("worker_lost", "BrokenProcessPool", "the process died (killed, or out of memory)")
            except Exception as error:  # e.g. a result that cannot be pickled
                result = failure_of(error)
        yield job, result
