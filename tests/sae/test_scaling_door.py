"""``python -m sae scaling``: from a grid of small SAEs, or a table, to laws and a plot."""

import csv
import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
import torch

from sae import checkpoint, metrics, scaling_door, scaling_plot
from sae.__main__ import main
from sae.config import TokensConfig
from sae.errors import ConfigError, DataError
from sae.scaling import PAPER_C, PAPER_NK
from sae.scaling_door import ScalingDoor

SMALL = (
    "--tokens.context-tokens=64 --tokens.train-tokens=8192 --tokens.explain-tokens=1024 --tokens.calibrate-tokens=1024 "
    "--tokens.score-tokens=1024 --tokens.test-tokens=1024 --train.batch-tokens=512 --train.train-tokens=10240 "
    "--train.aux-k=8 --train.dead-tokens=4096 --train.lr=1e-3"
).split()
GRID = "--widths 32 64 128 256 --ks 2 4".split()


def the_folder(root: Path) -> Path:
    (folder,) = (root / "scaling").iterdir()
    return folder


def test_a_grid_is_trained_measured_fitted_and_drawn(
    tiny_lm_dir: Path, tiny_texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["scaling", f"--model={tiny_lm_dir}", f"--texts={tiny_texts}", f"--root={tmp_path}", *SMALL, *GRID]
    assert main([*words, "--plan"]) == 0
    assert not (tmp_path / "saes").exists()
    assert main(words) == 0
    folder = the_folder(tmp_path)
    with open(folder / "runs.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(int(row["n"]), int(row["k"])) for row in rows] == [(n, k) for n in (32, 64, 128, 256) for k in (2, 4)]
    by_cell = {(int(row["n"]), int(row["k"])): float(row["loss"]) for row in rows}
    assert all(by_cell[n, 4] < by_cell[n, 2] for n in (32, 64, 128, 256)), "more latents leave less error"
    assert all(float(row["compute"]) == int(row["tokens"]) * 10 * 32 * int(row["n"]) for row in rows)
    found = json.loads((folder / "fits.json").read_text())
    assert {"L(n, k)", "L(n), k=2", "L(n), k=4"} <= set(found["fits"]) | set(found["not_fitted"])
    assert found["fits"]["L(n, k)"]["n_runs"] == 8
    tree = ElementTree.parse(folder / "scaling.svg")
    with open(folder / "curves.csv", newline="") as file:
        assert len(list(csv.DictReader(file))) > 8
    circles = tree.findall(".//{http://www.w3.org/2000/svg}circle")
    assert len(circles) > 8
    printed = capsys.readouterr().out
    assert "gamma" in printed and str(folder / "scaling.svg") in printed
    stamp = (folder / "manifest.json").stat().st_mtime_ns
    assert main(words) == 0 and (folder / "manifest.json").stat().st_mtime_ns == stamp


def test_the_measured_loss_is_that_of_the_whole_set(tiny_lm_dir: Path, tiny_texts: Path, tmp_path: Path) -> None:
    words = [f"--model={tiny_lm_dir}", f"--texts={tiny_texts}", f"--root={tmp_path}", *SMALL]
    assert main(["train", *words, "--train.d-sae=64", "--train.k=4"]) == 0
    from sae.train_door import open_store

    (folder,), (activations,) = (tmp_path / "saes").iterdir(), (tmp_path / "activations").iterdir()
    sae, store = checkpoint.load(folder), open_store(activations)
    loss, l0 = scaling_door.held_out_loss(sae, store, chunk=100)
    x_ND = store.read(store.kept_N)
    n_ND = sae.normalise(x_ND)[0]
    with torch.no_grad():
        expected = metrics.fvu(n_ND, sae.decode_normalised(sae.encode_sparse(x_ND)))
    assert loss == pytest.approx(expected, rel=1e-5)
    assert 3.5 < l0 <= 4


def test_a_table_of_the_paper_gives_the_papers_constants(tmp_path: Path) -> None:
    table = tmp_path / "runs.csv"
    with open(table, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["n", "k", "loss", "compute"])
        for i, n in enumerate(2.0 ** np.arange(11, 20)):
            for k in (32, 64, 128):
                writer.writerow([n, k, float(PAPER_NK(n, k)), 10.0 ** (i - 9)])
    assert main(["scaling", f"--runs={table}", f"--root={tmp_path}"]) == 0
    found = json.loads((the_folder(tmp_path) / "fits.json").read_text())["fits"]
    for name, value in found["L(n, k)"]["constants"].items():
        assert value == pytest.approx(getattr(PAPER_NK, name), rel=0.02), name
    assert "L(C), k=32" in found


def test_the_papers_table_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["scaling", "--paper"]) == 0
    printed = capsys.readouterr().out
    for value in (".474", ".302", ".187", f"{float(PAPER_C(1e-7)):.3f}"):
        assert value in printed


def test_bad_input(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="above the smallest width"):
        ScalingDoor(widths=(16,), ks=(32,))
    with pytest.raises(ConfigError, match="its own grid"):
        ScalingDoor(grid=("k=2",))
    with pytest.raises(ConfigError, match="held-out text"):
        scaling_door.train_and_measure(ScalingDoor(activations=tmp_path, tokens=TokensConfig()))
    table = tmp_path / "runs.csv"
    for text in ("n,k\n1,2\n", "n,k,loss\n1,2,x\n", "n,k,loss\n"):
        table.write_text(text)
        with pytest.raises(DataError, match="runs.csv"):
            scaling_door.read_runs(table)
    table.write_text("n,k,loss\n64,2,0.5\n128,2,0.4\n")
    assert main(["scaling", f"--runs={table}", f"--root={tmp_path}"]) == 0
    found = json.loads((the_folder(tmp_path) / "fits.json").read_text())
    assert not found["fits"] and "at least 7 runs" in found["not_fitted"]["L(n, k)"]


def test_plots() -> None:
    panel = scaling_plot.Panel("a < b", "x", [scaling_plot.Series("s", [1, 10], [0.5, 0.25], [1, 10], [0.5, 0.25])])
    root = ElementTree.fromstring(scaling_plot.draw([panel, panel]))
    assert len(root.findall("{http://www.w3.org/2000/svg}circle")) == 4
    places = {float(c.attrib["cy"]) for c in root.findall("{http://www.w3.org/2000/svg}circle")}
    assert len(places) == 2
    with pytest.raises(ValueError, match="nothing to draw"):
        scaling_plot.draw([scaling_plot.Panel("empty", "x", [])])
    assert scaling_plot.ticks(0.9, 11) == [1, 2, 5, 10]
    assert scaling_plot.ticks(0.38, 0.61) == [0.4, 0.45, 0.5, 0.55, 0.6]
    assert scaling_plot.ticks(1, 10_000) == [1, 10, 100, 1000, 10_000]
