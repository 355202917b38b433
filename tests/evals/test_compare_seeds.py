"""Comparisons of recipes: what names mean, and what training seeds do to a verdict at equal L0."""

import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from synthetic_results import info, metric, write_row_folder

from evals import uncertainty
from evals.compare_page import equal_rows, forest, markdown
from evals.compare_units import Measured, common_draws
from evals.comparison import compare
from evals.results import make_row, row_dir, write_draws, write_rows
from evals.seed_noise import SeedSpread, exceeds_seed_noise
from evals.units import ratio_table
from sae.errors import ConfigError
from sae.manifest import rng, writing

UNITS = 60
PREFIX = "smollm2-135m.layers.15"


def write(root: Path, sae_id: str, value_U: np.ndarray, l0: float, **more) -> str:
    """FVU as a mean over documents, with its draws, and an L0."""
    one, subject = np.ones_like(value_U), info(sae_id, **more)
    fvu = uncertainty.ratio(value_U, one, rng(0, "fvu"))
    of_l0 = uncertainty.mean(np.full(UNITS, l0), rng(0))
    rows = [make_row(subject, "reconstruction", 1, metric(name), e, seed=0, run_key="k", preset="quick", split="test")
            for name, e in (("fvu", fvu), ("l0", of_l0))]  # fmt: skip
    with writing(row_dir(root, sae_id, "reconstruction", "k"), kind="rows", key="k", stage_version=1,
                 config={"preset": "quick", "seed": 0}, inputs={"sae": sae_id, "test": "t"}) as out:  # fmt: skip
        write_rows(out.path, rows, [metric("fvu"), metric("l0")])
        ratio_table(np.arange(UNITS), {"fvu": (value_U, one)}).to_parquet(out.path / "details.parquet", index=False)
        write_draws(out.path, {"fvu|test": fvu.draws})
    return sae_id


def recipe(root: Path, architecture: str, l0: float, shift: float, spread: float, seeds: int = 3) -> list[str]:
    """Seeds of one recipe: FVU 0.7 + shift - 0.1 ln L0 on shared documents, moved by up to ``spread`` by its seed."""
    documents = 0.7 + shift - 0.1 * math.log(l0) + 0.05 * rng("documents").normal(size=UNITS)
    moves = np.linspace(-spread, spread, seeds) if seeds > 1 else [0.0]
    return [
        write(root, f"{PREFIX}.{architecture}-f4608-k{l0:.0f}.s{seed}-{architecture[:2]}{l0:.0f}{seed}abcd",
              documents + move, l0, architecture=architecture, k=None)
        for seed, move in enumerate(moves)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("spread", "verdict", "scope"),
    [(0.0005, "B better", "real"), (0.08, "no difference shown", "")],
)
def test_at_equal_l0_the_seeds_decide_too(tmp_path, spread, verdict, scope):
    """B is better by 0.02 on the same documents, which tells single SAEs apart for sure; seeds that move a recipe by
    0.08 leave nothing of it."""
    a = recipe(tmp_path, "topk", 32.0, 0.02, spread)
    for l0 in (16.0, 64.0):
        b = recipe(tmp_path, "batchtopk", l0, 0.0, spread)
    [line] = compare(tmp_path, ",".join(a), ",".join(b)).equal_l0
    assert (line.verdict, line.scope, line.interpolated) == (verdict, scope, "B")
    assert line.delta == pytest.approx(-0.02, abs=1e-6)
    [one] = compare(tmp_path, a[1], b[1]).equal_l0
    assert len(one.spreads) == 3 and [s.n for s in one.spreads] == [1, 3, 3]
    if scope:
        assert (one.verdict, one.scope) == ("B better", "one training seed")


