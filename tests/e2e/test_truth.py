"""`--truth`: the main job scores its SAEs against a known dictionary, beside everything else."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from planted import planted, truth_of


def run(root: Path, world: list[str], *more: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "evals.run_all", "--root", str(root), *world, "--evals", "ground_truth",
               "--architectures", "topk", *more]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, env=env)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_saes_are_scored_against_a_known_dictionary(tiny_world: list[str], tmp_path: Path) -> None:
    truth = truth_of(planted(n=600, d=32, g=24)).save(tmp_path / "truth")
    done = run(tmp_path / "r", tiny_world, "--truth", str(truth))
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for p in (tmp_path / "r").glob("rows/*/ground_truth/*/rows.jsonl")
            for line in p.read_text().splitlines()]  # fmt: skip
    assert {r["architecture"] for r in rows if r["kind"] == "sae"} == {"topk"}
    assert all(0 <= r["value"] <= 1 for r in rows if r["metric"] == "mcc" and r["value"] is not None)
    without = run(tmp_path / "r", tiny_world)
    assert without.returncode == 2 and "no known dictionary; give --truth" in without.stderr
