"""Gradient projection, unit rows and weighted column sums against sae.optim and float64."""

import os

import pytest
import torch
from torch import Tensor

from sae import optim

pytest.importorskip("triton")
row_steps = pytest.importorskip("sae_kernels.row_steps")

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
pytestmark = pytest.mark.skipif(
    not CUDA and os.environ.get("TRITON_INTERPRET") != "1", reason="needs CUDA or Triton's interpreter"
)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


@pytest.mark.parametrize(("f", "d"), [(5, 1), (3, 48), (7, 100), (2, 576), (0, 8)])
def test_projection_and_unit_rows_equal_torch(f: int, d: int) -> None:
    W = optim.normalise_rows_(draw(f, d))
    grad, moved = draw(f, d, seed=1), W + 0.3 * draw(f, d, seed=2)
    want = optim.project_gradient_(grad.clone(), W)
    assert torch.allclose(row_steps.project_rows_(grad, W), want, atol=1e-5)
    along = (grad.double() * W.double()).sum(1)
    assert len(W) == 0 or float(along.abs().max()) <= 1e-5, "what is left is tangent to the sphere"
    want, copy = optim.normalise_rows_(moved.clone()), torch.full((f, d), float("nan"), device=DEVICE).bfloat16()
    assert row_steps.renorm_rows_(moved, copy) is moved
    assert torch.allclose(moved, want, atol=1e-6)
    # The interpreter cuts off the low bits where a GPU rounds: one unit in the last of 8 bits.
    assert torch.allclose(copy.float(), moved.bfloat16().float(), rtol=0 if CUDA else 2**-7, atol=0)
    assert torch.allclose(row_steps.renorm_rows_(moved.clone()), moved, atol=1e-6)


def test_a_zero_row_stays_zero() -> None:
    W = draw(3, 20)
    W[1] = 0
    assert row_steps.renorm_rows_(W)[1].tolist() == [0.0] * 20


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("n", "d"), [(0, 8), (1, 5), (150, 300)])
def test_weighted_column_sums(n: int, d: int, dtype: torch.dtype) -> None:
    weights, rows = draw(n), draw(n, d, seed=1).to(dtype)
    got, want = row_steps.weighted_column_sum(weights, rows), weights.double() @ rows.double()
    assert got.dtype == torch.float32 and got.shape == (d,)
    assert torch.allclose(got.double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("f", "d", "tile"), [(40, 20, 16), (32, 48, 16), (5, 100, 16)])
def test_one_pass_equals_projection_adam_unit_rows_and_copies(f: int, d: int, tile: int) -> None:
    from sae import ops_fused
    from sae.config import TrainConfig
    from sae.row_adam import RowAdam
    from sae_kernels import topk_encode

    cfg = TrainConfig(lr=1e-2)
    start = [draw(f, d), draw(f, seed=1), optim.normalise_rows_(draw(f, d, seed=2)), draw(d, seed=3)]
    ours, theirs = ([torch.nn.Parameter(t.clone()) for t in start] for _ in range(2))
    encoder = topk_encode.prepare(ours[0].detach(), ours[1].detach(), BN=tile, dtype=torch.float32)
    copies = ops_fused.ComputeCopies(encoder, torch.zeros_like(ours[2]))
    row_adam, adam = RowAdam(*ours, copies, cfg), optim.adam(theirs, cfg)
    for step in range(4):
        for group in (*row_adam.param_groups, *adam.param_groups):
            group["lr"] = 1e-2 / (step + 1)
        for i, (p, q) in enumerate(zip(ours, theirs, strict=True)):
            p.grad, q.grad = (draw(*p.shape, seed=100 + 10 * step + i) for _ in range(2))
        assert theirs[2].grad is not None
        optim.project_gradient_(theirs[2].grad, theirs[2])
        adam.step()
        optim.normalise_rows_(theirs[2])
        row_adam.step()
        for p, q in zip(ours, theirs, strict=True):
            p, q = p.detach(), q.detach()
            assert float((p - q).abs().max()) <= 2e-6 * max(1.0, float(q.abs().max()))
        assert copies.encoder_is_current and copies.decoder_is_current
        want = topk_encode.prepare(ours[0].detach(), ours[1].detach(), BN=tile, dtype=torch.float32)
        assert torch.equal(encoder.W_PD, want.W_PD) and torch.equal(encoder.b_P, want.b_P), "tile order, padding kept"
        assert torch.equal(copies.W_dec_FD, ours[2].detach())
        copies.refresh(*ours[:3])
        assert not copies.encoder_is_current
        row_adam.zero_grad()
        assert all(p.grad is None for p in ours)


def test_unsupported_operands_are_named() -> None:
    W = draw(4, 6)
    with pytest.raises(ValueError, match=r"\(3, 6\)"):
        row_steps.project_rows_(W[:3], W)
    with pytest.raises(ValueError, match="contiguous"):
        row_steps.renorm_rows_(W.t())
    with pytest.raises(TypeError, match="float64"):
        row_steps.renorm_rows_(W.double())
    with pytest.raises(ValueError, match="16384"):
        row_steps.renorm_rows_(torch.zeros(1, 20_000, device=DEVICE))
    settings = {"rate": 1.0, "step": 1, "betas": (0.9, 0.99), "eps": 1e-8, "unit": False}
    with pytest.raises(ValueError, match=r"\(3, 6\)"):
        row_steps.adam_rows_(W, W, W, W, W[:3], **settings)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"\[16\]"):
        tiles = row_steps.Tiles(1, 16, W[:, 0], W[:, 0])
        row_steps.adam_rows_(W, W, W, W, draw(16, 6), tiles=tiles, **settings)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"\(3,\)"):
        row_steps.weighted_column_sum(torch.ones(3, device=DEVICE), W)
    with pytest.raises(TypeError, match="float64"):
        row_steps.weighted_column_sum(torch.ones(4, device=DEVICE), W.double())
