"""`run_all --tasks` on a real pair of data sets: more tasks for sparse_probing, the other numbers as they were."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.assets, pytest.mark.slow, pytest.mark.timeout(900)]
EVALS = ("--evals", "probe_loss", "sparse_probing")
TASKS = ("--tasks", "headline_isiran", "temp_cat_Frequency", "world_country_Italy")


def run(root: Path, world: list[str], *more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "evals.run_all", "--root", str(root), *world, "--architectures", "topk",
               "--effect-windows", "0", *EVALS, *more]  # fmt: skip
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, capture_output=True, text=True, env=env)


def manifests(root: Path, evaluation: str) -> dict[str, dict]:
    """By key, of the trained SAE."""
    found = [json.loads(p.read_text()) for p in root.glob(f"rows/*topk*/{evaluation}/*/manifest.json")]
    return {m["key"]: m for m in found}


def test_more_tasks_enter_sparse_probing_alone(tiny_world, tmp_path):
    root = tmp_path / "results"
    assert run(root, tiny_world).returncode == 0
    before = {name: manifests(root, name) for name in ("probe_loss", "sparse_probing")}
    done = run(root, tiny_world, *TASKS)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert manifests(root, "probe_loss") == before["probe_loss"], "reused"
    both = manifests(root, "sparse_probing")
    (new,) = (m for key, m in both.items() if key not in before["sparse_probing"])
    (old,) = before["sparse_probing"].values()
    assert len(both) == 2 and old["counts"]["task_set"] != new["counts"]["task_set"]
    assert (old["counts"]["n_tasks"], new["counts"]["n_tasks"]) == (1, 3)
    assert new["counts"]["task_failures"] == {"temp_cat_Frequency": "too_few_rows"}
    rows = (root / "rows").glob(f"*topk*/sparse_probing/{new['key']}/rows.jsonl")
    by_slice = {(r["slice"], r["metric"]): r for p in rows for r in map(json.loads, p.read_text().splitlines())}
    italy = by_slice["task=world_country_Italy", "auc_k1"]
    assert 0 < italy["value"] < 1 and italy["n"] > 60
    assert by_slice["task=temp_cat_Frequency", "auc_k1"]["failure"] == "too_few_rows"
    noted = json.loads((root / "run.json").read_text())["notes"]["more_tasks"]
    assert noted["measured"] == ["headline_isiran", "world_country_Italy", "temp_cat_Frequency"]
    assert not noted["refused"] and not noted["seen"] and not noted["unknown"]
    again = run(root, tiny_world, *TASKS)
    assert again.returncode == 0 and manifests(root, "sparse_probing") == both
    for p in root.glob("rows/*/sparse_probing/*"):
        p.rename(tmp_path / f"{p.parent.parent.name}-{p.name}")
    assert run(root, tiny_world, *TASKS, "--workers", "2").returncode == 0
    remade = list(root.glob("rows/*/sparse_probing/*/rows.jsonl"))
    assert len(remade) >= 2
    for p in remade:
        first = tmp_path / f"{p.parents[2].name}-{p.parent.name}" / "rows.jsonl"
        assert p.read_bytes() == first.read_bytes()


def test_an_sae_trained_on_a_task_s_text_is_not_measured_on_it(tiny_world, tmp_path):
    """The text file has the name of a table of the package, as a user's copy of it would."""
    texts = tiny_world[tiny_world.index("--texts") + 1]
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "26_headline_isfrontpage.jsonl").write_text(Path(texts).read_text())
    world = [str(folder) if word == texts else word for word in tiny_world]
    root = tmp_path / "results"
    refused = run(root, world, *TASKS)
    assert refused.returncode == 2
    assert "headline_isiran (in 26_headline_isfrontpage)" in " ".join(refused.stderr.split())
    assert not (root / "activations").exists() and not (root / "rows").exists(), "before long work"
    allowed = run(root, world, *TASKS, "--allow-seen")
    assert allowed.returncode == 0, allowed.stderr[-3000:]
    (made,) = manifests(root, "sparse_probing").values()
    assert made["counts"]["seen"] == ["headline_isiran"]
    assert json.loads((root / "run.json").read_text())["notes"]["more_tasks"]["seen"] == ["headline_isiran"]
