"""Comparisons of planted subjects: known differences are found, equal ones not, and what differs in making refused."""

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from synthetic_results import EMBEDDING, info, metric, write_row_folder

from evals import compare as door
from evals import uncertainty
from evals.compare_page import forest, markdown, summary
from evals.compare_units import Measured, UnitTable, common_draws
from evals.comparison import Line, _difference, beyond_seed_noise, compare, judged, over_seeds
from evals.results import make_row, row_dir, write_draws, write_rows
from evals.units import ratio_table
from sae.errors import ArtefactError, ConfigError
from sae.manifest import rng, writing

UNITS = 60


def name(architecture: str, seed: int = 0, k: int = 32) -> str:
    return f"smollm2-135m.layers.15.{architecture}-f4608-k{k}.s{seed}-{architecture[:2]}{seed}{k}abcd"


def noise(*parts: object) -> np.ndarray:
    return rng("test_compare", *parts).normal(size=UNITS)


def write_subject(
    root: Path, sae_id: str, fvu_U: np.ndarray, *, l0: float = 32.0, draws: bool = False, config: dict | None = None,
    subject=None, version: int = 1, preset: str = "quick", key: str = "k0", evaluation: str = "reconstruction",
    metric_name: str = "fvu", seed: int = 0, counts: dict | None = None,
) -> Path:  # fmt: skip
    """Rows, details and (if asked) draws of one SAE: `metric_name` is the mean of ``fvu_U`` over documents."""
    subject = subject or info(sae_id, architecture=sae_id.split(".")[-2].split("-")[0])
    one = np.ones_like(fvu_U)
    estimate = uncertainty.ratio(fvu_U, one, rng(0, "fvu"))
    rows = [
        make_row(subject, evaluation, version, metric(n), e, seed=seed, run_key=key, preset=preset, split="test")
        for n, e in ((metric_name, estimate), ("l0", uncertainty.mean(np.full(UNITS, l0), rng(0))))
    ]
    folder = row_dir(root, sae_id, evaluation, key)
    settings = {"preset": preset, "seed": 0} | (config or {})
    with writing(folder, kind="rows", key=key, stage_version=version, config=settings,
                 inputs={"sae": sae_id, "test": "t"}) as out:  # fmt: skip
        write_rows(out.path, rows, [metric(metric_name), metric("l0")])
        ratio_table(np.arange(UNITS), {metric_name: (fvu_U, one)}).to_parquet(out.path / "details.parquet", index=False)
        if draws:
            write_draws(out.path, {f"{metric_name}|test": estimate.draws})
        out.counts.update({"device": "cpu", "dtype": "float32"} | (counts or {}))
    return folder


def line_of(found, key: str = "fvu") -> Line:
    return next(line for line in found.lines if line.metric.startswith(key))


@pytest.mark.parametrize("draws", [False, True])
def test_a_planted_difference_is_found_and_paired(tmp_path, draws):
    documents = 0.3 + 0.1 * noise("documents")  # documents differ far more than the two SAEs do
    a, b = documents + 0.01 * noise("a"), documents - 0.02 + 0.01 * noise("b")
    write_subject(tmp_path, name("topk"), a, draws=draws)
    write_subject(tmp_path, name("relu"), b, draws=draws)
    line = line_of(compare(tmp_path, "topk", "relu"))
    assert line.verdict == "B better" and line.scope == "one training seed"
    assert line.method == ("paired draws" if draws else "paired units") and line.n == UNITS
    assert line.delta == pytest.approx((b - a).mean()) and line.ci_low < line.delta < line.ci_high < 0
    exact = np.std(b - a) / math.sqrt(UNITS)
    assert line.stderr == pytest.approx(exact, rel=0.15)
    unpaired = math.hypot(np.std(a), np.std(b)) / math.sqrt(UNITS)
    assert line.stderr < unpaired / 4
    back = line_of(compare(tmp_path, "relu", "topk"))
    assert back.verdict == "A better" and back.delta == -line.delta


