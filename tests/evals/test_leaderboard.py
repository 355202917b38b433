"""The leaderboard's choice of rows, floors, ranks and files, on rows written by the real writers."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import synthetic_results as synthetic
from synthetic_results import PCA, RANDOM, RELU, TOPK, info, write_row_folder, write_run

from evals import leaderboard
from evals.board import Board, build_board
from evals.gains import Cell
from evals.matched import interpolate, matched_l0, pareto
from evals.page_data import run_info
from evals.page_text import number
from evals.results import draws_below, load_results, write_draws
from sae.errors import ArtefactError


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("board") / "results")


@pytest.fixture
def root(written: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "results"))


def board_of(root: Path) -> Board:
    return build_board(load_results(root))


def test_values_intervals_and_order(root: Path) -> None:
    board = board_of(root)
    assert [s.sae_id for s in board.subjects] == [TOPK, RELU, PCA, RANDOM]  # SAEs by FVU, floors below
    cell = board.cells[TOPK, "fvu"]
    assert (cell.value, cell.ci_low, cell.ci_high, cell.n) == (0.237, pytest.approx(0.231), pytest.approx(0.243), 120)
    assert leaderboard.cell_text(cell) == "0.237 [0.231, 0.243]"
    assert board.cells[TOPK, "detection_auc"].value == 0.71
    assert board.cells[TOPK, "detection_floor"].value == 0.51
    assert board.cells[TOPK, "simulation_pearson"].value == 0.28
    assert all((s.sae_id, c.id) in board.cells for s in board.subjects for c in board.columns)


def test_a_gap_has_a_reason_and_no_rank(root: Path) -> None:
    board = board_of(root)
    gap = board.cells[RELU, "gain_vs_random"]
    assert gap.value is None and "no_effect" in gap.reason and gap.n_failed == 3
    assert board.cells[PCA, "n2g_f1"] == Cell(reason="not run")
    column = board.columns_of("gain_vs_random")[0]
    assert board.best(column) == set()  # one value alone is not the best of anything
    assert leaderboard.cell_text(gap) == "no effect" and leaderboard.cell_text(board.cells[PCA, "n2g_f1"]) == "–"
    assert next(s for s in board.saes if s.sae_id == RELU).n_failed == 3


def test_absorption_is_a_column_whose_failed_gate_is_told_in_words(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A random SAE absorbs nothing: where the letters' latents know no letter, no number may stand, least of all 0."""
    failed = {("absorption_fraction", ""): "gate_failed", ("main_f1", ""): (0.19, 0.02)}
    for name in (TOPK, RANDOM):
        write_row_folder(root, info(name), "absorption", failed)
    board = board_of(root)
    column = board.columns_of("absorption")[0]
    cell = board.cells[TOPK, column.id]
    assert cell.value is None and cell.reason == "undefined: gate_failed"
    assert leaderboard.cell_text(cell) == "gate failed"
    assert board.best(column) == set() and (TOPK, column.id) not in board.gains
    assert board.cells[TOPK, "absorption_main_f1"].value == 0.19
    assert board.cells[RELU, column.id] == Cell(reason="not run")
    table = pd.read_csv(leaderboard.build(root, site=False)[0])
    assert table["absorption"].isna().all() and table.loc[0, "absorption_missing"] == "undefined: gate_failed"
    assert "gate failed" in (root / "leaderboard.md").read_text(encoding="utf-8")
    leaderboard.print_board(root)
    line = next(text for text in capsys.readouterr().out.splitlines() if "Absorption" in text)
    assert "gate failed" in line and "–" in line
    passed = {("absorption_fraction", ""): (0.0, 0.01), ("main_f1", ""): (0.8, 0.02)}
    write_row_folder(root, info(RELU), "absorption", passed)
    board = board_of(root)
    assert leaderboard.cell_text(board.cells[RELU, "absorption"]).startswith("0.000 [")  # a true 0 stays a number
    assert board.best(column) == set()


def test_best_counts_what_the_intervals_cannot_tell_apart(root: Path) -> None:
    board = board_of(root)
    assert board.best(board.columns_of("fvu")[0]) == {TOPK}
    assert board.best(board.columns_of("probe_loss")[0]) == {TOPK, RELU}
    assert board.best(board.columns_of("l0")[0]) == set()


