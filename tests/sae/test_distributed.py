"""Training on a mesh: names and sizes without processes; equality with one process on two ranks."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
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

from sae import checkpoint, distributed, distributed_door, optim, resume, sharded, train_door
from sae.__main__ import main
from sae.activations import ActivationStore, capture_activations
from sae.config import TokensConfig
from sae.distributed_cost import (
    MeshShape,
    candidates,
    check_divides,
    communication,
    communication_bytes,
    state_bytes_per_rank,
)
from sae.distributed_watch import Who
from sae.errors import ConfigError
from sae.language_model import LanguageModel
from sae.metric_log import read_log
from sae.tokens import build_tokens
from sae.train import train_many
from sae.train_run import run_folder

__all__ = ["float64"]

# -- names and sizes --------------------------------------------------------------------------------------------------
def test_a_mesh_is_named_by_its_axes() -> None:
    assert MeshShape.parse("data=2,latent=4") == MeshShape(2, 4) == MeshShape.parse(str(MeshShape(2, 4)))
    assert MeshShape.parse("latent=4") == MeshShape(1, 4) and MeshShape(2, 4).world == 8
    for wrong in ("", "2,2", "data=2,data=2", "data=0", "rows=2", "data=-1", "latent=2.5"):
        with pytest.raises(ConfigError, match="mesh"):
            MeshShape.parse(wrong)


@pytest.mark.parametrize(
    ("change", "shape", "words"),
    [
        ({"d_sae": 50}, MeshShape(1, 4), "d_sae 50 does not divide by the 4 ranks .*'latent'.* 48 or 52"),
        ({"batch_tokens": 130}, MeshShape(4, 1), "batch_tokens 130 .*'data'.* 128 or 132"),
        ({"encoder_dtype": "bfloat16"}, MeshShape(2, 1), "encoder_dtype bfloat16 is for one process"),
        ({"architecture": "transcoder"}, MeshShape(1, 2), "'transcoder' has no sharded training.*topk.*one process"),
    ],
)
def test_what_does_not_divide_is_refused(change: dict[str, Any], shape: MeshShape, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        check_divides(replace(TOPK, **change), shape)


def test_a_mesh_of_another_size_than_the_world_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(ConfigError, match=r"data=2,latent=2 has 4 ranks, 1 process runs.*--nproc-per-node 4"):
        with distributed.join(MeshShape(2, 2)):
            pass


def test_torchrun_without_a_mesh_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = train_door.TrainDoor()
    assert not distributed_door.wanted(cfg)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(ConfigError, match="4 processes.*--mesh data=4"):
        distributed_door.wanted(cfg)
    assert distributed_door.wanted(replace(cfg, mesh="data=4"))


def test_only_one_rank_says_what_all_met(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["train", "--mesh", "latent=7"]
    for rank, said in ((0, True), (3, False)):
        monkeypatch.setenv("RANK", str(rank))
        assert main(words) == 2
        assert ("does not divide by the 7 ranks" in capsys.readouterr().err) is said


def test_how_many_candidates_a_rank_sends() -> None:
    assert candidates(32, 1, 1_000) == 32 and candidates(32, 8, 1_000) == 16 and candidates(32, 64, 1_000) == 8
    assert candidates(32, 8, 10) == 10 and candidates(32, 8, 1_000, None) == 32 and candidates(5, 2, 1_000) == 5


def test_what_the_paper_size_sends_and_holds() -> None:
    """16 M latents, the widest of Gao et al., over a residual stream of (our guess) 12,288 channels."""
    big = replace(
        TOPK, d_sae=2**24, k=64, batch_tokens=131_072, train_tokens=2**30, aux_k=6_144, ema_decay=0.0, grad_clip=None
    )
    shape = MeshShape(4, 512)
    assert state_bytes_per_rank(big, 12_288, shape) == pytest.approx(16 * 2 * 2**24 * 12_288 / 512, rel=1e-3)
    rows = {row.what: row for row in communication(big, 12_288, shape)}
    tokens = 131_072 // 4
    assert rows["top-K values"].bytes == tokens * 8 * 4 and rows["reconstructions"].bytes == tokens * 12_288 * 4
    assert rows["gradients"].bytes == 4 * (2**24 // 512 * (2 * 12_288 + 1) + 12_288)
    total = communication_bytes(big, 12_288, shape)
    assert total == sum(row.wire_bytes(shape) for row in rows.values())
    assert communication_bytes(big, 12_288, shape, n_dead=2**20) > total
    assert communication(big, 12_288, MeshShape()) == []


def test_starting_rows_are_those_of_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharded, "ROWS_AT_ONCE", 16)
    for d_sae, width in ((96, 16), (80, 6), (48, 5), (36, 3)):  # the last does not divide into blocks of 16 numbers
        whole = optim.unit_rows(d_sae, width, 7)
        for rank in range(4):
            mesh = SimpleNamespace(shape=MeshShape(1, 4), latent_rank=rank, device="cpu")
            sae = SimpleNamespace(d_sae=d_sae, W_dec_FD=torch.empty(d_sae // 4, width))
            assert torch.equal(sharded.unit_rows(sae, 7, mesh), whole[rank::4])  # type: ignore[arg-type]


def test_a_process_that_ended_is_gone() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        me = Who.me()
        other = replace(me, pid=child.pid, started=_started(child.pid))
        assert not other.gone() and not me.gone()
        assert replace(other, started="1").gone(), "the number was given to another process"
        assert not replace(other, space="elsewhere", started="1").gone(), "it cannot be looked up from here"
        child.kill()
        child.wait()
        assert other.gone()


def _started(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]


def test_a_data_rank_reads_its_rows_alone(
    tiny_lm: LanguageModel, tiny_texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parts of all ranks, one after another, are the batches of one process."""
    cfg = TokensConfig(text=str(tiny_texts), context_tokens=32, train_tokens=32 * 21)
    tokens = build_tokens(tmp_path, cfg, tiny_lm.name, tiny_lm.tokenizer)["train"]
    store = capture_activations(tmp_path, tiny_lm, tokens, "layers.1", store_dtype="float32")
    whole = list(store.batches(64, seed=0, epochs=2, first=3))
    rows: list[int] = []
    real = ActivationStore.read
    monkeypatch.setattr(ActivationStore, "read", lambda self, flat: rows.append(len(flat)) or real(self, flat))
    parts = []
    for rank in range(4):
        share = distributed.Share(store.folder, store.manifest, store.tokens, slice(16 * rank, 16 * rank + 16))
        parts.append(list(share.batches(64, seed=0, epochs=2, first=3)))
    assert set(rows) == {16}
    for (x_ND, flat), *shares in zip(whole, *parts, strict=True):
        assert torch.equal(torch.cat([x for x, _ in shares]), x_ND)
        assert all((flat == named).all() for _, named in shares)


