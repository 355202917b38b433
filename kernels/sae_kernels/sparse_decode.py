"""Sparse decode: ``y_ND = sum over k of values_NK * W_FD[indices_NK]``, forward and backward, as autograd.Function.

Shapes: N tokens, K slots per token, F = d_sae, D = d_in. Reads N K rows of W where a dense product does F / K times the
arithmetic (Gao et al., arXiv 2406.04093, appendix D). The definition is ``sae.ops.sparse_decode(impl="torch")``.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from sae_kernels import launch
from sae_kernels.sparse_grad import values_gradient, weights_gradient


@triton.jit
def _decode_kernel(  # type: ignore[no-untyped-def]
    values_ptr, indices_ptr, w_ptr, out_ptr, n_slots, n_latents, width, ROWS: tl.constexpr, CHANNELS: tl.constexpr
):
    """One program = CHANNELS channels of one token, ROWS gathered rows at a time, summed in float32."""
    token = tl.program_id(0).to(tl.int64)
    channels = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    inside = channels < width
    total = tl.zeros((CHANNELS,), dtype=tl.float32)
    for start in range(0, n_slots, ROWS):
        slots = start + tl.arange(0, ROWS)
        used = slots < n_slots
        values = tl.load(values_ptr + token * n_slots + slots, mask=used, other=0.0).to(tl.float32)
        latents = tl.load(indices_ptr + token * n_slots + slots, mask=used, other=0).to(tl.int64)
        valid = (latents >= 0) & (latents < n_latents)
        # An empty slot costs no load. An index that names no row must not be read, nor pass unnoticed: NaN.
        rows = tl.load(
            w_ptr + latents[:, None] * width + channels[None, :],
            mask=((values != 0.0) & valid)[:, None] & inside[None, :], other=0.0,
        ).to(tl.float32)  # fmt: skip
        values = tl.where((values != 0.0) & (valid == 0), float("nan"), values)
        total += tl.sum(rows * values[:, None], axis=0)
    tl.store(out_ptr + token * width + channels, total.to(out_ptr.dtype.element_ty), mask=inside)


class _SparseDecode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values_NK: Tensor, indices_NK: Tensor, W_FD: Tensor) -> Tensor:
        (n_tokens, n_slots), (n_latents, width) = values_NK.shape, W_FD.shape
        ctx.save_for_backward(values_NK, indices_NK, W_FD)
        out_ND = torch.empty(n_tokens, width, dtype=W_FD.dtype, device=W_FD.device)
        if n_tokens == 0:
            return out_ND
        size = launch.blocks(width)
        with torch.cuda.device_of(W_FD):
            _decode_kernel[(n_tokens, size.programs)](
                values_NK, indices_NK, W_FD, out_ND, n_slots, n_latents, width,
                ROWS=launch.ROWS, CHANNELS=size.channels, num_warps=size.warps,
            )  # fmt: skip
        return out_ND

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
        values_NK, indices_NK, W_FD = ctx.saved_tensors
        grad_ND = grad_ND.contiguous()
        grad_NK = values_gradient(grad_ND, indices_NK, W_FD) if ctx.needs_input_grad[0] else None
        grad_FD = weights_gradient(grad_ND, values_NK, indices_NK, len(W_FD)) if ctx.needs_input_grad[2] else None
        return grad_NK, None, grad_FD


def sparse_decode(values_NK: Tensor, indices_NK: Tensor, W_FD: Tensor) -> Tensor:
    """``y_ND``, in the type of W; differentiable in values and W.

    Values and W: float32, bfloat16 or float16, the same type; indices int32 or int64; sums in float32. A repeated index
    adds up. A slot of value 0 adds nothing, and gets the gradient of the latent it names. Another slot whose index lies
    outside 0..F - 1 makes its token NaN. ``TypeError`` and ``ValueError`` as in :func:`sae_kernels.launch.check`.
    """
    launch.check(values_NK, indices_NK, W_FD)
    return _SparseDecode.apply(values_NK.contiguous(), indices_NK.contiguous(), W_FD)  # type: ignore[no-any-return]