def test_other_samples_do_not_pair(tmp_path):
    documents = 0.3 + 0.1 * noise("documents")
    write_subject(tmp_path, name("topk"), documents, draws=True)
    write_subject(tmp_path, name("relu"), documents - 0.001, draws=True, config={"seed": 1})
    line = line_of(compare(tmp_path, "topk", "relu"))
    assert line.method == "unpaired draws" and line.verdict == "no difference shown"
    assert line.stderr == pytest.approx(math.sqrt(2) * np.std(documents) / math.sqrt(UNITS), rel=0.15)


def test_equal_subjects_show_no_difference(tmp_path):
    values = 0.3 + 0.1 * noise("documents")
    write_subject(tmp_path, name("topk"), values)
    write_subject(tmp_path, name("relu"), values.copy())
    found = compare(tmp_path, "topk", "relu")
    assert line_of(found).verdict == "no difference shown" and line_of(found).p is None
    assert "no difference is shown at 1 metric" in summary(found)


def measured(sae_id: str, values_U: np.ndarray, *, per_latent: bool = False) -> Measured:
    table = UnitTable(units=tuple(("", i) for i in range(len(values_U))), num_U=values_U, den_U=np.ones(len(values_U)))
    return Measured(
        sae_id=sae_id, value=float(values_U.mean()), stderr=float(values_U.std() / math.sqrt(len(values_U))),
        n=len(values_U), failure="", identity={}, sample="seed=0", per_latent=per_latent, preset="quick", table=table,
    )  # fmt: skip


def lines_between(a: list[np.ndarray], b: list[np.ndarray], trial: int, **options) -> list[Line]:
    sides = [[measured(f"{s}{i}", v, **options) for i, v in enumerate(vs)] for s, vs in (("a", a), ("b", b))]
    base = {"metric": f"m{trial}", "title": "m", "better": "lower"}
    line = _difference(base, sides, [[m.value for m in side] for side in sides], None, weak=False)
    return judged([line], len(a), len(b))


@pytest.mark.parametrize("per_latent", [False, True])
def test_equal_pairs_are_called_different_in_few_cases(per_latent):
    wrong = 0
    for trial in range(200):
        documents = rng("null", trial).normal(size=UNITS)
        a, b = (documents + 0.5 * rng("null", trial, side).normal(size=UNITS) for side in "ab")
        [line] = lines_between([a], [b], trial, per_latent=per_latent)
        wrong += line.verdict != "no difference shown"
    assert wrong <= 0.07 * 200  # METRICS 3: a planted equal pair is called different in at most 7 % of cases


def test_the_spread_of_training_seeds_is_not_taken_for_a_difference():
    """Three seeds a side of one recipe, each with its own luck: some pairs differ for sure, the recipes do not."""
    real = found = 0
    for trial in range(200):
        documents = rng("seeds", trial).normal(size=UNITS)
        cells = [
            [documents + rng("luck", trial, side, s).normal() + 0.1 * noise(trial, side, s) for s in range(3)]
            for side in "ab"
        ]
        [line] = lines_between(cells[0], cells[1], trial)
        real += line.scope == "real"
        [one] = lines_between(cells[0][:1], cells[1][:1], trial)
        found += one.verdict != "no difference shown"
    assert real <= 0.07 * 200
    assert found > 0.9 * 200  # which is why a verdict of one seed is called one


def test_a_difference_beyond_the_seeds_is_real():
    documents = noise("documents")
    a, b = ([documents + shift + 0.02 * s + 0.1 * noise(shift, s) for s in range(3)] for shift in (1.0, 0.0))
    [line] = lines_between(a, b, 0)
    assert (line.verdict, line.scope) == ("B better", "real")
    assert line.sd_a == pytest.approx(np.std([v.mean() for v in a], ddof=1)) and line.sd_eval is None
    [small] = judged([replace(line, delta=-0.01, sd_a=0.02, sd_b=0.02)], 3, 3)
    assert small.scope == "within seed noise"


