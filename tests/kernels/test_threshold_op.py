"""Operations on codes of free width through the Triton kernels: values and every gradient against dense autograd."""

import os

import pytest
import torch
from no_driver import run_without_driver
from torch import Tensor

from sae import ops, ops_above, ops_gpu

pytest.importorskip("triton")
launch = pytest.importorskip("sae_kernels.launch")

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
pytestmark = pytest.mark.skipif(
    not CUDA and os.environ.get("TRITON_INTERPRET") != "1", reason="needs CUDA or Triton's interpreter"
)
NAMES = ("y", "dn", "db_pre", "dW_enc", "db_enc", "dW_dec")


def leaves(n: int, d: int, f: int, dtype: torch.dtype = torch.float32, shift: float = 0.0) -> list[Tensor]:
    """n_ND, b_pre_D, W_enc_FD, b_enc_F, W_dec_FD."""
    g = torch.Generator().manual_seed(n + d + f)
    made = [torch.randn(n, d, generator=g), torch.randn(d, generator=g) * 0.3,
            torch.randn(f, d, generator=g) / d**0.5, torch.randn(f, generator=g) * 0.1 + shift,
            torch.randn(f, d, generator=g)]  # fmt: skip
    return [t.to(dtype).to(DEVICE).requires_grad_() for t in made]


def dense(
    parameters: list[Tensor], bar: Tensor | float, upstream: Tensor, kept: Tensor | None = None
) -> tuple[Tensor, ...]:
    """y and all gradients of ``(h where h > bar, or where kept) @ W_dec`` by autograd in float64."""
    wide = [t.detach().double().requires_grad_() for t in parameters]
    n, b_pre, W, b, W_dec = wide
    h = (n - b_pre) @ W.T + b
    y = torch.where(h > bar if kept is None else kept, h, 0.0) @ W_dec
    return y.detach(), *torch.autograd.grad((y * upstream.double()).sum(), wide)


def by_triton(parameters: list[Tensor], bar: Tensor | float, upstream: Tensor) -> tuple[Tensor, ...]:
    entries = ops.encode_threshold(*parameters[:4], bar, impl="triton")
    y = ops.decode_entries(entries, parameters[4], impl="triton")
    return y.detach(), *torch.autograd.grad((y * upstream).sum(), parameters)


def assert_near(got: tuple[Tensor, ...], want: tuple[Tensor, ...], limit: float) -> None:
    for name, a, b in zip(NAMES, got, want, strict=True):
        assert a.shape == b.shape and bool(a.isfinite().all()), name
        if b.numel():
            assert float((a.double() - b).abs().max()) <= limit * max(1.0, float(b.abs().max())), name


