"""Training on planted activations: same bytes, independence of SAEs in one stream, typed errors before work."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from planted_store import META, PlantedStore, planted_store

from sae import checkpoint, metrics
from sae.base import random_like
from sae.config import TrainConfig
from sae.errors import ConfigError, DataError
from sae.metric_log import read_log
from sae.train import TrainingDiverged, sae_id_of, train_key, train_many

TOPK = TrainConfig(
    architecture="topk", d_sae=48, k=3, batch_tokens=128, train_tokens=128 * 24, lr=5e-3, lr_warmup_steps=2, aux_k=8,
    dead_tokens=512, seed=0, input_norm="none",
)  # fmt: skip
RELU = replace(TOPK, architecture="relu", l1=0.05, seed=1)
FILES = (checkpoint.WEIGHTS, checkpoint.CFG, checkpoint.REFERENCE)


@pytest.fixture(scope="module")
def store() -> PlantedStore:
    return PlantedStore(planted_store(n=3_048).x_ND[:2_048])


@pytest.fixture(scope="module")
def both(store: PlantedStore, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A topk and a relu SAE trained on one stream."""
    return train_many(tmp_path_factory.mktemp("both"), store, [TOPK, RELU], META)


def contents(folder: Path) -> list[bytes]:
    return [(folder / name).read_bytes() for name in FILES]


def without_clock(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k not in ("seconds", "tokens_per_s")} for row in rows]


@pytest.mark.parametrize("which", [0, 1])
def test_an_sae_does_not_depend_on_its_neighbours(
    which: int, both: list[Path], store: PlantedStore, tmp_path: Path
) -> None:
    (alone,) = train_many(tmp_path, store, [(TOPK, RELU)[which]], META)
    assert alone.name == both[which].name
    assert contents(alone) == contents(both[which])
    logs = [without_clock(read_log(folder / "train.jsonl")) for folder in (alone, both[which])]
    assert logs[0] == logs[1]


def test_the_order_of_configurations_is_that_of_the_folders(both: list[Path], store: PlantedStore) -> None:
    for cfg, folder in zip((TOPK, RELU), both, strict=True):
        assert folder.name == sae_id_of(cfg, META, train_key(cfg, store.key))
        assert checkpoint.load(folder).cfg.architecture == cfg.architecture
    assert "topk-f48-k3.s0" in both[0].name and "relu-f48.s1" in both[1].name


def test_another_seed_is_another_sae(both: list[Path], store: PlantedStore, tmp_path: Path) -> None:
    (other,) = train_many(tmp_path, store, [replace(TOPK, seed=5)], META)
    assert other.name != both[0].name
    assert contents(other)[0] != contents(both[0])[0]


class Untouchable(PlantedStore):
    """A store that may be asked for its name and size, not for activations."""

    def read(self, flat: Any) -> torch.Tensor:
        raise AssertionError("activations were read")


def test_complete_saes_are_not_trained_again(both: list[Path], store: PlantedStore) -> None:
    root, before = both[0].parent.parent, [contents(folder) for folder in both]
    stamps = [(folder / "manifest.json").stat().st_mtime_ns for folder in both]
    again = train_many(root, Untouchable(store.x_ND, store.key), [TOPK, RELU], META)
    assert again == both and [contents(folder) for folder in both] == before
    assert [(folder / "manifest.json").stat().st_mtime_ns for folder in both] == stamps
    assert train_many(root, store, [TOPK], META, force=True) == both[:1]
    assert contents(both[0]) == before[0], "training again gives the same bytes"
    assert (both[0] / "manifest.json").stat().st_mtime_ns != stamps[0]


def test_the_saved_sae_says_how_it_was_trained(both: list[Path]) -> None:
    for folder in both:
        sae, rows = checkpoint.load(folder), read_log(folder / "train.jsonl")
        assert sae.cfg.train_steps == 24 and sae.cfg.train_tokens == 24 * 128
        assert rows[0]["step"] == 1 and rows[-1]["step"] == 24
        assert rows[-1]["loss"] < rows[0]["loss"]
        lengths_F = torch.linalg.vector_norm(sae.W_dec_FD, dim=1)
        assert torch.allclose(lengths_F, torch.ones_like(lengths_F), atol=1e-5)
        assert not folder.with_name(folder.name + ".run").exists()


def test_training_beats_the_random_sae(store: PlantedStore, tmp_path: Path) -> None:
    (folder,) = train_many(tmp_path, store, [replace(TOPK, train_tokens=128 * 150)], META)
    held_out = planted_store(n=3_048).x_ND[len(store.x_ND) :]  # tokens that training has not seen
    sae = checkpoint.load(folder)
    trained = metrics.fvu(held_out, sae(held_out))
    floor = metrics.fvu(held_out, random_like(sae, 0, store.x_ND)(held_out))
    assert trained is not None and floor is not None
    assert trained < 0.5 * floor < 0.5


def test_configurations_that_do_not_go_together(store: PlantedStore, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"\[64, 128\]"):
        train_many(tmp_path, store, [TOPK, replace(RELU, batch_tokens=64)], META)
    with pytest.raises(ConfigError, match="equal"):
        train_many(tmp_path, store, [TOPK, TOPK], META)
    with pytest.raises(ConfigError, match="needs k"):
        train_many(tmp_path, store, [replace(TOPK, k=None)], META)
    with pytest.raises(ConfigError, match="at least one"):
        train_many(tmp_path, store, [], META)
    with pytest.raises(ConfigError, match="relu"):
        train_many(tmp_path, store, [replace(TOPK, architecture="rleu")], META)
    with pytest.raises(ConfigError, match="Bad/Slug"):
        train_many(tmp_path, store, [TOPK], replace(META, lm_slug="Bad/Slug"))
    with pytest.raises(DataError, match="100 tokens"):
        train_many(tmp_path, PlantedStore(store.x_ND[:100]), [TOPK], META)
    assert list(tmp_path.iterdir()) == [], "refused before anything was written"


def test_constant_or_broken_activations_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="variance"):
        train_many(tmp_path, PlantedStore(torch.ones(256, 8)), [TOPK], META)
    broken = torch.randn(256, 8, generator=torch.Generator().manual_seed(0))
    broken[3, 2] = float("nan")
    with pytest.raises(DataError, match="variance"):
        train_many(tmp_path, PlantedStore(broken), [TOPK], META)


def test_one_that_diverges_does_not_stop_the_others(both: list[Path], store: PlantedStore, tmp_path: Path) -> None:
    wild = replace(RELU, lr=1e30)
    with pytest.raises(TrainingDiverged, match="train.lr") as caught:
        train_many(tmp_path, store, [wild, TOPK], META)
    assert list(caught.value.failures) == [sae_id_of(wild, META, train_key(wild, store.key))]
    (saved,) = caught.value.paths
    assert contents(saved) == contents(both[0])
    left = sorted(path.name for path in (tmp_path / "saes").iterdir())
    assert left == sorted([saved.name, *(f"{name}.run" for name in caught.value.failures)]), "only the log stays"


def test_more_steps_than_the_store_holds_means_several_passes(store: PlantedStore, tmp_path: Path) -> None:
    small = PlantedStore(store.x_ND[:300], "small")  # two batches a pass
    (folder,) = train_many(tmp_path, small, [replace(TOPK, train_tokens=128 * 5)], META)
    assert checkpoint.load(folder).cfg.train_tokens == 128 * 5
