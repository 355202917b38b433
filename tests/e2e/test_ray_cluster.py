"""`--engine ray` on a cluster of several nodes: jobs spread, the bytes are those of one process, the death of a node
costs nothing, and a node that cannot do the work is named before any.

The nodes are processes of this machine with names of their own (SAESCOPE_HOST). One has another file system over a
folder, where the system lets us mount one.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from door_world import answer, make_root
from loopback import ChatServer

from sae.engines import run_jobs
from sae.errors import ConfigError

pytest.importorskip("ray")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
ROOT = Path(__file__).parents[2]
SUPPORT = str(ROOT / "tests" / "support")
STORE_BYTES = 80 * 2**20
NODE = {"num_cpus": 1, "object_store_memory": STORE_BYTES}
WATCHED = {"health_check_initial_delay_ms": 500, "health_check_period_ms": 500, "health_check_failure_threshold": 3}
"""Ray notices a dead node after two seconds instead of twenty."""
WAITS = ("--architectures", "topk", "--evals", "reconstruction", "waiting_eval:PLUGIN", "--eval-seeds", "0", "1")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A head with one processor; tests add nodes."""
    from ray.cluster_utils import Cluster

    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    made = Cluster(initialize_head=True, head_node_args={**NODE, "include_dashboard": False, "_system_config": WATCHED})
    before = os.environ.get("RAY_ADDRESS")
    os.environ["RAY_ADDRESS"] = made.address
    yield made
    os.environ.pop("RAY_ADDRESS")
    if before is not None:
        os.environ["RAY_ADDRESS"] = before
    made.shutdown()


@pytest.fixture
def second(cluster: Any) -> Iterator[Any]:
    """A node named "b", gone after the test."""
    node = cluster.add_node(**NODE, env_vars={"SAESCOPE_HOST": "b"})
    yield node
    if node in cluster.worker_nodes:
        cluster.remove_node(node)


def when(seen: Any, then: Any) -> threading.Thread:
    """A thread that waits until ``seen()``, then calls ``then``."""

    def wait() -> None:
        deadline = time.monotonic() + 300
        while not seen() and time.monotonic() < deadline:
            time.sleep(0.05)
        then()

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


# -- the engine -------------------------------------------------------------------------------------------------------
def test_jobs_spread_and_those_of_a_dead_node_are_done_elsewhere(cluster, second, tmp_path):
    def note_and_wait(job: tuple[str, int]) -> tuple[int, str]:  # here, so that it is sent as it is
        folder, i = job
        here = os.environ.get("SAESCOPE_HOST", "here")
        (Path(folder) / f"{here}.{i}.{os.getpid()}").touch()
        time.sleep(0.5)
        return i * i, here

    jobs = [(str(tmp_path), i) for i in range(4)]
    whole = dict(run_jobs(note_and_wait, jobs, engine="ray", shared=[tmp_path]))
    assert {i: r[0] for (_, i), r in whole.items()} == {0: 0, 1: 1, 2: 4, 3: 9}
    assert {where for _, where in whole.values()} == {"here", "b"}
    assert not list(tmp_path.glob(".saescope-*"))  # what the nodes were tried with

    jobs = [(str(tmp_path), 10 + i) for i in range(4)]
    thread = when(
        lambda: list(tmp_path.glob("b.1?.*")), lambda: cluster.remove_node(second, allow_graceful=False)
    )  # fmt: skip
    after = dict(run_jobs(note_and_wait, jobs, engine="ray", shared=[tmp_path]))
    thread.join()
    assert {i: r[0] for (_, i), r in after.items()} == {i: i * i for i in range(10, 14)}
    begun = {p.name.split(".")[1] for p in tmp_path.glob("b.1?.*")}
    assert begun & {p.name.split(".")[1] for p in tmp_path.glob("here.1?.*")}, "what the dead node had begun"


