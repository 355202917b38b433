"""SAEs trained on activations on the fly: several hookpoints in one pass, interrupted and failing in every way."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from live_killable import BATCHTOPK, HOOKPOINTS, TOPK, meta, stream, train

from sae import checkpoint, resume
from sae.config import TokensConfig, TrainConfig
from sae.errors import ArtefactError, ConfigError, DataError
from sae.language_model import LanguageModel
from sae.live_pair import LivePair
from sae.manifest import is_complete
from sae.metric_log import read_log
from sae.streams import LiveStream
from sae.tokens import TokenSet, build_tokens
from sae.train import Job, sae_id_of, train_jobs, train_key, train_many
from sae.train_run import run_folder

SUPPORT = Path(__file__).resolve().parent.parent / "support"
SEED = 0
BATCH = 64


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory, tiny_lm: LanguageModel, tiny_texts: Path) -> TokenSet:
    """50 rows of 32: 12 chunks of 4 rows and one of 2."""
    cfg = TokensConfig(
        text=str(tiny_texts), context_tokens=32, train_tokens=32 * 50, explain_tokens=64, calibrate_tokens=64,
        score_tokens=64, test_tokens=64,
    )  # fmt: skip
    return build_tokens(tmp_path_factory.mktemp("tokens"), cfg, tiny_lm.name, tiny_lm.tokenizer)["train"]


def contents(folder: Path) -> list[Any]:
    clock = ("seconds", "tokens_per_s")
    rows = [{k: v for k, v in row.items() if k not in clock} for row in read_log(folder / "train.jsonl")]
    return [*((folder / n).read_bytes() for n in (checkpoint.WEIGHTS, checkpoint.CFG, checkpoint.REFERENCE)), rows]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, tiny_lm: LanguageModel, tokens: TokenSet) -> list[list[Any]]:
    """Two SAEs at each of two hookpoints, trained in one pass without a break."""
    return [contents(f) for f in train(tmp_path_factory.mktemp("whole"), stream(tiny_lm, tokens))]


def test_one_pass_gives_the_saes_of_two_runs(
    whole: list[list[Any]], tiny_lm: LanguageModel, tokens: TokenSet, tmp_path: Path
) -> None:
    found = []
    for hookpoint in HOOKPOINTS:
        found += train(tmp_path, stream(tiny_lm, tokens, (hookpoint,), prefetch="on"))
    assert [contents(folder) for folder in found] == whole
    assert len({folder.name for folder in found}) == 4


def calling(lm: LanguageModel, monkeypatch: pytest.MonkeyPatch, at: int, act: Callable[[Any], Any]) -> None:
    """``act`` on what the model gives in its ``at``-th pass from now on."""
    calls, real = [0], lm.capture

    def capture(*args: Any) -> Any:
        calls[0] += 1
        found = real(*args)
        return act(found) if calls[0] == at else found

    monkeypatch.setattr(lm, "capture", capture)


SAMPLE_PASSES = 13


@pytest.mark.parametrize("prefetch", ["off", "on"])
def test_a_signal_saves_and_the_rest_is_bit_for_bit(
    prefetch: str, whole: list[list[Any]], tiny_lm: LanguageModel, tokens: TokenSet, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """In the middle of a window; what goes on has no thread where the first had one, and the other way round."""
    calling(tiny_lm, monkeypatch, SAMPLE_PASSES + 20, lambda found: os.kill(os.getpid(), signal.SIGTERM) or found)
    with pytest.raises(resume.TrainingInterrupted, match="saved after step"):
        train(tmp_path, stream(tiny_lm, tokens, prefetch=prefetch))
    monkeypatch.undo()
    steps = sorted(tmp_path.glob("saes/*.run/step-*"))
    assert len(steps) == 4 and len({path.name for path in steps}) == 1
    other = {"off": "on", "on": "off"}[prefetch]
    assert [contents(f) for f in train(tmp_path, stream(tiny_lm, tokens, prefetch=other))] == whole


def test_a_signal_while_the_buffer_fills(
    whole: list[list[Any]], tiny_lm: LanguageModel, tokens: TokenSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calling(tiny_lm, monkeypatch, SAMPLE_PASSES + 2, lambda found: os.kill(os.getpid(), signal.SIGTERM) or found)
    with pytest.raises(resume.TrainingInterrupted, match="filling its buffer"):
        train(tmp_path, stream(tiny_lm, tokens))
    monkeypatch.undo()
    assert [contents(f) for f in train(tmp_path, stream(tiny_lm, tokens))] == whole


def test_hookpoints_that_stopped_at_different_steps(
    whole: list[list[Any]], tiny_lm: LanguageModel, tokens: TokenSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for hookpoint, at in zip(HOOKPOINTS, (17, 22), strict=True):
        calling(tiny_lm, monkeypatch, SAMPLE_PASSES + at, lambda found: os.kill(os.getpid(), signal.SIGTERM) or found)
        with pytest.raises(resume.TrainingInterrupted):
            train(tmp_path, stream(tiny_lm, tokens, (hookpoint,)))
        monkeypatch.undo()
    assert len({path.name for path in tmp_path.glob("saes/*.run/step-*")}) == 2
    assert [contents(f) for f in train(tmp_path, stream(tiny_lm, tokens))] == whole


@pytest.mark.slow
@pytest.mark.parametrize("prefetch", ["off", "on"])
def test_a_killed_process_loses_nothing(
    prefetch: str, whole: list[list[Any]], tiny_lm: LanguageModel, tiny_lm_dir: Path, tokens: TokenSet, tmp_path: Path
) -> None:
    """SIGKILL three times while every step is saved, then a run to the end."""
    command = [sys.executable, str(SUPPORT / "live_killable.py"), str(tmp_path), str(tiny_lm_dir), str(tokens.folder)]
    paths = f"{SUPPORT}:{SUPPORT.parent.parent}:{SUPPORT.parent.parent / 'kernels'}"
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    reached = [0]
    for _ in range(3):
        process = subprocess.Popen([*command, prefetch], env=environment, stderr=subprocess.PIPE)
        deadline = time.monotonic() + 240
        while newest(tmp_path) < reached[-1] + 5:
            assert process.poll() is None and time.monotonic() < deadline, process.stderr and process.stderr.read()
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        reached.append(newest(tmp_path))
    assert reached[-1] < 60 and reached == sorted(reached)
    torch_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert [contents(f) for f in train(tmp_path, stream(tiny_lm, tokens))] == whole
    finally:
        torch.set_num_threads(torch_threads)


def newest(root: Path) -> int:
    found = [path.parent.name.removeprefix("step-") for path in root.glob("saes/*.run/step-*/manifest.json")]
    return max((int(number) for number in found if number.isdigit()), default=0)


@pytest.mark.gpu
def test_on_a_gpu_the_thread_changes_nothing(tiny_lm_dir: Path, tokens: TokenSet, tmp_path: Path) -> None:
    """With the thread the model has a CUDA stream of its own: no slot is overwritten before it is read, none is read
    before it is written; an interrupted run goes on bit for bit."""
    lm = LanguageModel.load(str(tiny_lm_dir), dtype="float32", device="cuda")
    n = 200
    ways = [list(stream(lm, tokens, prefetch=way).batches(BATCH, seed=SEED, first=0, last=n)) for way in ("off", "on")]
    assert len(ways[0]) == len(ways[1]) == n
    for mine, theirs in zip(*ways, strict=True):
        for (x_ND, flat), (y_ND, other) in zip(mine, theirs, strict=True):
            assert x_ND.device.type == "cuda" and torch.equal(x_ND, y_ND) and np.array_equal(flat, other)

    def trained(root: Path, way: str) -> list[list[Any]]:
        jobs = [Job(store, [TOPK], meta(store.hookpoint)) for store in stream(lm, tokens, prefetch=way).stores]
        return [contents(folder) for (folder,) in train_jobs(root, jobs, device="cuda")]

    expected = trained(tmp_path / "whole", "off")
    with pytest.MonkeyPatch.context() as patch:
        calling(lm, patch, SAMPLE_PASSES + 20, lambda found: os.kill(os.getpid(), signal.SIGTERM) or found)
        with pytest.raises(resume.TrainingInterrupted, match="saved after step"):
            trained(tmp_path, "on")
    assert trained(tmp_path, "on") == expected


def pair(
    lm: LanguageModel, tokens: TokenSet, prefetch: str = "off", inputs: str = "layers.1.mlp:in"
) -> LivePair:
    return LivePair(stream(lm, tokens, (inputs, "layers.1.mlp"), prefetch=prefetch))


def test_transcoders_on_the_fly_go_on_bit_for_bit(
    tiny_lm: LanguageModel, tokens: TokenSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = replace(TOPK, architecture="transcoder", ema_decay=0.0, input_norm="dataset_rms")
    cfgs = [cfg, replace(TOPK, seed=3)]
    where = replace(meta("layers.1.mlp:in"), hookpoint_out="layers.1.mlp")
    expected = [contents(f) for f in train_many(tmp_path / "whole", pair(tiny_lm, tokens), cfgs, where)]
    calling(tiny_lm, monkeypatch, SAMPLE_PASSES + 20, lambda found: os.kill(os.getpid(), signal.SIGTERM) or found)
    with pytest.raises(resume.TrainingInterrupted, match="saved after step"):
        train_many(tmp_path, pair(tiny_lm, tokens, "on"), cfgs, where)
    monkeypatch.undo()
    found = train_many(tmp_path, pair(tiny_lm, tokens), cfgs, where)
    assert [contents(folder) for folder in found] == expected
    assert read_log(found[0] / "train.jsonl")[-1]["fvu"] < read_log(found[0] / "train.jsonl")[0]["fvu"]


# -- what cannot be trained ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("prefetch", ["off", "on"])
def test_values_that_are_not_finite_stop_it_and_saved_steps_stay(
    prefetch: str, whole: list[list[Any]], tiny_lm: LanguageModel, tokens: TokenSet, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def broken(found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        found[HOOKPOINTS[1]] = found[HOOKPOINTS[1]].clone()
        found[HOOKPOINTS[1]][1, 5, 3] = float("nan")
        return found

    calling(tiny_lm, monkeypatch, SAMPLE_PASSES + 26, broken)
    with pytest.raises(DataError, match=rf"not finite at {HOOKPOINTS[1]} in row"):
        train(tmp_path, stream(tiny_lm, tokens, prefetch=prefetch), resume.Keeper(every_steps=5))
    monkeypatch.undo()
    assert newest(tmp_path) >= 5
    assert [contents(f) for f in train(tmp_path, stream(tiny_lm, tokens))] == whole


@pytest.mark.parametrize("prefetch", ["off", "on"])
def test_an_error_of_the_model_keeps_its_type(
    prefetch: str, tiny_lm: LanguageModel, tokens: TokenSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Fell(RuntimeError):
        pass

    def fall(_: Any) -> None:
        raise Fell("out of memory on the device")

    calling(tiny_lm, monkeypatch, SAMPLE_PASSES + 12, fall)
    begun = time.monotonic()
    with pytest.raises(Fell, match="on the device"):
        train(tmp_path, stream(tiny_lm, tokens, prefetch=prefetch))
    assert time.monotonic() - begun < 120, "it hung"


def test_a_full_disk_leaves_the_last_good_step(
    whole: list[list[Any]], tiny_lm: LanguageModel, tokens: TokenSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The device /dev/full answers every write with ENOSPC, as a full disk does."""

    def write(path: Path, found: dict[str, torch.Tensor], real: Any = resume._write_tensors) -> None:
        real(Path("/dev/full") if path.parent.name.startswith("step-12.") else path, found)

    monkeypatch.setattr(resume, "_write_tensors", write)
    with pytest.raises(ArtefactError, match="disk is full"):
        train(tmp_path, stream(tiny_lm, tokens, prefetch="on"), resume.Keeper(every_steps=6))
    monkeypatch.undo()
    assert {path.name for path in tmp_path.glob("saes/*.run/*")} == {"step-6", "train.jsonl"}
    assert [contents(f) for f in train(tmp_path, stream(tiny_lm, tokens))] == whole


