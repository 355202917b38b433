"""``python -m sae codes``: what it writes is what the measurements give, once; and what it refuses."""

import json
from pathlib import Path

import pytest

from sae import checkpoint, progressive, refine
from sae.__main__ import main
from sae.train_door import open_store

SMALL = (
    "--tokens.context-tokens=64 --tokens.train-tokens=8192 --tokens.explain-tokens=1024 --tokens.calibrate-tokens=1024 "
    "--tokens.score-tokens=1024 --tokens.test-tokens=1024 --train.d-sae=64 --train.k=4 --train.batch-tokens=512 "
    "--train.train-tokens=5120 --train.aux-k=8 --train.dead-tokens=4096"
).split()


@pytest.fixture(scope="module")
def root(tiny_lm_dir: Path, tiny_texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("root")
    words = [f"--model={tiny_lm_dir}", f"--texts={tiny_texts}", f"--root={found}", *SMALL]
    assert main(["train", *words, "--grid", "architecture=topk,gated"]) == 0
    return found


def folder_of(root: Path, architecture: str) -> Path:
    (found,) = (path for path in (root / "saes").iterdir() if f".{architecture}-" in path.name)
    return found


def test_both_measurements_are_written_and_shown(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (activations,) = (root / "activations").iterdir()
    sae_folder = folder_of(root, "topk")
    words = ["codes", f"--sae={sae_folder}", f"--activations={activations}", f"--root={root}", "--tokens=200"]
    assert main(words) == 0
    printed = capsys.readouterr().out
    folder = Path(printed.strip().splitlines()[-1])
    found = json.loads((folder / "codes.json").read_text())
    sae, store = checkpoint.load(sae_folder), open_store(activations)
    points = progressive.measure(sae, store, tokens=200)
    assert found["progressive"] == [json.loads(json.dumps(p._asdict())) for p in points] and not found["not_measured"]
    assert found["refinement"] == refine.measure(sae, store, tokens=200)._asdict()
    assert f"{points[0].fvu:.4f}" in printed and f"{found['refinement']['fvu_after']:.4f}" in printed
    stamp = (folder / "manifest.json").stat().st_mtime_ns
    assert main(words) == 0 and (folder / "manifest.json").stat().st_mtime_ns == stamp


def test_what_an_architecture_lacks_is_said(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (activations,) = (root / "activations").iterdir()
    assert main(["codes", f"--sae={folder_of(root, 'gated')}", f"--activations={activations}", f"--root={root}"]) == 0
    printed = capsys.readouterr().out
    assert "progressive: " in printed and "gated" in printed and "shrinkage" in printed


def test_what_does_not_fit_is_refused(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (activations,) = (root / "activations").iterdir()
    sae = folder_of(root, "topk")
    assert main(["codes", f"--sae={tmp_path}", f"--activations={activations}"]) == 2
    assert "holds no sae.safetensors" in capsys.readouterr().err
    assert main(["codes", f"--sae={sae}", f"--activations={sae}", f"--root={tmp_path}"]) == 2
    assert "expected activations" in capsys.readouterr().err
    assert main(["codes", f"--sae={sae}", f"--activations={activations}", "--ks", "65", f"--root={tmp_path}"]) == 2
    assert "1..64" in capsys.readouterr().err
