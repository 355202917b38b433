"""Several texts or hookpoints below one root: floors of the own text, names that say where, a best of each place."""

import json
import shutil
from pathlib import Path

from synthetic_results import TOPK, info, write_row_folder

from evals.board import Board, build_board
from evals.results import load_results


def board_of(root: Path) -> Board:
    return build_board(load_results(root))


def test_of_two_runs_each_sae_has_the_random_sae_of_its_own_text(tmp_path: Path) -> None:
    """Two texts below one root: the floor of the other run was measured on other documents."""
    for text in ("a", "b"):
        for name in (TOPK.replace("topk", f"topk_{text}"), f"baseline.random_sae.{'ba'['ab'.index(text)]}"):
            folder = write_row_folder(
                tmp_path, info(name), "reconstruction", {("l0", ""): (32.0, 0.0), ("fvu", ""): (0.5, 0.01)})
            manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
            manifest["inputs"] = {"sae": name, "test": text}
            (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    chosen = {s.sae_id.partition("topk_")[2][0]: s.random_id for s in board_of(tmp_path).saes}
    assert chosen == {"a": "baseline.random_sae.b", "b": "baseline.random_sae.a"}


def test_two_places_are_named_and_never_ranked_together(tmp_path: Path) -> None:
    """Residual stream and an MLP's input below one root: names say which, the best is marked of each."""
    values = {"lm.layers.1.topk-f8": 0.5, "lm.layers.1.relu-f8": 0.6, "lm.layers.1.mlp-in.topk-f8": 0.9,
              "lm.layers.1.mlp-in.relu-f8": 0.7, "lm.layers.0.topk-f8": 0.1}  # fmt: skip
    for name, fvu in values.items():
        hookpoint = name.removeprefix("lm.").rpartition(".")[0].replace("mlp-in", "mlp:in")
        subject = info(name, hookpoint=hookpoint)
        write_row_folder(tmp_path, subject, "reconstruction", {("fvu", ""): (fvu, 0.01), ("l0", ""): (8.0, 0.0)})
    floor = info("baseline.random_sae.12ab", hookpoint="layers.0")
    write_row_folder(tmp_path, floor, "reconstruction", {("fvu", ""): (0.9, 0.01)})
    board = board_of(tmp_path)
    assert board.best(board.columns_of("fvu")[0]) == {"lm.layers.1.topk-f8", "lm.layers.1.mlp-in.relu-f8"}
    assert {s.short for s in board.saes} == set(values)
    assert [s.short for s in board.baselines] == ["random_sae.12ab (layers.0)"]
    shutil.rmtree(tmp_path / "rows")
    write_row_folder(tmp_path, info("lm.layers.1.mlp-in.topk-f8", hookpoint="layers.1.mlp:in"), "reconstruction",
                     {("fvu", ""): (0.9, 0.01)})  # fmt: skip
    assert [s.short for s in board_of(tmp_path).saes] == ["topk-f8"]