def test_too_little_text_and_too_small_a_buffer_are_refused_before_work(
    tiny_lm: LanguageModel, tokens: TokenSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LiveStream, "chunk", lambda *_: pytest.fail("the model was run"))
    live = stream(tiny_lm, tokens, buffer_tokens=10**6)
    wide = replace(TOPK, batch_tokens=2_048, train_tokens=4_096)
    with pytest.raises(DataError, match="give more text"):
        train_many(tmp_path, live.stores[0], [wide], meta(HOOKPOINTS[0]))
    with pytest.raises(DataError, match="a batch is 2,048"):
        live.window(2_048)
    with pytest.raises(ConfigError, match="--stream.buffer-tokens 256"):
        train_many(tmp_path, stream(tiny_lm, tokens, buffer_tokens=200).stores[0], [TOPK], meta(HOOKPOINTS[0]))
    assert list(tmp_path.iterdir()) == []


def test_jobs_that_do_not_go_together(tiny_lm: LanguageModel, tokens: TokenSet, tmp_path: Path) -> None:
    live = stream(tiny_lm, tokens)
    jobs = [Job(store, [cfg], meta(store.hookpoint)) for store, cfg in zip(live.stores, (TOPK, TOPK), strict=True)]
    other = replace(TOPK, batch_tokens=32)
    with pytest.raises(ConfigError, match="same batch_tokens"):
        train_jobs(tmp_path, [jobs[0], jobs[1]._replace(cfgs=[other])])
    with pytest.raises(ConfigError, match="equal"):
        train_jobs(tmp_path, [jobs[0], jobs[0]])
    with pytest.raises(ConfigError, match="at least one"):
        train_jobs(tmp_path, [])


