"""The main job takes every architecture: trained, explained, measured by all evaluations, none of them failing."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": ""}
NAMES = ("batchtopk", "matryoshka", "jumprelu", "gated", "groupmax")


def run(root: Path, world: list[str], *more: str) -> subprocess.CompletedProcess[str]:
    arguments = [sys.executable, "-m", "evals.run_all", "--root", str(root), *world, *more]
    return subprocess.run(arguments, capture_output=True, text=True, env=ENVIRONMENT)


@pytest.fixture(scope="module")
def finished(tiny_world: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("architectures")
    done = run(root, tiny_world, "--architectures", *NAMES)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return root


def test_every_evaluation_has_rows_of_every_architecture(finished: Path) -> None:
    rows = [json.loads(line) for p in finished.glob("rows/*/*/*/rows.jsonl") for line in p.read_text().splitlines()]
    measured = {(r["architecture"], r["eval"]) for r in rows}
    evaluations = {e for _, e in measured}
    assert len(evaluations) >= 6
    random_sae = {e for a, e in measured if a == "topk"}  # the floor is a TopK SAE of the first one's L0
    assert random_sae == evaluations
    for name in NAMES:
        assert {e for a, e in measured if a == name} == evaluations, name
    assert not json.loads((finished / "run.json").read_text())["failures"]


def test_calibrated_saes_have_the_l0_they_were_asked_for_on_other_text(finished: Path) -> None:
    assert set(NAMES) <= set(pd.read_csv(finished / "leaderboard.csv")["architecture"])
    rows = [json.loads(line) for p in finished.glob("rows/*/*/*/rows.jsonl") for line in p.read_text().splitlines()]
    found = {r["architecture"]: (r["value"], r["k"]) for r in rows if r["metric"] == "l0" and r["slice"] == ""}
    for name in ("batchtopk", "matryoshka"):
        l0, k = found[name]
        assert k == 4 and abs(l0 - k) <= 0.15 * k, (name, l0)


def test_transcoders_are_refused_before_any_work(tiny_world: list[str], tmp_path: Path) -> None:
    done = run(tmp_path, tiny_world, "--architectures", "transcoder", "topk")
    assert done.returncode == 2 and "for autoencoders" in done.stderr + done.stdout
    assert not (tmp_path / "activations").exists()
