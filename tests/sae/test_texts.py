"""Every form of --texts, and every way a text file can be wrong."""

import bz2
import gzip
import importlib.util
import itertools
import json
import random
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sae.errors import ConfigError, DataError, MissingExtra
from sae.texts import (
    LONG_TXT_CHARACTERS,
    MANY_FILES,
    SHORT_PIECE_CHARACTERS,
    iter_documents,
    source_exists,
    source_key,
    text_files,
)

LINES = ["First text, with a comma and a \u2028 separator.", "Zweiter Text: ÄÖÜ — “quotes”", "third\nof two lines"]


def packed(data: bytes, packing: str) -> bytes:
    if packing == ".gz":
        return gzip.compress(data)
    return pa.compress(data, codec="zstd", asbytes=True) if packing == ".zst" else data


def content(kind: str, lines: list[str] = LINES, column: str = "text") -> bytes:
    if kind == ".jsonl":
        return "".join(json.dumps({column: t, "n": 1}, ensure_ascii=False) + "\n" for t in lines).encode()
    if kind == ".csv":
        return pd.DataFrame({column: lines, "n": 1}).to_csv(index=False).encode()
    if kind == ".parquet":
        return pd.DataFrame({column: lines, "n": 1}).to_parquet(index=False)
    return lines[0].encode()


def read(path: Path, column: str = "text") -> list[str]:
    return [d.text for d in iter_documents(str(path), column)]


@pytest.mark.parametrize("packing", ["", ".gz", ".zst"])
@pytest.mark.parametrize("kind", [".txt", ".jsonl", ".csv"])
def test_every_kind_and_packing(tmp_path: Path, kind: str, packing: str) -> None:
    path = tmp_path / f"t{kind}{packing}"
    path.write_bytes(packed(content(kind), packing))
    found = list(iter_documents(str(path)))
    assert [d.text for d in found] == (LINES[:1] if kind == ".txt" else LINES)
    assert {d.source for d in found} == {path.name} and [d.doc_id for d in found] == [str(i) for i in range(len(found))]


def test_parquet(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    path.write_bytes(content(".parquet"))
    assert read(path) == LINES


def test_another_column_nulls_numbers_and_a_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"body": "x"}\n\n{"body": null}\n{"body": 3}\n{"body": "  "}\n')
    assert read(path, "body") == ["x", "3"]


