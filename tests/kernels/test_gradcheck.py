"""Every differentiable operation against numerical differences (gradcheck): the definitions in float64, the kernels in
float32. All are polynomials of degree two or less in each tensor while the selection stays, so that central differences
are exact for any step: a wide one keeps float32's rounding small."""

import os
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sae import ops, ops_above, ops_fused

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
RUNS = CUDA or os.environ.get("TRITON_INTERPRET") == "1"
N, K, F, D = 2, 2, 5, 3
STEP = 1e-2
pytestmark = pytest.mark.filterwarnings("ignore:Input #.*double precision:UserWarning")
both = pytest.mark.parametrize(
    "impl", ["torch", pytest.param("triton", marks=pytest.mark.skipif(not RUNS, reason="needs CUDA or interpreter"))]
)


def made(impl: str, *shape: int, seed: int) -> Tensor:
    """float64 for the definition, float32 for the kernel; differentiable."""
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    if impl == "triton":
        values = values.float().to(DEVICE)
    return values.requires_grad_()


def check(impl: str, call: Callable[..., Tensor], *inputs: Tensor, fast: bool = False) -> None:
    """``fast``: a random direction of all inputs at once, where the interpreter takes seconds for every number."""
    exact = {"eps": 1e-6, "atol": 1e-7, "rtol": 1e-5} if impl == "torch" else {"eps": STEP, "atol": 2e-3, "rtol": 2e-3}
    fast = fast and impl == "triton"
    # Equal inputs give equal bits: no tolerance between runs.
    assert torch.autograd.gradcheck(call, inputs, nondet_tol=0.0, fast_mode=fast, **exact)
    if impl == "triton":
        return
    # The check itself: gradients that are off by a hundredth do not pass.
    wrong = [t.detach().requires_grad_() for t in inputs]

    def bent(*tensors: Tensor) -> Tensor:
        y = call(*tensors)
        return y * 1.01 - (y * 0.01).detach()

    assert not torch.autograd.gradcheck(bent, wrong, nondet_tol=0.0, raise_exception=False, **exact)


INDICES = [[0, 3], [3, 3]]
"""A latent twice in a token, one in every token, some in none."""


@both
def test_sparse_decode(impl: str) -> None:
    indices = torch.tensor(INDICES, device=DEVICE if impl == "triton" else "cpu")
    values, W = made(impl, N, K, seed=0), made(impl, F, D, seed=1)
    check(impl, lambda v, w: ops.sparse_decode(v, indices, w, impl), values, W)  # type: ignore[arg-type]


@both
def test_decode_entries(impl: str) -> None:
    device = DEVICE if impl == "triton" else "cpu"
    indices, offsets = torch.tensor([0, 3, 3, 1], device=device), torch.tensor([0, 3, 3, 4], device=device)
    values, W = made(impl, 4, seed=0), made(impl, F, D, seed=1)
    check(impl, lambda v, w: ops.decode_entries(ops.Entries(v, indices, offsets), w, impl), values, W)  # type: ignore


def encoder(impl: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """n, b_pre, W_enc, b_enc whose selection of K, or of what lies above 0.1, no step can change."""
    n, b_pre, W, b = (made(impl, *shape, seed=seed) for seed, shape in enumerate(((N, D), (D,), (F, D), (F,)), 86))
    h = ((n - b_pre) @ W.T + b).detach()
    ordered = h.sort(dim=1, descending=True).values
    room = 4 * STEP * float(max((n - b_pre).detach().abs().max(), W.detach().abs().max()))
    assert float((ordered[:, K - 1] - ordered[:, K]).min()) > room and float((h - 0.1).abs().min()) > room
    assert float(ordered[0, K - 1]) > room and float(ordered[1, K - 1]) < -room, "one token has fewer than K positives"
    return n, b_pre, W, b


@both
def test_encode_topk(impl: str) -> None:
    def encode(n: Tensor, p: Tensor, W: Tensor, b: Tensor) -> Tensor:
        return ops.encode_topk(n, p, W, b, K, impl).values_NK.sort(1).values  # type: ignore[arg-type]

    check(impl, encode, *encoder(impl), fast=True)


@both
def test_encode_threshold(impl: str) -> None:
    inputs = encoder(impl)
    assert 0 < len(ops.encode_threshold(*inputs, 0.1, impl).values_E) < N * F  # type: ignore[arg-type]

    def encode(n: Tensor, p: Tensor, W: Tensor, b: Tensor) -> Tensor:
        return ops.encode_threshold(n, p, W, b, 0.1, impl).values_E  # type: ignore[arg-type]

    check(impl, encode, *inputs, fast=True)


def test_encode_dense() -> None:
    check("torch", ops.encode_dense, *encoder("torch"))


def test_batchtopk() -> None:
    inputs = encoder("torch")
    check("torch", lambda n, p, W, b: ops_above.encode_batchtopk(n, p, W, b, K).entries.values_E, *inputs)


@pytest.mark.skipif(not RUNS, reason="needs CUDA or interpreter")
@pytest.mark.parametrize("pre_bias", [True, False])
def test_topk_loss(pre_bias: bool) -> None:
    n, b_pre, W, b = encoder("triton")
    n = n.detach() - (0.0 if pre_bias else b_pre.detach())

    def loss(W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, b_dec: Tensor) -> Tensor:
        copies = ops_fused.ComputeCopies.of(W_enc, b_enc, W_dec, dtype=torch.float32)
        return ops_fused.topk_loss(n, W_enc, b_enc, W_dec, b_dec, K, pre_bias=pre_bias, copies=copies, exact=True).sse_N

    check("triton", loss, W, b, made("triton", F, D, seed=9), b_pre, fast=True)
