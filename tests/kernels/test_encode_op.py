"""sae.ops.encode_topk through the Triton kernels: values and every gradient against plain dense autograd."""

import os

import pytest
import torch
from no_driver import run_without_driver
from torch import Tensor

from sae import ops

pytest.importorskip("triton")
te = pytest.importorskip("sae_kernels.topk_encode")

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
pytestmark = pytest.mark.skipif(
    not CUDA and os.environ.get("TRITON_INTERPRET") != "1", reason="needs CUDA or Triton's interpreter"
)


def leaves(n: int, d: int, f: int, dtype: torch.dtype = torch.float32, shift: float = 0.0) -> list[Tensor]:
    """n_ND, b_pre_D, W_enc_FD, b_enc_F."""
    g = torch.Generator().manual_seed(n + d + f)
    made = [torch.randn(n, d, generator=g), torch.randn(d, generator=g) * 0.3,
            torch.randn(f, d, generator=g) / d**0.5, torch.randn(f, generator=g) * 0.1 + shift]  # fmt: skip
    return [t.to(dtype).to(DEVICE).requires_grad_() for t in made]


def dense(parameters: list[Tensor], k: int, upstream: Tensor) -> tuple[Tensor, ...]:
    """z_NF and the gradients of (n, b_pre, W_enc, b_enc), by autograd in float64."""
    wide = [t.detach().double().requires_grad_() for t in parameters]
    n, b_pre, W, b = wide
    h = (n - b_pre) @ W.T + b
    kept = torch.sort(h.detach(), dim=1, descending=True, stable=True).indices[:, :k]
    z = (h * torch.zeros_like(h).scatter_(1, kept, 1.0)).relu()
    return z.detach(), *torch.autograd.grad((z * upstream.double()).sum(), wide)


def by_triton(parameters: list[Tensor], k: int, upstream: Tensor, **options: object) -> tuple[Tensor, ...]:
    found = ops.encode_topk(*parameters, k, impl="triton", **options)
    z = ops.to_dense(found, len(parameters[2]))
    return z.detach(), *torch.autograd.grad((z * upstream).sum(), parameters)


