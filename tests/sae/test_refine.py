"""Refinement of activations: an oracle for every token, planted shrinkage, never worse; edge cases."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from planted_store import META, PlantedStore, planted_store
from scipy.optimize import nnls

from sae import checkpoint, refine
from sae.base import SAE
from sae.config import InputNorm, SAEConfig, TrainConfig
from sae.errors import DataError
from sae.plugins import find
from sae.train import train_many

CFG = TrainConfig(
    architecture="topk", d_sae=48, k=6, batch_tokens=128, train_tokens=128 * 60, lr=5e-3, lr_warmup_steps=2, aux_k=8,
    dead_tokens=512, l1=0.3,
)  # fmt: skip


@pytest.fixture(scope="module")
def store() -> PlantedStore:
    return planted_store(n=2_048)


@pytest.fixture(scope="module")
def saes(store: PlantedStore, tmp_path_factory: pytest.TempPathFactory) -> dict[str, SAE]:
    names = ("topk", "relu", "batchtopk", "jumprelu", "gated", "matryoshka")
    cfgs = [replace(CFG, architecture=name) for name in names]
    folders = train_many(tmp_path_factory.mktemp("saes"), store, cfgs, META)
    return {name: checkpoint.load(folder) for name, folder in zip(names, folders, strict=True)}


def oracle(sae: SAE, x_ND: torch.Tensor) -> list[np.ndarray]:
    """scipy's active-set solver, token by token, on the support that the encoder chose."""
    n_ND = (sae.normalise(x_ND)[0] - sae.b_dec_D).double().numpy()
    latents = sae.encode_sparse(x_ND)
    found = []
    for n_D, values_K, indices_K in zip(n_ND, latents.values_NK.numpy(), latents.indices_NK.numpy(), strict=True):
        best = np.zeros(len(values_K))
        active = values_K > 0
        rows = sae.W_dec_FD.double().numpy()[indices_K[active]]
        if active.any():
            best[active] = nnls(rows.T, n_D)[0]
        found.append(best)
    return found


@pytest.mark.parametrize("architecture", ["topk", "relu", "batchtopk", "jumprelu", "gated", "matryoshka"])
def test_it_is_nonnegative_least_squares(architecture: str, saes: dict[str, SAE], store: PlantedStore) -> None:
    sae, x_ND = saes[architecture], store.x_ND[:100]
    refined = refine.refine(sae, x_ND)
    for got_K, want_K in zip(refined.values_NK.double().numpy(), oracle(sae, x_ND), strict=True):
        assert got_K == pytest.approx(want_K, rel=1e-6, abs=1e-6 * max(1.0, want_K.max(initial=0.0)))


