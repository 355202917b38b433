"""The bench at a tiny size: rows are appended, and sizes that cannot be are refused."""

import csv
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    command = [sys.executable, str(ROOT / "kernels" / "bench.py"), "--device", "cpu", *arguments]
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


def test_rows_are_appended(tmp_path: Path) -> None:
    out = tmp_path / "kernels.csv"
    for runs in (1, 2):
        done = bench("--n", "8", "--k", "2", "--f", "16", "--d", "8", "--repeats", "5", "--out", str(out))
        assert done.returncode == 0, done.stderr
        with open(out, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        assert len(rows) == 10 * runs, "dense and torch, two operations in two modes, and what a step cannot do without"
    assert {(row["kernel"], row["provider"], row["mode"]) for row in rows} == {
        *(("sparse_decode", p, m) for p in ("dense", "torch") for m in ("forward", "forward+backward")),
        *(("topk_step", p, m) for p in ("dense", "torch", "product+topk") for m in ("forward+backward", "step")),
    }
    for row in rows:
        assert 0 < float(row["p20_ms"]) <= float(row["p50_ms"]) <= float(row["p80_ms"])
        assert row["device"] and row["d_sae"] == "16"
    assert "sparse_decode forward+backward: dense / torch = " in done.stdout
    assert "topk_step forward+backward: product+topk / torch = " in done.stdout


def test_sizes_are_checked(tmp_path: Path) -> None:
    done = bench("--k", "9", "--f", "8", "--out", str(tmp_path / "kernels.csv"))
    assert done.returncode == 2 and "k at most f" in done.stderr
    assert not (tmp_path / "kernels.csv").exists()


def test_rows_of_other_columns_are_not_mixed(tmp_path: Path) -> None:
    out = tmp_path / "kernels.csv"
    out.write_text("kernel,provider\n")
    done = bench("--n", "8", "--k", "2", "--f", "16", "--d", "8", "--repeats", "2", "--out", str(out))
    assert done.returncode != 0 and "other columns" in done.stderr
    assert out.read_text() == "kernel,provider\n"
