"""`python -m autointerp explain` with vLLM engines in its own process; the environment is that of `make llm VLLM=1`.

On its own in a file and a process: it opens an engine, and there is memory for one.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from autointerp.doors import newest_artefact
from autointerp.exemplars import ExemplarTable

REPOSITORY = Path(__file__).parents[2]


@pytest.mark.llm
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="make llm VLLM=1 runs it where vLLM is")
def test_latents_are_explained_by_an_engine_of_the_door(tmp_path: Path) -> None:
    """In two parts, one engine for both; then once more, asking nothing."""
    results = REPOSITORY / os.environ.get("RESULTS", "results")
    saes = sorted((results / "saes").glob("smollm2*")) if (results / "latents").is_dir() else []
    if not saes:
        pytest.skip(f"{results} holds no finished run; make demo makes one")
    root = tmp_path / "results"
    for kind in ("saes", "latents", "exemplars", "tokens"):
        shutil.copytree(results / kind, root / kind)
    table = ExemplarTable.open(newest_artefact(root, "exemplars", saes[0].name))
    command = [
        sys.executable, "-m", "autointerp", "explain", "--root", str(root), "--sae", saes[0].name, "--client", "vllm",
        "--vllm", "max_model_len=2048", "--vllm", "gpu_memory_utilization=0.3", "--vllm", "enforce_eager=true",
        "--latents", ",".join(map(str, table.latents[:2])), "--part-latents", "1", "--embedder", "none",
        "--explainers", "highlighted,token_list",
    ]  # fmt: skip
    plan = subprocess.run([*command, "--dry-run"], capture_output=True, text=True, cwd=REPOSITORY)
    assert plan.returncode == 0 and "vllm: 1 engine on" in plan.stdout, plan.stderr
    for again in ([], ["--force"]):
        done = subprocess.run([*command, *again], capture_output=True, text=True, cwd=REPOSITORY)
        print(done.stdout)
        assert done.returncode == 0, done.stderr[-4000:]
        assert ("(0 sent now" in done.stdout) == bool(again)
