"""Training that is interrupted in every way ends with the bytes of training that was not."""

import errno
import json
import multiprocessing
import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import killable
import numpy as np
import pytest
import torch
from planted_store import META, PlantedStore, planted_store

from sae import checkpoint, manifest, optim, resume, train_run
from sae.config import TrainConfig
from sae.errors import ArtefactError, DataError, StaleArtefact
from sae.lagged import Lagged
from sae.metric_log import read_log
from sae.row_adam import RowAdam
from sae.train import TrainingDiverged, sae_id_of, train_key, train_many
from sae.train_run import Run, run_folder, start

TOPK = TrainConfig(
    architecture="topk", d_sae=48, k=3, batch_tokens=128, train_tokens=128 * 40, lr=5e-3, lr_warmup_steps=2, aux_k=8,
    dead_tokens=512, seed=0, ema_decay=0.9, grad_clip=0.5,
)  # fmt: skip
RELU = replace(TOPK, architecture="relu", l1=0.05, seed=1, train_tokens=128 * 25, ema_decay=0.0)
FILES = (checkpoint.WEIGHTS, checkpoint.CFG, checkpoint.REFERENCE)


class Signalling(PlantedStore):
    """Sends a signal to this very process before it hands out some batch; with NaN, breaks that batch instead."""

    at: int
    number: int | None = signal.SIGTERM
    times: int = 1

    def batches(self, batch_tokens: int, *, seed: int, epochs: int, first: int = 0) -> Iterator[tuple[Any, Any]]:
        stream = super().batches(batch_tokens, seed=seed, epochs=epochs, first=first)
        for index, (x_ND, flat) in enumerate(stream, first):
            if index == self.at:
                for _ in range(self.times if self.number is not None else 0):
                    os.kill(os.getpid(), self.number)
                if self.number is None:
                    x_ND = x_ND.clone()
                    x_ND[7, 3] = float("inf")
            yield x_ND, flat


def signalling(at: int, number: int | None = signal.SIGTERM, times: int = 1) -> Signalling:
    found = Signalling(killable.store().x_ND, killable.store().key)
    found.at, found.number, found.times = at, number, times
    return found


def folder_of(root: Path, cfg: TrainConfig) -> Path:
    key = train_key(cfg, killable.store().key)
    return root / "saes" / sae_id_of(cfg, META, key)


def contents(folder: Path) -> list[Any]:
    clock = ("seconds", "tokens_per_s")
    rows = [{k: v for k, v in row.items() if k not in clock} for row in read_log(folder / "train.jsonl")]
    return [*((folder / name).read_bytes() for name in FILES), rows]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> list[list[Any]]:
    """Files and logs of the two SAEs, trained without a break."""
    folders = train_many(tmp_path_factory.mktemp("whole"), killable.store(), [TOPK, RELU], META)
    return [contents(folder) for folder in folders]


def interrupted(root: Path, cfgs: list[TrainConfig], at: int, number: int = signal.SIGTERM) -> None:
    with pytest.raises(resume.TrainingInterrupted, match=f"after step {at + 1}"):
        train_many(root, signalling(at, number), cfgs, META)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_rest_is_bit_for_bit(number: int, whole: list[list[Any]], tmp_path: Path) -> None:
    before = signal.getsignal(number)
    interrupted(tmp_path, [TOPK, RELU], 19, number)
    assert signal.getsignal(number) is before, "handlers are put back"
    steps = sorted(path.name for path in run_folder(folder_of(tmp_path, TOPK)).iterdir())
    assert steps == ["step-20", "train.jsonl"]
    folders = train_many(tmp_path, killable.store(), [TOPK, RELU], META)
    assert [contents(folder) for folder in folders] == whole
    assert not run_folder(folders[0]).exists()


@pytest.mark.parametrize("ema", [0.0, 0.9])
@pytest.mark.parametrize("architecture", ["batchtopk", "matryoshka", "jumprelu", "gated"])
def test_every_architecture_goes_on_bit_for_bit(architecture: str, ema: float, tmp_path: Path) -> None:
    cfg = replace(TOPK, architecture=architecture, ema_decay=ema)
    (whole,) = train_many(tmp_path / "whole", killable.store(), [cfg], META)
    interrupted(tmp_path, [cfg], 17)
    (folder,) = train_many(tmp_path, killable.store(), [cfg], META)
    assert contents(folder) == contents(whole)


class Paired(Signalling):
    """Targets are a linear map of the inputs, one channel narrower."""

    def read_target(self, flat: Any) -> torch.Tensor:
        mix = torch.randn(16, 15, generator=torch.Generator().manual_seed(3))
        return self.read(flat).relu() @ mix


