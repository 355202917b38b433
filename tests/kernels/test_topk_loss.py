"""The fused TopK loss against plain dense autograd in float64; on a CPU under Triton's interpreter."""

import os
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sae import ops_fused

pytest.importorskip("triton")
pytest.importorskip("sae_kernels.launch")

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
pytestmark = pytest.mark.skipif(
    not CUDA and os.environ.get("TRITON_INTERPRET") != "1", reason="needs CUDA or Triton's interpreter"
)
NAMES = ("W_enc", "b_enc", "W_dec", "b_dec")


def leaves(f: int, d: int, shift: float = 0.0, seed: int = 0) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed + 100 * f + d)
    drawn = [torch.randn(*size, generator=g) for size in ((f, d), (f,), (f, d), (d,))]
    drawn[1] += shift
    return [t.to(DEVICE).requires_grad_() for t in drawn]


def batch(n: int, d: int, seed: int = 1) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def dense(n: Tensor, parameters: list[Tensor], k: int, pre_bias: bool, u: Tensor | None = None) -> Tensor:
    """sse_N of the definition, by autograd; ``u`` replaces the value of the encoder's input, not its gradient."""
    W_enc, b_enc, W_dec, b_dec = parameters
    x = n - b_dec if pre_bias else n
    if u is not None:
        x = x + (u - x).detach()
    top = torch.topk(x @ W_enc.t() + b_enc, k, dim=1)
    z = torch.zeros(len(n), len(W_enc), dtype=n.dtype, device=n.device).scatter(1, top.indices, top.values.relu())
    return (z @ W_dec + b_dec - n).square().sum(1)


def spread(sse: Tensor) -> Tensor:
    """A loss with another upstream gradient for each token."""
    return (sse * torch.linspace(0.5, 2.0, max(len(sse), 1), device=sse.device)[: len(sse)].to(sse.dtype)).sum()


def compare(n: Tensor, parameters: list[Tensor], k: int, pre_bias: bool, limit: float, of: Callable = spread) -> None:  # type: ignore[type-arg]
    copies = ops_fused.ComputeCopies.of(*parameters[:3], dtype=torch.float32)
    got = ops_fused.topk_loss(n, *parameters, k, pre_bias=pre_bias, copies=copies, exact=True)
    doubles = [p.detach().double().requires_grad_() for p in parameters]
    want = dense(n.double(), doubles, k, pre_bias)
    assert got.sse_N.dtype == torch.float32
    pairs = [("sse", got.sse_N.detach(), want.detach())]
    found = torch.autograd.grad(of(got.sse_N), parameters)
    pairs += zip(NAMES, found, torch.autograd.grad(of(want), doubles), strict=True)
    for name, a, b in pairs:
        assert a.shape == b.shape and bool(torch.isfinite(a).all()), name
        error = float((a.double() - b).abs().max()) / max(float(b.abs().max()), 1e-12) if b.numel() else 0.0
        assert error <= limit, f"{name} is off by {error:.2g}, at most {limit:g}"


SHAPES = {  # N, K, F, D
    "odd": (5, 3, 37, 20), "one": (4, 1, 20, 48), "all": (3, 24, 24, 16), "one token": (1, 12, 160, 100),
    "wide": (2, 4, 40, 576), "no token": (0, 3, 20, 8),
}  # fmt: skip


@pytest.mark.parametrize("pre_bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_loss_and_gradients_equal_dense_float64(
    shape: tuple[int, int, int, int], pre_bias: bool, nan_filled: None
) -> None:
    n, k, f, d = shape
    compare(batch(n, d), leaves(f, d), k, pre_bias, 1e-5)


def test_fewer_than_k_positives_and_none() -> None:
    compare(batch(5, 16), leaves(24, 16, shift=-6.0), 12, True, 1e-5)
    p = leaves(24, 16, shift=-1000.0)
    parts = ops_fused.topk_loss(batch(4, 16), *p, 5)
    assert float(parts.latents.values_NK.max()) == 0.0
    gradients = torch.autograd.grad(parts.sse_N.sum(), p)
    assert [float(g.abs().max()) for g in gradients[:3]] == [0.0] * 3, "an empty slot has no gradient"
    assert float(gradients[3].abs().max()) > 0