def test_p_at_equal_l0_is_corrected_over_the_table(tmp_path):
    a = recipe(tmp_path, "topk", 32.0, 0.02, 0.0, seeds=1)
    for l0 in (16.0, 64.0):
        b = recipe(tmp_path, "batchtopk", l0, 0.0, 0.0, seeds=1)
    found = compare(tmp_path, a[0], b[0])
    [line] = found.equal_l0
    assert line.p is not None and line.p_holm == line.p < 0.05  # one line: nothing to correct
    from evals.matched import _judged

    three = _judged([replace(line, p=p) for p in (0.01, 0.02, 0.04)])
    assert [x.p_holm for x in three] == pytest.approx([0.03, 0.04, 0.04])
    assert [x.verdict for x in _judged([replace(line, p=p) for p in (0.02, 0.03, 0.04)])] == ["no difference shown"] * 3
    [row] = equal_rows(found)
    assert row[-2:] == ["B better", "one training seed"]
    assert "| one training seed |" in markdown(found).split("## At equal L0")[1]


def test_three_groups_of_seeds_are_called_different_in_few_cases():
    """An interpolated mean of two points against a third, all of one truth: 5 % beyond the noise, as meant."""
    draw = rng("three groups")
    share, hits, cases = 0.3, 0, 600
    for _ in range(cases):
        own, low, high = draw.normal(size=3), 2 * draw.normal(size=3), draw.normal(size=4)
        delta = (1 - share) * low.mean() + share * high.mean() - own.mean()
        groups = ((own, 1.0), (low, 1 - share), (high, share))
        spreads = [SeedSpread(float(g.std(ddof=1)), len(g), weight) for g, weight in groups]
        hits += exceeds_seed_noise(delta, spreads)
    assert 0.02 <= hits / cases <= 0.075


def test_a_floor_that_bears_an_sae_s_name_is_not_meant_by_it(tmp_path):
    values = 0.3 + 0.1 * rng("floor").normal(size=UNITS)
    seeds = [write(tmp_path, f"{PREFIX}.topk-f4608-k32.s{s}-{s}aaaaaaa", values + 0.01 * s, 32.0) for s in range(2)]
    other = write(tmp_path, f"{PREFIX}.relu-f4608.s0-bbbbbbbb", values, 40.0, architecture="relu", k=None)
    floor = write(tmp_path, f"baseline.random_lm.smollm2-135m-random.{PREFIX}.topk-f4608-k32.s0-cccccccc", values, 32.0,
                  kind="baseline")  # fmt: skip
    for name in ("topk", "topk-f4608-k32", "*topk-f4608-k32*"):
        assert list(compare(tmp_path, name, other).a.sae_ids) == seeds
    assert compare(tmp_path, "random_lm", "relu").a.sae_ids == (floor,)
    assert compare(tmp_path, "cccccccc", "relu").a.sae_ids == (floor,)


def test_recipes_are_listed_as_they_can_be_named(tmp_path):
    values = 0.3 + 0.1 * rng("recipes").normal(size=UNITS)
    for k, marks in ((32, "ab"), (64, "cd")):
        for mark in marks:
            write(tmp_path, f"{PREFIX}.topk-f4608-k{k}.s0-{mark * 8}", values, float(k), k=k)
    with pytest.raises(ConfigError, match=r"in more than the training seed \(k\)") as refused:
        compare(tmp_path, "topk", "relu")
    named = re.findall(r"([a-d]{8},[a-d]{8}) \(", str(refused.value))
    assert named == ["aaaaaaaa,bbbbbbbb", "cccccccc,dddddddd"] and "k 32" in str(refused.value)
    assert len(compare(tmp_path, *named).a.sae_ids) == 2
    with pytest.raises(ConfigError, match="no subject is called 'gated'.*evals.leaderboard"):
        compare(tmp_path, "gated", "topk")


def test_the_plot_names_both_sides_and_fits_long_titles(tmp_path):
    a = recipe(tmp_path, "topk", 32.0, 0.0, 0.001, seeds=9)
    b = recipe(tmp_path, "gated", 32.0, 0.1, 0.001, seeds=1)
    found = compare(tmp_path, ",".join(a), b[0])
    text = forest(found)
    assert f">A = {a[0]}" in text and f">B = {b[0]}<" in text and "…</text>" in text
    long = replace(found, lines=[replace(x, title="A title that needs far more room than others") for x in found.lines])
    widths = [float(re.search(r'viewBox="0 0 (\S+) ', t)[1]) for t in (text, forest(long))]  # type: ignore[index]
    assert widths[1] > widths[0]


