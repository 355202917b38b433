"""The study's plan, its text and its published folder."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from evals import results
from evals.results import Estimate, Metric, SubjectInfo, make_row, row_dir, write_draws, write_rows
from evals.run_config import tiny
from evals.study import SPARSITIES, StudyConfig, publish
from evals.study_report import write_report
from sae.errors import ConfigError
from sae.manifest import writing

UNITS = 60
FVU = {"topk": 0.20, "batchtopk": 0.20, "relu": 0.30}
"""True values; seeds differ by 0.002, units by 0.01."""


def info(sae_id: str, architecture: str, k: int | None, kind: str = "sae") -> SubjectInfo:
    return SubjectInfo(
        sae_id=sae_id, kind=kind, lm="SmolLM2-135M", lm_revision="r", hookpoint="layers.15", architecture=architecture,  # type: ignore[arg-type]
        d_in=576, d_sae=4608, k=k, train_tokens=1000, sae_sha256="0" * 64)


def metrics(*names: tuple[str, str]) -> tuple[Metric, ...]:
    return tuple(Metric(name=n, title=n, unit="1", better=b, description=n, reference="test", headline=True)  # type: ignore[arg-type]
                 for n, b in names)


def measured(root: Path, subject: SubjectInfo, evaluation: str, values: dict[str, tuple[str, float | None]]) -> None:
    """Rows with draws, as an evaluation writes them: draws of all subjects share their resampling noise."""
    shared = 0.01 * np.random.default_rng(5).standard_normal(400)
    declared = metrics(*((m, better) for m, (better, _) in values.items()))
    folder = row_dir(root, subject.sae_id, evaluation, "0123456789abcdef")
    rows, draws = [], {}
    for metric, (_, value) in zip(declared, values.values(), strict=True):
        if value is None:
            estimate = Estimate.undefined("gate_failed")
        else:
            own = 0.001 * np.random.default_rng(len(subject.sae_id) + ord(subject.sae_id[-1])).standard_normal(400)
            drawn = value + shared + own
            draws[f"{metric.name}|"] = drawn
            estimate = Estimate(value=value, ci_low=float(np.quantile(drawn, 0.025)),
                                ci_high=float(np.quantile(drawn, 0.975)), stderr=float(drawn.std()), n=UNITS)
        rows.append(make_row(subject, evaluation, 1, metric, estimate, seed=0, run_key="0123456789abcdef",
                             preset="quick"))
    with writing(folder, kind="rows", key="0123456789abcdef", stage_version=1, config={"eval": evaluation},
                 inputs={"test": "t"}) as out:
        write_rows(out.path, rows, declared)
        write_draws(out.path, draws)


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    """Three architectures, two seeds each, at k = 32; a random SAE; absorption without a value."""
    for architecture, fvu in FVU.items():
        k = None if architecture == "relu" else 32
        for seed in (0, 1):
            sae_id = f"smollm2-135m.layers.15.{architecture}-f4608.s{seed}-{'ab'[seed] * 8}"
            train = {"architecture": architecture, "seed": seed, "k": k, "l1": 0.15, "gate_l1": 0.39}
            with writing(tmp_path / "saes" / sae_id, kind="saes", key="k", stage_version=1, config=train) as out:
                (out.path / "cfg.json").write_text("{}")
            subject = info(sae_id, architecture, k)
            l0 = 32.0 if k else 50.0
            measured(tmp_path, subject, "reconstruction", {
                "fvu": ("lower", fvu + 0.002 * seed), "l0": ("neither", l0), "dead_frac": ("lower", 0.1),
                "cosine": ("higher", 0.9 + 0.01 * seed)})
            measured(tmp_path, subject, "absorption", {"absorption_fraction": ("lower", None)})
    measured(tmp_path, info("baseline.random_sae.deadbeef", "topk", 32, "baseline"), "reconstruction", {
        "fvu": ("lower", 0.8), "l0": ("neither", 32.0)})
    return tmp_path


PENALTIES = {(0.15, 0.39): 32, (0.075, 0.27): 64}


def test_the_text_says_what_the_rows_say(finished: Path) -> None:
    write_report(finished, "topk", PENALTIES, failures=["some SAE, n2g: ValueError: no"])
    text = (finished / "study.md").read_text()
    shown, _, rest = text.partition("## What it does not show")
    assert "3 architectures, 1 sparsities, 2 seeds" in text
    # relu is worse for real, but at another L0; batchtopk is not told apart
    assert "**topk** over relu at k 32" in shown and "at another L0" in shown
    assert "over batchtopk" not in shown and "**batchtopk**" not in shown
    assert "no difference is real" in shown  # at equal L0
    assert "batchtopk and topk at k 32: no difference in" in rest
    assert "absorption: absorption_fraction undefined for 6 SAEs (gate_failed)" in rest
    assert "Failed: some SAE, n2g: ValueError: no." in rest
    assert "Fewer than three seeds" in rest
    assert "FVU: 6 of 6 SAEs better" in shown
    assert "## Further metrics at k = 32" in text and "(reconstruction) | 0.905 ± 0.007 | 0.905 ± 0.007" in text
    record = json.loads((finished / "study.json").read_text())
    assert {tuple(c["sae_ids"]) for c in record["cells"]} and len(record["cells"]) == 3
    assert len(record["comparisons"]) == 2


def test_a_second_report_has_the_same_bytes(finished: Path) -> None:
    first = [p.read_bytes() for p in write_report(finished, "topk", PENALTIES)]
    assert [p.read_bytes() for p in write_report(finished, "topk", PENALTIES)] == first


def test_every_run_has_all_cells_and_every_evaluation(tmp_path: Path) -> None:
    runs = StudyConfig(root=tmp_path).runs()
    assert all(r.random_model for r in runs)
    assert [r.train.k for r in runs] == [32, 64] and {r.root for r in runs} == {tmp_path}
    for run, sparsity in zip(runs, SPARSITIES, strict=True):
        cfgs = run.train_configs()
        assert len(cfgs) == 18 and len({(c.architecture, c.seed) for c in cfgs}) == 18
        assert {c.l1 for c in cfgs if c.architecture == "relu"} == {sparsity.l1}
        assert {"absorption", "seed_stability", "n2g", "explanation", "probe_loss"} <= set(run.evals)
        assert "ground_truth" not in run.evals
    with pytest.raises(ConfigError, match="two training seeds"):
        StudyConfig(seeds=(0,))


def test_publish_copies_what_git_keeps_and_nothing_else(finished: Path, tmp_path: Path) -> None:
    import pandas as pd

    write_report(finished, "topk", PENALTIES)
    target = tmp_path / "kept"
    (finished / "run-k32.json").write_text("{}")
    for _ in range(2):
        assert publish(finished, target) == ["study.md", "study.json", "run-k32.json", "rows.parquet", "site"]
    assert {p.name for p in target.iterdir()} == {"study.md", "study.json", "run-k32.json", "rows.parquet", "site"}
    rows = pd.read_parquet(target / "rows.parquet")
    assert len(rows) == len(results.load_results(finished)) > 0
    assert {"torch", "eval_version", "ci_low"} <= set(rows.columns)
    assert "topk" in (target / "site" / "index.html").read_text()
    (finished / "run-k32.json").unlink()
    assert "run-k32.json" not in publish(finished, target) and not (target / "run-k32.json").exists()


def test_published_pages_show_the_latents_asked_for_alone(tmp_path: Path) -> None:
    import synthetic_latents as synthetic
    from stored_latents import renumbered, write_artefacts
    from synthetic_results import RELU, TOPK, write_run

    root = tmp_path / "root"
    write_run(root)
    for i, sae_id in enumerate((TOPK, RELU)):
        base = synthetic.latent(0, sae_id)
        write_artefacts(root, [renumbered(base, n) for n in range(3)], key=f"{i:016x}", made="2026-01-01")
    publish(root, tmp_path / "kept", [TOPK])
    pages = [p.relative_to(tmp_path / "kept" / "site").as_posix() for p in (tmp_path / "kept").rglob("*.html")]
    assert {f"latent/{TOPK}/{n}.html" for n in range(3)} <= set(pages)
    assert not any(RELU in p for p in pages if p.startswith("latent")) and any(RELU in p for p in pages)


def test_a_study_asks_for_what_its_preset_has() -> None:
    """The preset tiny names no probe task; a run refuses to be asked for what it cannot measure."""
    probed = {"probe_loss", "sparse_probing"}
    found = {preset: set(StudyConfig(preset=preset).runs()[1].evals) for preset in ("tiny", "quick")}
    assert not probed & found["tiny"] and found["quick"] - found["tiny"] == probed
    assert "seed_stability" in found["tiny"]
    assert StudyConfig(preset="tiny", evals=("probe_loss",)).runs()[0].evals == ("probe_loss",)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_tiny_study_from_end_to_end(tmp_path: Path) -> None:
    """Two architectures x two sparsities x two seeds on a random model: trained, measured, told, and resumed."""
    import importlib.util

    from tiny import save_tiny_lm, write_task, write_texts

    spec = importlib.util.spec_from_file_location("study", Path(__file__).parents[2] / "scripts" / "study.py")
    study = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(study)
    lm = tmp_path / "lm"
    lm.mkdir()
    save_tiny_lm(lm)
    base = replace(tiny(), task_csv=(f"numbers={write_task(tmp_path / 'task.csv')}:prompt:target:1",), effect_windows=0)
    cfg = StudyConfig(
        root=tmp_path / "study", base=base, model=str(lm), architectures=("topk", "relu"), seeds=(0, 1),
        random_model=False,
        texts=str(write_texts(tmp_path / "texts.jsonl", documents=1200)),
        sparsities=tuple(replace(s, k=k) for s, k in zip(SPARSITIES, (4, 8), strict=True)),
        evals=("reconstruction", "downstream_loss", "sparse_probing", "seed_stability"))
    status, failures = study.run_all(cfg)
    assert status == 0 and not failures
    penalties = {(s.l1, s.gate_l1): s.k for s in cfg.sparsities}
    write_report(cfg.root, "topk", penalties)
    record = json.loads((cfg.root / "study.json").read_text())
    assert sorted((c["architecture"], c["k"]) for c in record["cells"]) == [
        ("relu", 4), ("relu", 8), ("topk", 4), ("topk", 8)]
    assert all(len(c["sae_ids"]) == 2 for c in record["cells"])
    before = {p: p.stat().st_mtime_ns for p in cfg.root.rglob("manifest.json")}
    assert study.run_all(cfg)[0] == 0
    assert {p: p.stat().st_mtime_ns for p in cfg.root.rglob("manifest.json")} == before
