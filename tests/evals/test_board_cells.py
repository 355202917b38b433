"""Cells and subjects of a board of many SAEs are those that one look at the rows per cell finds."""

import numpy as np
import pandas as pd
import pytest
from synthetic_results import RELU, TOPK, write_run

from evals import results
from evals.board import PROVENANCE, build_board, newest, plain, slice_parts
from evals.gains import NOT_RUN
from evals.results import load_results


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> pd.DataFrame:
    """Two SAEs eleven times over with other values, in disorder; some were measured twice, some by two commits."""
    measured = load_results(write_run(tmp_path_factory.mktemp("cells") / "results"))
    parts = [measured]
    for n in range(10):
        copy = measured[measured["sae_id"].isin([TOPK, RELU])].copy()
        copy["sae_id"] = copy["sae_id"] + f"-{n}"
        copy["value"] += 0.01 * n
        copy["n_failed"] += n
        parts.append(copy)
        if n % 3 == 0:
            again = copy.assign(value=copy["value"] + 1, created_at="2099-01-01T00:00:00", run_key=f"again{n}")
            parts.append(again[again["eval"] == "reconstruction"].assign(code_sha="other"))
    return pd.concat(parts, ignore_index=True).sample(frac=1.0, random_state=0, ignore_index=True)


def test_cells_are_the_first_rows_of_their_filters(rows: pd.DataFrame) -> None:
    board, ordered = build_board(rows), newest(rows, "task_set")
    assert len(board.saes) == 22 and len(board.columns) > 10
    measured = 0
    for column in board.columns:
        spec = column.spec
        mine = ordered[(ordered["eval"] == spec.eval) & (ordered["metric"] == spec.metric)]
        mine = mine[(mine["eval_version"] == column.version) & (mine["preset"] == column.preset)]
        mine = mine[[dict(spec.slice).items() <= slice_parts(s).items() for s in mine["slice"]]] if len(mine) else mine
        for subject in board.subjects:
            cell = board.cells[subject.sae_id, column.id]
            found = mine[(mine["sae_id"] == subject.sae_id) & (mine["slice"] == column.slice)]
            if found.empty:
                assert cell == NOT_RUN
                continue
            row, measured = found.iloc[0], measured + 1
            assert cell.value == plain(row["value"]) and cell.ci_low == plain(row["ci_low"])
            assert (cell.n, cell.n_failed) == (row["n"], row["n_failed"])
            assert (cell.source is None) == (row["slice"] != "")
            if cell.source is not None:
                assert cell.source[0] == subject.sae_id and cell.source[2] == row["run_key"]
    assert measured > 150


def test_provenance_names_every_run_of_a_subject(rows: pd.DataFrame) -> None:
    ordered = newest(rows, "task_set")
    for subject in build_board(rows).subjects:
        mine = ordered[ordered["sae_id"] == subject.sae_id]
        assert subject.n_rows == len(mine) and subject.provenance.keys() == set(PROVENANCE)
        runs = {f"{e}={k}" for e, k in zip(mine["eval"], mine["run_key"], strict=True)}
        assert set(subject.provenance["run_key"].split(";")) == runs
        commits = {str(c) for c in mine["code_sha"] if plain(c) is not None}
        assert all(c in subject.provenance["code_sha"] for c in commits)
        assert ("other" in subject.provenance["code_sha"]) == ("other" in commits)


def test_draws_are_read_from_disk_once(tmp_path, monkeypatch) -> None:
    """A page of all pairs asks for each as often as there are SAEs, of more files than the cache of files holds."""
    sources = [(f"sae{n}", "reconstruction", "key", "fvu", "test") for n in range(3)]
    for n, source in enumerate(sources):
        folder = results.row_dir(tmp_path, *source[:3])
        folder.mkdir(parents=True)
        results.write_draws(folder, {"fvu|test": np.arange(5) + n})
    reads = []
    monkeypatch.setattr(results, "_read_draws", lambda path, _: reads.append(path) or dict(np.load(path)))
    draws = results.draws_below(tmp_path)
    for _ in range(4):
        assert [draws(*source).tolist() for source in sources] == [[n, n + 1, n + 2, n + 3, n + 4] for n in range(3)]
        assert draws("sae0", "reconstruction", "key", "l0", "test") is None and draws("no", *sources[0][1:]) is None
    assert len(reads) == 4  # three arrays, and one look for a metric without any
