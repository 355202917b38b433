"""The sparse decode of sae_kernels against dense float64; on a CPU under Triton's interpreter (tests/conftest.py)."""

import os

import pytest
import torch
from no_driver import run_without_driver
from torch import Tensor

from sae import ops

pytest.importorskip("triton")
launch = pytest.importorskip("sae_kernels.launch")

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
pytestmark = pytest.mark.skipif(
    not CUDA and os.environ.get("TRITON_INTERPRET") != "1", reason="needs CUDA or Triton's interpreter"
)
LIMIT = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}
SHAPES = {  # N, K, F, D
    "odd": (3, 5, 17, 23), "one slot": (4, 1, 9, 33), "all slots": (3, 7, 7, 16), "one channel": (2, 3, 5, 1),
    "one token": (1, 4, 8, 48), "power of two": (4, 8, 16, 32), "two channel blocks": (2, 3, 6, 1_040),
    "more than 512 slots": (2, 520, 40, 6),
}  # fmt: skip


def operands(n: int, k: int, f: int, d: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Values of which a third are empty slots, indices with repetitions, W; rounded to ``dtype``."""
    g = torch.Generator().manual_seed(n * 1_000 + k * 100 + f + d)
    values = torch.rand(n, k, generator=g) * (torch.rand(n, k, generator=g) > 0.33)
    indices = torch.randint(f, (n, k), generator=g)
    return values.to(dtype).to(DEVICE), indices.to(DEVICE), torch.randn(f, d, generator=g).to(dtype).to(DEVICE)


def dense(values: Tensor, indices: Tensor, W: Tensor, upstream: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(y, dvalues, dW) by plain autograd in float64, through an N x F matrix."""
    v, w = values.double().requires_grad_(), W.double().requires_grad_()
    z = v.new_zeros(len(v), len(w)).scatter_add(1, indices.long(), v)
    y = z @ w
    return y.detach(), *torch.autograd.grad(y, (v, w), upstream.double())


def by_triton(values: Tensor, indices: Tensor, W: Tensor, upstream: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    v, w = values.clone().requires_grad_(), W.clone().requires_grad_()
    y = ops.sparse_decode(v, indices, w, impl="triton")
    return y.detach(), *torch.autograd.grad(y, (v, w), upstream)


def assert_near(got: tuple[Tensor, ...], want: tuple[Tensor, ...], limit: float) -> None:
    for name, a, b in zip(("y", "dvalues", "dW"), got, want, strict=True):
        assert a.shape == b.shape and bool(torch.isfinite(a).all()), name
        error = float((a.double() - b).abs().max()) / max(float(b.abs().max()), 1e-12)
        assert error <= limit, f"{name} is off by {error:.2g}, at most {limit:g}"


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_values_and_gradients_equal_dense_float64(shape: tuple[int, ...], nan_filled: None) -> None:
    values, indices, W = operands(*shape)
    upstream = torch.randn(shape[0], shape[3], generator=torch.Generator().manual_seed(1)).to(DEVICE)
    assert_near(by_triton(values, indices, W, upstream), dense(values, indices, W, upstream), LIMIT[torch.float32])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_sum_in_float32(dtype: torch.dtype, nan_filled: None) -> None:
    values, indices, W = operands(3, 6, 11, 24, dtype)
    upstream = torch.randn(3, 24, generator=torch.Generator().manual_seed(1)).to(dtype).to(DEVICE)
    got = by_triton(values, indices, W, upstream)
    assert all(t.dtype == dtype for t in got)
    assert_near(got, dense(values, indices, W, upstream), LIMIT[dtype])
    # 256 + 300 * 1: in bfloat16 each addition of 1 would be rounded away.
    many = torch.ones(1, 301, dtype=torch.bfloat16, device=DEVICE)
    rows = torch.tensor([[256.0], [1.0]], dtype=torch.bfloat16, device=DEVICE)
    picked = torch.ones(1, 301, dtype=torch.int64, device=DEVICE)
    picked[0, 0] = 0
    assert float(ops.sparse_decode(many, picked, rows, impl="triton")) == 556.0


def test_torch_and_triton_agree_and_int32_indices_give_the_same_bits() -> None:
    values, indices, W = operands(4, 6, 13, 20)
    got = ops.sparse_decode(values, indices, W, impl="triton")
    assert torch.allclose(got, ops.sparse_decode(values, indices, W, impl="torch"), atol=1e-6)
    assert torch.equal(got, ops.sparse_decode(values, indices.int(), W, impl="triton"))
    assert torch.equal(got, ops.sparse_decode(values, indices, W, impl="triton"))


def test_a_latent_of_several_chunks(nan_filled: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "CHUNK", 8)  # latent 2 fires 25 times: four chunks; the others at most once
    indices = torch.full((5, 5), 2, device=DEVICE)
    indices[0, 0], indices[3, 1] = 0, 4
    values = torch.rand(5, 5, generator=torch.Generator().manual_seed(0)).to(DEVICE) + 0.1
    W = torch.randn(6, 19, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    upstream = torch.randn(5, 19, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    got = by_triton(values, indices, W, upstream)
    assert_near(got, dense(values, indices, W, upstream), 1e-5)
    assert float(got[2][[1, 3, 5]].abs().max()) == 0.0, "latents without entries get zeros, not what lay in memory"


def test_empty_slots_add_nothing_and_get_the_gradient_of_their_latent(nan_filled: None) -> None:
    W = torch.tensor([[1.0, 2.0], [3.0, -1.0], [float("inf"), 0.0]], device=DEVICE)
    values = torch.tensor([[2.0, 0.0], [0.0, 0.0]], device=DEVICE)
    indices = torch.tensor([[0, 1], [2, 99]], device=DEVICE)  # an empty slot may name anything
    v = values.requires_grad_()
    y = ops.sparse_decode(v, indices, W, impl="triton")
    assert y.tolist() == [[2.0, 4.0], [0.0, 0.0]]
    y[0].sum().backward()
    assert v.grad is not None and v.grad[0].tolist() == [3.0, 2.0]
    assert float(v.grad[1, 1]) == 0.0


def test_an_index_without_a_row_is_seen_and_not_read() -> None:
    W = torch.ones(3, 4, device=DEVICE)
    values = torch.ones(3, 1, device=DEVICE)
    y = ops.sparse_decode(values, torch.tensor([[1], [3], [-1]], device=DEVICE), W, impl="triton")
    assert y[0].tolist() == [1.0] * 4
    assert bool(torch.isnan(y[1:]).all())


@pytest.mark.parametrize(("n", "k"), [(0, 4), (3, 0), (0, 0)])
def test_nothing_to_sum(n: int, k: int, nan_filled: None) -> None:
    values, indices, W = operands(n, k, 5, 6)
    y, dvalues, dW = by_triton(values, indices, W, torch.ones(n, 6, device=DEVICE))
    assert y.tolist() == [[0.0] * 6] * n
    assert dvalues.shape == (n, k) and dW.tolist() == [[0.0] * 6] * 5


def test_only_the_gradients_that_are_wanted() -> None:
    values, indices, W = operands(2, 3, 5, 6)
    v = values.clone().requires_grad_()
    ops.sparse_decode(v, indices, W, impl="triton").sum().backward()  # upstream is an expanded scalar: not contiguous
    assert v.grad is not None and torch.allclose(v.grad, W.sum(1)[indices], atol=1e-5)
    w = W.clone().requires_grad_()
    ops.sparse_decode(values, indices, w, impl="triton").sum().backward()
    assert w.grad is not None and bool(torch.isfinite(w.grad).all())


def test_unsupported_operands_are_named() -> None:
    values, indices, W = operands(2, 3, 5, 6)

    def decode(v: Tensor, i: Tensor, w: Tensor) -> Tensor:
        return ops.sparse_decode(v, i, w, impl="triton")

    with pytest.raises(TypeError, match="float64"):
        decode(values.double(), indices, W.double())
    with pytest.raises(TypeError, match="bfloat16"):
        decode(values.bfloat16(), indices, W)
    with pytest.raises(TypeError, match="int32 or int64"):
        decode(values, indices.float(), W)
    with pytest.raises(ValueError, match="contiguous"):
        decode(values, indices, W.t().contiguous().t())
    with pytest.raises(ValueError, match="16384"):
        decode(values, indices, torch.zeros(5, 20_000, device=DEVICE))
    with pytest.raises(ValueError, match=r"\(2, 3\)"):
        decode(values, indices[:1], W)
    assert torch.equal(decode(values.t().contiguous().t(), indices, W), decode(values, indices, W))


def test_auto_takes_torch_on_the_cpu() -> None:
    values, indices, W = (t.cpu() for t in operands(4, 6, 13, 20))
    assert torch.equal(ops.sparse_decode(values, indices, W), ops.sparse_decode(values, indices, W, impl="torch"))


def test_without_a_driver_triton_is_refused_not_replaced() -> None:
    run_without_driver(
        "import torch; from sae import ops\n"
        "try: ops.sparse_decode(torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 4), 'triton')\n"
        "except ValueError as error: assert 'cpu' in str(error), error\n"
        "else: raise SystemExit('no error')\n"
    )


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs CUDA")
def test_twenty_runs_give_the_same_bits() -> None:
    """The interpreter runs one program after another and cannot show a race."""
    values, indices, W = operands(4_096, 32, 512, 576)
    upstream = torch.randn(4_096, 576, device=DEVICE)
    first = by_triton(values, indices, W, upstream)
    assert_near(first, dense(values, indices, W, upstream), 1e-5)
    for _ in range(20):
        assert all(map(torch.equal, by_triton(values, indices, W, upstream), first))


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs CUDA")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_torch_path_has_all_gradients_on_a_gpu(dtype: torch.dtype) -> None:
    values, indices, W = (t.to(dtype) if t.is_floating_point() else t for t in operands(512, 8, 256, 96))
    upstream = torch.randn(512, 96, device=DEVICE).to(dtype)
    v, w = values.clone().requires_grad_(), W.clone().requires_grad_()
    y = ops.sparse_decode(v, indices, w, impl="torch")
    found = (y.detach(), *torch.autograd.grad(y, (v, w), upstream))
    assert_near(found, dense(values, indices, W, upstream), 1e-5 if dtype == torch.float32 else 2e-2)
