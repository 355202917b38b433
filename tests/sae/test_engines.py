"""Jobs on both engines: each answered once, failures told, dead workers told, equal results."""

import os
from functools import partial

import pytest

from sae.engines import ENGINES, Failure, run_jobs
from sae.errors import ConfigError


def square(job: int) -> int:
    if job == 3:
        raise ValueError("three is refused")
    if job == 5:
        raise MemoryError("five is too much")
    return job * job


def die_at_two(job: int) -> int:
    if job == 2:
        os._exit(9)
    return job


def product(threads_too: bool, job: int) -> tuple[float, int]:
    """Last digits of a product depend on the number of threads: both engines must use as many."""
    import torch

    x = torch.randn(257, 311, generator=torch.Generator().manual_seed(job))
    return float((x @ x.T).sum()), torch.get_num_threads() if threads_too else 0


def params() -> list[object]:
    return [pytest.param(e, w, id=f"{e}-{w}") for e, w in (("local", 1), ("local", 2), ("ray", 2))]


def engine_or_skip(engine: str) -> None:
    if engine == "ray":
        pytest.importorskip("ray")


@pytest.mark.parametrize(("engine", "workers"), params())
def test_each_job_is_answered_once_and_failures_do_not_stop_the_rest(engine, workers):
    engine_or_skip(engine)
    found = list(run_jobs(square, range(8), engine=engine, workers=workers))
    assert sorted(job for job, _ in found) == list(range(8))
    by_job = dict(found)
    assert {j: r for j, r in by_job.items() if j not in (3, 5)} == {0: 0, 1: 1, 2: 4, 4: 16, 6: 36, 7: 49}
    assert (by_job[3].code, by_job[3].error, by_job[3].detail) == ("internal", "ValueError", "three is refused")
    assert "three is refused" in by_job[3].traceback
    assert by_job[5].code == "out_of_memory"


@pytest.mark.parametrize(("engine", "workers"), params()[1:])
def test_a_dead_process_costs_its_own_job(engine, workers):
    engine_or_skip(engine)
    by_job = dict(run_jobs(die_at_two, range(5), engine=engine, workers=workers))
    assert isinstance(by_job.pop(2), Failure) and by_job == {0: 0, 1: 1, 3: 3, 4: 4}
    lost = dict(run_jobs(die_at_two, [2], engine=engine, workers=workers))[2]
    assert lost.code == "worker_lost"


def test_engines_give_the_same_numbers():
    torch = pytest.importorskip("torch")
    work = partial(product, True)
    here = dict(run_jobs(work, range(3)))
    assert {threads for _, threads in here.values()} == {torch.get_num_threads()}
    assert dict(run_jobs(work, range(3), workers=2)) == here
    pytest.importorskip("ray")
    assert dict(run_jobs(work, range(3), engine="ray", workers=2)) == here


def test_one_worker_goes_no_further_than_asked():
    seen: list[int] = []
    jobs = run_jobs(seen.append, range(100))
    next(jobs), next(jobs)
    assert seen == [0, 1]


def test_what_cannot_run_is_told_before_any_job():
    with pytest.raises(ConfigError, match="unknown engine 'rai'.*ray"):
        run_jobs(square, [1], engine="rai")  # type: ignore[arg-type]
    for engine in ENGINES:
        with pytest.raises(ConfigError, match="at least 1"):
            run_jobs(square, [1], engine=engine, workers=0)


def test_without_ray_the_extra_is_named(monkeypatch):
    import sys

    from sae.errors import MissingExtra

    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtra, match=r"saescope\[ray\]"):
        run_jobs(square, [1], engine="ray")


def test_processes_end_with_a_killed_driver(tmp_path):
    import signal
    import subprocess
    import sys
    import time

    code = (
        "import os, time\nfrom sae.engines import run_jobs\n"
        f"def work(job):\n    open({str(tmp_path)!r} + f'/{{os.getpid()}}', 'w').close()\n    time.sleep(600)\n"
        "if __name__ == '__main__':\n    list(run_jobs(work, range(2), workers=2))\n"
    )
    script = tmp_path / "driver.py"
    script.write_text(code)
    driver = subprocess.Popen([sys.executable, str(script)], env={**os.environ, "PYTHONPATH": os.getcwd()})
    deadline = time.monotonic() + 120
    while not (pids := [int(p.name) for p in tmp_path.iterdir() if p.name.isdigit()]) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert pids
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    while any(os.path.exists(f"/proc/{pid}") for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(os.path.exists(f"/proc/{pid}") for pid in pids)
