"""Two and four processes: every split equals one process, goes on on another mesh, and ends when a rank is lost."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import mesh_work
import pytest
import torch
from mesh_checks import (
    BATCHTOPK,
    ENDS_WITHIN_S,
    JUMPRELU,
    TOPK,
    equal_rows,
    equal_saes,
    equal_steps,
    float64,
    kill_one,
    step_folder,
)
from planted_store import META

from sae import checkpoint, ops, resume
from sae.distributed_cost import MeshShape, communication
from sae.manifest import read_manifest
from sae.metric_log import read_log
from sae.ops_above import largest_mask
from sae.train import train_many

pytestmark = pytest.mark.slow


def more(*values: Any) -> Any:
    """A further case of a test whose first cases CI runs; ``make mesh`` runs all."""
    return pytest.param(*values, marks=pytest.mark.mesh)


__all__ = ["float64"]
EVERY = [
    TOPK, BATCHTOPK, JUMPRELU, replace(TOPK, multi_topk=True),
    replace(TOPK, architecture="relu", l1=0.05), replace(TOPK, architecture="relu", l1=0.05, l1_decoder_norm=True),
    replace(TOPK, architecture="matryoshka"), replace(TOPK, architecture="gated", gate_l1=0.1),
    replace(TOPK, k=30, aux_k=1_000), replace(TOPK, k=24, multi_topk=True, ema_decay=0.0, grad_clip=None),
    replace(TOPK, input_norm="none", lr_law="sqrt_width"), replace(BATCHTOPK, input_norm="dataset_rms"),
]  # fmt: skip
"""k 30 is more than the 24 latents of a rank of four, and 4 k is all latents where k is 24."""
RESHARD = [
    ("data=2,latent=2", "latent=4"), more("latent=4", "data=2"), more("data=4", "data=2,latent=2"), ("data=2", ""),
]  # fmt: skip


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    """One process: a root whose runs stopped after the first step, one after step 18; and the SAEs."""
    torch.set_default_dtype(torch.float64)
    root = tmp_path_factory.mktemp("one")
    for step in (1, 18):
        with pytest.raises(resume.TrainingInterrupted):
            train_many(root / f"step-{step}", mesh_work.eventful((step - 1, "stop")), EVERY, META)
    found = train_many(root / "whole", mesh_work.store(), EVERY, META)
    torch.set_default_dtype(torch.float32)
    return root, found


@pytest.mark.timeout(1_200)
@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(("mesh", "other"), RESHARD)
def test_every_split_equals_one_process(mesh: str, other: str, one: tuple[Path, list[Path]], tmp_path: Path) -> None:
    """Gradients (the first moments after one step), weights, averages and counters after 18 steps, the loss curve, and
    the SAEs, whose last steps another mesh takes. All ranks are stopped by a signal to the last of them."""
    whole_root, whole = one
    world, root = MeshShape.parse(mesh).world, tmp_path / "mesh"
    for step in (1, 18):
        events = {world - 1: (step - 1, "stop")}
        done = mesh_work.run(tmp_path / f"{step}", world, mesh_work.train, str(root), EVERY, mesh, events, {}, {})
        assert [found["error"] for found in done] == ["TrainingInterrupted"] * world
        for cfg in EVERY:
            expected = step_folder(whole_root / f"step-{step}", cfg, step)
            equal_steps(step_folder(root, cfg, step), expected, 1e-9)
    if other:
        arguments = str(root), EVERY, other, {}, {}, {}
        done = mesh_work.run(tmp_path / "rest", MeshShape.parse(other).world, mesh_work.train, *arguments)
        folders = [Path(folder) for folder in done[-1]["folders"]]
    else:
        folders = train_many(root, mesh_work.store(), EVERY, META)
    for folder, expected in zip(folders, whole, strict=True):
        assert folder.name == expected.name
        equal_saes(folder, expected, 1e-7)
        equal_rows(folder / "train.jsonl", expected / "train.jsonl", 1e-8)
    for cfg, expected in zip(EVERY, whole, strict=True):
        dead = [row["n_dead"] for row in read_log(expected / "train.jsonl")]
        assert max(dead) > cfg.aux_k or cfg.k != TOPK.k, f"{cfg.architecture}: AuxK had nothing to choose"


def test_float32_stays_within_rounding(tmp_path: Path) -> None:
    """As users run it; 20 steps leave differences of rounding, unless a near-tie falls otherwise."""
    cfgs = [TOPK, replace(TOPK, architecture="relu", l1=0.05)]
    arguments = str(tmp_path / "mesh"), cfgs, "data=2,latent=2", {}, {}, {}
    done = mesh_work.run(tmp_path / "out", 4, mesh_work.train_float32, *arguments)
    for folder, expected in zip(done[0]["folders"], train_many(tmp_path, mesh_work.store(), cfgs, META), strict=True):
        equal_saes(Path(folder), expected, 1e-4)
        equal_rows(Path(folder) / "train.jsonl", expected / "train.jsonl", 1e-4)
        checkpoint.load(folder)


@pytest.mark.parametrize("mesh", ["latent=2", more("data=2")])
def test_the_same_mesh_goes_on_bit_for_bit(mesh: str, tmp_path: Path) -> None:
    cfgs, files = [TOPK, BATCHTOPK], (checkpoint.WEIGHTS, checkpoint.CFG, checkpoint.REFERENCE)
    found = []
    for name, events in (("whole", []), ("broken", [{0: (7, "stop")}])):
        for i, event in enumerate([*events, {}]):
            arguments = str(tmp_path / name), cfgs, mesh, event, {}, {}
            done = mesh_work.run(tmp_path / f"out-{name}-{i}", 2, mesh_work.train, *arguments)
        found.append([[(Path(f) / file).read_bytes() for file in files] for f in done[0]["folders"]])
    assert found[0] == found[1]


# -- selection --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("mesh", ["data=2,latent=2", more("latent=2"), more("latent=4"), more("data=2")])
def test_the_largest_are_those_of_one_process(mesh: str, tmp_path: Path) -> None:
    shape = MeshShape.parse(mesh)
    parts = mesh_work.run(tmp_path, shape.world, mesh_work.select, mesh)
    h_NF = parts[0]["h_NF"]
    for k in (1, 3, 7, 20):
        latents = ops.topk(h_NF, k)
        wanted = ops.to_dense(ops.SparseLatents((latents.values_NK > 0).double(), latents.indices_NK), 24) > 0
        assert torch.equal(torch.stack([part[f"token {k}"] for part in parts]).any(0), wanted)
        assert all(part[f"overflow {k}"] == 0 for part in parts)
    positive = (h_NF > 0).view(-1).nonzero().squeeze(1)
    for name, count in (("few", 20), ("some", 150), ("all", 10_000)):
        keep, theta = largest_mask(h_NF.view(-1)[positive], count)
        for kind in (torch.float64, torch.float32):
            places = torch.cat([part[f"batch {name} {kind}"] for part in parts]).sort().values
            assert torch.equal(places, positive[keep])
            assert {part[f"theta {name} {kind}"] for part in parts} == {theta}
    assert sum(part["nan"] for part in parts) == min(3, shape.world), "NaN counts as larger than any number"


def test_what_a_rank_held_back_is_counted(tmp_path: Path) -> None:
    """16 of 64 latents, all on rank 0 of 2: with capacity 1 it may send 8."""
    first, second = mesh_work.run(tmp_path, 2, mesh_work.overflow, "latent=2")
    assert first["1.0"] == (5, 5 * 8) and second["1.0"] == (5, 5 * 8)
    assert first["None"] == (0, 5 * 16) and second["None"] == (0, 0)


@pytest.mark.parametrize("capacity", [4.0, more(None)])
@pytest.mark.parametrize(
    "change", [{}, more({"architecture": "batchtopk"}), more({"architecture": "jumprelu"}),
               more({"architecture": "matryoshka"}), {"architecture": "relu"}, more({"architecture": "gated"}),
               more({"multi_topk": True})],
)  # fmt: skip
def test_what_is_sent_is_what_was_said(change: dict[str, Any], capacity: float | None, tmp_path: Path) -> None:
    """Bytes of every step's collectives, with and without dead latents; replicas stay equal to the last bit."""
    cfg = replace(TOPK, train_tokens=128 * 60, grad_clip=None, ema_decay=0.0, aux_k=2, k=12, **change)
    shape = MeshShape(2, 2)
    ranks = mesh_work.run(tmp_path, 4, mesh_work.measure, cfg, str(shape), capacity)
    compared: list[bool] = []
    for row in ranks[0]:
        if row["logged"]:
            continue
        expected: dict[str, int] = {}
        for line in communication(cfg, 16, shape, capacity=capacity, n_dead=row["n_dead"]):
            name = f"{line.kind} {line.axis}"
            expected[name] = expected.get(name, 0) + line.bytes
        if cfg.architecture in ("batchtopk", "matryoshka"):  # each more try of a lower bar counts its candidates
            assert row["moved"]["reduce world"] - expected["reduce world"] in (0, 8, 16)
            row["moved"]["reduce world"] = expected["reduce world"]
        assert {k: v for k, v in row["moved"].items() if v} == expected
        compared.append(row["n_dead"] > 0)
    assert any(compared)
    assert len({rank[-1]["b_dec"].numpy().tobytes() for rank in ranks}) == 1
    for a, b in ((0, 2), (1, 3)):
        assert torch.equal(ranks[a][-1]["W_dec"], ranks[b][-1]["W_dec"])


