"""The tuner: settings that give other numbers or cannot run are left out, the table is what the kernels look up."""

import json
import os
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
bench_common = pytest.importorskip("bench_common")
bench_tune = pytest.importorskip("bench_tune")
bench = pytest.importorskip("bench")
launch = pytest.importorskip("sae_kernels.launch")
import triton  # noqa: E402

from sae_kernels import sparse_grad, tuned  # noqa: E402

CUDA = torch.cuda.is_available()
GATHER = bench_tune._settings("channels warps rows", (16, 1, 2), (32, 1, 4))
TINY = {
    "topk_bulk": (), "topk_pointers": bench_tune._settings("rows channels warps stages group", (64, 32, 4, 2, 2)),
    "topk_blocks": bench_tune._settings("rows latents", (256, 4_096)),
    "topk_path_bulk": (), "topk_path_pointers": bench_tune._settings("path", ("A",), ("B",)), "threshold_bulk": (),
    "decode": GATHER, "decode_values": GATHER, "decode_error": GATHER,
    "weight_gradients": bench_tune._settings("channels warps rows", (128, 1, 2)),
    "adam_rows": bench_tune._settings("warps", (1,)),
}  # fmt: skip
SHAPE = (3, 1, 40, 40)


@pytest.mark.skipif(CUDA or os.environ.get("TRITON_INTERPRET") != "1", reason="of the interpreter: sizes are tiny")
def test_it_measures_all_kernels_and_writes_what_wins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SAESCOPE_CACHE", str(tmp_path))
    monkeypatch.setattr(launch, "device_name", lambda device: "Tuned GPU")
    monkeypatch.setattr(bench_tune, "CANDIDATES", TINY)
    real = bench_common.Bench.run

    def run(self: object, kernel: str, calls: dict, *rest: object, **options: object) -> dict:
        """As measured, with times of our own: the last setting wins for gathers, the constants elsewhere."""
        made = real(self, kernel, calls, *rest, **options)
        for place, row in enumerate(self.rows[-len(calls) :]):  # type: ignore[attr-defined]
            ms = 10.0 - place if "decode" in kernel else 10.0 + place
            row.update({"p20_ms": str(ms * 0.99), "p50_ms": str(ms), "p80_ms": str(ms * 1.01)})
        return made

    monkeypatch.setattr(bench_common.Bench, "run", run)
    values = sparse_grad._launch

    def wrong(*arguments: object) -> None:
        values(*arguments)
        if launch.tuned("decode_values", arguments[3]) == GATHER[1]:
            arguments[4].zero_()  # type: ignore[attr-defined]

    monkeypatch.setattr(sparse_grad, "_launch", wrong)
    job = bench_common.Bench(torch.device("cpu"), 2, 60.0)
    launch.forget()
    path = bench_tune.run(job, [(SHAPE, "float32")])
    assert not job.failures and path == tuned.user_file("Tuned GPU", triton.__version__)
    table = tuned.parse(path.read_text())
    won = {e.kernel: e.settings for e in table.entries if e.settings is not None}
    assert won == {"decode": GATHER[1], "decode_values": GATHER[0], "decode_error": GATHER[1]}
    assert "decode_values channels 32 warps 1 rows 4: left out, RuntimeError" in capsys.readouterr().out
    kept = json.loads(path.read_text())["constants_are_best"]
    assert {e["kernel"] for e in kept} == {
        "topk_pointers", "topk_blocks", "topk_path_pointers", "weight_gradients", "adam_rows"
    }  # fmt: skip
    rows = torch.empty(2, 40)
    assert launch.tuned("decode", rows) == GATHER[1] and launch.tuned("adam_rows", rows) is None
    assert not launch._FORCED

    # Another size (of one kernel, for time) and what is there already: one file holds both.
    monkeypatch.setattr(bench_tune, "CANDIDATES", dict.fromkeys(TINY, ()) | {"decode": GATHER})
    bench_tune.run(job, [((3, 1, 40, 20), "float32")])
    both = tuned.parse(path.read_text()).entries
    assert {e.sizes[0] for e in both} == {32, 64} and {e.kernel for e in both if e.settings is None} > {"adam_rows"}
    assert launch.tuned("decode", rows) == launch.tuned("decode", torch.empty(2, 20)) == GATHER[1]
    launch.forget()


def test_overlapping_times_leave_the_constants(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_tune, "CANDIDATES", {"decode": GATHER})
    case = bench_tune.Case("decode", lambda: None, lambda: torch.ones(2), (40, 0, 0), torch.float32)
    for times, wins in (((9.0, 9.5, 9.9), True), ((9.0, 9.5, 10.1), False), ((9.85, 9.9, 9.95), False)):

        def run(self: object, kernel: str, calls: dict, *_: object, times: tuple = times, **__: object) -> None:
            for name in calls:
                p20, p50, p80 = times if name.startswith("channels 32") else (10.0, 10.0, 10.2)
                row = {"provider": name, "p20_ms": p20, "p50_ms": p50, "p80_ms": p80}
                self.rows.append(row)  # type: ignore[attr-defined]

        monkeypatch.setattr(bench_common.Bench, "run", run)
        best, note = bench_tune.fastest(bench_common.Bench(torch.device("cpu"), 2, 60.0), case, SHAPE)
        assert (best == GATHER[1]) == wins and note["best_ms"] == times[1] and note["constants_ms"] == 10.0


@pytest.mark.skipif(CUDA, reason="of a machine without a GPU")
def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["bench.py", "--tune"])
    with pytest.raises(SystemExit):
        bench.main()
    assert "GPU only" in capsys.readouterr().err
