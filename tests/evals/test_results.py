"""Rows: what is written is what is read, whatever stands in a slice; what may not be written."""

import math
from dataclasses import replace
from pathlib import Path

import pytest

from evals.results import Estimate, Metric, Row, SubjectInfo, make_row, read_rows, write_rows
from sae.errors import ArtefactError, ConfigError
from sae.manifest import writing

METRIC = Metric(
    name="m", title="M", unit="", better="higher", description="d", reference="r", low=0.0, high=1.0, headline=True
)
INFO = SubjectInfo(
    sae_id="s", kind="sae", lm="l", lm_revision="0", hookpoint="layers.1", architecture="topk", d_in=4, d_sae=8, k=2,
    train_tokens=0, sae_sha256="0" * 64,
)  # fmt: skip


def row(value: float | None = 0.5, *, part: str = "", **fields) -> Row:
    return make_row(
        INFO, "e", 1, METRIC, Estimate(value=value, **fields), seed=0, run_key="k", preset="tiny", slice=part
    )


def written(folder: Path, rows: list[Row]) -> Path:
    with writing(folder, kind="rows", key="k" * 16, stage_version=1, config={}) as out:
        assert write_rows(out.path, rows, [METRIC]) == len(rows)
    return folder


def test_rows_come_back_sorted_and_unharmed_by_odd_line_ends(tmp_path: Path) -> None:
    rows = [row(0.25, part=f"task={mark}") for mark in ("b\u2028c", "a\u0085", "ä\u2029", "\u000b\u001c", "plain")]
    rows.append(row(None, failure="one_class", part="task=none"))
    found = read_rows(written(tmp_path / "rows", rows))
    assert found == sorted(rows, key=Row.sort_key) and len(found) == 6
    again = written(tmp_path / "again", rows[::-1])
    assert (again / "rows.jsonl").read_bytes() == (tmp_path / "rows" / "rows.jsonl").read_bytes()
    assert read_rows(written(tmp_path / "none", [])) == []


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_not_finite_is_never_written(value: float) -> None:
    found = row(value)
    assert (found.value, found.status, found.failure) == (None, "undefined", "non_finite")
    found = row(0.5, ci_low=value)
    assert (found.value, found.ci_low, found.failure) == (None, None, "non_finite")


def test_a_value_out_of_its_range_or_without_a_reason() -> None:
    assert row(1.0).status == row(0.0).status == "ok"
    with pytest.raises(ConfigError, match=r"outside its declared range \[0.0, 1.0\]"):
        row(1.01)
    with pytest.raises(ConfigError, match="needs a failure code"):
        row(None)


@pytest.mark.parametrize(("fields", "says"), [
    ({"value": 0.95, "ci_low": 0.67, "ci_high": 0.91, "n": 20}, "outside its own interval"),
    ({"value": 0.9, "ci_low": 0.8, "ci_high": 1.02, "n": 20}, "beyond its range"),
    ({"value": 0.5, "ci_low": 0.6, "ci_high": 0.4, "n": 20}, "outside its own interval"),
    ({"value": 0.5, "ci_low": 0.5, "ci_high": 0.5, "n": 20}, "no width"),
    ({"value": 0.5, "ci_low": 0.4, "n": 20}, "half an interval"),
    ({"value": 0.5, "ci_low": 0.4, "ci_high": 0.6, "n": 1}, "from 1 units"),
    ({"value": 0.5, "stderr": -0.1, "n": 20}, "negative standard error"),
    ({"value": 0.5, "n": -1}, "counts -1 units"),
    ({"value": None, "failure": "one_class", "ci_low": 0.1, "ci_high": 0.2, "n": 20}, "undefined but has an interval"),
])
def test_numbers_that_cannot_be_right_are_no_row(fields: dict, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        row(**fields)


def test_numbers_that_may_look_odd_are_a_row() -> None:
    assert row(1.0, ci_low=0.9, ci_high=1.0 + 1e-12, stderr=0.1, n=6).status == "ok"  # rounding
    assert row(0.5, ci_low=0.5, ci_high=0.5, stderr=0.01, n=99).status == "ok"  # a quantile of whole numbers


def test_undeclared_metrics_and_doubles(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'other'"):
        write_rows(tmp_path, [replace(row(), metric="other")], [METRIC])
    with pytest.raises(ConfigError, match="twice"):
        write_rows(tmp_path, [row(0.1), row(0.2)], [METRIC])
    assert not list(tmp_path.iterdir())


def test_an_incomplete_folder_holds_no_rows(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("{}\n")
    with pytest.raises(ArtefactError, match="run its evaluation again"):
        read_rows(tmp_path)