def random_problems(n: int, k: int, d: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    rows_NKD = torch.randn(n, k, d, generator=generator, dtype=torch.float64)
    target_ND = torch.randn(n, d, generator=generator, dtype=torch.float64)
    return rows_NKD, target_ND, rows_NKD @ rows_NKD.transpose(1, 2)


@pytest.mark.parametrize("k, d", [(1, 4), (8, 12), (32, 40), (30, 30)])
@pytest.mark.parametrize("method", ["pivot", "fista"])
def test_both_solvers_agree_with_scipy(k: int, d: int, method: str) -> None:
    rows_NKD, target_ND, gram_NKK = random_problems(40, k, d, k)
    b_NK = torch.einsum("nkd,nd->nk", rows_NKD, target_ND)
    allowed = torch.ones_like(b_NK, dtype=torch.bool)
    if method == "pivot":
        a_NK, solved = refine._pivot(gram_NKK, b_NK, allowed)
        assert bool(solved.all())
    else:
        a_NK = refine._fista(gram_NKK, b_NK, allowed, torch.zeros_like(b_NK))
    for rows_KD, target_D, a_K in zip(rows_NKD.numpy(), target_ND.numpy(), a_NK.numpy(), strict=True):
        want, norm = nnls(rows_KD.T, target_D)
        residual = np.linalg.norm(rows_KD.T @ a_K - target_D)
        assert residual == pytest.approx(norm, rel=1e-8, abs=1e-9)
        if method == "pivot":
            assert a_K == pytest.approx(want, rel=1e-7, abs=1e-9)


def test_equal_decoder_rows_have_some_best_answer() -> None:
    rows_NKD, target_ND, _ = random_problems(20, 6, 10, 3)
    rows_NKD[:, 3] = rows_NKD[:, 1]
    rows_NKD[:, 4] = 2 * rows_NKD[:, 1]
    gram_NKK = rows_NKD @ rows_NKD.transpose(1, 2)
    b_NK = torch.einsum("nkd,nd->nk", rows_NKD, target_ND)
    allowed = torch.ones_like(b_NK, dtype=torch.bool)
    a_NK = refine.nonnegative(gram_NKK, b_NK, allowed, torch.zeros_like(b_NK))
    assert bool((a_NK >= 0).all())
    for rows_KD, target_D, a_K in zip(rows_NKD.numpy(), target_ND.numpy(), a_NK.numpy(), strict=True):
        assert np.linalg.norm(rows_KD.T @ a_K - target_D) == pytest.approx(nnls(rows_KD.T, target_D)[1], rel=1e-6)


@pytest.mark.parametrize("architecture", ["topk", "relu", "jumprelu"])
def test_no_token_gets_worse(architecture: str, saes: dict[str, SAE], store: PlantedStore) -> None:
    sae, x_ND = saes[architecture], store.x_ND
    n_ND = sae.normalise(x_ND)[0]
    errors = [
        (n_ND - sae.decode_normalised(codes)).double().square().sum(1)
        for codes in (sae.encode_sparse(x_ND), refine.refine(sae, x_ND))
    ]
    assert bool((errors[1] <= errors[0] * (1 + 1e-5) + 1e-6).all())
    found = refine.measure(sae, store, tokens=500)
    assert found.fvu_after < found.fvu_before and found.tokens == 500
    assert found.l0_after <= found.l0_before


def planted_sae(factor: float) -> tuple[SAE, PlantedStore]:
    """Orthogonal features read exactly, their values then multiplied by ``factor``."""
    cfg = SAEConfig(
        architecture="relu", activation="relu", d_in=12, d_out=12, d_sae=12, k=None, apply_b_dec_to_input=True,
        input_norm=InputNorm(kind="none"), decoder_unit_norm=True, sae_id="planted", meta=None, train_tokens=0,
        train_steps=0, seed=0,
    )  # fmt: skip
    sae: SAE = find("sae.architectures", "relu")(cfg)
    generator = torch.Generator().manual_seed(1)
    basis = torch.linalg.qr(torch.randn(12, 12, generator=generator)).Q
    z_NF = torch.rand(300, 12, generator=generator) * (torch.rand(300, 12, generator=generator) < 0.3)
    with torch.no_grad():
        sae.W_dec_FD.copy_(basis)
        sae.W_enc_FD.copy_(basis * factor)
        sae.b_dec_D.copy_(torch.randn(12, generator=generator))
        sae.b_enc_F.fill_(-1e-4)
    x_ND = z_NF @ basis + sae.b_dec_D.detach()
    return sae.requires_grad_(False), PlantedStore(x_ND)


@pytest.mark.parametrize("factor", [0.8, 1.0, 1.25])
def test_planted_shrinkage_is_found(factor: float) -> None:
    """Values of 0.8 of the truth need a quarter more."""
    sae, store = planted_sae(factor)
    found = refine.measure(sae, store)
    assert found.shrinkage == pytest.approx(1 / factor - 1, abs=1e-3)
    assert found.fvu_after < 1e-6


def test_edges(saes: dict[str, SAE], store: PlantedStore) -> None:
    sae = saes["topk"]
    none = refine.refine(sae, store.x_ND[:0])
    assert none.values_NK.shape[0] == 0
    with pytest.raises(DataError, match="at least one token"):
        refine.measure(sae, PlantedStore(store.x_ND[:0]))
    with pytest.raises(DataError, match="no variance"):
        refine.measure(sae, PlantedStore(store.x_ND[:1]))


def test_chunks_do_not_matter(saes: dict[str, SAE], store: PlantedStore, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = refine.refine(saes["topk"], store.x_ND[:64])
    monkeypatch.setattr(refine, "GATHERED_NUMBERS", 1_000)
    parts = refine.refine(saes["topk"], store.x_ND[:64])
    torch.testing.assert_close(whole.values_NK, parts.values_NK, rtol=1e-6, atol=1e-7)
