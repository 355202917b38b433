"""Operands that no operation takes: an exception that names shapes or types, by both implementations."""

import os
from collections.abc import Callable

import pytest
import torch

from sae import ops, ops_above, ops_checks, ops_fused

pytest.importorskip("triton")
pytest.importorskip("sae_kernels.threshold_encode")
CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
pytestmark = pytest.mark.skipif(
    not CUDA and os.environ.get("TRITON_INTERPRET") != "1", reason="needs CUDA or Triton's interpreter"
)
G = torch.Generator().manual_seed(0)
N_ND, W_FD, DEC_FD = (torch.randn(*shape, generator=G).to(DEVICE) for shape in ((3, 8), (16, 8), (16, 8)))
B_F, B_D = torch.zeros(16, device=DEVICE), torch.zeros(8, device=DEVICE)
VALUES, INDICES = torch.rand(3, 2, generator=G).to(DEVICE) + 0.1, torch.randint(16, (3, 2), generator=G).to(DEVICE)
ENTRIES = ops.Entries(VALUES.view(-1), INDICES.view(-1), torch.tensor([0, 2, 4, 6], device=DEVICE))
Encoder = Callable[..., object]
ENCODERS: dict[str, Encoder] = {
    "topk": lambda n, p, W, b, impl: ops.encode_topk(n, p, W, b, 2, impl),
    "relu": ops.encode_relu,
    "threshold": lambda n, p, W, b, impl: ops.encode_threshold(n, p, W, b, torch.zeros(len(W), device=DEVICE), impl),
    "dense": lambda n, p, W, b, _: ops.encode_dense(n, p, W, b),
    "batchtopk": lambda n, p, W, b, impl: ops_above.encode_batchtopk(n, p, W, b, 2, impl=impl),
    "jump": lambda n, p, W, b, impl: ops_above.encode_jump(n, p, W, b, torch.full_like(b, 0.3), 0.2, impl),
    "above": lambda n, p, W, b, impl: ops_above.encode_above(n, p, W, b, torch.full_like(b, 0.3), impl),
}
both = pytest.mark.parametrize("impl", ["torch", "triton"])


@both
@pytest.mark.parametrize("encode", ENCODERS.values(), ids=ENCODERS)
@pytest.mark.parametrize(("n", "p", "W", "b", "error"), [
    (N_ND[:, :7], None, W_FD, B_F, r"\(3, 7\).*\(16, 8\)"), (N_ND[None], None, W_FD, B_F, r"\(1, 3, 8\)"),
    (N_ND, None, W_FD, B_F[:9], r"\(9,\)"), (N_ND, B_D[:7], W_FD, B_F, r"\(7,\)"),
    (N_ND, None, W_FD[:0], B_F[:0], r"\(0, 8\)"), (N_ND, None, W_FD[:, 0], B_F, r"\(16,\)"),
], ids=["D", "three axes", "bias", "pre-bias", "no latents", "one axis"])  # fmt: skip
def test_shapes_of_an_encoder(
    encode: Encoder, impl: str, n: torch.Tensor, p: torch.Tensor | None, W: torch.Tensor, b: torch.Tensor, error: str
) -> None:
    with pytest.raises(ValueError, match=error):
        encode(n, p, W, b, impl)


@both
@pytest.mark.parametrize("encode", ENCODERS.values(), ids=ENCODERS)
def test_types_and_strides_of_an_encoder(encode: Encoder, impl: str) -> None:
    with pytest.raises(TypeError, match=r"\(3, 8\) torch.float16.*torch.float32"):
        encode(N_ND.half(), None, W_FD, B_F, impl)
    # Strides are no error: both implementations read what is there.
    plain = encode(N_ND, None, W_FD, B_F, impl)
    turned = encode(N_ND.t().contiguous().t(), None, W_FD.t().contiguous().t(), B_F, impl)
    for a, b in zip(flat(plain), flat(turned), strict=True):
        assert torch.allclose(a, b, atol=1e-5) if a.is_floating_point() else torch.equal(a, b)


def flat(code: object) -> list[torch.Tensor]:
    """Tensors of a code in an order that does not depend on that of slots."""
    if isinstance(code, ops.SparseLatents):
        return [ops.to_dense(code, 16)]
    if isinstance(code, ops_above.BatchCode | ops_above.JumpCode):
        return list(code.entries)
    return [code] if isinstance(code, torch.Tensor) else list(code)  # type: ignore[call-overload]


@both
@pytest.mark.parametrize("k", [0, -1, 17])
def test_k_out_of_range(impl: str, k: int) -> None:
    for call in (
        lambda: ops.encode_topk(N_ND, None, W_FD, B_F, k, impl),  # type: ignore[arg-type]
        lambda: ops_above.encode_batchtopk(N_ND, None, W_FD, B_F, k),
        lambda: ops_fused.topk_loss(N_ND, W_FD, B_F, DEC_FD, B_D, k),
    ):
        with pytest.raises(ValueError, match=rf"1\.\.16.*{k}"):
            call()


