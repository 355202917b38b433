"""Cleaning, grouping and splitting of probe tasks: planted duplicates are caught, the design's counts are met."""

import base64
import time

import numpy as np
import pytest

from evals import probe_datasets
from evals.language_tasks import read_catalogues
from evals.probe_datasets import ProbeTask, RawRow, build_task, clean, csv_task, near_pairs, split_task
from sae.errors import ConfigError, DataError
from sae.manifest import hash64

WORDS = [f"w{i}" for i in range(4000)]


def distinct_texts(n, seed=0, words=8):
    draw = np.random.default_rng(seed)
    return [" ".join(draw.choice(WORDS, size=words, replace=False)) for _ in range(n)]


def planted(n=400, **options):
    rows = [RawRow(text, str(i % 2)) for i, text in enumerate(distinct_texts(n))]
    return clean("planted", "own", rows, positive=["1"], **options)


def test_key_folds_form_case_and_space():
    assert probe_datasets.normalise("  Ｈello\tWORLD\n ﬁne ") == "hello world fine"


def test_empty_conflicting_and_repeated_rows_go_and_are_counted():
    rows = [
        RawRow("Red cats", "1"), RawRow("  red  CATS ", "1"), RawRow("blue dogs", "1"), RawRow("Blue dogs", "0"),
        RawRow("   ", "0"), RawRow("green birds ", "0"),
    ]  # fmt: skip
    task = clean("t", "own", rows, positive=["1"])
    assert task.keys == ("red cats", "green birds")
    assert task.prompts == ("Red cats", "green birds")  # the first spelling, without trailing white space
    assert task.labels.tolist() == [1, 0]
    assert task.n_dropped == {"conflict": 2, "duplicate": 1, "empty": 1}


def write_catalogue(path, pairs):
    """A .mo file as gettext reads it: the message, then its translation."""
    import struct

    entries = [("", "Content-Type: text/plain; charset=UTF-8\n"), *sorted(pairs.items())]
    tables, data, offset = [], b"", 28 + 16 * len(entries)
    for column in (0, 1):
        for entry in entries:
            raw = entry[column].encode()
            tables.append((len(raw), offset + len(data)))
            data += raw + b"\0"
    path.parent.mkdir(parents=True)
    header = struct.pack("<7I", 0x950412DE, 0, len(entries), 28, 28 + 8 * len(entries), 0, 0)
    path.write_bytes(header + b"".join(struct.pack("<2I", *t) for t in tables) + data)