@pytest.mark.parametrize("architecture", ["transcoder", "skip_transcoder"])
def test_transcoders_go_on_bit_for_bit(architecture: str, tmp_path: Path) -> None:
    cfg = replace(TOPK, architecture=architecture, ema_decay=0.0, input_norm="dataset_rms")
    store = Paired(killable.store().x_ND, killable.store().key)
    store.at = -1
    (whole,) = train_many(tmp_path / "whole", store, [cfg], META)
    store.at = 17
    with pytest.raises(resume.TrainingInterrupted, match="after step 18"):
        train_many(tmp_path, store, [cfg], META)
    state = run_folder(folder_of(tmp_path, cfg)) / "step-18" / resume.TENSORS
    assert state.stat().st_size < 60_000, "no batch is part of a saved step"
    store.at = -1
    (folder,) = train_many(tmp_path, store, [cfg], META)
    assert contents(folder) == contents(whole)


@pytest.mark.gpu
@pytest.mark.parametrize("architecture", ["topk", "relu", "batchtopk", "jumprelu"])
def test_on_a_gpu_too(architecture: str, tmp_path: Path) -> None:
    """Fused steps, figures that come late, compute copies of the weights: all sums have a fixed order."""
    cfg = replace(TOPK, architecture=architecture, d_sae=512, k=8, ema_decay=0.0)
    (whole,) = train_many(tmp_path / "whole", killable.store(), [cfg], META, device="cuda")
    with pytest.raises(resume.TrainingInterrupted):
        train_many(tmp_path, signalling(17), [cfg], META, device="cuda")
    (folder,) = train_many(tmp_path, killable.store(), [cfg], META, device="cuda")
    assert contents(folder) == contents(whole)


def test_saes_at_different_steps_go_on_together(whole: list[list[Any]], tmp_path: Path) -> None:
    interrupted(tmp_path, [RELU], 4)
    interrupted(tmp_path, [TOPK], 30)
    folders = train_many(tmp_path, killable.store(), [TOPK, RELU], META)
    assert [contents(folder) for folder in folders] == whole


def test_one_is_complete_when_the_other_is_interrupted(whole: list[list[Any]], tmp_path: Path) -> None:
    interrupted(tmp_path, [TOPK, RELU], 30)
    assert manifest.is_complete(folder_of(tmp_path, RELU))
    assert [contents(f) for f in train_many(tmp_path, killable.store(), [TOPK, RELU], META)] == whole


def test_a_signal_in_the_last_step_still_interrupts(whole: list[list[Any]], tmp_path: Path) -> None:
    with pytest.raises(resume.TrainingInterrupted, match="complete"):
        train_many(tmp_path, signalling(39), [TOPK], META)
    assert contents(folder_of(tmp_path, TOPK)) == whole[0]


