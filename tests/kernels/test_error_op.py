"""Squared error of a sparse decode as one operation, and the passes around the optimiser, by both implementations."""

import os

import pytest
import torch
from torch import Tensor

from sae import ops_fused, optim

pytest.importorskip("triton")
pytest.importorskip("sae_kernels.mse")
CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
pytestmark = pytest.mark.skipif(
    not CUDA and os.environ.get("TRITON_INTERPRET") != "1", reason="needs CUDA or Triton's interpreter"
)
both = pytest.mark.parametrize("impl", ["torch", "triton"])
LIMIT = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}
SHAPES = {"odd": (3, 5, 17, 23), "one slot": (4, 1, 9, 33), "all slots": (3, 7, 7, 16), "one channel": (2, 3, 5, 1)}


def operands(n: int, k: int, f: int, d: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Values of which a third are empty, repeated indices, W, b, t."""
    g = torch.Generator().manual_seed(n * 100 + f + d)
    values = (torch.rand(n, k, generator=g) + 0.1) * (torch.rand(n, k, generator=g) > 0.33)
    rows = (torch.randn(*size, generator=g) for size in ((f, d), (d,), (n, d)))
    made = [values, torch.randint(f, (n, k), generator=g), *rows]
    return [t.to(DEVICE) if t.dtype == torch.int64 else t.to(dtype).to(DEVICE) for t in made]


def dense(made: list[Tensor], weights_N: Tensor) -> list[Tensor]:
    """(sse, gradients of values, W, b, t) in float64, through an N x F matrix; empty slots have no gradient."""
    v, w, b, t = (made[i].double().requires_grad_() for i in (0, 2, 3, 4))
    z = v.new_zeros(len(v), len(w)).scatter_add(1, made[1], torch.where(v != 0, v, 0.0))
    sse = (z @ w + b - t).square().sum(1)
    return [sse.detach(), *torch.autograd.grad((sse * weights_N.double()).sum(), (v, w, b, t))]


def by(impl: str, made: list[Tensor], weights_N: Tensor) -> list[Tensor]:
    v, w, b, t = (made[i].clone().requires_grad_() for i in (0, 2, 3, 4))
    sse = ops_fused.decode_error(v, made[1], w, b, t, impl)  # type: ignore[arg-type]
    return [sse.detach(), *torch.autograd.grad((sse * weights_N).sum(), (v, w, b, t))]


def assert_near(found: list[Tensor], want: list[Tensor], limit: float) -> None:
    for name, a, b in zip(("sse", "dvalues", "dW", "db", "dt"), found, want, strict=True):
        assert a.shape == b.shape, name
        largest = float(b.abs().max()) if b.numel() else 0.0
        assert torch.allclose(a.double(), b, rtol=0, atol=limit * largest), name


@both
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_error_and_gradients_equal_dense_float64(impl: str, shape: tuple[int, ...], nan_filled: None) -> None:
    made = operands(*shape)
    weights_N = torch.rand(shape[0], device=DEVICE) + 0.5  # a normalisation per token
    assert_near(by(impl, made, weights_N), dense(made, weights_N), LIMIT[torch.float32])


@both
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_sum_in_float32(impl: str, dtype: torch.dtype) -> None:
    made, weights_N = operands(3, 5, 17, 24, dtype), torch.ones(3, device=DEVICE)
    found = by(impl, made, weights_N)
    assert found[0].dtype == torch.float32 and all(t.dtype == dtype for t in found[1:])
    want = dense(made, weights_N)
    assert_near(found, want, LIMIT[dtype])
    assert_near(found[:1] * 5, want[:1] * 5, 1e-5)  # the error itself is not rounded


@both
def test_no_token_and_no_slot(impl: str) -> None:
    for n, k in ((0, 3), (2, 0)):
        made = operands(n, k, 5, 6)
        found = by(impl, made, torch.ones(n, device=DEVICE))
        if n:
            assert_near(found, dense(made, torch.ones(n, device=DEVICE)), 1e-5)
        assert found[0].shape == (n,) and found[2].tolist() == [[0.0] * 6] * 5


@both
def test_bad_operands_are_named(impl: str) -> None:
    values, indices, W, b, t = operands(3, 5, 17, 23)
    for wrong in (
        (values, indices, W, b[:5], t), (values, indices, W, b, t[:2]), (values, indices, W, b, t[:, :4]),
        (values[None], indices[None], W, b, t), (values, indices[:2], W, b, t),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r"\(17, 23\)"):
            ops_fused.decode_error(*wrong, impl)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="float16"):
        ops_fused.decode_error(values.half(), indices, W, b, t, impl)  # type: ignore[arg-type]


@both
def test_projection_and_unit_rows(impl: str) -> None:
    W = optim.normalise_rows_(torch.randn(5, 12, generator=torch.Generator().manual_seed(0))).to(DEVICE)
    grad = torch.randn(5, 12, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    want = optim.project_gradient_(grad.clone(), W)
    assert torch.allclose(ops_fused.project_gradient_(grad.clone(), W, impl), want, atol=1e-6)  # type: ignore[arg-type]
    moved = W + 0.3 * grad
    want = optim.normalise_rows_(moved.clone())
    assert torch.allclose(ops_fused.unit_rows_(moved, impl=impl), want, atol=1e-6)  # type: ignore[arg-type]


def test_triton_never_falls_back() -> None:
    W = torch.randn(5, 12, device=DEVICE)
    with pytest.raises(TypeError, match="must be float32"):
        ops_fused.project_gradient_(W.double(), W.double(), "triton")
    with pytest.raises(ValueError, match="contiguous"):
        ops_fused.unit_rows_(torch.randn(12, 5, device=DEVICE).t(), impl="triton")


def test_without_a_driver_triton_is_refused_not_replaced() -> None:
    from no_driver import run_without_driver

    run_without_driver("""
import torch
from sae import ops_fused
W = torch.eye(3)
for call in (
    lambda: ops_fused.decode_error(W, torch.zeros(3, 3, dtype=torch.int64), W, W[0], W, "triton"),
    lambda: ops_fused.project_gradient_(W.clone(), W, "triton"), lambda: ops_fused.unit_rows_(W.clone(), impl="triton"),
):
    try:
        call()
    except ValueError as error:
        assert "cpu" in str(error), error
    else:
        raise AssertionError("no error")
""")
