"""Transcoders: trained on pairs of activations, saved and loaded, and refused where they make no sense."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from planted_pairs import D_OUT, Pairs
from planted_pairs import TRANSCODER as CFG
from planted_store import META, PlantedStore, planted_store

from sae import checkpoint, metrics
from sae.activations import capture_activations
from sae.base import random_like
from sae.config import InputNorm, SAEConfig, TokensConfig, TrainConfig
from sae.errors import ConfigError, DataError
from sae.language_model import LanguageModel
from sae.paired import PairedStore
from sae.plugins import find
from sae.tokens import TokenSet, build_tokens
from sae.train import train_many


@pytest.fixture(scope="module")
def store() -> Pairs:
    return Pairs(planted_store(n=4_100).x_ND[:4_096], "pairs")


@pytest.fixture(scope="module")
def trained(store: Pairs, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A transcoder, a skip transcoder and a plain SAE of the inputs, from one stream."""
    names = ("transcoder", "skip_transcoder", "topk")
    meta = replace(META, hookpoint_out="blocks.1.mlp")
    folders = train_many(
        tmp_path_factory.mktemp("pairs"), store, [replace(CFG, architecture=name) for name in names], meta
    )
    return dict(zip(names, folders, strict=True))


def fvu(store: Pairs, folder: Path) -> float:
    sae = checkpoint.load(folder)
    everything = np.arange(store.n_kept)
    value = metrics.fvu(store.read_target(everything), sae(store.x_ND))
    assert value is not None
    return value


def test_a_transcoder_learns_the_target_and_the_skip_takes_what_is_linear(
    store: Pairs, trained: dict[str, Path]
) -> None:
    plain, skip = fvu(store, trained["transcoder"]), fvu(store, trained["skip_transcoder"])
    assert plain < 0.75 and skip < 0.7 * plain


def test_what_is_saved(store: Pairs, trained: dict[str, Path]) -> None:
    for name in ("transcoder", "skip_transcoder"):
        a, b = checkpoint.load(trained[name]), checkpoint.load(trained[name])
        assert torch.equal(a.encode(store.x_ND), b.encode(store.x_ND)) and torch.equal(a(store.x_ND), b(store.x_ND))
        assert (a.cfg.d_in, a.cfg.d_out, a.cfg.apply_b_dec_to_input) == (store.d_in, D_OUT, False)
        assert a.cfg.meta is not None and a.cfg.meta.hookpoint_out == "blocks.1.mlp"
        assert a.cfg.input_norm.kind == "dataset_rms" and a.cfg.input_norm.scale_in != a.cfg.input_norm.scale_out
        assert bool(a.b_pre_D.any()) and torch.equal(a.b_pre_D, b.b_pre_D)
    assert bool(checkpoint.load(trained["skip_transcoder"]).W_skip_DD.any())
    scale = a.cfg.input_norm.scale_in
    assert float((store.x_ND * scale).norm(dim=1).mean()) == pytest.approx(store.d_in**0.5, rel=1e-3)


def test_a_plain_sae_beside_transcoders_reconstructs_its_input(store: Pairs, trained: dict[str, Path]) -> None:
    sae = checkpoint.load(trained["topk"])
    assert sae.cfg.d_out == store.d_in and sae.cfg.input_norm.scale_in == sae.cfg.input_norm.scale_out
    value = metrics.fvu(store.x_ND, sae(store.x_ND))
    assert value is not None and value < 0.6


@pytest.mark.parametrize(
    ("changes", "says"),
    [({"input_norm": "layer_norm"}, "dataset_rms or none"), ({"ema_decay": 0.9}, "ema_decay"), ({"k": None}, "needs")],
)
def test_configurations_that_cannot_run(changes: dict[str, Any], says: str, store: Pairs, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=says):
        train_many(tmp_path, store, [replace(CFG, **changes)], META)


@pytest.mark.parametrize("name", ["relu_transcoder", "jumprelu_transcoder", "relu_skip_transcoder"])
def test_the_other_codes_are_trained_too(name: str, store: Pairs, tmp_path: Path) -> None:
    (folder,) = train_many(tmp_path, store, [replace(CFG, architecture=name, l1=0.01)], META)
    found = checkpoint.load(folder)
    active = float((found.encode(store.x_ND) > 0).sum(1).double().mean())
    assert 0.5 < active < 24 and fvu(store, folder) < 0.85, (active, fvu(store, folder))


