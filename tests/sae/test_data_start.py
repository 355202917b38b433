"""ReLU with data_start: directions and biases of the start come from tokens of the sample."""

from pathlib import Path

import pytest
import torch
from planted_store import META, PlantedStore, planted_store
from torch import Tensor

from sae import checkpoint, metrics
from sae.architectures.relu import ReLU
from sae.config import InputNorm, SAEConfig, TrainConfig
from sae.data_start import DENSITY
from sae.metric_log import read_log
from sae.train import train_key, train_many
from sae.train_run import identity

F = 96
X_ND = planted_store(n=4_096, d=24, g=40).x_ND


def started(n_ND: Tensor, seed: int = 0, *, data_start: bool = True) -> ReLU:
    train = TrainConfig(architecture="relu", d_sae=F, k=None, data_start=data_start)
    width = n_ND.shape[1]
    sae = ReLU(
        SAEConfig(
            architecture="relu", d_in=width, d_out=width, d_sae=F, apply_b_dec_to_input=True,
            input_norm=InputNorm(kind="none"), sae_id="tiny.relu", meta=None, train_tokens=0, train_steps=0, seed=seed,
            train=identity(train), **ReLU.cfg_fields(train),
        )
    )  # fmt: skip
    sae.initialise(n_ND, seed)
    return sae


def test_each_latent_starts_at_another_token_and_fires_on_the_wanted_share() -> None:
    sae = started(X_ND)
    u_ND = X_ND - sae.b_dec_D
    cosine_FN = sae.W_dec_FD @ (u_ND / torch.linalg.vector_norm(u_ND, dim=1, keepdim=True)).T
    best_F, token_F = cosine_FN.max(dim=1)
    torch.testing.assert_close(best_F, torch.ones(F), rtol=0, atol=1e-5)
    assert len(token_F.unique()) == F
    factor_F = torch.linalg.vector_norm(sae.W_enc_FD, dim=1)
    torch.testing.assert_close(sae.W_enc_FD, factor_F.mean() * sae.W_dec_FD, rtol=0, atol=1e-5)
    active_F = (sae.encode(X_ND[:2048]) > 0).float().sum(0)
    wanted = round(DENSITY * 2048)
    assert bool(((active_F - wanted).abs() <= 1).all()), "the last of them lies on the bar, up to rounding"


def test_the_start_is_a_function_of_the_seed_and_another_than_the_random_one() -> None:
    a, b, other, plain = started(X_ND), started(X_ND), started(X_ND, 1), started(X_ND, data_start=False)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    assert not torch.equal(a.W_dec_FD, other.W_dec_FD) and not torch.equal(a.W_dec_FD, plain.W_dec_FD)
    fvu = metrics.fvu(X_ND, a(X_ND).detach())
    assert fvu is not None and fvu < 1, "the scaled start is better than the mean"


def test_latents_without_a_token_keep_random_rows() -> None:
    few_ND = X_ND[:40].clone()
    few_ND[7] = started(few_ND).b_dec_D  # the median of the others, up to the accuracy of its search
    sae, plain = started(few_ND), started(few_ND, data_start=False)
    assert torch.equal(sae.W_dec_FD[40:], plain.W_dec_FD[40:])
    assert not torch.equal(sae.W_dec_FD[:40], plain.W_dec_FD[:40])
    same_ND = few_ND[:1].expand(30, -1)  # the median is the only token there is, so none has a direction
    for found in (sae, started(same_ND)):
        assert all(bool(torch.isfinite(p).all()) for p in found.parameters())
        torch.testing.assert_close(torch.linalg.vector_norm(found.W_dec_FD, dim=1), torch.ones(F), rtol=0, atol=1e-5)


def test_the_option_names_another_sae_and_its_default_none() -> None:
    plain = TrainConfig(architecture="relu", k=None)
    assert "data_start" not in identity(plain)
    assert train_key(plain, "x") != train_key(TrainConfig(architecture="relu", k=None, data_start=True), "x")


def test_training_starts_where_the_option_says_and_it_is_saved(tmp_path: Path) -> None:
    store, starts = PlantedStore(X_ND), []
    for data_start in (False, True):
        cfg = TrainConfig(
            architecture="relu", d_sae=F, k=None, batch_tokens=256, train_tokens=256 * 40, l1=0.02, lr=3e-3,
            lr_warmup_steps=2, data_start=data_start,
        )  # fmt: skip
        (folder,) = train_many(tmp_path, store, [cfg], META)
        sae, rows = checkpoint.load(folder), read_log(folder / "train.jsonl")
        assert (sae.cfg.train or {}).get("data_start", False) == data_start
        fvu = metrics.fvu(X_ND, sae(X_ND))
        assert fvu is not None and fvu < 0.95 * rows[0]["fvu"]
        starts.append(rows[0]["l0"] / F)
    assert starts[1] == pytest.approx(DENSITY, rel=0.5) and starts[0] > 1.5 * starts[1]