def test_the_seed_test_is_that_of_welch():
    from scipy.stats import ttest_ind

    for trial in range(20):
        a, b = rng("welch", trial, 0).normal(size=3), rng("welch", trial, 1).normal(1.5, 0.5, size=4)
        line = Line(metric="m", title="m", better="lower", delta=b.mean() - a.mean(), sd_a=a.std(ddof=1),
                    sd_b=b.std(ddof=1))  # fmt: skip
        assert beyond_seed_noise(line, 3, 4) == (ttest_ind(a, b, equal_var=False).pvalue < 0.05)


def test_resampled_seeds_have_the_variance_of_their_mean():
    draws = [np.full(20_000, v) for v in (1.0, 2.0, 4.0)]
    assert over_seeds(draws, "m", "a").var() == pytest.approx(np.var([1, 2, 4], ddof=1) / 3, rel=0.05)
    assert (over_seeds(draws[:1], "m", "a") == 1.0).all()


def test_reseed_noise_is_of_the_newest_rows_made_alike(tmp_path):
    """Three seeds of the evaluation; an older row of one seed and a row of other sizes are no reseeding."""
    documents = 0.3 + 0.1 * noise("documents")
    seeds = {0: 0.0, 1: 0.02, 2: -0.02}
    for sae_id, shift in ((name("topk"), 0.0), (name("relu"), -0.02)):
        for seed, offset in seeds.items():
            own = documents + shift + offset + 0.002 * noise(sae_id)
            write_subject(tmp_path, sae_id, own, config={"seed": seed}, key=f"k{seed}", seed=seed)
    old = write_subject(tmp_path, name("topk"), documents + 5, config={"seed": 1}, key="old", seed=1)
    manifest = json.loads((old / "manifest.json").read_text())
    manifest["provenance"]["created_at"] = "2020-01-01T00:00:00Z"
    (old / "manifest.json").write_text(json.dumps(manifest))
    write_subject(tmp_path, name("topk"), documents + 9, config={"seed": 7, "tokens": 5}, key="other", seed=7)
    found = compare(tmp_path, "topk", "relu")
    line = line_of(found)
    assert line.sd_eval == pytest.approx(np.std([0, 0.02, -0.02], ddof=1))
    assert line.verdict == "B better" and any("reseed noise" in note and "FVU" in note for note in found.notes)
    assert "| reseed sd |" in markdown(found) and "| 0.020 |" in markdown(found)


def test_rows_of_another_version_are_named(tmp_path):
    values = 0.3 + 0.1 * noise("documents")
    write_subject(tmp_path, name("topk"), values)
    write_subject(tmp_path, name("relu"), values, version=2, preset="paper")
    verdicts = {x.verdict for x in compare(tmp_path, "topk", "relu").lines if x.metric.startswith("fvu")}
    assert verdicts == {
        "not comparable: not run alike for A (there: version 1, preset quick; here: version 2, preset paper)",
        "not comparable: not run alike for B (there: version 2, preset paper; here: version 1, preset quick)"}


def family(root: Path, architecture: str, l0s: list[float], shift: float, seeds: int = 1, **more) -> list[str]:
    """SAEs of one architecture whose FVU falls by 0.1 per e-folding of L0, from 0.7 + shift at L0 1."""
    documents, made = 0.05 * noise("documents"), []
    for l0 in l0s:
        for seed in range(seeds):
            sae_id = name(architecture, seed, round(l0))
            value = 0.7 + shift - 0.1 * math.log(l0) + documents + 0.01 * (seed - (seeds - 1) / 2)
            write_subject(root, sae_id, value, l0=l0 * 1.001**seed, draws=True,
                          subject=info(sae_id, architecture=architecture, k=None, **more))  # fmt: skip
            made.append(sae_id)
    return made


