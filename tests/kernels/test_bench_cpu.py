"""The comparison of ways on a CPU at a tiny size; a way that gives other numbers is not timed."""

import pytest
import torch

bench_common = pytest.importorskip("bench_common")
bench_cpu = pytest.importorskip("bench_cpu")
pytestmark = pytest.mark.filterwarnings("ignore:Sparse :UserWarning")
WAYS = ["dense", "embedding_bag", "gather", "index_add", "csr"]


def test_ways_agree_and_are_timed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["bench_cpu.py", *"--n 9 --k 3 --f 40 --d 8 --repeats 2 --ways".split(), *WAYS])
    bench_cpu.main()
    printed = capsys.readouterr().out
    assert "left out" not in printed and all(f"\n{way:28}" in printed for way in WAYS)
    assert "dense / ours = " in printed and "training step / (product + top-k) = " in printed


def test_a_wrong_way_has_no_time(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    real = bench_cpu.index_add

    def wrong(*operands: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y, dvalues, dW = real(*operands)
        return y, dvalues, dW * 1.001

    monkeypatch.setattr(bench_cpu, "index_add", wrong)
    bench = bench_common.Bench(torch.device("cpu"), 2, 60.0)
    assert set(bench_cpu.decode(bench, (9, 3, 40, 8), WAYS)) == set(WAYS) - {"index_add"}
    assert "index_add: left out, RuntimeError: index_add: dW is off by 0.001" in capsys.readouterr().out
