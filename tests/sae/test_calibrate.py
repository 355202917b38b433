"""Calibrated thresholds: exact by counting, checked on other tokens, valid however early training stops."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from planted_store import META, PlantedStore, planted_store

from sae import calibrate, checkpoint, metrics
from sae.base import SAE, random_like
from sae.config import InputNorm, SAEConfig, TrainConfig
from sae.errors import DataError
from sae.plugins import find
from sae.train import TrainingDiverged, train_many

D, F, K = 32, 48, 3
BATCH = TrainConfig(
    architecture="batchtopk", d_sae=F, k=K, batch_tokens=256, train_tokens=256 * 40, lr=5e-3, lr_warmup_steps=2,
    aux_k=8, dead_tokens=1_024, seed=0,
)  # fmt: skip


@pytest.fixture(scope="module")
def store() -> PlantedStore:
    return PlantedStore(planted_store(n=9_000).x_ND[:8_000])


def untrained(store: PlantedStore, architecture: str = "batchtopk") -> SAE:
    plugin = find("sae.architectures", architecture)
    sae: SAE = plugin(SAEConfig(
        architecture=architecture, d_in=store.d_in, d_out=store.d_in, d_sae=F, apply_b_dec_to_input=True,
        input_norm=InputNorm(kind="layer_norm"), sae_id=f"tiny.{architecture}", meta=None, train_tokens=0,
        train_steps=0, seed=0, **plugin.cfg_fields(replace(BATCH, architecture=architecture)),
    ))  # fmt: skip
    sae.initialise(sae.normalise(store.x_ND)[0], 0)
    return sae


@pytest.mark.parametrize("l0", [0.5, 3.0, 17.25])
@pytest.mark.parametrize("chunk", [500, 100_000])
def test_the_count_is_exact(store: PlantedStore, l0: float, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrate, "CHUNK_TOKENS", chunk)
    sae, flat = untrained(store), store.kept_N[:3_000]
    threshold = calibrate.threshold_for(sae, store, flat, l0)
    h = sae.pre_activations(store.read(flat))
    assert int((h > threshold).sum()) == round(l0 * 3_000)


def test_the_count_is_exact_where_the_guess_misleads(store: PlantedStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """The guess is far off in both directions; the window moves until it holds the rank."""
    sae, flat = untrained(store), store.kept_N[:2_000]
    h = sae.pre_activations(store.read(flat))
    true_between = calibrate.between
    for wrong in (0.01, 0.5, 2.0, 50.0):
        calls: list[float] = []

        def misled(values: torch.Tensor, count: int, factor: float = wrong, calls: list[float] = calls) -> float:
            calls.append(true_between(values, count))
            return calls[-1] * (factor if len(calls) == 1 else 1.0)

        monkeypatch.setattr(calibrate, "between", misled)
        threshold = calibrate.threshold_for(sae, store, flat, 3.0)
        monkeypatch.setattr(calibrate, "between", true_between)
        assert int((h > threshold).sum()) == 6_000, wrong


def test_too_few_positive_latents_give_threshold_0(store: PlantedStore, caplog: pytest.LogCaptureFixture) -> None:
    sae = untrained(store)
    with torch.no_grad():
        h = sae.pre_activations(store.x_ND)
        sae.b_enc_F.sub_(calibrate.between(h.view(-1), store.n_kept))
    l0 = float((sae.pre_activations(store.x_ND) > 0).sum()) / store.n_kept
    assert 0 < l0 < K
    found = calibrate.calibrate(sae, store, K)
    assert found.threshold == 0 and found.l0 == pytest.approx(l0, rel=0.2)
    assert "its threshold is 0" in caplog.text


def test_between_splits_where_it_is_asked_to() -> None:
    values = torch.tensor([0.5, 4.0, -1.0, 2.0])
    assert [calibrate.between(values, c) for c in (1, 2, 3, 4, 9)] == [3.0, 1.25, 0.25, 0.0, 0.0]
    assert calibrate.between(values, 0) == 4.0
    close = torch.tensor([1.0, float(np.nextafter(np.float32(1), np.float32(2)))])
    assert int((close > calibrate.between(close, 1)).sum()) == 1


class Drifting(PlantedStore):
    """Every eighth token is five times as large: the tokens that check are not like those that fix the threshold."""

    def read(self, flat: Any) -> torch.Tensor:
        flat = np.asarray(flat)
        scale = torch.from_numpy(np.where(flat % calibrate.CHECK_EVERY == calibrate.CHECK_EVERY - 1, 5.0, 1.0))
        return super().read(flat) * scale[:, None].float()


def test_a_second_sample_that_contradicts_is_an_error(store: PlantedStore, tmp_path: Path) -> None:
    drifting = Drifting(store.x_ND, "drifting")
    cfg = replace(BATCH, input_norm="none", train_tokens=256 * 2)
    with pytest.raises(TrainingDiverged, match="gives L0") as caught:
        train_many(tmp_path, drifting, [cfg, replace(cfg, architecture="relu", k=None)], META)
    assert len(caught.value.failures) == 1 and len(caught.value.paths) == 1, "the other SAE is saved"


def test_no_token_no_threshold(store: PlantedStore) -> None:
    with pytest.raises(DataError, match="at least one token"):
        calibrate.threshold_for(untrained(store), store, np.arange(0), 3.0)


@pytest.mark.parametrize("architecture", ["batchtopk", "matryoshka"])
@pytest.mark.parametrize("steps", [1, 5, 40])
def test_the_threshold_is_valid_however_early_training_stops(
    architecture: str, steps: int, store: PlantedStore, tmp_path: Path
) -> None:
    cfg = replace(BATCH, architecture=architecture, train_tokens=256 * steps)
    sae = checkpoint.load(train_many(tmp_path, store, [cfg], META)[0])
    l0 = metrics.l0(sae.encode_sparse(store.x_ND))
    assert l0 == pytest.approx(K, rel=0.02)
    assert sae.cfg.threshold_source is not None and sae.cfg.threshold_source["kind"] == "calibrated"
    assert sae.cfg.activation == "threshold" and f"-k{K}." in sae.sae_id
    fvu = metrics.fvu(store.x_ND, sae(store.x_ND))
    assert fvu is not None and fvu < 1.0


def test_other_architectures_can_be_calibrated_too(store: PlantedStore) -> None:
    found = calibrate.calibrate(untrained(store, "topk"), store, K)
    assert found.l0 == pytest.approx(K, rel=0.05) and found.tokens == 7_000 and found.check_tokens == 1_000


@pytest.mark.parametrize("goal", [2, 6])
def test_jumprelu_reaches_its_l0_by_itself(goal: int, store: PlantedStore, tmp_path: Path) -> None:
    cfg = replace(BATCH, architecture="jumprelu", k=goal, train_tokens=256 * 150)
    sae = checkpoint.load(train_many(tmp_path, store, [cfg], META)[0])
    assert sae.cfg.threshold_source is not None and sae.cfg.threshold_source["kind"] == "learned"
    l0 = metrics.l0(sae.encode_sparse(store.x_ND))
    assert l0 == pytest.approx(goal, rel=0.1) and l0 == pytest.approx(sae.cfg.threshold_source["l0"], rel=1e-6)
    thresholds = sae.threshold_F
    assert float(thresholds.min()) >= 0 and float(thresholds.std()) > 1e-3, "they are learned, one by one"


@pytest.mark.parametrize("architecture", ["batchtopk", "matryoshka", "jumprelu", "gated", "relu", "topk"])
def test_a_trained_sae_and_its_random_floor(architecture: str, store: PlantedStore, tmp_path: Path) -> None:
    """Same codes from the file, bit for bit, every time; and a random SAE of the same L0."""
    options = {"relu": {"l1_decoder_norm": True, "l1": 0.05}, "topk": {"multi_topk": True}}
    cfg = replace(BATCH, architecture=architecture, **options.get(architecture, {}))
    (folder,) = train_many(tmp_path, store, [cfg], META)
    a, b = checkpoint.load(folder), checkpoint.load(folder)
    assert torch.equal(a.encode(store.x_ND), b.encode(store.x_ND))
    assert float((a.W_dec_FD.norm(dim=1) - 1).abs().max()) < 1e-5 and a.cfg.decoder_unit_norm
    assert sorted(dict(a.named_parameters()) | dict(a.named_buffers())) == sorted(b.state_dict())
    floor = random_like(a, 0, store.x_ND[:2_000])
    l0, floor_l0 = (metrics.l0(s.encode_sparse(store.x_ND)) for s in (a, floor))
    assert l0 is not None and floor_l0 == pytest.approx(max(1, round(l0)), abs=0.51)
