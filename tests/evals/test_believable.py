"""The numbers that are published, and the checks themselves."""

from dataclasses import asdict
from pathlib import Path

import pandas as pd
import pytest
from believable import complaints

from evals.results import Estimate, SubjectInfo, make_row
from evals.suite import reconstruction
from sae import plugins

STUDY = Path(__file__).parents[2] / "results" / "smollm2-study" / "rows.parquet"


def declared() -> dict:
    suite = {name: plugins.find("evals.suite", name) for name in plugins.names("evals.suite")}
    return {(name, m.name): m for name, evaluation in suite.items() for m in evaluation.metrics}


def test_the_published_study_is_believable() -> None:
    """Every row in its range and inside its own interval, every sum the sum of its parts."""
    rows, metrics = pd.read_parquet(STUDY), declared()
    rows = rows.astype({"failure": object}).where(rows.notna(), None)
    assert set(zip(rows["eval"], rows.metric, strict=True)) <= set(metrics)
    rows = rows.astype({"value": float, "ci_low": float, "ci_high": float, "stderr": float})
    assert complaints(rows, metrics) == []


def test_the_checks_find_what_is_wrong() -> None:
    subject = SubjectInfo(
        sae_id="s", kind="sae", lm="l", lm_revision="0", hookpoint="layers.1", architecture="topk", d_in=4, d_sae=8,
        k=2, train_tokens=0, sae_sha256="0" * 64,
    )  # fmt: skip
    metrics = {m.name: m for m in reconstruction.METRICS}

    def table(**values: float) -> pd.DataFrame:
        return pd.DataFrame([
            asdict(make_row(subject, "reconstruction", 1, metrics[name], Estimate(value=v, n=9), seed=0, run_key="k",
                            preset="tiny"))
            for name, v in values.items()
        ])  # fmt: skip

    good = table(fvu=0.2, explained_variance=0.8, l0_p05=2.0, l0_p95=4.0, dense_frac_01=0.5, dense_frac_10=0.1)
    assert complaints(good, declared()) == []
    for wrong, says in (
        (table(fvu=0.2, explained_variance=0.7), "should be 0.8"), (table(l0_p05=3.0, l0_p95=2.0), "is above l0_p95"),
        (table(l0=9.0), "more latents are active than there are"),
        (good.assign(value=[0.2, 0.8, -1.0, 4.0, 0.5, 0.1]), "outside its declared range"),
        (good.assign(n=0), "made of no unit"), (good.assign(status="undefined"), "is undefined with the value"),
    ):  # fmt: skip
        assert any(says in text for text in complaints(wrong, declared())), says


@pytest.mark.parametrize("name", plugins.names("evals.suite"))
def test_every_metric_declares_a_range_that_its_unit_allows(name: str) -> None:
    """Shares, AUCs, cosines and correlations are bounded on both sides unless they are ratios of losses or gains."""
    open_ended = {"lift", "recovered", "gap_closed", "r2", "abs_dev", "variance", "shrinkage", "fvu", "values"}
    for m in plugins.find("evals.suite", name).metrics:
        assert m.low < m.high, m.name
        if m.unit in ("share", "AUC", "F1", "cosine", "correlation") and not any(t in m.name for t in open_ended):
            widest = 2 if m.name.startswith("gain_") else 1  # a difference of two correlations
            assert -widest <= m.low and m.high <= widest, (m.name, m.low, m.high)
