"""What the tests of a mesh look at, and how a rank of one is killed."""

import json
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import mesh_work
import pytest
import torch
from planted_store import META
from safetensors.torch import load_file

from sae import checkpoint, resume
from sae.config import TrainConfig
from sae.distributed_cost import MeshShape
from sae.metric_log import read_log
from sae.train import sae_id_of, train_key
from sae.train_run import run_folder

TOPK = TrainConfig(
    architecture="topk", d_sae=96, k=3, batch_tokens=128, train_tokens=128 * 20, lr=5e-3, lr_warmup_steps=2, aux_k=2,
    dead_tokens=128, seed=0, ema_decay=0.9, grad_clip=0.5,
)  # fmt: skip
BATCHTOPK, JUMPRELU = (replace(TOPK, architecture=name) for name in ("batchtopk", "jumprelu"))
ENDS_WITHIN_S = 30.0
"""After a kill, on a machine that may be busy; measured 3 to 11 s (decision 016)."""
CLOCK = ("seconds", "tokens_per_s", "mesh", "capacity_overflow")


@pytest.fixture
def float64() -> Iterator[None]:
    """Weights, gradients and saved steps in float64."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def equal_rows(found: Path, expected: Path, tolerance: float) -> None:
    """Logs agree: loss and its parts, FVU, L0, dead latents, learning rate and gradient norm of every row."""
    rows = [[{k: v for k, v in row.items() if k not in CLOCK} for row in read_log(f)] for f in (found, expected)]
    assert len(rows[0]) == len(rows[1]) > 0
    for row, want in zip(*rows, strict=True):
        row_error, wanted_error = row.pop("decoder_row_error"), want.pop("decoder_row_error")
        assert row_error == pytest.approx(wanted_error, rel=tolerance, abs=1e-6)
        assert row == pytest.approx(want, rel=tolerance, abs=tolerance)


def equal_saes(found: Path, expected: Path, tolerance: float) -> None:
    """Weights of two artefacts agree, relative to the largest of each tensor."""
    tensors, wanted = (load_file(folder / checkpoint.WEIGHTS) for folder in (found, expected))
    assert tensors.keys() == wanted.keys()
    for name, want in wanted.items():
        assert (tensors[name] - want).abs().max() <= tolerance * max(float(want.abs().max()), 1e-12), name


def step_folder(root: Path, cfg: TrainConfig, step: int) -> Path:
    key = train_key(cfg, mesh_work.store().key)
    return run_folder(root / "saes" / sae_id_of(cfg, META, key)) / f"step-{step}"


def equal_steps(found: Path, expected: Path, tolerance: float) -> None:
    """Two saved steps agree: weights, moments, average; counters of latents to the last bit."""
    tensors, wanted = (load_file(folder / resume.TENSORS) for folder in (found, expected))
    assert tensors.keys() == wanted.keys()
    for name, want in wanted.items():
        got = tensors[name]
        assert got.shape == want.shape and got.dtype == want.dtype, name
        if name.startswith("random."):
            continue
        if not want.is_floating_point():
            assert torch.equal(got, want), name
        else:
            assert (got - want).abs().max() <= tolerance * max(float(want.abs().max()), 1e-12), name
    plain, wanted_plain = (json.loads((folder / resume.STATE).read_text()) for folder in (found, expected))
    for name in ("tokens", "l0", "v_e", "v0", "input_rms_norm"):
        assert plain["counters"][name] == pytest.approx(wanted_plain["counters"][name], rel=tolerance), name


def kill_one(tmp_path: Path, mesh: str, victim: int, number: int = signal.SIGKILL, **limits: float) -> dict[str, Any]:
    """SIGKILL (or another signal) to one rank before its step 7, while the others wait for it in a collective."""
    world = MeshShape.parse(mesh).world
    events = {victim: (6, "wait")}
    work = mesh_work.train, str(tmp_path / "mesh"), [TOPK], mesh, events, limits, {"save_every": 3}
    ranks = mesh_work.begin(tmp_path / "out", world, *work)
    texts = [tmp_path / "out" / f"rank-{r}.txt" for r in range(world)]
    end = time.monotonic() + 90
    while not (texts[victim].exists() and "waiting" in texts[victim].read_text()):
        assert time.monotonic() < end, "\n".join(t.read_text() for t in texts if t.exists())
        time.sleep(0.05)
    time.sleep(1)
    begun = time.monotonic()
    os.kill(ranks[victim].pid, number)
    others = [rank for r, rank in enumerate(ranks) if r != victim]
    for rank in others:
        rank.join(60)
    seconds = time.monotonic() - begun
    codes = [rank.exitcode for rank in ranks]
    for rank in ranks:
        rank.kill()
    return {"codes": codes, "seconds": seconds, "text": [t.read_text() for t in texts]}