def test_a_folder_is_read_in_order_of_names(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.txt").write_text("bee")
    (tmp_path / "a.jsonl").write_text('{"text": "ay"}\n')
    (tmp_path / "sub" / "c.txt.gz").write_bytes(gzip.compress(b"sea"))
    (tmp_path / "notes.md").write_text("not read")
    assert read(tmp_path) == ["ay", "bee", "sea"]
    assert [p.name for p in text_files(str(tmp_path))] == ["a.jsonl", "b.txt", "c.txt.gz"]


def book(characters: int, seed: int = 0) -> str:
    """Paragraphs of numbered sentences; no two are alike."""
    draw, paragraphs, n = random.Random(seed), [], 0
    while n < characters:
        sentences = [f"Sentence {draw.random()} of {seed} ends here." for _ in range(draw.randint(1, 12))]
        paragraphs.append("\n".join(sentences))
        n += len(paragraphs[-1]) + 2
    return "\n\n".join(paragraphs)


def test_a_book_is_divided_at_blank_lines_and_nothing_is_lost(tmp_path: Path, caplog) -> None:
    text = book(500_000)
    (tmp_path / "book.txt").write_text(text)
    found = read(tmp_path / "book.txt")
    assert 250 <= len(found) <= 350 and all(len(piece) <= SHORT_PIECE_CHARACTERS for piece in found)
    paragraphs = text.split("\n\n")
    assert [p for piece in found for p in piece.split("\n\n")] == paragraphs, "no paragraph is torn or missing"
    lengths = [len(a) + 2 + len(b.split("\n\n")[0]) for a, b in itertools.pairwise(found)]
    assert min(lengths) > SHORT_PIECE_CHARACTERS, "every piece is as long as it can be"
    assert caplog.text.count("dealt out one by one") == 1
    (tmp_path / "book.txt").write_text(book(4_000_000))
    longer = read(tmp_path / "book.txt")
    assert 400 <= len(longer) <= 440 and 9_000 < max(map(len, longer)) <= 10_050


def test_what_has_no_blank_lines_is_divided_all_the_same(tmp_path: Path) -> None:
    """At lines, else sentences, else words; a word is divided only where it is longer than a piece."""
    line = "A line of words that ends without a stop"
    sentences = " ".join(f"This is number {i}." for i in range(4_000))
    words = "word " * 10_000
    for name, text, border in (("lines", "\n".join([line] * 1_000), "stop"), ("sentences", sentences, "."),
                               ("chinese", "这是一个句子。" * 5_000, "。"), ("words", words, "word")):  # fmt: skip
        (tmp_path / f"{name}.txt").write_text(text)
        found = read(tmp_path / f"{name}.txt")
        assert len(found) > 10 and all(len(t) <= SHORT_PIECE_CHARACTERS and t.endswith(border) for t in found), name
        assert "".join("".join(found).split()) == "".join(text.split())
    (tmp_path / "blob.txt").write_text("x" * 30_001)
    assert [len(t) for t in read(tmp_path / "blob.txt")] == [2_000] * 15 + [1]
    (tmp_path / "short.txt").write_text(("p\n\n" * LONG_TXT_CHARACTERS)[: LONG_TXT_CHARACTERS - 2])
    assert len(read(tmp_path / "short.txt")) == 1


def test_the_pieces_of_a_book_lie_together_where_files_are_many(tmp_path: Path, caplog) -> None:
    for i in range(MANY_FILES):
        (tmp_path / f"{i:03}.txt").write_text(f"short text {i}")
    (tmp_path / "book.txt").write_text(book(60_000))
    (tmp_path / "rows.jsonl").write_text(json.dumps({"text": book(60_000, 1)}))
    found = list(iter_documents(str(tmp_path)))
    pieces = [d for d in found if d.source == "book.txt"]
    assert len(pieces) > 20 and {d.group or d.text for d in pieces} == {pieces[0].text}
    assert not any(d.group for d in found if d.source != "book.txt") and not caplog.records
    (tmp_path / "000.txt").unlink()
    (tmp_path / "001.txt").unlink()
    (tmp_path / "002.txt").unlink()
    assert not any(d.group for d in iter_documents(str(tmp_path))) and "book.txt has over 20,000" in caplog.text


def test_the_key_follows_the_content(tmp_path: Path) -> None:
    path = tmp_path / "t.txt"
    path.write_text("one")
    first = source_key(str(path))
    assert source_key(str(path)) == first
    path.write_text("two")
    assert source_key(str(path)) != first and source_key("hf:a/b:train") != source_key("hf:a/b:test")


def test_files_of_one_name_in_two_folders_all_count(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "t.txt").write_text(name)
    first = source_key(str(tmp_path))
    for name in ("a", "b"):
        (tmp_path / name / "t.txt").write_text("changed")
        assert source_key(str(tmp_path)) != first
        (tmp_path / name / "t.txt").write_text(name)
    assert source_key(str(tmp_path)) == first


@pytest.mark.parametrize(
    ("name", "says"),
    [("nowhere.txt", "nowhere.txt"), ("t.docx", "cannot tell the kind"), ("empty_folder", "holds no")],
)
def test_what_is_not_there_or_of_no_known_kind(tmp_path: Path, name: str, says: str) -> None:
    (tmp_path / "empty_folder").mkdir()
    (tmp_path / "t.docx").write_bytes(bz2.compress(b"x"))
    with pytest.raises(ConfigError, match=says):
        list(iter_documents(str(tmp_path / name)))


@pytest.mark.parametrize(
    ("name", "data", "says"),
    [
        ("t.txt", b"", "is empty"),
        ("t.txt", b" \n\n ", "no text but white space"),
        ("t.jsonl", b"\n\n", "no text"),
        ("t.txt", b"caf\xe9", "byte 0xe9 at offset 3"),
        ("t.csv", b"text\ncaf\xe9\n", "byte 0xe9 at offset 8"),
        ("t.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', "byte 0xff at offset 24"),
        ("t.jsonl", b'{"text": "a"}\n{"text": \n', "line 2: not JSON"),
        ("t.jsonl", b'["text"]\n', "line 1: expected an object"),
        ("t.jsonl", b'{"texts": "a"}\n', "did you mean 'texts'"),
        ("t.csv", b"Text,n\na,1\n", "did you mean 'Text'"),
        ("t.parquet", content(".parquet", column="texts"), "did you mean 'texts'"),
        ("t.parquet", b"PAR1 not really PAR1", "t.parquet"),
        ("t.parquet", content(".parquet")[:-40], "t.parquet"),
        ("t.txt.gz", gzip.compress(b"hello " * 1_000, mtime=0)[:-12], "cannot be read"),
        ("t.txt.gz", b"no gzip", "cannot be read"),
        ("t.jsonl.gz", gzip.compress(b'{"text": "a"}\n', mtime=0)[:-10] + b"\0" * 10, "cannot be read"),
        ("t.txt.zst", b"no zstd at all", "cannot be read"),
        ("t.jsonl.zst", packed(content(".jsonl") * 99, ".zst")[:-9], "cannot be read"),
    ],
)
def test_bad_files_are_named_and_explained(tmp_path: Path, name: str, data: bytes, says: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=says) as caught:
        read(tmp_path / name)
    assert name in str(caught.value)


def test_a_damaged_deflate_stream(tmp_path: Path) -> None:
    good = gzip.compress(bytes(range(32, 127)) * 40)
    (tmp_path / "t.txt.gz").write_bytes(good[:15] + bytes(255 - b for b in good[15:40]) + good[40:])
    with pytest.raises(DataError, match="t.txt.gz cannot be read"):
        read(tmp_path / "t.txt.gz")


def test_damaged_parquet_pages(tmp_path: Path) -> None:
    good = bytearray(content(".parquet", [f"text {i} " * 20 for i in range(200)]))
    good[4:200] = b"\xff" * 196
    (tmp_path / "t.parquet").write_bytes(bytes(good))
    with pytest.raises(DataError, match="t.parquet"):
        read(tmp_path / "t.parquet")


@pytest.mark.parametrize(
    "source", ["hf:", "hf:repo", "hf:org/name", "hf:org/name/c/d:train", "hf:org/name:train:a:b", "hf:a/b:train[:9]"]
)
def test_a_malformed_hub_name(source: str) -> None:
    for use in (lambda: list(iter_documents(source)), lambda: source_key(source)):
        with pytest.raises(ConfigError, match="expected hf:REPO"):
            use()


@pytest.mark.skipif(importlib.util.find_spec("datasets") is not None, reason="the package `datasets` is installed")
def test_a_hub_name_without_the_extra() -> None:
    with pytest.raises(MissingExtra, match=r"pip install 'saescope\[hub\]'"):
        list(iter_documents("hf:org/name/config:train:text@main"))


@pytest.fixture
def hub_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder laid out as a data set of the hub is: two parquet shards. Without network."""
    pytest.importorskip("datasets", reason="the extra `hub` is not installed")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True, raising=False)
    folder = tmp_path / "org" / "name"
    folder.mkdir(parents=True)
    for i in range(2):
        table = pa.table({"text": [f"doc {i} {j} " for j in range(2)] + [None], "other": ["x", "y", "z"]})
        pq.write_table(table, folder / f"train-0000{i}-of-00002.parquet")
    monkeypatch.chdir(tmp_path)
    return folder


def test_a_data_set_of_the_hub_s_layout(hub_folder: Path) -> None:
    found = list(iter_documents("hf:org/name:train"))
    assert [d.text for d in found if d.text] == ["doc 0 0", "doc 0 1", "doc 1 0", "doc 1 1"]
    assert {d.source for d in found} == {"hf:org/name:train"}
    assert [d.text for d in iter_documents("hf:org/name:train:other")] == ["x", "y", "z"] * 2


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("hf:org/name:train:body", "has no column 'body'"),
        ("hf:org/name:validation", "cannot open the data set.*check the name and the network"),
        ("hf:org/absent:train", "cannot open the data set.*check the name and the network"),
    ],
)
def test_data_sets_that_cannot_be_read(hub_folder: Path, source: str, says: str) -> None:
    with pytest.raises(DataError, match=says):
        list(iter_documents(source))


def test_a_data_set_without_a_revision_is_warned_of(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    source_exists("hf:org/name:train:text@0123abcd")
    assert not caplog.records
    source_exists("hf:org/name:train")
    assert "write hf:org/name:train@COMMIT" in caplog.text
