"""Ratios and tables of the bench: last run of a measurement, figures to reach, the place in the document."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "kernels"))
import bench_summary  # noqa: E402


def row(kernel: str, provider: str, p50: float, mode: str = "forward+backward", **more: object) -> dict[str, object]:
    made: dict[str, object] = {
        "kernel": kernel, "provider": provider, "mode": mode, "n_tokens": 4, "k": 2, "d_sae": 8, "d_in": 3,
        "dtype": "float32", "p50_ms": p50, "peak_mib": "", "share": "", "device": "chip", "threads": 2, "torch": "2",
        "triton": "3", "commit": "a",
    }  # fmt: skip
    return made | more


def test_ratios_say_whether_a_figure_is_reached() -> None:
    lines = bench_summary.ratios([
        row("sparse_decode", "dense", 90.0), row("sparse_decode", "torch", 10.0),
        row("topk_step", "product+topk", 10.0), row("topk_step", "torch", 14.0),
        row("topk_step", "dense", 30.0, "step", peak_mib="5"),
        row("topk_step", "published", 14.0, "step", peak_mib="5"),
        row("topk_step", "fused-A", 10.0, "step", peak_mib="5", share="0.7"),
    ])  # fmt: skip
    assert [line.split(";")[0] for line in lines] == [
        "sparse_decode forward+backward: dense / torch = 9.00 (at least 8.00: reached)",
        "topk_step forward+backward: product+topk / torch = 0.71 (at least 0.77: NOT reached)",
        "topk_step step: dense / fused-A = 3.00 (at least 2.50: reached)",
        "topk_step step: published / fused-A = 1.40 (at least 1.50: NOT reached)",
        "topk_step step: 0.70 of the floor (at least 0.6: reached)",
    ]


def test_the_last_run_counts_and_what_it_left_out_is_gone() -> None:
    rows = [
        row("sparse_decode", "dense", 90.0), row("sparse_decode", "torch", 10.0), row("sparse_decode", "old", 1.0),
        row("sparse_decode", "dense", 60.0, commit="b"), row("sparse_decode", "torch", 20.0, commit="b"),
        row("sparse_decode", "torch-4x1", 5.0, commit="b"), row("sparse_decode", "torch", 7.0, device="other"),
    ]  # fmt: skip
    text = bench_summary.tables(rows)
    assert "| dense | 60.0 |  |" in text and "| torch | 20.0 | 3.00 |" in text
    assert "old" not in text and "4x1" not in text and "90.0" not in text
    assert text.count("### ") == 2 and "### other, 2 threads" in text


def test_tables_go_between_the_marks(tmp_path: Path) -> None:
    document = tmp_path / "kernels.md"
    document.write_text(f"before\n{bench_summary.BEGIN}\nstale\n{bench_summary.END}\nafter\n")
    bench_summary.write(document, "fresh")
    text = document.read_text()
    assert "stale" not in text and text.startswith("before\n") and text.endswith("\nafter\n") and "fresh" in text
    document.write_text("no marks")
    with pytest.raises(ValueError, match="no place for the tables"):
        bench_summary.write(document, "fresh")


def test_the_rows_of_the_repository_can_be_read() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "kernels" / "bench_summary.py")], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert "topk_step" in done.stdout and "of the floor" in done.stdout
    assert bench_summary.BEGIN in (ROOT / "docs" / "kernels.md").read_text(encoding="utf-8")
