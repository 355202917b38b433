"""decode_error against dense float64; on a CPU under Triton's interpreter (tests/conftest.py)."""

import os

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
pytest.importorskip("sae_kernels.launch")
from sae_kernels import mse  # noqa: E402

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
pytestmark = pytest.mark.skipif(
    not CUDA and os.environ.get("TRITON_INTERPRET") != "1", reason="needs CUDA or Triton's interpreter"
)
LIMIT = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}
Operands = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
SHAPES = {  # N, K, F, D
    "odd": (3, 5, 17, 23), "one slot": (4, 1, 9, 48), "all slots": (3, 7, 7, 100), "one channel": (2, 3, 5, 1),
    "one token": (1, 12, 8, 576), "more than 512 slots": (2, 520, 40, 6),
}  # fmt: skip


def operands(n: int, k: int, f: int, d: int, dtype: torch.dtype = torch.float32) -> Operands:
    """Values of which a third are empty slots, indices with repetitions, W in ``dtype``, bias, target; else float32."""
    g = torch.Generator().manual_seed(n * 1_000 + k * 100 + f + d)
    values = torch.rand(n, k, generator=g) * (torch.rand(n, k, generator=g) > 0.33)
    indices = torch.randint(f, (n, k), generator=g, dtype=torch.int32)
    W, b, t = torch.randn(f, d, generator=g).to(dtype), torch.randn(d, generator=g), torch.randn(n, d, generator=g)
    return tuple(x.to(DEVICE) for x in (values, indices, W, b, t))  # type: ignore[return-value]


def dense(values: Tensor, indices: Tensor, W: Tensor, b: Tensor, t: Tensor) -> mse.DecodeError:
    rows_NKD = W.double()[indices.long()]
    r = (values.double()[:, :, None] * rows_NKD).sum(1) + b.double() - t.double()
    dot = (rows_NKD * r[:, None, :]).sum(2) * (values != 0)
    return mse.DecodeError(r.square().sum(1), r, dot)


def assert_near(got: mse.DecodeError, want: mse.DecodeError, limits: tuple[float, float, float]) -> None:
    for name, a, b, limit in zip(got._fields, got, want, limits, strict=True):
        assert a.shape == b.shape and bool(torch.isfinite(a).all()), name
        error = float((a.double() - b).abs().max()) / max(float(b.abs().max()), 1e-12)
        assert error <= limit, f"{name} is off by {error:.2g}, at most {limit:g}"


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_equals_dense_float64(shape: tuple[int, int, int, int], nan_filled: None) -> None:
    made = operands(*shape)
    got = mse.decode_error(*made)
    assert got.sse_N.dtype == got.dot_NK.dtype == torch.float32
    assert_near(got, dense(*made), (1e-5, 1e-5, 1e-5))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_rows_sum_in_float32_and_only_the_stored_residual_is_rounded(dtype: torch.dtype, nan_filled: None) -> None:
    made = operands(4, 6, 11, 24, dtype)
    got = mse.decode_error(*made)
    assert got.r_ND.dtype == dtype
    assert_near(got, dense(*made), (1e-5, LIMIT[dtype], 1e-5))
    exact = mse.decode_error(*made, r_dtype=torch.float32)
    assert exact.r_ND.dtype == torch.float32
    assert_near(exact, dense(*made), (1e-5, 1e-5, 1e-5))


def test_a_row_of_several_slices(nan_filled: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mse, "SLICE", 16)
    made = operands(3, 5, 7, 41)
    assert mse.blocks(41).programs == 3
    assert_near(mse.decode_error(*made), dense(*made), (1e-5, 1e-5, 1e-5))


def test_empty_slots_and_no_slots(nan_filled: None) -> None:
    values, indices, W, b, t = operands(3, 4, 5, 8)
    values.zero_()
    indices[0] = 99  # an empty slot may name anything
    got = mse.decode_error(values, indices, W, b, t)
    assert_near(got, dense(values, indices.clamp_max(4), W, b, t), (1e-5,) * 3)
    assert float(got.dot_NK.abs().max()) == 0.0
    none = mse.decode_error(values[:, :0], indices[:, :0], W, b, t)
    assert none.dot_NK.shape == (3, 0) and torch.equal(none.r_ND, got.r_ND)


def test_no_token(nan_filled: None) -> None:
    got = mse.decode_error(*operands(0, 4, 5, 8))
    assert got.sse_N.shape == (0,) and got.r_ND.shape == (0, 8) and got.dot_NK.shape == (0, 4)


def test_what_is_not_finite_reaches_the_error_and_no_other_token() -> None:
    values, indices, W, b, t = operands(5, 3, 6, 8)
    values += 0.1
    clean = mse.decode_error(values, indices, W, b, t)
    values[1, 0], t[2, 3], indices[3, 1], indices[4, 1] = float("nan"), float("inf"), 6, -1
    got = mse.decode_error(values, indices, W, b, t)
    assert torch.equal(got.sse_N[:1], clean.sse_N[:1]) and torch.equal(got.dot_NK[:1], clean.dot_NK[:1])
    assert not bool(torch.isfinite(got.sse_N[1:]).any())


def test_equal_bits_for_int64_indices_and_again() -> None:
    values, indices, W, b, t = operands(4, 6, 13, 20)
    first = mse.decode_error(values, indices, W, b, t)
    assert all(map(torch.equal, mse.decode_error(values, indices.long(), W, b, t), first))
    assert all(map(torch.equal, mse.decode_error(values, indices, W, b, t), first))


def test_unsupported_operands_are_named() -> None:
    values, indices, W, b, t = operands(4, 3, 5, 6)
    with pytest.raises(TypeError, match="float64"):
        mse.decode_error(values, indices, W, b, t.double())
    with pytest.raises(TypeError, match="float64"):
        mse.decode_error(values.double(), indices, W, b, t)
    with pytest.raises(TypeError, match="int32 or int64"):
        mse.decode_error(values, indices.short(), W, b, t)
    with pytest.raises(ValueError, match=r"t \(3, 6\)"):
        mse.decode_error(values, indices, W, b, t[:3])
    with pytest.raises(ValueError, match=r"b \(5,\)"):
        mse.decode_error(values, indices, W, b[:5], t)
    with pytest.raises(ValueError, match="contiguous"):
        mse.decode_error(values, indices, W, b, t.t().contiguous().t())
    with pytest.raises(ValueError, match="16384"):
        mse.decode_error(values, indices, torch.zeros(5, 20_000, device=DEVICE), b, t)


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs CUDA")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("d", [576, 768, 2_304, 4_096, 6_000])
def test_real_sizes_and_twenty_equal_runs(d: int, dtype: torch.dtype) -> None:
    """The interpreter runs one program after another and cannot show a race."""
    made = operands(2_048, 32, 16_384, d, dtype)
    first = mse.decode_error(*made)
    assert_near(first, dense(*made), (1e-5, LIMIT[dtype], 1e-5))
    for _ in range(20):
        assert all(map(torch.equal, mse.decode_error(*made), first))