@both
@pytest.mark.parametrize("encode", ENCODERS.values(), ids=ENCODERS)
def test_no_tokens(encode: Encoder, impl: str) -> None:
    for tensor in flat(encode(N_ND[:0], B_D, W_FD, B_F, impl)):
        assert tensor.numel() == 0 or tensor.tolist() == [0]


def decoders(impl: str) -> list[Callable[..., torch.Tensor]]:
    """Functions of values [3, 2], indices and W."""
    return [
        lambda v, i, W: ops.sparse_decode(v, i, W, impl),  # type: ignore[arg-type]
        lambda v, i, W: ops.decode_entries(ops.Entries(v.view(-1), i.view(-1), ENTRIES.offsets_N1), W, impl),  # type: ignore
    ]


@both
def test_types_and_shapes_of_a_decoder(impl: str) -> None:
    for decode in decoders(impl):
        with pytest.raises(TypeError, match=r"torch.float16.*torch.float32"):
            decode(VALUES.half(), INDICES, DEC_FD)
        with pytest.raises(TypeError, match="int32 or int64"):
            decode(VALUES, INDICES.float(), DEC_FD)
        with pytest.raises(ValueError, match=r"\(0, 8\)"):
            decode(VALUES, INDICES, DEC_FD[:0])
        assert torch.equal(decode(VALUES, INDICES.int(), DEC_FD), decode(VALUES, INDICES, DEC_FD))
    with pytest.raises(ValueError, match=r"\(3, 2\).*\(1, 2\)"):
        ops.sparse_decode(VALUES, INDICES[:1], DEC_FD, impl)  # type: ignore[arg-type]


@pytest.mark.parametrize("shift", [100, -100])
def test_an_index_that_names_no_latent(shift: int) -> None:
    for decode in decoders("torch"):
        with pytest.raises(ValueError, match=r"6 of the 6 indices .* no latent of the 16"):
            decode(VALUES, INDICES + shift, DEC_FD)
    for decode in decoders("triton"):  # nothing waits for the device: NaN instead of an exception
        assert bool(decode(VALUES, INDICES + shift, DEC_FD).isnan().all())
    with pytest.raises(ValueError, match="no latent of the 16"):
        ops.to_dense(ops.SparseLatents(VALUES, INDICES + shift), 16)


@both
def test_an_empty_slot_may_name_anything(impl: str) -> None:
    values = VALUES.clone()
    values[1, 0] = 0.0
    indices = INDICES.clone()
    indices[1, 0] = 99
    for decode in decoders(impl):
        v = values.clone().requires_grad_()
        y = decode(v, indices, DEC_FD)
        want = (values[..., None] * DEC_FD[indices.clamp(max=15)]).sum(1)
        assert torch.allclose(y, want, atol=1e-6)
        (grad,) = torch.autograd.grad(y.sum(), v)
        assert float(grad[1, 0]) == 0.0 and float(grad[0].abs().min()) > 0


@both
@pytest.mark.parametrize("offsets", [[0, 2, 4, 9], [0, 4, 2, 6], [-1, 2, 4, 6]])
def test_offsets_that_reach_past_the_entries(impl: str, offsets: list[int]) -> None:
    made = ENTRIES._replace(offsets_N1=torch.tensor(offsets, device=DEVICE))
    if not CUDA:
        with pytest.raises(ValueError, match="must rise from 0 to the 6 entries"):
            ops.decode_entries(made, DEC_FD, impl)  # type: ignore[arg-type]
    if impl == "triton":  # on a GPU nothing waits for the offsets: the kernel itself sees them
        from sae_kernels.sparse_decode import decode_entries

        W = DEC_FD.clone().requires_grad_()
        y = decode_entries(*made, W)
        assert bool(y.isnan().any())
        y.sum().backward()
        assert W.grad is not None and W.grad.shape == W.shape


def test_names_of_implementations() -> None:
    for call in (
        lambda: ops.encode_topk(N_ND, None, W_FD, B_F, 2, "cuda"),  # type: ignore[arg-type]
        lambda: ops.encode_relu(N_ND, None, W_FD, B_F, "cuda"),  # type: ignore[arg-type]
        lambda: ops.sparse_decode(VALUES, INDICES, DEC_FD, "cuda"),  # type: ignore[arg-type]
        lambda: ops.decode_entries(ENTRIES, DEC_FD, "cuda"),  # type: ignore[arg-type]
        lambda: ops_above.encode_batchtopk(N_ND, None, W_FD, B_F, 2, impl="cuda"),  # type: ignore[arg-type]
        lambda: ops_above.encode_jump(N_ND, None, W_FD, B_F, B_F, 0.1, "cuda"),  # type: ignore[arg-type]
        lambda: ops_fused.decode_error(VALUES, INDICES, DEC_FD, B_D, N_ND, "cuda"),  # type: ignore[arg-type]
        lambda: ops_fused.project_gradient_(DEC_FD, DEC_FD, "cuda"),  # type: ignore[arg-type]
        lambda: ops_fused.unit_rows_(DEC_FD, impl="cuda"),  # type: ignore[arg-type]
    ):
        with pytest.raises(ValueError, match="auto, torch, triton.*'cuda'"):
            call()
    assert ops_checks.IMPLEMENTATIONS == ("auto", "torch", "triton")