# -- what goes wrong --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("mesh", "victim"), [("data=2,latent=2", 3), more("data=2,latent=2", 0), ("latent=2", 0)])
def test_whoever_is_killed_is_named(mesh: str, victim: int, tmp_path: Path) -> None:
    """Rank 0 keeps the store of the process group here; its death is noticed all the same."""
    ended = kill_one(tmp_path, mesh, victim)
    assert ended["seconds"] < ENDS_WITHIN_S
    for rank, (code, text) in enumerate(zip(ended["codes"], ended["text"], strict=True)):
        if rank != victim:
            assert code not in (0, None) and f"rank {rank} ends because rank {victim} (process" in text, text


def test_one_that_is_silent_is_named(tmp_path: Path) -> None:
    ended = kill_one(tmp_path, "latent=2", 1, signal.SIGSTOP, silent_s=3.0)
    assert ended["codes"][0] not in (0, None) and ended["seconds"] < 3 + ENDS_WITHIN_S
    assert "rank 0 ends because rank 1" in ended["text"][0] and "silent for 3 s after step 6" in ended["text"][0]


def failing(tmp_path: Path, event: tuple[int, str], **limits: float) -> list[str]:
    """Output of two ranks of which the second meets an event."""
    work = mesh_work.train, str(tmp_path / "mesh"), [TOPK], "latent=2", {1: event}, limits, {}
    ranks = mesh_work.begin(tmp_path / "out", 2, *work)
    ranks[0].join(60)
    assert ranks[0].exitcode not in (0, None)
    ranks[1].join(0.1 if event[1] == "wait" else 30)
    for rank in ranks:
        rank.kill()
    return [(tmp_path / "out" / f"rank-{r}.txt").read_text() for r in range(2)]