def test_a_value_of_a_single_latent_is_not_the_best(root: Path) -> None:
    """A precision of 1.0 by the one latent whose patterns fire was marked ahead of .62 by sixty."""
    board = board_of(root)
    column = board.columns_of("n2g_precision")[0]
    for n, best in ((1, set()), (60, {RELU})):
        cells = {**board.cells, (RELU, column.id): Cell(value=1.0, n=n)}
        assert replace(board, cells=cells).best(column) == best


def test_weak_judge_is_shown_and_never_ranked(root: Path) -> None:
    board = board_of(root)
    weak, strong = board.columns_of("simulation_pearson")[0], board.columns_of("detection_auc")[0]
    assert "weak judge" in weak.weak and "0.71" in weak.weak and not strong.weak
    assert board.cells[TOPK, weak.id].value is not None and board.best(weak) == set()
    assert board.gains[TOPK, weak.id].verdict == "" and board.gains[TOPK, strong.id].verdict == "better"


def test_gain_over_the_random_sae(root: Path) -> None:
    board = board_of(root)
    gain = board.gains[TOPK, "fvu"]
    half = (0.006**2 + 0.011**2) ** 0.5
    assert gain.value == pytest.approx(0.237 - 0.871)
    assert gain.ci_high == pytest.approx(gain.value + half, abs=1e-4)
    assert gain.verdict == "better"
    assert (TOPK, "n2g_precision") not in board.gains  # the random SAE has no value there
    assert (TOPK, "dead_frac") not in board.gains  # no floor for it
    assert board.gains[RELU, "detection_precision_half"].verdict == "undecided"
    true_rate = board.columns_of("detection_precision")[0]  # rises with the rate of firing: shown, no contest
    assert board.cells[RELU, true_rate.id].value == 0.06 and board.best(true_rate) == set()
    assert board.gains[RELU, true_rate.id].verdict == ""


def test_random_sae_of_the_same_width_then_nearest_l0(root: Path) -> None:
    for name, width, l0 in (("baseline.random_sae.wide", 9216, 41.0), ("baseline.random_sae.near", 4608, 40.0)):
        write_row_folder(
            root, info(name, d_sae=width), "reconstruction", {("l0", ""): (l0, 0.0), ("fvu", ""): (0.9, 0.01)}
        )
    write_row_folder(
        root,
        info("baseline.random_directions.x", architecture="random_directions"),
        "reconstruction",
        {("l0", ""): (41.3, 0.0)},
    )
    chosen = {s.sae_id: s.random_id for s in board_of(root).saes}
    assert chosen == {TOPK: RANDOM, RELU: "baseline.random_sae.near"}


def test_versions_presets_and_judges_never_share_a_column(root: Path) -> None:
    fvu = {("fvu", ""): (0.5, 0.01)}
    write_row_folder(root, info(TOPK), "reconstruction", fvu, key="k2", version=2)
    write_row_folder(root, info(RELU), "reconstruction", fvu, key="k3", preset="paper")
    other = synthetic.EMBEDDING.replace("minilm", "gpt")
    write_row_folder(root, info(TOPK), "explanation", {("auc", other): (0.9, 0.01)}, key="k4")
    board = board_of(root)
    assert {c.id for c in board.columns_of("fvu")} == {"fvu@v2.quick", "fvu@v1.quick", "fvu@v1.paper"}
    assert board.cells[TOPK, "fvu@v1.quick"].value == 0.237 and board.cells[TOPK, "fvu@v2.quick"].value == 0.5
    assert board.cells[RELU, "fvu@v1.paper"].value == 0.5 and board.cells[RELU, "fvu@v2.quick"].value is None
    assert {c.id for c in board.columns_of("detection_auc")} == {"detection_auc@gpt", "detection_auc@minilm"}
    assert [c.id for c in board.columns_of("kl")] == ["kl"]


def test_a_version_that_all_have_left_behind_is_no_column(root: Path) -> None:
    """After an upgrade old rows lie beside new ones; both show until the last SAE has the new version."""
    everyone = [TOPK, RELU, RANDOM, synthetic.PCA]
    for sae_id in everyone:
        assert sae_id == TOPK or {c.id for c in board_of(root).columns_of("fvu")} == {"fvu@v1.quick", "fvu@v2.quick"}
        again = {("fvu", ""): (0.5, 0.01), ("l0", ""): (30.0, 0.1)}
        write_row_folder(root, info(sae_id), "reconstruction", again, key="k2", version=2)
    board = board_of(root)
    assert [c.id for c in board.columns_of("fvu")] == ["fvu"] and board.columns_of("fvu")[0].version == 2
    assert {board.cells[i, "fvu"].value for i in everyone} == {0.5}