@pytest.mark.parametrize(("n", "d", "f", "shift"), [
    (5, 20, 70, 0.0), (1, 7, 33, 0.0), (4, 16, 64, -2.5), (3, 16, 64, -50.0), (0, 8, 40, 0.0),
], ids=["generic", "one token", "empty tokens", "nothing above", "no tokens"])  # fmt: skip
def test_values_and_gradients_equal_dense_float64(n: int, d: int, f: int, shift: float) -> None:
    parameters = leaves(n, d, f, shift=shift)
    bar = torch.rand(f, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    upstream = torch.randn(n, d, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    got, want = by_triton(parameters, bar, upstream), dense(parameters, bar, upstream)
    if shift == 0.0 and n:
        assert all(float(w.abs().max()) > 0 for w in want), "every parameter has a gradient to compare"
    assert_near(got, want, 2e-5)
    assert all(map(torch.equal, by_triton(parameters, bar, upstream), got))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_sum_in_float32(dtype: torch.dtype) -> None:
    parameters = leaves(4, 24, 100, dtype)
    upstream = torch.randn(4, 24, generator=torch.Generator().manual_seed(1)).to(dtype).to(DEVICE)
    bar = 0.2
    n, b_pre, W, b, W_dec = parameters
    # The bar is crossed where rounded operands say, so the reference takes the rounded u.
    rounded = [(n - b_pre).detach(), torch.zeros_like(b_pre), W, b, W_dec]
    assert_near(by_triton(parameters, bar, upstream), dense(rounded, bar, upstream), 3e-2)


def test_torch_and_triton_give_the_same_entries() -> None:
    n, b_pre, W, b, W_dec = (t.detach() for t in leaves(6, 24, 150))
    by_torch, found = (ops.encode_relu(n, b_pre, W, b, impl) for impl in ("torch", "triton"))
    assert torch.equal(found.offsets_N1, by_torch.offsets_N1) and torch.equal(found.indices_E, by_torch.indices_E)
    assert torch.allclose(found.values_E, by_torch.values_E, atol=2e-6)
    y, want = (ops.decode_entries(found, W_dec, impl) for impl in ("triton", "torch"))
    assert torch.allclose(y, want, atol=1e-5)
    narrow = ops.encode_threshold(n, b_pre, W, b, 0.5, "triton", dtype=torch.bfloat16)
    assert narrow.values_E.dtype == torch.float32 and not torch.equal(narrow.values_E, found.values_E)


def test_a_latent_that_fires_on_every_token_and_one_that_never_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """More entries of one latent than a chunk: pieces and their sum."""
    monkeypatch.setattr(launch, "CHUNK", 8)
    parameters = leaves(30, 4, 3)
    with torch.no_grad():
        parameters[3].copy_(torch.tensor([50.0, -50.0, 0.0], device=DEVICE))
    upstream = torch.randn(30, 4, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    got = by_triton(parameters, 0.0, upstream)
    assert_near(got, dense(parameters, 0.0, upstream), 2e-5)
    assert float(got[3][1].abs().max()) == 0.0 and float(got[5][1].abs().max()) == 0.0


def test_nan_reaches_the_code_by_both_ways() -> None:
    n, b_pre, W, b, _ = (t.detach() for t in leaves(3, 8, 40))
    n[1, 2] = torch.nan
    for impl in ("torch", "triton"):
        found = ops.encode_relu(n, b_pre, W, b, impl)
        rows = found.values_E.split(found.offsets_N1.diff().tolist())
        assert len(rows[1]) == 40 and bool(rows[1].isnan().all())
        assert not bool(rows[0].isnan().any()) and not bool(rows[2].isnan().any())


@pytest.fixture
def on_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """"auto" means Triton, as on a GPU."""
    monkeypatch.setattr(ops_gpu, "takes_encoder", lambda *_: True)
    monkeypatch.setattr(ops_gpu, "takes_decode", lambda *_: True)


def code_and_gradients(kind: str, parameters: list[Tensor], upstream: Tensor) -> tuple[Tensor, ...]:
    theta_F = torch.full_like(parameters[3], 0.6, requires_grad=True)
    if kind == "batchtopk":
        entries = ops_above.encode_batchtopk(*parameters[:4], 5, bar=0.4).entries
        loss = (ops.decode_entries(entries, parameters[4]) * upstream).sum()
        return entries.values_E.detach(), *torch.autograd.grad(loss, parameters)
    code = ops_above.encode_jump(*parameters[:4], theta_F, 0.3)
    loss = (ops.decode_entries(code.entries, parameters[4]) * upstream).sum() + code.l0 * 3.0
    return code.entries.values_E.detach(), *torch.autograd.grad(loss, [*parameters, theta_F])


@pytest.mark.parametrize("kind", ["batchtopk", "jumprelu"])
def test_batchtopk_and_jumprelu_are_the_same_by_both_ways(
    kind: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    parameters = leaves(6, 16, 80)
    upstream = torch.randn(6, 16, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    on_cpu = [p.detach().cpu().requires_grad_() for p in parameters]
    want = code_and_gradients(kind, on_cpu, upstream.cpu())
    request.getfixturevalue("on_triton")
    monkeypatch.setattr(ops_above, "GPU_OPERANDS", torch.float32)  # the same numbers to compare
    found = code_and_gradients(kind, parameters, upstream)
    for a, b in zip(found, want, strict=True):
        assert a.shape == b.shape and torch.allclose(a.cpu(), b, atol=2e-5 * max(1.0, float(b.abs().max())))


def test_unsupported_operands_are_named() -> None:
    n, b_pre, W, b, W_dec = (t.detach() for t in leaves(3, 8, 40))
    with pytest.raises(TypeError, match="float64"):
        ops.encode_threshold(n.double(), None, W.double(), b.double(), 0.0, "triton")
    for impl in ("torch", "triton"):
        with pytest.raises(ValueError, match=r"\(40, 8\).*\(39,\)"):
            ops.encode_threshold(n, b_pre, W, b, torch.zeros(39, device=DEVICE), impl)
    entries = ops.encode_relu(n, b_pre, W, b, "triton")
    with pytest.raises(TypeError, match="bfloat16"):
        ops.decode_entries(entries, W_dec.bfloat16(), "triton")
    with pytest.raises(ValueError, match="contiguous"):
        ops.decode_entries(entries, W_dec.t().contiguous().t(), "triton")
    with pytest.raises(TypeError, match="offsets"):
        ops.decode_entries(entries._replace(offsets_N1=entries.offsets_N1.int()), W_dec, "triton")


def test_without_a_driver_triton_is_refused_not_replaced() -> None:
    run_without_driver(
        "import torch; from sae import ops\n"
        "n, W, b = torch.ones(2, 8), torch.ones(256, 8), torch.zeros(256)\n"
        "found = ops.encode_relu(n, None, W, b)\n"
        "for call in (lambda: ops.encode_relu(n, None, W, b, 'triton'),\n"
        "             lambda: ops.decode_entries(found, W, 'triton')):\n"
        "    try: call()\n"
        "    except ValueError as error: assert 'cpu' in str(error), error\n"
        "    else: raise SystemExit('no error')\n"
    )


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs CUDA")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_twenty_runs_at_full_size(dtype: torch.dtype) -> None:
    parameters = leaves(2_048, 256, 8_192, dtype, shift=-1.5)
    n, b_pre, W, b, W_dec = parameters
    upstream = torch.randn(2_048, 256, generator=torch.Generator().manual_seed(1)).to(dtype).to(DEVICE)
    rounded = [(n - b_pre).detach(), torch.zeros_like(b_pre), W, b, W_dec]
    first = by_triton(parameters, 0.0, upstream)
    found = ops.encode_threshold(n, b_pre, W, b, 0.0, "triton")
    tokens_E = torch.repeat_interleave(torch.arange(2_048, device=DEVICE), found.offsets_N1.diff())
    # An entry within rounding of the bar may be on either side of it; the set is tested elsewhere.
    kept = torch.zeros(2_048, 8_192, dtype=torch.bool, device=DEVICE).index_put_(
        (tokens_E, found.indices_E), torch.tensor(True, device=DEVICE)
    )
    assert_near(first, dense(rounded, 0.0, upstream, kept), 1e-4 if dtype == torch.float32 else 3e-2)
    for _ in range(20):
        assert all(map(torch.equal, by_triton(parameters, 0.0, upstream), first))
    assert torch.equal(ops.encode_relu(n, b_pre, W, b).indices_E, ops.encode_relu(n, b_pre, W, b, "triton").indices_E)