def test_at_equal_l0_one_side_is_interpolated_and_never_beyond_its_family(tmp_path):
    family(tmp_path, "relu", [16.0, 64.0], 0.05)
    [topk] = family(tmp_path, "topk", [32.0], 0.0)
    family(tmp_path, "relu", [32.0], 9.0, train_tokens=7)  # more text: another family
    found = compare(tmp_path, topk, name("relu", 0, 64))
    [line] = found.equal_l0
    assert (line.interpolated, line.l0, line.paired) == ("B", 32.0, True)
    assert line.delta == pytest.approx(0.05, abs=0.004) and line.ci_low > 0.04 and line.ci_high < 0.06
    assert line_of(found).verdict == "B better"  # more latents, and so the lower FVU
    text = markdown(found)
    assert "## At equal L0" in text and "A better" in text.split("## At equal L0")[1]
    back = compare(tmp_path, name("relu", 0, 64), topk)
    assert back.equal_l0[0].interpolated == "A" and back.equal_l0[0].delta == pytest.approx(-line.delta)
    [far] = family(tmp_path, "gated", [200.0], 0.0)
    assert compare(tmp_path, topk, far).equal_l0 == []
    near = compare(tmp_path, topk, family(tmp_path, "batchtopk", [32.1], 0.0)[0])
    own = compare(tmp_path, name("relu", 0, 16), name("relu", 0, 64))
    assert own.equal_l0 == [] and any("L0 differs" in note for note in own.notes)  # one family: A would meet itself
    assert near.equal_l0 == [] and not any("L0 differs" in note for note in near.notes)


def test_seeds_of_one_recipe_are_one_point(tmp_path):
    from evals.board import build_board
    from evals.matched import matched_l0
    from evals.results import draws_below, load_results

    relu = family(tmp_path, "relu", [16.0, 64.0], 0.0, seeds=3)
    board = build_board(load_results(tmp_path), draws_below(tmp_path))
    found = {m.l0: m for m in matched_l0(board, keys=("fvu",))}
    assert sorted(found) == [32, 64] and found[32].between == (",".join(relu[:3]), ",".join(relu[3:]))
    middle = 0.7 - 0.1 * math.log(32) + 0.05 * noise("documents").mean()
    assert found[32].value == pytest.approx(middle, abs=0.001)  # a single seed would be 0.01 off
    assert found[32].ci_low < middle < found[32].ci_high


def test_latents_of_two_saes_do_not_pair():
    values = noise("latents")
    drawn, method = common_draws([measured("a", values, per_latent=True), measured("b", values, per_latent=True)], "f1")
    assert method == "unpaired latents" and abs(np.corrcoef(drawn)[0, 1]) < 0.15
    drawn, method = common_draws([measured("a", values), measured("b", values)], "f1")
    assert method == "paired units" and (drawn[0] == drawn[1]).all()


def test_a_unit_that_one_subject_lacks_adds_nothing():
    values = np.abs(noise("units")) + 1
    whole, part = measured("a", values), measured("b", values[:-10])
    drawn, method = common_draws([whole, part], "m")
    assert method == "paired units" and drawn[1].mean() == pytest.approx(values[:-10].mean(), rel=0.02)
    assert np.corrcoef(drawn)[0, 1] > 0.7


def test_tasks_are_strata_and_groups_their_units(tmp_path):
    """A mean over tasks: groups are resampled inside each, whatever their number."""
    ids = (name("topk"), name("relu"))
    for i, sae_id in enumerate(ids):
        big, small = np.full(50, 0.4) + 0.1 * noise("big")[:50], np.full(10, 0.8 - 0.2 * i)
        details = pd.DataFrame({
            "task": ["x"] * 50 + ["y"] * 10, "group": [*range(50), *range(10)],
            "probe_loss.num": np.concatenate([big / 100, small / 20]), "probe_loss.den": [1 / 100] * 50 + [1 / 20] * 10,
        }).assign(unit=range(60))  # fmt: skip
        value = (big.mean() + small.mean()) / 2
        folder = write_row_folder(tmp_path, info(sae_id), "probe_loss", {("probe_loss", ""): (value, 0.02)})
        details.to_parquet(folder / "details.parquet", index=False)
    line = line_of(compare(tmp_path, ids[0], ids[1]), "probe_loss")
    # all of the difference is in every group of task y: it is the same in every resample, so there is no interval
    assert line.delta == pytest.approx(-0.1) and line.method == "paired units" and line.ci_low is None