def test_the_headline_judge_is_the_first_that_passed_its_check(root: Path) -> None:
    """A prompted judge before the embedded ones, but not one that cannot tell known features apart."""
    later = synthetic.EMBEDDING.replace("embedding", "late_interaction")
    prompted = "explainer=selected,scorer=detection,judge=small-lm"
    write_row_folder(root, info(TOPK), "explanation", {("auc", later): (0.75, 0.01)}, key="k5")
    [column] = board_of(root).columns_of("detection_auc")
    assert column.id == "detection_auc" and column.slice == later and not column.weak
    weak = {("judge_weak", "scorer=detection,judge=small-lm"): (1.0, 0.0)}
    write_row_folder(root, info(TOPK), "explanation", {("auc", prompted): (0.99, 0.01), **weak}, key="k6")
    assert [c.slice for c in board_of(root).columns_of("detection_auc")] == [later]
    strong = {("judge_weak", "scorer=detection,judge=small-lm"): (0.0, 0.0)}
    write_row_folder(root, info(TOPK), "explanation", {("auc", prompted): (0.99, 0.01), **strong}, key="k7",
                     created_at="2030-01-01T00:00:00Z")  # fmt: skip
    board = board_of(root)
    assert [c.slice for c in board.columns_of("detection_auc")] == [prompted]
    assert board.cells[TOPK, "detection_auc"].value == 0.99 and board.cells[RELU, "detection_auc"].value is None


def test_the_newest_run_counts(root: Path) -> None:
    fvu = {("fvu", ""): (0.111, 0.01)}
    write_row_folder(root, info(TOPK), "reconstruction", fvu, key="old", created_at="2020-01-01T00:00:00Z")
    assert board_of(root).cells[TOPK, "fvu"].value == 0.237
    write_row_folder(root, info(TOPK), "reconstruction", fvu, key="new", created_at="2030-01-01T00:00:00Z")
    assert board_of(root).cells[TOPK, "fvu"].value == 0.111


def test_interpolation_in_log_l0_and_never_beyond() -> None:
    points = [
        (8.0, Cell(value=0.4, ci_low=0.3, ci_high=0.5), "a"),
        (32.0, Cell(value=0.2, ci_low=0.1, ci_high=0.3), "b"),
    ]
    middle = interpolate(points, 16)
    assert middle is not None and middle[0].value == pytest.approx(0.3) and middle[0].ci_low == pytest.approx(0.2)
    assert interpolate(points, 64) is None and interpolate(points, 4) is None and interpolate(points[:1], 8) is None


def test_matched_l0_needs_two_saes_of_one_architecture(root: Path) -> None:
    assert matched_l0(board_of(root)) == []
    write_row_folder(
        root, info("topk-k128", k=128), "reconstruction", {("l0", ""): (128.0, 0.0), ("fvu", ""): (0.1, 0.01)}
    )
    found = {m.l0: m for m in matched_l0(board_of(root), keys=("fvu",))}
    assert sorted(found) == [32, 64, 128] and found[64].architecture == "topk"
    assert found[64].value == pytest.approx((0.237 + 0.1) / 2) and found[64].between == (TOPK, "topk-k128")


def test_pareto_states(root: Path) -> None:
    cells = {("l0", ""): (33.0, 2.0), ("fvu", ""): (0.24, 0.01)}  # worse than topk in both, but within the errors
    write_row_folder(root, info("twin"), "reconstruction", cells)
    board = board_of(root)
    assert pareto(board, board.columns_of("fvu")[0]) == {TOPK: "front", RELU: "dominated", "twin": "undecided"}


def test_files_agree_and_are_deterministic(root: Path) -> None:
    paths = leaderboard.build(root, site=False)
    assert [p.name for p in paths] == ["leaderboard.csv", "leaderboard.md", "leaderboard.parquet"]
    before = [p.read_bytes() for p in paths]
    table, parquet = pd.read_csv(paths[0]), pd.read_parquet(paths[2])
    assert list(table["sae_id"]) == list(parquet["sae_id"]) == [TOPK, RELU, PCA, RANDOM]
    first = table.iloc[0]
    assert (first["fvu"], first["fvu_ci_low"], first["fvu_n"], first["preset"], first["device"]) == (
        0.237,
        pytest.approx(0.231),
        120,
        "quick",
        "cpu",
    )
    assert first["fvu_vs_random"] == pytest.approx(-0.634) and first["run_key"].startswith("ablation_sparsity=k0;")
    assert pd.isna(table.loc[1, "gain_vs_random"]) and "no_effect" in table.loc[1, "gain_vs_random_missing"]
    text = paths[1].read_text(encoding="utf-8")
    assert "0.237 [0.231, 0.243]" in text and "python -m evals.run_all --preset quick" in text and "weak judge" in text
    leaderboard.build(root, site=False)
    assert [p.read_bytes() for p in paths] == before
    assert not list(root.glob("*.tmp-*"))


