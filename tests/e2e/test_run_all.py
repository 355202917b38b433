"""The main job as a user runs it: whole, twice, killed and resumed, on a tiny random model, without assets."""

import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": ""}
EVALS = {
    "reconstruction", "downstream_loss", "probe_loss", "n2g", "ablation_sparsity", "explanation", "sparse_probing",
}  # fmt: skip


def command(root: Path, world: list[str], *more: str) -> list[str]:
    return [sys.executable, "-m", "evals.run_all", "--root", str(root), *world, *more]


def run(
    root: Path, world: list[str], *more: str, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(root, world, *more), capture_output=True, text=True, env={**ENVIRONMENT, **(env or {})}
    )


def rows_of(root: Path) -> dict[str, str]:
    """Path below root -> sha256 of each rows.jsonl."""
    return {
        str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(root.glob("rows/*/*/*/rows.jsonl"))
    }


@pytest.fixture(scope="session")
def finished(tiny_world: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results of one uninterrupted run."""
    root = tmp_path_factory.mktemp("finished")
    done = run(root, tiny_world)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return root


def test_everything_is_there(finished: Path):
    board = pd.read_csv(finished / "leaderboard.csv")
    assert {"topk", "relu"} <= set(board["architecture"])
    rows = [json.loads(line) for p in finished.glob("rows/*/*/*/rows.jsonl") for line in p.read_text().splitlines()]
    assert {r["eval"] for r in rows} == EVALS
    assert all(r["value"] is not None or r["failure"] for r in rows)
    assert (finished / "leaderboard.md").read_text().strip()
    assert "<table" in (finished / "site" / "index.html").read_text()
    assert list((finished / "dataset").rglob("*.parquet")) and (finished / "dataset" / "README.md").is_file()
    found = finished.glob("effects/*/effects.jsonl")
    effects = [json.loads(line) for p in found for line in p.read_text().splitlines()]
    assert {e["sae_id"].split(".")[-2].partition("-")[0] for e in effects} == {"topk", "relu"}
    assert all(e["failure"] or (e["kl"] >= 0 and e["n_windows"] and e["raised"]) for e in effects)
    log = json.loads((finished / "run.json").read_text())
    assert not log["failures"] and {s["status"] for s in log["stages"]} <= {"done", "reused"}


def test_second_run_does_nothing_twice(finished: Path, tiny_world: list[str]):
    before = rows_of(finished)
    stamps = {p: p.stat().st_mtime_ns for p in finished.rglob("manifest.json")}
    done = run(finished, tiny_world)
    assert done.returncode == 0, done.stderr[-2000:]
    assert rows_of(finished) == before
    assert {p: p.stat().st_mtime_ns for p in finished.rglob("manifest.json") if p in stamps} == stamps
    heavy = [
        s
        for s in json.loads((finished / "run.json").read_text())["stages"]
        if s["name"].startswith(("act", "train", "eval"))
    ]
    assert heavy and all(s["status"] == "reused" for s in heavy)


@pytest.mark.slow
def test_same_seed_gives_the_same_rows(finished: Path, tiny_world: list[str], tmp_path: Path):
    assert run(tmp_path, tiny_world).returncode == 0
    assert rows_of(tmp_path) == rows_of(finished)


MOMENTS = (
    "tokens/*",
    "activations/*",
    "saes/*.tmp-*",
    "saes/*",
    "latents/*",
    "explanations/*",
    "scores/*",
    "rows/*/*/*",
)


@pytest.mark.slow
def test_killed_at_every_stage_then_resumed(finished: Path, tiny_world: list[str], tmp_path: Path):
    """kill -9 as soon as each kind of artefact appears; the last run must end with the rows of an undisturbed one."""
    for pattern in MOMENTS:
        process = subprocess.Popen(
            command(tmp_path, tiny_world),
            env=ENVIRONMENT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + 120
        while process.poll() is None and not list(tmp_path.glob(pattern)) and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
    done = run(tmp_path, tiny_world)
    assert done.returncode == 0, done.stderr[-3000:]
    assert rows_of(tmp_path) == rows_of(finished)
    assert not list(tmp_path.glob("*/*.tmp-*"))


@pytest.mark.slow
def test_existing_sae_is_evaluated_without_training(finished: Path, tiny_world: list[str], tmp_path: Path):
    sae = next(p for p in (finished / "saes").iterdir() if ".topk-" in p.name)
    done = run(tmp_path, tiny_world, "--sae", str(sae), "--evals", "reconstruction")
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [
        json.loads(x) for p in tmp_path.glob("rows/*/reconstruction/*/rows.jsonl") for x in p.read_text().splitlines()
    ]
    here = {r["metric"]: r["value"] for r in rows if r["sae_id"] == sae.name and r["slice"] == ""}
    there = {
        r["metric"]: r["value"]
        for p in finished.glob(f"rows/{sae.name}/reconstruction/*/rows.jsonl")
        for r in map(json.loads, p.read_text().splitlines())
        if r["slice"] == ""
    }
    assert here["fvu"] == pytest.approx(there["fvu"], rel=1e-6)
    assert not list((tmp_path / "saes").glob("*.relu-*"))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--model", "no/such-model"], "no/such-model"),
        (["--evals", "recontruction"], "reconstruction"),
        (["--hookpoint", "layers.99"], "layers.99"),
        (["--texts", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--sae", "nowhere"], "nowhere"),
        (["--interp.explainers", "n2gg"], "n2g"),
        (["--interp.scorers", "embeding"], "embedding"),
        (["--tokens.context-tokens", "2"], "context_tokens"),
    ],
)  # fmt: skip
def test_bad_input_is_one_clear_message(tiny_world: list[str], tmp_path: Path, arguments: list[str], says: str):
    done = run(tmp_path, tiny_world, *arguments, env={"HF_HUB_OFFLINE": "1"})
    assert done.returncode not in (0, 130)
    assert says in done.stderr + done.stdout, done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("content", "says"),
    [(b"", "empty"), (b"\n  \n", "no text"), (b'{"text": "caf\xe9"}\n', "not UTF-8"), (b'{"body": "x"}\n', "text")],
)
def test_bad_text_files(tiny_world: list[str], tmp_path: Path, content: bytes, says: str):
    (tmp_path / "t.jsonl").write_bytes(content)
    done = run(tmp_path / "root", tiny_world, "--texts", str(tmp_path / "t.jsonl"))
    assert done.returncode not in (0, 130) and says in done.stderr and "Traceback" not in done.stderr


def test_truncated_sae_file(finished: Path, tiny_world: list[str], tmp_path: Path):
    import shutil

    source = next(p for p in (finished / "saes").iterdir() if ".topk-" in p.name)
    broken = tmp_path / source.name
    shutil.copytree(source, broken)
    data = (broken / "sae.safetensors").read_bytes()
    (broken / "sae.safetensors").write_bytes(data[: len(data) // 2])
    done = run(tmp_path / "root", tiny_world, "--sae", str(broken))
    assert done.returncode not in (0, 130) and "sae.safetensors" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_faulty_llm_server_gives_counted_failures_and_no_zero(tiny_world: list[str], tmp_path: Path):
    """Most requests meet a fault, some for good. The run ends well; what failed is counted, and never a number."""
    from faulty import judge_server

    interp = ["--interp.client", "openai", "--interp.llm", "m", "--interp.explainers", "highlighted", "token_list"]
    scorers = ["--interp.scorers", "detection", "fuzzing", "--evals", "explanation"]
    with judge_server() as server:
        arguments, env = [*interp, "--interp.base-url", server.url, *scorers], {"NO_PROXY": "127.0.0.1"}
        stopped = run(tmp_path, tiny_world, *arguments, "--interp.max-llm-tokens", "2500", env=env)
        assert stopped.returncode == 3 and "--max-llm-tokens" in stopped.stderr, stopped.stderr[-3000:]
        assert server.delivered and "Traceback" not in stopped.stderr
        done = run(tmp_path, tiny_world, *arguments, env=env)
        assert done.returncode == 0, done.stderr[-3000:]
        paid, log = len(server.delivered), json.loads((tmp_path / "run.json").read_text())
        again = run(tmp_path, tiny_world, *arguments, env=env)
    assert again.returncode == 0 and "Traceback" not in done.stderr + again.stderr
    assert len(server.delivered) == paid > 100  # a refusal is an answer: nothing is asked twice
    explained = [
        json.loads(line)
        for p in tmp_path.glob("explanations/*/explanations.jsonl")
        for line in p.read_text().splitlines()
    ]
    written = [e for e in explained if e["explainer"] == "highlighted"]
    failed = [e for e in written if e["failure"]]
    assert failed and len(failed) < len(written)
    assert {e["failure"]["code"] for e in failed} <= {"refusal", "server_error", "no_json"}
    assert all(e["text"] is None for e in failed)
    items = pd.concat(pd.read_parquet(p) for p in tmp_path.glob("scores/*/items.parquet"))
    lost = items[items["failure"].notna()]
    assert len(lost) and lost["verdict"].isna().all() and items[items["failure"].isna()]["verdict"].notna().all()
    scores = pd.concat(pd.read_parquet(p) for p in tmp_path.glob("scores/*/scores.parquet"))
    failed_ids = {e["explanation_id"] for e in failed}
    theirs = scores[scores["explanation_id"].isin(failed_ids)]
    assert len(theirs) and theirs["value"].isna().all() and theirs["null_reason"].notna().all()
    assert scores["value"].notna().any() and scores[scores["value"].isna()]["null_reason"].notna().all()
    rows = [json.loads(x) for p in tmp_path.glob("rows/*/*/*/rows.jsonl") for x in p.read_text().splitlines()]
    assert any(r["n_failed"] for r in rows) and all(r["value"] is not None or r["failure"] for r in rows)
    spent, planned = log["notes"]["llm"], log["notes"]["llm_estimate"]
    assert any(log["notes"]["failed_explanations"].values()) and spent["failed"] > 0
    assert 0.6 < planned["requests"] / spent["requests"] < 1.5  # lost texts are not scored, odd answers asked twice
    assert pd.read_parquet(tmp_path / "ledger.parquet")["requests"].sum() == spent["requests"]


@pytest.mark.slow
def test_dead_llm_server_is_an_error_not_a_zero(tiny_world: list[str], tmp_path: Path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    done = run(
        tmp_path,
        tiny_world,
        "--interp.client",
        "openai",
        "--interp.llm",
        "x",
        "--interp.base-url",
        f"http://127.0.0.1:{port}/v1",
        "--interp.explainers",
        "highlighted",
        "--interp.scorers",
        "embedding",
        "--evals",
        "explanation",
        env={"OPENAI_API_KEY": "test"},
    )
    assert done.returncode not in (0, 130)
    assert "Traceback" not in done.stderr
    rows = [json.loads(x) for p in tmp_path.glob("rows/*/*/*/rows.jsonl") for x in p.read_text().splitlines()]
    assert not [r for r in rows if r["status"] == "ok" and r["metric"] == "auc"]