def test_a_node_without_the_results_folder_is_named_before_any_job(cluster, tiny_world, tmp_path):
    ray_door = [sys.executable, "-m", "ray.scripts.scripts", "start", f"--address={cluster.address}", "--num-cpus=1",
                '--resources={"blind": 1}', f"--object-store-memory={STORE_BYTES}", "--block"]  # fmt: skip
    shared = tmp_path / "results"
    shared.mkdir()
    apart = f'mount -t tmpfs none "{shared}" && exec "$0" "$@"'
    if subprocess.run(["unshare", "-m", "sh", "-c", f'mount -t tmpfs none "{shared}"'], capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    node = subprocess.Popen(
        ["unshare", "-m", "sh", "-c", apart, *ray_door], env={**os.environ, "SAESCOPE_HOST": "blind"},
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        _wait_for_the_blind(cluster)
        ran = tmp_path / "ran"
        with pytest.raises(ConfigError, match=f"does not see {shared}.*\n?.*one file system") as told:
            list(run_jobs(ran.write_text, ["x"], engine="ray", shared=[shared]))
        assert str(told.value).count("  node ") == 1 and not ran.exists()
        done = run_all(shared, tiny_world, *WAITS, "--engine", "ray")
        assert done.returncode == 2 and "does not see" in done.stderr, done.stderr[-2000:]
        assert not list(shared.iterdir()), "no stage was begun"
    finally:
        node.terminate()
        node.wait(60)


def _wait_for_the_blind(cluster: Any) -> None:
    """Until its node is up."""
    import ray

    ray.init(address=cluster.address, log_to_driver=False)
    try:
        deadline = time.monotonic() + 120
        while not any("blind" in n["Resources"] for n in ray.nodes()) and time.monotonic() < deadline:
            time.sleep(0.2)
        assert any("blind" in n["Resources"] for n in ray.nodes())
    finally:
        ray.shutdown()


def test_a_cluster_that_is_not_there_is_told(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with pytest.raises(ConfigError, match="no Ray cluster can be used at RAY_ADDRESS=127.0.0.1:1"):
        list(run_jobs(print, [1], engine="ray"))


# -- evals ------------------------------------------------------------------------------------------------------------
def run_all(root: Path, world: list[str], *more: str) -> subprocess.CompletedProcess[str]:
    python_path = os.pathsep.join(filter(None, (SUPPORT, os.environ.get("PYTHONPATH"))))
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": python_path}
    command = [sys.executable, "-m", "evals.run_all", "--root", str(root), *world, "--effect-windows", "0", *more]
    return subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT)


def rows_of(root: Path) -> dict[str, str]:
    """Of finished folders: what a killed process was writing goes when its artefact is next written."""
    return {
        str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in root.glob("rows/*/*/*/rows.jsonl") if ".tmp-" not in p.parent.name
    }  # fmt: skip


def places(folder: Path) -> set[str]:
    return {p.name.partition(".")[0] for p in folder.glob("places/*")}


def test_rows_of_a_cluster_are_those_of_one_process_though_a_node_dies(cluster, second, tiny_world, tmp_path):
    alone = tmp_path / "alone" / "results"
    done = run_all(alone, tiny_world, *WAITS)
    assert done.returncode == 0, done.stderr[-3000:]
    expected = rows_of(alone)
    assert len(expected) >= 8
    shared = tmp_path / "shared"
    root = Path(shutil.copytree(alone, shared / "results", ignore=lambda folder, names: {"rows"} & set(names)))
    thread = when(lambda: "b" in places(shared), lambda: cluster.remove_node(second, allow_graceful=False))
    done = run_all(root, tiny_world, *WAITS, "--engine", "ray", "--workers", "2")
    thread.join()
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert places(shared) == {"here", "b"}
    assert rows_of(root) == expected
    assert not json.loads((root / "run.json").read_text())["failures"]
    measured = len(list(shared.glob("places/*")))
    again = run_all(root, tiny_world, *WAITS, "--engine", "ray", "--workers", "2")
    assert again.returncode == 0 and rows_of(root) == expected
    assert len(list(shared.glob("places/*"))) == measured, "nothing is measured twice"


# -- explanations -----------------------------------------------------------------------------------------------------
def explain(root: Path, lm: Path, url: str, *more: str) -> int:
    from autointerp.__main__ import main

    common = ["--root", str(root), "--model", str(lm), "--client", "openai", "--llm", "m", "--base-url", url]
    more = ("--explainers", "highlighted,token_list", "--embedder", str(root / "embedder"), *more)
    return main(["explain", *common, *more])


def explanations(root: Path) -> list[bytes]:
    return [p.read_bytes() for p in sorted(root.glob("explanations/*/explanations.jsonl"))]


def test_explanations_of_a_cluster_are_those_of_one_process_though_a_node_dies(
    cluster, second, tiny_lm_dir, tmp_path, monkeypatch
):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    made = tmp_path / "made"
    make_root(made)
    alone = Path(shutil.copytree(made, tmp_path / "alone"))
    with ChatServer(answer) as server:
        assert explain(alone, tiny_lm_dir, server.url) == 0
        asked = len(server.bodies)
    shared = Path(shutil.copytree(made, tmp_path / "shared"))
    replies = shared / "replies.b.sqlite"

    def slowly(body: dict[str, Any], n: int) -> Any:
        time.sleep(0.3)
        return answer(body, n)

    def stored() -> bool:
        import sqlite3

        try:
            with sqlite3.connect(f"{replies.as_uri()}?mode=ro", uri=True) as file:
                return bool(file.execute("SELECT count(*) FROM replies").fetchone()[0])
        except sqlite3.Error:
            return False

    thread = when(stored, lambda: cluster.remove_node(second, allow_graceful=False))
    ray_more = ("--engine", "ray", "--workers", "2", "--part-latents", "2", "--concurrency", "1")
    with ChatServer(slowly) as server:
        assert explain(shared, tiny_lm_dir, server.url, *ray_more) == 0
        thread.join()
        assert explanations(shared) == explanations(alone) != []
        assert asked <= len(server.bodies) <= asked + 4, "of the part that died, at most what it had asked"
        assert sorted(p.name for p in shared.glob("replies*.sqlite")) == ["replies.sqlite"]
        before = len(server.bodies)
        assert explain(shared, tiny_lm_dir, server.url, *ray_more, "--force") == 0
        assert len(server.bodies) == before, "every reply is known"
    assert explanations(shared) == explanations(alone)
