"""The main job with everything on a GPU, beside the same on the CPU: two tiny runs, one after the other."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]


def rows_of(root: Path) -> dict[tuple[str, str, str], float | None]:
    """(architecture or baseline, evaluation, metric) -> value of the aggregates."""
    rows = [json.loads(line) for p in root.glob("rows/*/*/*/rows.jsonl") for line in p.read_text().splitlines()]
    return {(r["architecture"], r["eval"], r["metric"]): r["value"] for r in rows if r["slice"] == ""}


def run(root: Path, world: list[str], device: str) -> dict[tuple[str, str, str], float | None]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([".", "kernels", os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(
        [sys.executable, "-m", "evals.run_all", "--root", str(root), *world, "--device", device],
        capture_output=True, text=True, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return rows_of(root)


def test_a_run_on_the_gpu_gives_the_figures_of_the_cpu(tiny_world: list[str], tmp_path: Path) -> None:
    """Kernels and types differ (fused loss, bf16 operands), so figures agree and bits do not."""
    found, expected = run(tmp_path / "cuda", tiny_world, "cuda"), run(tmp_path / "cpu", tiny_world, "cpu")
    assert found.keys() == expected.keys()
    for key in found:
        assert (found[key] is None) == (expected[key] is None), key
    for architecture in ("topk", "relu"):
        for metric in ("fvu", "l0"):
            key = (architecture, "reconstruction", metric)
            assert found[key] == pytest.approx(expected[key], rel=0.1), key