def test_catalogues_give_prose_only_and_the_first_translation_wins(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    long = "This is a long message of an interface."
    write_catalogue(one / "a" / "locale" / "de" / "LC_MESSAGES" / "x.mo", {
        long: "Dies ist eine <b>lange</b>\nMeldung einer Oberfläche.",
        "Hello %s, this has a placeholder": "Hallo %s, " * 9,
        "Short": "Eine lange Übersetzung eines kurzen Textes", "menu\x04Message within a context": "Meldung " * 9,
    })  # fmt: skip
    write_catalogue(two / "locale" / "de" / "LC_MESSAGES" / "x.mo", {long: "Eine andere, spätere Übersetzung davon."})
    write_catalogue(two / "locale" / "pt_BR" / "LC_MESSAGES" / "x.mo", {long: "Esta mensagem vem do Brasil e é longa."})
    write_catalogue(two / "locale" / "pt" / "LC_MESSAGES" / "x.mo", {long: "Esta mensagem vem do português europeu."})
    found = read_catalogues([one, two])
    assert found["de"] == {long: "Dies ist eine lange Meldung einer Oberfläche."}
    assert found["pt"] == {long: "Esta mensagem vem do português europeu."}
    assert found["en"] == {long: long} and found["fr"] == {}


def test_no_rows_at_all():
    task = clean("t", "own", [], positive=["1"])
    assert task.n_groups == 0 and len(task.labels) == 0
    assert split_task(task, seed=0, cap_rows=200) is None


def test_near_duplicates_and_equal_task_keys_share_a_group():
    a, b, c, d = distinct_texts(4, words=12)
    twin = a + " w9"
    rows = [RawRow(t, "1") for t in (a, b, twin, f"{c} tail one", f"{d} tail one")]
    task = clean("t", "own", rows, positive=["1"], group_key="last_two_words")
    groups = task.groups.tolist()
    assert groups[0] == groups[2]
    assert groups[3] == groups[4]
    assert len({groups[0], groups[1], groups[3]}) == 3


@pytest.mark.parametrize("seed", range(3))
def test_near_pairs_equal_brute_force(seed):
    from sklearn.feature_extraction.text import TfidfVectorizer

    draw = np.random.default_rng(seed)
    common = ["the", "of", "and", "a"]
    texts = [
        " ".join(draw.choice(common, size=draw.integers(0, 9)).tolist() + draw.choice(WORDS[:12], size=5).tolist())
        for _ in range(300)
    ]
    x = TfidfVectorizer(token_pattern=r"\w+", sublinear_tf=True).fit_transform(texts)
    for threshold in (0.4, 0.55, 0.7):
        similar = np.triu((x @ x.T).toarray() >= threshold, k=1)
        expected = np.argwhere(similar)
        assert len(expected) > 3
        assert near_pairs(texts, threshold).tolist() == expected.tolist()


def test_near_pairs_of_texts_without_words():
    assert near_pairs(["?", "!!"]).shape == (0, 2)


def test_one_option_pair_per_question():
    rows = [
        RawRow("q one yes", "1", question="q one"), RawRow("q one no", "0", question="q one"),
        RawRow("q one never", "0", question="Q  one"), RawRow("q two maybe", "0", question="q two"),
    ]  # fmt: skip
    task = clean("t", "own", rows, positive=["1"])
    wrong = min(["q one no", "q one never"], key=hash64)
    assert set(task.keys) == {"q one yes", wrong}
    assert task.n_dropped == {"unpaired": 2}


def test_one_against_rest_is_balanced_by_hash():
    rows = [RawRow(t, "x" if i < 5 else "y") for i, t in enumerate(distinct_texts(30))]
    task = clean("t", "own", rows, positive=["x"], balance=True)
    negatives = [k for k, label in zip(task.keys, task.labels, strict=True) if not label]
    expected = sorted((probe_datasets.normalise(r.prompt) for r in rows[5:]), key=hash64)[:5]
    assert sorted(negatives) == sorted(expected)


def test_no_group_is_on_both_sides_and_classes_are_even():
    texts = distinct_texts(400)
    rows = [RawRow(f"{t} end{i // 4} z", str(i % 2)) for i, t in enumerate(texts)]
    task = clean("t", "own", rows, positive=["1"], group_key="last_two_words")
    assert task.n_groups == 100
    split = split_task(task, seed=0, cap_rows=140)
    assert split is not None
    assert not set(task.groups[split.train]) & set(task.groups[split.test])
    for side in split:
        assert len(side) == 140
        assert task.labels[side].sum() == 70


def test_split_does_not_depend_on_row_order_but_on_the_seed():
    task = planted()
    order = np.random.default_rng(1).permutation(len(task.keys))
    shuffled = ProbeTask(
        name="t", family="own", prompts=tuple(task.prompts[i] for i in order), labels=task.labels[order],
        keys=tuple(task.keys[i] for i in order), groups=task.groups[order],
    )  # fmt: skip
    one, two = split_task(task, seed=0, cap_rows=120), split_task(shuffled, seed=0, cap_rows=120)
    assert {task.keys[i] for i in one.train} == {shuffled.keys[i] for i in two.train}
    other = split_task(task, seed=1, cap_rows=120)
    assert {task.keys[i] for i in one.train} != {task.keys[i] for i in other.train}


def test_too_few_rows():
    assert split_task(planted(200), seed=0, cap_rows=400) is None


def test_unknown_and_missing_tasks_are_named():
    with pytest.raises(ConfigError, match="truthfulqa"):
        build_task("truthfulqq")
    with pytest.raises(ConfigError, match="ETHICS"):
        build_task("utilitarianism")


def test_the_table_lists_all_tasks_of_the_paper():
    table = probe_datasets.task_table()
    assert len(table) == 61
    assert len(probe_datasets.task_names("quick")) == 12
    assert set(probe_datasets.missing_tasks()) | set(probe_datasets.task_names("paper")) == set(table)


def test_own_csv(tmp_path):
    file = tmp_path / "own.csv"
    file.write_text("text,kind\nnull,good\nhello there,bad\n", encoding="utf-8")
    task = csv_task("mine", file, positive=["good"], prompt="text", label="kind")
    assert task.prompts == ("null", "hello there")  # "null" is a text, not a missing value
    assert task.labels.tolist() == [1, 0]
    with pytest.raises(DataError, match="'prompt'"):
        csv_task("mine", file, positive=["good"])
    with pytest.raises(DataError, match="does not exist"):
        csv_task("mine", tmp_path / "none.csv", positive=["good"])
    (tmp_path / "bad.csv").write_bytes(b"text,kind\n\xff\xfe\xfa,good\n")
    with pytest.raises(DataError, match="bad.csv"):
        csv_task("mine", tmp_path / "bad.csv", positive=["good"], prompt="text", label="kind")


def test_base64_negatives_look_alike():
    texts = [" ".join(distinct_texts(1, seed=i, words=20)) for i in range(400)]
    rows = probe_datasets.base64_rows(texts)
    assert len(rows) >= 10
    for real, fake in zip(rows[::2], rows[1::2], strict=True):
        assert real.label == "1" and fake.label == "0" and real.stem == fake.stem
        assert len(real.prompt) == len(fake.prompt) and real.prompt.count("=") == fake.prompt.count("=")
        assert real.stem.startswith(base64.b64decode(real.prompt).decode())
    assert rows == probe_datasets.base64_rows(reversed(texts))


COUNTS = {  # METRICS C.1: rows, positives, groups
    "amazon": (1999, 1000, 1995), "sciq": (4020, 2026, 3948), "truthfulqa": (490, 246, 481),
    "mc_taco": (1578, 675, 150), "piqa": (4324, 2163, 4127), "quail": (7870, 3935, 558), "quartz": (1711, 857, 1183),
    "openbookqa": (5900, 2950, 2921), "justice": (4439, 2245, 3359), "commonsense": (4216, 2053, 4012),
    "virtue": (3822, 1515, 2470), "deontology": (4367, 2225, 3002), "base64": (2000, 1000, 1000),
    "isalive": (3377, 1688, 3272), "sex_or_gender": (3345, 1666, 3225), "social_iqa": (9218, 4609, 4589),
    "cola": (3645, 2056, 2706), "gpt2": (4990, 2493, 4988), "jigsaw": (580, 237, 551), "ag_world": (2460, 1230, None),
    "ag_sports": (2440, 1220, None), "ag_business": (2434, 1217, None), "ag_scitech": (2448, 1224, None),
    "europarl_el": (666, 333, None), "europarl_en": (1612, 806, None),
}  # fmt: skip
FAMILIES = {"occupation_is": (1520, 1563, 610, 645, 1502, 1543), "phrase_": (2383, 2447, 970, 1028, 2350, 2434),
            "europarl_": (666, 1612, 333, 806, 450, 617)}


@pytest.mark.assets
@pytest.mark.slow
@pytest.mark.parametrize("name", probe_datasets.task_names("paper"))
def test_counts_of_the_design(name):
    task = build_task(name)
    found = (len(task.keys), int(task.labels.sum()), task.n_groups)
    if name in COUNTS:
        expected = COUNTS[name]
        assert found == (*expected[:2], expected[2] or found[2])
    else:
        low_n, high_n, low_p, high_p, low_g, high_g = next(v for k, v in FAMILIES.items() if name.startswith(k))
        assert low_n <= found[0] <= high_n and low_p <= found[1] <= high_p and low_g <= found[2] <= high_g


@pytest.mark.assets
@pytest.mark.slow
def test_near_copies_across_sides_are_rare():
    """Share of test rows with a train row of cosine >= .6 (METRICS C.2)."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    for name, bound in (("sciq", 0.02), ("virtue", 0.05), ("phrase_high-school", 0.02), ("cola", 0.13)):
        task = build_task(name)
        split = split_task(task, seed=0, cap_rows=100_000)
        x = TfidfVectorizer(token_pattern=r"\w+", sublinear_tf=True).fit_transform(task.keys)
        near = (x[split.test] @ x[split.train].T).max(axis=1).toarray().ravel() >= 0.6
        assert near.mean() <= bound, name


@pytest.mark.assets
@pytest.mark.slow
def test_the_quick_tasks_are_built_within_seconds():
    started = time.process_time()
    for name in probe_datasets.task_names("quick"):
        assert split_task(build_task(name), seed=0, cap_rows=120) is not None
    assert time.process_time() - started <= 20  # 5 s when measured; the bound only catches a quadratic slip
