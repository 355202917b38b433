"""``python -m sae bench``: what it tells its workers, what they answer, environments of other libraries, the file."""

import csv
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from planted_store import planted_store

from sae import bench_door, bench_envs, bench_ours, bench_worker, metrics
from sae.__main__ import main
from sae.errors import ArtefactError, ConfigError, DataError, SaescopeError


@dataclass
class DiskStore:
    """Planted activations as a file, every tenth token dropped, 25 tokens a document."""

    folder: Path
    x_ND: torch.Tensor
    key: str = "planted"

    def __post_init__(self) -> None:
        (self.folder / "acts_ND.bin").write_bytes(self.x_ND.numpy().tobytes())
        self.n_tokens, self.d_in = self.x_ND.shape
        self.kept_N = np.flatnonzero(np.arange(self.n_tokens) % 10 != 0)
        self.doc_of_N = np.arange(self.n_tokens) // 25
        self.manifest = {"config": {"store_dtype": "float32"}}

    def read(self, flat: Any) -> torch.Tensor:
        return self.x_ND[torch.from_numpy(np.asarray(flat))]


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DiskStore:
    monkeypatch.setattr(bench_door, "HELD_OUT_TOKENS", 300)
    return DiskStore(tmp_path, 3.0 * planted_store(n=3_048).x_ND[:2_048].contiguous())


SMALL = bench_door.BenchDoor(
    steps=12, turn=3, d_sae=48, k=3, batch_tokens=128, lr=5e-3, dead_tokens=512, threads=1, providers=()
)


def test_documents_held_out_are_not_trained_on(store: DiskStore, tmp_path: Path) -> None:
    spec = bench_door.specification(SMALL, store, tmp_path)
    with np.load(spec["order"]) as order:
        train, held, sample = order["train"], order["held_out"], order["sample"]
    assert train.shape == (12, 128) and len(held) >= 300
    trained = set(store.doc_of_N[np.concatenate([train.ravel(), sample])])
    assert not trained & set(store.doc_of_N[held]), "whole documents"
    assert set(train.ravel()) | set(held) <= set(store.kept_N), "the filter holds"
    once = train.ravel()[: len(store.kept_N) - len(held) - 127]
    assert len(set(once)) == len(once), "no token twice in a pass"
    lengths = (store.x_ND[torch.from_numpy(sample)] * spec["scale"]).norm(dim=1)
    assert float(lengths.mean()) == pytest.approx(store.d_in**0.5, rel=1e-5)
    again = bench_door.specification(SMALL, store, tmp_path)
    with np.load(again["order"]) as order:
        assert np.array_equal(order["train"], train), "the same order for every run of one seed"


def test_too_few_tokens_are_refused(store: DiskStore, tmp_path: Path) -> None:
    large = bench_door.BenchDoor(steps=12, turn=3, batch_tokens=2_000, threads=1)
    with pytest.raises(DataError, match="smaller --batch-tokens"):
        bench_door.specification(large, store, tmp_path)


@pytest.fixture
def spec(store: DiskStore, tmp_path: Path) -> dict[str, Any]:
    return bench_door.specification(SMALL, store, tmp_path) | {"trainer": "saescope"}


def test_ours_learns_and_its_fvu_is_that_of_the_metric(spec: dict[str, Any]) -> None:
    data = bench_worker.Data(spec)
    trainer = bench_worker.trainer_of(spec, data.read(data.sample_n))
    before = bench_worker.evaluate(trainer, data)
    found = bench_worker.train(trainer, data, 0, 12)
    after = bench_worker.evaluate(trainer, data)
    assert len(found["wall_s"]) == len(found["processor_s"]) == 12 and min(found["processor_s"]) > 0
    assert found["waited_s"] >= 0
    assert after["fvu"] < 0.9 * before["fvu"] and after["l0"] <= 3.0 and after["peak_mb"] > 10
    x_ND = data.read(data.held_n)
    assert after["fvu"] == pytest.approx(metrics.fvu(x_ND, trainer.reconstruct(x_ND)[0]), rel=1e-6)


