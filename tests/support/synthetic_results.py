"""Result rows and latents of a made-up run, for tests of tables and pages. Here only, never in a package."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from evals.results import Estimate, Metric, SubjectInfo, make_row, row_dir, write_rows
from sae.manifest import writing

TOPK = "smollm2-135m.layers.15.topk-f4608-k32.s0-3fa9c1d2"
RELU = "smollm2-135m.layers.15.relu-f4608.s0-77ab01cd"
RANDOM = "baseline.random_sae.0a1b2c3d"
PCA = "baseline.pca.layers.15.k32-deadbeef"
EMBEDDING = "explainer=selected,scorer=embedding,judge=minilm"
SIMULATION = "explainer=selected,scorer=simulation,judge=word_embedding/minilm"


def info(sae_id: str, **changes: Any) -> SubjectInfo:
    """An SAE or baseline of the made-up run."""
    base = SubjectInfo(
        sae_id=sae_id,
        kind="baseline" if sae_id.startswith("baseline") else "sae",
        lm="SmolLM2-135M",
        lm_revision="bcc81830",
        hookpoint="layers.15",
        architecture="topk",
        d_in=576,
        d_sae=4608,
        k=32,
        train_tokens=524288,
        sae_sha256="ab" * 32,
    )
    return replace(base, **changes)


SUBJECTS = {
    TOPK: info(TOPK),
    RELU: info(RELU, architecture="relu", k=None),
    RANDOM: info(RANDOM),
    PCA: info(PCA, architecture="pca", d_sae=576),
}
# (eval, metric, slice): value and half width of the interval, or a failure code, per subject
VALUES: dict[tuple[str, str, str], dict[str, tuple[float, float] | str]] = {
    ("reconstruction", "l0", ""): {TOPK: (32.0, 0.0), RELU: (41.3, 0.8), RANDOM: (32.0, 0.0), PCA: (32.0, 0.0)},
    ("reconstruction", "fvu", ""): {
        TOPK: (0.237, 0.006),
        RELU: (0.291, 0.008),
        RANDOM: (0.871, 0.011),
        PCA: (0.402, 0.01),
    },
    ("reconstruction", "dead_frac", ""): {TOPK: (0.061, 0.004), RELU: (0.214, 0.01), RANDOM: (0.02, 0.003)},
    ("downstream_loss", "delta_ce", ""): {
        TOPK: (0.212, 0.03),
        RELU: (0.31, 0.035),
        RANDOM: (6.1, 0.2),
        PCA: (0.9, 0.06),
    },
    ("downstream_loss", "kl", ""): {TOPK: (0.43, 0.03), RELU: (0.55, 0.04), RANDOM: (6.4, 0.2), PCA: (1.1, 0.07)},
    ("probe_loss", "probe_loss", ""): {TOPK: (0.412, 0.02), RELU: (0.431, 0.02), RANDOM: (0.52, 0.02)},
    ("n2g", "n2g_f1", ""): {TOPK: (0.31, 0.05), RELU: (0.28, 0.05), RANDOM: (0.12, 0.03)},
    ("n2g", "n2g_precision", ""): {TOPK: (0.62, 0.06), RELU: (0.58, 0.06), RANDOM: "too_few_positive"},
    ("n2g", "n2g_recall", ""): {TOPK: (0.27, 0.05), RELU: (0.25, 0.05), RANDOM: (0.1, 0.03)},
    ("ablation_sparsity", "gain_vs_random", ""): {TOPK: (0.066, 0.02), RELU: "no_effect", RANDOM: (0.001, 0.01)},
    ("explanation", "auc", EMBEDDING): {TOPK: (0.71, 0.05), RELU: (0.68, 0.05), RANDOM: (0.55, 0.04)},
    ("explanation", "floor_auc", EMBEDDING): {TOPK: (0.51, 0.03), RELU: (0.5, 0.03), RANDOM: (0.5, 0.03)},
    ("explanation", "gain_auc", EMBEDDING): {TOPK: (0.2, 0.05), RELU: (0.18, 0.05), RANDOM: (0.05, 0.04)},
    ("explanation", "precision", EMBEDDING): {TOPK: (0.083, 0.04), RELU: (0.06, 0.03), RANDOM: (0.03, 0.02)},
    ("explanation", "precision_at_half", EMBEDDING): {TOPK: (0.66, 0.04), RELU: (0.61, 0.04), RANDOM: (0.57, 0.03)},
    ("explanation", "pearson", SIMULATION): {TOPK: (0.28, 0.06), RELU: (0.25, 0.06), RANDOM: (0.07, 0.04)},
    ("explanation", "recall_group", EMBEDDING + ",decile=3"): {TOPK: (0.6, 0.1)},
}
CHECKS = {("embedding", "minilm"): (0.84, 0.46, 0.0), ("simulation", "word_embedding/minilm"): (0.71, 0.6, 1.0)}


def metric(name: str) -> Metric:
    """A declaration wide enough for every made-up value."""
    return Metric(name=name, title=name, unit="", better="neither", description="made up", reference="none")


def write_row_folder(
    root: Path,
    subject: SubjectInfo,
    evaluation: str,
    cells: dict[tuple[str, str], tuple[float, float] | str],
    *,
    key: str = "k0",
    version: int = 1,
    preset: str = "quick",
    seed: int = 0,
    created_at: str | None = None,
) -> Path:
    """One complete rows/<sae_id>/<eval>/<key> folder through the real writers."""
    rows = []
    for (name, slice_text), found in cells.items():
        if isinstance(found, str):
            estimate = Estimate.undefined(found, n=0, n_failed=3)
        else:
            value, half = found
            interval = {"ci_low": value - half, "ci_high": value + half, "stderr": half / 1.96} if half else {}
            estimate = Estimate(value=value, n=120, **interval)  # the L0 of topk is the same in all resamples
        rows.append(
            make_row(
                subject,
                evaluation,
                version,
                metric(name),
                estimate,
                seed=seed,
                run_key=key,
                preset=preset,
                slice=slice_text,
                split="test",
            )
        )
    folder = row_dir(root, subject.sae_id, evaluation, key)
    config = {"preset": preset}
    with writing(folder, kind="rows", key=key, stage_version=version, config=config) as out:
        write_rows(out.path, rows, [metric(r.metric) for r in rows])
        out.counts.update({"device": "cpu", "dtype": "float32"})
    if created_at is not None:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        manifest["provenance"]["created_at"] = created_at
        (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    return folder


def write_run(root: Path) -> Path:
    """Rows of two SAEs and two floors, judge checks, and run.json."""
    root.mkdir(parents=True, exist_ok=True)
    for sae_id, subject in SUBJECTS.items():
        by_eval: dict[str, dict[tuple[str, str], tuple[float, float] | str]] = {}
        for (evaluation, name, slice_text), cells in VALUES.items():
            if sae_id in cells:
                by_eval.setdefault(evaluation, {})[name, slice_text] = cells[sae_id]
        if "explanation" in by_eval:
            for (scorer, judge), numbers in CHECKS.items():
                for name, value in zip(("judge_auc", "judge_wrong_auc", "judge_weak"), numbers, strict=True):
                    by_eval["explanation"][name, f"scorer={scorer},judge={judge}"] = (value, 0.0)
        for evaluation, cells in by_eval.items():
            write_row_folder(root, subject, evaluation, cells, created_at="2026-11-25T10:00:00Z")
    stages = [
        ("tokens", 2.1, "done"),
        ("activations: train", 71.0, "done"),
        ("train SAEs", 142.0, "done"),
        ("latents", 20.0, "reused"),
        ("eval: probe_loss", 101.0, "done"),
    ]
    run = {
        "preset": "quick",
        "config": {"model": "default", "seed": 0},
        "seconds": 402.5,
        "peak_gb": 3.1,
        "failures": [],
        "stages": [{"name": n, "seconds": s, "work_seconds": s, "status": t, "note": ""} for n, s, t in stages],
        "provenance": {
            "command": ["run_all.py", "--preset", "quick"],
            "code_sha": "0123456789abcdef",
            "python": "3.11.2",
        },
        "machine": {"cpu": "made-up cpu", "cores": 2, "memory_gb": 25.0},
    }
    (root / "run.json").write_text(json.dumps(run), encoding="utf-8")
    return root
