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
from threading import Thread
from typing import Any, Literal, TypeVar, cast

from sae.errors import ConfigError, MissingExtra, did_you_mean

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
) -> Iterator[tuple[Job, Result | Failure]]:
    """Yield (job, result) or (job, :class:`Failure`) for every job, as they finish; every job is yielded once.

    ``local``: with one worker in this process, in order and only as far as the caller asks; with more, in as many
    fresh processes, to which ``function`` goes by name (a function of a module, or a `functools.partial` of one) and
    whose door must be guarded by ``if __name__ == "__main__"``. ``ray``: one Ray task per job, on the cluster that
    RAY_ADDRESS names, else on one started here with ``workers`` CPUs and stopped at the end; ``function`` may be any.

    ``threads``: of each worker's matrix products, since their number moves last digits; by default as many as this
    process has, so that results do not hang on the engine. ``gpus``: share of a device that each Ray task asks for.

    A process that dies costs its own job (`worker_lost`). Results must not depend on the order or on each other; what
    is slow to open is best kept in a `functools.lru_cache` of ``function``'s module, as processes serve many jobs.
    ConfigError for an unknown engine or no worker, MissingExtra without Ray; both before any job. KeyboardInterrupt
    stops all.
    """
    if engine not in ENGINES:
        raise ConfigError(f"unknown engine {engine!r}{did_you_mean(engine, ENGINES)}")
    if workers < 1:
        raise ConfigError(f"workers must be at least 1, got {workers}")
    if threads is not None and threads < 1:
        raise ConfigError(f"threads must be at least 1, got {threads}")
    if engine == "ray":
        ray = _import_ray()
        return _on_ray(ray, function, list(jobs), workers, threads or _own_threads(), gpus)
    if workers == 1:
        return _here(function, jobs)
    return _in_processes(function, jobs, workers, threads or _own_threads())


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
        pool.shutdown(wait=False, cancel_futures=True)


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


# -- Ray --------------------------------------------------------------------------------------------------------------
def _import_ray() -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # a library reports nothing home unasked
    try:
        import ray
    except ImportError as error:
        raise MissingExtra("ray", "ray") from error
    return ray


def _on_ray(
    ray: Any, function: Callable[[Any], Any], jobs: Sequence[Any], workers: int, threads: int, gpus: float
) -> Iterator[tuple[Any, Any]]:
    started = not ray.is_initialized()
    if started:
        address = os.environ.get("RAY_ADDRESS")
        local = {} if address else {"num_cpus": workers, "include_dashboard": False}
        ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING, **local)
    environment = {"env_vars": {name: str(threads) for name in THREAD_VARIABLES}}
    # no retries: a job that kills its worker would kill each worker that takes it up
    task = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=0, runtime_env=environment)(_with_threads)
    try:
        shared = ray.put(cast(Any, function))
        waiting = {task.remote(threads, shared, job): job for job in jobs}
        while waiting:
            (ready,), _ = ray.wait(list(waiting), num_returns=1)
            job = waiting.pop(ready)
            try:
                result = ray.get(ready)
            except ray.exceptions.OutOfMemoryError as error:
                result = Failure("out_of_memory", type(error).__name__, str(error))
            except ray.exceptions.RayTaskError as error:  # outside the guard: unpickling the job, pickling its result
                result = failure_of(error)
            except ray.exceptions.RayError as error:
                result = Failure("worker_lost", type(error).__name__, str(error))
            yield job, result
    finally:
        if started:
            ray.shutdown()
