"""Sparse decode: ``y_ND = sum over k of values_NK * W_FD[indices_NK]``, forward and backward, as autograd.Function.

Shapes: N tokens, K slots per token or E entries in all, F = d_sae, D = d_in. Reads one row of W per slot where a dense
product does F / K times the arithmetic (Gao et al., arXiv 2406.04093, appendix D). The definitions are
``sae.ops.sparse_decode(impl="torch")`` and ``sae.ops.decode_entries(impl="torch")``.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from sae_kernels import launch
from sae_kernels.dual_grad import ragged_worklist, single_gradient, tokens_of
from sae_kernels.sparse_grad import entry_values_gradient, values_gradient, weights_gradient


@triton.jit
def _decode_kernel(  # type: ignore[no-untyped-def]
    values_ptr, indices_ptr, offsets_ptr, w_ptr, out_ptr, n_slots, n_latents, width,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """One program = CHANNELS channels of one token, ROWS gathered rows at a time, summed in float32."""
    token = tl.program_id(0).to(tl.int64)
    channels = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    inside = channels < width
    total = tl.zeros((CHANNELS,), dtype=tl.float32)
    begin = token * n_slots
    if RAGGED:
        # Here n_slots is E. Offsets that reach past the entries must not be followed, nor pass unnoticed: NaN.
        begin = tl.load(offsets_ptr + token)
        end = tl.load(offsets_ptr + token + 1)
        wrong = (begin < 0) | (end < begin) | (end > n_slots)
        n_slots = tl.where(wrong, 0, end - begin).to(tl.int32)
        total += tl.where(wrong, float("nan"), 0.0)
    for start in range(0, n_slots, ROWS):
        slots = start + tl.arange(0, ROWS)
        used = slots < n_slots
        values = tl.load(values_ptr + begin + slots, mask=used, other=0.0).to(tl.float32)
        latents = tl.load(indices_ptr + begin + slots, mask=used, other=0).to(tl.int64)
        valid = (latents >= 0) & (latents < n_latents)
        # An empty slot costs no load. An index that names no row must not be read, nor pass unnoticed: NaN.
        rows = tl.load(
            w_ptr + latents[:, None] * width + channels[None, :],
            mask=((values != 0.0) & valid)[:, None] & inside[None, :], other=0.0,
        ).to(tl.float32)  # fmt: skip
        values = tl.where((values != 0.0) & (valid == 0), float("nan"), values)
        total += tl.sum(rows * values[:, None], axis=0)
    tl.store(out_ptr + token * width + channels, total.to(out_ptr.dtype.element_ty), mask=inside)


def _decode(values: Tensor, indices: Tensor, offsets_N1: Tensor | None, W_FD: Tensor) -> Tensor:
    """``y_ND`` of slots [N, K], or of entries [E] with offsets."""
    width = W_FD.shape[1]
    n_tokens, n_slots = values.shape if offsets_N1 is None else (len(offsets_N1) - 1, len(values))
    out_ND = torch.empty(n_tokens, width, dtype=W_FD.dtype, device=W_FD.device)
    if n_tokens == 0:
        return out_ND
    size = launch.gather("decode", W_FD)
    with torch.cuda.device_of(W_FD):
        _decode_kernel[(n_tokens, size.programs)](
            values, indices, indices if offsets_N1 is None else offsets_N1, W_FD, out_ND, n_slots, len(W_FD), width,
            ROWS=size.rows, CHANNELS=size.channels, RAGGED=offsets_N1 is not None, num_warps=size.warps,
        )  # fmt: skip
    return out_ND


class _SparseDecode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values_NK: Tensor, indices_NK: Tensor, W_FD: Tensor) -> Tensor:
        ctx.save_for_backward(values_NK, indices_NK, W_FD)
        return _decode(values_NK, indices_NK, None, W_FD)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
        values_NK, indices_NK, W_FD = ctx.saved_tensors
        grad_ND = grad_ND.contiguous()
        grad_NK = values_gradient(grad_ND, indices_NK, W_FD) if ctx.needs_input_grad[0] else None
        grad_FD = weights_gradient(grad_ND, values_NK, indices_NK, len(W_FD)) if ctx.needs_input_grad[2] else None
        return grad_NK, None, grad_FD


class _DecodeEntries(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values_E: Tensor, indices_E: Tensor, offsets_N1: Tensor, W_FD: Tensor) -> Tensor:
        ctx.save_for_backward(values_E, indices_E, offsets_N1, W_FD)
        return _decode(values_E, indices_E, offsets_N1, W_FD)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor | None, ...]:
        values_E, indices_E, offsets_N1, W_FD = ctx.saved_tensors
        grad_ND, tokens_E = grad_ND.contiguous(), tokens_of(offsets_N1, len(values_E))
        grad_E = grad_FD = None
        if ctx.needs_input_grad[0]:
            grad_E = entry_values_gradient(grad_ND, indices_E, tokens_E, W_FD)
        if ctx.needs_input_grad[3]:
            work = ragged_worklist(indices_E, tokens_E, len(W_FD))
            grad_FD = single_gradient(work, values_E, grad_ND, W_FD.dtype)
        return grad_E, None, None, grad_FD


def sparse_decode(values_NK: Tensor, indices_NK: Tensor, W_FD: Tensor) -> Tensor:
    """``y_ND``, in the type of W; differentiable in values and W.

    Values and W: float32, bfloat16 or float16, the same type; indices int32 or int64; sums in float32. A repeated index
    adds up. A slot of value 0 adds nothing, and gets the gradient of the latent it names. Another slot whose index lies
    outside 0..F - 1 makes its token NaN. ``TypeError`` and ``ValueError`` as in :func:`sae_kernels.launch.check`.
    """
    launch.check(values_NK, indices_NK, W_FD)
    return _SparseDecode.apply(values_NK.contiguous(), indices_NK.contiguous(), W_FD)  # type: ignore[no-any-return]


def decode_entries(values_E: Tensor, indices_E: Tensor, offsets_N1: Tensor, W_FD: Tensor) -> Tensor:
    """``y_ND`` of codes of any width: the entries of token n are ``offsets[n]:offsets[n + 1]``, int64, from 0 to E.

    Otherwise as :func:`sparse_decode`. Offsets that reach past the entries make their token NaN. Active indices lie in
    0..F - 1 where W wants a gradient.
    """
    if values_E.dim() != 1 or offsets_N1.dim() != 1 or len(offsets_N1) == 0 or offsets_N1.dtype != torch.int64:
        raise ValueError(
            f"entries must be values [E], indices [E] and int64 offsets [N + 1]; got {tuple(values_E.shape)}, "
            f"{tuple(indices_E.shape)}, {tuple(offsets_N1.shape)} {offsets_N1.dtype}"
        )
    launch.check(values_E[None], indices_E[None], W_FD)
    arguments = (values_E.contiguous(), indices_E.contiguous(), offsets_N1.contiguous(), W_FD)
    return _DecodeEntries.apply(*arguments)  # type: ignore[no-any-return]