def test_an_error_of_one_rank_ends_all(tmp_path: Path) -> None:
    first, second = failing(tmp_path, (5, "fail"))
    assert "rank 1 (process" in first and "ended with an error: ZeroDivisionError: as planned" in first
    assert "ZeroDivisionError: as planned" in second


def test_one_that_does_not_come_is_named_by_its_step(tmp_path: Path) -> None:
    first, _ = failing(tmp_path, (5, "wait"), timeout_s=4.0)
    assert "all ranks are alive (rank 1 at step 5; this rank at step 5)" in first


def test_steps_of_another_configuration_are_refused_by_all(tmp_path: Path) -> None:
    arguments = str(tmp_path / "mesh"), [TOPK], "data=2"
    mesh_work.run(tmp_path / "out", 2, mesh_work.train, *arguments, {0: (5, "stop")}, {}, {})
    other = replace(TOPK, lr=1e-3)
    step_folder(tmp_path / "mesh", TOPK, 6).parent.rename(step_folder(tmp_path / "mesh", other, 6).parent)
    done = mesh_work.run(tmp_path / "again", 2, mesh_work.train, str(tmp_path / "mesh"), [other], "data=2", {}, {}, {})
    assert [found["error"] for found in done] == ["StaleArtefact", "Told"]
    assert all("belongs to another training" in found["text"] for found in done)


def test_broken_activations_are_named_by_all(tmp_path: Path) -> None:
    events = {rank: (9, "nan") for rank in range(2)}
    arguments = str(tmp_path / "mesh"), [TOPK, BATCHTOPK], "data=2", events, {}, {"save_every": 4}
    done = mesh_work.run(tmp_path / "out", 2, mesh_work.train, *arguments)
    batches = mesh_work.store().batches(128, seed=0, epochs=1)
    flat = [flat for _, flat in zip(range(10), batches, strict=False)][9][1]
    for found in done:
        assert found["error"] == "DataError" and f"(flat index {flat[-1]})" in found["text"]
        assert "1 of 128 tokens in the batch of step 10" in found["text"]
    assert step_folder(tmp_path / "mesh", TOPK, 8).is_dir()


