"""The door ``python -m sae train``: grids, existing activations, the prediction and what the run then takes."""

import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import paired_costs
import pytest
import torch
from planted_store import META

from sae import checkpoint, predict, train_door
from sae.__main__ import main
from sae.config import TrainConfig
from sae.errors import ConfigError, DataError
from sae.manifest import read_manifest
from sae.train import train_many

SMALL = (
    "--tokens.context-tokens=64 --tokens.train-tokens=8192 --tokens.explain-tokens=1024 --tokens.calibrate-tokens=1024 "
    "--tokens.score-tokens=1024 --tokens.test-tokens=1024 --train.d-sae=64 --train.k=4 --train.batch-tokens=512 "
    "--train.train-tokens=5120 --train.aux-k=8 --train.dead-tokens=4096"
).split()


@pytest.fixture
def words(tiny_lm_dir: Path, tiny_texts: Path, tmp_path: Path) -> list[str]:
    return ["train", f"--model={tiny_lm_dir}", f"--texts={tiny_texts}", f"--root={tmp_path}", *SMALL]


def saes(root: Path) -> list[Path]:
    return sorted(root.glob("saes/*/manifest.json"))


def test_texts_become_saes_and_the_activations_alone_do_too(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*words, "--grid", "architecture=topk,relu"]) == 0
    printed = capsys.readouterr().out
    folders = [path.parent for path in saes(tmp_path)]
    assert len(folders) == 2 and all(str(folder) in printed for folder in folders)
    assert "expected" in printed and "took" in printed
    (activations,) = (tmp_path / "activations").iterdir()
    store = train_door.open_store(activations)
    for folder in folders:
        sae = checkpoint.load(folder)
        assert sae.cfg.meta is not None and sae.cfg.meta.token_filter["n_seen"] == store.n_tokens
        assert sae.cfg.meta.text_sources and sae.cfg.meta.context_length_tokens == 64
    weights = {folder.name: (folder / checkpoint.WEIGHTS).read_bytes() for folder in folders}
    other = tmp_path / "other"
    short = [word for word in words[1:] if word.startswith("--train.")]
    assert main(["train", f"--activations={activations}", f"--root={other}", *short]) == 0
    (alone,) = saes(other)
    found = checkpoint.load(alone.parent)
    assert torch.equal(found.W_enc_FD, checkpoint.load(tmp_path / "saes" / alone.parent.name).W_enc_FD)
    assert alone.parent.name in weights


def test_a_plan_trains_nothing_and_a_complete_run_costs_nothing(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*words, "--plan"]) == 0
    assert "activations" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tokens"]
    assert main(words) == 0
    capsys.readouterr()
    cfg = train_door.parse(words[1:])
    complete = train_door.predict(cfg, [cfg.train], train_door.subject(cfg))
    assert complete.lines == () and complete.seconds == 0
    again = train_door.predict(replace(cfg, force=True), [cfg.train], train_door.subject(replace(cfg, force=True)))
    assert [line.stage for line in again.lines] == ["activations", "training"]


def test_sizes_on_disk_are_those_predicted(words: list[str], tmp_path: Path) -> None:
    cfg = train_door.parse(words[1:])
    expected = train_door.predict(cfg, [cfg.train], train_door.subject(cfg))
    train_door.run(cfg, [cfg.train], train_door.subject(cfg))
    for kind, line in zip(("activations", "saes"), expected.lines, strict=True):
        paths = [p for p in (tmp_path / kind).rglob("*") if p.is_file() and p.name != "manifest.json"]
        size = sum(p.stat().st_size for p in paths)
        assert line.disk_bytes == pytest.approx(size, rel=0.2), kind


def test_kept_tokens_are_counted_before_anything_is_collected(words: list[str]) -> None:
    cfg = train_door.parse(words[1:])
    found = train_door.subject(cfg)
    expected = train_door.expected_kept(found, cfg.filter)
    store = train_door.collect(cfg, found)
    by_norm = store.n_dropped["norm"]
    assert by_norm < 0.01 * len(expected) and len(expected) == store.n_kept + by_norm
    assert np.isin(store.kept_N, expected).all()


@pytest.mark.slow
@pytest.mark.alone
def test_what_is_predicted_is_what_is_paid() -> None:
    """Within 20 %, in two processes of which neither knows the other's result."""
    paired_costs.assert_near("cost_probe.py")