@pytest.mark.parametrize(("n", "d", "f", "k", "shift"), [
    (5, 20, 300, 3, 0.0), (1, 7, 130, 1, 0.0), (4, 9, 12, 12, 0.0), (6, 16, 256, 2, -1.2), (3, 16, 256, 2, -50.0),
], ids=["generic", "one slot", "all slots, by torch.topk", "fewer than K positive", "none positive"])  # fmt: skip
def test_values_and_gradients_equal_dense_float64(n: int, d: int, f: int, k: int, shift: float) -> None:
    parameters = leaves(n, d, f, shift=shift)
    upstream = torch.randn(n, f, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    got, want = by_triton(parameters, k, upstream), dense(parameters, k, upstream)
    if shift == 0.0:
        assert all(float(w.abs().max()) > 0 for w in want), "every parameter has a gradient to compare"
    for name, a, b in zip(("z", "dn", "db_pre", "dW_enc", "db_enc"), got, want, strict=True):
        assert a.shape == b.shape
        assert float((a.double() - b).abs().max()) <= 1e-5 * max(1.0, float(b.abs().max())), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_sum_in_float32(dtype: torch.dtype) -> None:
    parameters = leaves(4, 24, 200, dtype)
    upstream = torch.randn(4, 200, generator=torch.Generator().manual_seed(1)).to(dtype).to(DEVICE)
    n, b_pre, W, b = parameters
    got = by_triton(parameters, 5, upstream)
    # The reference takes the u that was rounded to 16 bits: it decides which latents are selected.
    want = dense([(n - b_pre).detach(), torch.zeros_like(b_pre), W, b], 5, upstream)
    assert all(t.dtype == dtype for t in got)
    for name, a, w in zip(("z", "dn", "db_pre", "dW_enc", "db_enc"), got, want, strict=True):
        assert float((a.double() - w).abs().max()) <= 2e-2 * max(1.0, float(w.abs().max())), name


def test_a_copy_in_bfloat16_is_used_where_it_is_given() -> None:
    n, b_pre, W, b = leaves(4, 32, 300)
    prepared = te.prepare(W.detach(), b.detach(), dtype=torch.bfloat16)
    with torch.no_grad():
        found = ops.encode_topk(n, b_pre, W, b, 3, impl="triton", prepared=prepared)
        rounded = ops.encode_topk((n - b_pre).bfloat16().float(), None, W.bfloat16().float(), b, 3, impl="torch")
        plain = ops.encode_topk(n, b_pre, W, b, 3, impl="torch")
    assert found.values_NK.dtype == torch.float32 and found.indices_NK.dtype == torch.int64
    z, want = ops.to_dense(found, 300), ops.to_dense(rounded, 300)
    assert torch.allclose(z, want, atol=1e-5) and not torch.allclose(z, ops.to_dense(plain, 300), atol=1e-4)
    with pytest.raises(ValueError, match="300, 32"):
        ops.encode_topk(n, b_pre, W[:9], b[:9], 3, impl="triton", prepared=prepared)


def test_torch_and_triton_give_the_same_code_and_repeat_bit_for_bit() -> None:
    parameters = [t.detach() for t in leaves(6, 24, 512)]
    by_torch = ops.to_dense(ops.encode_topk(*parameters, 4, impl="torch"), 512)
    first = ops.encode_topk(*parameters, 4, impl="triton")
    assert torch.allclose(ops.to_dense(first, 512), by_torch, atol=2e-6)
    assert all(map(torch.equal, ops.encode_topk(*parameters, 4, impl="triton"), first))
    quick = ops.encode_topk(*parameters, 4, impl="triton", exact=False)
    assert torch.allclose(ops.to_dense(quick, 512), by_torch, rtol=3e-5, atol=2e-6)


def test_auto_takes_torch_on_the_cpu_and_triton_never_falls_back() -> None:
    parameters = [t.detach().cpu() for t in leaves(3, 8, 64)]
    assert all(map(torch.equal, ops.encode_topk(*parameters, 2), ops.encode_topk(*parameters, 2, impl="torch")))
    with pytest.raises(TypeError, match="float64"):
        ops.encode_topk(*(t.double() for t in parameters), 2, impl="triton")
    with pytest.raises(ValueError, match=r"1\.\.64"):
        ops.encode_topk(*parameters, 65, impl="triton")


def test_without_a_driver_triton_is_refused_not_replaced() -> None:
    run_without_driver(
        "import torch; from sae import ops\n"
        "n, W, b = torch.ones(2, 8), torch.ones(256, 8), torch.zeros(256)\n"
        "try: ops.encode_topk(n, None, W, b, 2, impl='triton')\n"
        "except ValueError as error: assert 'cpu' in str(error), error\n"
        "else: raise SystemExit('no error')\n"
        "assert ops.encode_topk(n, None, W, b, 2).values_NK.tolist() == [[8.0, 8.0]] * 2\n"
    )


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs CUDA")
def test_auto_takes_triton_on_the_gpu() -> None:
    parameters = leaves(2_048, 256, 8_192)
    upstream = torch.randn(2_048, 8_192, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    found = ops.encode_topk(*parameters, 16)
    assert torch.equal(found.indices_NK, ops.encode_topk(*parameters, 16, impl="triton").indices_NK)
    first = by_triton(parameters, 16, upstream)
    for a, b in zip(first, dense(parameters, 16, upstream), strict=True):
        assert float((a.double() - b).abs().max()) <= 2e-5 * max(1.0, float(b.abs().max()))
    for _ in range(20):
        assert all(map(torch.equal, by_triton(parameters, 16, upstream), first))
