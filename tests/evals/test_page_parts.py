"""Parts of the static pages: texts, data blocks, charts, differences, matches."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from nasty_texts import NASTY
from synthetic_results import RANDOM, RELU, TOPK, write_run

from evals import charts, page_data
from evals.board import build_board
from evals.gains import Cell
from evals.page_board import difference
from evals.page_compare import decoder, matches
from evals.page_profile import field_profile
from evals.page_text import data_block, simulated_percent, slug, visible, window_tokens
from evals.page_tokens import read_tokenizer
from evals.results import load_results


def test_differences_are_paired_where_draws_were_kept_and_turn_their_sign() -> None:
    a = Cell(value=1.0, stderr=0.3, n=4, source=("a", "e", "k", "m", "test"), pairing="p")
    b = Cell(value=0.5, stderr=0.4, n=4, source=("b", "e", "k", "m", "test"), pairing="p")
    shared = np.linspace(-5.0, 5.0, 201)
    kept = {"a": shared + 1.0, "b": shared + 0.5}
    assert difference(a, b, lambda sae_id, *_: kept[sae_id]) == [0.5, 0.5, 0.5, 1]  # what they share cancels
    apart = difference(a, b, None)
    assert apart is not None and apart[3] == 0 and apart[1] == pytest.approx(0.5 - 1.959964 * 0.5, abs=1e-5)
    assert difference(a, Cell(value=0.5), None) == [0.5, None, None, 0]
    assert difference(a, Cell(reason="not run"), None) is None


def test_latents_are_matched_by_decoder_direction(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    rng = np.random.default_rng(3)
    rows_FD = rng.normal(size=(12, 6)).astype(np.float32)
    order = rng.permutation(12)
    for name, weights in (("one", rows_FD), ("other", 3.0 * rows_FD[order])):
        (tmp_path / "saes" / name).mkdir(parents=True)
        save_file({"W_dec_FD": weights}, tmp_path / "saes" / name / "sae.safetensors")
    one, other = decoder(tmp_path, "one"), decoder(tmp_path, "other")
    assert one is not None and other is not None
    assert matches([0, 5, 11], one[[0, 5, 11]], other) == [[i, int(np.argmax(order == i)), 1.0] for i in (0, 5, 11)]
    assert decoder(tmp_path, "../saes/one") is None and decoder(tmp_path, "absent") is None


def test_names_that_are_no_file_names_cannot_leave_the_site() -> None:
    assert slug(TOPK) == TOPK
    for name in ("../../etc/passwd", "a/b", "", ".hidden", "x" * 300, "a b", "a\x00b"):
        assert re.fullmatch(r"[A-Za-z0-9_-]+", slug(name)), name
    assert slug("a/b") != slug("a b")


def test_windows_merge_only_silence() -> None:
    assert window_tokens(["a", "b", "c", "d"], [0.0, 0.0, 4.0, 0.00123456], peak=2) == [
        "ab",
        ["c", 4.0, 1],
        ["d", 0.00123, 0],
    ]
    assert window_tokens(["a", "b"], [0.0, 0.0], merge=False) == ["a", "b"]
    assert window_tokens([], []) == [] and window_tokens(["a", "b"], [float("nan")]) == ["ab"]
    assert simulated_percent([0.2, 0.0, 1.0]) == [20, 0, 100]
    assert simulated_percent([4.0, 1.0, -1.0]) == [100, 25, 0]  # activation units over their own top


@pytest.mark.parametrize("text", [*NASTY.values(), "<!--<script>", "]]>"])
def test_a_data_block_holds_no_markup_and_reads_back(text: str) -> None:
    block = str(data_block({"text": visible(text)}))
    assert not re.search(r"[<>&]", block) and json.loads(block) == {"text": visible(text)}
    with pytest.raises(ValueError):
        data_block(float("nan"))


@pytest.mark.parametrize("text", [*NASTY.values(), "", " plain ", "日本語"])
def test_visible_can_be_written_and_is_stable(text: str) -> None:
    shown = visible(text)
    assert shown.encode("utf-8") is not None and visible(shown) == shown


def test_charts_handle_edges() -> None:
    point = charts.Point(label="<b>", series=0, x=1.0, y=0.0, y_ci=(-0.1, 0.1), href="a.html")
    assert "<b>" not in charts.scatter([point], "x", "y", "t") and "&lt;b&gt;" in charts.scatter([point], "x", "y", "t")
    assert charts.scatter([], "x", "y", "t") == "" and charts.bars([0, 0], ("a", "b"), "t") == ""
    assert charts.lines([("a", [1, 2], [float("nan"), 1.0])], "x", "t") == ""
    wide = charts.scatter([point, charts.Point(label="b", series=-1, x=100.0, y=3.0)], "x", "y", "t")
    assert "x (log)" in wide and "y (log)" not in wide


def test_token_reader_puts_a_split_character_at_its_last_token(tmp_path: Path) -> None:
    from tiny import byte_tokenizer

    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    reader = read_tokenizer(["", str(tmp_path)])
    ids = tokenizer.encode("aé👍", add_special_tokens=False)
    assert reader.window(ids) == ["a", "", "é", "", "", "", "👍"]
    assert reader.piece(ids[1]) == "\ufffd"
    assert read_tokenizer(["/no/such/folder"]).window([5, 6]) == ["⟨5⟩", "⟨6⟩"]


def test_an_sae_against_the_field_counts_only_what_intervals_tell_apart(tmp_path: Path) -> None:
    board = build_board(load_results(write_run(tmp_path)))
    subjects = {s.sae_id: s for s in board.subjects}
    profile = {p["title"]: p for p in field_profile(subjects[TOPK], board)}
    assert profile["FVU"]["standing"] == "ahead of 1"  # .237 +- .006 against .291 +- .008, lower is better
    assert profile["ΔCE"]["standing"] == "ahead of 1"
    assert profile["Probe loss"]["standing"] == "level with 1"  # .412 +- .02 against .431 +- .02
    assert {p["title"]: p for p in field_profile(subjects[RELU], board)}["FVU"]["standing"] == "behind 1"
    assert "L0" not in profile  # no better side
    strip = str(profile["FVU"]["strip"])
    assert [strip.count(f'class="{name}"') for name in ("peer", "tickfloor", "dot")] == [1, 2, 1]
    assert strip.index('class="tickfloor"') < strip.index('class="dot"') and "relu" in strip
    alone = replace(board, subjects=[subjects[TOPK], subjects[RANDOM]])
    assert field_profile(subjects[TOPK], alone) == []
    cell = board.cells[RELU, "fvu"]
    unknown = replace(board, cells={**board.cells, (RELU, "fvu"): replace(cell, ci_low=None, ci_high=None)})
    assert field_profile(subjects[TOPK], unknown)[0]["title"] == "FVU"
    assert field_profile(subjects[TOPK], unknown)[0]["standing"] == "level with 1"


def test_a_strip_with_one_value_and_with_hostile_names() -> None:
    assert "circle" in charts.strip(1.0, (None, None), [], [], "t")
    found = str(charts.strip(1.0, (0.5, 1.5), [(2.0, "<script>")], [(3.0, "&")], "<i>"))
    assert "<script>" not in found and "&lt;script&gt;" in found and "<i>" not in found


def test_a_study_names_its_own_command() -> None:
    assert page_data._command(["/a/study.py", "--seeds", "0", "1"]) == "python scripts/study.py --seeds 0 1"
    assert page_data._command(["run_all.py", "--preset", "tiny"]) == "python -m evals.run_all --preset tiny"