@pytest.mark.parametrize("architecture", ["topk", "relu", "batchtopk", "jumprelu", "gated", "matryoshka"])
@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_saved_steps_have_the_size_that_is_stated(architecture: str, ema: float, tmp_path: Path) -> None:
    from planted_store import planted_store

    from sae import resume
    from sae.metric_log import MetricLog
    from sae.train_run import start, step

    cfg = TrainConfig(architecture=architecture, d_sae=512, k=8, batch_tokens=256, train_tokens=2_560, ema_decay=ema)
    store = planted_store(n=512, d=64)
    run = start(cfg, META, "0" * 16, tmp_path / "x", store, store.x_ND, MetricLog(tmp_path / "x.run" / "train.jsonl"))
    step(run, store.x_ND[:256], *run.sae.normalise(store.x_ND[:256]))
    size = (resume.save(run, "store") / resume.TENSORS).stat().st_size
    assert predict.step_bytes(cfg, (64,)) == pytest.approx(size, rel=0.05)
    assert predict.parameters(cfg, (64,)) == sum(p.numel() for p in run.sae.parameters())


def test_grids() -> None:
    base = TrainConfig(d_sae=64, k=4, batch_tokens=128, train_tokens=1_280)
    cells = train_door.grid_configs(base, ["architecture=topk,relu", "k=2,4", "lr=1e-3,3e-4"])
    assert [(c.architecture, c.k, c.lr) for c in cells] == [
        ("topk", 2, 1e-3), ("topk", 2, 3e-4), ("topk", 4, 1e-3), ("topk", 4, 3e-4),
        ("relu", None, 1e-3), ("relu", None, 3e-4),
    ]  # fmt: skip
    assert train_door.grid_configs(base, []) == [base]
    assert train_door.grid_configs(base, ["multi-topk=true", "k=2"])[0].multi_topk is True
    sizes = train_door.grid_configs(base, ["batch_tokens=64,128,64"])
    assert [len(group) for group in train_door.by_batch(sizes)] == [1, 1]
    for grid, message in (
        (["width=3"], "no field 'width'"),
        (["k"], "FIELD=V1"),
        (["k=2", "k=3"], "twice"),
        (["k=two"], "expected int"),
        (["k=100"], "k must lie"),
        (["architecture=topp"], "topp"),
    ):
        with pytest.raises(ConfigError, match=message):
            train_door.grid_configs(base, grid)