def test_the_window_of_a_jumprelu_transcoder_is_fitted(store: Pairs) -> None:
    kind = find("sae.architectures", "jumprelu_transcoder")
    plain = TrainConfig(architecture="jumprelu_transcoder", d_sae=48, k=4)
    cfg = SAEConfig(
        architecture="jumprelu_transcoder", d_in=store.d_in, d_out=D_OUT, d_sae=48, input_norm=InputNorm(kind="none"),
        sae_id="tiny", meta=None, train_tokens=0, train_steps=0, seed=0, **kind.cfg_fields(plain),
    )  # fmt: skip
    made = kind(cfg)
    made.initialise_pair(store.x_ND, store.read_target(np.arange(store.n_kept)), 0)
    h_NF = made.pre_activations(store.x_ND[:1_024])
    assert float(made.bandwidth) == pytest.approx(0.1 * float(h_NF.std()), rel=1e-4)


def test_one_store_is_not_enough(store: Pairs, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="PairedStore"):
        train_many(tmp_path, PlantedStore(store.x_ND), [CFG], META)


def test_the_random_floor_is_an_sae_of_what_is_read(store: Pairs, trained: dict[str, Path]) -> None:
    sae = checkpoint.load(trained["transcoder"])
    floor = random_like(sae, 0, store.x_ND)
    assert floor.cfg.architecture == "topk" and floor.cfg.k == sae.cfg.k and floor.d_sae == sae.d_sae
    assert floor.cfg.meta is not None and floor.cfg.meta.hookpoint_out is None
    assert floor(store.x_ND).shape == store.x_ND.shape
    value = metrics.fvu(store.x_ND, floor(store.x_ND))
    assert value is not None and value < 1


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory, tiny_lm: LanguageModel, tiny_texts: Path) -> dict[str, TokenSet]:
    cfg = TokensConfig(
        text=str(tiny_texts), context_tokens=32, train_tokens=32 * 21, explain_tokens=64, calibrate_tokens=64,
        score_tokens=64, test_tokens=64,
    )  # fmt: skip
    return build_tokens(tmp_path_factory.mktemp("tokens"), cfg, tiny_lm.name, tiny_lm.tokenizer)


def test_a_paired_store_gives_two_hookpoints_of_the_same_tokens(
    tokens: dict[str, TokenSet], tiny_lm: LanguageModel, tmp_path: Path
) -> None:
    collect = lambda split, point: capture_activations(tmp_path, tiny_lm, tokens[split], point)  # noqa: E731
    inputs, targets = collect("train", "layers.1.mlp:in"), collect("train", "layers.1.mlp")
    pairs = PairedStore(inputs, targets)
    assert pairs.key not in (inputs.key, targets.key) and pairs.n_kept == len(pairs.kept_N) > 100
    assert bool((inputs.keep_N & targets.keep_N)[pairs.kept_N].all())
    batches = list(pairs.batches(50, seed=0, epochs=2))
    assert len(batches) == 2 * (pairs.n_kept // 50)
    x, flat = batches[3]
    assert torch.equal(x, inputs.read(flat)) and torch.equal(pairs.read_target(flat), targets.read(flat))
    assert not torch.equal(x, pairs.read_target(flat))
    epoch = np.concatenate([f for _, f in batches[: len(batches) // 2]])
    assert len(set(epoch.tolist())) == len(epoch), "no token twice in an epoch"
    late = list(pairs.batches(50, seed=0, epochs=2, first=3))
    assert len(late) == len(batches) - 3 and np.array_equal(late[0][1], flat)
    with pytest.raises(DataError, match="one token set"):
        PairedStore(inputs, collect("test", "layers.1.mlp"))
    (folder,) = train_many(tmp_path, pairs, [replace(CFG, batch_tokens=64, train_tokens=640)], META)
    assert checkpoint.load(folder)(x).shape == (50, targets.d_in)