# -- equality ---------------------------------------------------------------------------------------------------------
@pytest.mark.usefixtures("float64")
def test_a_mesh_of_one_needs_no_process_group(tmp_path: Path) -> None:
    cfgs = [TOPK, BATCHTOPK, JUMPRELU]
    with distributed.join(MeshShape()) as team:
        assert not torch.distributed.is_initialized()
        found = distributed.train_sharded(tmp_path / "mesh", mesh_work.store(), cfgs, META, team)
    for folder, one in zip(found, train_many(tmp_path / "one", mesh_work.store(), cfgs, META), strict=True):
        assert folder.name == one.name and not run_folder(folder).exists()
        equal_saes(folder, one, 1e-7)
        equal_rows(folder / "train.jsonl", one / "train.jsonl", 1e-9)


SMALL = (
    "--tokens.context-tokens=32 --tokens.train-tokens=2048 --train.d-sae=64 --train.k=4 --train.batch-tokens=128 "
    "--train.train-tokens=1280 --train.aux-k=8 --train.dead-tokens=256"
).split()


def test_the_door_takes_a_mesh_of_one(
    tiny_lm_dir: Path, tiny_texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same options, SAEs of the same names and all but the same weights; a plan trains nothing."""
    words = ["train", f"--model={tiny_lm_dir}", f"--texts={tiny_texts}", *SMALL, "--hookpoint=layers.0,layers.1"]
    mesh = [*words, "--mesh=data=1,latent=1", f"--root={tmp_path / 'mesh'}"]
    assert main([*mesh, "--plan"]) == 0 and not (tmp_path / "mesh" / "saes").exists()
    assert "layers.1: expected on data=1,latent=1" in capsys.readouterr().out
    assert main(mesh) == 0 and "trained" in capsys.readouterr().out
    assert main([*words, f"--root={tmp_path / 'one'}"]) == 0
    found, expected = (sorted((tmp_path / root / "saes").iterdir()) for root in ("mesh", "one"))
    assert [f.name for f in found] == [f.name for f in expected] and len(found) == 2
    for folder, one in zip(found, expected, strict=True):
        equal_saes(folder, one, 1e-4)
        checkpoint.load(folder)
    made = [(folder / "manifest.json").stat().st_mtime_ns for folder in found]
    assert main(mesh) == 0
    assert made == [(folder / "manifest.json").stat().st_mtime_ns for folder in found], "complete SAEs stay"
    for wrong, said in (
        (["--stream.source=live"], "stored activations"), (["--stream.disk-gb=1e-6", "--force"], "--stream.disk-gb"),
        (["--distributed.capacity=0.5"], "capacity"), (["--mesh=data=2"], "--nproc-per-node 2"),
    ):  # fmt: skip
        assert main([*mesh, *wrong]) == 2 and said in capsys.readouterr().err


@pytest.mark.usefixtures("float64")
def test_two_latent_ranks_equal_one_process(tmp_path: Path) -> None:
    """Interrupted by a signal to one of them, gone on with in one process: every number is that of one process."""
    cfgs = [TOPK, BATCHTOPK]
    arguments = str(tmp_path / "mesh"), cfgs, "latent=2", {1: (11, "stop")}, {}, {}
    first = mesh_work.run(tmp_path / "out", 2, mesh_work.train, *arguments)
    assert [found["error"] for found in first] == ["TrainingInterrupted"] * 2
    assert "2 SAE(s) saved after step 12" in first[1]["text"]
    with pytest.raises(resume.TrainingInterrupted):
        train_many(tmp_path / "one", mesh_work.eventful((11, "stop")), cfgs, META)
    for cfg in cfgs:
        equal_steps(step_folder(tmp_path / "mesh", cfg, 12), step_folder(tmp_path / "one", cfg, 12), 1e-10)
    ends = [train_many(tmp_path / name, mesh_work.store(), cfgs, META) for name in ("mesh", "one")]
    for folder, one in zip(*ends, strict=True):
        equal_saes(folder, one, 1e-7)
        equal_rows(folder / "train.jsonl", one / "train.jsonl", 1e-9)
        dead = [row["n_dead"] for row in read_log(one / "train.jsonl")]
        assert max(dead[:11]) > TOPK.aux_k, "the auxiliary loss had to choose among dead latents"


def test_a_rank_that_is_killed_is_named(tmp_path: Path) -> None:
    ended = kill_one(tmp_path, "latent=2", victim=1)
    assert ended["codes"][0] not in (0, None) and ended["seconds"] < ENDS_WITHIN_S
    assert "rank 0 ends because rank 1 (process" in ended["text"][0]
    assert "is gone" in ended["text"][0] and "after step 6" in ended["text"][0]
    assert step_folder(tmp_path / "mesh", TOPK, 6).is_dir(), "the last good step stays"