def test_what_cannot_be_trained_is_refused_before_work(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(predict, "try_training", lambda *_: pytest.fail("work began"))
    assert main([*words, "--train.batch-tokens=5120000", "--train.train-tokens=5120000"]) == 2
    assert "give more text" in capsys.readouterr().err
    assert main([*words, "--train.d-sae=2000000000"]) == 2
    assert "lower train.d-sae" in capsys.readouterr().err
    assert main([*words, "--hookpoint=layers.99"]) == 2
    assert "layers.2" in capsys.readouterr().err
    assert main(["train", "--activations", str(tmp_path / "none")]) == 2
    assert "not a complete artefact" in capsys.readouterr().err
    assert not saes(tmp_path)


def test_a_run_that_its_miniature_shows_too_large_is_refused(tmp_path: Path) -> None:
    line = predict.Line("training", 1.0, 10**15, 0, "")
    with pytest.raises(predict.TooLarge, match="GB of memory"):
        predict.check_prediction(predict.Prediction((line,), 0), tmp_path)
    with pytest.raises(predict.TooLarge, match="GB of disk"):
        predict.check_prediction(predict.Prediction((line._replace(memory_bytes=1),), 10**18), tmp_path)


def test_a_stream_of_the_wrong_kind_is_named(words: list[str], tmp_path: Path) -> None:
    assert main(words) == 0
    (manifest_path,) = saes(tmp_path)
    assert main(["train", "--activations", str(manifest_path.parent)]) == 2
    (activations,) = (tmp_path / "activations").iterdir()
    assert read_manifest(activations)["kind"] == "activations"
    with pytest.raises(ConfigError, match=r"--hookpoint says layers.0"):
        train_door.subject(train_door.parse([f"--activations={activations}", "--hookpoint=layers.0"]))


def test_a_sample_stands_for_its_store() -> None:
    x_ND = torch.arange(12.0).reshape(6, 2)
    sample = predict.Sample(x_ND, 20)
    assert torch.equal(sample.read([0, 6, 19]), x_ND[[0, 0, 1]])
    batches: list[Any] = [flat for _, flat in sample.batches(8, seed=0, epochs=2)]
    assert len(batches) == 4 and all(len(flat) == 8 and flat.max() < 20 for flat in batches)
    with pytest.raises(DataError, match="20 tokens"):
        predict.check_enough(20, [TrainConfig(batch_tokens=64)])


def test_a_transcoder_and_an_sae_from_one_stream(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pair = ["--hookpoint=layers.1.mlp:in", "--hookpoint-out=layers.1.mlp", "--train.input-norm=dataset_rms"]
    plain, words = words, [*words, *pair, "--grid", "architecture=transcoder,topk,skip_transcoder"]
    cfg = train_door.parse(words[1:])
    cfgs = train_door.grid_configs(cfg.train, cfg.grid)
    expected = train_door.predict(cfg, cfgs, train_door.subject(cfg))
    assert [line.stage for line in expected.lines] == ["activations", "activations", "training"]
    assert main(words) == 0
    folders = train_door.run(cfg, cfgs, train_door.subject(cfg))
    saes = [checkpoint.load(folder) for folder in folders]
    assert [sae.cfg.architecture for sae in saes] == ["transcoder", "topk", "skip_transcoder"]
    assert all(sae.cfg.meta is not None and sae.cfg.meta.hookpoint == "layers.1.mlp:in" for sae in saes)
    assert saes[0].cfg.meta is not None and saes[0].cfg.meta.hookpoint_out == "layers.1.mlp"
    for sae, folder in zip(saes, folders, strict=True):
        size = (folder / checkpoint.WEIGHTS).stat().st_size
        assert 4 * predict.parameters(next(c for c in cfgs if c.architecture == sae.cfg.architecture), (32, 32)) < size
    size = sum(p.stat().st_size for f in folders for p in f.iterdir())
    assert expected.lines[-1].disk_bytes == pytest.approx(size, rel=0.2)
    complete = train_door.predict(cfg, cfgs, train_door.subject(cfg))
    assert complete.lines == ()
    capsys.readouterr()
    assert main([*plain, *pair[:2]]) == 2
    assert "is for transcoders" in capsys.readouterr().err
    assert main([*plain, "--train.architecture=transcoder", "--train.input-norm=dataset_rms"]) == 2
    assert "--hookpoint-out" in capsys.readouterr().err


@pytest.mark.slow
def test_a_terminated_command_goes_on_when_it_is_given_again(words: list[str], tmp_path: Path) -> None:
    """SIGTERM from outside: exit status 130, then the bytes of a run that nothing stopped."""
    command = [sys.executable, "-m", "sae", *words, "--train.train-tokens=1024000", "--train.dead-tokens=65536"]
    first = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and first.poll() is None:
        logs = list(tmp_path.glob("saes/*.run/train.jsonl"))
        if logs and len(logs[0].read_text().splitlines()) >= 2:
            break
        time.sleep(0.02)
    first.send_signal(signal.SIGTERM)
    _, errors = first.communicate(timeout=60)
    assert first.returncode == 130 and "goes on from there" in errors and not saes(tmp_path)
    assert list(tmp_path.glob("saes/*.run/step-*/manifest.json"))
    assert subprocess.run(command, capture_output=True, check=True).returncode == 0
    (stopped,) = saes(tmp_path)
    names = (checkpoint.WEIGHTS, checkpoint.CFG, checkpoint.REFERENCE)
    files = [(stopped.parent / name).read_bytes() for name in names]
    assert subprocess.run([*command, "--force"], capture_output=True, check=True).returncode == 0
    assert [(stopped.parent / name).read_bytes() for name in names] == files


def test_a_grid_equals_one_call_of_train_many(words: list[str], tmp_path: Path) -> None:
    cfg = train_door.parse([*words[1:], "--grid", "k=2,4"])
    cfgs = train_door.grid_configs(cfg.train, cfg.grid)
    found = train_door.subject(cfg)
    folders = train_door.run(cfg, cfgs, found)
    store = train_door.collect(cfg, found)
    meta = checkpoint.load(folders[0]).cfg.meta
    assert meta is not None
    again = train_many(tmp_path / "again", store, cfgs, meta)
    assert [f.name for f in again] == [f.name for f in folders]
    files = (checkpoint.WEIGHTS, checkpoint.REFERENCE)
    assert all((a / n).read_bytes() == (b / n).read_bytes() for a, b in zip(again, folders, strict=True) for n in files)