def test_usr1_saves_a_step_and_goes_on(whole: list[list[Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved: list[int] = []
    monkeypatch.setattr(resume, "save", lambda run, key, real=resume.save: saved.append(run.step) or real(run, key))
    (folder,) = train_many(tmp_path, signalling(9, signal.SIGUSR1), [TOPK], META)
    assert saved == [10] and contents(folder) == whole[0]


def test_a_second_ctrl_c_leaves_at_once(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt) as caught:
        train_many(tmp_path, signalling(9, signal.SIGINT, times=2), [TOPK], META)
    assert not isinstance(caught.value, resume.TrainingInterrupted)
    assert [path.name for path in run_folder(folder_of(tmp_path, TOPK)).iterdir()] == ["train.jsonl"]


def test_the_last_two_steps_are_kept(tmp_path: Path) -> None:
    with pytest.raises(resume.TrainingInterrupted):
        train_many(tmp_path, signalling(9), [TOPK], META, keeper=resume.Keeper(every_steps=3))
    names = sorted(path.name for path in run_folder(folder_of(tmp_path, TOPK)).glob("step-*"))
    assert names == ["step-10", "step-9"]


def test_a_damaged_step_gives_way_to_the_one_before(
    whole: list[list[Any]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(resume.TrainingInterrupted):
        train_many(tmp_path, signalling(9), [TOPK], META, keeper=resume.Keeper(every_steps=3))
    steps = run_folder(folder_of(tmp_path, TOPK))
    newest = steps / "step-10" / resume.TENSORS
    data = bytearray(newest.read_bytes())
    data[-5] ^= 1  # one bit, same size
    newest.write_bytes(bytes(data))
    (folder,) = train_many(tmp_path, killable.store(), [TOPK], META)
    assert "sha256" in caplog.text and contents(folder) == whole[0]


def test_steps_of_another_configuration_are_refused_untouched(tmp_path: Path) -> None:
    interrupted(tmp_path, [TOPK], 9)
    other = replace(TOPK, lr=1e-3)
    run_folder(folder_of(tmp_path, TOPK)).rename(run_folder(folder_of(tmp_path, other)))
    before = sorted(p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file())
    with pytest.raises(StaleArtefact, match="another training"):
        train_many(tmp_path, killable.store(), [other], META)
    assert sorted(p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file()) == before
    (folder,) = train_many(tmp_path, killable.store(), [other], META, force=True)
    assert manifest.is_complete(folder)


def test_force_begins_again(whole: list[list[Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted(tmp_path, [TOPK], 9)
    monkeypatch.setattr(resume, "restore", lambda *_: pytest.fail("a step was restored"))
    (folder,) = train_many(tmp_path, killable.store(), [TOPK], META, force=True)
    assert contents(folder) == whole[0]


def test_a_full_disk_leaves_the_last_good_step(
    whole: list[list[Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The device /dev/full answers every write with ENOSPC, as a full disk does."""

    def write(path: Path, tensors: dict[str, torch.Tensor], real: Any = resume._write_tensors) -> None:
        full = path.parent.name.startswith("step-12.")
        real(Path("/dev/full") if full else path, tensors)

    monkeypatch.setattr(resume, "_write_tensors", write)
    with pytest.raises(ArtefactError, match="disk is full"):
        train_many(tmp_path, killable.store(), [TOPK], META, keeper=resume.Keeper(every_steps=6))
    monkeypatch.undo()
    names = sorted(path.name for path in run_folder(folder_of(tmp_path, TOPK)).iterdir())
    assert names == ["step-6", "train.jsonl"], "the half-written step is gone, the one before is there"
    (folder,) = train_many(tmp_path, killable.store(), [TOPK], META)
    assert contents(folder) == whole[0]


def test_broken_activations_are_named_and_saved_steps_kept(whole: list[list[Any]], tmp_path: Path) -> None:
    flat = [flat for _, flat in zip(range(15), killable.store().batches(128, seed=0, epochs=1), strict=False)]
    with pytest.raises(DataError, match=rf"batch of step 15 .*flat index {flat[14][1][7]}\)"):
        train_many(tmp_path, signalling(14, None), [TOPK], META, keeper=resume.Keeper(every_steps=10))
    (folder,) = train_many(tmp_path, killable.store(), [TOPK], META)  # sound activations: on from step 10
    assert contents(folder) == whole[0]


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    resume.save(run, "store")
    run.step = 1
    with torch.no_grad():
        run.sae.W_enc_FD[0, 0] = float("nan")
    with pytest.raises(DataError, match="W_enc_FD is not finite"):
        resume.save(run, "store")
    found = resume.newest(run.log.path.parent, run.key, "store")
    assert found is not None and found.name == "step-0"


def a_run(root: Path, cfg: TrainConfig = TOPK) -> Run:
    from sae.metric_log import MetricLog

    folder = folder_of(root, cfg)
    store = planted_store(n=256)
    return start(cfg, META, "0" * 16, folder, store, store.x_ND, MetricLog(run_folder(folder) / "train.jsonl"))


def test_one_whose_weights_overflow_does_not_stop_the_others(
    whole: list[list[Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def save(run: Run, key: str, real: Any = resume.save) -> Path:
        if run.cfg.architecture == "relu" and run.step == 12:
            with torch.no_grad():
                run.sae.W_enc_FD[0, 0] = float("inf")
        return Path(real(run, key))

    monkeypatch.setattr(resume, "save", save)
    with pytest.raises(TrainingDiverged, match="W_enc_FD is not finite after step 12") as caught:
        train_many(tmp_path, killable.store(), [TOPK, RELU], META, keeper=resume.Keeper(every_steps=6))
    assert [contents(path) for path in caught.value.paths] == whole[:1]
    steps = sorted(path.name for path in run_folder(folder_of(tmp_path, RELU)).iterdir())
    assert steps == ["step-6", "train.jsonl"]


def test_two_processes_do_not_train_one_sae(whole: list[list[Any]], tmp_path: Path) -> None:
    folder = run_folder(folder_of(tmp_path, TOPK))
    with resume.locked(folder):
        with pytest.raises(ArtefactError, match="in use"):
            train_many(tmp_path, killable.store(), [TOPK], META)
        (other,) = train_many(tmp_path, killable.store(), [RELU], META)
    (mine,) = train_many(tmp_path, killable.store(), [TOPK], META)
    assert [contents(mine), contents(other)] == whole


def test_figures_on_their_way_from_a_device_are_kept() -> None:
    first, second = Lagged(), Lagged()
    for step in range(3):
        first.push(step, torch.tensor([step + 0.1, float("nan")], dtype=torch.float64))
        first.take()
    second.push(9, torch.zeros(2))
    second.refill(first.pending())
    assert [step for step, _ in first.pending()] == [2], "a look does not take"
    first.push(3, torch.ones(2))
    second.push(3, torch.ones(2))
    assert str(first.take()) == str(second.take()) != "[]"


def test_random_generators_go_on_where_they_stopped(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    folder = resume.save(run, "store")
    drawn = [torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random()]
    resume.restore_random(folder)
    assert [torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random()] == drawn


def test_moments_go_over_to_the_other_adam_and_back(tmp_path: Path) -> None:
    """A step saved on a CPU goes on on a GPU, whose optimiser names the moments of the matrices otherwise."""
    run = a_run(tmp_path)
    train_run.step(run, run_x := planted_store(n=64).x_ND, *run.sae.normalise(run_x))
    moments = {name: tensor.clone() for name, tensor in resume._moments(run).items()}
    folder = resume.save(run, "store")
    sae = run.sae
    run.optimiser = RowAdam(sae.W_enc_FD, sae.b_enc_F, sae.W_dec_FD, sae.b_dec_D, None, run.cfg)  # type: ignore[arg-type]
    resume.restore(run, folder)
    assert run.optimiser.n_steps == 1
    assert torch.equal(run.optimiser.moments["enc"][1], moments["adam.W_enc_FD.exp_avg_sq"])
    run.step = 2
    folder = resume.save(run, "store")
    run.optimiser = optim.adam(run.sae.parameter_groups(), run.cfg)
    resume.restore(run, folder)
    again = resume._moments(run)
    assert again.keys() == moments.keys() and all(torch.equal(again[name], moments[name]) for name in moments)


def test_another_machine_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = a_run(tmp_path)
    folder = resume.save(run, "store")
    state = json.loads((folder / resume.STATE).read_text())
    state["machine"]["threads"] = 99
    (folder / resume.STATE).write_text(json.dumps(state))
    resume.restore(run, folder)
    assert "not bit for bit" in caplog.text


def test_signals_outside_the_main_thread_are_left_alone() -> None:
    found: list[Any] = []

    def work() -> None:
        with resume.Signals() as signals:
            found.append((signals.stop, signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=work)
    before = signal.getsignal(signal.SIGTERM)
    thread.start()
    thread.join()
    assert found == [(False, before)]


@pytest.mark.parametrize("n_kills", [4, pytest.param(50, marks=pytest.mark.slow)])
def test_a_process_killed_at_random_moments_loses_nothing(n_kills: int, tmp_path: Path) -> None:
    """SIGKILL while every step is being saved, then one run to the end. A step takes a millisecond of computing and ten
    of writing, so that most kills fall into the writing; each comes after some new step, or nothing would get done."""
    cfgs = [replace(TOPK, train_tokens=128 * 12 * n_kills), replace(RELU, train_tokens=128 * 12 * n_kills)]
    expected = [contents(f) for f in train_many(tmp_path / "whole", killable.store(), cfgs, META)]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["sae.train", "killable"])
    moments = manifest.rng("test", "kills", n_kills)
    runs = [run_folder(folder_of(tmp_path, cfg)) for cfg in cfgs]

    def reached() -> int:
        return max((n for n, _ in resume._steps(runs[0])), default=0)

    steps, half_written = [0], 0
    for kill in range(3 * n_kills):
        if kill >= n_kills and half_written >= n_kills // 4:  # few kills may all miss the writing: some more then
            break
        process = context.Process(target=killable.train, args=(str(tmp_path), cfgs))
        process.start()
        while process.is_alive() and reached() <= steps[-1]:
            time.sleep(0.001)
        time.sleep(float(moments.uniform(0, 0.03)))
        assert process.pid is not None and process.is_alive(), "it ended before it could be killed"
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        half_written += any(list(run.glob("*.tmp-*")) for run in runs)
        steps.append(reached())
    assert half_written >= n_kills // 4, (half_written, steps)
    assert steps == sorted(steps), "no kill ever took back a saved step"
    folders = train_many(tmp_path, killable.store(), cfgs, META)
    assert [contents(folder) for folder in folders] == expected


def test_another_error_of_the_disk_keeps_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(resume, "_write_tensors", refuse)
    with pytest.raises(OSError, match="Permission denied"):
        train_many(tmp_path, killable.store(), [TOPK], META, keeper=resume.Keeper(every_steps=6))
