"""``run_all --sae`` with SAEs of several formats at once: imported, measured, and named by their origin."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import sae
from sae import checkpoint
from sae.base import SAE
from sae.config import InputNorm, SAEConfig
from sae.convert import convert
from sae.plugins import find

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": ""}


def run(root: Path, world: list[str], *more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "evals.run_all", "--root", str(root), *world, *more]
    return subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT)


def native(folder: Path, width: int) -> Path:
    """A random TopK SAE without norm, which every format can hold."""
    cfg = SAEConfig(
        architecture="topk", activation="topk", d_in=width, d_out=width, d_sae=64, k=4, apply_b_dec_to_input=True,
        input_norm=InputNorm(kind="none"), decoder_unit_norm=True, sae_id="mine", meta=None, train_tokens=0,
        train_steps=0, seed=0,
    )  # fmt: skip
    made = find("sae.architectures", "topk")(cfg)
    x_ND = torch.randn(256, width, generator=torch.Generator().manual_seed(0))
    made.initialise(x_ND, 0)
    checkpoint.save(made, folder, x_ND)
    return folder


def own_tensors(given: SAE, folder: Path) -> Path:
    """The same SAE as the tensors of a script."""
    made = sae.from_weights(
        given.W_enc_DF, given.W_dec_FD, b_enc=given.b_enc_F, b_dec=given.b_dec_D, architecture="topk", k=4,
        subtract_b_dec=True, lm="tiny", hookpoint="layers.1", context_tokens=48, name="by-hand",
    )  # fmt: skip
    return sae.save(made, folder)


@pytest.mark.slow
def test_a_mix_of_formats_is_evaluated_and_named(tiny_world: list[str], tmp_path: Path):
    mine = native(tmp_path / "mine", 32)
    convert(mine, tmp_path / "saelens", "saelens")
    convert(mine, tmp_path / "layers.1", "sparsify")
    own_tensors(checkpoint.load(mine), tmp_path / "own")
    folders = [str(tmp_path / name) for name in ("saelens", "layers.1", "own")]
    given = ["--sae", *folders, "--evals", "reconstruction"]
    silent = run(tmp_path / "root", tiny_world, *given)
    assert silent.returncode == 2 and "give --hookpoint" in silent.stderr and "Traceback" not in silent.stderr
    done = run(tmp_path / "root", tiny_world, *given, "--hookpoint", "layers.1")
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [
        json.loads(line)
        for path in (tmp_path / "root").glob("rows/*/reconstruction/*/rows.jsonl")
        for line in path.read_text().splitlines()
    ]
    fvu = {r["sae_id"]: r["value"] for r in rows if r["metric"] == "fvu" and r["slice"] == ""}
    names = ("saelens.", "sparsify.", "by-hand.")
    a, b, c = (next(v for k, v in fvu.items() if k.startswith(name)) for name in names)
    assert a == pytest.approx(b, rel=1e-5) and a == pytest.approx(c, rel=1e-5), "one SAE in two formats and as tensors"
    board = (tmp_path / "root" / "leaderboard.csv").read_text()
    assert "saelens." in board and "sparsify." in board
    log = json.loads((tmp_path / "root" / "run.json").read_text())
    assert log["config"]["tokens"]["context_tokens"] == 48 and "rows have 48 tokens instead of 64" in done.stderr
    notes = log["notes"]["recipes"]
    assert {name.split(".")[0] for name in notes} == {"saelens", "sparsify", "by-hand"}, "each was tried"
    assert all("FVU" in text for text in notes.values())


def write_transcoder(folder: Path, width: int) -> Path:
    """A sparsify skip transcoder of an MLP, with the run's own config.json above it."""
    g = torch.Generator().manual_seed(0)
    folder.mkdir(parents=True)
    shapes = {"encoder.weight": (64, width), "W_dec": (64, width), "W_skip": (width, width)}
    made = {name: 0.1 * torch.randn(shape, generator=g) for name, shape in shapes.items()}
    save_file({**made, "encoder.bias": torch.zeros(64), "b_dec": torch.zeros(width)}, folder / "sae.safetensors")
    cfg = {"activation": "topk", "expansion_factor": 2, "normalize_decoder": True, "num_latents": 64, "k": 4,
           "multi_topk": False, "skip_connection": True, "transcode": True, "d_in": width}  # fmt: skip
    (folder / "cfg.json").write_text(json.dumps(cfg))
    (folder.parent / "config.json").write_text(json.dumps({"model": "tiny", "ctx_len": 32}))
    return folder


@pytest.mark.slow
def test_a_transcoder_is_evaluated_as_one(tiny_world: list[str], tmp_path: Path):
    """Against its target, and by its latents; what reconstructs the input leaves it to the floors, and says so."""
    given = ["--sae", str(write_transcoder(tmp_path / "run" / "layers.1.mlp", 32))]
    done = run(tmp_path / "root", tiny_world, *given, "--evals", "transcoding", "reconstruction", "n2g")
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for path in (tmp_path / "root").glob("rows/sparsify.*/*/*/rows.jsonl")
            for line in path.read_text().splitlines()]  # fmt: skip
    assert {r["eval"] for r in rows} == {"transcoding", "n2g"} and {r["hookpoint"] for r in rows} == {"layers.1.mlp:in"}
    found = {r["metric"]: r["value"] for r in rows if r["eval"] == "transcoding"}
    assert found["target_fvu"] > 0 and 0 < found["l0"] <= 4
    assert "transcoding" in (tmp_path / "root" / "leaderboard.csv").read_text()
    pushed = run(tmp_path / "root", tiny_world, *given, "--evals", "transcoding", "--interp.scorers", "intervention")
    assert pushed.returncode == 2 and "pushes what an SAE reads" in pushed.stderr