def test_a_full_disk_ends_all_and_leaves_the_last_good_step(tmp_path: Path) -> None:
    done = mesh_work.run(tmp_path / "out", 2, mesh_work.full_disk, str(tmp_path / "mesh"), [TOPK], "latent=2")
    assert [found["error"] for found in done] == ["ArtefactError", "Told"]
    assert all("disk is full" in found["text"] for found in done)
    names = sorted(path.name for path in step_folder(tmp_path / "mesh", TOPK, 3).parent.iterdir())
    assert names == ["step-3", "train.jsonl"]


# -- the door ---------------------------------------------------------------------------------------------------------
SMALL = (
    "--tokens.context-tokens=32 --tokens.train-tokens=4096 --train.d-sae=64 --train.k=4 --train.batch-tokens=128 "
    "--train.train-tokens=2560 --train.aux-k=8 --train.dead-tokens=256 --hookpoint=layers.1"
).split()
LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=4", "-m", "sae", "train"]


def launched(words: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    own = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    found = own | {"OMP_NUM_THREADS": "1"} | environment
    return subprocess.run(words, capture_output=True, text=True, timeout=240, env=found)


@pytest.mark.timeout(900)
def test_torchrun_trains_what_one_process_trains(tiny_lm_dir: Path, tiny_texts: Path, tmp_path: Path) -> None:
    words = [f"--model={tiny_lm_dir}", f"--texts={tiny_texts}", *SMALL, "--grid", "architecture=topk,relu"]
    alone = launched([sys.executable, "-m", "sae", "train", *words, f"--root={tmp_path / 'one'}"])
    assert alone.returncode == 0, alone.stderr
    many = launched([*LAUNCH, "--mesh=data=2,latent=2", *words, f"--root={tmp_path / 'mesh'}"])
    assert many.returncode == 0, many.stdout + many.stderr
    for said in ("trained (figures", "layers.1: expected on data=2,latent=2"):
        assert many.stdout.count(said) == 1
    names = [sorted(path.name for path in (tmp_path / root / "saes").iterdir()) for root in ("one", "mesh")]
    assert names[0] == names[1] and len(names[0]) == 2
    for name in names[0]:
        expected, found = (tmp_path / root / "saes" / name for root in ("one", "mesh"))
        equal_saes(found, expected, 1e-4)
        equal_rows(found / "train.jsonl", expected / "train.jsonl", 1e-4)
        assert read_manifest(found)["counts"]["mesh"] == "data=2,latent=2"
        checkpoint.load(found)
    wrong = launched([*LAUNCH, "--mesh=data=2", *words, f"--root={tmp_path / 'wrong'}"])
    assert wrong.returncode != 0 and wrong.stderr.count("error: the mesh data=2,latent=1 has 2 ranks, 4") == 1


@pytest.mark.timeout(900)
def test_torchrun_ends_and_names_a_killed_rank(tiny_lm_dir: Path, tiny_texts: Path, tmp_path: Path) -> None:
    words = [f"--model={tiny_lm_dir}", f"--texts={tiny_texts}", *SMALL, "--train.train-tokens=64000000"]
    own = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")} | {"OMP_NUM_THREADS": "1"}
    command = [*LAUNCH, "--mesh=data=2,latent=2", *words, f"--root={tmp_path}", "--save-every-s=1"]
    output = tmp_path / "output.txt"
    with open(output, "w", encoding="utf-8") as file:
        agent = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=own)
    try:
        end = time.monotonic() + 120
        while not list(tmp_path.glob("saes/*.run/step-*/manifest.json")):
            assert time.monotonic() < end and agent.poll() is None, output.read_text()
            time.sleep(0.2)
        victim = next(pid for pid in children(agent.pid) if environment(pid).get("RANK") == "2")
        os.kill(victim, signal.SIGKILL)
        begun = time.monotonic()
        assert agent.wait(timeout=60) != 0
        assert time.monotonic() - begun < ENDS_WITHIN_S
    finally:
        agent.kill()
    text = output.read_text()
    for rank in (0, 1, 3):
        assert f"error: rank {rank} ends because rank 2 (process {victim} on" in text, text
    assert list(tmp_path.glob("saes/*.run/step-*/manifest.json"))


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def environment(pid: int) -> dict[str, str]:
    words = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
    return dict(word.split("=", 1) for word in words if "=" in word)