def test_one_hot_latent_and_any_function_of_the_error(monkeypatch: pytest.MonkeyPatch) -> None:
    from sae_kernels import launch

    monkeypatch.setattr(launch, "CHUNK", 4)
    p = leaves(30, 16)
    with torch.no_grad():
        p[1][7] = 50.0  # fires on every token
    compare(batch(13, 16), p, 4, True, 1e-5, of=lambda sse: sse.sqrt().mean())
    compare(batch(13, 16), p, 4, True, 1e-5, of=lambda sse: sse.sum() / 3)  # the upstream gradient is expanded


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_copies_of_16_bits_give_errors_of_16_bits(kind: torch.dtype) -> None:
    n, p, k = batch(6, 48), leaves(64, 48), 5
    copies = ops_fused.ComputeCopies.of(*p[:3], dtype=kind)
    got = ops_fused.topk_loss(n, *p, k, copies=copies)
    assert got.r_ND.dtype == got.u_ND.dtype == kind
    rounded = [t.detach().to(kind).double() if t.dim() == 2 else t.detach().double() for t in p]
    doubles = [t.requires_grad_() for t in rounded]
    want = dense(n.double(), doubles, k, True, got.u_ND.double())
    assert torch.allclose(got.sse_N.double(), want, rtol=1e-3)
    for name, a, b in zip(
        NAMES, torch.autograd.grad(spread(got.sse_N), p), torch.autograd.grad(spread(want), doubles), strict=True
    ):
        assert a.dtype == torch.float32
        assert float((a.double() - b).abs().max()) <= 2e-2 * float(b.abs().max()), name


def test_what_is_not_finite_reaches_the_loss() -> None:
    n, p = batch(3, 16), leaves(24, 16)
    n[1, 2] = float("nan")
    sse = ops_fused.topk_loss(n, *p, 4).sse_N
    assert torch.isfinite(sse).tolist() == [True, False, True]


def test_copies_follow_the_weights_only_when_they_are_refreshed() -> None:
    n, p = batch(3, 16), leaves(24, 16)
    copies = ops_fused.ComputeCopies.of(*p[:3])
    first = ops_fused.topk_loss(n, *p, 4, copies=copies).sse_N
    with torch.no_grad():
        p[0].mul_(2.0)
        p[2].mul_(0.5)
    assert torch.equal(ops_fused.topk_loss(n, *p, 4, copies=copies).sse_N, first)
    copies.refresh(*p[:3])
    fresh = ops_fused.topk_loss(n, *p, 4).sse_N
    assert torch.equal(ops_fused.topk_loss(n, *p, 4, copies=copies).sse_N, fresh) and not torch.equal(fresh, first)


def test_unsupported_operands_are_named() -> None:
    n, p = batch(3, 16), leaves(24, 16)
    with pytest.raises(ValueError, match="no gradient of its input"):
        ops_fused.topk_loss(n.requires_grad_(), *p, 4)
    n = n.detach()
    with pytest.raises(TypeError, match="float64"):
        ops_fused.topk_loss(n.double(), *p, 4)
    with pytest.raises(ValueError, match=r"\(3, 15\)"):
        ops_fused.topk_loss(n[:, :15], *p, 4)
    with pytest.raises(ValueError, match=r"1\.\.24"):
        ops_fused.topk_loss(n, *p, 25)


def test_the_cpu_keeps_its_own_path(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not ops_fused.usable(torch.zeros(2, 3), torch.zeros(4, 3))
    W = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    assert ops_fused.unit_rows_(W).tolist() == [[pytest.approx(0.6), pytest.approx(0.8)], [0.0, 0.0]]


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs CUDA")
def test_real_size_and_twenty_equal_runs() -> None:
    """The interpreter runs one program after another and cannot show a race."""
    n, p = batch(4_096, 768), leaves(16_384, 768, seed=3)
    with torch.no_grad():
        p[0].mul_(768**-0.5)
        p[2].mul_(768**-0.5)
        # Tokens whose 32nd and 33rd latent are closer than float32 can tell would not agree with float64.
        h = (n.double() - p[3].double()) @ p[0].double().t() + p[1].double()
        top = torch.topk(h, 33, dim=1).values
        n = n[top[:, 31] - top[:, 32] > 1e-4].contiguous()
    assert len(n) > 3_500
    compare(n, p, 32, True, 1e-5)
    copies = ops_fused.ComputeCopies.of(*p[:3])

    def run() -> list[Tensor]:
        parts = ops_fused.topk_loss(n, *p, 32, copies=copies)
        return [parts.sse_N.detach(), *torch.autograd.grad(parts.sse_N.mean(), p)]

    first = run()
    assert all(map(lambda t: bool(torch.isfinite(t).all()), first))
    for _ in range(20):
        assert all(map(torch.equal, run(), first))