def test_one_hookpoint_is_complete_and_the_other_is_trained(
    whole: list[list[Any]], tiny_lm: LanguageModel, tokens: TokenSet, tmp_path: Path
) -> None:
    done = train(tmp_path, stream(tiny_lm, tokens, HOOKPOINTS[:1]))
    stamp = (done[0] / "manifest.json").stat().st_mtime_ns
    assert [contents(f) for f in train(tmp_path, stream(tiny_lm, tokens))] == whole
    assert (done[0] / "manifest.json").stat().st_mtime_ns == stamp


def test_names_and_figures(tiny_lm: LanguageModel, tokens: TokenSet, tmp_path: Path) -> None:
    live = stream(tiny_lm, tokens, HOOKPOINTS[:1])
    (store,) = live.stores
    cfg = TrainConfig(**{**BATCHTOPK.__dict__, "train_tokens": BATCH * 3})
    (folder,) = train_many(tmp_path, store, [cfg], meta(store.hookpoint))
    assert folder.name == sae_id_of(cfg, meta(store.hookpoint), train_key(cfg, store.key))
    assert is_complete(folder) and not run_folder(folder).exists()
    sae = checkpoint.load(folder)
    assert sae.cfg.threshold_source is not None and sae.cfg.threshold_source["tokens"] > 1_000
