"""Jobs on Ray: on this machine, or on the nodes of the cluster that RAY_ADDRESS names. Torch-free.

A cluster's jobs read and write folders that every node must see under one path. Whether they do, and whether all nodes
have the same saescope and torch, is tried on each node before any job. A job whose node or process dies is handed out
again; one that loses its process twice, or three nodes, is reported as lost.
"""

import logging
import os
import platform
import shutil
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple, cast
from uuid import uuid4

from sae.connection import why_unreachable
from sae.errors import ConfigError, MissingExtra

HOST_VARIABLE = "SAESCOPE_HOST"
"""Names this machine where several share a host name (containers); else the host name does."""
DRIVER_VARIABLE = "SAESCOPE_DRIVER_HOST"
"""Set in the processes of a cluster: the machine of the command that they work for."""
HANDED_ON = ("SAESCOPE_CACHE", "PYTHONPATH")
"""Variables of the command that its processes on a cluster take over. Keys are not among them: Ray shows what is."""
CONNECT_S = 15
ANSWER_S = 180
"""A node that does not answer for so long before any job is told."""
LOOK_S = 20
"""Seconds of waiting for jobs after which it is asked whether a node is left to do them."""
CRASHES, NODE_DEATHS = 2, 3
logger = logging.getLogger(__name__)


class Looked(NamedTuple):
    """What a node says of itself."""

    host: str
    python: str
    versions: dict[str, str]
    problems: list[str]


class Waiting(NamedTuple):
    """A job handed out."""

    job: Any
    crashes: int = 0
    node_deaths: int = 0


def host() -> str:
    """This machine's name."""
    return os.environ.get(HOST_VARIABLE) or platform.node()


def is_elsewhere() -> bool:
    """Whether this process works for a command of another machine."""
    return os.environ.get(DRIVER_VARIABLE, host()) != host()


def versions() -> dict[str, str]:
    """Of what decides the bytes of a result."""
    found = {}
    for package in ("saescope", "torch"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def import_ray() -> Any:
    """The package; MissingExtra where it is not installed."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # a library reports nothing home unasked
    try:
        import ray
    except ImportError as error:
        raise MissingExtra("ray", "ray") from error
    return ray


def look(folders: Sequence[str], token: str, node: str, working: str) -> Looked:
    """On a node: are the driver's files of the hour in the folders, can it write there, is the working folder there?"""
    problems = [] if os.path.isdir(working) else [f"has no folder {working}, in which the command was started"]
    for folder in folders:
        try:
            if (Path(folder) / token / "driver").read_text() != token:
                problems.append(f"sees another folder at {folder}")
            else:
                (Path(folder) / token / node).write_text(token)
        except OSError as error:
            missing = isinstance(error, FileNotFoundError)
            problems.append(f"does not see {folder}" if missing else f"cannot use {folder} ({error.strerror})")
    return Looked(host(), platform.python_version(), versions(), problems)


def on_node(threads: int, working: str, run: Callable[..., Any], function: Any, job: Any) -> tuple[str, Any]:
    """(machine, result) of one job, in the folder that the command's relative paths are taken from."""
    os.chdir(working)
    return host(), run(threads, function, job)


def run_on_ray(
    run: Callable[..., Any], function: Callable[[Any], Any], jobs: Sequence[Any], *, workers: int, threads: int,
    gpus: float, shared: Sequence[Path], variables: Sequence[str], failure: Callable[..., Any],
) -> Iterator[tuple[Any, Any]]:  # fmt: skip
    """See :func:`sae.engines.run_jobs`. ``run(threads, function, job)`` guards a job, ``variables`` set its threads,
    ``failure(code, error)`` makes the answer for one that gave no result."""
    ray = import_ray()
    started = not ray.is_initialized()
    if started:
        _connect(ray, workers)
    try:
        cluster = bool(os.environ.get("RAY_ADDRESS")) or not started
        if cluster:
            _check_nodes(ray, [str(folder.resolve()) for folder in shared], gpus)
        environment = {name: str(threads) for name in variables}
        if cluster:
            environment |= {name: os.environ[name] for name in HANDED_ON if name in os.environ}
            environment[DRIVER_VARIABLE] = host()
        # no retries by Ray: it would retry for ever what runs out of memory
        task = ray.remote(
            num_cpus=1, num_gpus=gpus, max_retries=0, scheduling_strategy="SPREAD",
            runtime_env={"env_vars": environment},
        )(on_node)  # fmt: skip
        shared_function = ray.put(cast(Any, function))
        working = os.getcwd()

        def hand_out(waiting: Waiting) -> Any:
            return task.remote(threads, working, run, shared_function, waiting.job)

        yield from _gather(ray, hand_out, jobs, gpus, failure)
    finally:
        if started:
            ray.shutdown()


def check_cluster(*, gpus: float, shared: Sequence[Path]) -> None:
    """Before the work that comes before any job: ConfigError where the cluster of RAY_ADDRESS, if there is one, could
    not do the jobs; MissingExtra without Ray."""
    ray = import_ray()
    if not os.environ.get("RAY_ADDRESS") or ray.is_initialized():
        return
    _connect(ray, 1)
    try:
        _check_nodes(ray, [str(folder.resolve()) for folder in shared], gpus)
    finally:
        ray.shutdown()


def _connect(ray: Any, workers: int) -> None:
    address = os.environ.get("RAY_ADDRESS")
    local = {} if address else {"num_cpus": workers, "include_dashboard": False}
    terminated = signal.getsignal(signal.SIGTERM)
    try:
        if address:
            _reach(address)
        ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING, **local)
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, terminated)  # Ray's own handler ends the process with status 1
    except (OSError, RuntimeError, ValueError) as error:
        if not address:
            raise
        raise ConfigError(
            f"no Ray cluster can be used at RAY_ADDRESS={address} ({error}); start one with `ray start --head` and "
            "`ray start --address=HEAD:6379`, or unset RAY_ADDRESS to use this machine alone"
        ) from error