def test_door_prints_the_board_and_says_what_is_missing(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert leaderboard.main(["--root", str(root), "--no-site"]) == 0
    out = capsys.readouterr().out
    assert "0.237 [0.231, 0.243] *" in out and "weak judge" in out and not (root / "site").exists()
    assert leaderboard.main(["--root", str(tmp_path / "nowhere")]) == 2
    (tmp_path / "empty").mkdir()
    assert leaderboard.main(["--root", str(tmp_path / "empty")]) == 2
    assert "run: python -m evals.run_all" in capsys.readouterr().err
    with pytest.raises(ArtefactError, match="no result rows"):
        leaderboard.build(tmp_path / "empty")


def test_damaged_run_file_is_named(root: Path) -> None:
    (root / "run.json").write_text("{", encoding="utf-8")
    with pytest.raises(ArtefactError, match=r"run\.json is damaged"):
        leaderboard.build(root)


def test_an_empty_board_has_no_columns() -> None:
    board = build_board(pd.DataFrame(columns=["sae_id"]))
    assert board.subjects == [] and list(leaderboard.wide_table(board).columns)[:2] == ["sae_id", "kind"]


@pytest.mark.parametrize(
    ("value", "digits", "text"),
    [(None, 3, ""), (0.0, 3, "0.000"), (-0.5, 2, "−0.50"), (0.00001, 3, "1.0e-05"), (41.26, 1, "41.3")],
)
def test_number(value: float | None, digits: int, text: str) -> None:
    assert number(value, digits) == text


def test_loads_without_torch() -> None:
    heavy = "[m for m in ('torch', 'transformers', 'jinja2') if m in sys.modules]"
    code = f"import json, sys, evals.leaderboard, evals.pages; print(json.dumps({heavy}))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(found.stdout) == []


@pytest.mark.parametrize("evaluation", sorted({evaluation for evaluation, *_ in synthetic.VALUES}))
def test_a_run_of_one_evaluation_has_a_board_with_gaps(root: Path, evaluation: str) -> None:
    """`--evals reconstruction` alone: the other columns are gaps, not a crash."""
    rows = load_results(root)
    board = build_board(rows[rows["eval"] == evaluation])
    values = {column.spec.eval for (_, column_id), cell in board.cells.items() if cell.value is not None
              for column in board.columns if column.id == column_id}
    assert values == {evaluation}
    assert {column.spec.eval for column in board.columns} > {evaluation}
    text = leaderboard.markdown(board, run_info(root, rows))
    [header] = [line for line in text.splitlines() if line.startswith("| name | architecture")]
    titles = {c.title: c.spec.eval for c in board.columns}
    shown = {t.strip().removesuffix(" (weak judge)").strip(" ↑↓") for t in header.split("|")}
    assert {titles[t] for t in shown & set(titles)} == {evaluation}, "what was not run widens no table"
    assert all((f"- **{t}**:" in text) == (t in shown) for t in titles)


def test_a_gain_is_paired_where_both_were_resampled_alike(root: Path) -> None:
    """Two SAEs that move together by document: the difference is far better known than either value."""
    draws = np.random.default_rng(0).normal(0.0, 0.05, size=1_000)

    def lookup(sae_id: str, evaluation: str, run_key: str, metric: str, split: str) -> np.ndarray | None:
        if (evaluation, metric) != ("reconstruction", "fvu"):
            return None
        return 0.237 + draws if sae_id == TOPK else 0.871 + draws + 1e-4 * np.sin(draws * 1e4)

    results = load_results(root)
    alone, paired = build_board(results).gains[TOPK, "fvu"], build_board(results, lookup).gains[TOPK, "fvu"]
    assert alone.value == paired.value == pytest.approx(0.237 - 0.871)
    assert paired.ci_high - paired.ci_low < 1e-3 < alone.ci_high - alone.ci_low
    assert build_board(results, lookup).gains[TOPK, "kl"] == build_board(results).gains[TOPK, "kl"]
    other = results.assign(pairing=[s + e for s, e in zip(results["sae_id"], results["eval"], strict=True)])
    assert build_board(other, lookup).gains[TOPK, "fvu"] == alone, "measured on other inputs: not paired"


def test_draws_come_back_from_disk(root: Path) -> None:
    folder = write_row_folder(root, info(TOPK), "reconstruction", {("fvu", ""): (0.5, 0.01)}, key="k8")
    drawn = np.linspace(0.4, 0.6, 100)
    write_draws(folder, {"fvu|test": drawn})
    found = draws_below(root)(TOPK, "reconstruction", "k8", "fvu", "test")
    assert found is not None and np.allclose(found, drawn)
    assert draws_below(root)(TOPK, "reconstruction", "k8", "l0", "test") is None
    assert draws_below(root)(TOPK, "reconstruction", "absent", "fvu", "test") is None


def paired_board(spread: float) -> "Board":
    """Two SAEs at L0 8 and 32 whose draws move together by 0.02; each moves by ``spread`` alone."""
    import numpy as np

    from evals.board import Board, BoardSubject, Column
    from evals.columns import HEADLINE

    r = np.random.default_rng(0)
    shared = 0.02 * r.standard_normal(2_000)
    values = {"a": (8.0, 0.4), "b": (32.0, 0.399)}
    columns = [Column(spec=s, id=s.key, version=1, preset="quick", slice="", title=s.title)
               for s in HEADLINE if s.key in ("l0", "fvu")]  # fmt: skip
    kept, cells, subjects = {}, {}, []
    for name, (l0, fvu) in values.items():
        fields = {"sae_id": name, "kind": "sae", "lm": "m", "hookpoint": "h", "d_sae": 9, "architecture": "topk"}
        subjects.append(BoardSubject(fields=fields, provenance={}, n_rows=1))
        source = (name, "reconstruction", "key", "fvu", "test")
        drawn = fvu + shared + spread * r.standard_normal(2_000)
        kept[source] = drawn
        low, high = np.quantile(drawn, [0.025, 0.975])
        cells[name, "fvu"] = Cell(value=fvu, ci_low=low, ci_high=high, stderr=float(drawn.std()), n=50, source=source,
                                  pairing="p")  # fmt: skip
        cells[name, "l0"] = Cell(value=l0, n=50, pairing="p")
    return Board(columns=columns, subjects=subjects, cells=cells, draws=lambda *s: kept.get(s))


def test_matched_values_are_interpolated_inside_each_resample() -> None:
    together, apart = (next(m for m in matched_l0(paired_board(s), keys=("fvu",)) if m.l0 == 16) for s in (1e-6, 0.05))
    for found, sd in ((together, 0.02), (apart, (0.02**2 + 0.05**2 / 2) ** 0.5)):
        assert found.value == pytest.approx(0.3995)
        assert (found.ci_high - found.ci_low) / 2 == pytest.approx(1.96 * sd, rel=0.1)


def test_an_exact_l0_is_held_against_the_others_interval_and_one_unit_against_nothing() -> None:
    """TopK's 32 latents are no estimate: another's 32.4 [31.8, 33] is not told apart from them, 34 [33, 35] is."""
    from evals.matched import told_apart

    board = paired_board(1e-6)
    exact, one = Cell(value=32.0, n=50), Cell(value=32.0, n=1)
    near, far = Cell(value=32.4, ci_low=31.8, ci_high=33.0, n=50), Cell(value=34.0, ci_low=33.0, ci_high=35.0, n=50)
    assert not told_apart(board, exact, near) and not told_apart(board, near, exact)
    assert told_apart(board, exact, far) and told_apart(board, exact, Cell(value=64.0, n=50))
    assert not told_apart(board, one, far) and not told_apart(board, far, one)


def test_a_paired_difference_decides_where_the_intervals_meet() -> None:
    """c is worse than a by 0.01 in every resample, with intervals of 0.08."""
    from dataclasses import replace as changed

    board = paired_board(1e-6)
    column = board.columns_of("fvu")[0]
    assert pareto(board, column)["b"] == "front"  # more latents, lower FVU
    cells = dict(board.cells)
    cells["b", "l0"] = changed(cells["b", "l0"], value=8.0)
    cells["a", "fvu"] = changed(cells["a", "fvu"], value=0.4)
    same_l0 = changed(board, cells=cells)
    assert pareto(same_l0, column) == {"a": "dominated", "b": "front"}
    assert pareto(changed(same_l0, draws=None), column) == {"a": "undecided", "b": "front"}
