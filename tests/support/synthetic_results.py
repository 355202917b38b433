"""Result rows and latents of a made-up run, for tests of tables and pages. Here only, never in a package."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from autointerp.records import (
    ActivationScale,
    Exemplar,
    Explanation,
    Failure,
    JudgeCheck,
    LatentScore,
    ScoreItem,
    Simulation,
)
from evals.page_data import LatentData, SaeData
from evals.page_tokens import TokenReader
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
            estimate = Estimate(value=value, ci_low=value - half, ci_high=value + half, stderr=half / 1.96, n=120)
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


WORDS = [
    " the",
    " court",
    " of",
    " appeals",
    " held",
    " that",
    " law",
    " must",
    " stand",
    ",",
    " and",
    " cell",
    " growth",
    ".",
]


def reader(extra: dict[int, str] | None = None) -> TokenReader:
    """Token i is WORDS[i]; more by ``extra``."""
    texts = dict(enumerate(WORDS)) | (extra or {})
    return TokenReader(lambda ids: "".join(texts[i] for i in ids))


def exemplar(i: int, kind: str, split: str, *, group: int = -1, ids: tuple[int, ...] | None = None) -> Exemplar:
    """Active on "court" (1) and a little on "law" (6) where the kind is positive."""
    rng = np.random.default_rng(i)
    token_ids = ids or tuple(int(t) for t in rng.integers(len(WORDS), size=32))
    positive = kind in ("top", "quantile", "random_positive")
    acts = tuple((3.7 - 0.1 * (i % 9) if t == 1 else 0.6 if t == 6 else 0.0) if positive else 0.0 for t in token_ids)
    if positive and max(acts) == 0:
        acts = (2.2, *acts[1:])
    return Exemplar(
        exemplar_id=f"{split}-{kind}-{i}",
        latent=17,
        kind=kind,
        split=split,
        group=group,
        doc_id=f"d{split}{i}",
        source="36_sciq_tf.csv",
        token_ids=token_ids,
        acts=acts,
        peak=int(np.argmax(acts)) if positive else -1,
    )


def latent(number: int = 17, sae_id: str = TOPK) -> LatentData:
    """A latent with four explanations (one failed), scores with floors, verdicts (one failed) and simulations."""
    exemplars = [exemplar(i, "top", "explain") for i in range(4)]
    exemplars += [exemplar(10 + i, "quantile", "explain", group=i) for i in range(3)]
    exemplars += [exemplar(20 + i, "random_positive", "explain") for i in range(3)]
    positive = [exemplar(30 + i, "quantile", "score", group=i % 5) for i in range(6)]
    silent = [exemplar(50 + i, "silent", "score") for i in range(5)] + [
        exemplar(60 + i, "same_token", "score") for i in range(3)
    ]
    pattern = {
        "version": 1,
        "matcher": "longest",
        "pad_id": 0,
        "tokenizer_hash": "",
        "patterns": [
            {"ids": [0, None, 1], "anchored": False, "value": 3.1, "n_docs": 5},
            {"ids": [1], "anchored": True, "value": 2.0, "n_docs": 1},
        ],
    }
    base: dict[str, Any] = {"sae_id": sae_id, "latent": number}
    explanations = [
        Explanation(
            explanation_id="e-list",
            explainer="token_list",
            text="words such as court, law",
            calibrate_score=0.74,
            selected=True,
            **base,
        ),
        Explanation(
            explanation_id="e-n2g", explainer="n2g", text='"... the * court"', pattern=pattern, selected=False, **base
        ),
        Explanation(
            explanation_id="e-pmi",
            explainer="pmi",
            text="legal terms",
            margin=0.31,
            calibrate_score=0.69,
            selected=False,
            llm="SmolLM2-135M-Instruct",
            prompt_tokens=1600,
            output_tokens=9,
            **base,
        ),
        Explanation(
            explanation_id="e-llm",
            explainer="highlighted",
            selected=False,
            llm="some-model",
            failure=Failure(code="no_json", stage="explain", detail="the reply held no object"),
            **base,
        ),
    ]
    score: dict[str, Any] = {
        **base,
        "explanation_id": "e-list",
        "explainer": "token_list",
        "scorer_version": 1,
        "n_pos": 6,
        "n_neg": 8,
    }
    embedding: dict[str, Any] = {**score, "scorer": "embedding", "judge": "minilm"}
    scores = [
        LatentScore(metric="auc", value=0.83, ci_low=0.71, ci_high=0.93, n_failed=1, base_rate=0.01, **embedding),
        LatentScore(metric="precision", value=0.09, ci_low=0.02, ci_high=0.3, base_rate=0.01, **embedding),
        LatentScore(metric="recall", group="decile=1", value=0.5, ci_low=0.1, ci_high=0.9, **embedding),
        LatentScore(
            metric="auc",
            value=0.52,
            ci_low=0.4,
            ci_high=0.64,
            floor_kind="shuffled",
            **{**embedding, "explanation_id": "e-other"},
        ),
        LatentScore(
            metric="pearson",
            value=0.41,
            ci_low=0.2,
            ci_high=0.6,
            **{**score, "scorer": "simulation", "judge": "word_embedding/minilm"},
        ),
        LatentScore(
            metric="auc", null_reason="no_json", **{**embedding, "explanation_id": "e-llm", "explainer": "highlighted"}
        ),
    ]
    items = [
        ScoreItem(
            explanation_id="e-list",
            exemplar_id=e.exemplar_id,
            scorer="embedding",
            positive=e.positive,
            value=0.4 if e.positive else 0.1,
            verdict=e.positive if i != 2 else not e.positive,
        )
        for i, e in enumerate([*positive, *silent[:-1]])
    ]
    items.append(
        ScoreItem(
            explanation_id="e-list",
            exemplar_id=silent[-1].exemplar_id,
            scorer="embedding",
            positive=False,
            failure=Failure(code="timeout", stage="score"),
        )
    )
    items.append(
        ScoreItem(
            explanation_id="e-list", exemplar_id=silent[0].exemplar_id, scorer="simulation", positive=False, value=0.35
        )
    )
    simulations = [
        Simulation(
            explanation_id="e-list",
            exemplar_id=e.exemplar_id,
            simulator="word_embedding",
            scale=ActivationScale.UNIT,
            values=tuple(0.8 if t == 1 else 0.35 if t == 6 else 0.08 for t in e.token_ids),
        )
        for e in [*positive[:-1], *silent[:2]]
    ]
    simulations.append(
        Simulation(
            explanation_id="e-list",
            exemplar_id=positive[-1].exemplar_id,
            simulator="word_embedding",
            failure=Failure(code="low_mass", stage="simulate"),
        )
    )
    stats = {
        "density": 0.0031,
        "pi": 0.01,
        "max_act": 3.7,
        "mean_positive": 1.2,
        "n_active": 811,
        "skew": 21.0,
        "kurtosis": 600.0,
        "histogram": np.array([300, 200, 120, 80, 50, 30, 20, 8, 2, 1]),
    }
    return LatentData(
        latent=number,
        sae_id=sae_id,
        stats=stats,
        top_ids=(1, 6),
        promoted=(" judge", " ruling"),
        suppressed=(" cat",),
        exemplars=[*exemplars, *positive, *silent],
        explanations=explanations,
        scores=scores,
        items=items,
        simulations=simulations,
    )


def site_data(n_latents: int = 3) -> dict[str, SaeData]:
    """What load_site_data would read of the made-up run."""
    import pandas as pd

    rng = np.random.default_rng(0)
    steps = np.arange(1, 129)
    data = {}
    for sae_id in (TOPK, RELU):
        density = 10 ** rng.uniform(-5, -1.3, size=4608)
        density[:280] = 0
        data[sae_id] = SaeData(
            sae_id=sae_id,
            cfg={"architecture": "topk", "d_sae": 4608, "meta": {"lm": "SmolLM2-135M"}},
            train=pd.DataFrame(
                {
                    "step": steps,
                    "tokens": steps * 4096,
                    "loss": 1 / np.sqrt(steps),
                    "fvu": 0.2 + 1 / steps,
                    "l0": np.full(128, 32.0),
                    "dead": np.minimum(steps * 3, 281),
                }
            ),
            stats=pd.DataFrame({"density": density}),
            latents=[latent(17 + 5 * i, sae_id) for i in range(n_latents)],
            tokens=reader(),
            checks=[
                JudgeCheck(
                    judge="minilm",
                    scorer="embedding",
                    auc=0.84,
                    ci_low=0.78,
                    ci_high=0.9,
                    wrong_auc=0.46,
                    n=24,
                    weak=False,
                ),
                JudgeCheck(
                    judge="word_embedding/minilm",
                    scorer="simulation",
                    auc=0.71,
                    ci_low=0.6,
                    ci_high=0.8,
                    wrong_auc=0.6,
                    n=24,
                    n_failed=1,
                    weak=True,
                ),
            ],
        )
    return data
