"""The concept bank: distinct short labels, the script that makes them, embeddings kept once per file and model."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from autointerp import concepts
from sae.errors import DataError
from sae.manifest import hash64, read_manifest

REPOSITORY = Path(concepts.__file__).resolve().parents[1]


class Counting:
    """Unit vectors from a hash; counts the texts it is asked for."""

    name = "counting"

    def __init__(self, model_hash: str = "m") -> None:
        self.model_hash, self.n_asked = model_hash, 0

    def embed(self, texts) -> np.ndarray:
        self.n_asked += len(texts)
        rows = np.stack([np.random.default_rng(hash64(t)).standard_normal(8) for t in texts])
        return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def test_the_bank_is_small_distinct_and_speaks_in_short_labels() -> None:
    labels = concepts.read_labels()
    assert 1_000 <= len(labels) <= 1_500 and len(set(labels)) == len(labels)
    assert concepts.BANK.stat().st_size <= 200_000
    assert all(1 <= len(label.split()) <= 8 and len(label) <= 60 and label.isprintable() for label in labels)
    assert list(labels) == sorted(labels, key=lambda label: (label.casefold(), label))


def test_the_shipped_bank_is_what_the_script_makes() -> None:
    spec = importlib.util.spec_from_file_location("build_concepts", REPOSITORY / "scripts" / "build_concepts.py")
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert tuple(script.concepts()) == concepts.read_labels()


def test_embeddings_are_computed_once_per_file_and_model(tmp_path: Path) -> None:
    bank_file = tmp_path / "bank.txt"
    bank_file.write_text("# a comment\nnames of cities\n\ncommas\n", encoding="utf-8")
    embedder = Counting()
    first = concepts.load_bank(embedder, path=bank_file, cache=tmp_path / "cache")
    again = concepts.load_bank(embedder, path=bank_file, cache=tmp_path / "cache")
    assert first.labels == again.labels == ["names of cities", "commas"]
    assert np.array_equal(first.vectors_nE, again.vectors_nE) and embedder.n_asked == 2
    concepts.load_bank(Counting("another model"), path=bank_file, cache=tmp_path / "cache")
    folders = list((tmp_path / "cache" / "concepts").iterdir())
    assert len(folders) == 2 and all(read_manifest(f)["counts"] == {"labels": 2} for f in folders)


def test_a_changed_file_is_another_bank(tmp_path: Path) -> None:
    bank_file = tmp_path / "bank.txt"
    for n, text in enumerate(("commas\n", "commas\ncolons\n"), start=1):
        bank_file.write_text(text, encoding="utf-8")
        concepts.read_labels.cache_clear()
        assert len(concepts.load_bank(Counting(), path=bank_file, cache=tmp_path / "cache").vectors_nE) == n


@pytest.mark.parametrize(("text", "found"), [("# nothing\n", "found 0"), ("commas\ncommas\n", "twice: .'commas'")])
def test_a_bank_without_labels_or_with_a_double_one_is_refused(tmp_path: Path, text: str, found: str) -> None:
    bank_file = tmp_path / "bank.txt"
    bank_file.write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=found):
        concepts.read_labels(bank_file)
