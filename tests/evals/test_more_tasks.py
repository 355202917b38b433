"""`--tasks`: the other data sets of sae-probes; what was trained on is refused; two stores are read as one."""

import json
import zipfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from synthetic_results import info, metric
from tiny import save_tiny_lm

from evals.board import Board, Column, build_board
from evals.comparison import compare
from evals.more_probes import build_more_probes, joined
from evals.more_tasks import EVERY, MORE_FILE, admit, build_more, more_table, named, table_name
from evals.plan import make_plan
from evals.probe_activations import ProbeConfig, build_probes
from evals.probe_datasets import GROUP_KEYS, split_task, task_table
from evals.results import Estimate, load_results, make_row, row_dir, write_rows
from evals.run_all import main, parse
from evals.run_config import quick, tiny
from sae import assets
from sae.errors import ConfigError
from sae.language_model import LanguageModel
from sae.manifest import sha256_file, writing

MIX = json.loads((Path(assets.__file__).parent / "default_mix.json").read_text())


def mix_tables() -> list[str]:
    """Names of the default training text's tables, as cfg.json has them."""
    tables = {t for e in more_table().values() for t in (e["source"], *e.get("shares", ()))}
    full = {t.partition("_")[0]: t for t in tables}
    return [full.get(entry["file"], entry["file"]) for entry in MIX["files"]]


def test_the_table_holds_every_binary_set_of_the_package_once():
    table, left_out = more_table(), json.loads(MORE_FILE.read_text())["left_out"]
    sources = [e["source"] for e in table.values()] + [e["source"] for e in left_out]
    base = {e.get("source") for e in task_table().values()}
    binary = {s for s in base if s} - {"45_context_ans", "55_open_qa", "86_social_iqa", "97_news_class"}
    assert len(table) == 65 and len(left_out) == 6 and len(set(sources)) == 71
    assert len(binary) == 42 and not binary & set(sources)  # 113 in all, as sae_probes counts them
    assert not set(table) & set(task_table())
    assert all(e["positive"] and e["family"] and e.get("group", "first_line") in GROUP_KEYS for e in table.values())


def test_names_are_expanded_in_the_order_of_the_file_and_checked():
    assert named([EVERY]) == tuple(more_table()) == named(["spam_is", EVERY])
    assert named(["spam_is", "headline_isiran"]) == ("headline_isiran", "spam_is")
    with pytest.raises(ConfigError, match="knows no 'headline_iran'.*headline_isiran"):
        named(["headline_iran"])


def test_what_was_trained_on_is_refused_unless_allowed():
    asked = ["spam_is", "art_type_song"]
    trained = {"a": ("96_spam_is",), "b": ("some/folder/other.txt",)}
    with pytest.raises(ConfigError, match=r"spam_is \(in 96_spam_is\).*--allow-seen"):
        admit(asked, trained, False)
    found = admit(asked, trained, True)
    assert found.tasks == ("spam_is", "art_type_song") and not found.refused
    assert found.seen("a") == ("spam_is",) and found.seen("b") == ()
    assert admit(asked, {"b": trained["b"], "c": None}, False).unknown == ("c",)
    assert admit(["headline_isiran"], {"a": ("texts/58.csv",)}, False).tasks == ("headline_isiran",)
    # same sentences, other labels
    with pytest.raises(ConfigError, match="headline_isiran .in 26_headline_isfrontpage"):
        admit(["headline_isiran"], {"a": ("texts/26_headline_isfrontpage.csv.zst",)}, False)


def test_of_all_tasks_those_of_the_default_text_are_left_out_for_all_saes_alike():
    found = admit([EVERY], {"": mix_tables(), "other": ()}, False)
    assert len(found.tasks) == 32 and len(found.refused) == 33
    assert {"wikidatapolitical_party", "hist_fig_ismale", "arith_mc_A"} <= set(found.tasks)
    assert {"glue_mnli_neutral", "code_C", "headline_isobama", "it_tick_Hardware"} <= set(found.refused)
    everything = [e["source"] for e in more_table().values()]
    with pytest.raises(ConfigError, match="every task.*--allow-seen"):
        admit([EVERY], {"": everything}, False)


def test_a_source_is_known_by_its_table():
    assert table_name("94_ai_gen") == table_name("texts/94_ai_gen.csv.zst") == table_name(r"d\94_ai_gen.csv")


@pytest.mark.parametrize(("words", "told"), [
    (["--tasks", "spam"], "knows no 'spam'.*spam_is"),
    (["--allow-seen"], "--allow-seen is of --tasks"),
    (["--tasks", EVERY, "--evals", "probe_loss"], "--evals leaves out"),
])  # fmt: skip
def test_wrong_options_stop_before_any_work(words, told, capsys, tmp_path):
    import re

    assert main(["--preset", "tiny", "--root", str(tmp_path / "r"), *words]) == 2
    assert re.search(told, " ".join(capsys.readouterr().err.split())) and not (tmp_path / "r").exists()