def test_a_metric_without_draws_is_not_judged_at_equal_l0(tmp_path):
    """Rows of another making beside them change nothing."""
    a = recipe(tmp_path, "topk", 32.0, 0.02, 0.0, seeds=1)
    for l0 in (16.0, 64.0):
        b = recipe(tmp_path, "batchtopk", l0, 0.0, 0.0, seeds=1)
    for sae_id in (a[0], *(f"{PREFIX}.batchtopk-f4608-k{k}.s0-ba{k}0abcd" for k in (16, 64))):
        architecture = sae_id.split(".")[-2].split("-")[0]
        write_row_folder(tmp_path, info(sae_id, architecture=architecture, k=None), "downstream_loss",
                         {("delta_ce", ""): (0.3, 0.05)})  # fmt: skip
    lines = {line.column_id.partition("@")[0]: line for line in compare(tmp_path, a[0], b[0]).equal_l0}
    assert lines["delta_ce"].verdict == "undecided: no interval" and lines["delta_ce"].p_holm is None
    assert lines["fvu"].verdict == "B better"


def test_dominance_holds_each_preset_against_its_own_l0(tmp_path):
    """Two SAEs measured by `quick` and two by `paper`, below one root: both pairs have a front."""
    from evals.board import build_board
    from evals.matched import pareto
    from evals.results import load_results

    for preset in ("quick", "paper"):
        for name, fvu in (("good", 0.2), ("poor", 0.4)):
            cells = {("l0", ""): (32.0, 0.5), ("fvu", ""): (fvu, 0.01)}
            write_row_folder(tmp_path, info(f"{name}-{preset}"), "reconstruction", cells, preset=preset)
    board = build_board(load_results(tmp_path))
    found = {c.preset: pareto(board, c) for c in board.columns_of("fvu")}
    assert set(found) == {"quick", "paper"}
    for preset, states in found.items():
        mine = {name: state for name, state in states.items() if state}
        assert mine == {f"good-{preset}": "front", f"poor-{preset}": "dominated"}
    write_row_folder(tmp_path, info("better-elsewhere", lm_revision="another"), "reconstruction",
                     {("l0", ""): (8.0, 0.5), ("fvu", ""): (0.01, 0.001)})  # fmt: skip
    board = build_board(load_results(tmp_path))
    quick = next(c for c in board.columns_of("fvu") if c.preset == "quick")
    assert pareto(board, quick)["good-quick"] == "front"  # another place dominates nothing here


def test_draws_over_latents_never_pair():
    """Equal numbers of latents, resampled by one generator: draws that move together by accident of their order."""
    drawn_R = rng("latents of one").normal(size=400)
    members = [
        Measured(sae_id=sae_id, value=0.0, stderr=1.0, n=64, failure="", identity={}, sample="s", per_latent=latents,
                 preset="quick", draws=drawn_R)
        for latents in (True, False) for sae_id in "ab"
    ]  # fmt: skip
    drawn, method = common_draws(members[:2], "f1")
    assert method == "unpaired draws" and drawn is not None and abs(np.corrcoef(*drawn)[0, 1]) < 0.2
    assert common_draws(members[2:], "fvu")[1] == "paired draws"


def test_all_ranked_metrics_of_the_aggregates_are_compared_when_asked(tmp_path):
    ids = {a: f"{PREFIX}.{a}-f4608-k32.s0-{a}0abcd" for a in ("topk", "relu")}
    for sae_id in ids.values():
        values = {("n2g_f1", ""): (0.3, 0.05), ("n2g_recall_16", ""): (0.2, 0.05), ("n2g_length", ""): (2.0, 0.1)}
        write_row_folder(tmp_path, info(sae_id), "n2g", values)
    few, all_ = ({line.metric for line in compare(tmp_path, "topk", "relu", everything=e).lines} for e in (False, True))
    assert "n2g.n2g_recall_16" in all_ - few and not any("n2g_length" in m for m in all_)  # neither side is better