def _reach(address: str) -> None:
    """OSError where nothing answers at HOST:PORT, for which Ray itself would wait for minutes."""
    place, colon, port = address.rpartition(":")
    if colon and port.isdigit() and "/" not in place:
        silence = why_unreachable(place.strip("[]"), int(port), CONNECT_S)
        if silence is not None:
            raise OSError(silence)


def _workplaces(ray: Any, gpus: float) -> list[dict[str, Any]]:
    """Nodes that are up and could ever run a job."""
    return [
        node for node in ray.nodes()
        if node["Alive"] and node["Resources"].get("CPU", 0) >= 1 and node["Resources"].get("GPU", 0) >= gpus
    ]  # fmt: skip


def _check_nodes(ray: Any, folders: Sequence[str], gpus: float) -> None:
    """ConfigError, naming each node, where one cannot do the work: better now than after an hour."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    nodes = _workplaces(ray, gpus)
    if not nodes:
        wanted = "a CPU" + (f" and {gpus:g} of a GPU" if gpus else "")
        raise ConfigError(f"no node of the Ray cluster offers {wanted} to a job; add one, or run with --engine local")
    token = f".saescope-{uuid4().hex[:12]}"
    try:
        for folder in folders:
            (Path(folder) / token).mkdir(parents=True)
            (Path(folder) / token / "driver").write_text(token)
        asked = {}
        for node in nodes:
            where = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            task = ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=where)(look)
            asked[task.remote(list(folders), token, node["NodeID"], os.getcwd())] = node
        problems, gone = _problems(ray, asked)
        for node in asked.values():
            blind = [f for f in folders if not (Path(f) / token / node["NodeID"]).is_file()]
            if blind and node not in gone and not any(_name(node) in problem for problem in problems):
                problems.append(f"{_name(node)} writes {', '.join(blind)} where this command does not see it")
        if len(gone) == len(nodes):
            problems.append("all its nodes are gone")
    finally:
        for folder in folders:
            shutil.rmtree(Path(folder) / token, ignore_errors=True)
    if problems:
        raise ConfigError(
            "the Ray cluster cannot do this work:\n  " + "\n  ".join(problems) + "\nAll nodes need one file system "
            "with the results folder (--root) and the folder in which the command is started under the same path, and "
            "the same environment"
        )
    logger.info("Ray: %d nodes, all see %s", len(nodes), ", ".join(folders) or "no shared folder")


def _name(node: dict[str, Any]) -> str:
    return f"node {node['NodeManagerHostname']} ({node['NodeManagerAddress']}, {node['NodeID'][:8]})"


def _problems(ray: Any, asked: dict[Any, dict[str, Any]]) -> tuple[list[str], list[dict[str, Any]]]:
    """(what keeps nodes from working, as they say themselves or as their silence does; nodes that are gone: Ray lists
    one for some seconds after its death)."""
    gone: list[dict[str, Any]] = []
    found, here = [], {**versions(), "python": platform.python_version()}
    ready, silent = ray.wait(list(asked), num_returns=len(asked), timeout=ANSWER_S)
    found += [f"{_name(asked[ref])} did not answer within {ANSWER_S} s" for ref in silent]
    for ref in ready:
        name = _name(asked[ref])
        try:
            said: Looked = ray.get(ref)
        except (ray.exceptions.TaskUnschedulableError, ray.exceptions.NodeDiedError):
            logger.warning("%s has left the Ray cluster", name)
            gone.append(asked[ref])
            continue
        except ray.exceptions.RayError as error:
            told = str(error.cause if getattr(error, "cause", None) else error).strip().splitlines()
            found.append(f"{name} cannot run saescope ({told[-1] if told else type(error).__name__}); is it installed?")
            continue
        found += [f"{name} {problem}" for problem in said.problems]
        there = {**said.versions, "python": said.python}
        other = [f"{what} {is_} (here {here[what]})" for what, is_ in there.items() if is_ != here[what]]
        if other:
            found.append(f"{name} has {', '.join(other)}: results would differ")
    return found, gone


def _gather(
    ray: Any, hand_out: Callable[[Waiting], Any], jobs: Sequence[Any], gpus: float, failure: Callable[..., Any]
) -> Iterator[tuple[Any, Any]]:
    """(job, answer) as they come; what was lost with its node or process is handed out again."""
    done_by: Counter[str] = Counter()
    waiting = {hand_out(w): w for w in (Waiting(job) for job in jobs)}
    while waiting:
        ready, _ = ray.wait(list(waiting), num_returns=1, timeout=LOOK_S)
        if not ready and _workplaces(ray, gpus):
            continue
        if not ready:
            told = RuntimeError("no node is left that could do it")
            yield from ((w.job, failure("worker_lost", told)) for w in waiting.values())
            break
        was = waiting.pop(ready[0])
        try:
            machine, result = ray.get(ready[0])
            done_by[machine] += 1
        except ray.exceptions.OutOfMemoryError as error:
            result = failure("out_of_memory", error)
        except ray.exceptions.RayTaskError as error:  # outside the guard: unpickling the job, pickling its result
            result = failure(None, error)
        except ray.exceptions.RayError as error:
            again = _again(ray, was, error)
            if again is not None:
                waiting[hand_out(again)] = again
                continue
            result = failure("worker_lost", error)
        yield was.job, result
    if len(done_by) > 1:
        logger.info("Ray: jobs by machine: %s", ", ".join(f"{m} {n}" for m, n in sorted(done_by.items())))


def _again(ray: Any, was: Waiting, error: Exception) -> Waiting | None:
    """The job to hand out once more; None where it was lost too often. A job that kills each process that takes it up
    is given up at the second."""
    lost_node = isinstance(error, (ray.exceptions.NodeDiedError, ray.exceptions.LocalRayletDiedError))
    again = was._replace(crashes=was.crashes + (not lost_node), node_deaths=was.node_deaths + lost_node)
    if again.crashes >= CRASHES or again.node_deaths >= NODE_DEATHS:
        return None
    logger.warning("a %s of Ray died, its job is handed out again", "node" if lost_node else "process")
    return again
