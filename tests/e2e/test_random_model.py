"""`--random-model`: an SAE of the model with random weights is a floor of the same run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from evals.random_model import randomise
from sae.language_model import LanguageModel


def test_matrices_are_drawn_anew_with_their_own_spread_and_the_seed_alone(tiny_lm_dir: Path) -> None:
    real = LanguageModel.load(str(tiny_lm_dir), dtype="float32")
    first, again, other = (randomise(LanguageModel.load(str(tiny_lm_dir), dtype="float32"), s) for s in (0, 0, 1))
    for name, p in real.model.named_parameters():
        a, b, c = (dict(m.model.named_parameters())[name] for m in (first, again, other))
        assert torch.equal(a, b)
        if p.ndim < 2:
            assert torch.equal(a, p)
            continue
        assert not torch.equal(a, p) and not torch.equal(a, c)
        assert float(a.std()) == pytest.approx(float(p.std()), rel=0.1)
    assert len({m.revision for m in (real, first, other)}) == 3 and first.revision == again.revision
    ids = torch.randint(3, 259, (2, 8), generator=torch.Generator().manual_seed(0))
    assert not torch.allclose(real.logits(ids), first.logits(ids))


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_floor_stands_beside_the_saes(tiny_world: list[str], tmp_path: Path) -> None:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "evals.run_all", "--root", str(tmp_path), *tiny_world, "--architectures", "topk",
               "--effect-windows", "0", "--random-model", "--evals", "reconstruction", "explanation"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    rows = [json.loads(line) for p in tmp_path.glob("rows/*/*/*/rows.jsonl") for line in p.read_text().splitlines()]
    floor = [r for r in rows if r["sae_id"].startswith("baseline.random_lm.")]
    assert {r["eval"] for r in floor} == {"reconstruction", "explanation"}
    assert {r["kind"] for r in floor} == {"baseline"}
    assert len({(r["lm"], r["lm_revision"], r["hookpoint"]) for r in rows}) == 1  # it stands on the same board
    fvu = {r["sae_id"]: r["value"] for r in rows if r["metric"] == "fvu"}
    assert all(v is not None and v > 0 for v in fvu.values()) and len(fvu) >= 3
    assert "random_lm" in (tmp_path / "leaderboard.csv").read_text()
