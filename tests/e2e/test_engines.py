"""`--engine` and `--workers`: the same rows from every engine; a failing job is told and the rest is done."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ENGINES = [
    pytest.param(("--engine", "local", "--workers", "2"), id="local-2"),
    pytest.param(("--engine", "ray", "--workers", "2"), id="ray"),
]
SUPPORT = str(Path(__file__).parent.parent / "support")
EVALS = ("--evals", "reconstruction", "downstream_loss", "probe_loss", "sparse_probing", "ablation_sparsity")


def run(root: Path, world: list[str], *more: str) -> subprocess.CompletedProcess[str]:
    python_path = os.pathsep.join(filter(None, (SUPPORT, os.environ.get("PYTHONPATH"))))
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": python_path}
    command = [sys.executable, "-m", "evals.run_all", "--root", str(root), *world, "--effect-windows", "0", *more]
    return subprocess.run(command, capture_output=True, text=True, env=env)


def rows_of(root: Path) -> dict[str, str]:
    return {
        str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest() for p in root.glob("rows/*/*/*/rows.jsonl")
    }


@pytest.fixture(scope="module")
def finished(tiny_world: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("engines") / "one"
    done = run(root, tiny_world, *EVALS)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert len(rows_of(root)) >= 15
    return root


def with_stages_alone(finished: Path, root: Path) -> Path:
    """A copy of a finished run without its rows, so that only the measuring is done again."""
    shutil.copytree(finished, root, ignore=lambda folder, names: {"rows"} & set(names))
    return root


def skip_without_ray(arguments: tuple[str, ...]) -> None:
    if "ray" in arguments:
        pytest.importorskip("ray")


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("arguments", ENGINES)
def test_engines_write_the_same_bytes(finished, tiny_world, tmp_path, arguments):
    skip_without_ray(arguments)
    root = with_stages_alone(finished, tmp_path / "copy")
    done = run(root, tiny_world, *EVALS, *arguments)
    assert done.returncode == 0, done.stderr[-3000:]
    assert rows_of(root) == rows_of(finished)
    log = json.loads((root / "run.json").read_text())
    assert not log["failures"]
    again = run(root, tiny_world, *EVALS)  # the other engine finds its rows, since the engine is no part of their key
    assert again.returncode == 0 and rows_of(root) == rows_of(finished)
    assert all(s["status"] == "reused" for s in json.loads((root / "run.json").read_text())["stages"]
               if s["name"].startswith("eval: "))


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("arguments", [pytest.param((), id="here"), *ENGINES])
def test_a_failed_job_is_told_and_the_rest_is_done(finished, tiny_world, tmp_path, arguments):
    skip_without_ray(arguments)
    root = with_stages_alone(finished, tmp_path / "copy")
    more = ("--evals", "reconstruction", "failing_eval:PLUGIN", "--eval-seeds", "0", "1")
    done = run(root, tiny_world, *arguments, *more)
    assert done.returncode == 1, done.stderr[-3000:]
    log = json.loads((root / "run.json").read_text())
    failed = [f for f in log["failures"]]
    assert len(failed) == 2 and {f["task"] for f in failed} == {"fails_on_relu"}  # one SAE, two seeds
    assert all("relu" in f["subject"] and "no relu here" in f["error"] for f in failed)
    rows = [json.loads(line) for p in root.glob("rows/*/*/*/rows.jsonl") for line in p.read_text().splitlines()]
    mine = [r for r in rows if r["eval"] == "fails_on_relu"]
    assert {(r["architecture"], r["seed"]) for r in mine} >= {("topk", 0), ("topk", 1)}
    assert {r["seed"] for r in rows if r["eval"] == "reconstruction"} == {0, 1}
    assert "no relu here" in done.stdout