def test_several_at_once_train_the_first_as_alone(spec: dict[str, Any]) -> None:
    data = bench_worker.Data(spec)
    made = []
    for options in ({}, {"n_saes": 3}):
        trainer = bench_worker.trainer_of(spec | options, data.read(data.sample_n))
        bench_worker.train(trainer, data, 0, 6)
        assert isinstance(trainer, bench_ours.Ours) and len(trainer.runs) == options.get("n_saes", 1)
        made.append(trainer.runs[0].sae.W_dec_FD.detach().clone())
    assert torch.equal(*made)


def test_the_floor_is_a_product_and_nothing_else(spec: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, ...]] = []
    real = bench_ours.ops.ops_cpu.product
    monkeypatch.setattr(bench_ours.ops.ops_cpu, "product", lambda *a: (calls.append(a[0].shape), real(*a)))
    data = bench_worker.Data(spec)
    product = bench_worker.trainer_of(spec | {"trainer": "product"}, data.read(data.sample_n))
    bench_worker.train(product, data, 0, 2)
    assert calls == [(128, spec["d_in"])] * 2
    with pytest.raises(ValueError, match="no trainer 'nobody'"):
        bench_worker.trainer_of(spec | {"trainer": "nobody"}, data.read(data.sample_n))


def test_the_worker_imports_nothing_of_ours_for_others() -> None:
    """It runs in environments where this package and its dependencies are not installed."""
    script = (
        "import importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('worker', {str(bench_door.WORKER)!r})\n"
        "module = importlib.util.module_from_spec(spec); spec.loader.exec_module(module)\n"
        "assert set(module.TRAINERS) == {'sparsify', 'dictionary_learning', 'saelens'}\n"
        "print([name for name in sys.modules if name.split('.')[0] in ('sae', 'tyro', 'rich', 'transformers')])"
    )
    done = subprocess.run([sys.executable, "-P", "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert set(bench_worker.TRAINERS) == {peer.name for peer in bench_envs.PEERS}


def test_a_worker_that_dies_says_why(spec: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(SaescopeError, match="no trainer 'nobody'"):
        bench_door.Worker("nobody", Path(sys.executable), spec | {"trainer": "nobody"}, tmp_path)


# -- environments -----------------------------------------------------------------------------------------------------
PEER = bench_envs.PEERS[0]


def test_torch_comes_first_and_what_is_ready_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[Sequence[str]] = []

    def run(command: Sequence[str], **_: Any) -> SimpleNamespace:
        commands.append(command)
        (tmp_path / PEER.name).mkdir(exist_ok=True)
        return SimpleNamespace(returncode=0, stdout="", stderr="")

    monkeypatch.setattr(bench_envs.subprocess, "run", run)
    assert not bench_envs.is_ready(PEER, tmp_path)
    python = bench_envs.ensure(PEER, tmp_path)
    assert python == tmp_path / PEER.name / "bin" / "python"
    said = [" ".join(command) for command in commands]
    assert "-m venv" in said[0] and all(str(python) in words for words in said[1:])
    assert said[1].endswith(bench_envs.TORCH) and said[2].endswith(f"eai-sparsify==1.3.3 {bench_envs.TORCH}")
    assert "uninstall" in said[3] and said[3].endswith("torchvision torchaudio torchcodec")
    assert said[4].endswith("import sparsify")
    bench_envs.ensure(PEER, tmp_path)
    assert len(commands) == 5, "made once"
    (tmp_path / PEER.name / bench_envs.MARK).write_text("eai-sparsify==1.0.0 torch==2.13.0\n")
    bench_envs.ensure(PEER, tmp_path)
    assert len(commands) == 10, "another version is another environment"


def test_a_failed_installation_is_told_and_not_taken_as_ready(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command: Sequence[str], **_: Any) -> SimpleNamespace:
        (tmp_path / PEER.name).mkdir(exist_ok=True)
        failed = "install" in command
        return SimpleNamespace(returncode=int(failed), stdout="", stderr="no route to host" if failed else "")

    monkeypatch.setattr(bench_envs.subprocess, "run", run)
    with pytest.raises(ArtefactError, match="no route to host"):
        bench_envs.ensure(PEER, tmp_path)
    assert not bench_envs.is_ready(PEER, tmp_path)


# -- the file and the door --------------------------------------------------------------------------------------------
def worker(name: str, wall: list[float], processor: list[float], waited: float, **options: Any) -> Any:
    figures = {"fvu": 0.25, "l0": 3.0, "n_dead": 0, "peak_mb": 100.0}
    spec = {"trainer": "saescope", "d_in": 16, **options}
    return SimpleNamespace(
        name=name, spec=spec, wall=wall, processor=processor, waited=waited, figures=figures,
        about={"version": "", "torch": "2"},
    )  # fmt: skip


def test_rows_are_medians_and_a_busy_machine_is_told() -> None:
    quiet = bench_door.row(worker("saescope", [0.1, 0.3, 0.2], [0.1, 0.1, 0.4], 0.0), SMALL, "key")
    assert (quiet["p50_ms"], quiet["tokens_per_s"], quiet["cpu_p50_ms"]) == (200.0, 640, 100.0)
    assert quiet["processor_use"] == 1.0 and quiet["got_share"] == 1.0 and quiet["counts"] == "yes"
    busy = bench_door.row(worker("other", [0.8, 0.8], [0.2, 0.2], 0.4), SMALL, "key")
    assert busy["got_share"] == 0.5 and busy["counts"] == "no: busy"
    many = bench_door.row(worker("8 at once", [0.8], [0.8], 0.0, n_saes=8), SMALL, "key")
    assert many["tokens_per_s"] == 8 * 128 / 0.8
    assert bench_door.ratios([quiet, busy, many], "saescope", "tokens_per_s") == {
        "saescope": 1.0, "other": pytest.approx(4.0), "8 at once": pytest.approx(0.5),
    }  # fmt: skip


def test_rows_are_appended_and_other_files_left_alone(tmp_path: Path) -> None:
    row = bench_door.row(worker("saescope", [0.1], [0.1], 0.0), SMALL, "key")
    path = tmp_path / "new" / "training.csv"
    bench_door.write([row], path)
    bench_door.write([row, row], path)
    with open(path, encoding="utf-8") as file:
        assert [found["provider"] for found in csv.DictReader(file)] == ["saescope"] * 3
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ConfigError, match="other columns"):
        bench_door.write([row], path)
    assert path.read_text() == "a,b\n1,2\n"


@pytest.mark.parametrize(("words", "message"), [(["--steps=3"], "two turns"), (["--many=1"], "at least 2")])
def test_wrong_options_end_before_work(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *words]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_the_door_alternates_its_workers(
    store: DiskStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench_door, "collected", lambda cfg: store)
    turns: list[tuple[str, int]] = []
    real = bench_door.Worker.turn
    monkeypatch.setattr(bench_door.Worker, "turn", lambda w, *a: (turns.append((w.name, a[0])), real(w, *a)))
    out = tmp_path / "training.csv"
    words = ["--steps=6", "--turn=2", "--d-sae=48", "--k=3", "--batch-tokens=128", "--threads=1", "--many=3"]
    assert main(["bench", *words, f"--output={out}"]) == 0
    names = [*bench_door.OURS, "saescope, 3 at once"]
    assert turns == [(name, first) for first in (0, 2, 4) for name in names]
    with open(out, encoding="utf-8") as file:
        rows = {row["provider"]: row for row in csv.DictReader(file)}
    assert list(rows) == names and all(row["timed_steps"] == "4" for row in rows.values())
    assert rows["product alone"]["fvu"] == "" and 0 < float(rows["saescope"]["fvu"]) < 1
    assert rows["saescope, 3 at once"]["fvu"] == rows["saescope"]["fvu"]
    assert "our speed over that of the row" in capsys.readouterr().out


def test_answers_are_lines_of_json(spec: dict[str, Any], tmp_path: Path) -> None:
    """The protocol itself, with our trainer as the other side."""
    found = bench_door.Worker("ours", Path(sys.executable), spec, tmp_path)
    try:
        found.turn(0, 2)
        assert not found.wall, "the first turn warms up"
        found.turn(2, 3)
        assert len(found.wall) == 3
        json.dumps(found.ask(do="evaluate"))
    finally:
        found.close()
    assert found.process.returncode == 0
