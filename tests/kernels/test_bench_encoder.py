"""The encoder's bench: settings that give wrong numbers have no time, and a machine without a GPU is told so."""

import os

import pytest
import torch

pytest.importorskip("triton")
bench_common = pytest.importorskip("bench_common")
bench_encoder = pytest.importorskip("bench_encoder")

CUDA = torch.cuda.is_available()


@pytest.mark.skipif(CUDA or os.environ.get("TRITON_INTERPRET") != "1", reason="of the interpreter: sizes are tiny")
def test_every_setting_is_checked_and_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = {"pointers": bench_encoder.Fused(16, 16, 1, 1), "bulk": bench_encoder.Fused(16, 16, 1, 1, bulk=True)}
    monkeypatch.setattr(bench_encoder, "FUSED", tiny | {"bulk s3": tiny["bulk"], "bulk 132": tiny["bulk"]})
    monkeypatch.setattr(bench_encoder, "BLOCKS", ((4, 512),))
    bench = bench_common.Bench(torch.device("cpu"), 2, 60.0)
    bench_encoder.measure(bench, (5, 2, 1_024, 16))
    settings = [row["provider"] for row in bench.rows if row["kernel"] == "encode_setting"]
    assert not bench.failures and len(settings) == len(set(settings)) == 10
    assert all(float(row["p50_ms"]) > 0 for row in bench.rows) and len(bench.rows) == 15
    rated = {row["provider"] for row in bench.rows if row["kernel"] == "encoder_parts" and row["tflops"]}
    assert rated == {"product fp32 out", "product bf16 out"}  # what multiplies nothing has no rate of products
    monkeypatch.setattr(bench_encoder.topk_select, "select_rows", lambda *a: [out.zero_() for out in a[4:]])
    bench_encoder.measure(bench, (5, 2, 1_024, 16))
    assert len(bench.failures) == 10 and all("is off by" in failure for failure in bench.failures)


@pytest.mark.skipif(CUDA, reason="of a machine without a GPU")
def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["bench_encoder.py"])
    with pytest.raises(SystemExit):
        bench_encoder.main()
    assert "GPU only" in capsys.readouterr().err