def test_rows_without_sums_use_their_standard_errors(tmp_path):
    for sae_id, value in ((name("topk"), 0.7), (name("relu"), 0.5)):
        write_row_folder(tmp_path, info(sae_id), "explanation", {("auc", EMBEDDING): (value, 0.05)})
    line = line_of(compare(tmp_path, "topk", "relu"), "detection_auc")
    assert line.method == "unpaired, from standard errors" and line.verdict == "A better"
    assert line.stderr == pytest.approx(math.hypot(0.05, 0.05) / 1.96, rel=0.1)


@pytest.mark.parametrize(("change", "field"), [
    ({"config": {"tokens": 4096}}, "config.tokens"), ({"version": 2}, "not run alike"),
    ({"preset": "paper"}, "not run alike"), ({"counts": {"dtype": "bfloat16"}}, "dtype: float32, bfloat16"),
    ({"counts": {"task_set": "planted without two"}}, "task_set: none, planted without two"),
])  # fmt: skip
def test_rows_of_different_making_are_refused(tmp_path, change, field):
    values = 0.3 + 0.1 * noise("documents")
    write_subject(tmp_path, name("topk"), values)
    write_subject(tmp_path, name("relu"), values - 0.2, **change)
    lines = [line for line in compare(tmp_path, "topk", "relu").lines if line.metric.startswith("fvu")]
    assert lines and all("not comparable" in line.verdict and field in line.verdict for line in lines)
    assert all(line.p is None for line in lines)


def test_other_places_and_missing_subjects_are_errors(tmp_path):
    values = 0.3 + 0.1 * noise("documents")
    with pytest.raises(ArtefactError, match="no result rows"):
        compare(tmp_path, "topk", "relu")
    write_subject(tmp_path, name("topk"), values)
    write_subject(tmp_path, name("relu"), values, subject=info(name("relu"), hookpoint="layers.3"))
    with pytest.raises(ConfigError, match="hookpoint"):
        compare(tmp_path, "topk", "relu")
    with pytest.raises(ConfigError, match="no subject is called 'gated'"):
        compare(tmp_path, "gated", "relu")
    with pytest.raises(ConfigError, match="share"):
        compare(tmp_path, "topk", name("topk"))


def test_names_find_cells_and_refuse_mixtures(tmp_path):
    values = 0.3 + 0.1 * noise("documents")
    for seed in range(2):
        write_subject(tmp_path, name("topk", seed), values + 0.01 * noise("topk", seed))
        write_subject(tmp_path, name("batchtopk", seed), values + 0.2 + 0.01 * noise("batchtopk", seed))
    found = compare(tmp_path, "topk-f4608-k32", "batchtopk")
    assert found.a.sae_ids == (name("topk", 0), name("topk", 1)) and len(found.b.sae_ids) == 2
    assert line_of(found).scope == "real" and line_of(found).sd_a is not None
    write_subject(tmp_path, name("topk", 0, 64), values, subject=info(name("topk", 0, 64), k=64))
    with pytest.raises(ConfigError, match=r"differ in more than the training seed \(k\)"):
        compare(tmp_path, "topk", "batchtopk")
    one = compare(tmp_path, "topk-f4608-k32.s1", "batchtopk-f4608-k32.s*")
    assert one.a.sae_ids == (name("topk", 1),) and line_of(one).scope == "one training seed"


def test_holm_is_over_the_ranked_metrics_alone():
    shown = Line(metric="m", title="m", better="lower", delta=-1.0, ci_low=-2.0, ci_high=-0.5, p=0.02)
    twin, neither = replace(shown, p=0.04), replace(shown, better="neither", p=0.0001)
    lines = judged([shown, twin, neither], 1, 1)
    assert [(x.p_holm, x.verdict) for x in lines] == [(0.04, "B better"), (0.04, "B better"), (None, "")]
    assert judged([shown, replace(twin, p=0.9), replace(twin, p=0.9)], 1, 1)[0].verdict == "no difference shown"