def test_a_run_without_more_tasks_is_the_run_that_it_was():
    assert not {"tasks", "allow_seen"} & set(tiny().identity())
    keys = {tiny().key(), parse(["--preset", "tiny", "--tasks", "spam_is"]).key()}
    assert len(keys | {parse(["--preset", "tiny", "--tasks", "spam_is", "--allow-seen"]).key()}) == 3


def test_the_plan_says_what_they_cost(tmp_path):
    (tmp_path / "lm").mkdir()
    lm = LanguageModel.load(str(save_tiny_lm(tmp_path / "lm")))
    with_, without = (
        {p.stage: p for p in make_plan(cfg, lm, "layers.1", 32)} for cfg in (replace(quick(), tasks=(EVERY,)), quick())
    )
    assert set(with_) - set(without) == {"probe prompts of more tasks"}
    assert "up to 65 tasks, 832,000 tokens" in with_["probe prompts of more tasks"].detail


# -- synthetic tables of the package's form -------------------------------------------------------------------------
def sentences(seed: int, n: int) -> list[str]:
    draw = np.random.default_rng(seed)
    return [" ".join(f"w{i}" for i in draw.integers(0, 5000, 8)) for _ in range(n)]


def table(seed: int, n: int = 400) -> str:
    """``n`` rows, a tenth of them repeated, two with both labels: what cleaning has to see to."""
    rows = [(text, i % 2) for i, text in enumerate(sentences(seed, n))]
    rows += rows[: n // 10] + [(rows[50][0], 1), (rows[50][0], 0)]
    return "prompt,prompt_len,target\n" + "".join(f"{text},{len(text)},{label}\n" for text, label in rows)


@pytest.fixture
def package(tmp_path, monkeypatch) -> Path:
    """A wheel with two tables, pinned and unpacked into a cache of its own like the real one."""
    wheel = tmp_path / "sae_probes-0.0.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for seed, name in enumerate(("96_spam_is", "127_art_type_song")):
            data = pa.compress(table(seed).encode(), codec="zstd", asbytes=True)
            archive.writestr(f"sae_probes/data/cleaned_data/{name}.csv.zst", data)
    monkeypatch.setenv("SAESCOPE_CACHE", str(tmp_path / "cache"))
    pinned = replace(
        assets.ASSETS["sae_probes"], version="0.0.0", wheel=wheel.name, wheel_bytes=wheel.stat().st_size,
        wheel_sha256=sha256_file(wheel),
    )  # fmt: skip
    monkeypatch.setitem(assets.ASSETS, "sae_probes", pinned)
    assets.fetch("sae_probes", wheel=wheel)
    return tmp_path


def tiny_lm(folder: Path) -> LanguageModel:
    (folder / "lm").mkdir()
    return LanguageModel.load(str(save_tiny_lm(folder / "lm")))


def test_tables_are_cleaned_and_split_as_the_paper_s_tasks(package):
    task = build_more("spam_is")
    assert Counter(task.n_dropped) == Counter(duplicate=40, conflict=3)
    assert len(task.keys) == len(set(task.keys)) == 399 and task.family == "spam"
    split = split_task(task, seed=0, cap_rows=120)
    assert split is not None and len(split.train) == len(split.test) == 120
    assert not set(task.groups[split.train]) & set(task.groups[split.test])
    assert {int(task.labels[side].sum()) for side in split} == {60}


def test_two_stores_are_read_as_one(package):
    lm, sizes = tiny_lm(package), ProbeConfig.of_preset("tiny")
    own = package / "own.csv"
    own.write_text(table(7))
    base = build_probes(package, lm, "layers.1", ProbeConfig.of_preset("tiny", own=(f"own={own}",)))
    more = build_more_probes(package, lm, "layers.1", ("spam_is", "art_type_song"), sizes)
    both = joined([base, more])
    assert both.x_ND.shape[0] == len(both.rows) == both.meta["n_rows"] == len(base.rows) + len(more.rows)
    assert [s.task for s in both.splits] == ["own", "spam_is", "art_type_song"]
    for split in both.splits:
        for side in (split.train, split.test):
            assert set(both.rows.task.iloc[side]) == {split.task}
            assert both.rows.label.iloc[side].mean() == 0.5
    for theirs, split in zip(more.splits, both.splits[1:], strict=True):
        assert np.array_equal(both.x_ND[split.test], more.x_ND[theirs.test])
    assert len({both.task_set, base.task_set, more.task_set}) == 3
    assert len({both.key, base.key, more.key, joined([more]).key}) == 4 and joined([more]).task_set == more.task_set
    assert both.families == {"own": "own:own", "spam_is": "spam", "art_type_song": "works"}


def test_a_store_is_known_by_its_tasks_and_sizes(package):
    lm, sizes = tiny_lm(package), ProbeConfig.of_preset("tiny")
    first = build_more_probes(package, lm, "layers.1", ("spam_is",), sizes)
    made = (first.folder / "manifest.json").stat().st_mtime_ns
    again = build_more_probes(package, lm, "layers.1", ("spam_is",), sizes)
    assert again.key == first.key and (first.folder / "manifest.json").stat().st_mtime_ns == made
    other = [
        build_more_probes(package, lm, "layers.1", ("art_type_song",), sizes),
        build_more_probes(package, lm, "layers.1", ("spam_is",), replace(sizes, cap_rows=130)),
    ]
    assert len({first.key, *(o.key for o in other)}) == 3
    assert len({first.task_set, *(o.task_set for o in other)}) == 3


# -- the real tables ------------------------------------------------------------------------------------------------
COUNTS = {  # rows, positives, groups
    "hist_fig_ismale": (4282, 2409, 4105), "wikidatapolitical_party": (1931, 966, 940),
    "arith_mc_A": (1119, 468, 806), "glue_mnli_neutral": (3322, 1662, 3292),
    "temp_cat_Frequency": (371, 123, 356), "athlete_sport_baseball": (1262, 567, 1260),
}  # fmt: skip


@pytest.mark.assets
@pytest.mark.slow
@pytest.mark.parametrize("name", COUNTS)
def test_counts_of_real_tables(name):
    task = build_more(name)
    assert (len(task.keys), int(task.labels.sum()), task.n_groups) == COUNTS[name]


@pytest.mark.assets
@pytest.mark.slow
def test_tables_that_are_not_refused_share_no_text_with_the_default_mix():
    """Runs of ten words: at most 1 % of the prompts of a task that a default SAE is measured on."""
    from sae import default_mix

    def runs(texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        words = [default_mix.WORD.findall(default_mix.text_key(text)) for text in texts]
        return default_mix.runs_of_words(words, MIX["decontaminate_words"])

    mix = np.unique(runs([row.text for row in default_mix.default_rows()])[0])
    names = sorted({r.file for r in default_mix.default_rows()})
    for name in admit([EVERY], {"": names}, False).tasks:
        task = build_more(name)
        hashes, text_of = runs(list(task.keys))
        at = np.minimum(np.searchsorted(mix, hashes), len(mix) - 1)
        share = len(np.unique(text_of[mix[at] == hashes])) / len(task.keys)
        assert share <= 0.01, (name, share)


# -- what is shown of them --------------------------------------------------------------------------------------------
def rows_of(root: Path, sae_id: str, task_set: str, value: float, key: str) -> None:
    subject, auc = info(sae_id), metric("auc_k1")
    found = Estimate(value=value, n=9, ci_low=value - 0.01, ci_high=value + 0.01, stderr=0.005)
    row = make_row(subject, "sparse_probing", 1, auc, found, seed=0, run_key=key, preset="quick", split="heldout")
    with writing(row_dir(root, sae_id, "sparse_probing", key), kind="rows", key=key, stage_version=1, config={},
                 inputs={"probes": task_set}) as out:  # fmt: skip
        write_rows(out.path, [row], [auc])
        out.counts.update({"task_set": task_set, "dtype": "float32"})


def test_means_over_other_tasks_stand_in_columns_of_their_own_and_are_not_compared(tmp_path):
    a, b = (f"smollm2-135m.layers.15.{kind}-f4608-k32.s0-abcd1234" for kind in ("topk", "relu"))
    rows_of(tmp_path, a, "aaa", 0.7, "k0")
    rows_of(tmp_path, b, "aaa without two", 0.6, "k0")
    board = build_board(load_results(tmp_path))
    (column,) = auc_columns(board)
    assert column.task_set == "" and {board.cells[s, column.id].value for s in (a, b)} == {0.7, 0.6}
    assert "task_set: aaa, aaa without two" in verdicts(tmp_path, a, b)

    rows_of(tmp_path, b, "bbb", 0.9, "k1")
    board = build_board(load_results(tmp_path))
    by_set = {c.task_set: c for c in auc_columns(board)}
    assert set(by_set) == {"aaa", "bbb"} and len({c.id for c in by_set.values()}) == 2
    assert (board.cells[a, by_set["aaa"].id].value, board.cells[b, by_set["aaa"].id].value) == (0.7, 0.6)
    assert (board.cells[a, by_set["bbb"].id].value, board.cells[b, by_set["bbb"].id].value) == (None, 0.9)
    assert "there: task set aaa; here: bbb" in verdicts(tmp_path, a, b)


def auc_columns(board: Board) -> list[Column]:
    return [c for c in board.columns if (c.spec.eval, c.spec.metric) == ("sparse_probing", "auc_k1")]


def verdicts(root: Path, a: str, b: str) -> str:
    return "; ".join(line.verdict for line in compare(root, a, b).lines)