def test_an_undefined_value_keeps_its_reason(tmp_path):
    write_row_folder(tmp_path, info(name("topk")), "n2g", {("n2g_f1", ""): (0.3, 0.05)})
    write_row_folder(tmp_path, info(name("relu")), "n2g", {("n2g_f1", ""): "no_active_latent"})
    line = line_of(compare(tmp_path, "topk", "relu"), "n2g_f1")
    assert (line.verdict, line.a, line.b) == ("undefined: no_active_latent", pytest.approx(0.3), None)
    for who in ("topk", "relu"):  # a mean where all seeds have a value
        write_row_folder(tmp_path, info(name(who, 1)), "n2g", {("n2g_f1", ""): (0.5, 0.05)})
    line = line_of(compare(tmp_path, "topk-f4608-k32", "relu-f4608-k32"), "n2g_f1")
    assert line.a == pytest.approx(0.4) and line.b is None


def test_the_door_writes_table_and_plot(tmp_path, capsys):
    values = 0.3 + 0.1 * noise("documents")
    write_subject(tmp_path, name("topk"), values)
    write_subject(tmp_path, name("relu"), values - 0.1 + 0.01 * noise("relu"), l0=41.0)
    assert door.main(["topk", "relu", "--root", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    said = ("B is better at FVU (one training seed)", "L0 differs (32.0 against 41.0)", "One training seed on a side")
    assert all(text in printed for text in said)
    made = sorted((tmp_path / "compare").iterdir())
    assert [p.suffix for p in made] == [".json", ".md", ".svg"]
    again = {p: p.read_bytes() for p in made}
    assert door.main(["topk", "relu", "--root", str(tmp_path)]) == 0
    assert again == {p: p.read_bytes() for p in made}  # equal inputs, equal bytes
    lines = {line["metric"]: line for line in json.loads(made[0].read_text())["lines"]}
    assert lines["fvu"]["verdict"] == "B better" and lines["l0"]["verdict"] == ""
    assert door.main(["topk", "nothing", "--root", str(tmp_path)]) == 2
    assert "no subject is called 'nothing'" in capsys.readouterr().err


def test_the_door_says_what_three_names_or_a_bad_folder_are(tmp_path, capsys):
    for which in ("topk", "relu"):
        write_subject(tmp_path, name(which), 0.3 + 0.1 * noise(which))
    with pytest.raises(SystemExit) as stopped:
        door.main(["topk", "relu", "jumprelu", "--root", str(tmp_path)])
    assert stopped.value.code == 2 and "compare them in pairs" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert door.main(["topk", "relu", "--root", str(tmp_path), "--out", str(tmp_path / "file" / "below")]) == 1
    assert "error: Not a directory" in capsys.readouterr().err


def test_the_plot_puts_the_better_side_of_b_right(tmp_path):
    import xml.etree.ElementTree as ET

    values = 0.3 + 0.1 * noise("documents")
    write_subject(tmp_path, name("topk"), values)
    write_subject(tmp_path, name("relu"), values - 0.1 + 0.01 * noise("relu"))
    found = compare(tmp_path, "topk", "relu")
    for swapped, kind in ((False, "win"), (True, "lose")):
        shown = compare(tmp_path, "relu", "topk") if swapped else found
        root = ET.fromstring(forest(shown))
        [dot] = [e for e in root.iter() if e.tag.endswith("circle")]
        assert dot.attrib["class"] == kind
        middle = float(next(e for e in root.iter() if e.attrib.get("class") == "zero").attrib["x1"])
        assert (float(dot.attrib["cx"]) > middle) == (not swapped)
    assert "| FVU ↓ |" in markdown(found)


def test_the_door_is_quick_and_free_of_torch():
    code = "import sys, evals.compare, evals.compare_page; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
